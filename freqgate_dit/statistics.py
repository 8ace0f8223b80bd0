"""How sure a number is. Two kinds of noise, and what measures which:

- **Sampling noise**: other images drawn from the same model give another number. `bootstrap` estimates it from the
  images of one evaluation.
- **Training noise**: the same recipe trained from another seed gives another model. Only several trained models show
  it: `paired_difference` takes one number per seed. A bootstrap interval, however narrow, says nothing about it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


EXACT_UP_TO = 20  # differences: 2**20 sign flips are summed in a tenth of a second


@dataclass(frozen=True)
class Bootstrap:
    """Sampling noise of a metric, in the metric's own unit.

    Args:
        estimate: the metric of the samples as they are.
        standard_error: standard deviation of the metric over resamples.
        low, high: interval in which the metric of as many other samples of the same model is expected: the quantiles
            of the resamples, moved so that their mean is the estimate.
        bias: mean over resamples minus the estimate. A resample repeats images, which a Frechet distance takes for
            less variety: its resamples are too high by about as much as the estimate itself is too high for its
            number of samples. That is why the interval is moved.
        level: of the interval.
        num_resamples: number of resamples.
    """

    estimate: float
    standard_error: float
    low: float
    high: float
    bias: float
    level: float
    num_resamples: int


@dataclass(frozen=True)
class PairedDifference:
    """Difference of two recipes over seeds, in the unit of the numbers.

    Args:
        mean: of `a - b`.
        low, high: t-interval of the mean.
        level: of the interval.
        p_two_sided: probability, if the two recipes were the same, of a mean at least as far from 0.
        p_less, p_greater: the same for a mean at most, or at least, as large (one-sided, for a direction that was
            chosen before looking).
        num_pairs: number of seeds.
        exact: whether all sign flips were counted, or a random selection.
    """

    mean: float
    low: float
    high: float
    level: float
    p_two_sided: float
    p_less: float
    p_greater: float
    num_pairs: int
    exact: bool


# -- sampling noise ---------------------------------------------------------------------------------------------------


def bootstrap(
    metric: Callable[[np.ndarray], float],
    num_samples: int,
    strata: Sequence | None = None,
    num_resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Bootstrap:
    """Sampling noise of `metric`, by resampling generated images with replacement (Efron 1979). Never training noise.

    For the difference of two models that were sampled from the same noise, let `metric` compute the difference: the
    same indices then go to both.

    Args:
        metric: from indices `(num_samples,)` int64, with repeats, to the number: for example
            `lambda i: frechet_distance(reference, FeatureStatistics.of(features[i]))`.
        num_samples: number of generated images, at least 2.
        strata: `(num_samples,)` class of every image. Where the class mix was fixed, it is in every resample too;
            without `strata` the interval would count a noise that is not there. With m images per class the standard
            error comes out too small by a factor of about sqrt(1 - 1/m).
        num_resamples: 200 are enough for a standard error; 2000 for the ends of an interval.
        level: of the interval.
        seed: of the resampling.

    Raises:
        ValueError: if there are too few samples (in a class), or the metric gives NaN or infinity.
    """
    _check_level(level)
    if num_resamples < 2:
        raise ValueError(f"`num_resamples` ({num_resamples}) must be at least 2; 200 is usual.")
    strata = np.zeros(num_samples) if strata is None else np.asarray(strata)
    if strata.shape != (num_samples,):
        raise ValueError(f"`strata` has shape {strata.shape}: give one class for each of {num_samples} samples.")
    names, sizes = np.unique(strata, return_counts=True)
    if num_samples < 2 or sizes.min() < 2:
        where = f" in the class {names[sizes.argmin()]}" if len(names) > 1 else ""
        raise ValueError(f"`num_samples` is {min([*sizes, num_samples])}{where}: noise shows from 2 samples on.")
    groups = [np.flatnonzero(strata == name) for name in names]
    generator = np.random.default_rng(seed)
    estimate = float(metric(np.arange(num_samples)))
    values = np.array(
        [
            metric(np.concatenate([generator.choice(group, group.size) for group in groups]))
            for _ in range(num_resamples)
        ],
        dtype=float,
    )
    if not np.isfinite([estimate, *values]).all():
        raise ValueError("`metric` gave NaN or infinity for some resample: bootstrap a metric that is always finite.")
    bias = float(values.mean() - estimate)
    low, high = np.quantile(values - bias, [(1 - level) / 2, (1 + level) / 2])
    return Bootstrap(estimate, float(values.std(ddof=1)), float(low), float(high), bias, level, num_resamples)


# -- training noise ---------------------------------------------------------------------------------------------------


def paired_difference(
    a: Sequence[float], b: Sequence[float], level: float = 0.95, num_flips: int = 100_000, seed: int = 0
) -> PairedDifference:
    """Compare two recipes by one number per training seed each, `a[i]` and `b[i]` from the same seed.

    The interval assumes normal differences. The p-values do not: if the recipes are the same, every difference is as
    likely to have the other sign, so the observed mean is placed among those of all 2**n sign flips (Fisher 1935,
    section 21). With n pairs p is at least 2**-n, and 2**(1 - n) two-sided: under 0.05 from 5 and 6 pairs on.

    Args:
        a, b: `(n,)` numbers, at least 2.
        level: of the interval.
        num_flips: random sign flips where there are more than 20 pairs, too many to count all; p is then
            (1 + hits) / (1 + num_flips) (Phipson and Smyth 2010).
        seed: of the random sign flips.

    Raises:
        ValueError: if `a` and `b` are not equally long, have fewer than 2 numbers, or one that is not finite.
    """
    _check_level(level)
    a, b = _numbers("a", a), _numbers("b", b)
    if len(a) != len(b):
        raise ValueError(f"`a` has {len(a)} numbers and `b` {len(b)}: give both for the same seeds, in one order.")
    if len(a) < 2:
        raise ValueError(f"`a` has {len(a)} number(s): training noise shows from 2 seeds on.")
    differences = a - b
    mean, n = float(differences.mean()), len(differences)
    half = t_quantile((1 + level) / 2, n - 1) * float(differences.std(ddof=1)) / math.sqrt(n)
    exact = n <= EXACT_UP_TO
    sums = _all_flips(differences) if exact else _random_flips(differences, num_flips, seed)
    # Sums of the same numbers in another order differ in the last bits.
    slack = 1e-12 * np.abs(differences).sum()
    observed = differences.sum()

    def p_value(hits: np.ndarray) -> float:
        return float(hits.mean() if exact else (1 + hits.sum()) / (1 + len(hits)))

    return PairedDifference(
        mean,
        mean - half,
        mean + half,
        level,
        p_value(np.abs(sums) >= abs(observed) - slack),
        p_value(sums <= observed + slack),
        p_value(sums >= observed - slack),
        n,
        exact,
    )


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjust p-values for making several comparisons (Holm 1979), in the order given.

    Rejecting where the result is at most alpha errs in any of them with a probability of at most alpha.

    Raises:
        ValueError: if one is not in [0, 1].
    """
    p_values = _numbers("p_values", p_values)
    if ((p_values < 0) | (p_values > 1)).any():
        raise ValueError(f"`p_values` ({p_values.tolist()}) must lie between 0 and 1.")
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1)).clip(max=1)
    return tuple(adjusted.tolist())


def t_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t distribution: `t_quantile(0.975, 5)` is 2.5706.

    Args:
        probability: between 0 and 1, exclusive.
        degrees: of freedom, at least 1.

    Raises:
        ValueError: if one is out of its range.
    """
    if not 0 < probability < 1:
        raise ValueError(f"`probability` ({probability}) must lie between 0 and 1, exclusive.")
    if not 1 <= degrees < math.inf:
        raise ValueError(f"`degrees` ({degrees}) must be at least 1, and finite.")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while _upper_tail(high, degrees) > 1 - probability:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        if _upper_tail(middle, degrees) > 1 - probability:
            low = middle
        else:
            high = middle
    return middle


# -- parts ------------------------------------------------------------------------------------------------------------


def _check_level(level: float):
    if not 0 < level < 1:
        raise ValueError(f"`level` ({level}) must lie between 0 and 1, exclusive; 0.95 is usual.")


def _numbers(name: str, values: Sequence[float]) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"`{name}` ({values.tolist()}) must be a list of finite numbers.")
    return values


def _all_flips(differences: np.ndarray) -> np.ndarray:
    """Sums `(2**n,)` of the differences with every combination of signs."""
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    return sums


def _random_flips(differences: np.ndarray, num_flips: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    sums = np.zeros(num_flips)
    for difference in differences:
        sums += difference * (2.0 * generator.integers(2, size=num_flips) - 1)
    return sums


def _upper_tail(t: float, degrees: float) -> float:
    """P(T > t) of Student's t, t >= 0: half the incomplete beta function of degrees / (degrees + t**2)."""
    total = degrees + t * t
    return _incomplete_beta(degrees / total, t * t / total, degrees / 2, 0.5) / 2


def _incomplete_beta(x: float, complement: float, a: float, b: float) -> float:
    """Regularised incomplete beta function I_x(a, b); `complement` is 1 - x, which x near 1 would round away.

    By the continued fraction of Numerical Recipes, section 6.4, on the side where it converges fast.
    """
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(complement, x, b, a)
    if x == 0:
        return 0.0
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = math.exp(a * math.log(x) + b * math.log(complement) - log_beta) / a
    # Lentz's method; x is at most about the mean of the distribution, where no denominator comes near 0.
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, 10_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + numerator * d)
            c = 1 + numerator / c
            fraction *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return front * fraction
