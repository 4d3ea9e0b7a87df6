"""Two records side by side: before and after a change, or model A and model B."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tempo.claims import Finding
from tempo.reporting.findings import SIGNS, interval, markdown_cell, markdown_row
from tempo.text import html_text, number

UNCHANGED = "nothing to speak of"
HEAD = ("claim", "verdict", "effect [95 % interval]", "difference", "what changed")


@dataclass(frozen=True)
class Comparison:
    """The findings of two records, paired by claim and config.

    names: which is which. answers: the headline answers of each, in short; empty if not known.
    """

    names: tuple[str, str]
    pairs: tuple[tuple[Finding | None, Finding | None], ...]
    answers: tuple[str, str] = ("", "")

    @property
    def changed(self) -> list[tuple[Finding | None, Finding | None]]:
        return [pair for pair in self.pairs if what_changed(*pair) != UNCHANGED]

    @property
    def labels(self) -> list[str]:
        """Each record's name, with its answers: `before (Just fine)`."""
        both = zip(self.names, self.answers, strict=True)
        return [f"{name} ({answers})" if answers else name for name, answers in both]


def compare_findings(
    first: Sequence[Finding],
    second: Sequence[Finding],
    names: tuple[str, str],
    answers: tuple[str, str] = ("", ""),
) -> Comparison:
    """The findings of both; those that only the second has come last."""
    one, two = ({f.label: f for f in findings} for findings in (first, second))
    pairs = tuple((one.get(label), two.get(label)) for label in {**one, **two})
    return Comparison(names, pairs, answers)


def what_changed(one: Finding | None, two: Finding | None) -> str:
    """The most telling difference of two findings about one claim."""
    if one is None or two is None:
        return "only in the second" if one is None else "only in the first"
    if one.verdict != two.verdict:
        return "verdict"
    ends = (one.low, one.high, two.low, two.high)
    if one.kind == "empirical" and all(map(math.isfinite, ends)):
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
    for pair in comparison.pairs:
        found = [f for f in pair if f]
        verdicts = [f"{SIGNS[f.verdict]} {f.verdict.lower()}" if f else "missing" for f in pair]
        effects = [interval(f) if f else "missing" for f in pair]
        both = len(found) == 2
        row = (
            found[0].label,
            " → ".join(dict.fromkeys(verdicts)),
            " → ".join(effects),
            number(found[1].estimate - found[0].estimate) if both else "n/a",
            what_changed(*pair),
        )
        rows.append(row)
    return rows


def comparison_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown."""
    first, second = map(markdown_cell, comparison.names)
    rows = [markdown_row(*row) for row in comparison_rows(comparison)]
    lines = [f"# {first} against {second}", "", markdown_cell(_said(comparison)), ""]
    lines += [f"| {' | '.join(HEAD)} |", "|---|---|---|--:|---|", *rows]
    return "\n".join(lines) + "\n"


def comparison_html(comparison: Comparison) -> str:
    """The comparison as a paragraph and a table."""
    head = "".join(f'<th scope="col">{name}</th>' for name in HEAD)
    body = ""
    for row in comparison_rows(comparison):
        cells = "".join(f"<td>{html_text(cell)}</td>" for cell in row)
        body += f"<tr>{cells}</tr>"
    return (
        f"<p>{html_text(_said(comparison))}</p>"
        '<div class="tempo-scroll" tabindex="0" role="region" aria-label="Comparison">'
        f'<table class="tempo-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _said(comparison: Comparison) -> str:
    first, second = comparison.labels
    verdicts = sum(what_changed(*pair) == "verdict" for pair in comparison.pairs)
    return (
        f"First: {first}. Second: {second}. Of {len(comparison.pairs)} claims "
        f"{len(comparison.changed)} changed, {verdicts} of them in verdict. Where the intervals "
        "overlap nothing is said to have changed, but that is no test that nothing did."
    )
