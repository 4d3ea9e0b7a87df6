"""Several models in one report: their answers and claims side by side, and where they disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tempo.claims import Finding
from tempo.reporting.answers import UNDETERMINED, Answer
from tempo.reporting.findings import (
    SIGNS,
    deciding,
    interval,
    markdown_cell,
    markdown_row,
    primary_first,
    role,
)
from tempo.reporting.prompts import claim_id, known, values_of
from tempo.reporting.report import Report, names_of
from tempo.reporting.table import aligned, badge, effect_svg
from tempo.text import html_text, number

AGREE = ""
# How answers of models disagree.
OPEN, DIFFER, UNASKED = "open for some", "they differ", "not asked of all"
# How claims of models disagree.
OPPOSITE, DECIDED = "opposite verdicts", "decided for some only"
MISSING = "not measured for all"
MEANING = (
    f"{OPPOSITE.capitalize()}: supported for one model, refuted for another. "
    f"{DECIDED.capitalize()}: undecided for a model, which is not evidence that the models differ. "
    "Whether values differ is tested prompt by prompt, and not by whether intervals overlap."
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
        return MISSING if len(known) < len(self.found) else AGREE


@dataclass(frozen=True)
class Question:
    """One question, and what each model's conclusions answer; None where they do not ask it."""

    asked: str
    answers: tuple[Answer | None, ...]

    @property
    def shorts(self) -> list[str]:
        """Each model's answer in a word."""
        return [answer.short if answer else "not asked" for answer in self.answers]

    @property
    def marker(self) -> str:
        """Whether the models' answers differ, or are open for some; empty if they agree."""
        shorts = {answer.short for answer in self.answers if answer}
        if len(shorts - {UNDETERMINED}) > 1:
            return DIFFER
        if None in self.answers:
            return UNASKED
        return OPEN if len(shorts) > 1 else AGREE


def claim_rows(reports: Sequence[Report]) -> list[Row]:
    """A row for each claim and config that any model has, the primary ones first."""
    by_label = [{f.label: f for f in report.findings} for report in reports]
    first: dict[str, Finding] = {}
    for found in by_label:
        for label, finding in found.items():
            first.setdefault(label, finding)
    return [
        Row(f.label, role(f), f.statement, tuple(found.get(f.label) for found in by_label))
        for f in primary_first(first.values())
    ]


def questions(reports: Sequence[Report]) -> list[Question]:
    """Each question that any model's conclusions answer by a rule, in their order."""
    by_question = [
        {answer.question: answer for answer in report.conclusions.explained} for report in reports
    ]
    asked: dict[str, None] = {}
    for answers in by_question:
        asked |= dict.fromkeys(answers)
    return [
        Question(question, tuple(answers.get(question) for answers in by_question))
        for question in asked
    ]


def answers_html(reports: Sequence[Report]) -> str:
    """The headline answers of the models beside each other, for the first screen."""
    names = [html_text(name) for name in names_of(reports)]
    by_question: dict[str, dict[int, str]] = {}
    for i, report in enumerate(reports):
        for answer in report.conclusions.headlines:
            by_question.setdefault(answer.question, {})[i] = answer.short
    rows = ""
    for question, shorts in by_question.items():
        cells = "".join(
            f'<td data-label="{name}"><b class="tempo-answer">'
            f"{html_text(shorts.get(i, 'not asked'))}</b></td>"
            for i, name in enumerate(names)
        )
        rows += f'<tr><td data-label="Question">{html_text(question)}</td>{cells}</tr>'
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("", *names))
    return (
        '<table class="tempo-table tempo-stacked tempo-answers"><thead>'
        f"<tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    )


def opposed(reports: Sequence[Report]) -> str:
    """On how many claims the models have opposite verdicts."""
    rows = claim_rows(reports)
    number_opposed = sum(row.marker == OPPOSITE for row in rows)
    return f"Opposite verdicts on {number_opposed} of {len(rows)} claims"


def said(reports: Sequence[Report]) -> list[str]:
    """Where the models disagree, in sentences: the first about questions, the last about claims."""
    names, asked, rows = names_of(reports), questions(reports), claim_rows(reports)
    differ = [question for question in asked if question.marker == DIFFER]
    head = f"The models' answers differ on {len(differ)} of {len(asked)} questions"
    lines = [f"{head}{':' if differ else '.'}" if asked else "These records answer no question."]
    for question in differ:
        answers = zip(names, question.shorts, strict=True)
        each = "; ".join(f"{name}: {short}" for name, short in answers)
        lines.append(f"{question.asked} {each}.")
    opposite = [row.label for row in rows if row.marker == OPPOSITE]
    counted = [opposed(reports) + (f" ({', '.join(opposite)})" if opposite else "")]
    for marker in (DECIDED, MISSING):
        if count := sum(row.marker == marker for row in rows):
            counted.append(f"{count} {marker}")
    return [*lines, f"{'; '.join(counted)}."]


def side_by_side_html(reports: Sequence[Report], at: Sequence[str]) -> str:
    """Both tables; `at` is what the ids of each report's part of the page begin with."""
    names = [html_text(name) for name in names_of(reports)]
    first, *lines, last = said(reports)
    listed = "".join(f"<li>{html_text(line)}</li>" for line in lines)
    answers, claims = "", ""
    for question in questions(reports):
        cells = "".join(
            f'<td data-label="{name}">{html_text(short)}</td>'
            for name, short in zip(names, question.shorts, strict=True)
        )
        asked = f'<td data-label="Question">{html_text(question.asked)}</td>'
        answers += _html_row(f"{asked}{cells}", question.marker)
    for row in claim_rows(reports):
        cells = "".join(
            _cell(f, row, name, report, prefix)
            for f, name, report, prefix in zip(row.found, names, reports, at, strict=True)
        )
        claim = (
            f'<td data-label="Claim"><span>{html_text(row.statement)}</span>'
            f'<small class="tempo-id">{html_text(row.label)}</small>'
            f"<small>{row.role}</small></td>"
        )
        claims += _html_row(f"{claim}{cells}", row.marker)
    return (
        '<section id="tempo-models"><h2>The models side by side</h2>'
        f"<p>{html_text(first)}</p><ul>{listed}</ul><p>{html_text(last)}</p>"
        f"{_html_table('Answers of the models', 'Question', names, answers)}"
        f"<h3>Claim by claim</h3><p><small>{html_text(MEANING)}</small></p>"
        f"{_html_table('Claims of the models', 'Claim', names, claims)}"
        "<p><small>Estimate with 95 % interval. The pictures of a row share a scale. The claim "
        "would hold in the shaded region.</small></p></section>"
    )


def _html_table(label: str, what: str, names: Sequence[str], body: str) -> str:
    """A table with a column for each model; nothing if it has no row."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in (what, *names, "Disagreement"))
    table = (
        f'<div class="tempo-scroll" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="tempo-table tempo-stacked"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
    return table if body else ""


def side_by_side_markdown(reports: Sequence[Report]) -> list[str]:
    """The same as lines of Markdown."""
    names = [markdown_cell(name) for name in names_of(reports)]
    first, *lines, last = map(markdown_cell, said(reports))
    out = ["## The models side by side", "", first, "", *(f"- {line}" for line in lines), "", last]
    heads = f"{' | '.join(names)} | disagreement |"
    rule = f"|---|{'---|' * len(names)}---|"
    if asked := questions(reports):
        rows = [markdown_row(each.asked, *each.shorts, each.marker) for each in asked]
        out += ["", f"| question | {heads}", rule, *rows]
    out += ["", markdown_cell(MEANING), "", f"| claim | role | {heads}", f"|---{rule}"]
    for row in claim_rows(reports):
        out.append(markdown_row(row.label, row.role, *map(_in_words, row.found), row.marker))
    return [*out, ""]


def _in_words(f: Finding | None) -> str:
    return f"{SIGNS[f.verdict]} {f.verdict.lower()} {interval(f)}, n {f.n}" if f else "not measured"


def _cell(f: Finding | None, row: Row, name: str, report: Report, at: str) -> str:
    if f is None:
        return f'<td data-label="{name}">not measured</td>'
    p = "" if f.kind == "invariant" else f", p {number(deciding(f)[1])}"
    others = [other for other in row.found if other]
    values = values_of(report, f)
    picture = effect_svg(f, others, known(values.claim) if values else (), claim_id(f, at))
    return (
        f'<td data-label="{name}" class="tempo-number">{badge(f)}<br>{picture}<br>'
        f"{aligned(f)}<small>n {f.n}{p}</small></td>"
    )


def _html_row(cells: str, marker: str) -> str:
    """A row with its disagreement, which stands out where the models contradict each other."""
    stands_out = marker in (DIFFER, OPPOSITE)
    said = f"<b>{marker}</b>" if stands_out else marker or "–"
    of_class = ' class="tempo-differs"' if stands_out else ""
    return f'<tr{of_class}>{cells}<td data-label="Models">{said}</td></tr>'
