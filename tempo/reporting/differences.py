"""Whether two records differ: the same claims on the same prompts, tested prompt by prompt.

That two intervals overlap says little about a difference, because both vary with the same prompts.
So each prompt's two values are subtracted, and the mean of these differences is tested against 0 as
any claim is (`tempo.claims`), Holm-corrected over all claims that are compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tempo.claims import Claim, Finding, correct, judge
from tempo.reporting.findings import (
    PRIMARY,
    interval,
    markdown_cell,
    markdown_row,
    role,
)
from tempo.reporting.prompts import section_of, values_of
from tempo.reporting.report import Report, names_of
from tempo.text import html_text, number

FAMILY = "differences"
MOST_MOVED = 10
FEWEST = 8  # prompts that both records measured; fewer are not worth a test
SHOWN, NOT_SHOWN = "differ", "no difference shown"
HOW = (
    "Each prompt's two values are subtracted. The mean of these differences is tested against 0, "
    "by the test that decides claims, and p is Holm-corrected over all rows. As a control, every "
    "other difference is turned round, in order of size: of these no row may differ."
)


class Moved(NamedTuple):
    """One prompt, and a claim's value on it in both records."""

    prompt: str
    first: float
    other: float

    @property
    def by(self) -> float:
        return self.other - self.first


@dataclass(frozen=True)
class Difference:
    """How a claim's values differ between two records.

    label: of the claim and its config. finding: about the mean of the other's values less the
    first's. moved: the prompts that differ most, the largest difference first.
    """

    label: str
    statement: str
    finding: Finding
    moved: tuple[Moved, ...]

    @property
    def short(self) -> str:
        """Whether they differ, in words."""
        return NOT_SHOWN if self.finding.verdict == "INCONCLUSIVE" else SHOWN

    @property
    def p(self) -> float:
        """The smaller of the corrected p for either sign."""
        ps = (self.finding.p_corrected, self.finding.p_against_corrected)
        return min((p for p in ps if math.isfinite(p)), default=math.nan)


def differences(first: Report, other: Report) -> list[Difference]:
    """How the primary claims differ (without any, all that statistics decide), in their order."""
    chosen = [f for f in first.findings if f.kind == "empirical"]
    chosen = [f for f in chosen if role(f) == PRIMARY] or chosen
    by_label = {finding.label: finding for finding in other.findings}
    found = []
    for finding in chosen:
        twin = by_label.get(finding.label)
        moved = _pairs((first, finding), (other, twin)) if twin else []
        if len(moved) >= FEWEST:
            found.append((finding, moved, judge(_claim(finding), _cases(moved))))
    corrected = correct([judged for *_, judged in found], {FAMILY: len(found)})
    out = []
    for (finding, moved, _), judged in zip(found, corrected, strict=True):
        most = sorted(moved, key=lambda m: (-abs(m.by), m.prompt))[:MOST_MOVED]
        out.append(Difference(finding.label, finding.statement, judged, tuple(most)))
    return out


def _pairs(first: tuple[Report, Finding], other: tuple[Report, Finding]) -> list[Moved]:
    """The values of the prompts that have one in both records."""
    (mine, theirs) = (_by_prompt(*each) for each in (first, other))
    return [Moved(prompt, mine[prompt], theirs[prompt]) for prompt in mine if prompt in theirs]


def _by_prompt(report: Report, finding: Finding) -> dict[str, float]:
    section, values = section_of(report, finding), values_of(report, finding)
    if section is None or values is None:
        return {}
    rows = zip(section.prompts, values.claim, strict=True)
    return {prompt.text: value for prompt, value in rows if value is not None}


def _claim(finding: Finding) -> Claim:
    return Claim(
        id=f"{FAMILY}.{finding.claim}",
        statement=f"The other record's value is larger: {finding.statement}",
        statistic=f"difference of: {finding.statistic}",
        values=lambda case: case["by"],
        test="greater",
        refuted_by="a mean significantly below 0",
        control=lambda case: case["turned"],
        control_statement="every other difference turned round, in order of size",
        margin_reason="any difference",
        family=FAMILY,
    )


def _cases(moved: Sequence[Moved]) -> list[dict[str, float]]:
    """Each prompt's difference; and the same with every other sign turned, in order of size."""
    ordered = sorted(m.by for m in moved)
    return [{"by": by, "turned": by if i % 2 else -by} for i, by in enumerate(ordered)]


def compared(reports: Sequence[Report]) -> list[tuple[str, list[Difference]]]:
    """Each further record against the first, under a heading that names both."""
    names = names_of(reports)
    out = []
    for name, report in zip(names[1:], reports[1:], strict=True):
        if found := differences(reports[0], report):
            out.append((f"{name} less {names[0]}", found))
    return out


def summary(found: Sequence[Difference]) -> str:
    """How many claims differ, and on how many prompts."""
    differ = sum(each.short == SHOWN for each in found)
    sizes = [each.finding.n for each in found]
    prompts = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else f"{sizes[0]}"
    return f"{differ} of {len(found)} claims differ, paired on {prompts} prompts each."


def differences_html(reports: Sequence[Report]) -> str:
    """A table for each pair of records, and the prompts behind each of its rows."""
    tables = ""
    for heading, found in compared(reports):
        rows = "".join(map(_html_row, found))
        heads = ("Claim", "Difference [95 % interval]", "n", "p, corrected", "Models")
        head = "".join(f'<th scope="col">{name}</th>' for name in heads)
        label = html_text(heading)
        tables += (
            f"<h3>{label}</h3><p>{html_text(summary(found))}</p>"
            f'<div class="tempo-scroll" tabindex="0" role="region" aria-label="{label}">'
            f'<table class="tempo-table tempo-stacked"><thead><tr>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    if not tables:
        return ""
    return (
        '<section id="tempo-differences"><h2>Do the models differ?</h2>'
        f"<p><small>{html_text(HOW)}</small></p>{tables}</section>"
    )


def _html_row(each: Difference) -> str:
    f = each.finding
    listed = "".join(
        f"<li>{html_text(f'{m.prompt!r:.80}')}: {number(m.first)}, {number(m.other)}</li>"
        for m in each.moved
    )
    moved = f"<details><summary>The prompts that moved most</summary><ol>{listed}</ol></details>"
    stands_out = ' class="tempo-differs"' if each.short == SHOWN else ""
    alarm = "" if f.control_holds else " (its control differs as well)"
    return (
        f'<tr{stands_out}><td data-label="Claim"><code>{html_text(each.label)}</code><br>'
        f"{html_text(each.statement)}{moved}</td>"
        f'<td data-label="Difference" class="tempo-number">{interval(f)}</td>'
        f'<td data-label="n" class="tempo-number">{f.n}</td>'
        f'<td data-label="p" class="tempo-number">{number(each.p)}</td>'
        f'<td data-label="Models">{each.short}{alarm}</td></tr>'
    )


def differences_markdown(reports: Sequence[Report]) -> list[str]:
    """The same as lines of Markdown."""
    out: list[str] = []
    for heading, found in compared(reports):
        out += ["", f"### {markdown_cell(heading)}", "", markdown_cell(summary(found)), ""]
        out += [
            "| claim | difference [95 % interval] | n | p corrected | models |",
            "|---|--:|--:|--:|---|",
        ]
        for each in found:
            f = each.finding
            out.append(markdown_row(each.label, interval(f), str(f.n), number(each.p), each.short))
        most = max(found, key=lambda each: abs(each.finding.effect_size or 0.0))
        out += ["", markdown_cell(f"The prompts that moved most in {most.label}:"), ""]
        out += [
            f"- {markdown_cell(f'{m.prompt!r:.80}')}: {number(m.first)}, {number(m.other)}"
            for m in most.moved
        ]
    return ["## Do the models differ?", "", markdown_cell(HOW), *out, ""] if out else []
