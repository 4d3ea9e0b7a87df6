"""Claims that are registered before the data, and the verdicts that the data give them.

The unit of analysis is the prompt. Layers, heads and steps of one prompt are not independent of
each other. So a claim's statistic is one number for each prompt.

"No difference" is shown by an equivalence test against a margin. A failure to find a difference
shows nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, time
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from tempo import statistics
from tempo.errors import SpecError
from tempo.inputs import (
    checked,
    conform,
    function,
    instance,
    mapping,
    number,
    one_of,
    optional,
    several,
    text,
    whole,
    words,
)
from tempo.statistics import MIN_UNITS, Result

Verdict = Literal["SUPPORTED", "REFUTED", "INCONCLUSIVE", "INAPPLICABLE"]
Test = Literal["always", "greater", "less", "equivalent", "proportion", "somewhere"]
Estimand = Literal["mean", "pseudomedian"]
Case = Mapping[str, Any]  # what an experiment measured on one prompt
Statistic = Callable[[Case], Any]  # gives a number, a truth value, a map of numbers, or None

ALPHA = 0.05
# The number of prompts is planned so that a true claim is supported with this probability.
POWER = 0.9
# The version of a finding's record. A reader refuses any other.
SCHEMA = 2


# What the fields of a claim take, see `tempo.inputs`.
FIELDS = {
    "id": text,
    "statement": words,
    "values": function,
    "control": function,
    "test": one_of(*get_args(Test)),
    "estimand": one_of(*get_args(Estimand)),
    "margin": number(),
    "alpha": number(0, 1, inside=True),
    "family": words,
    "cells": whole(1),
    "planned_effect": optional(number()),
    "planned_sd": number(0),
}
CLAIM = instance("Claim", "tempo.claims.Claim(...) or study.claim")


@dataclass(frozen=True)
class Claim:
    """A statement about a model, and the rule by which data decide it.

    The test decides when the claim is supported:

    - `always`: the statistic is true for every prompt. Such a claim is an invariant: one violation
      refutes it, and fails the pytest test.
    - `greater`, `less`: its mean over prompts is above, or below, the margin.
    - `equivalent`: its mean is within plus or minus the margin.
    - `proportion`: it is true for a share of prompts above the margin.
    - `somewhere`: it is a map, such as layers by heads. Its mean is above the margin in at least
      one cell.

    Attributes:
        id: The name of the claim, unique among all claims.
        statement: What is claimed, as a sentence.
        statistic: What `values` computes, in words.
        values: Computes the statistic from one prompt's case. None leaves the prompt out, for
            example because it never branched.
        test: One of the tests above.
        refuted_by: What the data would look like if the claim were wrong.
        control: The same statistic in a situation where the claim must *not* hold. If the data
            support the claim there as well, the check cannot fail and so proves nothing.
        control_statement: What the control is, in words.
        margin: The smallest effect that would matter.
        margin_reason: Why the margin is what it is.
        estimand: What `greater`, `less` and `equivalent` compare with the margin: the `mean` over
            prompts, or their `pseudomedian`. The latter describes a typical prompt, and a few
            extreme prompts do not move it.
        family: The claims that are corrected together (Holm), whether or not all of them were run.
            If empty, the claim is a family of its own.
        unit: What one value belongs to, for messages.
        alpha: The chance of a false verdict, SUPPORTED and REFUTED together.
        planned_effect: The mean, or share, that the claim is meant to detect. `num_needed` computes
            how many prompts that takes.
        planned_sd: The expected standard deviation over prompts. Not needed for a share.
        planned_from: Where these two numbers come from.
        cells: How many cells a map is expected to have, for `num_needed`.
        registered: When the claim was written down, as an ISO date or time. A finding is
            confirmatory only if its prompts were drawn after that (`standing`).

    Raises:
        SpecError: if a field is out of range, or the planned effect cannot be told from the margin.
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
    registered: str = ""

    def __post_init__(self) -> None:
        called = f"claim {self.id}" if isinstance(self.id, str) else "a claim"
        for name, rule in FIELDS.items():
            conform(rule, f"{called}: {name}", getattr(self, name))
        if self.test == "proportion" and not 0 <= self.margin <= 1:
            raise SpecError(
                f"claim {self.id}: margin={self.margin!r}, expected a share from 0 to 1; "
                "test='proportion' compares a share of prompts with the margin"
            )
        if self.test == "equivalent" and not self.margin > 0:
            raise SpecError(
                f"claim {self.id}: margin={self.margin!r}, but nothing is shown to be within 0; "
                "give the smallest difference that would matter"
            )
        if self.planned_effect is not None:
            self._check_plan(self.planned_effect)
        if self.registered and moment(self.registered) is None:
            raise SpecError(
                f"claim {self.id}: registered={self.registered!r}, expected an ISO date or time, "
                "such as 2026-11-28"
            )

    def _check_plan(self, planned: float) -> None:
        has_spread = self.planned_sd > 0 or self.test == "proportion"
        if not (self.planned_from and has_spread):
            raise SpecError(
                f"claim {self.id}: planned_effect needs planned_sd above 0 and planned_from; "
                "planned_from says where both numbers come from, such as a pilot run"
            )
        if self.margin == (abs(planned) if self.test == "equivalent" else planned):
            raise SpecError(
                f"claim {self.id}: the planned effect is the margin ({self.margin:g}), so no "
                f"number of {self.unit}s tells them apart; plan an effect on one side of it"
            )

    @property
    def kind(self) -> str:
        """`invariant` if the claim must hold for every prompt, else `empirical`."""
        return "invariant" if self.test == "always" else "empirical"

    def __str__(self) -> str:
        return self.id


@dataclass(frozen=True)
class Finding:
    """What the data said about a claim.

    Every p is two-sided. The corrected ones decide the verdict. NaN stands for what could not be
    computed.

    Attributes:
        claim: The claim's id.
        statement: As in the `Claim`.
        kind: `invariant` or `empirical`.
        verdict: SUPPORTED, REFUTED or INCONCLUSIVE; or INAPPLICABLE, if the claim cannot be judged
            on this model whatever the data.
        reason: What led to the verdict.
        estimate: The mean, pseudomedian or share of the statistic. Of a map, the mean in its
            largest cell.
        low: The lower end of the estimate's 95 % interval.
        high: The upper end of the estimate's 95 % interval.
        effect_size: Cohen's dz of a mean, rank-biserial correlation of a pseudomedian, Cohen's h of
            a share.
        n: How many prompts had a value.
        unit: As in the `Claim`.
        statistic: As in the `Claim`.
        test: As in the `Claim`.
        margin: As in the `Claim`.
        margin_reason: As in the `Claim`.
        p: How likely data this favourable to the claim would be if it were false. SUPPORTED needs
            it below alpha.
        p_corrected: `p`, corrected for the claim's family.
        p_against: How likely data this unfavourable to the claim would be if it were true. REFUTED
            needs it below alpha.
        p_against_corrected: `p_against`, corrected for the claim's family.
        family: The name of the family, which is the claim's id if it has none.
        control: What the control was, in words.
        control_estimate: The estimate of the control.
        control_holds: Whether the control worked, which means that it did *not* support the claim.
        estimand: As in the `Claim`.
        alpha: As in the `Claim`.
        refuted_by: As in the `Claim`.
        details: Of a map, its largest cell, the number of cells, and how many are significant.
        context: The experiment, config, variant and model, when the claim was registered, and when
            the prompts were drawn.
    """

    claim: str
    statement: str
    kind: str
    verdict: Verdict
    reason: str
    estimate: float
    low: float
    high: float
    effect_size: float
    n: int
    unit: str
    statistic: str
    test: str
    margin: float
    margin_reason: str
    p: float
    p_corrected: float
    p_against: float
    p_against_corrected: float
    family: str
    control: str
    control_estimate: float
    control_holds: bool
    estimand: str = "mean"
    alpha: float = ALPHA
    refuted_by: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The claim's id, followed by the variant if its experiment has several configs."""
        variant = self.context.get("variant")
        return f"{self.claim} ({variant})" if variant else self.claim

    def _repr_html_(self) -> str:
        from tempo.viewing.objects import finding_html

        return finding_html(self)

    def record(self) -> dict[str, Any]:
        """The finding as JSON-ready values, with the schema's version. NaN becomes None."""
        record: dict[str, Any] = {"schema": SCHEMA}
        for name, value in asdict(self).items():
            is_nan = isinstance(value, float) and math.isnan(value)
            record[name] = None if is_nan else value
        return record


class Standing(NamedTuple):
    """Whether a finding can confirm its claim.

    Attributes:
        confirms: Whether the prompts were drawn after the claim was registered.
        why: That in words, with both dates.
    """

    confirms: bool
    why: str

    @property
    def word(self) -> str:
        """The standing in one word."""
        return "confirmatory" if self.confirms else "exploratory"


def standing(finding: Finding) -> Standing:
    """Whether a finding is confirmatory: only if its prompts were drawn after its claim was fixed.

    Dates are compared in UTC. A date without a time counts as the whole day.

    Example:
        >>> context = {"registered": "2026-11-28", "drawn": "2026-11-29"}
        >>> finding = judge(Claim("a.b", "", "", float, "less", "", float, ""), [0.1], context)
        >>> standing(finding).why
        'confirmatory: registered 2026-11-28, prompts drawn 2026-11-29'
    """
    registered, drawn = (str(finding.context.get(name) or "") for name in ("registered", "drawn"))
    first, then = moment(registered, end=True), moment(drawn)
    if first is None or then is None:
        missing = "when its prompts were drawn" if first else "when it was registered"
        return Standing(False, f"exploratory: nothing says {missing}")
    dates = f"registered {registered}, prompts drawn {drawn}"
    if then > first:
        return Standing(True, f"confirmatory: {dates}")
    return Standing(False, f"exploratory, as its prompts were known before: {dates}")


def moment(text: str, *, end: bool = False) -> datetime | None:
    """An ISO date or time as a time in UTC, None if it is neither.

    Args:
        text: The date or time.
        end: Whether a date stands for the last moment of its day instead of the first.
    """
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    if end and len(text) == len("2026-11-28"):
        found = datetime.combine(found.date(), time.max)
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


@checked(claim=CLAIM, cases=several(lambda case: case, "cases"), context=optional(mapping))
def judge(claim: Claim, cases: Sequence[Case], context: Mapping[str, Any] | None = None) -> Finding:
    """The finding of one claim over `cases`, before the correction for its family (`correct`).

    Args:
        claim: The claim to decide.
        cases: What was measured, one case for each prompt.
        context: Kept in the finding: the experiment, config, variant and model.

    Raises:
        SpecError: if the claim's statistic gives values that its test cannot use.

    Example:
        >>> claim = Claim(
        ...     id="seen",
        ...     statement="Siblings get more attention than the margin.",
        ...     statistic="mean attention weight",
        ...     values=lambda case: case["visible"],
        ...     test="greater",
        ...     margin=0.01,
        ...     refuted_by="a mean below 0.01",
        ...     control=lambda case: case["isolated"],
        ...     control_statement="isolated mode",
        ... )
        >>> cases = [{"visible": 0.1 + 0.01 * i, "isolated": 0.0} for i in range(12)]
        >>> finding = judge(claim, cases)
        >>> finding.verdict, round(finding.estimate, 3), finding.n
        ('SUPPORTED', 0.155, 12)
    """
    result = _test(claim, _values(claim, claim.values, cases))
    control = _test(claim, _values(claim, claim.control, cases))
    holds = control.verdict != "SUPPORTED"
    verdict, reason = result.verdict, result.reason
    if verdict == "SUPPORTED" and control.n == 0:
        verdict = "INCONCLUSIVE"
        reason = "its control had no data, so the claim could not have failed"
    elif verdict == "SUPPORTED" and not holds:
        verdict = "INCONCLUSIVE"
        reason = f"the control supports it as well ({claim.control_statement})"
    found = result.found
    return Finding(
        claim=claim.id,
        statement=claim.statement,
        kind=claim.kind,
        verdict=verdict,
        reason=reason,
        estimate=found.estimate,
        low=found.low,
        high=found.high,
        effect_size=found.effect_size,
        n=result.n,
        unit=claim.unit,
        statistic=claim.statistic,
        test=claim.test,
        margin=claim.margin,
        margin_reason=claim.margin_reason,
        p=found.p,
        p_corrected=found.p,
        p_against=found.p_against,
        p_against_corrected=found.p_against,
        family=claim.family or claim.id,
        control=claim.control_statement,
        control_estimate=control.found.estimate,
        control_holds=holds,
        estimand=claim.estimand,
        alpha=claim.alpha,
        refuted_by=claim.refuted_by,
        details=dict(found.details or {}),
        context=dict(context or {}),
    )


@checked(claim=CLAIM, reason=words, context=optional(mapping))
def inapplicable(claim: Claim, reason: str, context: Mapping[str, Any] | None = None) -> Finding:
    """The finding of a claim that cannot be judged on this model, and why.

    It counts for nothing: neither for the claim nor against it.

    Args:
        claim: The claim that is not judged.
        reason: What the model has, or lacks, that keeps the claim from being judged.
        context: As for `judge`.

    Example:
        >>> claim = Claim("a.b", "Rows sum to one.", "", float, "always", "", float, "")
        >>> finding = inapplicable(claim, "a sink takes a part of each row")
        >>> finding.verdict, finding.n, finding.reason
        ('INAPPLICABLE', 0, 'not applicable: a sink takes a part of each row')
    """
    return replace(
        judge(claim, (), context), verdict="INAPPLICABLE", reason=f"not applicable: {reason}"
    )


@checked(findings=several(instance("Finding", "judge"), "findings"), declared=mapping)
def correct(findings: Sequence[Finding], declared: Mapping[str, int]) -> list[Finding]:
    """The findings with p-values corrected by Holm, each over its declared family.

    A verdict that does not survive the correction becomes INCONCLUSIVE.

    `p` and `p_against` are corrected separately. As each is two-sided, false verdicts of both kinds
    together stay at alpha.

    Args:
        findings: The findings of one run, of any families.
        declared: How many empirical claims each family has, run or not (`declared_sizes`). A claim
            that was not run counts as the least significant one. So a selection of claims is never
            corrected less than the whole family would be.
    """
    out = list(findings)
    for family in {finding.family for finding in findings}:
        members = [
            i for i, finding in enumerate(findings) if finding.family == family and _has_p(finding)
        ]
        size = declared.get(family, 0)
        supporting = statistics.holm([findings[i].p for i in members], size)
        opposing = statistics.holm([findings[i].p_against for i in members], size)
        for i, p, against in zip(members, supporting, opposing, strict=True):
            out[i] = _survivor(replace(out[i], p_corrected=p, p_against_corrected=against))
    return out


def _has_p(finding: Finding) -> bool:
    return finding.kind == "empirical" and not math.isnan(finding.p)


def _survivor(finding: Finding) -> Finding:
    """The finding, INCONCLUSIVE if its verdict did not survive the correction."""
    raw, corrected = {
        "SUPPORTED": (finding.p, finding.p_corrected),
        "REFUTED": (finding.p_against, finding.p_against_corrected),
        "INCONCLUSIVE": (0.0, 0.0),
        "INAPPLICABLE": (0.0, 0.0),
    }[finding.verdict]
    if corrected < finding.alpha:
        return finding
    reason = f"p = {raw:.3g} does not survive the correction for its family ({corrected:.3g})"
    return replace(finding, verdict="INCONCLUSIVE", reason=reason)


@checked(claims=several(CLAIM, "claims"))
def declared_sizes(claims: Iterable[Claim]) -> dict[str, int]:
    """How many empirical claims each family declares, by the family's name."""
    return dict(Counter(claim.family or claim.id for claim in claims if claim.kind == "empirical"))


@checked(claim=CLAIM, family_size=whole(1), power=number(0, 1, inside=True))
def num_needed(claim: Claim, family_size: int = 1, power: float = POWER) -> int | None:
    """How many prompts decide the claim with this power, if the planned effect is true.

    The expected verdict is SUPPORTED if the planned effect is on the claim's side of the margin,
    else REFUTED. Holm's correction is taken at its strictest, which is Bonferroni's.

    Args:
        claim: A claim with a planned effect.
        family_size: How many claims are corrected together.
        power: The chance to reach the expected verdict.

    Returns:
        The number of prompts. None for an invariant, and for a claim without a planned effect.
    """
    if claim.kind == "invariant" or claim.planned_effect is None:
        return None
    alpha = claim.alpha / family_size
    if claim.test == "proportion":
        return statistics.num_for_share(claim.planned_effect, claim.margin, alpha, power)
    if claim.test == "equivalent":
        distance = claim.margin - abs(claim.planned_effect)
        if claim.planned_effect == 0:
            # In the middle of the margins either side can fail, each with half of the chance.
            power = 1 - (1 - power) / 2
    else:
        distance = claim.planned_effect - claim.margin
    if claim.test == "somewhere":
        alpha /= claim.cells
    needed = statistics.num_for_mean(abs(distance), claim.planned_sd, alpha, power)
    if claim.estimand == "pseudomedian":
        return math.ceil(needed / statistics.LEAST_EFFICIENCY)
    return needed


_NOTHING = Result(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan)


class _Outcome(NamedTuple):
    """What the data say about one statistic, before the control is considered."""

    verdict: Verdict
    reason: str
    n: int
    found: Result = _NOTHING


def _values(claim: Claim, statistic: Statistic, cases: Sequence[Case]) -> np.ndarray:
    """The statistic of each case that has one: [n], or [n, ...] of maps."""
    found = [value for value in map(statistic, cases) if value is not None]
    try:
        values = np.array(found, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"claim {claim.id}: its statistic gives no numbers, or maps of different shapes "
            f"({error}); return a number, a truth value, or a map of one shape for all prompts"
        ) from None
    is_true_or_false = np.isin(values[np.isfinite(values)], (0, 1)).all()
    if claim.test in ("always", "proportion") and not is_true_or_false:
        raise SpecError(
            f"claim {claim.id}: test={claim.test!r} needs a statistic that is true or false, "
            f"got {values[:3].tolist()}"
        )
    is_map = values.ndim > 1
    if len(values) and is_map != (claim.test == "somewhere"):
        raise SpecError(
            f"claim {claim.id}: test={claim.test!r} got values of shape {values.shape[1:]}; "
            "test `somewhere` is for maps, every other test is for one number a prompt"
        )
    return values


def _test(claim: Claim, values: np.ndarray) -> _Outcome:
    """The outcome of the claim's test, or the reason why these values decide nothing."""
    n = len(values)
    if n == 0:
        return _Outcome("INCONCLUSIVE", "no prompt has anything to say about it", n)
    num_not_finite = int((~np.isfinite(values)).sum())
    if num_not_finite:
        reason = f"{num_not_finite} of {values.size} values are not finite"
        return _Outcome("INCONCLUSIVE", reason, n)
    if claim.test == "always":
        return _always(values)
    if n < MIN_UNITS:
        found = _NOTHING._replace(estimate=float(values.mean()))
        reason = f"{n} {claim.unit}s, at least {MIN_UNITS} are needed"
        return _Outcome("INCONCLUSIVE", reason, n, found)
    if claim.test == "proportion":
        return _decide(claim, n, statistics.share_test(int(values.sum()), n, claim.margin))
    if np.ptp(values) <= statistics.TIE * np.abs(values).max():
        same = float(values.flat[0])
        found = _NOTHING._replace(estimate=same, low=same, high=same)
        reason = f"all {n} values are {same:.3g}: no spread to judge by"
        return _Outcome("INCONCLUSIVE", reason, n, found)
    if claim.test == "somewhere":
        return _decide(claim, n, statistics.map_test(values, claim.margin))
    if claim.estimand == "pseudomedian":
        return _decide(claim, n, statistics.pseudomedian_test(values, claim.test, claim.margin))
    return _decide(claim, n, statistics.mean_test(values, claim.test, claim.margin))


def _always(values: np.ndarray) -> _Outcome:
    """The outcome of an invariant. One violation refutes it.

    The interval is Clopper and Pearson's, of the share of prompts for which it is true.
    """
    n, held = len(values), int(values.sum())
    found = statistics.share_test(held, n, 1.0)
    found = found._replace(effect_size=math.nan, p=math.nan, p_against=math.nan)
    if held == n:
        return _Outcome("SUPPORTED", f"true for all {n}", n, found)
    return _Outcome("REFUTED", f"violated by {n - held} of {n}", n, found)


def _decide(claim: Claim, n: int, found: Result) -> _Outcome:
    """The verdict of an empirical claim from its p-values, with the reason in words."""
    wanted = {
        "greater": f"above {claim.margin:g}",
        "less": f"below {claim.margin:g}",
        "equivalent": f"within ±{claim.margin:g}",
        "proportion": f"a share above {claim.margin:g}",
        "somewhere": f"above {claim.margin:g} somewhere",
    }[claim.test]
    if found.details:
        significant, cells = found.details["significant"], found.details["cells"]
        wanted += f" ({significant} of {cells} cells, most in {found.details['cell']})"
    if found.p < claim.alpha:
        return _Outcome("SUPPORTED", f"{wanted} (p = {found.p:.2g})", n, found)
    if found.p_against < claim.alpha:
        reason = f"not {wanted}: the opposite is (p = {found.p_against:.2g})"
        return _Outcome("REFUTED", reason, n, found)
    reason = (
        f"neither {wanted} (p = {found.p:.2g}) "
        f"nor the opposite (p = {found.p_against:.2g}) is shown"
    )
    if found.note:
        reason += f"; {found.note}"
    return _Outcome("INCONCLUSIVE", reason, n, found)
