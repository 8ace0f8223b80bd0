"""All numbers of an evaluation, from features and power spectra: distances, shares, copies, each with its full name.

A number is named by what it is, the feature network, the number and kind of images, and the reference:
`fid_inception_clean_5100_vs_heldout`. FID and KID are distances in the features of clean-fid's Inception alone; by any
other network they are called `fd` and `kd`.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from freqgate_dit.metrics import (
    FeatureStatistics,
    density_coverage,
    frechet_distance,
    kernel_distance,
    nearest_neighbour_ratio,
    power_spectrum_distance,
    precision_recall,
)
from freqgate_dit.spectral import octave_labels
from freqgate_dit.statistics import bootstrap


INCEPTION = "inception_clean"
# Below this number of images a Frechet distance says more about the number than about the images.
ENOUGH = 2048


@dataclass(frozen=True)
class Measured:
    """What is kept of a set of images.

    Args:
        features: `(N, D)` float32.
        powers: `(N, 3, bands)` float64, around the reference's mean image.
    """

    features: torch.Tensor
    powers: torch.Tensor

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, indices: torch.Tensor) -> "Measured":
        return Measured(self.features[indices], self.powers[indices])


def check_count(what: str, count: int, force: bool):
    """Raise if there are too few images for a Frechet distance.

    Raises:
        ValueError: unless `force`.
    """
    if count < ENOUGH and not force:
        raise ValueError(
            f"{what} {count}, and a Frechet distance of fewer than {ENOUGH:,} images says more about their number "
            "than about them: take more, or say `--force`, and the name of the number will carry it."
        )


def counted(count: int, real_count: int, kind: str = "") -> str:
    """Number and kind of images as a metric's name has it: "5100", "500_forced", "3453_train".

    "forced" says that they, or the real ones that they are compared with, were too few.
    """
    forced = "forced" if min(count, real_count) < ENOUGH else ""
    return "_".join(filter(None, [str(count), forced, kind]))


def frechet_name(features: str, images: str, reference: str) -> str:
    return f"{'fid' if features == INCEPTION else 'fd'}_{features}_{images}_vs_{reference}"


def compare(
    real: Measured,
    fake: Measured,
    features: str,
    images: str,
    reference: str,
    resolution: int,
    device: torch.device,
    strata: list[int] | None = None,
    resamples: int = 0,
) -> list[dict]:
    """Every metric of `fake` against `real`, as `Evaluation` takes them, with more that is known under further keys.

    Args:
        features: name of the feature network.
        images: number and kind of `fake`, by [`counted`].
        reference: name of `real`.
        resolution: side of the images in pixels.
        device: where distances between all pairs are computed.
        strata: class of each image of `fake`, where the mix was fixed.
        resamples: of the bootstrap, for the sampling noise of the Frechet distance and of the spectrum; 0 for none.

    Raises:
        ValueError: if there are too few images.
    """
    is_inception = features == INCEPTION
    pair = real.features.to(device), fake.features.to(device)
    kernel, shares = kernel_distance(*pair), {**asdict(precision_recall(*pair)), **asdict(density_coverage(*pair))}
    spectrum = power_spectrum_distance(real.powers, fake.powers)
    bands = [f"{band} cycles per image" for band in octave_labels(resolution, resolution)]
    return [
        _metric(
            frechet_name(features, images, reference),
            "fid" if is_inception else "frechet_distance",
            **_frechet(real, fake, strata, resamples, images),
        ),
        _metric(
            f"{'kid' if is_inception else 'kd'}_{features}_{images}_vs_{reference}",
            "kid" if is_inception else "kernel_distance",
            **asdict(kernel),
        ),
        *(
            _metric(
                f"{name}_{features}_{images}_vs_{reference}",
                name,
                value,
                # Density is no share: it can exceed 1.
                format="number" if name == "density" else "percent",
            )
            for name, value in shares.items()
        ),
        _metric(
            f"spectrum_{images}_vs_{reference}",
            "power_spectrum_distance",
            **asdict(spectrum),
            bands=bands,
            **_noise_of_spectrum(real, fake, strata, resamples),
        ),
    ]


def memorisation(
    fake: torch.Tensor, train: torch.Tensor, heldout: torch.Tensor, features: str, images: str, device: torch.device
) -> list[dict]:
    """Whether generated images are copies of training images, from the features of all (`nearest_neighbour_ratio`)."""
    ratio = nearest_neighbour_ratio(fake.to(device), train.to(device), heldout.to(device))
    formats = {"copied": "percent", "copied_floor": "percent", "heldout_ratio": "number", "closer_to_train": "percent"}
    return [
        _metric(f"{name}_{features}_{images}", "memorisation", getattr(ratio, name), format=form)
        for name, form in formats.items()
    ]


def _metric(name: str, kind: str, value: float, format: str = "number", **more) -> dict:
    return {"name": name, "type": kind, "value": value, "format": format, **more}


def _frechet(real: Measured, fake: Measured, strata: list[int] | None, resamples: int, label: str) -> dict:
    """The distance, and its sampling noise."""
    statistics = FeatureStatistics.of(real.features)
    if not resamples:
        return {"value": frechet_distance(statistics, FeatureStatistics.of(fake.features))}
    with tqdm(total=resamples + 1, desc=f"Frechet distance of {label}, resampled", unit="sample") as progress:

        def distance(indices: np.ndarray) -> float:
            value = frechet_distance(statistics, FeatureStatistics.of(fake.features[torch.from_numpy(indices)]))
            progress.update()
            return value

        return _noise(distance, len(fake), strata, resamples)


def _noise_of_spectrum(real: Measured, fake: Measured, strata: list[int] | None, resamples: int) -> dict:
    if not resamples:
        return {}
    target = real.powers.mean(dim=0).log()

    def distance(indices: np.ndarray) -> float:
        return (fake.powers[torch.from_numpy(indices)].mean(dim=0).log() - target).abs().mean().item()

    return {name: value for name, value in _noise(distance, len(fake), strata, resamples).items() if name != "value"}


def _noise(distance, count: int, strata: list[int] | None, resamples: int) -> dict:
    """Value and sampling noise. A class with one image shows none: then the classes are resampled too."""
    fixed = strata is not None and np.unique(strata, return_counts=True)[1].min() > 1
    result = bootstrap(distance, count, strata if fixed else None, resamples)
    return {
        "value": result.estimate,
        "sampling_noise": {
            "standard_error": result.standard_error,
            "bias_of_resamples": result.bias,
            "resamples": result.num_resamples,
            "classes_fixed": bool(fixed),
        },
    }
