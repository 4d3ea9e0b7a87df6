"""Two records side by side: before and after a change, or model A and model B."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tempo.claims import Finding
from tempo.reporting.answers import scenario
from tempo.reporting.findings import SIGNS, interval, markdown_cell
from tempo.text import escaped, number

UNCHANGED = "nothing to speak of"
HEAD = ("claim", "verdict", "effect [95 % interval]", "difference", "what changed")


@dataclass(frozen=True)
class Comparison:
    """The findings of two records, paired by claim and config; `names` say which is which."""

    names: tuple[str, str]
    scenarios: tuple[str, str]
    pairs: tuple[tuple[Finding | None, Finding | None], ...]

    @property
    def changed(self) -> list[tuple[Finding | None, Finding | None]]:
        return [pair for pair in self.pairs if what_changed(*pair) != UNCHANGED]


def compare_findings(
    first: Sequence[Finding], second: Sequence[Finding], names: tuple[str, str]
) -> Comparison:
    """The findings of both, those of the second that the first lacks last."""
    one, two = ({f.label: f for f in findings} for findings in (first, second))
    pairs = tuple((one.get(label), two.get(label)) for label in {**one, **two})
    return Comparison(names, (scenario(first).short, scenario(second).short), pairs)


def what_changed(one: Finding | None, two: Finding | None) -> str:
    """The most telling difference of two findings about one claim."""
    if one is None or two is None:
        return "only in the second" if one is None else "only in the first"
    if one.verdict != two.verdict:
        return "verdict"
    if one.kind == "empirical" and all(
        math.isfinite(x) for x in (one.low, one.high, two.low, two.high)
    ):
        if one.high < two.low or two.high < one.low:
            return "effect: the intervals do not overlap"
    elif one.estimate != two.estimate and not (
        math.isnan(one.estimate) and math.isnan(two.estimate)
    ):
        return "effect, without intervals to compare"
    return UNCHANGED


def comparison_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """A row for each claim: both verdicts, both effects, second minus first, what changed."""
    rows = []
    for one, two in comparison.pairs:
        known = one or two
        assert known is not None
        verdicts = [
            f"{SIGNS[f.verdict]} {f.verdict.lower()}" if f else "missing" for f in (one, two)
        ]
        effects = [interval(f) if f else "missing" for f in (one, two)]
        difference = number(two.estimate - one.estimate) if one and two else "n/a"
        rows.append(
            (
                known.label,
                " → ".join(dict.fromkeys(verdicts)),
                " → ".join(effects),
                difference,
                what_changed(one, two),
            )
        )
    return rows


def comparison_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown."""
    lines = [
        f"# {markdown_cell(comparison.names[0])} against {markdown_cell(comparison.names[1])}",
        "",
        markdown_cell(_said(comparison)),
        "",
    ]
    lines += ["| " + " | ".join(HEAD) + " |", "|---|---|---|--:|---|"]
    lines += [
        "| " + " | ".join(map(markdown_cell, row)) + " |" for row in comparison_rows(comparison)
    ]
    return "\n".join(lines) + "\n"


def comparison_html(comparison: Comparison) -> str:
    """The comparison as a paragraph and a table."""
    head = "".join(f'<th scope="col">{name}</th>' for name in HEAD)
    body = "".join(
        f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>"
        for row in comparison_rows(comparison)
    )
    return (
        f'<p>{_text(_said(comparison))}</p><div class="tempo-scroll" tabindex="0" role="region" aria-label="Comparison">'
        f'<table class="tempo-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _said(comparison: Comparison) -> str:
    (first, second), (before, after) = comparison.names, comparison.scenarios
    verdicts = sum(what_changed(*pair) == "verdict" for pair in comparison.pairs)
    return (
        f"First: {first} ({before}). Second: {second} ({after}). Of {len(comparison.pairs)} claims {len(comparison.changed)} changed, "
        f"{verdicts} of them in verdict. Intervals that overlap are called no change, which is not a test that there is none."
    )


def _text(value: object) -> str:
    return html.escape(escaped(str(value)))
