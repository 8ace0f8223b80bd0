"""What a report is of: a pipeline, the images that are measured, and the data it was trained on."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler

from freqgate_dit.features import CACHE_DIR
from freqgate_dit.pipelines.pipeline_freqgate_dit import FreqGateDiTPipeline, encode_to_latent_moments
from freqgate_dit.scheduling_spectral_euler import spectral_mean, spectral_power
from freqgate_dit.shapes_textures import NUM_CLASSES, TEXTURES, ShapesTextures
from freqgate_dit.spectral import SpectrumStatistics, dct2, idct2, octave_bands
from freqgate_dit.training.factor_classifier import scaled
from freqgate_dit.training.factor_posterior import FactorPosterior
from freqgate_dit.training.information import factor_information, half_level, without_factor
from freqgate_dit.training.judges import factor_judge
from freqgate_dit.training.latents import CachedLatents
from freqgate_dit.training.validation import Validation, ValidationResult


LEAST_SHOWN = 0.5  # share of right images, from which on it is measured what becomes of them
NUM_OF_SPECTRUM = 1024
NUM_AROUND_CLASSES = 8192
NUM_WITHOUT_FACTOR = 2048  # a difference of errors is far noisier than an error


@dataclass(frozen=True)
class Spectrum:
    """What images are like, by frequency.

    Args:
        mean: image `(C, H, W)`; or `(classes, C, H, W)`, of each class.
        power: `(C, H, W)` of the DCT coefficients around it.
        source: where they are from, in words.
    """

    mean: torch.Tensor
    power: torch.Tensor
    source: str

    @property
    def octaves(self) -> torch.Tensor:
        """Mean power `(bands,)`."""
        power, bands = self.power.mean(0), octave_bands(*self.power.shape[-2:])
        return torch.stack([power[bands == band].mean() for band in range(int(bands.max()) + 1)])

    def linear_arrival(self, share: float) -> list[float]:
        """Log-SNR at which each octave has `share` of its final power in what the best linear denoiser of such data
        predicts: of a coefficient of power S that is S times its Wiener gain, sigmoid(l + ln S)."""
        levels = torch.linspace(-20, 30, 2001, dtype=torch.float64)
        bands = octave_bands(*self.power.shape[-2:])
        found = []
        for band in range(int(bands.max()) + 1):
            power = self.power[:, bands == band].flatten().double()
            predicted = torch.sigmoid(levels[:, None] + power.log()) @ power / power.sum()
            found.append(float(np.interp(share, predicted.numpy(), levels.numpy())))
        return found


@dataclass
class Subject:
    """What is analysed, and how.

    Args:
        world: of the built-in data that the pipeline was trained on, or `None`: then labels have no known factors.
        num_images: sampled for each measurement.
        steps: of the scheduler.
        prompts: of a text-conditional pipeline, used in turn.
        cache_dir: where the judge of the built-in data is kept, once trained.

    Raises:
        ValueError: for a text-conditional pipeline without prompts.
    """

    pipe: FreqGateDiTPipeline
    world: str | None
    num_images: int = 128
    steps: int = 30
    num_pairs: int = 64
    num_levels: int = 12
    seed: int = 0
    batch_size: int = 128
    prompts: Sequence[str] = ()
    cache_dir: str | Path = CACHE_DIR
    guidance_scale: float = field(default=1.0, init=False)  # guidance would mix its own effects in

    def __post_init__(self):
        if self.pipe.is_text_conditional and not self.prompts:
            raise ValueError("`prompts` is empty, and this pipeline is conditioned on text: give some.")

    @property
    def has_factors(self) -> bool:
        """Whether its labels say which structure and texture an image should show."""
        return self.world is not None and self.pipe.num_classes == NUM_CLASSES

    @property
    def why_no_factors(self) -> str:
        """Why not, as the end of a sentence."""
        if self.world is not None:
            return "this pipeline was trained on that data without its labels"
        return (
            "this pipeline was trained on other data, or lacks the training_config.yaml that would say so (`--world` "
            "does too)"
        )

    @property
    def is_conditional(self) -> bool:
        """Whether there are class labels that can be exchanged."""
        return self.pipe.num_classes is not None

    @property
    def has_null_condition(self) -> bool:
        return self.is_conditional and self.pipe.has_null_condition

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        return self.pipe.scheduler.alphas_cumprod.cpu()

    @property
    def labels(self) -> list[int]:
        return [index % self.pipe.num_classes for index in range(self.num_images)]

    def diverse(self, count: int) -> list[int]:
        """Images to look at, by index: of the built-in data, whose class is 8 x structure + texture, another structure
        and another texture each."""
        step = len(TEXTURES) + 1 if self.has_factors else 1
        return [step * index for index in range(count)]

    def name_of(self, index: int) -> str:
        """What image `index` is to show, in lines."""
        if self.pipe.is_text_conditional:
            return textwrap.fill(textwrap.shorten(self.prompts[index % len(self.prompts)], 60), 20)
        if not self.is_conditional:
            return str(index)
        return self.class_name(index % self.pipe.num_classes)

    def class_name(self, label: int) -> str:
        """In lines."""
        return str(self.pipe.id2label.get(label, label)).replace(" ", "\n")

    def other_label(self, labels):
        """Another class for each; of the built-in data one that differs in structure and in texture."""
        classes = self.pipe.num_classes
        return (labels + (classes // 2 + 3 if self.has_factors else 1)) % classes

    @property
    def image_size(self) -> int:
        return self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor

    @cached_property
    def classifier(self):
        """Judge of the built-in data's factors, and its accuracies on held-out real images."""
        return factor_judge(self.world, self.image_size, self.cache_dir)

    @torch.no_grad()
    def to_model_space(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(N, 3, H, W)` in [-1, 1] as the model sees them."""
        vae = self.pipe.vae
        return images if vae is None else encode_to_latent_moments(vae, images.to(vae.device))[0].cpu()

    def real_images(self, count: int, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of the world, as the model sees them, and their labels."""
        data = ShapesTextures(count, self.image_size, self.world, split=split)
        return self.to_model_space(scaled(data.images(range(count)))), data.labels(range(count))

    @cached_property
    def held_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.real_images(512, "validation")

    @cached_property
    def factor_posterior(self) -> FactorPosterior:
        """Reads the built-in data's factors off noisy images."""
        return FactorPosterior(self.world, self.image_size)

    @cached_property
    def data_information(self) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, float]]:
        """What noisy images tell, `factor_information`, and the level of half of it by factor."""
        levels, curves = factor_information(self.factor_posterior, self.world, self.image_size)
        return levels, curves, {name: half_level(levels, nats) for name, nats in curves.items()}

    @property
    def data_difference(self) -> float | None:
        """By how much more log-SNR half of the texture is known than half of the structure; `None` if untold."""
        if self.pipe.vae is not None:
            return None  # what noisy images tell is no answer where the noise is on latents
        half = self.data_information[2]
        difference = half["texture"] - half["structure"]
        return difference if np.isfinite(difference) else None

    @cached_property
    def data_spectrum(self) -> Spectrum | None:
        """Of the training data in the model's space: of the built-in data measured, otherwise from what the pipeline
        keeps."""
        if self.world is not None:
            return measured_spectrum(self.real_images(NUM_OF_SPECTRUM, "train")[0])
        size = self.pipe.transformer.config.sample_size
        spectrum = self.pipe.scheduler.config.get("spectrum") or self.pipe.scheduler.config.get("_spectrum")
        own = self.pipe.transformer.spectrum
        if own is not None:
            return Spectrum(idct2(own.mean.cpu().double()), own.power.cpu().double(), "the weights")
        if spectrum:
            return Spectrum(
                idct2(spectral_mean(spectrum, size, size)),
                spectral_power(spectrum, size, size),
                "the scheduler's configuration, which keeps means over rings: about right",
            )
        return None

    @cached_property
    def spectrum_around_classes(self) -> Spectrum | None:
        """The same around the mean of each class, which the label tells from the start; `None` of other than the
        built-in data on pixels."""
        if not self.has_factors or self.pipe.vae is not None:
            return None
        data = ShapesTextures(NUM_AROUND_CLASSES, self.image_size, self.world, split="train")
        batches = [range(start, start + 512) for start in range(0, len(data), 512)]
        counts = data.labels(range(len(data))).bincount(minlength=NUM_CLASSES)
        means = torch.zeros(NUM_CLASSES, 3, self.image_size, self.image_size)
        for batch in batches:
            means.index_add_(0, data.labels(batch), scaled(data.images(batch)))
        means /= counts.view(-1, 1, 1, 1)
        power = torch.zeros(means.shape[1:])
        for batch in batches:
            power += dct2(scaled(data.images(batch)) - means[data.labels(batch)]).square().sum(0)
        # The means are of the same images.
        return Spectrum(means, power.double() / (len(data) - NUM_CLASSES), _of_training(len(data)))

    @cached_property
    def pixel_spectrum(self) -> Spectrum | None:
        """The same of the images themselves, in [-1, 1]; `None` of other than the built-in data."""
        if self.world is None:
            return None
        images = ShapesTextures(NUM_OF_SPECTRUM, self.image_size, self.world, split="train")
        return measured_spectrum(scaled(images.images(range(NUM_OF_SPECTRUM))))

    @torch.no_grad()
    def sample(self, **options) -> torch.Tensor:
        """Images `(num_images, 3, H, W)` in [-1, 1]; image i has the seed `seed + i`, whatever is changed."""
        images = []
        for batch in self.batches():
            images.append(self.pipe(**self.given(batch), **self.options(**options)).images)
        return 2 * torch.cat(images).float().cpu() - 1

    def given(self, indices: Sequence[int]) -> dict:
        """Condition and seeds of some of the images, as the pipeline takes them."""
        seeds = {"seed": [self.seed + index for index in indices]}
        if self.is_conditional:
            return {"class_labels": [self.labels[index] for index in indices], **seeds}
        if self.pipe.is_text_conditional:
            return {"prompt": [self.prompts[index % len(self.prompts)] for index in indices], **seeds}
        return {"num_images_per_label": len(indices), **seeds}

    def batches(self) -> Iterator[list[int]]:
        for start in range(0, self.num_images, self.batch_size):
            yield list(range(start, min(start + self.batch_size, self.num_images)))

    def options(self, **options) -> dict:
        fixed = {"num_inference_steps": self.steps, "guidance_scale": self.guidance_scale, "output_type": "pt"}
        return {**fixed, **options}

    def validate(self, num_bins: int = 10, with_null: bool = False, factor: str | None = None) -> ValidationResult:
        """Held-out error of the model's own prediction on 512 images of its world, always the same, noise too.

        Args:
            with_null: also under the null condition.
            factor: instead, of `NUM_WITHOUT_FACTOR` images, also without this factor of the labels (`without_factor`).
        """
        pipe, device = self.pipe, self.pipe.device
        config = pipe.scheduler.config
        scheduler = DDPMScheduler(config.num_train_timesteps, prediction_type=config.prediction_type)
        scheduler.alphas_cumprod = self.alphas_cumprod.float()  # however the pipeline's scheduler came by them
        images, labels = self.real_images(NUM_WITHOUT_FACTOR, "validation") if factor else self.held_out
        null_label = pipe.num_classes if with_null and not factor else None
        data = CachedLatents(images[:, None], None, labels)
        validation = Validation(data, scheduler, len(images), 128, null_label=null_label, num_bins=num_bins)

        def denoise(noisy, timesteps, labels):
            inputs = noisy.to(device, pipe.transformer.dtype), timesteps.to(device)
            return pipe.transformer(*inputs, class_labels=labels.to(device)).sample.float().cpu()

        def posterior(noisy, timesteps):
            return self.factor_posterior(noisy, scheduler.alphas_cumprod[timesteps].logit())

        without = without_factor(denoise, posterior, factor) if factor else None
        return validation.summarise(validation(denoise, without))


def measured_spectrum(images: torch.Tensor) -> Spectrum:
    statistics = SpectrumStatistics()
    statistics.update(images)
    return Spectrum(idct2(statistics.mean), statistics.power, _of_training(len(images)))


def _of_training(count: int) -> str:
    return f"{count:,} images of the training data"
