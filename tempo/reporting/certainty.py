"""What a report says about itself: how sure it is, what its roles mean, what makes it doubtful."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tempo.claims import Finding, standing
from tempo.records import AGAIN
from tempo.reporting.answers import UNDETERMINED
from tempo.reporting.findings import ROLES, alarms, counts, deciding, role
from tempo.reporting.report import Report
from tempo.text import number

SUITES = "; "  # between the suites that a record describes
MOST_DAMAGED = 3  # damaged parts that a report names
ROLE_MEANS = {
    "primary": "they decide the answers; p Holm-corrected over their whole family, run or not",
    "secondary": "p Holm-corrected within their experiment only",
    "invariant": "must hold exactly everywhere; no statistics",
}


def certainty(report: Report) -> list[str]:
    """How sure it is, in sentences computed from the findings."""
    lines = [counted_claims(report)]
    if ps := _deciding_ps(report):
        lines.append(
            f"Behind these answers: {len(ps)} verdicts, corrected p at most {number(max(ps))}."
        )
    lines += [*_standing(report.findings), *_order(report)]
    return [*lines, f"{measured_on([report])} Other models and prompts may differ."]


def _standing(findings: Sequence[Finding]) -> list[str]:
    """Whether the findings can confirm their claims, in a sentence."""
    empirical = [f for f in findings if f.kind == "empirical"]
    confirm = sum(standing(f).confirms for f in empirical)
    if not empirical:
        return []
    if not confirm:
        return ["All of it is exploratory: nothing says that its prompts were drawn afterwards."]
    return [f"{confirm} of {len(empirical)} empirical findings are confirmatory."]


def _order(report: Report) -> list[str]:
    """Of which configs the numbers of a headline claim are, in a sentence, where it has several."""
    behind = {claim for answer in report.conclusions.headlines for claim in answer.claims}
    configs: dict[str, list[str]] = {}
    for f in report.findings:
        if f.claim in behind and f.n and (variant := f.context.get("variant")):
            configs.setdefault(f.claim, []).append(str(variant))
    orders = dict.fromkeys(tuple(names) for names in configs.values() if len(names) > 1)
    return [f"Where one thing has several numbers: {', then '.join(names)}." for names in orders]


def measured_on(reports: Sequence[Report]) -> str:
    """What the intervals are about: the suite, as its record describes it.

    Several are described under Provenance.
    """
    suites = dict.fromkeys(report.suite for report in reports if report.suite)
    said = SUITES.join(suites)
    if SUITES in said:
        said = "the prompts that Provenance describes"
    return f"95 % intervals over {said or 'prompts'}."


def counted_claims(report: Report) -> str:
    """How many claims of each role have which verdict, and whether their controls behaved."""
    found = report.findings
    said = [f"{_role_of(own, name)} ({counts(own)})" for name, own in _by_role(found)]
    behaved = sum(f.control_holds for f in found)
    controls = f"{behaved} of {len(found)} negative controls behaved"
    if behaved == len(found):
        controls = "all negative controls behaved"
    claims = "claim" if len(found) == 1 else "claims"
    counted = f"{len(found)} registered {claims}: {', '.join(said) or 'none'}; {controls}."
    if report.quick_look:
        counted += f" A quick look at {report.quick_look} prompts."
    return counted


def _deciding_ps(report: Report) -> list[float]:
    """The corrected p of each verdict behind the headline answers that are decided by a rule."""
    behind: set[str] = set()
    for answer in report.conclusions.headlines:
        if answer.rule and answer.short != UNDETERMINED:
            behind.update(answer.claims)
    decided = [f for f in report.findings if f.claim in behind and f.verdict != "INCONCLUSIVE"]
    return [p for f in decided if math.isfinite(p := deciding(f)[1])]


def alarms_of(report: Report) -> list[str]:
    """What makes the report doubtful, before anything it says."""
    lines = alarms(report.findings)
    if report.damaged:
        more = len(report.damaged) - MOST_DAMAGED
        lines.append(
            f"Damaged and left out of {report.root}/: {'; '.join(report.damaged[:MOST_DAMAGED])}"
            f"{f' and {more} more' if more > 0 else ''}. 'tempo doctor --repair' says how to get "
            "it back."
        )
    if report.outdated:
        lines.append(
            "The recorded answers are left out: they were drawn from other findings than these. "
            f"Their record is outdated; {AGAIN}."
        )
    return lines


def roles(findings: Sequence[Finding]) -> str:
    """What the roles of claims mean, and how many claims have each."""
    said = [f"{_role_of(own, name)} ({ROLE_MEANS[name]})" for name, own in _by_role(findings)]
    return "; ".join(said) + "."


def standings(findings: Sequence[Finding]) -> str:
    """How many findings can confirm their claims, and what that takes."""
    empirical = [f for f in findings if f.kind == "empirical"]
    confirm = sum(standing(f).confirms for f in empirical)
    return (
        f"{confirm} of {len(empirical)} empirical findings are confirmatory: their prompts were "
        "drawn after the claim was registered. The others are exploratory: their prompts were "
        "known before."
    )


def _by_role(findings: Sequence[Finding]) -> list[tuple[str, list[Finding]]]:
    """The findings of each role that any has."""
    found = [(name, [f for f in findings if role(f) == name]) for name in ROLES]
    return [(name, own) for name, own in found if own]


def _role_of(own: Sequence[Finding], name: str) -> str:
    return f"{len(own)} {name}{'s' if name == 'invariant' and len(own) > 1 else ''}"
