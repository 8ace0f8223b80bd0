"""When is a factor decided? Exchange the label on the way and look which one the finished image shows.

An image of the built-in data is begun as (structure 1, texture 1) and from some noise level on denoised as (structure
2, texture 2). If structure is decided earlier than texture, there are levels at which the image keeps structure 1 and
takes texture 2. The level where a factor turns from the second to the first label is its decision level; the worlds of
`shapes_textures` say which sign their difference must have if frequency decides, and if the name does.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from freqgate_dit.interventions import labels_from
from freqgate_dit.shapes_textures import NUM_CLASSES, STRUCTURES, TEXTURES
from freqgate_dit.statistics import Bootstrap, bootstrap
from freqgate_dit.traces import log_snr
from freqgate_dit.training.factor_classifier import factors_of, label_of


FACTORS = ("structure", "texture")
# Sign of (level of texture - level of structure) if the lower frequencies are decided first.
PREDICTED = {"mod": 1, "add": 1, "reversed": -1, "same": 0, "flat": 0}
LEAST_CHANGE = 0.2  # of a share between the ends, for them to count as its limits
KINDS = ("swap", "insertion", "withdrawal")


@dataclass(frozen=True)
class LabelSwaps:
    """What images show whose label was exchanged.

    Args:
        log_snr: `(K,)` levels of the exchange, ascending.
        first, second: factor -> `(pairs, K)` bool: the image shows that factor of the first, or second, label.
    """

    log_snr: np.ndarray
    first: dict[str, np.ndarray]
    second: dict[str, np.ndarray]

    def share(self, factor: str) -> np.ndarray:
        """`(K,)` share of images that show the first label, of those that show either."""
        first, either = self.first[factor].sum(0), (self.first[factor] | self.second[factor]).sum(0)
        return first / np.maximum(either, 1)

    def shown(self, factor: str) -> float:
        """Share of the images that show that factor of one of the two labels: little, and no level means anything."""
        return float((self.first[factor] | self.second[factor]).mean())

    def change(self, factor: str) -> float:
        """By how much the share of the first label grows from an early to a late exchange, at most 1. Where it is
        little there is no level: nothing is decided between."""
        share = self.share(factor)
        return float(share[-1] - share[0])

    def level(self, factor: str, pairs: np.ndarray | None = None) -> float:
        """Log-SNR of the exchange at which the share of the first label is half-way between its values at both ends.

        (Those are not 0 and 1 where an image shows a factor by chance, or does not show what it should.)
        """
        pairs = np.arange(len(self.first[factor])) if pairs is None else pairs
        first, second = (table[factor][pairs].sum(0) for table in (self.first, self.second))
        counts = first + second
        share = first / np.maximum(counts, 1)
        start, end = share[0], share[-1]
        if end - start > LEAST_CHANGE:
            share = ((share - start) / (end - start)).clip(0, 1)
        return logistic_level(self.log_snr, share * counts, (1 - share) * counts)

    def difference(self, num_resamples: int = 2000) -> Bootstrap:
        """Level of texture minus level of structure, resampled over pairs: sampling noise of this one model."""
        pairs = len(self.first["structure"])
        return bootstrap(
            lambda chosen: self.level("texture", chosen) - self.level("structure", chosen),
            pairs,
            num_resamples=num_resamples,
        )


def logistic_level(x: np.ndarray, first: np.ndarray, second: np.ndarray, prior: float = 0.1) -> float:
    """Where a logistic curve through counts crosses one half, by Newton's method.

    Args:
        x: `(K,)`.
        first, second: `(K,)` counts; the share of `first` is fitted.
        prior: weight of a normal prior on the slope per standard deviation of x, so that counts which change from none
            to all between two levels have a finite slope too.

    Raises:
        ValueError: if nothing was counted.
    """
    if first.sum() + second.sum() == 0:
        raise ValueError("`first` and `second` are all 0: no image shows either label, so nothing can be fitted.")
    z = (x - x.mean()) / x.std()
    design = np.stack([np.ones_like(z), z], axis=1)
    counts, penalty = first + second, np.diag([1e-3, prior])
    weights = np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        gradient = design.T @ (first - counts * p) - penalty @ weights
        curvature = (design * (counts * p * (1 - p))[:, None]).T @ design + penalty
        change = np.linalg.solve(curvature, gradient)
        weights = weights + change * min(1.0, 3.0 / max(1e-12, np.abs(change).max()))
        if np.abs(change).max() < 1e-9:
            break
    slope = weights[1] if abs(weights[1]) > 1e-6 else 1e-6
    return float(np.clip(x.mean() - weights[0] / slope * x.std(), x[0], x[-1]))


def label_pairs(num_pairs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second labels `(num_pairs,)` that differ in structure and in texture."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        first = torch.randint(count, (num_pairs,), generator=generator)
        return first, (first + torch.randint(1, count, (num_pairs,), generator=generator)) % count

    (structure, other_structure), (texture, other_texture) = draw(len(STRUCTURES)), draw(len(TEXTURES))
    return label_of(structure, texture), label_of(other_structure, other_texture)


@torch.no_grad()
def swap_labels(
    pipe,
    classifier,
    num_pairs: int = 64,
    num_levels: int = 12,
    num_inference_steps: int = 30,
    kind: str = "swap",
    seed: int = 0,
    batch_size: int = 128,
    world: str | None = None,
) -> LabelSwaps:
    """Sample pairs of labels, without guidance, each with an exchange at every one of `num_levels` steps.

    Args:
        pipe: trained on the built-in data.
        classifier: `FactorClassifier` of the same world.
        kind: "swap": from the first label to the second; "insertion": from the null condition to the second label;
            "withdrawal": from the first label to the null condition. What an image has from the null condition is not
            known, and counts as the label that is missing: one in eight shows the other label's factor by chance.
        world: that the pipeline was trained on, to be compared with the classifier's; by default that is believed.

    Raises:
        ValueError: for a pipeline that knows other classes, a classifier of another world, too few steps, or an
            unknown kind.
    """
    classes = NUM_CLASSES
    if pipe.num_classes != classes:
        raise ValueError(
            f"the pipeline has {pipe.num_classes} classes; labels are exchanged with one of the {classes} classes of "
            "the built-in data (`dataset: shapes_textures`), whose factors are known."
        )
    of_classifier = getattr(classifier, "world", None)
    if world is not None and of_classifier not in (None, world):
        raise ValueError(
            f"`classifier` was trained on images of the world {of_classifier!r}, the pipeline on {world!r}: train one "
            "with `train_factor_classifier(world=...)`."
        )
    if kind not in KINDS:
        raise ValueError(f"`kind` ({kind!r}) must be one of {', '.join(KINDS)}.")
    if not 3 <= num_levels <= num_inference_steps:
        raise ValueError(
            f"`num_levels` ({num_levels}) must be between 3 and `num_inference_steps` ({num_inference_steps})."
        )
    transformer, alphas_cumprod = pipe.transformer, pipe.scheduler.alphas_cumprod.cpu()
    pipe.scheduler.set_timesteps(num_inference_steps)
    timesteps = pipe.scheduler.timesteps.cpu().float().unique().flip(0)  # some schedulers ask twice at one
    if len(timesteps) < num_levels:
        raise ValueError(
            f"`num_levels` ({num_levels}): the scheduler has only {len(timesteps)} timesteps: take fewer."
        )
    chosen = torch.linspace(0, len(timesteps) - 1, num_levels).round().long()
    levels = log_snr(alphas_cumprod, timesteps)[chosen]  # ascending
    first, second = label_pairs(num_pairs, seed)

    index = torch.arange(num_pairs * num_levels)
    shown = []
    for batch in tqdm(index.split(batch_size), desc=f"label {kind}", unit="batch", leave=False):
        pair, level = batch // num_levels, levels[batch % num_levels]
        end = classes if kind == "withdrawal" else second[pair]
        with ExitStack() as contexts:
            if kind == "insertion":
                contexts.enter_context(labels_from(transformer, classes, -math.inf, alphas_cumprod))
            inserts = kind == "insertion"
            contexts.enter_context(labels_from(transformer, end, level, alphas_cumprod, from_null=inserts))
            images = pipe(
                first[pair].tolist(),
                seed=[seed * 1_000_003 + int(one) for one in pair],
                guidance_scale=1.0,
                num_inference_steps=num_inference_steps,
                output_type="pt",
            ).images
        logits = classifier(2 * images.float().cpu() - 1)
        shown.append(torch.stack([one.argmax(-1).cpu() for one in logits], dim=-1))
    shown = torch.cat(shown).view(num_pairs, num_levels, len(FACTORS)).numpy()
    of_first, of_second = (
        {
            name: shown[..., factor] == label[:, None]
            for factor, (name, label) in enumerate(zip(FACTORS, factors(labels)))
        }
        for labels in (first, second)
    )
    if kind == "insertion":
        of_first = {name: ~table for name, table in of_second.items()}
    if kind == "withdrawal":
        of_second = {name: ~table for name, table in of_first.items()}
    return LabelSwaps(levels.numpy(), of_first, of_second)


def factors(labels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """As `factors_of`, for tables."""
    return tuple(values.numpy() for values in factors_of(labels))
