"""The tests behind the verdicts, on arrays of one number, or one map, for each prompt.

A claim can be supported or refuted, so it is tested in two directions. Each p is twice the
one-sided p of its direction, at most 1. False verdicts of *both* kinds together then stay at alpha.
The project's calibration report (reports/published/calibration.md) measures how often they occur.

No test of a mean holds for all distributions (Bahadur & Savage 1956, Ann. Math. Stat. 27). These
tests hold for the distributions of that report.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from scipy import stats

from tempo.errors import SpecError
from tempo.inputs import array, checked, number, one_of, several, whole

Direction = Literal["greater", "less", "equivalent"]
# From values [n] to the one-sided p that their centre is above 0, and that it is below.
OneSided = Callable[[np.ndarray], tuple[float, float]]

# p = (b + 1) / (m + 1) if b of m resamples reach the observed value (Phipson & Smyth 2010). The
# smallest two-sided p is then 2e-4, which is fine enough for families of up to 50 claims.
NUM_RESAMPLES = 9999
# Of permutations and bootstrap samples, so that the same data give the same finding.
SEED = 20_261_123
# Nothing is calibrated below ten units. With nine, no family of more than a dozen claims could
# ever be decided.
MIN_UNITS = 10
# Cochran's rule (1977, Sampling Techniques, 2.15). The tails of a mean are near enough to normal if
# n > 25 g1^2, where g1 is the skewness.
COCHRAN = 25
# Relative to the size of a sum. Two resamples that differ by rounding only count as tied.
TIE = 1e-12
CONFIDENCE = 0.95
# What arguments take, see `tempo.inputs`. A spread needs two values.
VALUES = array(1, least=2)
DIRECTION = one_of(*get_args(Direction))
SHARE, CHANCE = number(0, 1), number(0, 1, inside=True)
POSITIVE = number(0, inside=True)
# The lowest efficiency of the Wilcoxon test relative to the t test, over all symmetric
# distributions (Hodges & Lehmann 1956).
LEAST_EFFICIENCY = 0.864
# `num_for_share` gives up at this many units.
LARGEST_NUM = 1_000_000


class Result(NamedTuple):
    """An estimate with its interval and effect size, and the p-values of both directions.

    Attributes:
        estimate: The mean, pseudomedian or share.
        low: The lower end of its 95 % interval.
        high: The upper end of its 95 % interval.
        effect_size: Of a mean, mean / standard deviation (Cohen's dz). Of a pseudomedian, the
            rank-biserial correlation. Of a share, Cohen's h against the margin.
        p: The two-sided p of the direction that was asked for.
        p_against: The two-sided p of the opposite direction.
        note: Why one direction could not be tested, or empty.
        details: What only this test reports, such as the cell of a map.
    """

    estimate: float
    low: float
    high: float
    effect_size: float
    p: float
    p_against: float
    note: str = ""
    details: dict[str, Any] | None = None


@checked(values=VALUES, direction=DIRECTION, margin=number())
def mean_test(values: np.ndarray, direction: Direction, margin: float) -> Result:
    """Test of the mean of `values` [n] against `margin`, with a BCa bootstrap interval.

    Each direction's p is the larger one of two tests. Sign flips are exact at any n if the
    distribution is symmetric. The studentised bootstrap is second-order correct if it is skewed
    (Hall 1988). With too few values the direction against a long tail is not tested, see
    `skew_note`.

    Args:
        values: One number for each prompt, [n].
        direction: `greater` or `less` than the margin, or `equivalent`: within plus or minus it.
        margin: What the mean is compared with, in the unit of the values.

    Example:
        >>> found = mean_test(np.linspace(0.1, 1.9, 20), "greater", margin=0.5)
        >>> round(found.estimate, 6), found.p < 0.05, found.p_against
        (1.0, True, 1.0)
    """
    p, against = _directed(one_sided_mean, values, direction, margin)
    scaled = _scaled(values)
    low, high = bca_interval(values)
    return Result(
        estimate=float(values.mean()),
        low=low,
        high=high,
        effect_size=float(scaled.mean() / scaled.std(ddof=1)),
        p=p,
        p_against=against,
        note=skew_note(values),
    )


@checked(values=VALUES, direction=DIRECTION, margin=number())
def pseudomedian_test(values: np.ndarray, direction: Direction, margin: float) -> Result:
    """Test of the pseudomedian of `values` [n] against `margin`: Wilcoxon's signed-rank test.

    The pseudomedian is the median of the means of all pairs. It describes a typical prompt, and a
    few extreme prompts do not move it. Estimate and interval are those of Hodges and Lehmann.

    Args:
        values: One number for each prompt, [n].
        direction: `greater` or `less` than the margin, or `equivalent`: within plus or minus it.
        margin: What the pseudomedian is compared with, in the unit of the values.

    Example:
        >>> values = np.append(np.linspace(-0.9, 1.1, 19), 1000.0)  # one extreme prompt
        >>> found = pseudomedian_test(values, "less", margin=1.0)
        >>> found.estimate < 0.3, found.p < 0.05
        (True, True)
    """
    p, against = _directed(one_sided_ranks, values, direction, margin)
    edge = margin if direction != "equivalent" else 0.0
    ranks = stats.rankdata(np.abs(values - edge)) * np.sign(values - edge)
    estimate, low, high = hodges_lehmann(values)
    return Result(
        estimate=estimate,
        low=low,
        high=high,
        effect_size=float(ranks.sum() / max(np.abs(ranks).sum(), TIE)),
        p=p,
        p_against=against,
    )


@checked(held=whole(0), n=whole(1), margin=SHARE)
def share_test(held: int, n: int, margin: float) -> Result:
    """Exact binomial test of the share `held` / `n` against `margin`.

    The interval is that of Clopper and Pearson.

    Args:
        held: For how many prompts the statement was true.
        n: The number of prompts.
        margin: The share that is compared with, from 0 to 1.

    Example:
        >>> found = share_test(9, 10, margin=0.5)
        >>> found.estimate, round(found.p, 4), found.p_against  # 2 * (10 + 1) / 2**10
        (0.9, 0.0215, 1.0)
    """
    if held > n:
        raise SpecError(f"share_test: held is {held}, n is {n}; expected at most n to hold")
    interval = stats.binomtest(held, n).proportion_ci(CONFIDENCE, "exact")
    above = float(stats.binomtest(held, n, margin, "greater").pvalue)
    below = float(stats.binomtest(held, n, margin, "less").pvalue)
    return Result(
        estimate=held / n,
        low=float(interval.low),
        high=float(interval.high),
        effect_size=2 * (math.asin(math.sqrt(held / n)) - math.asin(math.sqrt(margin))),
        p=min(1.0, 2 * above),
        p_against=min(1.0, 2 * below),
    )


@checked(maps=array(least=2), margin=number())
def map_test(maps: np.ndarray, margin: float) -> Result:
    """Test whether the mean exceeds `margin` in any cell of `maps` [n, ...]: max-T over the cells.

    The estimate is the mean in the cell with the largest t, with a simultaneous 95 % interval.
    `p` is corrected for the search over all cells. `p_against` says that the mean of *every* cell
    is below the margin (an intersection-union test). As for one mean, both are the larger p of
    sign flips and studentised bootstrap. Sign flips alone give false verdicts on skewed cells
    nearly always.

    `details` hold the cell's index, the number of cells, and the number of significant ones.

    Source: Westfall & Young 1993, Resampling-Based Multiple Testing.

    Args:
        maps: One map for each prompt, such as layers by heads: [n, ...].
        margin: What the means are compared with, in the unit of the maps.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> maps = rng.normal(0, 1, (40, 3, 4))  # 40 prompts, 3 layers, 4 heads
        >>> maps[:, 1, 2] += 2.0
        >>> found = map_test(maps, margin=0.5)
        >>> found.p < 0.05, found.details
        (True, {'cell': [1, 2], 'cells': 12, 'significant': 1})
    """
    n = len(maps)
    cells = maps.reshape(n, -1).astype(np.float64) - margin
    varied = np.ptp(cells, axis=0) > TIE * np.abs(cells).max(axis=0)
    if not varied.any():
        flat = float(cells.mean()) + margin
        return Result(flat, flat, flat, math.nan, 1.0, 1.0, "no cell has any spread")
    scale = _largest(cells[:, varied])
    centred = cells[:, varied] / scale  # [n, C], 0 is the margin
    t = _t(centred.mean(axis=0), (centred**2).mean(axis=0), n)
    flipped, booted = _resampled_ts(centred)

    # above the margin somewhere: compare each cell with the largest t of each resample
    corrected = np.max([_tail(null.max(axis=1)[:, None], t) for null in (flipped, booted)], axis=0)
    p = min(1.0, 2 * float(corrected.min()))
    # below the margin everywhere: the least convincing cell decides
    below = np.max([_tail(-null, -t) for null in (flipped, booted)], axis=0)
    unvaried_below = bool((cells[:, ~varied] < 0).all())
    against = min(1.0, 2 * float(below.max())) if unvaried_below else 1.0

    best = int(t.argmax())
    cell = np.unravel_index(np.flatnonzero(varied)[best], maps.shape[1:])
    sd = float(centred[:, best].std(ddof=1))
    estimate = float(centred[:, best].mean()) * scale + margin
    half = _simultaneous_half_width(booted, sd, n) * scale
    return Result(
        estimate=estimate,
        low=estimate - half,
        high=estimate + half,
        effect_size=estimate / scale / sd,
        p=p,
        p_against=against,
        details={
            "cell": [int(index) for index in cell],
            "cells": cells.shape[1],
            "significant": int((2 * corrected < 1 - CONFIDENCE).sum()),
        },
    )


def _resampled_ts(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each cell's t under no effect, by sign flips and by bootstrap: [NUM_RESAMPLES, C] each."""
    n = len(centred)
    rng = np.random.default_rng(SEED)
    signs = rng.choice([-1.0, 1.0], size=(NUM_RESAMPLES, n))
    flipped = _t(signs @ centred / n, (centred**2).mean(axis=0), n)
    residuals = centred - centred.mean(axis=0)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES)
    booted = _t(counts @ residuals / n, counts @ residuals**2 / n, n)
    return flipped, booted


def _simultaneous_half_width(booted: np.ndarray, sd: float, n: int) -> float:
    """Half the width of an interval that covers all cells at once, NaN if it is unbounded."""
    widest = np.nan_to_num(np.abs(booted), nan=np.inf, posinf=np.inf).max(axis=1)
    half = float(np.quantile(widest, CONFIDENCE, method="higher")) * sd / math.sqrt(n)
    return half if math.isfinite(half) else math.nan


def one_sided_mean(values: np.ndarray) -> tuple[float, float]:
    """One-sided p that the mean of `values` [n] is above 0, and that it is below.

    p is 1 for a direction that cannot be tested on data this skewed.

    Example:
        >>> skewed = np.array([0.0] * 9 + [1.0])  # the mean is 0.1, and the long tail is above it
        >>> one_sided_mean(skewed - 0.5)[1]  # ten such values cannot show that it is below 0.5
        1.0
    """
    scaled = _scaled(values)
    flips, bootstrap = sign_flip(scaled), bootstrap_t(scaled)
    above, below = max(flips[0], bootstrap[0]), max(flips[1], bootstrap[1])
    if skew_note(values):
        return (above, 1.0) if _skewness(values) > 0 else (1.0, below)
    return above, below


def sign_flip(values: np.ndarray) -> tuple[float, float]:
    """One-sided p that the mean of `values` [n] is above 0, and that it is below, by sign flips.

    Few values are flipped in all ways, so that p is exact. Otherwise NUM_RESAMPLES are drawn.

    Example:
        >>> sign_flip(np.array([1.0, 2.0, 3.0]))  # the largest sum of all 2**3 sign patterns
        (0.125, 1.0)
    """
    found = stats.permutation_test(
        (values,),
        lambda sample, axis: sample.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        alternative="greater",
        rng=np.random.default_rng(SEED),
    )
    null, observed = found.null_distribution, found.statistic
    # the set of all sign patterns already includes the observed one
    added = 0 if len(null) == 2 ** len(values) else 1
    slack = TIE * float(np.abs(values).mean())
    num_above = (null >= observed - slack).sum()
    num_below = (null <= observed + slack).sum()
    total = len(null) + added
    return float(num_above + added) / total, float(num_below + added) / total


def bootstrap_t(values: np.ndarray) -> tuple[float, float]:
    """One-sided p that the mean of `values` [n] is above 0, and below, by studentised bootstrap.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, 16.4.

    Example:
        >>> above, below = bootstrap_t(np.linspace(0.1, 1.9, 20))
        >>> above < 0.001, below > 0.999
        (True, True)
    """
    n, residuals = len(values), values - values.mean()
    drawn = residuals[np.random.default_rng(SEED).integers(n, size=(NUM_RESAMPLES, n))]
    null = _t(drawn.mean(axis=1), (drawn**2).mean(axis=1), n)
    t = _t(values.mean(), (values**2).mean(), n)
    return float(_tail(null, t)), float(_tail(-null, -t))


def one_sided_ranks(values: np.ndarray) -> tuple[float, float]:
    """One-sided p that the pseudomedian of `values` [n] is above 0, and that it is below.

    The statistic of Wilcoxon's signed ranks is the number of pairs whose mean is beyond 0 (Tukey
    1949). Counted like this it is about the pseudomedian even if values are tied. Means of exactly
    0 count against the claim.

    Its distribution is exact if the data are symmetric. Skewed data vary more than that: an
    exponential gave 5.7 % instead of 5 %. The statistic is therefore also compared with its own
    spread, and the larger p counts.

    Example:
        >>> one_sided_ranks(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))[0]  # one of 2**5 sign patterns
        0.03125
    """
    n = len(values)
    pairs, chances = _pair_means(values), _signed_rank_chances(n)
    slack = TIE * float(np.abs(values).max())
    num_above, num_below = int((pairs > slack).sum()), int((pairs < -slack).sum())
    exact_above = min(1.0, float(chances[num_above:].sum()))
    exact_below = min(1.0, float(chances[num_below:].sum()))
    signs = np.sign(values[:, None] + values).mean(axis=1)
    with np.errstate(divide="ignore"):
        t = signs.mean() / (2 * signs.std(ddof=1) / math.sqrt(n)) if signs.any() else 0.0
    spread_above, spread_below = float(stats.t.sf(t, n - 1)), float(stats.t.cdf(t, n - 1))
    return max(exact_above, spread_above), max(exact_below, spread_below)


def bca_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % BCa bootstrap interval of the mean of `values` [n], NaN if there is none.

    Example:
        >>> low, high = bca_interval(np.linspace(0.1, 1.9, 20))
        >>> low < 1.0 < high
        True
    """
    with warnings.catch_warnings():
        # of degenerate data, which the NaN reports
        warnings.simplefilter("ignore")
        found = stats.bootstrap(
            (_scaled(values),),
            np.mean,
            n_resamples=NUM_RESAMPLES,
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=np.random.default_rng(SEED),
        )
    interval, scale = found.confidence_interval, _largest(values)
    return float(interval.low) * scale, float(interval.high) * scale


def hodges_lehmann(values: np.ndarray) -> tuple[float, float, float]:
    """The pseudomedian of `values` [n], n >= 6, and its exact 95 % interval.

    Example:
        >>> hodges_lehmann(np.arange(1.0, 11.0))
        (5.5, 3.0, 8.0)
    """
    pairs = _pair_means(values)
    cumulative = np.cumsum(_signed_rank_chances(len(values)))
    cut = int((cumulative < (1 - CONFIDENCE) / 2).sum())
    return float(np.median(pairs)), float(pairs[cut - 1]), float(pairs[len(pairs) - cut])


def skew_note(values: np.ndarray) -> str:
    """Why `values` [n] cannot show a mean on the far side of their long tail, or an empty string.

    Example:
        >>> skew_note(np.array([0.0] * 9 + [1.0])).split(" (")[0]
        'too few for data this skewed to show that the mean is below anything'
    """
    n, skewness = len(values), _skewness(values)
    if n > COCHRAN * skewness**2:
        return ""
    side = "below" if skewness > 0 else "above"
    needed = math.floor(COCHRAN * skewness**2) + 1
    return (
        f"too few for data this skewed to show that the mean is {side} anything "
        f"(skewness {skewness:.2g} asks for {needed})"
    )


@checked(ps=several(SHARE, "p-values"), size=whole(0))
def holm(ps: Sequence[float], size: int) -> list[float]:
    """p-values corrected by Holm (1979) for a family of `size` claims, in the order given.

    Members of the family that have no p here count as the least significant ones.

    Args:
        ps: The p-values of those members that have one.
        size: How many claims the family has.

    Example:
        >>> holm([0.01, 0.25], size=4)  # 4 * 0.01 and 3 * 0.25
        [0.04, 0.75]
    """
    corrected, running = [0.0] * len(ps), 0.0
    by_size = sorted(range(len(ps)), key=lambda i: ps[i])
    for rank, i in enumerate(by_size):
        running = max(running, min(1.0, ps[i] * (max(size, len(ps)) - rank)))
        corrected[i] = running
    return corrected


@checked(distance=number(other=0), sd=POSITIVE, alpha=CHANCE, power=CHANCE)
def num_for_mean(distance: float, sd: float, alpha: float, power: float) -> int:
    """How many units a two-sided test of a mean needs for this power (Guenther 1981).

    Args:
        distance: How far the true mean is from the margin.
        sd: The standard deviation of the values, in the same unit as `distance`.
        alpha: The two-sided level of the test.
        power: The chance to find the mean on the right side of the margin.

    Example:
        >>> num_for_mean(0.5, sd=1.0, alpha=0.05, power=0.8)
        34
    """
    z = float(stats.norm.ppf(1 - alpha / 2))
    needed = ((z + float(stats.norm.ppf(power))) * sd / distance) ** 2 + z**2 / 2
    return max(MIN_UNITS, math.ceil(needed))


@checked(planned=SHARE, margin=SHARE, alpha=CHANCE, power=CHANCE)
def num_for_share(planned: float, margin: float, alpha: float, power: float) -> int:
    """How many units the exact binomial test needs to tell two shares apart with this power.

    Args:
        planned: The share that is expected to be true.
        margin: The share that it is tested against.
        alpha: The two-sided level of the test.
        power: The chance to find the share on the right side of the margin.

    Example:
        >>> num_for_share(planned=1.0, margin=0.5, alpha=0.05, power=0.9)
        10
    """
    if planned == margin:
        raise SpecError(f"num_for_share: both shares are {margin:g}; expected two that differ")
    n = MIN_UNITS
    while n < LARGEST_NUM:
        if planned > margin:
            # the smallest significant count
            least = stats.binom.isf(alpha / 2, n, margin) + 1
            reached = stats.binom.sf(least - 1, n, planned)
        else:
            # the largest significant count
            most = stats.binom.ppf(alpha / 2, n, margin)
            most -= stats.binom.cdf(most, n, margin) >= alpha / 2
            reached = stats.binom.cdf(most, n, planned)
        if reached >= power:
            return n
        n += 1 if n < 1000 else n // 100
    return LARGEST_NUM


def _directed(
    one_sided: OneSided, values: np.ndarray, direction: Direction, margin: float
) -> tuple[float, float]:
    """Two-sided p for a direction and against it, from a test against 0 in both directions."""
    above, below = one_sided(values - margin)
    if direction == "greater":
        p, against = above, below
    elif direction == "less":
        p, against = below, above
    else:
        # Two one-sided tests (Schuirmann 1987). The opposite is to lie beyond either edge.
        above_low, below_low = one_sided(values + margin)
        p, against = max(above_low, below), min(above, below_low)
    return min(1.0, 2 * p), min(1.0, 2 * against)


def _pair_means(values: np.ndarray) -> np.ndarray:
    """The means of all n (n + 1) / 2 pairs of `values` [n], in rising order.

    Each value is paired with itself too.
    """
    means = (values[:, None] + values) / 2
    return np.sort(means[np.triu_indices(len(values))])


@cache
def _signed_rank_chances(n: int) -> np.ndarray:
    """The null distribution of the signed-rank statistic, [n (n + 1) / 2 + 1].

    A fair coin picks each of the ranks 1 to n or not. Entry s is the chance that they sum to s.
    """
    chances = np.zeros(n * (n + 1) // 2 + 1)
    chances[0] = 1.0
    for rank in range(1, n + 1):
        chances = (chances + np.concatenate([np.zeros(rank), chances[:-rank]])) / 2
    return chances


def _t(means: Any, squares: Any, n: int) -> Any:
    """Student's t from means and mean squares.

    It is infinite if there is no spread, and NaN if the mean is 0 as well.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        variance = squares - means**2
        variance = np.where(variance > TIE * squares, variance, 0.0)
        return means / np.sqrt(variance / (n - 1))


def _tail(null: Any, observed: Any) -> Any:
    """(b + 1) / (m + 1), where b counts those of `null` [m, ...] that reach `observed` [...].

    NaN counts as reached, so that it never makes a result more significant.
    """
    slack = TIE * np.abs(np.nan_to_num(observed, posinf=0.0, neginf=0.0))
    return ((~(null < observed - slack)).sum(axis=0) + 1) / (len(null) + 1)


def _largest(values: np.ndarray) -> float:
    """The largest absolute value, never 0. Division by it keeps squares from over- or underflow."""
    return max(float(np.abs(values).max()), float(np.finfo(np.float64).tiny))


def _scaled(values: np.ndarray) -> np.ndarray:
    return values / _largest(values)


def _skewness(values: np.ndarray) -> float:
    scaled = _scaled(values)
    scaled = _scaled(scaled - scaled.mean())
    return float((scaled**3).mean() / max(float((scaled**2).mean()) ** 1.5, TIE))
