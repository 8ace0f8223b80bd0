"""How much noisy images of the built-in data tell of a factor, and at which noise level: when the data decides.

Whoever guesses a factor from a noisy image x_l has a cross-entropy of at least H(f | x_l), so that `H(f) -
cross-entropy` is a lower bound of the information I(f; x_l), in nats, whatever the denoiser; nearly tight here, where
Bayes' rule guesses (`factor_posterior`). Once nothing is left to know, an ideal denoiser of x_l has no use for its
label. (For diffusion: arXiv 2506.10433.)

    python -m freqgate_dit.training.information --worlds mod add reversed same flat --out information.json \
        --figure information.png
"""

import argparse
import json
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from freqgate_dit import report_plots
from freqgate_dit.files import user_path
from freqgate_dit.shapes_textures import STRUCTURES, WORLDS, ShapesTextures
from freqgate_dit.traces import last_crossing
from freqgate_dit.training.decisions import FACTORS
from freqgate_dit.training.factor_classifier import factors_of, label_of, scaled
from freqgate_dit.training.factor_posterior import NUM_DRAWS, FactorPosterior


LOG_SNR_RANGE = (-8.0, 4.0)  # that is measured
TEST_IMAGES = 512  # at each level
_BATCH_SIZE = 128


def noised(images: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
    """`sqrt(a) x + sqrt(1 - a) e` with `a = sigmoid(log_snr)`, for images `(N, ...)` and levels `(N,)`."""
    alpha = log_snr.sigmoid().view(-1, *[1] * (images.ndim - 1))
    return alpha.sqrt() * images + (1 - alpha).sqrt() * torch.randn_like(images)


def with_other(factor: str) -> str:
    """What is to know of a factor, in words, where the other one is known."""
    return f"{factor}, the other factor known"


def factor_information(
    posterior: Callable, world: str, image_size: int, num_levels: int = 25, seed: int = 0
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Information about structure and about texture that a posterior finds in noisy images.

    Args:
        posterior: a `FactorPosterior` of the same world and image size.
        num_levels: over `LOG_SNR_RANGE`.
        seed: of the test images and their noise.

    Returns:
        log-SNR `(K,)`, ascending; `(K,)` nats, at most ln 8 = 2.08 and below 0 where the posterior does worse than a
        guess, by factor, and under `with_other` of it of one factor when the other is told.
    """
    test = ShapesTextures(TEST_IMAGES, image_size, world, split="test", seed=seed)
    images = scaled(test.images(range(len(test))))
    expected = factors_of(test.labels(range(len(test))))
    levels = torch.linspace(*LOG_SNR_RANGE, num_levels)
    nats = {name: [] for name in (*FACTORS, *map(with_other, FACTORS))}
    rows = torch.arange(len(images))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for level in tqdm(levels, desc="information", unit="level", leave=False):
            log_snr = level.expand(len(images))
            batches = zip(noised(images, log_snr).split(_BATCH_SIZE), log_snr.split(_BATCH_SIZE), strict=True)
            both = torch.cat([posterior(noisy, its_level) for noisy, its_level in batches])
            one_factor = both.logsumexp(2), both.logsumexp(1)
            of_other = both[rows, :, expected[1]].log_softmax(1), both[rows, expected[0]].log_softmax(1)
            for name, log_probability, right in zip(nats, one_factor + of_other, expected * 2, strict=True):
                nats[name].append(math.log(log_probability.shape[-1]) - F.nll_loss(log_probability, right).item())
    return levels.numpy(), {name: np.array(values) for name, values in nats.items()}


def without_factor(denoise: Callable, posterior: Callable, factor: str) -> Callable:
    """The prediction that is left when a factor of the label is unknown and the other is told.

    An ideal denoiser predicts the mean of x0 over the values f of the factor, weighted by p(f | x_l, the other
    factor): here the mean of the model's predictions, with these weights. So no null condition is needed, nor trusted.
    Where the posterior knows less than there is, the mean is worse than the ideal one, and what the model seems to use
    of the factor too much. All prediction types are affine in x0 at a given x_l: a mean of predictions is one of x0.

    Args:
        denoise: `(noisy (B, 3, H, W), timesteps (B,), labels (B,)) -> prediction (B, 3, H, W)`.
        posterior: `(noisy (B, 3, H, W), timesteps (B,)) -> log-probabilities (B, structures, textures)`.
        factor: "structure" or "texture".

    Returns:
        a function as `denoise`, which makes no use of the factor of its labels.
    """
    place = FACTORS.index(factor)

    def mean_prediction(noisy: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        values = list(factors_of(labels))
        both = posterior(noisy, timesteps)
        of_others = both if place == 0 else both.transpose(1, 2)  # (B, values of the factor, values of the other)
        weights = of_others[torch.arange(len(labels)), :, values[1 - place]].softmax(1)
        total = torch.zeros_like(noisy)
        for value, weight in enumerate(weights.T):
            values[place] = torch.full_like(labels, value)
            total += weight[:, None, None, None] * denoise(noisy, timesteps, label_of(*values))
        return total

    return mean_prediction


def half_level(log_snr: np.ndarray, nats: np.ndarray, whole: float = math.log(len(STRUCTURES))) -> float:
    """Log-SNR from which on half of what there is to know is known; NaN where it never is.

    Half of the whole, not of what is ever known here, which says how good the posterior is.

    Args:
        log_snr: `(K,)`, ascending.
        nats: `(K,)`.
        whole: the factor's entropy; ln 8 for structure and for texture.
    """
    return last_crossing(log_snr, nats, whole / 2)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value  # NaN is no JSON


def main() -> None:
    parser = argparse.ArgumentParser(description="At which log-SNR do noisy images tell structure and texture?")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--num_draws", type=int, default=NUM_DRAWS, help="for Bayes' rule, a multiple of 64")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of these and of the test images")
    parser.add_argument("--out", type=user_path, help="JSON file for the curves, written after each world")
    parser.add_argument("--figure", type=user_path, help="PNG file for a picture of them")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("image_size", "num_draws")}
    result = {**settings, "seeds": arguments.seeds, "test_images": TEST_IMAGES, "worlds": {}}
    print("log-SNR at which half is known, mean over seeds")
    print(f"{'world':10} {'structure':>10} {'texture':>10}  texture - structure, each seed")
    for world in arguments.worlds:
        start = time.perf_counter()
        found = []
        for seed in arguments.seeds:
            posterior = FactorPosterior(world, **settings, seed=seed)
            found.append(factor_information(posterior, world, arguments.image_size, seed=seed))
        levels = found[0][0]
        nats = {name: np.mean([curves[name] for _, curves in found], axis=0) for name in found[0][1]}
        by_seed = {name: [half_level(levels, curves[name]) for _, curves in found] for name in nats}
        half = {name: float(np.mean(values)) for name, values in by_seed.items()}
        differences = np.subtract(by_seed["texture"], by_seed["structure"])
        told = ", ".join(f"{value:+.2f}" for value in differences)
        print(f"{world:10} {half['structure']:+10.2f} {half['texture']:+10.2f}  {told}", flush=True)
        result["log_snr"] = levels.tolist()
        result["worlds"][world] = {
            "half": {name: _number(level) for name, level in half.items()},
            "half_by_seed": {name: [_number(level) for level in values] for name, values in by_seed.items()},
            "nats": {name: values.tolist() for name, values in nats.items()},
            "seconds": time.perf_counter() - start,
        }
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.figure:
        arguments.figure.parent.mkdir(parents=True, exist_ok=True)
        report_plots.worlds_figure(result["log_snr"], result["worlds"]).savefig(arguments.figure)


if __name__ == "__main__":
    main()
