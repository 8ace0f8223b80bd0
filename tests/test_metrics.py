"""Metrics against closed forms, brute force, and what must leave them unchanged."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from freqgate_dit import metrics
from freqgate_dit.metrics import (
    FeatureStatistics,
    band_power,
    density_coverage,
    frechet_distance,
    kernel_distance,
    nearest_neighbour_ratio,
    nearest_neighbours,
    power_spectrum_distance,
    precision_recall,
)
from freqgate_dit.spectral import dct2, idct2, octave_bands


@pytest.fixture
def small_blocks(monkeypatch):
    """So that a few images fill several blocks, the last one in part."""
    monkeypatch.setattr(metrics, "ROWS", 7)
    monkeypatch.setattr(metrics, "COLUMNS", 5)


def normal(*shape, seed=0, mean=0.0) -> torch.Tensor:
    return mean + torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotation(width, seed=9) -> torch.Tensor:
    return torch.linalg.qr(normal(width, width, seed=seed))[0]


def positive(width, seed) -> torch.Tensor:
    """A symmetric positive definite matrix that commutes with none other."""
    factor = normal(width, 2 * width, seed=seed)
    return factor @ factor.T / width


def gaussian(mean, covariance, count=1000) -> FeatureStatistics:
    return FeatureStatistics(count, mean, covariance * (count - 1))


# -- statistics -------------------------------------------------------------------------------------------------------


def assert_statistics_of(statistics, features):
    """As numpy computes them from all features at once."""
    assert statistics.count == len(features)
    np.testing.assert_allclose(statistics.mean, features.numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("offset", [0, 1e4])
def test_statistics_batch_by_batch_are_those_of_the_whole(offset, small_blocks):
    """With a mean far from 0, which sums of squares would not survive."""
    features = normal(60, 4, mean=offset)
    statistics = FeatureStatistics()
    for batch in features.split([1, 20, 13, 1, 25]):
        statistics.add(batch)
    assert_statistics_of(statistics, features)
    assert_statistics_of(FeatureStatistics.of(features.numpy()), features)


def test_statistics_of_several_processes_are_merged():
    features = normal(50, 4)
    parts = [FeatureStatistics.of(part) for part in features.split([17, 30, 3])]
    parts.insert(1, FeatureStatistics())  # a process that had nothing to do
    merged = FeatureStatistics()
    for part in parts:
        merged.merge(part)
    assert_statistics_of(merged, features)
    # The first part was copied, not taken.
    assert_statistics_of(parts[0], features[:17])


def test_half_precision_is_summed_in_double():
    features = normal(500, 3, mean=100).bfloat16()
    assert_statistics_of(FeatureStatistics.of(features), features.double())


def test_statistics_are_saved_to_the_bit(tmp_path):
    statistics = FeatureStatistics.of(normal(20, 5))
    statistics.save(tmp_path / "reference.safetensors")
    loaded = FeatureStatistics.load(tmp_path / "reference.safetensors")
    assert loaded.count == 20 and torch.equal(loaded.mean, statistics.mean)
    assert torch.equal(loaded.scatter, statistics.scatter)
    assert [file.name for file in tmp_path.iterdir()] == ["reference.safetensors"]


def test_a_file_that_holds_no_statistics_is_refused(tmp_path):
    file = tmp_path / "reference.safetensors"
    with pytest.raises(ValueError, match="hold no images"):
        FeatureStatistics().save(file)
    with pytest.raises(FileNotFoundError):
        FeatureStatistics.load(file)
    save_file({"weight": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match="reference.safetensors holds weight"):
        FeatureStatistics.load(file)
    FeatureStatistics.of(normal(20, 5)).save(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="reference.safetensors is damaged"):
        FeatureStatistics.load(file)


def test_features_that_do_not_fit_are_refused():
    statistics = FeatureStatistics.of(normal(5, 3))
    with pytest.raises(ValueError, match="features of width 4, those before 3"):
        statistics.add(normal(5, 4))
    bad = normal(5, 3)
    bad[3, 1], bad[4, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match="NaN or infinity in 2 of 5 rows, the first is row 3"):
        statistics.add(bad)
    for features in (normal(5), normal(5, 3, 2, 2), torch.ones(5, 3, dtype=torch.int64), normal(0, 3)):
        with pytest.raises(ValueError, match="`features` has shape"):
            statistics.add(features)
    assert_statistics_of(statistics, normal(5, 3))
    with pytest.raises(ValueError, match="1 image"):
        FeatureStatistics.of(normal(1, 3)).covariance  # noqa: B018


# -- Frechet distance -------------------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_that_commute():
    """Same axes: the squared distance of means and standard deviations."""
    axes, means = rotation(40), normal(2, 40)
    deviations = torch.logspace(-4, 2, 40, dtype=torch.float64), torch.logspace(1, -3, 40, dtype=torch.float64)
    first, second = (gaussian(m, axes * s.square() @ axes.T) for m, s in zip(means, deviations, strict=True))
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    """If C2 = T C1 T with T positive, T is the optimal map between them, and the distance is Tr (T - 1) C1 (T - 1)."""
    first, transport, means = positive(40, 1), positive(40, 2), normal(2, 40)
    second = transport @ first @ transport
    assert (first @ second - second @ first).abs().max() > 0.1
    move = transport - torch.eye(40, dtype=torch.float64)
    expected = (means[0] - means[1]).square().sum() + (move @ first @ move).trace()
    distance = frechet_distance(gaussian(means[0], first), gaussian(means[1], second))
    assert distance == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_distance_in_two_dimensions():
    """Where the trace of the root is sqrt(Tr C1 C2 + 2 sqrt(det C1 C2))."""
    first = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    second = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    expected = 10 - 2 * math.sqrt(9 + 2 * math.sqrt(5 * 3))
    assert frechet_distance(gaussian(zero, first), gaussian(zero, second)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("counts", [(10, 10), (10, 25), (25, 10), (10, 300), (2, 2)])
def test_frechet_distance_of_fewer_images_than_dimensions(counts):
    """The trace of the root is the sum of the singular values of X1 X2^T, centred, over sqrt((N - 1)(M - 1))."""
    first, second = normal(counts[0], 60, seed=1), normal(counts[1], 60, seed=2, mean=0.1)
    centred = [features - features.mean(dim=0) for features in (first, second)]
    traces = sum(features.square().sum() / (len(features) - 1) for features in centred)
    overlap = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / math.sqrt((counts[0] - 1) * (counts[1] - 1))
    expected = (first.mean(dim=0) - second.mean(dim=0)).square().sum() + traces - 2 * overlap
    distance = frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))
    assert distance == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("count", [2, 20, 200])
def test_frechet_distance_to_the_same_images_is_zero(count):
    features = normal(count, 50) * torch.logspace(-3, 3, 50, dtype=torch.float64)
    statistics = FeatureStatistics.of(features)
    # To rounding, which is another one in every LAPACK, of what it is the difference of.
    rounding = 1e-10 * statistics.covariance.trace().item()
    assert frechet_distance(statistics, FeatureStatistics.of(features.flip(0))) < rounding
    same = FeatureStatistics.of(features[:1].repeat(count, 1))
    assert frechet_distance(same, same) < 1e-20 * rounding


def test_frechet_distance_is_one_of_sets_in_space():
    """Symmetric; unchanged by rotation, translation, more dimensions; its unit is the square of the features'."""
    first, second = normal(100, 12, seed=1), normal(80, 12, seed=2, mean=0.2) * 1.5

    def distance(change=lambda features: features):
        return frechet_distance(FeatureStatistics.of(change(first)), FeatureStatistics.of(change(second)))

    expected = distance()
    assert expected > 1
    assert frechet_distance(FeatureStatistics.of(second), FeatureStatistics.of(first)) == expected
    for change, factor in (
        (lambda features: features @ rotation(12) + 100, 1),
        (lambda features: torch.cat([features, torch.zeros(len(features), 100)], dim=1) @ rotation(112), 1),
        (lambda features: 3 * features, 9),
    ):
        assert distance(change) == pytest.approx(factor * expected, rel=1e-9)


def test_frechet_distance_is_that_of_scipy():
    """By the formula of pytorch-fid and clean-fid."""
    linalg = pytest.importorskip("scipy.linalg")
    first, second = FeatureStatistics.of(normal(300, 40, seed=1)), FeatureStatistics.of(normal(200, 40, seed=2) * 1.3)
    root = linalg.sqrtm(first.covariance.numpy() @ second.covariance.numpy()).real
    traces = first.covariance.trace() + second.covariance.trace() - 2 * np.trace(root)
    expected = (first.mean - second.mean).square().sum() + traces
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_what_has_none_is_refused():
    some = FeatureStatistics.of(normal(5, 3))
    with pytest.raises(ValueError, match="`second` has 1 image"):
        frechet_distance(some, FeatureStatistics.of(normal(1, 3)))
    with pytest.raises(ValueError, match="`second` of width 4, `first` 3"):
        frechet_distance(some, FeatureStatistics.of(normal(5, 4)))


# -- kernel distance --------------------------------------------------------------------------------------------------


def discrepancy(real, fake) -> float:
    """By the definition, a pair of images at a time."""

    def kernel(x, y):
        return (x @ y / len(x) + 1) ** 3

    def within(features):
        pairs = [(i, j) for i in range(len(features)) for j in range(len(features)) if i != j]
        return np.mean([kernel(features[i], features[j]) for i, j in pairs])

    return within(real) + within(fake) - 2 * np.mean([kernel(x, y) for x in real for y in fake])


def test_kernel_distance_is_the_definition(small_blocks):
    real, fake = normal(23, 4, seed=1).numpy(), normal(17, 4, seed=2, mean=0.3).numpy()
    result = kernel_distance(real, fake, num_subsets=3, subset_size=6, seed=5)
    assert result.value == pytest.approx(discrepancy(real, fake), rel=1e-10)
    generator, sizes = np.random.default_rng(5), ((real, 23), (fake, 17))
    chosen = [[features[generator.choice(n, 6, replace=False)] for _ in range(3)] for features, n in sizes]
    subsets = [discrepancy(*pair) for pair in zip(*chosen, strict=True)]
    assert (result.subset_mean, result.subset_std) == pytest.approx((np.mean(subsets), np.std(subsets, ddof=1)))
    assert (result.num_subsets, result.subset_size) == (3, 6)
    assert kernel_distance(fake, real, num_subsets=3).value == pytest.approx(result.value, rel=1e-10)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kernel_distance_is_unbiased(shift):
    """In one dimension the kernel compares moments: the distance is 3 dm1^2 + 3 dm2^2 + dm3^2."""
    expected = 3 * shift**2 + 3 * shift**4 + (shift**3 + 3 * shift) ** 2
    results = [
        kernel_distance(normal(30, 1, seed=2 * seed), normal(20, 1, seed=2 * seed + 1, mean=shift), num_subsets=5)
        for seed in range(150)
    ]
    for values in ([result.value for result in results], [result.subset_mean for result in results]):
        assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / math.sqrt(len(values)))
    assert shift or min(result.value for result in results) < 0


def test_subsets_are_never_the_whole_set():
    """All of them would be the same, and their spread 0."""
    result = kernel_distance(normal(40, 3), normal(50, 3, seed=1))
    assert result.subset_size == 20 and result.subset_std > 0
    assert result == kernel_distance(normal(40, 3), normal(50, 3, seed=1))
    assert result != kernel_distance(normal(40, 3), normal(50, 3, seed=1), seed=1)
    with pytest.raises(ValueError, match="`fake` has 3 image"):
        kernel_distance(normal(4, 3), normal(3, 3))
    with pytest.raises(ValueError, match="`subset_size` .1."):
        kernel_distance(normal(4, 3), normal(4, 3), subset_size=1)
    with pytest.raises(ValueError, match="`fake` of width 4, `real` 3"):
        kernel_distance(normal(4, 3), normal(4, 4))


# -- neighbourhoods ---------------------------------------------------------------------------------------------------


def brute_distances(first, second) -> np.ndarray:
    return np.array([[np.sqrt(((x - y) ** 2).sum()) for y in second] for x in first])


def brute_radii(features, k) -> np.ndarray:
    return np.sort(brute_distances(features, features), axis=1)[:, k]  # at 0 is the point itself


@pytest.mark.parametrize("offset", [0, 1e7])
@pytest.mark.parametrize("k", [1, 4])
def test_neighbourhoods_by_brute_force(k, offset, small_blocks):
    real, fake = normal(33, 3, seed=1).numpy() + offset, normal(26, 3, seed=2, mean=1).numpy() + offset
    inside_real = brute_distances(fake, real) <= brute_radii(real, k)
    inside_fake = brute_distances(real, fake) <= brute_radii(fake, k)
    result = precision_recall(real, fake, k)
    assert (result.precision, result.recall) == (inside_real.any(axis=1).mean(), inside_fake.any(axis=1).mean())
    assert 0 < result.precision < 1 and 0 < result.recall < 1
    result = density_coverage(real, fake, k)
    assert (result.density, result.coverage) == (inside_real.sum() / (k * 26), inside_real.any(axis=0).mean())


def test_neighbourhoods_on_a_line():
    """Real balls of radius 1 around 0, 1, 2 and of 8 around 10; of the generated, 0.5 is in two of them, 4 in one."""
    real, fake = torch.tensor([[0.0], [1.0], [2.0], [10.0]]), torch.tensor([[0.5], [20.0], [4.0], [-3.0]])
    result = precision_recall(real, fake, k=1)
    assert (result.precision, result.recall) == (0.5, 1)  # generated balls reach from 0.5 to -3, and from 20 to 4
    result = density_coverage(real, fake, k=1)
    assert (result.density, result.coverage) == (3 / 4, 3 / 4)


def test_neighbourhoods_of_the_same_and_of_distant_images():
    real = normal(40, 5)
    real[7] = real[3]  # a ball of radius 0 holds its own centre
    same, apart = precision_recall(real, real.flip(0), k=1), precision_recall(real, real + 100)
    assert (same.precision, same.recall, apart.precision, apart.recall) == (1, 1, 0, 0)
    same, apart = density_coverage(real, real.flip(0)), density_coverage(real, real + 100)
    assert same.density >= 1 and (same.coverage, apart.density, apart.coverage) == (1, 0, 0)


def test_precision_and_recall_are_mirrors():
    real, fake = normal(60, 4, seed=1), normal(50, 4, seed=2) * 1.5
    one, other = precision_recall(real, fake), precision_recall(fake, real)
    assert (one.precision, one.recall) == (other.recall, other.precision) and one.precision < one.recall
    # What one mode lacks is recall.
    narrow = precision_recall(real, 0.1 * normal(50, 4, seed=3))
    assert narrow.precision == 1 and narrow.recall < 0.2


@pytest.mark.parametrize("measure", [precision_recall, density_coverage])
def test_neighbourhoods_are_those_of_sets_in_space(measure):
    real, fake = normal(50, 6, seed=1), normal(40, 6, seed=2, mean=0.3)
    expected = measure(real, fake)
    assert expected == measure(5 * real @ rotation(6) - 40, 5 * fake @ rotation(6) - 40)
    assert expected == measure(real[torch.randperm(50)], fake.flip(0))
    assert expected == measure(real.float().numpy(), fake.float().requires_grad_())


def test_density_and_coverage_of_the_real_distribution():
    """Expected: 1, and 1 - (N - 1) ... (N - k) / ((N + M - 1) ... (N + M - k)) (Naeem et al. 2020)."""
    results = [density_coverage(normal(60, 8, seed=2 * s), normal(50, 8, seed=2 * s + 1), k=2) for s in range(60)]
    expected = 1, 1 - 59 * 58 / (109 * 108)
    for values, value in zip(zip(*((r.density, r.coverage) for r in results), strict=True), expected, strict=True):
        assert np.mean(values) == pytest.approx(value, abs=4 * np.std(values) / math.sqrt(len(values)))


def test_too_few_images_for_a_neighbourhood_are_refused():
    for measure in (precision_recall, density_coverage):
        with pytest.raises(ValueError, match="`k` .5. must be at least 1 and below the 5 images of `real`"):
            measure(normal(5, 3), normal(9, 3), k=5)
        with pytest.raises(ValueError, match="`k` .0."):
            measure(normal(5, 3), normal(9, 3), k=0)
        with pytest.raises(ValueError, match="`fake` of width 2, `real` 3"):
            measure(normal(5, 3), normal(9, 2))
    with pytest.raises(ValueError, match="4 images of `fake`"):
        precision_recall(normal(9, 3), normal(4, 3), k=4)
    assert density_coverage(normal(9, 3), normal(1, 3)).coverage >= 0


# -- copies -----------------------------------------------------------------------------------------------------------


def test_nearest_neighbours_by_brute_force(small_blocks):
    features, others = normal(16, 3, seed=1), normal(23, 3, seed=2)
    features[4] = others[20]
    distances, indices = nearest_neighbours(features, others, 4)
    expected = brute_distances(features.numpy(), others.numpy())
    np.testing.assert_array_equal(indices, np.argsort(expected, axis=1)[:, :4])
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :4], rtol=1e-10)
    assert distances[4, 0] == 0 and indices[4, 0] == 20
    assert not nearest_neighbours(features.requires_grad_(), others)[0].requires_grad
    with pytest.raises(ValueError, match="`k` .24. must be between 1 and the 23"):
        nearest_neighbours(features, others, 24)


def test_copies_are_counted():
    train, heldout = normal(80, 16, seed=1), normal(80, 16, seed=2)
    fresh, copies = normal(30, 16, seed=3), train[:10] + 0.01 * normal(10, 16, seed=4)
    result = nearest_neighbour_ratio(torch.cat([fresh, copies]), train, heldout)
    assert result.copied == 0.25 and result.copied_floor == 0 and result.threshold == 1 / 3
    assert result.closer_to_train > 0.5 and result.heldout_ratio < 1
    assert nearest_neighbour_ratio(fresh, train, torch.cat([heldout, copies])).copied_floor == 10 / 90
    # An exact copy of what is in the training set twice has no ratio, but is a copy.
    assert nearest_neighbour_ratio(train[:3], torch.cat([train, train]), heldout).copied == 1
    assert nearest_neighbour_ratio(copies, train, heldout, threshold=0.001).copied == 0


def test_training_and_heldout_images_are_mirrors():
    fake, train, heldout = (normal(41, 8, seed=seed) for seed in (1, 2, 3))
    fake[0] = train[1] = heldout[2] = 5  # as far from both
    one, other = nearest_neighbour_ratio(fake, train, heldout), nearest_neighbour_ratio(fake, heldout, train)
    assert one.closer_to_train == pytest.approx(1 - other.closer_to_train, abs=1e-12)
    assert one.heldout_ratio == pytest.approx(1 / other.heldout_ratio, rel=1e-12)


def test_images_of_neither_set_are_as_close_to_both():
    """Whatever the sizes: more training images would be closer by their number alone."""
    results = [
        nearest_neighbour_ratio(
            normal(40, 8, seed=3 * s), normal(120, 8, seed=3 * s + 1), normal(30, 8, seed=3 * s + 2)
        )
        for s in range(40)
    ]
    for values, expected in (
        ([result.closer_to_train for result in results], 0.5),
        ([math.log(result.heldout_ratio) for result in results], 0),
    ):
        assert np.mean(values) == pytest.approx(expected, abs=4 * np.std(values) / math.sqrt(len(values)))


def test_what_tells_nothing_of_copies_is_refused():
    fake, train, heldout = (normal(20, 4, seed=seed) for seed in (1, 2, 3))
    with pytest.raises(ValueError, match="`fake` are images of `heldout`"):
        nearest_neighbour_ratio(heldout, train, heldout)
    with pytest.raises(ValueError, match="`train` has 1 image"):
        nearest_neighbour_ratio(fake, train[:1], heldout)
    with pytest.raises(ValueError, match="`heldout` of width 3, `fake` 4"):
        nearest_neighbour_ratio(fake, train, heldout[:, :3])


# -- power spectra ----------------------------------------------------------------------------------------------------


def coloured(count, ratios=(1, 1, 1), seed=0) -> torch.Tensor:
    """Gaussian images `(count, 2, 8, 6)` with power `ratios` in their bands."""
    deviations = torch.tensor(ratios, dtype=torch.float64).sqrt()[octave_bands(8, 6)]
    return idct2(deviations * normal(count, 2, 8, 6, seed=seed))


def test_band_power_is_the_mean_of_squared_coefficients():
    images = normal(5, 2, 8, 6)
    powers, bands = band_power(images), octave_bands(8, 6)
    assert powers.shape == (5, 2, 3) and powers.dtype == torch.float64
    for band in range(3):
        torch.testing.assert_close(powers[..., band], dct2(images)[..., bands == band].square().mean(dim=-1))
    assert torch.equal(torch.cat([band_power(images[:2]), band_power(images[2:])]), powers)
    torch.testing.assert_close(band_power(images.float().numpy()), powers, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(band_power(images + 7, mean=torch.full((2, 8, 6), 7)), powers)
    own = torch.arange(len(images)).view(-1, 1, 1, 1).expand(images.shape).float()
    torch.testing.assert_close(band_power(images + own, mean=own), powers)
    assert band_power(images + 7)[..., 0].min() > 50 * powers[..., 0].max()


def test_the_distance_of_spectra_is_the_ratio_of_powers():
    images = coloured(30)
    mixed = coloured(30, (1.0, 4.0, 0.25))
    result = power_spectrum_distance(band_power(images), band_power(mixed))
    np.testing.assert_allclose(result.log_ratio, [[0, math.log(4), -math.log(4)]] * 2, atol=1e-12)
    assert result.value == pytest.approx(math.log(4) * 2 / 3)
    mirrored = power_spectrum_distance(band_power(mixed), band_power(images))
    assert mirrored.value == pytest.approx(result.value, rel=1e-12)
    assert power_spectrum_distance(band_power(images), band_power(images).flip(0)).value < 1e-12
    # Where a channel and band differ is not lost in the mean of the others.
    louder = images.clone()
    louder[:, 1] *= 3
    result = power_spectrum_distance(band_power(images), band_power(louder))
    np.testing.assert_allclose(result.log_ratio, [[0] * 3, [math.log(9)] * 3], atol=1e-12)


def test_the_floor_is_the_noise_of_halves():
    """Two independent halves: their distance is in the interval as often as it says."""
    distances = []
    for seed in range(40):
        powers = band_power(coloured(120, seed=seed))
        result = power_spectrum_distance(powers[:60], powers[60:], num_halvings=5)
        distances.append(result.value)
    floor = power_spectrum_distance(band_power(coloured(120, seed=99)), powers, num_halvings=400)
    assert floor.floor_low < floor.floor < floor.floor_high
    within = np.mean([floor.floor_low <= distance <= floor.floor_high for distance in distances])
    assert within >= 0.8 and np.mean(distances) == pytest.approx(floor.floor, rel=0.25)
    # Four times as many images halve it.
    more = power_spectrum_distance(band_power(coloured(480, seed=98)), powers)
    assert more.floor == pytest.approx(floor.floor / 2, rel=0.2)
    again = partial(power_spectrum_distance, powers, powers, num_halvings=5)
    assert again(seed=1) == again(seed=1) and again(seed=1) != again(seed=2)


def test_spectra_that_cannot_be_compared_are_refused():
    images = coloured(4)
    powers = band_power(images)
    for wrong in (images[0], images.int(), images[:0]):
        with pytest.raises(ValueError, match="`images` has shape"):
            band_power(wrong)
    with pytest.raises(ValueError, match="`mean` has shape .8, 6."):
        band_power(images, images[0, 0])
    images[2, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="1 of 4 rows, the first is row 2"):
        band_power(images)
    with pytest.raises(ValueError, match="`fake` has 2 channels and 2 bands, `real` 2 and 3"):
        power_spectrum_distance(powers, powers[..., :2])
    with pytest.raises(ValueError, match="`fake` has no power in channel 0, band 1 .of 3."):
        power_spectrum_distance(powers, powers * torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="`real` has 1 image"):
        power_spectrum_distance(powers[:1], powers)
    with pytest.raises(ValueError, match="`real` has shape .4, 2, 8, 6."):
        power_spectrum_distance(coloured(4), powers)
    with pytest.raises(ValueError, match="`num_halvings`"):
        power_spectrum_distance(powers, powers, num_halvings=0)
