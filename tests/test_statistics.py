"""Intervals and p-values with known answers."""

import itertools
import math

import numpy as np
import pytest

from freqgate_dit.statistics import bootstrap, holm, paired_difference, t_quantile


# -- Student's t ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "probability, degrees, expected",
    [
        (0.975, 1, 12.7062047361747),
        (0.975, 2, 4.30265272974946),
        (0.975, 4, 2.77644510519779),
        (0.975, 5, 2.57058183563632),
        (0.95, 5, 2.01504837333302),
        (0.995, 4, 4.60409487135000),
        (0.975, 10, 2.22813885198627),
        (0.975, 30, 2.04227245630124),
        (0.025, 30, -2.04227245630124),
        (0.975, 1000, 1.96233908082641),
    ],
)
def test_t_quantiles_of_tables(probability, degrees, expected):
    assert t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-10)


def test_t_quantiles_of_closed_forms():
    for p in (1e-9, 0.01, 0.3, 0.5000001, 0.6, 0.9, 0.9999):
        assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-6)
        assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-6)
        assert t_quantile(p, 3) == -t_quantile(1 - p, 3)
    assert t_quantile(0.975, 1e6) == pytest.approx(1.959963984540 + 9.489 / 4e6, rel=1e-9)  # z + (z**3 + z) / (4 n)
    assert t_quantile(0.5, 7) == pytest.approx(0, abs=1e-300)


@pytest.mark.parametrize(
    "probability, degrees, name", [(0, 5, "probability"), (1, 5, "probability"), (0.9, 0, "degr")]
)
def test_t_quantiles_out_of_range_are_refused(probability, degrees, name):
    with pytest.raises(ValueError, match=f"`{name}"):
        t_quantile(probability, degrees)


# -- paired differences -----------------------------------------------------------------------------------------------


def test_interval_is_the_textbook_one():
    a, b = [3.0, 5.0, 4.0, 6.0], [1.0, 4.0, 1.0, 4.0]
    result = paired_difference(a, b)
    half = 3.18244630528371 * math.sqrt(2 / 3) / 2  # differences 2, 1, 3, 2
    assert result.mean == 2 and result.num_pairs == 4 and result.exact and result.level == 0.95
    assert (result.low, result.high) == pytest.approx((2 - half, 2 + half), rel=1e-12)
    assert paired_difference(a, b, level=0.5).high < result.high


def test_every_flip_is_counted():
    """Against the enumeration in integers; in tenths, sums that are equal differ by rounding."""
    cases = [[3, -1, 2, 5, 0], [1, 2, -3], [10, 10, -10, 10], *np.random.default_rng(0).integers(-9, 9, (30, 6))]
    for tenths in map(np.array, cases):
        sums = np.array(list(itertools.product((-1, 1), repeat=len(tenths)))) @ tenths
        result = paired_difference(tenths / 10, np.zeros(len(tenths)))
        assert result.p_greater == np.mean(sums >= tenths.sum())
        assert result.p_less == np.mean(sums <= tenths.sum())
        assert result.p_two_sided == np.mean(np.abs(sums) >= abs(tenths.sum()))


def test_the_smallest_p_is_one_flip_in_all():
    """What n seeds can show at most."""
    for n in (2, 5, 6, 20):
        result = paired_difference(np.arange(1.0, n + 1), np.zeros(n))
        assert (result.p_greater, result.p_two_sided, result.p_less) == (2.0**-n, 2.0 ** (1 - n), 1)


def test_swapping_the_recipes_mirrors_the_result():
    a, b = np.random.default_rng(0).normal(size=(2, 7))
    one, other = paired_difference(a, b), paired_difference(b, a)
    assert other.mean == -one.mean and (other.low, other.high) == pytest.approx((-one.high, -one.low), rel=1e-12)
    assert (other.p_less, other.p_greater, other.p_two_sided) == (one.p_greater, one.p_less, one.p_two_sided)


def test_many_pairs_are_flipped_at_random():
    differences = np.random.default_rng(1).normal(0.1, 1, size=21)
    result = paired_difference(differences, np.zeros(21))
    assert not result.exact and result == paired_difference(differences, np.zeros(21))
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    exact = np.mean(np.abs(sums) >= abs(differences.sum()))
    assert 0.02 < exact < 0.5
    assert result.p_two_sided == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 100_000))
    # The observed signs are one of the flips, so p is never 0.
    assert paired_difference(np.ones(40), np.zeros(40), num_flips=999).p_greater == 1 / 1000


def test_the_same_numbers_differ_in_nothing():
    result = paired_difference([1.5, 2.5, 3.5], [1.5, 2.5, 3.5])
    assert (result.mean, result.low, result.high) == (0, 0, 0)
    assert (result.p_two_sided, result.p_less, result.p_greater) == (1, 1, 1)


def test_p_is_uniform_where_there_is_no_difference():
    """Of 300 comparisons of noise with itself, as many are below each level as the level says."""
    noise = np.random.default_rng(0).standard_t(3, size=(300, 8))
    p_values = np.array([paired_difference(row, np.zeros(8)).p_two_sided for row in noise])
    for level in (0.05, 0.25, 0.5):
        assert np.mean(p_values <= level) == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 300))


@pytest.mark.parametrize(
    "a, b, message",
    [
        ([1.0, 2.0], [1.0], "`a` has 2 numbers and `b` 1"),
        ([1.0], [2.0], "from 2 seeds on"),
        ([1.0, math.nan], [1.0, 2.0], "`a`.*finite"),
        ([1.0, 2.0], [[1.0, 2.0]], "`b`.*list"),
    ],
)
def test_numbers_that_do_not_pair_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b)
    with pytest.raises(ValueError, match="`level` .95."):
        paired_difference([1.0, 2.0], [1.0, 2.0], level=95)


# -- several comparisons ----------------------------------------------------------------------------------------------


def test_holm_of_a_known_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert holm([0.6, 0.9]) == (1, 1) and holm([0.02]) == (0.02,) and holm([]) == ()
    with pytest.raises(ValueError, match="p_values"):
        holm([0.5, 1.5])


# -- bootstrap --------------------------------------------------------------------------------------------------------


def test_the_standard_error_of_a_mean_is_the_known_one():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    result = bootstrap(lambda index: values[index].mean(), 400, num_resamples=2000)
    expected = values.std() / math.sqrt(400)
    assert result.estimate == values.mean() and abs(result.bias) < 4 * expected / math.sqrt(2000)
    assert result.standard_error == pytest.approx(expected, rel=0.06)
    assert (result.low, result.high) == pytest.approx(
        (values.mean() - 1.96 * expected, values.mean() + 1.96 * expected), abs=0.2 * expected
    )


def test_an_interval_of_a_biased_metric_holds_the_estimate():
    """The number of distinct images, which no resample reaches: 1 - 1/e of them are left."""
    result = bootstrap(lambda index: len(np.unique(index)), 1000)
    assert result.estimate == 1000 and result.bias == pytest.approx(-1000 / math.e, rel=0.02)
    assert result.low < 1000 < result.high and result.high - result.low < 60


def test_a_fixed_class_mix_has_no_noise_of_its_own():
    """Every class is constant: all of the spread is the mix."""
    strata = ["cat"] * 30 + ["dog"] * 10
    values = np.array([0.0] * 30 + [1.0] * 10)
    fixed = bootstrap(lambda index: values[index].mean(), 40, strata)
    assert (fixed.standard_error, fixed.low, fixed.high) == (0, 0.25, 0.25)
    assert bootstrap(lambda index: values[index].mean(), 40).standard_error == pytest.approx(0.0685, rel=0.2)


def test_a_bootstrap_is_a_function_of_its_seed():
    values = np.random.default_rng(0).normal(size=50)

    def run(seed):
        return bootstrap(lambda index: values[index].mean(), 50, num_resamples=20, seed=seed)

    assert run(1) == run(1) and run(1) != run(2)


def test_what_cannot_be_resampled_is_refused():
    with pytest.raises(ValueError, match="`num_samples` is 1"):
        bootstrap(np.mean, 1)
    with pytest.raises(ValueError, match="`num_samples` is 1 in the class dog"):
        bootstrap(np.mean, 3, ["cat", "cat", "dog"])
    with pytest.raises(ValueError, match="`strata`.*3 samples"):
        bootstrap(np.mean, 3, ["cat", "cat"])
    with pytest.raises(ValueError, match="`metric`"):
        bootstrap(lambda index: math.nan, 3)
    with pytest.raises(ValueError, match="`num_resamples`"):
        bootstrap(np.mean, 3, num_resamples=1)
