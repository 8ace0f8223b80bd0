"""Whether distances in a network's features order degraded images as they should, and where their floors are.

    python benchmarks/feature_calibration.py --features ../shared/weights/inception_mixed7.py:load \\
        --dataset '../shared/data/afhq_cat128_*.parquet' --resolution 128 --heldout_per_class 1700 \\
        --out results/feature_calibration_mixed7.json

Held-out images, more and more degraded, against as many training images: noise, blur, JPEG, crops, copies in place of
other images, and with several classes a lopsided mix of them. The Frechet distance must rise from step to step of each
of these ladders, and so must the kernel distance, but for copies: its expectation does not depend on the number of
images, and hence hardly on how many of them are different. Features are cached: a second run takes seconds.
"""

import argparse
import math
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL
import torch
from output import write_result
from PIL import Image, ImageFilter

from freqgate_dit.features import CACHE_DIR, load_extractor
from freqgate_dit.metrics import FeatureStatistics, frechet_distance, kernel_distance
from freqgate_dit.references import reference_statistics
from freqgate_dit.training.data import DataConfig, LabelledImages, load_images
from freqgate_dit.training.hardware import use_all_cores


# -- degradations of an image -----------------------------------------------------------------------------------------


def add_noise(image: Image.Image, std: float, index: int) -> Image.Image:
    pixels = np.asarray(image) + np.random.default_rng(index).normal(0, std, (image.height, image.width, 3))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def blur(image: Image.Image, sigma: float, index: int) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(sigma))


def compress(image: Image.Image, quality: float, index: int) -> Image.Image:
    file = BytesIO()
    image.save(file, "JPEG", quality=int(quality))
    return Image.open(file)


def crop(image: Image.Image, share: float, index: int) -> Image.Image:
    margin = (1 - share) / 2
    box = (margin * image.width, margin * image.height, (1 - margin) * image.width, (1 - margin) * image.height)
    return image.resize(image.size, Image.Resampling.BICUBIC, box)


# What the level is, the function, and the levels from weak to strong.
DEGRADATIONS = {
    "noise": ("standard deviation, grey levels", add_noise, (4, 8, 16)),
    "blur": ("Gaussian, sigma in px", blur, (0.5, 1, 2)),
    "JPEG": ("quality", compress, (60, 30)),
    "crop": ("share of the side, then resized", crop, (0.9, 0.75)),
}
DUPLICATES = (0.1, 0.2, 0.5)
MIXES = (0.5, 1.0)


class Degraded:
    """Images that went through a degradation, as `reference_statistics` takes them."""

    def __init__(self, images: LabelledImages, degrade, level: float):
        self.source, self.degrade, self.level = images, degrade, level
        self.resolution, self.fingerprint = images.resolution, f"{images.fingerprint} {degrade.__name__} {level}"

    def __len__(self) -> int:
        return len(self.source)

    def images(self, indices) -> torch.Tensor:
        batch = self.source.images(indices).permute(0, 2, 3, 1).numpy()
        changed = [self.degrade(Image.fromarray(x), self.level, i) for i, x in zip(indices, batch, strict=True)]
        return torch.from_numpy(np.stack([np.asarray(image) for image in changed])).permute(0, 3, 1, 2)


# -- degradations of a set, for which the features need not be computed again -----------------------------------------


def with_duplicates(features: torch.Tensor, share: float) -> torch.Tensor:
    """As many rows, a random `share` of them replaced by copies of others."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.randperm(len(features), generator=generator)[round(share * len(features)) :]
    copies = kept[torch.randint(len(kept), (len(features) - len(kept),), generator=generator)]
    return features[torch.cat([kept, copies])]


def mixed(features: torch.Tensor, labels: torch.Tensor, excess: float) -> torch.Tensor:
    """Half as many rows; `excess` 0 takes both halves of the classes alike, 1 only the first half."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    is_first = labels[order] < labels.unique().median()
    first, second = order[is_first], order[~is_first]
    total = min(len(first), len(second))
    count = round(total * (1 + excess) / 2)
    return features[torch.cat([first[:count], second[: total - count]])]


# -- the ladders ------------------------------------------------------------------------------------------------------


def distances(reference: torch.Tensor, features: torch.Tensor) -> dict[str, float]:
    """Frechet and kernel distance; the latter 1,000 times, as is usual."""
    frechet = frechet_distance(FeatureStatistics.of(reference), FeatureStatistics.of(features))
    return {"frechet": frechet, "kernel_1e3": 1e3 * kernel_distance(reference, features, num_subsets=2).value}


def ladder(unit: str, steps: list[tuple[float | str, dict[str, float]]]) -> dict:
    """The steps from clean to strong, and for each distance whether it rises from each to the next."""
    monotone = {}
    for name in steps[0][1]:
        values = [distance[name] for _, distance in steps]
        monotone[name] = all(low < high for low, high in zip(values, values[1:]))
    return {"unit": unit, "steps": [{"level": level, **distance} for level, distance in steps], "monotone": monotone}


def halves(features: torch.Tensor) -> dict[str, float]:
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    first, second = order.chunk(2)
    return distances(features[first], features[second])


def print_table(ladders: dict[str, dict], floors: dict[str, dict], name: str):
    print(f"\n| ladder | unit | clean and levels | fd_{name} | kernel distance x 1000 | both rise |\n|{' --- |' * 6}")
    for ladder_name, rungs in ladders.items():
        levels, frechet, kernel = (
            " / ".join(step[key] if isinstance(step[key], str) else f"{step[key]:.3g}" for step in rungs["steps"])
            for key in ("level", "frechet", "kernel_1e3")
        )
        rises = ", ".join("yes" if ok else "NO" for ok in rungs["monotone"].values())
        print(f"| {ladder_name} | {rungs['unit']} | {levels} | {frechet} | {kernel} | {rises} |")
    print(f"\n| floor | fd_{name} | kernel distance x 1000 |\n|{' --- |' * 3}")
    for floor_name, floor in floors.items():
        print(f"| {floor_name} | {floor['frechet']:.3g} | {floor['kernel_1e3']:.3g} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", default="inception", help="as in freqgate_dit.features.load_extractor")
    parser.add_argument("--inception_path")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dataset", required=True, help="image folder or parquet files, as the trainer takes them")
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--heldout_per_class", type=int, required=True, help="images that are degraded, of each class")
    names = list(DEGRADATIONS)
    parser.add_argument("--degradations", nargs="*", choices=names, default=names, help="none: those of the set alone")
    parser.add_argument("--cache_dir", default=CACHE_DIR, help="where features are kept")
    parser.add_argument("--cpu_threads", type=int, help="by default all cores")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    use_all_cores(arguments.cpu_threads)

    config = DataConfig(
        dataset=arguments.dataset, resolution=arguments.resolution, heldout_per_class=arguments.heldout_per_class
    )
    train, heldout = load_images(config)
    extractor = load_extractor(arguments.features, arguments.inception_path, arguments.device, arguments.dtype)

    def features(images, name: str) -> torch.Tensor:
        return reference_statistics(images, extractor, name, arguments.cache_dir).features

    of_train, clean = features(train, "train"), features(heldout, "heldout")
    # As many as are degraded, because the Frechet distance depends on the number of images.
    order = torch.randperm(len(of_train), generator=torch.Generator().manual_seed(0))
    reference = of_train[order[: len(clean)]]
    base = ("clean", distances(reference, clean))
    ladders = {}
    for name in arguments.degradations:
        unit, degrade, levels = DEGRADATIONS[name]
        steps = [
            (level, distances(reference, features(Degraded(heldout, degrade, level), f"{name} {level}")))
            for level in levels
        ]
        ladders[name] = ladder(unit, [base, *steps])
    steps = [(share, distances(reference, with_duplicates(clean, share))) for share in DUPLICATES]
    ladders["duplicates"] = ladder("share of copies", [base, *steps])
    if len(train.class_names) > 1:
        steps = [(excess, distances(reference, mixed(clean, heldout.labels, excess))) for excess in (0.0, *MIXES)]
        ladders["class mix"] = ladder("excess of half of the classes", steps)
    floors = {
        f"{len(of_train)} training against {len(clean)} held-out images": distances(of_train, clean),
        f"{len(reference)} training against {len(clean)} held-out images": base[1],
        f"halves of {len(of_train)} training images": halves(of_train),
        f"halves of {len(clean)} held-out images": halves(clean),
    }
    print_table(ladders, floors, extractor.name)
    write_result(
        {
            **extractor.describe(),
            "dataset": Path(arguments.dataset).name,
            "resolution": arguments.resolution,
            "train_images": len(train),
            "heldout_images": len(heldout),
            "train_fingerprint": train.fingerprint,
            "heldout_fingerprint": heldout.fingerprint,
            "monotone": {
                key: all(rungs["monotone"][key] for rungs in ladders.values()) for key in ("frechet", "kernel_1e3")
            },
            "ladders": rounded(ladders),
            "floors": rounded(floors),
            "torch": torch.__version__,
            "pillow": PIL.__version__,
        },
        arguments.out,
    )


def rounded(value):
    """The same dictionaries and lists with numbers of 5 digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value


if __name__ == "__main__":
    main()
