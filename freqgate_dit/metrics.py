"""Distances between generated and real images: in features, in the power spectrum, and to single training images.

Features are `(N, D)` floating point arrays (numpy or torch), one row per image, from any network. Everything is
computed in float64, block by block, on the device of the features: beside the features themselves a few hundred MB are
needed, whatever N. Random selections are functions of `seed`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from freqgate_dit.files import replace_file
from freqgate_dit.spectral import dct2, octave_bands


Features = np.ndarray | torch.Tensor

ROWS, COLUMNS = 1024, 4096  # of a block of distances: 32 MB in float64
# Of the squared norms: a squared distance computed from norms and products is off by less (1e-14 or so). What is below
# is the same image, at distance 0.
ROUNDING = 1e-12


@dataclass(eq=False)
class FeatureStatistics:
    """Mean and covariance of features, batch by batch.

    The order and size of batches, and the split over processes, change the result by rounding only (Chan, Golub and
    LeVeque 1979).

    Args:
        count: number of images N.
        mean: `(D,)` float64, `None` as long as there are none.
        scatter: `(D, D)` float64, the sum over images of the outer products of their deviations from the mean.
    """

    count: int = 0
    mean: torch.Tensor | None = None
    scatter: torch.Tensor | None = None

    @classmethod
    def of(cls, features: Features) -> "FeatureStatistics":
        """Statistics of all `features (N, D)`. Errors are those of `add`."""
        statistics = cls()
        statistics.add(features)
        return statistics

    def add(self, features: Features):
        """Take in a batch of features `(N, D)`.

        Raises:
            ValueError: if they are not of shape (N, D), not finite, or of another width than those before.
        """
        for block in _checked("features", features).split(COLUMNS):
            block = block.cpu().double()
            mean = block.mean(dim=0)
            rows = torch.cat([block - mean, self._join(len(block), mean)[None]])
            self.scatter.addmm_(rows.T, rows)

    def merge(self, other: "FeatureStatistics"):
        """Take in the statistics of other images, such as those of another process.

        Raises:
            ValueError: if their features have another width.
        """
        if other.count:
            row = self._join(other.count, other.mean)
            self.scatter.add_(other.scatter).addr_(row, row)

    def _join(self, count: int, mean: torch.Tensor) -> torch.Tensor:
        """Take in `count` and `mean` of other images; the row `(D,)` by whose outer product the scatter grows."""
        if self.count == 0:
            self.mean, self.scatter = torch.zeros_like(mean), mean.new_zeros(len(mean), len(mean))
        _check_widths("the features", len(mean), "those before", len(self.mean))
        total = self.count + count
        shift = mean - self.mean
        weight = math.sqrt(self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total
        return shift * weight

    @property
    def covariance(self) -> torch.Tensor:
        """Unbiased covariance `(D, D)`, float64: the scatter over N - 1.

        Raises:
            ValueError: if there are fewer than 2 images.
        """
        if self.count < 2:
            raise ValueError(f"the statistics hold {self.count} image(s): a covariance needs at least 2.")
        return self.scatter / (self.count - 1)

    def save(self, path: str | Path):
        """Write a safetensors file with `count`, `mean` and `scatter`, whole or not at all.

        Raises:
            ValueError: if there are no images.
        """
        if self.count == 0:
            raise ValueError("the statistics hold no images: add features before saving.")
        tensors = {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self.scatter}
        replace_file(Path(path), lambda temporary: save_file(tensors, temporary))

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStatistics":
        """Read what `save` has written, to the bit.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or holds something else; names the file.
        """
        name = Path(path).name
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{name} is damaged ({error}): delete it, and measure the statistics again.") from error
        if tensors.keys() != {"count", "mean", "scatter"}:
            raise ValueError(f"{name} holds {', '.join(tensors) or 'nothing'}, no statistics of features.")
        return cls(int(tensors["count"]), tensors["mean"], tensors["scatter"])


@dataclass(frozen=True)
class KernelDistance:
    """Squared maximum mean discrepancy (KID). No unit; 0 is expected for two samples of one distribution, and values
    below 0 are usual there.

    Args:
        value: unbiased estimate from all images.
        subset_mean, subset_std: mean and standard deviation of the same estimate over random subsets, the mean being
            what clean-fid estimates. The deviation is that of a measurement with `subset_size` images: larger than the
            error of `value`.
        num_subsets, subset_size: number of subsets, and images of each kind in a subset.
    """

    value: float
    subset_mean: float
    subset_std: float
    num_subsets: int
    subset_size: int


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares, 0 to 1: of generated images that lie among the real ones, and of real ones among the generated."""

    precision: float
    recall: float


@dataclass(frozen=True)
class DensityCoverage:
    """Density: in how many neighbourhoods of real images a generated one lies, over the expected number (1 is expected
    of real images; it can exceed 1). Coverage: share, 0 to 1, of real images with a generated one in their
    neighbourhood.
    """

    density: float
    coverage: float


@dataclass(frozen=True)
class NearestNeighbourRatio:
    """Whether generated images are copies of training images.

    Args:
        copied: share, 0 to 1, of generated images whose nearest training image is nearer than `threshold` times the
            second nearest. It misses copies of an image that is in the training set twice with small changes.
        copied_floor: the same share of held-out images, which are copies of nothing.
        heldout_ratio: median over generated images of the distance to the nearest training image over that to the
            nearest held-out image, among equally many of both. 1 is expected without memorisation, less with it.
        closer_to_train: share, 0 to 1, of generated images that are closer to a training image than to any held-out
            one, ties counted half. 0.5 is expected without memorisation.
        threshold: of `copied`.
    """

    copied: float
    copied_floor: float
    heldout_ratio: float
    closer_to_train: float
    threshold: float


@dataclass(frozen=True)
class SpectrumDistance:
    """Distance of radial power spectra, in nats: 0.1 is a power 10% too high or too low.

    Args:
        value: mean over channels and bands of |log power of generated - log power of real images|.
        log_ratio: per channel and band; negative where generated images lack power.
        floor: mean of `value` between random halves of the real images.
        floor_low, floor_high: interval that holds 95% of them. A `value` below its upper end shows no difference; with
            as many images of both kinds the floor is on the safe side, as halves are smaller.
    """

    value: float
    log_ratio: tuple[tuple[float, ...], ...]
    floor: float
    floor_low: float
    floor_high: float


# -- distributions ----------------------------------------------------------------------------------------------------


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared Frechet distance of two Gaussians with the given mean and covariance (Heusel et al. 2017, equation 6).

    `|m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^(1/2))`, the last trace from the eigenvalues of the symmetric product
    `C1^(1/2) C2 C1^(1/2)`, which are those of `C1 C2`. Fewer images than dimensions are allowed. The estimate is too
    high for small N: compare numbers of one N only.

    Returns:
        The distance in squared units of the features, at least 0.

    Raises:
        ValueError: if the widths differ, or one holds fewer than 2 images.
    """
    for name, statistics in (("first", first), ("second", second)):
        if statistics.count < 2:
            raise ValueError(f"`{name}` has {statistics.count} image(s): a Frechet distance needs at least 2.")
    _check_widths("`second`", len(second.mean), "`first`", len(first.mean))
    # The root of fewer images has the lower rank r, and the product is r x r. An eigenvalue of 0 that comes out as
    # 1e-16 would be 1e-8 after the square root.
    fewer, more = sorted((first, second), key=lambda statistics: statistics.count)
    root = _root(fewer.covariance)
    overlap = torch.linalg.eigvalsh(root.T @ more.covariance @ root).clamp(min=0).sqrt().sum()
    traces = first.covariance.trace() + second.covariance.trace()
    distance = (first.mean - second.mean).square().sum() + traces - 2 * overlap
    return max(0.0, float(distance))


def kernel_distance(
    real: Features, fake: Features, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Kernel distance with the kernel `(x.y / D + 1)^3` (Binkowski et al. 2018), unbiased at every N.

    Args:
        real, fake: `(N, D)` and `(M, D)` features, at least 4 each.
        num_subsets: random subsets for the spread, at least 2.
        subset_size: images in a subset, at least 2; at most half of either set is taken, as subsets that are nearly
            the whole set would show no spread. (clean-fid takes up to the whole set.)
        seed: of the subsets.

    Raises:
        ValueError: if there are too few, the widths differ, or features are not finite.
    """
    real, fake = _checked_pair("real", real, "fake", fake)
    for name, features in (("real", real), ("fake", fake)):
        if len(features) < 4:
            raise ValueError(f"`{name}` has {len(features)} image(s): a kernel distance needs at least 4.")
    for name, value in (("num_subsets", num_subsets), ("subset_size", subset_size)):
        if value < 2:
            raise ValueError(f"`{name}` ({value}) must be at least 2; 100 subsets of 1000 are usual.")
    size = min(subset_size, len(real) // 2, len(fake) // 2)
    generator = np.random.default_rng(seed)
    chosen = [_subsets(features, num_subsets, size, generator) for features in (real, fake)]
    value, *values = _squared_discrepancies(real, fake, *chosen).tolist()
    return KernelDistance(value, float(np.mean(values)), float(np.std(values, ddof=1)), num_subsets, size)


def precision_recall(real: Features, fake: Features, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    A set's manifold is the union of balls around its points that reach to their k-th nearest neighbour. Both depend on
    the number of images: compare numbers of equal N and M only.

    Args:
        real, fake: `(N, D)` and `(M, D)` features, more than k each.
        k: neighbour that the balls reach to.

    Raises:
        ValueError: if there are too few for k, the widths differ, or features are not finite.
    """
    real, fake = _checked_pair("real", real, "fake", fake)
    real_radii, fake_radii = _squared_radii("real", real, k), _squared_radii("fake", fake, k)
    precise = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, columns, distances in _squared_distances(fake, real):
        precise[rows] |= (distances <= real_radii[columns]).any(dim=1)
        recalled[columns] |= (distances <= fake_radii[rows, None]).any(dim=0)
    return PrecisionRecall(_share(precise), _share(recalled))


def density_coverage(real: Features, fake: Features, k: int = 5) -> DensityCoverage:
    """Density and coverage (Naeem et al. 2020), in balls of real images to their k-th neighbour.

    With generated images from the real distribution and M = N, coverage is about 1 - 2^-k.

    Args:
        real, fake: `(N, D)` features, more than k, and `(M, D)`.
        k: neighbour that the balls reach to.

    Raises:
        ValueError: if there are too few for k, the widths differ, or features are not finite.
    """
    real, fake = _checked_pair("real", real, "fake", fake)
    radii = _squared_radii("real", real, k)
    hits = torch.zeros(len(real), dtype=torch.int64, device=real.device)
    for _, columns, distances in _squared_distances(fake, real):
        hits[columns] += (distances <= radii[columns]).sum(dim=0)
    return DensityCoverage(float(hits.sum()) / (k * len(fake)), _share(hits > 0))


# -- copies -----------------------------------------------------------------------------------------------------------


def nearest_neighbours(features: Features, others: Features, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest of `others (M, D)` for each of `features (N, D)`.

    Returns:
        Distances `(N, k)` float64, ascending, in units of the features; and their indices `(N, k)` int64 in `others`.

    Raises:
        ValueError: if there are fewer than k, the widths differ, or features are not finite.
    """
    features, others = _checked_pair("features", features, "others", others)
    if not 1 <= k <= len(others):
        raise ValueError(f"`k` ({k}) must be between 1 and the {len(others)} images of `others`.")
    squared, indices = _nearest(features, others, k)
    return squared.sqrt(), indices


def nearest_neighbour_ratio(
    fake: Features, train: Features, heldout: Features, threshold: float = 1 / 3, seed: int = 0
) -> NearestNeighbourRatio:
    """Memorisation, by nearest neighbours in feature space.

    Nearest over second nearest training image, below 1/3 (Yoon et al. 2023); and nearest training against nearest
    held-out image, which asks only that the split was random: where training and held-out images differ in kind, this
    shows that difference too.

    Args:
        fake, train, heldout: `(N, D)`, `(M, D)` and `(L, D)` features of generated, training and held-out images. M is
            at least 2. The larger of `train` and `heldout` is reduced to the size of the other, at random, for what
            compares them.
        threshold: of the first ratio.
        seed: of the random reduction.

    Raises:
        ValueError: if there are too few, the widths differ, features are not finite, or most of `fake` are held-out
            images themselves.
    """
    fake, train = _checked_pair("fake", fake, "train", train)
    heldout = _checked_like("heldout", heldout, "fake", fake)
    if len(train) < 2:
        raise ValueError(f"`train` has {len(train)} image: the ratio needs a second nearest.")
    generator = np.random.default_rng(seed)
    size = min(len(train), len(heldout))
    to_train = _nearest(fake, _random_rows(train, size, generator), 1)[0][:, 0].sqrt()
    to_heldout = _nearest(fake, _random_rows(heldout, size, generator), 1)[0][:, 0].sqrt()
    # Equal distances, of 0 too, have the ratio 1.
    ratio = torch.where(to_train == to_heldout, 1.0, to_train / to_heldout).median().item()
    if math.isinf(ratio):
        raise ValueError("most of `fake` are images of `heldout`: pass generated images, or hold out others.")
    closer = (to_train < to_heldout).double() + 0.5 * (to_train == to_heldout).double()
    return NearestNeighbourRatio(
        _copied(fake, train, threshold), _copied(heldout, train, threshold), ratio, closer.mean().item(), threshold
    )


# -- power spectra ----------------------------------------------------------------------------------------------------


def band_power(images: Features, mean: Features | None = None, basis: str = "dct") -> torch.Tensor:
    """Power of each image per channel and octave of spatial frequency (`freqgate_dit.spectral.octave_bands`).

    A table of all images is small; make it batch by batch and concatenate.

    Args:
        images: `(N, C, H, W)` floating point images or latents.
        mean: `(C, H, W)` to subtract first, the same one for all that is compared, usually the mean real image; or
            `(N, C, H, W)`, one for each image, such as that of its class. The power is then a variance, plus the
            squared difference of means; without it the lowest band is mostly brightness.
        basis: "dct", or "fft", which takes the step between opposite edges for content of the image.

    Returns:
        `(N, C, bands)` float64 on the CPU: the mean over the band of the squared absolute coefficients of the
        orthonormal transform, in squared units of the images.

    Raises:
        ValueError: if the shapes are others, or values are not finite.
    """
    images = torch.as_tensor(images).detach()
    if images.ndim != 4 or not images.is_floating_point() or images.numel() == 0:
        raise ValueError(
            f"`images` has shape {tuple(images.shape)} and dtype {images.dtype}: pass floating point images of shape "
            "(images, channels, height, width)."
        )
    _check_finite("images", images)
    if mean is not None:
        mean = torch.as_tensor(mean).to(images.device)
        if mean.shape not in (images.shape[1:], images.shape):
            raise ValueError(
                f"`mean` has shape {tuple(mean.shape)}: pass one image, {tuple(images.shape[1:])}, or one for each of "
                f"the {len(images)}."
            )
        images = images - mean
    coefficients = dct2(images) if basis == "dct" else torch.fft.fft2(images.double(), norm="ortho").abs()
    energy = coefficients.cpu().double().square().flatten(start_dim=2)
    bands = octave_bands(*images.shape[-2:], basis=basis).flatten()
    sizes = bands.bincount()
    return energy.new_zeros(*energy.shape[:2], len(sizes)).index_add_(2, bands, energy) / sizes


def power_spectrum_distance(
    real: Features, fake: Features, num_halvings: int = 200, seed: int = 0
) -> SpectrumDistance:
    """Distance of the mean power spectra, beside the same distance between random halves of the real images.

    It says nothing about how the power is arranged: noise with the right spectrum has distance 0.

    Args:
        real, fake: `(N, C, bands)` and `(M, C, bands)`, N at least 2, from `band_power`.
        num_halvings: number of random halvings.
        seed: of the halvings.

    Raises:
        ValueError: if the shapes do not fit, values are not finite, or a band has no power at all.
    """
    real, fake = _checked_powers("real", real), _checked_powers("fake", fake)
    if real.shape[1:] != fake.shape[1:]:
        raise ValueError(
            f"`fake` has {fake.shape[1]} channels and {fake.shape[2]} bands, `real` {real.shape[1]} and "
            f"{real.shape[2]}: compare images of one size and kind."
        )
    if len(real) < 2:
        raise ValueError(f"`real` has {len(real)} image: halves need at least 2.")
    if num_halvings < 1:
        raise ValueError(f"`num_halvings` ({num_halvings}) must be at least 1; 200 are usual.")
    log_ratio = np.log(fake.mean(axis=0)) - np.log(real.mean(axis=0))
    generator = np.random.default_rng(seed)
    floors = []
    for _ in range(num_halvings):
        order = generator.permutation(len(real))
        halves = [real[half].mean(axis=0) for half in np.array_split(order, 2)]
        floors.append(np.abs(np.log(halves[0] / halves[1])).mean())
    low, high = np.quantile(floors, [0.025, 0.975])
    table = tuple(map(tuple, log_ratio.tolist()))
    return SpectrumDistance(float(np.abs(log_ratio).mean()), table, float(np.mean(floors)), float(low), float(high))


# -- checks -----------------------------------------------------------------------------------------------------------


def _checked(name: str, features: Features) -> torch.Tensor:
    features = torch.as_tensor(features).detach()
    if features.ndim != 2 or not features.is_floating_point() or features.numel() == 0:
        raise ValueError(
            f"`{name}` has shape {tuple(features.shape)} and dtype {features.dtype}: pass floating point features of "
            "shape (images, width), at least one of each."
        )
    _check_finite(name, features)
    return features.cpu() if features.device.type == "mps" else features  # which has no float64


def _checked_like(name: str, features: Features, other_name: str, other: torch.Tensor) -> torch.Tensor:
    """`features`, of the same width as `other` and on its device."""
    features = _checked(name, features)
    _check_widths(f"`{name}`", features.shape[1], f"`{other_name}`", other.shape[1])
    return features.to(other.device)


def _checked_pair(name: str, features: Features, other_name: str, other: Features) -> tuple[torch.Tensor, ...]:
    features = _checked(name, features)
    return features, _checked_like(other_name, other, name, features)


def _checked_powers(name: str, powers: Features) -> np.ndarray:
    powers = torch.as_tensor(powers)
    if powers.ndim != 3 or len(powers) == 0:
        raise ValueError(f"`{name}` has shape {tuple(powers.shape)}: pass what `band_power` gives.")
    _check_finite(name, powers)
    powers = powers.double().cpu().numpy()
    empty = np.argwhere(powers.mean(axis=0) <= 0)
    if len(empty):
        channel, band = empty[0]
        raise ValueError(
            f"`{name}` has no power in channel {channel}, band {band} (of {powers.shape[2]}), whose logarithm is "
            "compared: are all of its images constant?"
        )
    return powers


def _check_finite(name: str, values: torch.Tensor):
    if torch.stack(values.aminmax()).isfinite().all():  # without a mask as large as the values
        return
    rows = (~values.isfinite()).flatten(start_dim=1).any(dim=1).nonzero()[:, 0]
    raise ValueError(
        f"`{name}` has NaN or infinity in {len(rows)} of {len(values)} rows, the first is row {int(rows[0])}: look at "
        "that image, or compute in float32."
    )


def _check_widths(name: str, width: int, other_name: str, other_width: int):
    if width != other_width:
        raise ValueError(f"{name} of width {width}, {other_name} {other_width}: take both from one feature network.")


# -- computation ------------------------------------------------------------------------------------------------------


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """`(D, r)` with `root @ root.T` the covariance and r its numerical rank."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def _share(hits: torch.Tensor) -> float:
    return hits.double().mean().item()


def _random_rows(features: torch.Tensor, size: int, generator: np.random.Generator) -> torch.Tensor:
    if size == len(features):
        return features
    return features[torch.from_numpy(generator.choice(len(features), size, replace=False)).to(features.device)]


def _subsets(features: torch.Tensor, num_subsets: int, size: int, generator: np.random.Generator) -> torch.Tensor:
    """Selections of rows `(1 + num_subsets, N)`, float64, 1 where a row is in: all of them, then random ones."""
    chosen = np.zeros((1 + num_subsets, len(features)))
    chosen[0] = 1
    for row in chosen[1:]:
        row[generator.choice(len(features), size, replace=False)] = 1
    return torch.from_numpy(chosen).to(features.device)


def _squared_discrepancies(
    real: torch.Tensor, fake: torch.Tensor, chosen_real: torch.Tensor, chosen_fake: torch.Tensor
) -> torch.Tensor:
    """Unbiased squared maximum mean discrepancies `(S,)` of S selections (Gretton et al. 2012, equation 3)."""
    counts = chosen_real.sum(dim=1), chosen_fake.sum(dim=1)
    total = -2 * _kernel_sums(real, fake, chosen_real, chosen_fake) / (counts[0] * counts[1])
    for features, chosen, count in zip((real, fake), (chosen_real, chosen_fake), counts, strict=True):
        squares = torch.cat([rows.double().square().sum(dim=1) for rows in features.split(ROWS)])
        within = _kernel_sums(features, features, chosen, chosen) - chosen @ _kernel(squares, features.shape[1])
        total += within / (count * (count - 1))
    return total


def _kernel(products: torch.Tensor, width: int) -> torch.Tensor:
    return (products / width + 1) ** 3


def _kernel_sums(
    first: torch.Tensor, second: torch.Tensor, chosen_first: torch.Tensor, chosen_second: torch.Tensor
) -> torch.Tensor:
    """Sums `(S,)` of the kernel over the pairs of each selection, of which each block of the kernel serves all."""
    total = chosen_first.new_zeros(len(chosen_first))
    for i in range(0, len(first), ROWS):
        rows = first[i : i + ROWS].double()
        for j in range(0, len(second), COLUMNS):
            block = _kernel(rows @ second[j : j + COLUMNS].double().T, first.shape[1])
            total += ((chosen_first[:, i : i + ROWS] @ block) * chosen_second[:, j : j + COLUMNS]).sum(dim=1)
    return total


def _squared_distances(first: torch.Tensor, second: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Blocks of the squared distances `(N, M)`: their rows, columns and values."""
    # Near the features, so that a common offset does not drown the distances in rounding.
    centre = second[:COLUMNS].double().mean(dim=0)
    for i in range(0, len(first), ROWS):
        rows = slice(i, min(i + ROWS, len(first)))
        a = first[rows].double() - centre
        for j in range(0, len(second), COLUMNS):
            columns = slice(j, min(j + COLUMNS, len(second)))
            b = second[columns].double() - centre
            norms = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
            distances = torch.addmm(norms, a, b.T, alpha=-2)
            yield rows, columns, distances.masked_fill_(distances < ROUNDING * norms, 0.0)


def _nearest(first: torch.Tensor, second: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances, ascending, and indices `(N, k)` of the k nearest of `second (M, D)`, k <= M."""
    values = torch.full((len(first), k), torch.inf, dtype=torch.float64, device=first.device)
    indices = torch.zeros((len(first), k), dtype=torch.int64, device=first.device)
    for rows, columns, distances in _squared_distances(first, second):
        numbers = torch.arange(columns.start, columns.stop, device=first.device).expand_as(distances)
        candidates = torch.cat([values[rows], distances], dim=1)
        values[rows], places = candidates.topk(k, dim=1, largest=False)
        indices[rows] = torch.cat([indices[rows], numbers], dim=1).gather(1, places)
    return values, indices


def _squared_radii(name: str, features: torch.Tensor, k: int) -> torch.Tensor:
    """Squared distances `(N,)` to the k-th nearest neighbour in the set itself, the point not counted."""
    if not 1 <= k < len(features):
        raise ValueError(f"`k` ({k}) must be at least 1 and below the {len(features)} images of `{name}`.")
    return _nearest(features, features, k + 1)[0][:, -1]


def _copied(features: torch.Tensor, train: torch.Tensor, threshold: float) -> float:
    """Share of features whose nearest of `train` is at distance 0, or nearer than `threshold` times the second."""
    nearest, second = _nearest(features, train, 2)[0].sqrt().T
    return _share((nearest < threshold * second) | (nearest == 0))
