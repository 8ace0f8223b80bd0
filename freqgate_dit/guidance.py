"""Guiders besides those of diffusers, for `FreqGateDiTPipeline(..., guider=...)`."""

import math

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput


class WeakModelGuidance(BaseGuidance):
    r"""
    Autoguidance: away from what a weaker model of the same task predicts under the same condition (Karras et al. 2024,
    arXiv 2406.02507), `D = D_weak + s * (D_model - D_weak)`.

    The weaker model is an earlier or shorter average of the same run, or a smaller or less trained one. It needs no
    null condition, so models trained without dropout of the condition, and unconditional ones, can be guided too.
    (diffusers' `AutoGuidance` weakens the model itself, by leaving out layers.)

    Args:
        weak_model (`torch.nn.Module`): takes the same inputs as the pipeline's transformer.
        guidance_scale (`float`, defaults to `2.0`): s; 1 is the model alone, in one pass.
        start, stop (`float`, defaults to `0.0` and `1.0`): fractions of the steps between which guidance acts.

    Example:

    ```py
    >>> weak = AutoModel.from_pretrained("runs/mine/pipeline_ema_0.2", subfolder="transformer")
    >>> images = pipe("cat", guider=WeakModelGuidance(weak, guidance_scale=2.0)).images
    ```
    """

    _input_predictions = ["pred_cond", "pred_weak"]
    ignore_for_config = ["weak_model"]
    uses_null_condition = False

    @register_to_config
    def __init__(
        self,
        weak_model: torch.nn.Module,
        guidance_scale: float = 2.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(start, stop, enabled)
        self.weak_model = weak_model
        self.guidance_scale = guidance_scale

    def prepare_inputs(self, data):
        # Both models see the condition, which is the first of each pair.
        return [self._prepare_batch(data, 0, name) for name in self._input_predictions[: self.num_conditions]]

    def prepare_models(self, denoiser: torch.nn.Module):
        super().prepare_models(denoiser)
        if not self.is_conditional:
            self._forward = denoiser.__dict__.get("forward")
            denoiser.forward = self.weak_model.to(denoiser.device, denoiser.dtype).forward

    def cleanup_models(self, denoiser: torch.nn.Module):
        if not self.is_conditional:
            del denoiser.forward
            if self._forward is not None:  # of a hook, for offloading, say
                denoiser.forward = self._forward

    def forward(self, pred_cond: torch.Tensor, pred_weak: torch.Tensor | None = None) -> GuiderOutput:
        if pred_weak is None:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond)
        pred = pred_weak + self.guidance_scale * (pred_cond - pred_weak)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_weak)

    @property
    def is_conditional(self) -> bool:
        """Whether the model's own pass is the one that was prepared last."""
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        return 2 if self._acts() else 1

    def _acts(self) -> bool:
        if not self._enabled or math.isclose(self.guidance_scale, 1.0):
            return False
        if self._num_inference_steps is None:
            return True
        first, last = (int(fraction * self._num_inference_steps) for fraction in (self._start, self._stop))
        return first <= self._step < last
