"""The tests behind the verdicts, on plain arrays of one number (or one map) for each prompt.

Every p is two-sided: twice the smaller chance of the data, at most 1, so that false verdicts of *either* direction together
stay at alpha. How often they do is measured in reports/published/calibration.md. No test of a mean holds for all
distributions (Bahadur & Savage 1956, Ann. Math. Stat. 27); these hold for the ones in that table.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

Direction = Literal["greater", "less", "equivalent"]

# p = (b + 1) / (m + 1) (Phipson & Smyth 2010): the smallest two-sided p is 2e-4, fine enough for families of up to 50.
NUM_RESAMPLES = 9999
SEED = 20_261_123  # of permutation and bootstrap only; the same data give the same finding
# Nothing is calibrated below ten units, and with nine no family of more than a dozen claims could ever be decided.
MIN_UNITS = 10
# Cochran's rule (1977, Sampling Techniques, 2.15): n > 25 g1^2 for a mean's tails to be near enough to normal.
COCHRAN = 25
# Of a sum's size: two resamples whose values are equal but for rounding count as tied.
TIE = 1e-12
CONFIDENCE = 0.95
# Of the Wilcoxon test against the t test, at worst over all symmetric distributions (Hodges & Lehmann 1956).
LEAST_EFFICIENCY = 0.864
LARGEST_NUM = 1_000_000  # of units that `num_for_share` tries


class Result(NamedTuple):
    """An estimate with its 95 % interval and effect size, the two-sided p for what was asked and for its opposite.

    effect_size: mean / standard deviation (Cohen's dz) of a mean, rank-biserial correlation of a pseudomedian, Cohen's h
        against the margin of a share.
    note: why a direction could not be tested, if so. details: what is peculiar to the test.
    """

    estimate: float
    low: float
    high: float
    effect_size: float
    p: float
    p_against: float
    note: str = ""
    details: dict[str, Any] | None = None


def mean(values: np.ndarray, direction: Direction, margin: float) -> Result:
    """The mean of `values` [n] against `margin`: sign flips and studentised bootstrap, with a BCa interval.

    Each direction's p is the larger of two: sign flips are exact where the distribution is symmetric, at any n, and the
    bootstrap is second-order right where it is skewed (Hall 1988). A direction against the long tail is not tested at all
    where the tail is too long for so few values (`skew_note`).
    """
    p, against = _directed(one_sided_mean, values, direction, margin)
    scaled = _scaled(values)
    effect = float(scaled.mean() / scaled.std(ddof=1))
    return Result(
        float(values.mean()), *bca_interval(values), effect, p, against, skew_note(values)
    )


def pseudomedian(values: np.ndarray, direction: Direction, margin: float) -> Result:
    """The pseudomedian of `values` [n], the median of all pairs' means, against `margin`: Wilcoxon's signed-rank test.

    Estimate and interval are Hodges and Lehmann's. It says what is so for a typical prompt, whatever a few extreme ones do.
    """
    p, against = _directed(one_sided_ranks, values, direction, margin)
    edge = margin if direction != "equivalent" else 0.0
    ranks = stats.rankdata(np.abs(values - edge)) * np.sign(values - edge)
    effect = float(ranks.sum() / max(np.abs(ranks).sum(), TIE))
    return Result(*hodges_lehmann(values), effect, p, against)


def share(held: int, n: int, margin: float) -> Result:
    """The share `held` / `n` against `margin`: exact binomial tests and Clopper and Pearson's interval."""
    interval = stats.binomtest(held, n).proportion_ci(CONFIDENCE, "exact")
    above, below = (
        float(stats.binomtest(held, n, margin, side).pvalue) for side in ("greater", "less")
    )
    effect = 2 * (math.asin(math.sqrt(held / n)) - math.asin(math.sqrt(margin)))
    return Result(
        held / n,
        float(interval.low),
        float(interval.high),
        effect,
        min(1.0, 2 * above),
        min(1.0, 2 * below),
    )


def somewhere(maps: np.ndarray, margin: float) -> Result:
    """Whether the mean exceeds `margin` in any cell of `maps` [n, ...]: max-T over cells (Westfall & Young 1993).

    Estimate: the mean in the cell with the largest t, with a simultaneous 95 % interval. `p` is corrected for all cells;
    `p_against`: that every cell's mean is below the margin (intersection-union). Both are the larger of sign flips and
    studentised bootstrap, as for one mean: sign flips alone give skewed cells false verdicts nearly always.
    """
    n = len(maps)
    cells = maps.reshape(n, -1).astype(np.float64) - margin
    varied = np.ptp(cells, axis=0) > TIE * np.abs(cells).max(axis=0)
    if not varied.any():
        flat = float(cells.mean()) + margin
        return Result(flat, flat, flat, math.nan, 1.0, 1.0, "no cell has any spread")
    scale = _largest(cells[:, varied])
    centred = cells[:, varied] / scale
    t = _t(centred.mean(axis=0), (centred**2).mean(axis=0), n)
    rng = np.random.default_rng(SEED)
    signs = rng.choice([-1.0, 1.0], size=(NUM_RESAMPLES, n))
    flipped = _t(signs @ centred / n, (centred**2).mean(axis=0), n)
    residuals = centred - centred.mean(axis=0)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES)
    booted = _t(counts @ residuals / n, counts @ residuals**2 / n, n)
    corrected = np.max([_tail(null.max(axis=1)[:, None], t) for null in (flipped, booted)], axis=0)
    below = np.max([_tail(-null, -t) for null in (flipped, booted)], axis=0)
    unvaried_below = bool((cells[:, ~varied] < 0).all())
    best = int(t.argmax())
    at = np.unravel_index(np.flatnonzero(varied)[best], maps.shape[1:])
    widest = np.nan_to_num(np.abs(booted), nan=np.inf, posinf=np.inf).max(axis=1)
    half = (
        float(np.quantile(widest, CONFIDENCE, method="higher"))
        * float(centred[:, best].std(ddof=1))
        / math.sqrt(n)
    )
    half = half * scale if math.isfinite(half) else math.nan
    estimate = float(centred[:, best].mean()) * scale + margin
    details = {
        "cell": [int(i) for i in at],
        "cells": cells.shape[1],
        "significant": int((2 * corrected < 1 - CONFIDENCE).sum()),
    }
    p = min(1.0, 2 * float(corrected.min()))
    against = min(1.0, 2 * float(below.max())) if unvaried_below else 1.0
    effect = estimate / scale / float(centred[:, best].std(ddof=1))
    return Result(estimate, estimate - half, estimate + half, effect, p, against, details=details)


def one_sided_mean(values: np.ndarray) -> tuple[float, float]:
    """One-sided p that the mean of `values` [n] exceeds 0, and that it is below; 1 where it cannot be tested."""
    scaled = _scaled(values)
    greater, less = (max(pair) for pair in zip(sign_flip(scaled), bootstrap_t(scaled), strict=True))
    if skew_note(values):
        return (greater, 1.0) if _skewness(values) > 0 else (1.0, less)
    return greater, less


def sign_flip(values: np.ndarray) -> tuple[float, float]:
    """One-sided p of the mean of `values` [n] above and below 0 by sign flips; exact for few units."""
    rng = np.random.default_rng(SEED)
    found = stats.permutation_test(
        (values,), lambda sample, axis: sample.mean(axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=NUM_RESAMPLES, alternative="greater", rng=rng,
    )  # fmt: skip
    null, observed = found.null_distribution, found.statistic
    added = 0 if len(null) == 2 ** len(values) else 1  # all sign patterns include the one observed
    slack = TIE * float(np.abs(values).mean())
    tails = (null >= observed - slack).sum(), (null <= observed + slack).sum()
    greater, less = (float(tail + added) / (len(null) + added) for tail in tails)
    return greater, less


def bootstrap_t(values: np.ndarray) -> tuple[float, float]:
    """One-sided p of the mean of `values` [n] above and below 0 by the studentised bootstrap (Efron & Tibshirani 1993, 16.4)."""
    n, residuals = len(values), values - values.mean()
    drawn = residuals[np.random.default_rng(SEED).integers(n, size=(NUM_RESAMPLES, n))]
    null = _t(drawn.mean(axis=1), (drawn**2).mean(axis=1), n)
    t = _t(values.mean(), (values**2).mean(), n)
    return float(_tail(null, t)), float(_tail(-null, -t))


def one_sided_ranks(values: np.ndarray) -> tuple[float, float]:
    """One-sided p that the pseudomedian of `values` [n] exceeds 0, and that it is below: Wilcoxon's signed ranks.

    The statistic is the number of pairs' means beyond 0 (Tukey 1949), which also for tied data is about the pseudomedian;
    means of exactly 0 count against. Its distribution is exact where the data are symmetric. Skewed data vary more than that
    (5.7 % instead of 5 % for an exponential), so the larger p counts of that and of the statistic over its own spread.
    """
    pairs, chances = _pair_means(values), _signed_rank_chances(len(values))
    slack = TIE * float(np.abs(values).max())
    counts = int((pairs > slack).sum()), int((pairs < -slack).sum())
    exact = [min(1.0, float(chances[count:].sum())) for count in counts]
    signs = np.sign(values[:, None] + values).mean(axis=1)
    with np.errstate(divide="ignore"):
        t = signs.mean() / (2 * signs.std(ddof=1) / math.sqrt(len(values))) if signs.any() else 0.0
    return max(exact[0], float(stats.t.sf(t, len(values) - 1))), max(
        exact[1], float(stats.t.cdf(t, len(values) - 1))
    )


def bca_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % BCa bootstrap interval of the mean over units (NaN where the bootstrap cannot say)."""
    rng = np.random.default_rng(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of degenerate data: the NaN says it
        found = stats.bootstrap(
            (_scaled(values),),
            np.mean,
            n_resamples=NUM_RESAMPLES,
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=rng,
        )
    scale = _largest(values)
    return float(found.confidence_interval.low) * scale, float(
        found.confidence_interval.high
    ) * scale


def hodges_lehmann(values: np.ndarray) -> tuple[float, float, float]:
    """The median of all pairs' means of `values` [n], n >= 6, and its exact 95 % interval."""
    pairs = _pair_means(values)
    cut = int((np.cumsum(_signed_rank_chances(len(values))) < (1 - CONFIDENCE) / 2).sum())
    return float(np.median(pairs)), float(pairs[cut - 1]), float(pairs[len(pairs) - cut])


def skew_note(values: np.ndarray) -> str:
    """Why the direction against the long tail of `values` [n] cannot be tested; empty if it can."""
    n, skewness = len(values), _skewness(values)
    if n > COCHRAN * skewness**2:
        return ""
    side = "below" if skewness > 0 else "above"
    needed = math.floor(COCHRAN * skewness**2) + 1
    return f"too few for data this skewed to show that the mean is {side} anything (skewness {skewness:.2g} asks for {needed})"


def holm(ps: Sequence[float], size: int) -> list[float]:
    """p-values corrected by Holm (1979) for a family of `size`; members without a p here count as the least significant."""
    corrected, running = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        running = max(running, min(1.0, ps[i] * (max(size, len(ps)) - rank)))
        corrected[i] = running
    return corrected


def num_for_mean(distance: float, sd: float, alpha: float, power: float) -> int:
    """Units for a two-sided test to show a mean `distance` from the margin with this power (Guenther 1981)."""
    z = float(stats.norm.ppf(1 - alpha / 2))
    needed = ((z + float(stats.norm.ppf(power))) * sd / distance) ** 2 + z**2 / 2
    return max(MIN_UNITS, math.ceil(needed))


def num_for_share(planned: float, margin: float, alpha: float, power: float) -> int:
    """Units for the exact binomial test to tell a share of `planned` from `margin` with this power."""
    n = MIN_UNITS
    while n < LARGEST_NUM:
        if planned > margin:
            least = (
                stats.binom.isf(alpha / 2, n, margin) + 1
            )  # the smallest count that is significant
            reached = stats.binom.sf(least - 1, n, planned)
        else:
            most = stats.binom.ppf(alpha / 2, n, margin)
            most -= stats.binom.cdf(most, n, margin) >= alpha / 2
            reached = stats.binom.cdf(most, n, planned)
        if reached >= power:
            return n
        n += 1 if n < 1000 else n // 100
    return LARGEST_NUM


def _directed(
    one_sided: Any, values: np.ndarray, direction: Direction, margin: float
) -> tuple[float, float]:
    """Two-sided p for a direction and against it, from a test against 0 of both sides."""
    above, below = one_sided(values - margin)
    if direction == "greater":
        p, against = above, below
    elif direction == "less":
        p, against = below, above
    else:  # two one-sided tests (Schuirmann 1987); against: beyond either edge
        above_low, below_low = one_sided(values + margin)
        p, against = max(above_low, below), min(above, below_low)
    return min(1.0, 2 * p), min(1.0, 2 * against)


def _pair_means(values: np.ndarray) -> np.ndarray:
    """The means of all n (n + 1) / 2 pairs of `values` [n], each with itself too, in rising order."""
    return np.sort(((values[:, None] + values) / 2)[np.triu_indices(len(values))])


@cache
def _signed_rank_chances(n: int) -> np.ndarray:
    """The distribution of the sum of those of the ranks 1..n that a fair coin each picks, [n (n + 1) / 2 + 1]."""
    chances = np.zeros(n * (n + 1) // 2 + 1)
    chances[0] = 1.0
    for rank in range(1, n + 1):
        chances = (chances + np.concatenate([np.zeros(rank), chances[:-rank]])) / 2
    return chances


def _t(means: Any, squares: Any, n: int) -> Any:
    """Student's t from means and mean squares; infinite where there is no spread, NaN where there is no mean either."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        variance = squares - means**2
        variance = np.where(variance > TIE * squares, variance, 0.0)
        return means / np.sqrt(variance / (n - 1))


def _tail(null: Any, observed: Any) -> Any:
    """(b + 1) / (m + 1) for `null` [m, ...] at least `observed` [...]; what is no number counts, so that it never helps."""
    slack = TIE * np.abs(np.nan_to_num(observed, posinf=0.0, neginf=0.0))
    return ((~(null < observed - slack)).sum(axis=0) + 1) / (len(null) + 1)


def _largest(values: np.ndarray) -> float:
    """The largest size among `values`, never 0: what they are divided by, so that no square over- or underflows."""
    return max(float(np.abs(values).max()), float(np.finfo(np.float64).tiny))


def _scaled(values: np.ndarray) -> np.ndarray:
    return values / _largest(values)


def _skewness(values: np.ndarray) -> float:
    scaled = _scaled(values)
    scaled = _scaled(scaled - scaled.mean())
    return float((scaled**3).mean() / max(float((scaled**2).mean()) ** 1.5, TIE))
