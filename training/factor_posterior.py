"""What a noisy image of the built-in data tells of its structure and texture, by Bayes' rule.

How these images are made is known, so nothing has to be learnt: the likelihood of a noisy image under a label is its
mean likelihood under images drawn of that label, whose pose, phase and colours are random too.

Each factor is read where the other one is not: in its own band, and in a world of coloured textures the structure from
grey and the texture from the rest. So a draw has to fit one factor only. Of tens of thousands of draws, some fit the
structure of a given image and others its texture, but hardly any fits both.
"""

from collections.abc import Callable

import torch

from freqgate_dit.shapes_textures import MIN_IMAGE_SIZE, NUM_CLASSES, STRUCTURES, TEXTURES, ShapesTextures
from freqgate_dit.spectral import dct2, radial_frequency


# With half and with twice of it, half of a factor is told at the same log-SNR, to 0.03 (in "mod" and "flat").
NUM_DRAWS = 16_384
_BATCH_PIXELS = 2**20
_HIGHEST = MIN_IMAGE_SIZE / 2  # cycles per image: outlines have next to nothing beyond it
_NOISE_IMAGES = 4096
_ALL_COLOURS = torch.eye(3)
_GREY = torch.tensor([[3**-0.5] * 3])
_NOT_GREY = torch.tensor([[0.5**0.5, -(0.5**0.5), 0], [6**-0.5, 6**-0.5, -2 * 6**-0.5]])


class FactorPosterior:
    """`p(structure, texture | x_l)` for images of the built-in data and Gaussian noise.

    It is as good as its draws are many, up to simplifications: what the other factor's part tells is not used (in
    "mod" the texture's outline would tell the structure, and the structure's pose where the texture is); an image's
    own noise is taken to be white, and nothing to be clipped; that a structure's contrast differs a little among the
    colours is neglected in coloured worlds. As any prediction of a factor, it knows on average at most what there is
    to know.

    Args:
        world: of `freqgate_dit.shapes_textures.WORLDS`.
        image_size: as of the images that a model sees, at least 32.
        num_draws: a positive multiple of 64, the number of labels. A quarter of the default is too few for clear
            images: where no draw is near, the nearest decides.
        seed: of the draws, which are images of the split "train".

    Raises:
        ValueError: if `num_draws` is no such number, or from `ShapesTextures`.
    """

    def __init__(self, world: str, image_size: int, num_draws: int = NUM_DRAWS, seed: int = 0):
        if num_draws < NUM_CLASSES or num_draws % NUM_CLASSES:
            raise ValueError(
                f"num_draws is {num_draws}; pass a positive multiple of {NUM_CLASSES}, as many per label."
            )
        self.num_draws = num_draws
        data = ShapesTextures(num_draws, image_size, world, split="train", seed=seed)
        self.is_masked = data.is_masked
        colours = (_GREY, _NOT_GREY) if data.is_coloured else (_ALL_COLOURS, _ALL_COLOURS)
        views = [_view(basis, band, image_size) for basis, band in zip(colours, data.bands.values())]
        seen, noise = ([], []), ([], [])
        batch = max(1, _BATCH_PIXELS // image_size**2)
        for start in range(0, num_draws, batch):
            parts = data.components(range(start, min(start + batch, num_draws)))
            for view, signals, of_noise, part in zip(views, seen, noise, (parts.structure, parts.texture)):
                signals.append(view(part))
                if start < _NOISE_IMAGES:
                    of_noise.append(view(parts.noise).square().mean())
        order = data.labels(range(num_draws)).argsort()  # as many of each label
        self.likelihoods = [
            _Likelihood(view, torch.cat(signals)[order], torch.stack(of_noise).mean())
            for view, signals, of_noise in zip(views, seen, noise)
        ]

    @torch.no_grad()
    def __call__(self, noisy: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        """Log-probabilities `(B, structures, textures)`.

        Args:
            noisy: `sqrt(a) x + sqrt(1 - a) e` with `a = sigmoid(log_snr)`, `(B, 3, H, W)`, of images x in [-1, 1]; of
                any floating point type, and read as float32.
            log_snr: `(B,)`; without any signal, at -inf, all values are equally probable.
        """
        noisy, log_snr = noisy.float(), log_snr.float()
        by_draw = (len(noisy), len(STRUCTURES), len(TEXTURES), -1)
        of_structure, of_texture = (likelihood(noisy, log_snr).view(by_draw) for likelihood in self.likelihoods)
        structure = of_structure.logsumexp((2, 3)).log_softmax(1)[:, :, None]
        if self.is_masked:
            texture = of_texture.logsumexp(3)  # of a texture inside this structure
        else:
            texture = of_texture.logsumexp((1, 3))[:, None]  # whatever the draw's structure
        return structure + texture.log_softmax(2)


class _Likelihood:
    """Log-likelihood `(B, N)` of noisy images `(B, 3, H, W)` under N draws of a factor, up to a term of each image.

    Args:
        view: of images, the coefficients `(B, D)` in which the factor is seen.
        signals: `(N, D)`, the draws there.
        noise: variance of an image's own noise there.
    """

    def __init__(self, view: Callable, signals: torch.Tensor, noise: torch.Tensor):
        self.view, self.signals, self.noise = view, signals, noise
        self.energy = signals.square().sum(1)

    def __call__(self, noisy: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        alpha = log_snr.sigmoid()[:, None]
        variance = alpha * self.noise + (-log_snr).sigmoid()[:, None]
        # -|y - sqrt(a) s|^2 / 2 without |y|^2, which all draws share.
        return (alpha.sqrt() * (self.view(noisy) @ self.signals.T) - 0.5 * alpha * self.energy) / variance


def _view(colours: torch.Tensor, band: tuple[float, float], image_size: int) -> Callable:
    """Of images `(B, 3, H, W)` the DCT coefficients of a band in some colours, orthonormal rows `(C, 3)`: `(B, D)`."""
    lowest, highest = band
    frequency = radial_frequency(image_size, image_size)
    window = (frequency >= lowest) & (frequency <= min(highest, _HIGHEST))

    def view(images: torch.Tensor) -> torch.Tensor:
        seen = torch.einsum("kc,bchw->bkhw", colours.to(images.dtype), images)
        return dct2(seen)[..., window].flatten(1).float()

    return view
