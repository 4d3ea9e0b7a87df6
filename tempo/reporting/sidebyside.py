"""Several models in one report: their answers and their claims side by side, and where they disagree."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from tempo.claims import Finding
from tempo.reporting.answers import UNDETERMINED, Answer, questions, scenario
from tempo.reporting.comparison import UNCHANGED, what_changed
from tempo.reporting.conclusion import just_fine, recommended_mode
from tempo.reporting.findings import (
    SIGNS,
    confirmatory_first,
    deciding,
    interval,
    markdown_cell,
    role,
)
from tempo.reporting.report import Report, names_of
from tempo.reporting.table import badge, effect_svg
from tempo.text import escaped, number

AGREE, OPEN, DIFFER = "", "open for some", "they differ"  # of answers
OPPOSITE, DECIDED, MISSING, SIZE = (
    "opposite verdicts",
    "decided for some only",
    "not measured for all",
    "another size",
)  # of claims
MEANING = (
    f"{OPPOSITE.capitalize()}: supported for one model, refuted for another. {DECIDED.capitalize()}: undecided for a model, which is not "
    f"evidence that the models differ. {SIZE.capitalize()}: the same verdict, but 95 % intervals that do not overlap."
)


@dataclass(frozen=True)
class Row:
    """One claim in all models: what was found in each, if it was measured there."""

    label: str
    role: str
    statement: str
    found: tuple[Finding | None, ...]

    @property
    def marker(self) -> str:
        """The most telling disagreement of the models about it; empty if there is none."""
        known = [f for f in self.found if f]
        verdicts = {f.verdict for f in known}
        if {"SUPPORTED", "REFUTED"} <= verdicts:
            return OPPOSITE
        if len(verdicts) > 1:
            return DECIDED
        if len(known) < len(self.found):
            return MISSING
        return (
            SIZE
            if any(what_changed(*pair) != UNCHANGED for pair in combinations(known, 2))
            else AGREE
        )


def claim_rows(reports: Sequence[Report]) -> list[Row]:
    """A row for each claim and config that any model has, the confirmatory ones first."""
    by_label = [{f.label: f for f in report.findings} for report in reports]
    first = {f.label: f for report in reversed(reports) for f in report.findings}
    in_order = dict.fromkeys(f.label for report in reports for f in report.findings)
    return [
        Row(f.label, role(f), f.statement, tuple(found.get(f.label) for found in by_label))
        for f in confirmatory_first(first[label] for label in in_order)
    ]


def all_answers(report: Report) -> list[Answer]:
    """The conclusion, the scenario, the four questions, the recommended mode."""
    found = report.findings
    return [just_fine(found), scenario(found), *questions(found), recommended_mode(found)]


def answer_marker(answers: Sequence[Answer]) -> str:
    """Whether the models' answers to one question differ, or are open for some."""
    shorts = {answer.short for answer in answers}
    if len(shorts - {UNDETERMINED}) > 1:
        return DIFFER
    return OPEN if len(shorts) > 1 else AGREE


def opposed(reports: Sequence[Report]) -> str:
    """On how many claims the models have opposite verdicts."""
    rows = claim_rows(reports)
    return (
        f"Opposite verdicts on {sum(row.marker == OPPOSITE for row in rows)} of {len(rows)} claims"
    )


def said(reports: Sequence[Report]) -> list[str]:
    """Where the models disagree, in sentences."""
    names = names_of(reports)
    by_question = list(zip(*map(all_answers, reports), strict=True))
    differ = [answers for answers in by_question if answer_marker(answers) == DIFFER]
    lines = [
        f"{answers[0].question} "
        + "; ".join(f"{name}: {a.short}" for name, a in zip(names, answers, strict=True))
        + "."
        for answers in differ
    ]
    rows = claim_rows(reports)
    opposite = [row.label for row in rows if row.marker == OPPOSITE]
    counted = opposed(reports) + (f" ({', '.join(opposite)})" if opposite else "")
    rest = [
        f"{n} {what}"
        for what in (DECIDED, SIZE, MISSING)
        if (n := sum(row.marker == what for row in rows))
    ]
    counted = "; ".join([counted, *rest]) + "."
    head = f"The models' answers differ on {len(differ)} of {len(by_question)} questions" + (
        ":" if differ else "."
    )
    return [head, *lines, counted]


def side_by_side_html(reports: Sequence[Report], at: Sequence[str]) -> str:
    """Both tables; `at`: what the ids of each model's part of the page begin with."""
    names = [_text(name) for name in names_of(reports)]
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    first, *lines = said(reports)
    listed = f"<p>{_text(first)}</p><ul>{''.join(f'<li>{_text(line)}</li>' for line in lines[:-1])}</ul><p>{_text(lines[-1])}</p>"
    answers = ""
    for entries in zip(*map(all_answers, reports), strict=True):
        mark = answer_marker(entries)
        cells = "".join(
            f'<td data-label="{name}">{_text(a.short)}</td>'
            for name, a in zip(names, entries, strict=True)
        )
        answers += f'<tr{_row_class(mark)}><td data-label="Question">{_text(entries[0].question)}</td>{cells}{_mark(mark)}</tr>'
    claims = ""
    for row in claim_rows(reports):
        cells = "".join(
            _cell(f, row, name, prefix)
            for f, name, prefix in zip(row.found, names, at, strict=True)
        )
        claim = f"<code>{_text(row.label)}</code><small>{row.role}</small>{_text(row.statement)}"
        claims += f'<tr{_row_class(row.marker)}><td data-label="Claim">{claim}</td>{cells}{_mark(row.marker)}</tr>'

    def table(label: str, what: str, body: str) -> str:
        head = f'<thead><tr><th scope="col">{what}</th>{heads}<th scope="col">Disagreement</th></tr></thead>'
        return (
            f'<div class="tempo-scroll" tabindex="0" role="region" aria-label="{label}"><table class="tempo-table tempo-stacked">'
            f"{head}<tbody>{body}</tbody></table></div>"
        )

    return (
        f'<section id="tempo-models"><h2>The models side by side</h2>{listed}{table("Answers of the models", "Question", answers)}'
        f"<h3>Claim by claim</h3><p><small>{_text(MEANING)}</small></p>{table('Claims of the models', 'Claim', claims)}"
        "<p><small>Estimate with 95 % interval; the pictures of a row share a scale, the shaded region is where the claim would hold."
        "</small></p></section>"
    )


def side_by_side_markdown(reports: Sequence[Report]) -> list[str]:
    """The same as lines of Markdown."""
    names = [markdown_cell(name) for name in names_of(reports)]
    first, *lines = map(markdown_cell, said(reports))
    out = [
        "## The models side by side",
        "",
        first,
        "",
        *(f"- {line}" for line in lines[:-1]),
        "",
        lines[-1],
        "",
    ]
    rule = "|---|" + "---|" * len(names) + "---|"
    out += [f"| question | {' | '.join(names)} | disagreement |", rule]
    for entries in zip(*map(all_answers, reports), strict=True):
        cells = [entries[0].question, *(answer.short for answer in entries), answer_marker(entries)]
        out.append("| " + " | ".join(map(markdown_cell, cells)) + " |")
    out += [
        "",
        markdown_cell(MEANING),
        "",
        f"| claim | role | {' | '.join(names)} | disagreement |",
        "|---" + rule,
    ]
    for row in claim_rows(reports):
        cells = [row.label, row.role, *(_in_words(f) for f in row.found), row.marker]
        out.append("| " + " | ".join(map(markdown_cell, cells)) + " |")
    return [*out, ""]


def _in_words(f: Finding | None) -> str:
    return f"{SIGNS[f.verdict]} {f.verdict.lower()} {interval(f)}, n {f.n}" if f else "not measured"


def _cell(f: Finding | None, row: Row, name: str, at: str) -> str:
    if f is None:
        return f'<td data-label="{name}">not measured</td>'
    p = "" if f.kind == "invariant" else f", p {number(deciding(f)[1])}"
    others = [other for other in row.found if other]
    return f'<td data-label="{name}" class="tempo-number">{badge(f)}<br>{effect_svg(f, others)}<br>{interval(f)}<small>n {f.n}{p}</small></td>'


def _row_class(marker: str) -> str:
    return ' class="tempo-differs"' if marker in (DIFFER, OPPOSITE) else ""


def _mark(marker: str) -> str:
    return f'<td data-label="Models">{f"<b>{marker}</b>" if marker in (DIFFER, OPPOSITE) else marker or "–"}</td>'


def _text(value: object) -> str:
    return html.escape(escaped(str(value)))
