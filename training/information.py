"""How much noisy images of the built-in data tell of a factor, and at which noise level: when the data decides.

A classifier of noisy images x_l has a cross-entropy of at least H(f | x_l), so that `H(f) - cross-entropy` is a lower
bound of the information I(f; x_l), in nats, whatever the denoiser. Once nothing is left to know, an ideal denoiser of
x_l has no use for a label. (For diffusion: arXiv 2506.10433.)

    python -m freqgate_dit.training.information --worlds mod add reversed same flat --out information.json \
        --figure information.png
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from freqgate_dit import plots
from freqgate_dit.shapes_textures import WORLDS, ShapesTextures
from freqgate_dit.training.decisions import FACTORS
from freqgate_dit.training.factor_classifier import FactorClassifier, factors_of, fit_factor_classifier, scaled


LOG_SNR_RANGE = (-8.0, 4.0)
TEST_IMAGES = 512  # at each level


def noised(images: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
    """`sqrt(a) x + sqrt(1 - a) e` with `a = sigmoid(log_snr)`, for images `(N, ...)` and levels `(N,)`."""
    alpha = log_snr.sigmoid().view(-1, *[1] * (images.ndim - 1))
    return alpha.sqrt() * images + (1 - alpha).sqrt() * torch.randn_like(images)


def _at_random_level(images: torch.Tensor) -> torch.Tensor:
    low, high = LOG_SNR_RANGE
    return noised(images, low + (high - low) * torch.rand(len(images)))


def factor_information(
    world: str, image_size: int, num_images: int = 32_768, num_levels: int = 25, seed: int = 0
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Information about structure and about texture in noisy images, by a classifier of them trained here.

    The global random state is left as it was.

    Args:
        world: of `freqgate_dit.shapes_textures.WORLDS`.
        image_size: as of the images that a model sees, at least 32.
        num_images: of training, each seen once.
        num_levels: over `LOG_SNR_RANGE`.

    Returns:
        log-SNR `(K,)`, ascending, and by factor `(K,)` nats, at most ln 8 = 2.08; below 0 where the classifier does
        worse than a guess.
    """
    train = ShapesTextures(num_images, image_size, world, split="train", seed=seed)
    test = ShapesTextures(TEST_IMAGES, image_size, world, split="test", seed=seed)
    images = scaled(test.images(range(len(test))))
    expected = factors_of(test.labels(range(len(test))))
    levels = torch.linspace(*LOG_SNR_RANGE, num_levels)
    nats = {name: [] for name in FACTORS}
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        classifier = FactorClassifier()
        fit_factor_classifier(classifier, train, progress=False, augment=_at_random_level)
        for level in tqdm(levels, desc="information", unit="level", leave=False):
            noisy = noised(images, level.expand(len(images)))
            with torch.no_grad():
                logits = classifier(noisy)
            for name, one, right in zip(FACTORS, logits, expected, strict=True):
                nats[name].append(math.log(one.shape[-1]) - F.cross_entropy(one, right).item())
    return levels.numpy(), {name: np.array(values) for name, values in nats.items()}


def half_level(log_snr: np.ndarray, nats: np.ndarray) -> float:
    """Log-SNR at which information first reaches half of its largest value; NaN where there is next to none.

    Args:
        log_snr: `(K,)`, ascending.
        nats: `(K,)`.
    """
    if nats.max() < 0.1:
        return math.nan
    first = int(np.argmax(nats >= nats.max() / 2))
    if first == 0:
        return float(log_snr[0])
    part = slice(first - 1, first + 1)
    return float(np.interp(nats.max() / 2, nats[part], log_snr[part]))


def main() -> None:
    parser = argparse.ArgumentParser(description="At which log-SNR do noisy images tell structure and texture?")
    parser.add_argument("--worlds", nargs="+", choices=WORLDS, default=list(WORLDS))
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--num_images", type=int, default=32_768, help="of training the classifier")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the curves, written after each world")
    parser.add_argument("--figure", type=Path, help="PNG file for a picture of them")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("image_size", "num_images", "seed")}
    result = {**settings, "test_images": TEST_IMAGES, "worlds": {}}
    print(f"{'world':10} {'structure':>10} {'texture':>10}  log-SNR at which half is known")
    for world in arguments.worlds:
        start = time.perf_counter()
        levels, nats = factor_information(world, **settings)
        half = {name: half_level(levels, values) for name, values in nats.items()}
        print(f"{world:10} {half['structure']:+10.2f} {half['texture']:+10.2f}", flush=True)
        result["log_snr"] = levels.tolist()
        curves = {name: values.tolist() for name, values in nats.items()}
        half = {name: None if math.isnan(level) else level for name, level in half.items()}  # NaN is no JSON
        result["worlds"][world] = {"half": half, "nats": curves, "seconds": time.perf_counter() - start}
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.figure:
        arguments.figure.parent.mkdir(parents=True, exist_ok=True)
        plots.worlds_figure(result["log_snr"], result["worlds"]).savefig(arguments.figure)


if __name__ == "__main__":
    main()
