"""The diffusion objective: what the network is asked to predict, at which noise levels, with which weights.

Everything random comes in as an argument, so that a trainer can make noise, timesteps and label dropout functions of
(seed, step, global index). Named terms are returned separately; `DiffusionObjective.total` weighs them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler

from freqgate_dit.spectral import dct2
from freqgate_dit.transformer_freqgate_dit import PREDICTION_TYPES


TIMESTEP_SAMPLING = ("uniform", "logit_normal")


def stratified_uniform(noise: torch.Tensor, index: torch.Tensor, count: int) -> torch.Tensor:
    """Uniforms that fill [0, 1) evenly over a global batch: `u_i = ((index_i + noise_i) / count)`.

    Args:
        noise: `(B,)` uniform on [0, 1).
        index: `(B,)` int, place of each sample in the global batch of `count` samples.
        count: size of the global batch, over all processes and accumulation steps.

    Returns:
        `(B,)` in [0, 1). Each is uniform if the samples' places are independent of the samples (they are shuffled).
    """
    # float32 rounds (count - 1 + 0.9999999) / count up to 1.0.
    return ((index + noise) / count).clamp(max=1 - 2**-24)


def sample_timesteps(
    uniform: torch.Tensor,
    num_train_timesteps: int,
    sampling: str = "uniform",
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
) -> torch.Tensor:
    """Timesteps from uniforms, by the inverse of the distribution function.

    Args:
        uniform: `(B,)` in [0, 1).
        num_train_timesteps: number of steps T of the schedule.
        sampling: "uniform", or "logit_normal": t/T is the logistic function of a normal with `logit_mean` and
            `logit_std` (Esser et al. 2024, arXiv 2403.03206, section 3.1).

    Returns:
        `(B,)` int64 in [0, T - 1].
    """
    if sampling == "logit_normal":
        # Clamped because the normal quantile of 0 is minus infinity. (float32: some devices have no float64.)
        uniform = uniform.float().clamp(1e-6, 1 - 1e-6)
        uniform = torch.sigmoid(logit_mean + logit_std * math.sqrt(2) * torch.erfinv(2 * uniform - 1))
    elif sampling != "uniform":
        raise ValueError(f"`sampling` ({sampling!r}) must be one of {TIMESTEP_SAMPLING}.")
    return (uniform * num_train_timesteps).long().clamp(0, num_train_timesteps - 1)


def timestep_distribution(
    num_train_timesteps: int, sampling: str = "uniform", logit_mean: float = 0.0, logit_std: float = 1.0
) -> torch.Tensor:
    """Probability that `sample_timesteps` gives a timestep below t, for t = 0 to T: the inverse of what it computes.

    Returns:
        `(T + 1,)` float64 on the CPU, rising from 0 to 1. Its differences are the probabilities of the timesteps.
    """
    progress = torch.linspace(0, 1, num_train_timesteps + 1, dtype=torch.float64)
    if sampling == "uniform":
        return progress
    # The ends are infinite logits, whose quantiles are 0 and 1.
    return torch.special.ndtr((torch.logit(progress) - logit_mean) / logit_std)


def drop_labels(labels: torch.Tensor, null_label: int, uniform: torch.Tensor, probability: float) -> torch.Tensor:
    """Replace labels `(B,)` by `null_label` where `uniform (B,)` < `probability`: the training side of guidance."""
    return torch.where(uniform < probability, torch.full_like(labels, null_label), labels)


def prediction_target(
    scheduler: DDPMScheduler, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the network should predict, for the scheduler's `prediction_type`. All tensors `(B, C, H, W)`, `(B,)`."""
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(sample, noise, timesteps)
    if prediction_type == "sample":
        return sample
    raise ValueError(f"`prediction_type` of the scheduler ({prediction_type!r}) must be one of {PREDICTION_TYPES}.")


def signal_to_noise_ratio(scheduler: DDPMScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """SNR = alpha_bar / (1 - alpha_bar) at `timesteps (B,)`, float32."""
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alphas_cumprod / (1 - alphas_cumprod)


def min_snr_weight(snr: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Weight of a sample's squared error so that its x0 error is weighed by min(SNR, gamma).

    Min-SNR (Hang et al. 2023, arXiv 2303.09556, section 3.4): an x0 error of 1 is an epsilon error of SNR and a
    v error of SNR + 1.
    """
    clipped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        # Not clipped / snr, which is 0 / 0 at an SNR of 0 (a schedule rescaled to zero terminal SNR).
        return (gamma / snr).clamp(max=1)
    if prediction_type == "v_prediction":
        return clipped / (snr + 1)
    return clipped


def spectral_magnitude_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The source experiment's spectral loss: mean over L1 differences of 2-D Fourier magnitudes, per sample.

    It compares `abs(rfft2(., norm="ortho"))` and ignores phase. Its minimiser is not the conditional mean: on noise
    that cannot be predicted it still asks for magnitude. Kept for faithful reproduction.

    Args:
        prediction, target: `(B, C, H, W)`, any float dtype; transformed in float32.

    Returns:
        `(B,)` float32.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        magnitude = torch.fft.rfft2(prediction.float(), norm="ortho").abs()
        target_magnitude = torch.fft.rfft2(target.float(), norm="ortho").abs()
        return (magnitude - target_magnitude).abs().flatten(1).mean(dim=1)


@dataclass
class DiffusionObjective:
    """Mean squared error of the scheduler's prediction type on variance-preserving noise, plus named extra terms.

    Args:
        scheduler: the `DDPMScheduler` that adds noise; its `prediction_type` decides the target.
        timestep_sampling: "uniform" or "logit_normal" (see `sample_timesteps`).
        logit_mean, logit_std: of the logit-normal distribution.
        min_snr_gamma: clip of the min-SNR weight (5 is usual), `None` for unweighted.
        spectral_weight: weight of `spectral_magnitude_loss` in the total; the term is left out at 0.
        band_weights: weights of the squared error per DCT coefficient, from timesteps `(B,)` to shapes that broadcast
            to `(B, C, H, W)` (`freqgate_dit.band_weights`); `None` for the plain error.
    """

    scheduler: DDPMScheduler
    timestep_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    min_snr_gamma: float | None = None
    spectral_weight: float = 0.0
    band_weights: Callable | None = None

    def __post_init__(self):
        if self.scheduler.config.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"`scheduler` has prediction_type {self.scheduler.config.prediction_type!r}; the objective knows "
                f"{PREDICTION_TYPES}."
            )
        if self.timestep_sampling not in TIMESTEP_SAMPLING:
            raise ValueError(f"`timestep_sampling` ({self.timestep_sampling!r}) must be one of {TIMESTEP_SAMPLING}.")
        if self.min_snr_gamma is not None and self.min_snr_gamma <= 0:
            raise ValueError(f"`min_snr_gamma` ({self.min_snr_gamma}) must be positive, or None for no weighting.")
        if self.spectral_weight < 0:
            raise ValueError(f"`spectral_weight` ({self.spectral_weight}) must not be negative; 0 turns it off.")

    def timesteps(self, uniform: torch.Tensor) -> torch.Tensor:
        """Timesteps `(B,)` int64 for uniforms `(B,)` in [0, 1)."""
        return sample_timesteps(
            uniform,
            self.scheduler.config.num_train_timesteps,
            self.timestep_sampling,
            self.logit_mean,
            self.logit_std,
        )

    def timestep_distribution(self) -> torch.Tensor:
        """Probability `(T + 1,)` float64 on the CPU that training draws a timestep below t, for t = 0 to T."""
        return timestep_distribution(
            self.scheduler.config.num_train_timesteps, self.timestep_sampling, self.logit_mean, self.logit_std
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Of the loss terms, in their order."""
        return ("mse", "spectral") if self.spectral_weight else ("mse",)

    def terms(
        self, denoise: Callable, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The loss terms, per sample and unweighted by each other.

        Args:
            denoise: `(noisy (B, C, H, W), timesteps (B,)) -> prediction (B, C, H, W)`; the condition is bound in it.
            sample: clean data or latents `(B, C, H, W)`.
            noise: unit normal, of the same shape.
            timesteps: `(B,)` int64.

        Returns:
            "mse" `(B,)`: squared error averaged over the elements of a sample, band and min-SNR weighted if so set;
            and "spectral" `(B,)` if `spectral_weight` is not 0. float32.
        """
        noisy = self.scheduler.add_noise(sample, noise, timesteps)
        target = prediction_target(self.scheduler, sample, noise, timesteps).float()
        prediction = denoise(noisy, timesteps).float()
        if self.band_weights is None:
            mse = F.mse_loss(prediction, target, reduction="none").flatten(1).mean(dim=1)
        else:
            mse = (self.band_weights(timesteps) * dct2(prediction - target).square()).flatten(1).mean(dim=1)
        if self.min_snr_gamma is not None:
            snr = signal_to_noise_ratio(self.scheduler, timesteps)
            mse = mse * min_snr_weight(snr, self.min_snr_gamma, self.scheduler.config.prediction_type)
        terms = {"mse": mse}
        if self.spectral_weight:
            terms["spectral"] = spectral_magnitude_loss(prediction, target)
        return terms

    def total(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        """The scalar to minimise: batch means of the terms `(B,)`, weighted and summed."""
        weights = {"mse": 1.0, "spectral": self.spectral_weight}
        return sum(weights[name] * term.mean() for name, term in terms.items())
