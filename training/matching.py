"""Models of one size: the depth or rank that brings a recipe to another's number of parameters or FLOPs."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from freqgate_dit.cost import count_parameters, flops_per_forward
from freqgate_dit.spectral import SpectrumStatistics
from freqgate_dit.training.conditions import load_condition
from freqgate_dit.training.config import TrainingRun
from freqgate_dit.training.data import load_images
from freqgate_dit.training.latents import estimated_statistics, load_vae, sample_shape
from freqgate_dit.training.resume import fingerprints_of
from freqgate_dit.training.schedules import make_objective, make_scheduler, tell_spectrum
from freqgate_dit.training.shares import ViewShares


COUNTS = {"parameters": count_parameters, "flops": flops_per_forward}
MATCHED = ("num_layers", "modulation_rank")
LARGEST = 4096


class ModelSizes:
    """Counts the models of runs on one data set, without weights.

    Args:
        config: run that has the data, the condition and the autoencoder of all the others.
    """

    def __init__(self, config: TrainingRun):
        self.images, self.heldout = load_images(config.data, config.latents.cache_dir)
        self.resolution, names = self.images.resolution, self.images.class_names
        condition = load_condition(config.condition, names, torch.device("cpu"))
        self.condition = condition.model_arguments()
        self.vae = load_vae(config.latents)
        self.fingerprints = fingerprints_of((self.images, self.heldout), self.vae, condition)
        self.statistics: dict[bool, SpectrumStatistics] = {}

    def __call__(self, config: TrainingRun, names: Iterable[str] = tuple(COUNTS)) -> dict[str, int]:
        """{"parameters": number, "flops": of a forward pass of one image}, or those of `names`."""
        channels, side = sample_shape(self.vae, self.resolution, config.model.patch_size)
        with torch.device("meta"):
            model = config.model.build(channels, side, self.condition, config.objective)
        counts = {name: COUNTS[name](model) for name in names}
        if "flops" in counts and config.model.grid_views > 1:  # on average over the samples of a micro-batch
            shares = self._shares(config, channels, side)
            counts["flops"] = sum(n * flops_per_forward(model, view) for view, n in enumerate(shares)) / sum(shares)
        return counts

    def _shares(self, config: TrainingRun, channels: int, side: int) -> tuple[int, ...]:
        """Samples of a micro-batch on each view."""
        # They do not depend on the depth; this model has weights.
        model = replace(config.model, num_layers=1).build(channels, side, self.condition, config.objective)
        objective = make_objective(config.objective, make_scheduler(config.objective))
        tell_spectrum(model, self._statistics(config.data.horizontal_flip), objective, config.objective.grid_price)
        return ViewShares.of(model, objective, config.train.per_device_batch_size).counts

    def _statistics(self, flip: bool) -> SpectrumStatistics:
        if flip not in self.statistics:
            self.statistics[flip] = estimated_statistics(self.images, self.vae, flip, torch.device("cpu"))
        return self.statistics[flip]


def size_cells(counts: dict, baseline: dict) -> tuple[str, str]:
    """Parameters and FLOPs for a table, and their ratios to the baseline's."""
    return (
        f"{counts['parameters'] / 1e6:.2f} M ({counts['parameters'] / baseline['parameters']:.2f})",
        f"{counts['flops'] / 1e9:.3f} ({counts['flops'] / baseline['flops']:.2f})",
    )


def nearest(count: Callable[[int], int], target: int) -> int:
    """The `n` from 1 on whose `count(n)`, which grows with `n`, comes nearest to `target`.

    Raises:
        ValueError: if even 4096 is too small.
    """
    count = functools.cache(count)
    high = 1
    while count(high) < target:
        if high == LARGEST:
            raise ValueError(
                f"even {LARGEST} gives {count(LARGEST):,}, less than {target:,}: match by another option."
            )
        high *= 2
    low = high // 2  # count(low) < target <= count(high), where low is not 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return low if low and target - count(low) < count(high) - target else high
