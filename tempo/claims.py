"""Claims registered before the data, and the verdicts that the data give them.

The unit of analysis is the prompt: layers, heads and steps of one prompt are not independent, so a claim's statistic is
one number for each prompt. "No difference" is an equivalence test against a margin, never a failure to reject.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from tempo import statistics
from tempo.errors import SpecError
from tempo.statistics import MIN_UNITS, Result

Verdict = Literal["SUPPORTED", "REFUTED", "INCONCLUSIVE"]
Test = Literal["always", "greater", "less", "equivalent", "proportion", "somewhere"]
Estimand = Literal["mean", "pseudomedian"]
Case = Mapping[str, Any]  # what an experiment measured on one prompt
Statistic = Callable[[Case], Any]  # a number, a truth value, a map of numbers, or None

ALPHA = 0.05
POWER = 0.9  # what a claim's number of prompts is planned for
SCHEMA = 2  # of a finding's record; a reader refuses any other


@dataclass(frozen=True)
class Claim:
    """A statement, and how data decide it.

    values: the statistic of one prompt's case (None: the prompt has nothing to say, e.g. it never branched).
    test: `always`: true for every prompt, an invariant whose violation fails the test;
        `greater` / `less`: the mean over prompts exceeds / stays under the margin;
        `equivalent`: the mean lies within plus or minus the margin;
        `proportion`: the share of prompts for which it is true exceeds the margin;
        `somewhere`: the statistic is a map, such as layers by heads, and the mean exceeds the margin in some cell of it.
    margin: the smallest effect that would matter, with its reason.
    control: the same statistic where the claim must *not* hold; if it does there too, the check proves nothing.
    estimand: what `greater`, `less` and `equivalent` are about: the mean, or the pseudomedian, which is about a typical
        prompt and is not moved by a few extreme ones.
    family: claims corrected together (Holm), whether or not all of them were selected to run.
    alpha: the chance of a false verdict, of either kind together.
    planned_effect, planned_sd, planned_from: the mean (or share) the claim is meant to detect, the spread over prompts that
        was expected, and where both come from; `num_needed` tells from them how many prompts it takes.
    cells: how many cells a map is expected to have, for `num_needed`.
    """

    id: str
    statement: str
    statistic: str
    values: Statistic
    test: Test
    refuted_by: str
    control: Statistic
    control_statement: str
    margin: float = 0.0
    margin_reason: str = ""
    estimand: Estimand = "mean"
    family: str = ""
    unit: str = "prompt"
    alpha: float = ALPHA
    planned_effect: float | None = None
    planned_sd: float = 0.0
    planned_from: str = ""
    cells: int = 1

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("test", self.test, get_args(Test)),
            ("estimand", self.estimand, get_args(Estimand)),
        ):
            if value not in allowed:
                raise SpecError(
                    f"claim {self.id}: {name}={value!r}, expected one of {', '.join(allowed)}"
                )
        if not 0 < self.alpha < 1:
            raise SpecError(
                f"claim {self.id}: alpha={self.alpha!r}, expected a chance between 0 and 1 such as 0.05"
            )
        if self.test == "proportion" and not 0 <= self.margin <= 1:
            raise SpecError(
                f"claim {self.id}: margin={self.margin!r}, expected a share from 0 to 1"
            )
        if self.test == "equivalent" and not self.margin > 0:
            raise SpecError(
                f"claim {self.id}: margin={self.margin!r}; nothing is shown to be within 0, give the smallest effect that matters"
            )
        if self.planned_effect is None:
            return
        if not (self.planned_from and (self.planned_sd > 0 or self.test == "proportion")):
            raise SpecError(
                f"claim {self.id}: planned_effect needs planned_sd above 0 and planned_from, which says where they come from"
            )
        if self.margin == (
            abs(self.planned_effect) if self.test == "equivalent" else self.planned_effect
        ):
            raise SpecError(
                f"claim {self.id}: the planned effect is the margin, and no number of {self.unit}s tells them apart"
            )

    @property
    def kind(self) -> str:
        return "invariant" if self.test == "always" else "empirical"

    def __str__(self) -> str:
        return self.id


@dataclass(frozen=True)
class Finding:
    """What the data said about a claim. Every p is two-sided; the corrected ones decide the verdict."""

    claim: str
    statement: str
    kind: str
    verdict: Verdict
    reason: str
    estimate: float
    low: float  # 95 % interval of the estimate
    high: float
    effect_size: float  # Cohen's dz of a mean, rank-biserial correlation of a pseudomedian, Cohen's h of a share
    n: int
    unit: str
    statistic: str
    test: str
    margin: float
    margin_reason: str
    p: float  # that the claim's opposite would look like this; SUPPORTED needs it below alpha
    p_corrected: float
    p_against: float  # that the claim itself would look like this; REFUTED needs it below alpha
    p_against_corrected: float
    family: str
    control: str
    control_estimate: float
    control_holds: bool  # the control did what it must: it did not support the claim
    estimand: str = "mean"
    alpha: float = ALPHA
    refuted_by: str = ""
    details: dict[str, Any] = field(
        default_factory=dict
    )  # of a map: its largest cell, how many are significant
    context: dict[str, Any] = field(default_factory=dict)  # experiment, config, variant, model

    @property
    def label(self) -> str:
        """The claim's id, and which of an experiment's configs it was decided on if there are several."""
        return (
            f"{self.claim} ({self.context['variant']})"
            if self.context.get("variant")
            else self.claim
        )

    def record(self) -> dict[str, Any]:
        """The finding as JSON-ready values with the schema's version: NaN becomes None."""
        values = {
            k: None if isinstance(v, float) and math.isnan(v) else v
            for k, v in asdict(self).items()
        }
        return {"schema": SCHEMA, **values}


def judge(claim: Claim, cases: Sequence[Case], context: Mapping[str, Any] | None = None) -> Finding:
    """The finding of one claim over `cases`, before correction for its family."""
    result = _test(claim, _values(claim, claim.values, cases))
    control = _test(claim, _values(claim, claim.control, cases))
    holds = control.verdict != "SUPPORTED"
    verdict, reason = result.verdict, result.reason
    if verdict == "SUPPORTED" and control.n == 0:
        verdict, reason = (
            "INCONCLUSIVE",
            "nothing its control could act on, so it could not have failed",
        )
    elif verdict == "SUPPORTED" and not holds:
        verdict, reason = (
            "INCONCLUSIVE",
            f"the control supports it as well ({claim.control_statement})",
        )
    found = result.found
    return Finding(
        claim=claim.id, statement=claim.statement, kind=claim.kind, verdict=verdict, reason=reason,
        estimate=found.estimate, low=found.low, high=found.high, effect_size=found.effect_size, n=result.n,
        unit=claim.unit, statistic=claim.statistic, test=claim.test, margin=claim.margin, margin_reason=claim.margin_reason,
        p=found.p, p_corrected=found.p, p_against=found.p_against, p_against_corrected=found.p_against,
        family=claim.family or claim.id, control=claim.control_statement, control_estimate=control.found.estimate,
        control_holds=holds, estimand=claim.estimand, alpha=claim.alpha, refuted_by=claim.refuted_by,
        details=dict(found.details or {}), context=dict(context or {}),
    )  # fmt: skip


def correct(findings: Sequence[Finding], declared: Mapping[str, int]) -> list[Finding]:
    """The findings with Holm-corrected p over their declared family; a verdict that does not survive is INCONCLUSIVE.

    `declared`: how many empirical claims each family has, run or not. A claim that was not run counts as the least
    significant, which makes the correction of the others no weaker than it would be with it. The p for and those against
    are corrected apart; as each is two-sided, false verdicts of both kinds together stay at alpha.
    """
    out = list(findings)
    for family in {finding.family for finding in findings}:
        members = [
            i
            for i, f in enumerate(findings)
            if f.family == family and f.kind == "empirical" and not math.isnan(f.p)
        ]
        size = declared.get(family, 0)
        supporting = statistics.holm([findings[i].p for i in members], size)
        opposing = statistics.holm([findings[i].p_against for i in members], size)
        for i, p, against in zip(members, supporting, opposing, strict=True):
            out[i] = _survivor(replace(out[i], p_corrected=p, p_against_corrected=against))
    return out


def _survivor(finding: Finding) -> Finding:
    """The finding with its verdict, if that survived the correction."""
    raw, corrected = {
        "SUPPORTED": (finding.p, finding.p_corrected),
        "REFUTED": (finding.p_against, finding.p_against_corrected),
        "INCONCLUSIVE": (0.0, 0.0),
    }[finding.verdict]
    if corrected < finding.alpha:
        return finding
    reason = f"p = {raw:.3g} does not survive the correction for its family ({corrected:.3g})"
    return replace(finding, verdict="INCONCLUSIVE", reason=reason)


def declared_sizes(claims: Iterable[Claim]) -> dict[str, int]:
    """How many empirical claims each family declares."""
    return dict(Counter(claim.family or claim.id for claim in claims if claim.kind == "empirical"))


def num_needed(claim: Claim, family_size: int = 1, power: float = POWER) -> int | None:
    """How many units decide the claim with this power if the planned effect is true, in a family of so many claims.

    The verdict to be reached is SUPPORTED if the planned effect is on the claim's side of the margin, else REFUTED. Holm's
    correction is taken at its worst, Bonferroni's. None for an invariant and for a claim without a planned effect.
    """
    if claim.kind == "invariant" or claim.planned_effect is None:
        return None
    alpha = claim.alpha / family_size
    if claim.test == "proportion":
        return statistics.num_for_share(claim.planned_effect, claim.margin, alpha, power)
    if claim.test == "equivalent":
        distance = claim.margin - abs(claim.planned_effect)
        # in the middle of the margins either side can fail, each with half of what is left
        power = 1 - (1 - power) / 2 if claim.planned_effect == 0 else power
    else:
        distance = claim.planned_effect - claim.margin
    if claim.test == "somewhere":
        alpha /= claim.cells
    needed = statistics.num_for_mean(abs(distance), claim.planned_sd, alpha, power)
    return (
        math.ceil(needed / statistics.LEAST_EFFICIENCY)
        if claim.estimand == "pseudomedian"
        else needed
    )


_NOTHING = Result(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan)


class _Outcome(NamedTuple):
    verdict: Verdict
    reason: str
    n: int
    found: Result = _NOTHING


def _values(claim: Claim, statistic: Statistic, cases: Sequence[Case]) -> np.ndarray:
    """The statistic of every case that has something to say: [n], or [n, ...] of maps."""
    found = [value for value in map(statistic, cases) if value is not None]
    try:
        values = np.array(found, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"claim {claim.id}: its statistic gives no numbers, or maps of different shapes ({error})"
        ) from None
    if (
        claim.test in ("always", "proportion")
        and not np.isin(values[np.isfinite(values)], (0, 1)).all()
    ):
        raise SpecError(
            f"claim {claim.id}: test={claim.test!r} needs a statistic that is true or false, got {values[:3].tolist()}"
        )
    if len(values) and (values.ndim > 1) != (claim.test == "somewhere"):
        raise SpecError(
            f"claim {claim.id}: test={claim.test!r} with values of shape {values.shape[1:]}; `somewhere` is for maps, only maps"
        )
    return values


def _test(claim: Claim, values: np.ndarray) -> _Outcome:
    n = len(values)
    if n == 0:
        return _Outcome("INCONCLUSIVE", "no prompt has anything to say about it", n)
    if not np.isfinite(values).all():
        return _Outcome(
            "INCONCLUSIVE",
            f"{int((~np.isfinite(values)).sum())} of {values.size} values are not finite",
            n,
        )
    if claim.test == "always":
        return _always(values)
    if n < MIN_UNITS:
        found = _NOTHING._replace(estimate=float(values.mean()))
        return _Outcome(
            "INCONCLUSIVE", f"{n} {claim.unit}s, at least {MIN_UNITS} are needed", n, found
        )
    if claim.test == "proportion":
        return _decide(claim, n, statistics.share_test(int(values.sum()), n, claim.margin))
    if np.ptp(values) <= statistics.TIE * np.abs(values).max():
        same = float(values.flat[0])
        found = _NOTHING._replace(estimate=same, low=same, high=same)
        return _Outcome(
            "INCONCLUSIVE", f"all {n} values are {same:.3g}: no spread to judge by", n, found
        )
    if claim.test == "somewhere":
        return _decide(claim, n, statistics.map_test(values, claim.margin))
    test = (
        statistics.pseudomedian_test if claim.estimand == "pseudomedian" else statistics.mean_test
    )
    return _decide(claim, n, test(values, claim.test, claim.margin))


def _always(values: np.ndarray) -> _Outcome:
    """True for every unit; the interval is Clopper and Pearson's for the share of units for which it is."""
    n, held = len(values), int(values.sum())
    found = statistics.share_test(held, n, 1.0)._replace(
        effect_size=math.nan, p=math.nan, p_against=math.nan
    )
    if held == n:
        return _Outcome("SUPPORTED", f"true for all {n}", n, found)
    return _Outcome("REFUTED", f"violated by {n - held} of {n}", n, found)


def _decide(claim: Claim, n: int, found: Result) -> _Outcome:
    wanted = {
        "greater": f"above {claim.margin:g}",
        "less": f"below {claim.margin:g}",
        "equivalent": f"within ±{claim.margin:g}",
        "proportion": f"a share above {claim.margin:g}",
        "somewhere": f"above {claim.margin:g} somewhere",
    }[claim.test]
    if found.details:
        wanted += f" ({found.details['significant']} of {found.details['cells']} cells, most in {found.details['cell']})"
    if found.p < claim.alpha:
        return _Outcome("SUPPORTED", f"{wanted} (p = {found.p:.2g})", n, found)
    if found.p_against < claim.alpha:
        return _Outcome(
            "REFUTED", f"not {wanted}: the opposite is (p = {found.p_against:.2g})", n, found
        )
    reason = f"neither {wanted} (p = {found.p:.2g}) nor the opposite (p = {found.p_against:.2g}) is shown"
    return _Outcome("INCONCLUSIVE", reason + (f"; {found.note}" if found.note else ""), n, found)
