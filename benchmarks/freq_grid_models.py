"""Freq-Grid's controls: models that differ from it in one respect each.

    from freq_grid_models import CONTROLS
    from freqgate_dit.transformer_freqgate_dit import VARIANTS

    VARIANTS.update(CONTROLS)  # then the trainer knows them by `--variant NAME`

They are adaLN-Zero models with `grid_views` above 1 and "wiener" preconditioning; the plain `adaln_zero` with these
options is what they are compared with. Only sizes that divide into patches on every view are supported. diffusers
loads a pipeline with one of them in a process that has imported this module, and in no other.
"""

import functools
import math

import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import (
    ModelMixin,  # noqa: F401 (by which diffusers, looking into the module of a component, tells how to load it)
)
from torch import nn

from freqgate_dit.transformer_freqgate_dit import (
    AdaLNZeroDiTTransformer2DModel,
    ConditionedDiTTransformer2DModel,
    _without_autocast,
    dct2,
    idct2,
)


class ScalarComplementDiTTransformer2DModel(AdaLNZeroDiTTransformer2DModel):
    """Outside the block of a coarse view, one variance takes the place of a power per coefficient: their mean.

    Controls for the measured spectrum outside the block, as Subspace Diffusion (Jing et al. 2022, arXiv 2205.01490)
    takes the complement for Gaussian with one standard deviation. The means of the coefficients stay, and so do the
    switches. Untrained, it is not the Wiener filter on coarse views.
    """

    def precondition(self, hidden_states, known, view=0):
        if view:
            log_snr, mean, power = known
            rows, columns = self.view_size(view, *power.shape[-2:])
            outside = torch.ones_like(power)
            outside[:, :rows, :columns] = 0
            known = log_snr, mean, torch.where(outside > 0, (power * outside).sum() / outside.sum(), power)
        return super().precondition(hidden_states, known, view)


class WholePatchHeadDiTTransformer2DModel(AdaLNZeroDiTTransformer2DModel):
    """A token of a coarse view sees the low-pass image, and answers F for all pixels of its place in the full image.

    Controls for the coefficients outside the block, where Freq-Grid's F is 0: with the Wiener filter alone they cannot
    be predicted from lower frequencies, as they can here (super-resolution). Between Freq-Grid and PPFlow, which also
    answers whole patches (arXiv 2506.23543).
    """

    def add_parts(self, dim):
        sizes = [self.config.patch_size * 2**view for view in range(1, self.config.grid_views)]
        self.coarse_proj_outs = nn.ModuleList(nn.Linear(dim, size**2 * self.out_channels) for size in sizes)

    def precondition(self, hidden_states, known, view=0):
        inputs, (skip, gain) = super().precondition(hidden_states, known, view)
        if view:
            # At each noise level it is proportional to the root of the Wiener gain, inside the block and outside.
            log_snr, _, power = known
            wiener = torch.sigmoid(self.preconditioner.gate_logit(log_snr, power))
            gain = gain[..., :1, :1] * (wiener / wiener[..., :1, :1]).sqrt()
        return inputs, (skip, gain)

    def unpatchify(self, patches, rows, columns):
        size = math.isqrt(patches.shape[-1] // self.out_channels)
        patches = patches.unflatten(-1, (size, size, self.out_channels)).unflatten(1, (rows, columns))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class LargePatchesDiTTransformer2DModel(WholePatchHeadDiTTransformer2DModel):
    """A coarse view is the whole gated image in patches of twice the side, four times, ...; answers are whole patches.

    Controls for the low-pass: the tokens, projections and switches of Freq-Grid, but all frequencies go in and out, as
    in PPFlow (arXiv 2506.23543), whose embedding of the level is left out here: the timestep tells the view.
    """

    def add_parts(self, dim):
        super().add_parts(dim)
        size, channels = self.config.patch_size, self.config.in_channels
        # On an unshuffled image, with 4**view channels in place of 2**view x 2**view pixels.
        self.coarse_patch_embeds = nn.ModuleList(
            nn.Conv2d(channels * 4**view, dim, kernel_size=size, stride=size)
            for view in range(1, self.config.grid_views)
        )

    def precondition(self, hidden_states, known, view=0):
        inputs, coefficients = super().precondition(hidden_states, known)  # of the full grid
        return F.pixel_unshuffle(inputs, 2**view), coefficients

    def token_grid(self, hidden_states):
        return super().token_grid(hidden_states[:, : self.config.in_channels])  # an unshuffled image has more


class SharedProjectionsDiTTransformer2DModel(AdaLNZeroDiTTransformer2DModel):
    """All views go through the input and output projection of the full grid.

    Controls for the projections of their own: the low-frequency block is an ordinary smaller image, of unit power like
    the full one, so one embedding can serve all, as in PixelFlow (arXiv 2504.07963). The timestep tells the view.
    """

    def add_parts(self, dim):
        # Plain lists: registered modules would be in the state twice, which safetensors refuses to save.
        del self.coarse_patch_embeds, self.coarse_proj_outs
        self.coarse_patch_embeds = [self.patch_embed] * (self.config.grid_views - 1)
        self.coarse_proj_outs = [self.proj_out] * (self.config.grid_views - 1)

    @classmethod
    def _load_pretrained_model(cls, *args, **kwargs):
        # As its own base does, but for the check of the number of views, of which the weights show one.
        kwargs["keep_in_fp32_modules"] = ["spectrum"]
        return super(ConditionedDiTTransformer2DModel, cls)._load_pretrained_model(*args, **kwargs)


class PermutedDiTTransformer2DModel(AdaLNZeroDiTTransformer2DModel):
    """The views in the mirrored order: coarse grids at low noise, the full grid at high noise.

    Controls for the match of view and noise level: each view serves the same share of the training density as in
    Freq-Grid, hence at the same cost, but a quantile q of the density has the view of quantile 1 - q. That is so for
    logit-normal timesteps of mean `logit_mean` and any `logit_std`; for uniform ones leave the mean at 0.
    """

    logit_mean = 0.0

    def views_of(self, timestep):
        steps = self.config.num_train_timesteps
        # Timestep t stands for the interval from t to t + 1, whose middle is mirrored.
        logit = torch.logit((timestep.float() + 0.5) / steps)
        return super().views_of(steps * torch.sigmoid(2 * self.logit_mean - logit) - 0.5)


@functools.cache
def random_order(count: int) -> torch.Tensor:
    """A fixed permutation of `count` places, on the CPU."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0), device="cpu")


def reordered(coefficients: torch.Tensor, back: bool = False) -> torch.Tensor:
    """Coefficients `(..., H, W)` in random order, the same for all channels; or `back` in their own."""
    order = random_order(coefficients.shape[-2:].numel())
    order = (order.argsort() if back else order).to(coefficients.device)
    return coefficients.flatten(-2)[..., order].view_as(coefficients)


class RandomBlockDiTTransformer2DModel(AdaLNZeroDiTTransformer2DModel):
    """A coarse view sees and answers as many coefficients as in Freq-Grid, but any, in random order.

    Controls for what a view shows: equal tokens, cost and switches, without the low frequencies and without a picture.
    The choice is random once and for all; that of a coarser view is part of that of a finer one. It must lose.
    """

    def precondition(self, hidden_states, known, view=0):
        if not view:
            return super().precondition(hidden_states, known)
        log_snr, mean, power = known
        with _without_autocast(hidden_states.device.type):
            noisy = idct2(reordered(dct2(hidden_states.float())))
        inputs, (skip, gain) = super().precondition(noisy, (log_snr, reordered(mean), reordered(power)), view)
        return inputs.to(hidden_states.dtype), (skip, gain)

    def compose(self, output, coefficients, dtype):
        skip, gain = coefficients
        if gain.shape == skip.shape:  # the full grid
            return super().compose(output, coefficients, dtype)
        with _without_autocast(output.device.type):
            answer = gain * dct2(output.float())
            rows, columns = (full - own for full, own in zip(skip.shape[-2:], answer.shape[-2:]))
            answer = F.pad(answer, (0, columns, 0, rows))
            return idct2(reordered(skip + answer, back=True)).to(dtype)


# Short name, for `--variant` -> class.
CONTROLS = {
    "scalar_complement": ScalarComplementDiTTransformer2DModel,
    "large_patches": LargePatchesDiTTransformer2DModel,
    "whole_patch_head": WholePatchHeadDiTTransformer2DModel,
    "shared_projections": SharedProjectionsDiTTransformer2DModel,
    "permuted": PermutedDiTTransformer2DModel,
    "random_block": RandomBlockDiTTransformer2DModel,
}
