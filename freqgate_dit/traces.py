"""In which order denoising makes frequencies: the power of each octave on the way, beside that of the data.

[`DenoisingTrace`] watches a call of the pipeline; [`noised_power`] is what the forward process does to the same
octaves, in closed form.
"""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from freqgate_dit.metrics import band_power
from freqgate_dit.spectral import octave_labels


def log_snr(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Logarithm of the signal-to-noise ratio `alpha / (1 - alpha)` at timesteps, whole or between two whole ones.

    Between them its root, Euler's sigma, is interpolated, as in diffusers' `EulerDiscreteScheduler`.

    Args:
        alphas_cumprod: `(T,)` of the schedule.
        timesteps: any shape, in [0, T - 1].
    """
    sigmas = ((1 - alphas_cumprod.double()) / alphas_cumprod.double()).sqrt()
    timesteps = timesteps.double().clamp(0, len(sigmas) - 1)
    below = timesteps.floor().long()
    above = (below + 1).clamp(max=len(sigmas) - 1)
    sigma = sigmas[below].lerp(sigmas[above], timesteps - below)
    return -2 * sigma.log()


def span_levels(alphas_cumprod: torch.Tensor, spans: int) -> torch.Tensor:
    """Log-SNR `(spans + 1,)` at the limits of equal spans of timesteps, from clean to noise; at most 20 either way, as
    a zero terminal SNR is not finite."""
    limits = torch.linspace(0, len(alphas_cumprod) - 1, spans + 1).round().long()
    return torch.logit(alphas_cumprod.double()).cpu()[limits].clamp(-20, 20)


def noised_power(power: torch.Tensor, alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """Power of the octaves of noisy data, `alpha S + 1 - alpha`, where white noise has power 1 at every frequency.

    Args:
        power: `(..., bands)` of the data.
        timesteps: `(T,)`.

    Returns:
        `(T, ..., bands)`.
    """
    alpha = log_snr(alphas_cumprod, timesteps).sigmoid().view(-1, *[1] * power.ndim)
    return alpha * power.double() + 1 - alpha


class NoPredictionError(ValueError):
    """A scheduler tells no predicted clean image."""


class DenoisingTrace:
    """Power of each octave in x_t and in the predicted clean image, after every step of a call of the pipeline.

        trace = DenoisingTrace()
        pipe(labels, callback_on_step_end=trace, callback_on_step_end_tensor_inputs=trace.tensor_inputs)
        trace.predicted_power.mean((1, 2))  # (steps, bands)

    One trace watches one call; in latent space, or with `space="pixel"` predictions as decoded by the autoencoder.

    Args:
        space: "latent": what the scheduler steps; "pixel": images in [-1, 1].
        basis: "dct" or "fft", see `metrics.band_power`.
        mean: `(C, H, W)`, the data's mean, or `(N, C, H, W)`, of each image's class, which is no part of the power; by
            default none is subtracted.

    Attributes:
        timesteps: `(steps,)`, at which the network was asked.
        log_snr: `(steps,)` of them.
        predicted_power: `(steps, N, C, bands)` of the predictions from there.
        latent_power: the same of x_t after the step, at unit scale: sqrt(alpha) x0 + sqrt(1 - alpha) e. Always of
            latents, without `mean`.
        bands: names of the octaves of `predicted_power`, in cycles per image.
    """

    tensor_inputs = ["latents", "pred_original_sample"]

    def __init__(self, space: str = "latent", basis: str = "dct", mean: torch.Tensor | None = None):
        if space not in ("latent", "pixel"):
            raise ValueError(f"`space` ({space!r}) must be latent or pixel.")
        self.space, self.basis, self.mean = space, basis, mean
        self._timesteps, self._log_snr, self._predicted, self._latents = [], [], [], []
        self.bands: list[str] = []

    def __call__(self, pipe, step: int, timestep, tensors: dict) -> dict:
        """A `callback_on_step_end`.

        Raises:
            NoPredictionError: if the scheduler tells none.
        """
        if step == 0 and self._timesteps:
            raise ValueError("this `DenoisingTrace` has watched a call already: make another one.")
        predicted = tensors["pred_original_sample"]
        if predicted is None:
            raise NoPredictionError(
                f"{type(pipe.scheduler).__name__} tells no predicted clean image: trace with another `scheduler`, "
                "such as EulerDiscreteScheduler."
            )
        if self.space == "pixel":
            predicted = 2 * pipe.postprocess(predicted, "pt") - 1
        self.bands = octave_labels(*predicted.shape[-2:])
        alphas_cumprod = pipe.scheduler.alphas_cumprod
        self._timesteps.append(float(timestep))
        self._log_snr.append(log_snr(alphas_cumprod.cpu(), torch.tensor(float(timestep))).item())
        self._predicted.append(band_power(predicted.float(), self.mean, self.basis))
        self._latents.append(band_power(unit_scale(pipe.scheduler, tensors["latents"]), basis=self.basis))
        return {}

    @property
    def timesteps(self) -> np.ndarray:
        return np.array(self._timesteps)

    @property
    def log_snr(self) -> np.ndarray:
        return np.array(self._log_snr)

    @property
    def predicted_power(self) -> torch.Tensor:
        if not self._predicted:
            raise ValueError(
                "this `DenoisingTrace` has watched no call yet: pass it to the pipeline as `callback_on_step_end`, "
                "and its `tensor_inputs` as `callback_on_step_end_tensor_inputs`."
            )
        return torch.stack(self._predicted)

    @property
    def latent_power(self) -> torch.Tensor:
        return torch.stack(self._latents)

    def arrival(self, share: float = 0.9, images: Sequence[int] | slice = slice(None)) -> list[float]:
        """Log-SNR from which on each octave of the predictions has `share` of its final power: `(bands,)`.

        Interpolated between steps; the first one's where it was there from the start. Low octaves come first where
        denoising goes from coarse to fine.

        Args:
            images: those of the call that count.
        """
        power = self.predicted_power[:, images].mean(dim=(1, 2)).numpy()
        return [last_crossing(self.log_snr, band / band[-1], share) for band in power.T]

    def rows(self) -> list[dict]:
        """A row per step and octave, for a table: means over images and channels."""
        predicted, latents = self.predicted_power.mean(dim=(1, 2)), self.latent_power.mean(dim=(1, 2))
        rows = []
        for step, (timestep, snr) in enumerate(zip(self._timesteps, self._log_snr)):
            for band, name in enumerate(self.bands):
                row = {"step": step, "timestep": timestep, "log_snr": snr, "band": name}
                row["predicted_power"] = predicted[step, band].item()
                if self.space == "latent":
                    row["latent_power"] = latents[step, band].item()
                rows.append(row)
        return rows


def unit_scale(scheduler: SchedulerMixin, latents: torch.Tensor) -> torch.Tensor:
    """Latents after a step as sqrt(alpha) x0 + sqrt(1 - alpha) e, which Euler's family keeps as x0 + sigma e."""
    latents = latents.float()
    if float(scheduler.init_noise_sigma) == 1:
        return latents
    sigma = float(scheduler.sigmas[scheduler.step_index])
    return latents / (1 + sigma**2) ** 0.5


def last_crossing(x: np.ndarray, values: np.ndarray, level: float) -> float:
    """The x from which on `values` stay at or above `level`, linearly interpolated; `x[0]` if they always do, NaN if
    they never do for good or are not finite."""
    if not np.isfinite(values).all():
        return float("nan")
    below = np.flatnonzero(values < level)
    if not len(below):
        return float(x[0])
    last = below[-1]
    if last == len(values) - 1:
        return float("nan")
    share = (level - values[last]) / (values[last + 1] - values[last])
    return float(x[last] + share * (x[last + 1] - x[last]))
