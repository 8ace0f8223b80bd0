"""Weights of the squared error per frequency, as functions of the coefficient and the noise level alone.

A squared error in an orthonormal basis keeps the conditional mean as its minimiser under any weights of this kind.
Weights that looked at the sample's own error, or a loss on magnitudes, would not (`losses.spectral_magnitude_loss`).
"""

from collections.abc import Callable

import torch

from freqgate_dit.spectral import idct2, octave_bands


BAND_WEIGHTS = ("octave", "bump", "decoder")


def octave_weights(height: int, width: int, gamma: float = 0.5) -> torch.Tensor:
    """(1 / n)^gamma for the n coefficients of an octave, with mean 1: high frequencies outnumber low ones.

    At gamma 1 every octave counts alike, at 0 every coefficient.

    Returns:
        `(H, W)` float32, the same for every channel.
    """
    bands = octave_bands(height, width)
    weights = bands.flatten().bincount().double()[bands] ** -gamma
    return (weights / weights.mean()).float()


def bump_weights(log_snr: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
    """0.1 + 4 G (1 - G) with the Wiener gain G = sigmoid(l + ln S): each coefficient is learned where it is decided.

    Args:
        log_snr: l of each sample, `(B,)`.
        power: S of each coefficient, `(C, H, W)`.

    Returns:
        `(B, C, H, W)` in [0.1, 1.1].
    """
    gain = torch.sigmoid(log_snr[:, None, None, None] + power.log())
    return 0.1 + 4 * gain * (1 - gain)


@torch.no_grad()
def decoder_weights(decode: Callable, latents: torch.Tensor, step: float = 0.05) -> torch.Tensor:
    """How much a coefficient of the latents matters in the picture: E ||d decode / d z_k||^2, with mean 1.

    By finite differences along one random direction per channel and octave, on all latents together: the mean square
    of a derivative along a random direction of a band is the mean over its coefficients.

    Args:
        decode: latents `(B, C, H, W)` to pixels.
        latents: typical ones, in the units of the model.
        step: standard deviation of the perturbation of a coefficient.

    Returns:
        `(C, H, W)` float32 on the latents' device.
    """
    channels, height, width = latents.shape[1:]
    bands = octave_bands(height, width, latents.device)
    clean = decode(latents).double()
    generator = torch.Generator().manual_seed(0)
    weights = torch.zeros(channels, height, width, dtype=torch.float64, device=latents.device)
    for band in range(int(bands.max()) + 1):
        inside = bands == band
        for channel in range(channels):
            signs = torch.randint(0, 2, latents.shape[:1] + (height, width), generator=generator) * 2.0 - 1
            coefficients = torch.zeros_like(latents)
            coefficients[:, channel] = step * signs.to(latents) * inside
            moved = decode(latents + idct2(coefficients).to(latents.dtype)).double()
            change = (moved - clean).square().sum() / len(latents)
            weights[channel] += torch.where(inside, change / (step**2 * inside.sum()), 0)
    if not weights.isfinite().all() or weights.mean() <= 0:
        raise ValueError(f"`decode` answers a change of the latents with a change of {weights.mean():.3g} on average.")
    return (weights / weights.mean()).float()


class BandWeights:
    """Weights of a batch by timestep, `weights(timesteps (B,)) -> (B, C or 1, H, W)`.

    Args:
        fixed: `(C or 1, H, W)`, the same at all noise levels; or `None` for `bump_weights`.
        power: of the data's coefficients, `(C, H, W)`, for the bump.
        alphas_cumprod: of the noise schedule, for the bump.
        blind: replace the weights of a noise level by their mean over coefficients: the control that weighs noise
            levels alike but frequencies not at all.
    """

    def __init__(
        self,
        fixed: torch.Tensor | None = None,
        power: torch.Tensor | None = None,
        alphas_cumprod: torch.Tensor | None = None,
        blind: bool = False,
    ):
        self.fixed, self.blind = fixed, blind
        if fixed is None:
            # Coefficients that are constant in the data would have no logarithm.
            self.power = power.float().clamp(min=1e-3 * power.float().mean())
            self.log_snr = torch.logit(alphas_cumprod.double()).clamp(-30, 30).float()

    def __call__(self, timesteps: torch.Tensor) -> torch.Tensor:
        device = timesteps.device
        if self.fixed is not None:
            weights = self.fixed.to(device).expand(len(timesteps), *self.fixed.shape)
        else:
            weights = bump_weights(self.log_snr.to(device)[timesteps], self.power.to(device))
        return weights.mean(dim=(1, 2, 3), keepdim=True) if self.blind else weights
