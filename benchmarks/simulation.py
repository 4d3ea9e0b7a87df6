"""Verdicts on data whose truth is known: what benchmarks.calibration and its test count."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from tempo import statistics
from tempo.claims import ALPHA, Claim, judge

SIZES = (10, 40, 160)
SIMULATIONS = 2000  # the standard error of a share of 0.05 is then 0.005
# For maps, for power, and for what is only compared.
FEWER = 500
# (m + 1) * alpha / 2 is a whole number for alpha 0.05 and 0.01. So having fewer resamples than
# elsewhere costs no exactness.
RESAMPLES = 399
# For the power of a registered claim. There Holm's correction asks for a smaller p than 399
# resamples can give.
RESAMPLES_CORRECTED = 999
# A share measured this far above its true rate has a chance of 1 in 740.
STANDARD_ERRORS = 3
# Layers by heads of the maps that `somewhere` is tried on.
MAP = (30, 9)
# In standard deviations.
EFFECTS = (0.1, 0.2, 0.3, 0.5, 0.8)

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _right_skewed() -> dict[str, Draw]:
    return {
        "exponential": lambda rng, shape: rng.exponential(1, shape) - 1,
        "lognormal 0.5": lambda rng, shape: rng.lognormal(0, 0.5, shape) - math.exp(0.125),
        "lognormal 1": lambda rng, shape: rng.lognormal(0, 1, shape) - math.exp(0.5),
        "skewed ties": lambda rng, shape: rng.binomial(3, 0.25, shape) / 3 - 0.25,
        "sparse zeros": lambda rng, shape: (
            rng.binomial(1, 0.1, shape) * rng.exponential(1, shape) - 0.1
        ),
    }


def _mirrored(draw: Draw) -> Draw:
    return lambda rng, shape: -draw(rng, shape)


SYMMETRIC: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(0, 1, shape),
    "Student t3": lambda rng, shape: rng.standard_t(3, shape),
    "ties": lambda rng, shape: rng.integers(0, 4, shape) / 3 - 0.5,
}
_MIRRORED = {f"{name}, left": _mirrored(draw) for name, draw in _right_skewed().items()}
# Every one has mean 0. Those named "..., left" have their long tail on the left.
DRAWS: dict[str, Draw] = SYMMETRIC | _right_skewed() | _MIRRORED


class Scenario(NamedTuple):
    """One cell of the table: a claim's test on n values of a distribution.

    `shift` is the mean of that distribution, or whatever else the claim estimates.
    """

    claim: Claim
    draw: str
    n: int
    shift: float = 0.0
    simulations: int = SIMULATIONS
    seed: int = 0


class Rates(NamedTuple):
    """Shares of simulations.

    `false` and `false_at_01` count verdicts of either kind, at alpha 0.05 and 0.01.
    """

    supported: float
    refuted: float
    false: float
    false_at_01: float
    missed: float  # 95 % intervals that miss the true value
    too_skewed: float  # one direction was not tested at all


def plain_claim(test: str, **changes: Any) -> Claim:
    """A claim about the numbers themselves.

    Its control has no spread. So it costs little and never decides a verdict.
    """
    fields: dict[str, Any] = {
        "id": test,
        "statement": "",
        "statistic": "",
        "refuted_by": "",
        "control_statement": "a constant",
        "values": identity,
        "control": far_away,
        "test": test,
    }
    return Claim(**fields | changes)


def identity(case: Any) -> Any:
    return case


def far_away(case: Any) -> Any:
    return np.zeros_like(case)


def centre(draw: str, claim: Claim) -> float:
    """The value that the claim's estimand has under a distribution of mean 0."""
    if claim.estimand == "mean" or draw in SYMMETRIC:
        return 0.0
    pairs = DRAWS[draw](np.random.default_rng(1), (2, 1_000_000))
    return float(np.median(pairs.mean(axis=0)))


def simulate(scenario: Scenario) -> Rates:
    """The rates of one cell, from seeded data."""
    claim, draw, n, shift, simulations, seed = scenario
    rng = np.random.default_rng([seed, n, *scenario.draw.encode(), *claim.id.encode()])
    shape = (n, *MAP) if claim.test == "somewhere" else (n,)
    shift -= centre(draw, claim)
    truth = scenario.shift
    found = []
    for _ in range(simulations):
        finding = judge(claim, list(DRAWS[draw](rng, shape) + shift))
        smaller = np.nanmin([finding.p, finding.p_against, 1.0])
        missed = not math.isnan(finding.low) and not finding.low <= truth <= finding.high
        rates = Rates(
            supported=finding.verdict == "SUPPORTED",
            refuted=finding.verdict == "REFUTED",
            false=finding.verdict != "INCONCLUSIVE",
            false_at_01=smaller < 0.01,
            missed=missed,
            too_skewed="skewed" in finding.reason,
        )
        found.append(rates)
    return Rates(*np.mean(found, axis=0).round(4).tolist())


def sign_flips_alone(scenario: Scenario) -> float:
    """The share of false verdicts of the plain two-sided sign-flip test on the same data.

    It shows what the other half of the test is for.
    """
    seed = [scenario.seed, scenario.n, *scenario.draw.encode(), *scenario.claim.id.encode()]
    rng = np.random.default_rng(seed)
    draw, shape = DRAWS[scenario.draw], (scenario.n,)
    flips = [min(statistics.sign_flip(draw(rng, shape))) for _ in range(scenario.simulations)]
    return float(np.mean(2 * np.array(flips) < ALPHA))


def limit(simulations: int, alpha: float = ALPHA) -> float:
    """The largest share that simulation error allows where the true one is alpha."""
    return alpha + STANDARD_ERRORS * math.sqrt(alpha * (1 - alpha) / simulations)


def null_scenarios() -> list[Scenario]:
    """Data for which every verdict is false: the estimand lies exactly on the margin."""
    of_mean = plain_claim("greater", id="mean")
    of_ranks = plain_claim("greater", id="pseudomedian", estimand="pseudomedian")
    # both directions are counted, so one side of the mirrored pairs shows both
    one_tail = [name for name in DRAWS if not name.endswith("left")]
    found = []
    for claim in (of_mean, of_ranks):
        found += [Scenario(claim, draw, n) for draw in one_tail for n in SIZES]
    equal = plain_claim("equivalent", id="equivalence", margin=2.0)
    # the mean lies on the upper margin, so the long tail of "left" lies between the margins
    both_tails = [*one_tail, "exponential, left", "lognormal 1, left"]
    found += [Scenario(equal, draw, n, shift=2.0) for draw in both_tails for n in SIZES]
    cells = plain_claim("somewhere", id="somewhere")
    found += [Scenario(cells, draw, n, simulations=FEWER) for draw in both_tails for n in SIZES]
    return found


def power_scenarios() -> list[Scenario]:
    """Planted effects, in standard deviations of the data.

    The standard deviation of Student's t3 is 3 ** 0.5.
    """
    claim = plain_claim("greater", id="mean")
    sds = {"normal": 1.0, "exponential": 1.0, "exponential, left": 1.0, "Student t3": math.sqrt(3)}
    found = []
    for draw, sd in sds.items():
        for effect in EFFECTS:
            found += [Scenario(claim, draw, n, effect * sd, FEWER) for n in SIZES]
    return found


def exact_share_rates() -> list[dict[str, Any]]:
    """False verdicts of the exact binomial test with the share on the margin.

    They are summed over all counts, not simulated.
    """
    rows = []
    for n in SIZES:
        for margin in (0.05, 0.5, 0.95):
            chance = stats.binom.pmf(np.arange(n + 1), n, margin)
            found = [statistics.share_test(held, n, margin) for held in range(n + 1)]
            smaller = np.array([min(r.p, r.p_against) for r in found])
            missed = [not r.low <= margin <= r.high for r in found]
            row = {
                "test": "proportion",
                "draw": f"share {margin:g}",
                "n": n,
                "simulations": 0,
                "false": float(chance[smaller < ALPHA].sum()),
                "false_at_01": float(chance[smaller < 0.01].sum()),
                "missed": float(chance[missed].sum()),
            }
            rows.append(row)
    return rows
