"""Samplers against exact answers, on data whose best denoiser is known.

    python benchmarks/samplers_exact.py --out results/samplers_exact.json

Gaussian latents: variance that comes out / variance of the data, per band. Independent two-mode mixtures: squared
Wasserstein-2 distance / power, per band. A mixture of a few images, which is decided by all frequencies together:
error of a value against Heun with 400 steps from the same noise.
"""

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch
from compared_samplers import COMPARED, compared_scheduler, joined, steps_for
from diffusers import EulerDiscreteScheduler
from output import print_table, write_result
from tqdm.auto import tqdm

from freqgate_dit.scheduling_spectral_euler import spectral_mean, spectral_power
from freqgate_dit.spectral import dct2, idct2, radial_frequency
from freqgate_dit.training.hardware import use_all_cores


# AFHQ cats through TAESDXL, first channel: power of the coefficients of 16 x 16 latents by radius of the DCT index.
BANDS = ((0.5, 35.9, "DC"), (2.5, 8.3, "k<2.5"), (5.5, 1.7, "k<5.5"), (9.5, 0.48, "k<9.5"), (math.inf, 0.21, "rest"))
SIZE = 16
RINGS = [next(power for limit, power, _ in BANDS if ring < limit) for ring in range(22)]
EPSILON = EulerDiscreteScheduler(prediction_type="epsilon").config
SPECTRUM = {"height": SIZE, "width": SIZE, "power": [RINGS], "mean": [[[0.34, 0.05], [-0.05, 0.02]]]}


def run(scheduler, denoise: Callable, noise: torch.Tensor, steps: int) -> torch.Tensor:
    """The diffusers loop, from VE states at the first noise level divided by it, with a denoiser of VE states."""
    scheduler.set_timesteps(steps)
    x = noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].item()
        state = scheduler.scale_model_input(x, t).double() * math.sqrt(sigma**2 + 1)
        x = scheduler.step(((state - denoise(state, sigma)) / sigma).float(), t, x).prev_sample
    return x.double()


def band_means(values: torch.Tensor) -> list[float]:
    """Mean of values `(SIZE, SIZE)` over each of `BANDS`."""
    radius = 2 * radial_frequency(SIZE, SIZE)
    bands = torch.bucketize(radius, torch.tensor([limit for limit, *_ in BANDS[:-1]]), right=True)
    return [values[bands == band].mean().item() for band in range(len(BANDS))]


def gaussian_variance(scheduler, steps: int) -> list[float]:
    """Variance that comes out over variance of the data, per band, with the exact denoiser.

    Each sampler is affine in every coefficient here, so that two states show its mean and variance; they start at the
    true distribution of noisy data.
    """
    power, mean = spectral_power(SPECTRUM, SIZE, SIZE), spectral_mean(SPECTRUM, SIZE, SIZE)

    def denoise(x, sigma):
        return idct2(mean + power / (power + sigma**2) * (dct2(x) - mean))

    scheduler.set_timesteps(steps)
    sigma = scheduler.sigmas[0].item()
    states = torch.stack([mean, mean + (power + sigma**2).sqrt()])
    result = dct2(run(scheduler, denoise, as_noise(states, scheduler), steps))[:, 0]
    return band_means((result[1] - result[0]) ** 2 / power[0])


def as_noise(coefficients: torch.Tensor, scheduler) -> torch.Tensor:
    """What `run` starts from so that the VE state at the first noise level has these coefficients."""
    return (idct2(coefficients) / scheduler.sigmas[0].item()).float()


class TwoModes:
    """Independent two-mode mixtures in every coefficient: modes at +-sqrt(0.8 S), each of variance 0.2 S.

    The flow of one variable keeps the order of states, so that distances come from the quantiles.
    """

    def __init__(self, quantiles: int = 500):
        self.power = spectral_power(SPECTRUM, SIZE, SIZE)
        self.levels = ((torch.arange(quantiles, dtype=torch.float64) + 0.5) / quantiles)[:, None, None, None]
        self.centre, self.width = (0.8 * self.power).sqrt(), (0.2 * self.power).sqrt()
        self.quantiles = functools.cache(self._quantiles)

    def denoise(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        y, spread = dct2(x), self.width**2 + sigma**2
        modes = self.centre * torch.tanh(self.centre * y / spread)
        return idct2((self.width**2 * y + sigma**2 * modes) / spread)

    def _quantiles(self, sigma: float) -> torch.Tensor:
        """Of the data with noise, by bisection."""
        width, normal = (self.width**2 + sigma**2).sqrt(), torch.distributions.Normal(0.0, 1.0)
        high = (self.centre + 8 * width).expand(len(self.levels), *width.shape)
        low = -high
        for _ in range(50):
            middle = (low + high) / 2
            mass = (normal.cdf((middle - self.centre) / width) + normal.cdf((middle + self.centre) / width)) / 2
            low, high = torch.where(mass < self.levels, middle, low), torch.where(mass < self.levels, high, middle)
        return (low + high) / 2

    def distance(self, scheduler, steps: int) -> list[float]:
        """Squared Wasserstein-2 distance over power, per band."""
        scheduler.set_timesteps(steps)
        start = self.quantiles(scheduler.sigmas[0].item())
        result = dct2(run(scheduler, self.denoise, as_noise(start, scheduler), steps))
        squares = (result.sort(0).values - self.quantiles(0.0)).square().mean(0)
        return band_means(squares[0] / self.power[0])


class ImageMixture:
    """Mixture of Gaussians about a few images, so that all frequencies are decided together, by one choice.

    Images are drawn with 0.5 S at each frequency; what is left is variance about them.
    """

    def __init__(self, images: int = 8, states: int = 64):
        generator = torch.Generator().manual_seed(0)
        self.power = spectral_power(SPECTRUM, SIZE, SIZE)
        draws = torch.randn(images, *self.power.shape, generator=generator, dtype=torch.float64)
        self.centres = spectral_mean(SPECTRUM, SIZE, SIZE) + (0.5 * self.power).sqrt() * draws
        self.noise = torch.randn(states, *self.power.shape, generator=generator)
        self.reference = run(compared_scheduler("Heun, Karras", EPSILON, SPECTRUM), self.denoise, self.noise, 400)

    def denoise(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        y, spread = dct2(x)[:, None], 0.5 * self.power + sigma**2
        weights = (-((y - self.centres) ** 2) / (2 * spread)).sum((-1, -2, -3)).softmax(1)
        posterior = self.centres + 0.5 * self.power / spread * (y - self.centres)
        return idct2((weights[..., None, None, None] * posterior).sum(1))

    def error(self, scheduler, steps: int) -> float:
        """Root mean square error of a value against Heun with 400 steps from the same noise."""
        result = run(scheduler, self.denoise, self.noise, steps)
        return (result - self.reference).square().mean().sqrt().item()


def exact_study(evaluations: list[int]) -> dict:
    modes, mixture = TwoModes(), ImageMixture()
    result = {"evaluations": evaluations, "bands": [label for *_, label in BANDS], "samplers": {}}
    for name in tqdm(COMPARED, desc="samplers", unit="sampler"):
        rows = {"gaussian_variance": {}, "two_mode_distance": {}, "image_mixture_error": {}}
        for count in evaluations:
            scheduler, steps = compared_scheduler(name, EPSILON, SPECTRUM), steps_for(name, count)
            rows["gaussian_variance"][count] = gaussian_variance(scheduler, steps)
            rows["two_mode_distance"][count] = modes.distance(scheduler, steps)
            rows["image_mixture_error"][count] = mixture.error(scheduler, steps)
        result["samplers"][name] = rows
    return result


def print_exact(result: dict):
    columns = [f"{count} evaluations" for count in result["evaluations"]]
    bands = ", ".join(result["bands"])
    for key, title, digits in (
        ("gaussian_variance", f"Gaussian data: variance / true variance ({bands})", 3),
        ("two_mode_distance", f"Two-mode mixtures: squared Wasserstein-2 distance / S ({bands})", 3),
        ("image_mixture_error", "Mixture of 8 images: error of a value against Heun with 400 steps", 4),
    ):
        rows = {
            name: [joined(cell if isinstance(cell, list) else [cell], digits) for cell in row[key].values()]
            for name, row in result["samplers"].items()
        }
        print_table(title, columns, rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, nargs="+", default=[5, 10, 20, 50], help="network evaluations")
    parser.add_argument("--cpu_threads", type=int, help="by default all cores")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    use_all_cores(arguments.cpu_threads)
    result = exact_study(arguments.evaluations)
    print_exact(result)
    write_result({"torch": torch.__version__, **result}, arguments.out)


if __name__ == "__main__":
    main()
