"""Claims registered before the data, and the verdicts that the data give them.

The unit of analysis is the prompt: layers, heads and steps of one prompt are not independent, so a claim's statistic is
one number for each prompt. "No difference" is an equivalence test against a margin, never a failure to reject.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from scipy import stats

Verdict = Literal["SUPPORTED", "REFUTED", "INCONCLUSIVE"]
Test = Literal["always", "greater", "less", "equivalent", "proportion"]
Case = Mapping[str, Any]  # what an experiment measured on one prompt

ALPHA = 0.05
# With five values the smallest one-sided sign-flip p is 1/32; one more leaves room for a correction.
MIN_UNITS = 6
# p = (b + 1) / (m + 1) (Phipson & Smyth 2010): the smallest p is 1e-4, fine enough for families of up to 50.
NUM_RESAMPLES = 9999
SEED = 20_261_123  # of permutation and bootstrap only; the same data give the same finding


@dataclass(frozen=True)
class Claim:
    """A statement, and how data decide it.

    values: the statistic of one prompt's case (None: the prompt has nothing to say, e.g. it never branched).
    test: `always`: true for every prompt, an invariant whose violation fails the test;
        `greater` / `less`: the mean over prompts exceeds / stays under the margin;
        `equivalent`: the mean lies within plus or minus the margin;
        `proportion`: the share of prompts for which it is true exceeds the margin.
    margin: the smallest effect that would matter, with its reason.
    control: the same statistic where the claim must *not* hold; if it does there too, the check proves nothing.
    family: claims corrected together (Holm), whether or not all of them were selected to run.
    """

    id: str
    statement: str
    statistic: str
    values: Callable[[Case], float | bool | None]
    test: Test
    refuted_by: str
    control: Callable[[Case], float | bool | None]
    control_statement: str
    margin: float = 0.0
    margin_reason: str = ""
    family: str = ""
    unit: str = "prompt"
    alpha: float = ALPHA

    @property
    def kind(self) -> str:
        return "invariant" if self.test == "always" else "empirical"

    def __str__(self) -> str:
        return self.id


@dataclass(frozen=True)
class Finding:
    """What the data said about a claim."""

    claim: str
    statement: str
    kind: str
    verdict: Verdict
    reason: str
    estimate: float
    low: float  # 95 % interval of the estimate
    high: float
    effect_size: float  # mean / standard deviation over units (Cohen's dz); NaN for proportions
    n: int
    unit: str
    statistic: str
    test: str
    margin: float
    margin_reason: str
    p: float
    p_corrected: float
    family: str
    control: str
    control_estimate: float
    control_holds: bool  # the control did what it must: it did not support the claim
    refuted_by: str = ""
    context: dict[str, Any] = field(default_factory=dict)  # experiment, config, variant, model

    @property
    def label(self) -> str:
        """The claim's id, and which of an experiment's configs it was decided on if there are several."""
        return f"{self.claim} ({self.context['variant']})" if self.context.get("variant") else self.claim

    def record(self) -> dict[str, Any]:
        """The finding as JSON-ready values: NaN becomes None."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}


def judge(claim: Claim, cases: Sequence[Case], context: Mapping[str, Any] | None = None) -> Finding:
    """The finding of one claim over `cases`, before correction for its family."""
    result = _test(claim, _values(claim.values, cases))
    control = _test(claim, _values(claim.control, cases))
    holds = control.verdict != "SUPPORTED"
    if result.verdict == "SUPPORTED" and control.n == 0:
        result = replace(result, verdict="INCONCLUSIVE", reason="nothing its control could act on, so it could not have failed")
    verdict, reason = result.verdict, result.reason
    if not holds and verdict == "SUPPORTED":
        verdict, reason = "INCONCLUSIVE", f"the control supports it as well ({claim.control_statement})"
    return Finding(
        claim=claim.id, statement=claim.statement, kind=claim.kind, verdict=verdict, reason=reason,
        estimate=result.estimate, low=result.low, high=result.high, effect_size=result.effect_size, n=result.n,
        unit=claim.unit, statistic=claim.statistic, test=claim.test, margin=claim.margin,
        margin_reason=claim.margin_reason, p=result.p, p_corrected=result.p, family=claim.family or claim.id,
        control=claim.control_statement, control_estimate=control.estimate, control_holds=holds,
        refuted_by=claim.refuted_by, context=dict(context or {}),
    )  # fmt: skip


def correct(findings: Sequence[Finding], declared: Mapping[str, int]) -> list[Finding]:
    """The findings with Holm-corrected p over their declared family; a verdict that does not survive is INCONCLUSIVE.

    `declared`: how many empirical claims each family has, run or not. A claim that was not run counts as the least
    significant, which makes the correction of the others no weaker than it would be with it.
    """
    corrected: dict[int, float] = {}
    for family in {finding.family for finding in findings}:
        members = [i for i, f in enumerate(findings) if f.family == family and f.kind == "empirical" and not math.isnan(f.p)]
        size, running = max(declared.get(family, 0), len(members)), 0.0
        for rank, i in enumerate(sorted(members, key=lambda i: findings[i].p)):
            running = max(running, min(1.0, findings[i].p * (size - rank)))
            corrected[i] = running
    out = []
    for i, finding in enumerate(findings):
        finding = replace(finding, p_corrected=corrected.get(i, finding.p))
        if finding.kind == "empirical" and finding.verdict == "SUPPORTED" and not finding.p_corrected < ALPHA:
            reason = f"p = {finding.p:.3g} does not survive the correction for its family ({finding.p_corrected:.3g})"
            finding = replace(finding, verdict="INCONCLUSIVE", reason=reason)
        out.append(finding)
    return out


def declared_sizes(claims: Iterable[Claim]) -> dict[str, int]:
    """How many empirical claims each family declares."""
    sizes: dict[str, int] = {}
    for claim in claims:
        if claim.kind == "empirical":
            sizes[claim.family or claim.id] = sizes.get(claim.family or claim.id, 0) + 1
    return sizes


@dataclass(frozen=True)
class _Result:
    verdict: Verdict
    reason: str
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    effect_size: float = math.nan
    n: int = 0
    p: float = math.nan


def _values(statistic: Callable[[Case], float | bool | None], cases: Sequence[Case]) -> np.ndarray:
    values = [statistic(case) for case in cases]
    return np.array([float(value) for value in values if value is not None], dtype=np.float64)


def _test(claim: Claim, values: np.ndarray) -> _Result:
    n = len(values)
    if n == 0:
        return _Result("INCONCLUSIVE", "no prompt has anything to say about it", n=0)
    if not np.isfinite(values).all():
        return _Result("INCONCLUSIVE", f"{int((~np.isfinite(values)).sum())} of {n} values are not finite", n=n)
    if claim.test == "always":
        return _always(values)
    if n < MIN_UNITS:
        return _Result("INCONCLUSIVE", f"{n} {claim.unit}s, at least {MIN_UNITS} are needed", float(values.mean()), n=n)
    if claim.test == "proportion":
        return _proportion(claim, values)
    if np.ptp(values) == 0:
        mean = float(values[0])
        return _Result("INCONCLUSIVE", f"all {n} values are {mean:.3g}: no spread to judge by", mean, mean, mean, n=n)
    return _mean(claim, values)


def _always(values: np.ndarray) -> _Result:
    """True for every unit; the interval is Clopper-Pearson's for the share of units for which it is."""
    n, held = len(values), int(values.sum())
    interval = stats.binomtest(held, n).proportion_ci(0.95, "exact")
    shares = held / n, float(interval.low), float(interval.high)
    if held == n:
        return _Result("SUPPORTED", f"true for all {n}", *shares, n=n)
    return _Result("REFUTED", f"violated by {n - held} of {n}", *shares, n=n)


def _proportion(claim: Claim, values: np.ndarray) -> _Result:
    """Exact binomial test of a share against the margin (Clopper-Pearson interval)."""
    n, held = len(values), int(values.sum())
    above = stats.binomtest(held, n, claim.margin, "greater").pvalue if claim.margin < 1 else 1.0
    below = stats.binomtest(held, n, claim.margin, "less").pvalue
    interval = stats.binomtest(held, n).proportion_ci(0.95, "exact")
    verdict, reason = _decide(claim, float(above), float(below))
    return _Result(verdict, reason, held / n, float(interval.low), float(interval.high), n=n, p=float(above))


def _mean(claim: Claim, values: np.ndarray) -> _Result:
    """Sign-flip tests of the mean against the margin, with a BCa bootstrap interval over units."""
    margin = claim.margin
    if claim.test == "greater":
        p, against = _sign_flip(values - margin, "greater"), _sign_flip(values - margin, "less")
    elif claim.test == "less":
        p, against = _sign_flip(values - margin, "less"), _sign_flip(values - margin, "greater")
    else:  # two one-sided tests (Schuirmann 1987)
        p = max(_sign_flip(values + margin, "greater"), _sign_flip(values - margin, "less"))
        against = min(1.0, 2 * min(_sign_flip(values - margin, "greater"), _sign_flip(values + margin, "less")))
    low, high = _interval(values)
    verdict, reason = _decide(claim, p, against)
    effect = float(values.mean() / values.std(ddof=1))
    return _Result(verdict, reason, float(values.mean()), low, high, effect, len(values), p)


def _decide(claim: Claim, p: float, against: float) -> tuple[Verdict, str]:
    wanted = {
        "greater": f"above {claim.margin:g}",
        "less": f"below {claim.margin:g}",
        "equivalent": f"within ±{claim.margin:g}",
        "proportion": f"a share above {claim.margin:g}",
    }[claim.test]
    if p < claim.alpha:
        return "SUPPORTED", f"{wanted} (p = {p:.2g})"
    if against < claim.alpha:
        return "REFUTED", f"not {wanted}: the opposite is (p = {against:.2g})"
    return "INCONCLUSIVE", f"neither {wanted} (p = {p:.2g}) nor the opposite (p = {against:.2g}) is shown"


def _sign_flip(differences: np.ndarray, alternative: str) -> float:
    """One-sided sign-flip permutation p of the mean against 0, exact for few units."""

    def mean(sample: np.ndarray, axis: int) -> np.ndarray:
        return sample.mean(axis=axis)

    rng = np.random.default_rng(SEED)
    result = stats.permutation_test(
        (differences,), mean, permutation_type="samples", vectorized=True, n_resamples=NUM_RESAMPLES,
        alternative=alternative, rng=rng,
    )  # fmt: skip
    return float(result.pvalue)


def _interval(values: np.ndarray) -> tuple[float, float]:
    """95 % BCa bootstrap interval of the mean over units."""
    rng = np.random.default_rng(SEED)
    result = stats.bootstrap((values,), np.mean, n_resamples=NUM_RESAMPLES, method="BCa", rng=rng)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
