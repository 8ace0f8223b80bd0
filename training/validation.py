"""Validation on fixed images, noise and timesteps: the same for every variant, so that differences are paired.

Errors are resolved by timestep and by spatial frequency, for the true and for the null condition. Their gap says how
much of the condition y the predictions use. For optimal denoisers the I-MMSE relation (Guo, Shamai, Verdu 2005,
arXiv cs/0412108, equation 1; for diffusion Kong, Brekelmans, Ver Steeg 2023, arXiv 2302.03792) gives, in nats,

    I(x; y) = 1/2 * integral over l of E[ ||eps - eps_null||^2 - ||eps - eps_true||^2 ],

where l is the log-SNR ln(alpha_bar / (1 - alpha_bar)). That is at most the entropy of y: ln K for K equal classes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from freqgate_dit.losses import prediction_target, sample_timesteps, stratified_uniform
from freqgate_dit.spectral import dct2, octave_bands, octave_labels
from freqgate_dit.training.batches import VALIDATION, derived_seed
from freqgate_dit.training.latents import CachedLatents


NUM_BINS = 10


def noise_error_weights(scheduler) -> torch.Tensor:
    """What a squared error of the prediction is as one of the noise, at each timestep: `(T,)` float64 on the CPU.

    The noise error is sqrt(alpha_bar) times the velocity error, and sqrt(SNR) times the error of the sample.
    """
    alphas_cumprod = scheduler.alphas_cumprod.double().cpu()
    return {
        "epsilon": torch.ones_like(alphas_cumprod),
        "v_prediction": alphas_cumprod,
        "sample": alphas_cumprod / (1 - alphas_cumprod),
    }[scheduler.config.prediction_type]


def information_weights(scheduler) -> torch.Tensor:
    """What a gap in squared error (null - true, summed over a sample) counts in nats, at each timestep.

    With timesteps uniform over the schedule, the mean over samples of weight times gap is the integral above by the
    trapezoidal rule, from the first to the last timestep. A last timestep without signal (zero terminal SNR) lies at
    minus infinity and is left out: nothing about the condition is known there.

    Args:
        scheduler: gives the schedule and the prediction type; errors of velocity or sample are weighted so that they
            count as errors of the noise.

    Returns:
        `(T,)` float64 on the CPU.
    """
    alphas_cumprod = scheduler.alphas_cumprod.double().cpu()
    log_snr = torch.logit(alphas_cumprod)
    steps = (log_snr[:-1] - log_snr[1:]) / 2
    steps = torch.where(steps.isfinite(), steps, 0)
    widths = torch.zeros_like(log_snr)
    widths[:-1] += steps
    widths[1:] += steps
    return len(widths) * widths * noise_error_weights(scheduler) / 2


def entropy(labels: torch.Tensor) -> float:
    """Entropy in nats of the frequencies of `labels (N,)` int64."""
    probability = labels.cpu().bincount().double() / len(labels)
    return -torch.xlogy(probability, probability).sum().item()


@dataclass(eq=False)
class ValidationResult:
    """Mean squared errors of the prediction, in the scheduler's prediction type, and the information about the label.

    Tables are float64 on the CPU, `(bins, bands)`: equal parts of the schedule from clean to noise, by octaves of
    spatial frequency. A bin without images is NaN. Null condition and information are `None` if not computed.

    Args:
        num_train_timesteps: T, the end of the last timestep bin.
        bands: names of the bands in cycles per image, "0-1", "1-2", "2-4", ...
        coefficients: `(bands,)` DCT coefficients of a sample in each band, over all channels.
        num_images: `(bins,)` images in each timestep bin.
        loss, loss_by_timestep, loss_by_band, table: over everything; per bin; per band; both. A mean over bands
            weighted by `coefficients` is the plain mean squared error (Parseval).
        epsilon_loss, epsilon_loss_by_timestep, epsilon_loss_by_band, epsilon_table: the same of the noise that the
            predictions imply, which compares models of different prediction types.
        null_loss, null_loss_by_timestep, null_loss_by_band, null_table: the same as `loss` on the same noisy inputs
            without their label, or without the part of it that was asked about.
        information: estimate J of the information about the condition that the predictions use, in nats (see this
            module). Not clipped: an optimal model has J at most `label_entropy`; more means that the null
            condition is predicted worse than it could be, less than 0 that the label does harm.
        information_se: standard error of `information` over images and noise, for timesteps that are spread evenly.
        information_table: in nats per cell; the sum is `information`.
        label_entropy: of the labels of the held-out data, in nats.
    """

    num_train_timesteps: int
    bands: list[str]
    coefficients: torch.Tensor
    num_images: torch.Tensor
    loss: float
    loss_by_timestep: torch.Tensor
    loss_by_band: torch.Tensor
    table: torch.Tensor
    epsilon_loss: float
    epsilon_loss_by_timestep: torch.Tensor
    epsilon_loss_by_band: torch.Tensor
    epsilon_table: torch.Tensor
    null_loss: float | None = None
    null_loss_by_timestep: torch.Tensor | None = None
    null_loss_by_band: torch.Tensor | None = None
    null_table: torch.Tensor | None = None
    information: float | None = None
    information_se: float | None = None
    information_table: torch.Tensor | None = None
    label_entropy: float | None = None

    def scalars(self) -> dict[str, float]:
        """Flat numbers for a tracker; empty timestep bins are left out."""
        values = {"loss": self.loss}
        num_bins = len(self.num_images)
        for index, (loss, count) in enumerate(zip(self.loss_by_timestep, self.num_images, strict=True)):
            if count:
                values[f"loss_t{index + 1}of{num_bins}"] = loss.item()
        for name, loss in zip(self.bands, self.loss_by_band, strict=True):
            values[f"loss_band_{name}"] = loss.item()
        if self.null_loss is not None:
            values |= {"null_loss": self.null_loss, "information_nats": self.information}
            if math.isfinite(self.information_se):
                values["information_nats_se"] = self.information_se
        return values

    def to_json(self) -> dict:
        """All fields as numbers, strings and lists, under their names; what is not computed or not finite is None."""
        return {name: _plain(value) for name, value in vars(self).items()}


def _plain(value):
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    # NaN is no JSON.
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Validation:
    """Squared error on held-out data, timesteps spread evenly over the schedule whatever training draws.

    Args:
        data: held-out latents; the first `num_images` of a fixed shuffle are used, mirrored ones not.
        scheduler: the `DDPMScheduler` of training.
        num_images: how many.
        batch_size: images of a forward pass.
        process, num_processes: this process computes every `num_processes`-th batch.
        null_label: label of the null condition, if the model was trained with one: every batch is then denoised a
            second time without its labels. `None` for models without.
        num_bins: equal parts of the schedule that are reported separately.

    Raises:
        ValueError: if `null_label` is given for data without labels, or `num_bins` does not fit the schedule.
    """

    def __init__(
        self,
        data: CachedLatents,
        scheduler,
        num_images: int,
        batch_size: int,
        process: int = 0,
        num_processes: int = 1,
        null_label: int | None = None,
        num_bins: int = NUM_BINS,
    ):
        self.num_timesteps = scheduler.config.num_train_timesteps
        if null_label is not None and data.labels is None:
            raise ValueError(f"`null_label` is {null_label}, but `data` has no labels to leave out: pass None.")
        if not 1 <= num_bins <= self.num_timesteps:
            raise ValueError(f"`num_bins` ({num_bins}) must be from 1 to the schedule's {self.num_timesteps} steps.")
        self.scheduler = scheduler
        self.null_label = null_label
        self.num_bins = num_bins
        self.device = data.device
        self.shape = data.shape
        self.label_entropy = None if data.labels is None else entropy(data.labels)
        # Differences of conditions are far below the errors themselves, so sums are float64; Apple's GPUs have none.
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.information_weights = information_weights(scheduler).to(self.dtype).to(self.device)
        self.noise_error_weights = noise_error_weights(scheduler).to(self.dtype).to(self.device)
        self.band_names = octave_labels(*self.shape[1:])
        bands = octave_bands(*self.shape[1:], device=self.device).flatten()
        self.band_members = self._one_hot(bands, len(self.band_names)).T  # (H * W, bands)
        self.batches = list(self._fixed_batches(data, num_images, batch_size, process, num_processes))

    def _fixed_batches(self, data, num_images, batch_size, process, num_processes) -> Iterator[tuple]:
        """Sample, labels, noise and timesteps of each batch of this process."""
        # The seed is fixed and no part of the run: runs with different seeds are validated on the same numbers.
        generator = torch.Generator().manual_seed(derived_seed(0, VALIDATION))
        indices = torch.randperm(len(data), generator=generator)[:num_images]
        count = len(indices)
        noise = torch.randn((count, *data.shape), generator=generator)
        uniform = stratified_uniform(torch.rand(count, generator=generator), torch.arange(count), count)
        timesteps = sample_timesteps(uniform, self.num_timesteps)
        samples, labels = data.draw(indices, torch.zeros(count, device=data.device), generator=None)
        for start in range(0, count, batch_size)[process::num_processes]:
            part = slice(start, start + batch_size)
            yield (
                samples[part],
                None if labels is None else labels[part],
                noise[part].to(data.device),
                timesteps[part].to(data.device),
            )

    @torch.no_grad()
    def __call__(self, denoise: Callable, without: Callable | None = None) -> dict[str, torch.Tensor]:
        """Sums over this process's images, to be summed over processes and given to `summarise`.

        Args:
            denoise: `(noisy (B, C, H, W), timesteps (B,), labels (B,) or None) -> prediction (B, C, H, W)`.
            without: as `denoise`, but not using a part of the labels; its errors take the place of those under the
                null condition, with or without `null_label`.

        Returns:
            "count" `(bins,)`, "energy" and "epsilon_energy" `(bins, bands)`; and with a null condition "null_energy"
            and "information" `(bins, bands)`, "information_square" `(bins,)`. On the data's device.
        """
        totals = self._zeros(self.null_label is not None or without is not None)
        if without is None and self.null_label is not None:

            def without(noisy, timesteps, labels):
                return denoise(noisy, timesteps, torch.full_like(labels, self.null_label))

        for sample, labels, noise, timesteps in self.batches:
            noisy = self.scheduler.add_noise(sample, noise, timesteps)
            target = prediction_target(self.scheduler, sample, noise, timesteps)
            # (bins, B). A product with it sums per bin, always in the same order, as index_add_ on a GPU would not.
            members = self._one_hot(timesteps * self.num_bins // self.num_timesteps, self.num_bins)
            energy = self._band_energy(denoise(noisy, timesteps, labels), target)
            totals["count"] += members.sum(dim=1)
            totals["energy"] += members @ energy
            totals["epsilon_energy"] += members @ (self.noise_error_weights[timesteps, None] * energy)
            if without is not None:
                null_energy = self._band_energy(without(noisy, timesteps, labels), target)
                information = self.information_weights[timesteps, None] * (null_energy - energy)
                totals["null_energy"] += members @ null_energy
                totals["information"] += members @ information
                totals["information_square"] += members @ information.sum(dim=1).square()
        return totals

    def summarise(self, totals: dict[str, torch.Tensor]) -> ValidationResult:
        """Means, from the sum of all processes' totals."""
        totals = {name: total.double().cpu() for name, total in totals.items()}
        count = totals["count"]
        coefficients = self.shape[0] * self.band_members.sum(dim=0).double().cpu()
        values = _means("", totals["energy"], count, coefficients)
        values |= _means("epsilon_", totals["epsilon_energy"], count, coefficients)
        if "null_energy" in totals:
            values |= _means("null_", totals["null_energy"], count, coefficients)
            values |= _information(totals["information"], totals["information_square"], count)
        return ValidationResult(
            num_train_timesteps=self.num_timesteps,
            bands=self.band_names,
            coefficients=coefficients.long(),
            num_images=count.long(),
            label_entropy=self.label_entropy,
            **values,
        )

    def _zeros(self, twice: bool) -> dict[str, torch.Tensor]:
        bins, bands = self.num_bins, len(self.band_names)
        shapes = {"count": (bins,), "energy": (bins, bands), "epsilon_energy": (bins, bands)}
        if twice:
            shapes |= {"null_energy": (bins, bands), "information": (bins, bands), "information_square": (bins,)}
        return {name: torch.zeros(shape, dtype=self.dtype, device=self.device) for name, shape in shapes.items()}

    def _one_hot(self, index: torch.Tensor, count: int) -> torch.Tensor:
        """`(count, N)`: row k is 1 where `index (N,)` is k."""
        return (torch.arange(count, device=self.device)[:, None] == index).to(self.dtype)

    def _band_energy(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Squared error of each sample `(B, C, H, W)`, summed over the DCT coefficients of a band: `(B, bands)`."""
        coefficients = dct2(prediction.to(self.dtype) - target.to(self.dtype))
        return coefficients.square().sum(dim=1).flatten(1) @ self.band_members


def _means(prefix: str, energy: torch.Tensor, count: torch.Tensor, coefficients: torch.Tensor) -> dict:
    """Mean squared errors by name, from sums `(bins, bands)`, images `(bins,)` and coefficients `(bands,)`."""
    numbers = count[:, None] * coefficients
    return {
        f"{prefix}loss": (energy.sum() / numbers.sum()).item(),
        f"{prefix}loss_by_timestep": energy.sum(dim=1) / numbers.sum(dim=1),
        f"{prefix}loss_by_band": energy.sum(dim=0) / numbers.sum(dim=0),
        f"{prefix}table": energy / numbers,
    }


def _information(total: torch.Tensor, total_square: torch.Tensor, count: torch.Tensor) -> dict:
    """J and its table, from sums `(bins, bands)` over samples; its standard error, from sums of squares `(bins,)`."""
    num_images = count.sum()
    # Timesteps are spread evenly, so how the mean changes from bin to bin adds nothing to the error. Within a bin it
    # still counts, which errs on the large side. A single image in a bin says nothing about its spread: NaN.
    variance = (total_square - total.sum(dim=1).square() / count).clamp(min=0) / (count - 1)
    variance_of_sum = torch.where(count > 0, count * variance, 0).sum()
    return {
        "information": (total.sum() / num_images).item(),
        "information_se": (variance_of_sum.sqrt() / num_images).item(),
        "information_table": total / num_images,
    }
