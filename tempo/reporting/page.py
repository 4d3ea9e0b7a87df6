"""The findings report as one HTML page: answers, claims, evidence, provenance, tests.

Every string that comes from data, prompts, models or configs passes `html_text`. Nothing in the
page refers to anything outside it, and a content security policy forbids that it could.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.resources import files

from tempo.claims import Finding
from tempo.reporting.answers import Answer, brief, evidence
from tempo.reporting.certainty import alarms_of, certainty, counted_claims, measured_on, roles
from tempo.reporting.comparison import Comparison, comparison_html
from tempo.reporting.figures.drawing import to_html
from tempo.reporting.figures.forest import forest
from tempo.reporting.findings import SIGNS, interval, rank
from tempo.reporting.report import Report, Section, TestRow, names_of
from tempo.reporting.sidebyside import opposed, side_by_side_html
from tempo.reporting.table import claims_table
from tempo.text import html_text, number, slug

# No script runs but the page's own, which is known by its hash.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
TESTS = "tempo-tests"  # the anchor of the list of tests
Link = tuple[str, str]  # the anchor within the page, and what the link says


def report_html(*reports: Report, against: Comparison | None = None) -> str:
    """The whole page, of one model or of several.

    against: a comparison with another record, shown as a section of its own.
    """
    style, script = (
        files("tempo.reporting").joinpath(name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js")
    )
    script = f"\n{script}"  # as it stands between its tags, which is what the hash is of
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        # The policy stands first: it holds for what comes after it.
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY.format(script=digest)}"/>\n'
        '<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        '<meta name="color-scheme" content="light dark"/>\n'
        f"<title>{html_text(title_of(reports))}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n{fragment(*reports, against=against)}\n<script>{script}</script>\n</body>\n"
        "</html>\n"
    )


def title_of(reports: Sequence[Report]) -> str:
    """What a browser's tab says."""
    names = ", ".join(names_of(reports))
    if len(reports) > 1:
        return f"tempo: {names}"
    return f"tempo: {reports[0].conclusions.in_short} ({names})"


def fragment(*reports: Report, against: Comparison | None = None) -> str:
    """What the page holds, as one <main> element."""
    compared = ""
    if against:
        compared = (
            '<section id="tempo-comparison"><h2>Compared with another record</h2>'
            f"{comparison_html(against)}</section>"
        )
    parts = _one(reports[0], compared) if len(reports) == 1 else _several(reports, compared)
    return "\n".join(['<main class="tempo-report">', *filter(None, parts), "</main>"])


def _one(report: Report, compared: str) -> list[str]:
    links = [*_links(report, ""), *([(TESTS, "Tests")] if report.tests else [])]
    top = [_top(report, links), _questions(report, ""), compared]
    return [*top, *_evidence(report, ""), _tests(report.tests)]


def _several(reports: Sequence[Report], compared: str) -> list[str]:
    """The models side by side, then a part for each; its ids begin with a prefix of its own."""
    names = names_of(reports)
    prefixes = ["", *(f"m{i}-" for i in range(2, len(reports) + 1))]
    # Of several folders none has the tests of all.
    tests = reports[0].tests if len({report.root for report in reports}) == 1 else ()
    own = f"Tests of {names[0]}"
    links = [("tempo-models", "Side by side")]
    links += [(f"{at}tempo-model", name) for at, name in zip(prefixes, names, strict=True)]
    links += [(TESTS, own)] if tests else []
    parts = [_top_of_several(reports, links), compared, side_by_side_html(reports, prefixes)]
    for report, at, name in zip(reports, prefixes, names, strict=True):
        parts += [
            f'<section id="{at}tempo-model" aria-label="{html_text(name)}">',
            f'<h2 class="tempo-model">{html_text(name)}</h2>',
            _alarms(alarms_of(report)),
            f'<p class="tempo-kicker">{_conditions(report)}</p>',
            _nav(_links(report, at), f"Sections of {name}"),
            _questions(report, at),
            *_evidence(report, at),
            "</section>",
        ]
    return [*parts, _tests(tests, f" ({names[0]})")]


def _evidence(report: Report, at: str) -> list[str]:
    """Claims, sections of the configs, and provenance of one model."""
    findings = report.findings
    parts = []
    if findings:
        empirical = [f for f in findings if f.kind == "empirical"]
        picture = forest(empirical, "Empirical claims at a glance")
        parts = [
            f'<section id="{at}tempo-claims"><h2>Claims</h2><p>{html_text(roles(findings))}</p>',
            claims_table(findings, at),
            to_html(picture, at),
            "</section>",
        ]
    sections = [_section(section, findings, at) for section in report.sections]
    return [*parts, *sections, _provenance(report, at)]


def _links(report: Report, at: str) -> list[Link]:
    """Where in one model's part of the page what is."""
    links = [("tempo-questions", "Questions")] if report.conclusions.explained else []
    links += [("tempo-claims", "Claims")] if report.findings else []
    for section in report.sections:
        name = f"{section.experiment} {section.title}{_variant(section, report.sections)}"
        links.append((section.anchor, name))
    links.append(("tempo-provenance", "Provenance"))
    return [(f"{at}{anchor}", name) for anchor, name in links]


def _nav(links: Sequence[Link], label: str) -> str:
    shown = [f'<a href="#{anchor}">{html_text(name)}</a>' for anchor, name in links]
    return f'<nav aria-label="{html_text(label)}">{" ".join(shown)}</nav>'


def _conditions(report: Report) -> str:
    """Model, precision, prompts, and when: `tiny · float32 · 162 prompts · 2026-11-24`."""
    contexts = [f.context for f in report.findings]
    dtypes = {str(context["dtype"]) for context in contexts if context.get("dtype")}
    prompts = [context["n_prompts"] for context in contexts if context.get("n_prompts")]
    parts = [report.model, *sorted(dtypes), f"{_range(prompts)} prompts", report.about.get("Made")]
    return html_text(" · ".join(part for part in parts if part))


def _alarms(lines: Iterable[str]) -> str:
    return "".join(f'<p class="tempo-alarm" role="alert">{html_text(line)}</p>' for line in lines)


def _header(
    kicker: str, title: str, alarms: str, entries: Sequence[tuple[str, str]], links: Sequence[Link]
) -> str:
    """What was asked, what was found, how sure it is, what to do: to be read without scrolling."""
    said = [f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in entries if text]
    return (
        f'<header><p class="tempo-kicker">{kicker}</p><h1>{html_text(title)}</h1>{alarms}'
        f'<dl class="tempo-brief">{"".join(said)}</dl>{_nav(links, "Sections")}</header>'
    )


def _top(report: Report, links: Sequence[Link]) -> str:
    conclusions = report.conclusions
    advice = [_answered("", answer.short, answer.text) for answer in conclusions.advice]
    entries = [
        ("Asked", html_text(conclusions.asked)),
        ("Found", " ".join(_answered(*said) for said in brief(conclusions))),
        ("How sure", html_text(" ".join(certainty(report)))),
        ("What to do", " ".join(advice)),
    ]
    alarms = _alarms(alarms_of(report))
    return _header(_conditions(report), conclusions.title, alarms, entries, links)


def _top_of_several(reports: Sequence[Report], links: Sequence[Link]) -> str:
    """The same for several models, a line for each."""
    names = names_of(reports)
    found, sure, advice, alarms = [], [], [], []
    for name, report in zip(names, reports, strict=True):
        conclusions = report.conclusions
        found.append(f"<p>{_answered(f'{name}:', conclusions.in_short)}</p>")
        sure.append(f"<p>{html_text(f'{name}: {counted_claims(report)}')}</p>")
        alarms += [f"{name}: {line}" for line in alarms_of(report)]
        if conclusions.advice:
            do = "; ".join(answer.short for answer in conclusions.advice)
            advice.append(f"<p>{html_text(f'{name}: {do}.')}</p>")
    asked = [report.conclusions.asked for report in reports]
    entries = [
        ("Asked", html_text(next(filter(None, asked), ""))),
        ("Found", f"{''.join(found)}<p>{html_text(opposed(reports))}.</p>"),
        ("How sure", f"{''.join(sure)}<p>{html_text(measured_on(reports))}</p>"),
        ("What to do", "".join(advice)),
    ]
    title = reports[0].conclusions.title
    return _header(html_text(" · ".join(names)), title, _alarms(alarms), entries, links)


def _answered(question: str, short: str, text: str = "") -> str:
    answer = f'{html_text(question)} <b class="tempo-answer">{html_text(short)}.</b>'
    return f"{answer} {html_text(text)}".strip()


def _questions(report: Report, at: str) -> str:
    cards = [_card(answer, report.findings, at) for answer in report.conclusions.explained]
    if not cards:
        return ""
    return (
        f'<section id="{at}tempo-questions"><h2>The questions</h2>'
        f'<div class="tempo-cards">{"".join(cards)}</div></section>'
    )


def _card(answer: Answer, findings: Sequence[Finding], at: str) -> str:
    """An answer, the rule that gives it, and the claims behind it with their numbers."""
    behind = [f"<li>{_grounds(claim, f, at)}</li>" for claim, f in evidence(answer, findings)]
    rule = f"<details><summary>By which rule</summary><p>{html_text(answer.rule)}</p></details>"
    return (
        f'<article class="tempo-card"><h3>{html_text(answer.question)}</h3>'
        f"<p>{_answered('', answer.short, answer.text)}</p>{rule if answer.rule else ''}"
        f'<ul class="tempo-grounds">{"".join(behind)}</ul></article>'
    )


def _grounds(claim: str, f: Finding | None, at: str) -> str:
    if f is None:
        return f"<code>{html_text(claim)}</code> not measured in this record"
    said = (
        f"{SIGNS[f.verdict]} {f.verdict.lower()}, {rank(f)}: {interval(f)}, n {f.n}, "
        f"control {number(f.control_estimate)}{'' if f.control_holds else ', MISBEHAVES'}"
    )
    return f"{_claim_link(f, f'<code>{html_text(f.label)}</code>', at)} {html_text(said)}"


def _claim_link(f: Finding, shown: str, at: str) -> str:
    return f'<a href="#{at}claim-{slug(f.label)}">{shown}</a>'


def _section(section: Section, findings: Sequence[Finding], at: str) -> str:
    """One config: its verdicts in a line, its figures, its evidence."""
    own = [f for f in findings if f.context.get("config") == section.config]
    verdicts = "".join(
        f"<li>{_claim_link(f, html_text(f.statement), at)} <b>{f.verdict.lower()}</b></li>"
        for f in own
    )
    pictures = "\n".join(to_html(picture, at) for picture in section.pictures)
    problem = f'<p class="tempo-alarm">No pictures: {html_text(section.problem)}</p>'
    raw = f"{section.folder}/: {', '.join(section.files)}"
    facts = [*((name, _json(value)) for name, value in section.settings.items())]
    facts += [("prompts measured", str(section.num_prompts)), ("raw results", raw)]
    facts += [("fingerprint", section.fingerprint)]
    texts = [f"<pre>{_lines(text)}</pre>" for text in (section.text, section.analysis) if text]
    return (
        f'<section id="{at}{section.anchor}">'
        f"<h2>{html_text(section.experiment)}: {html_text(section.title)} "
        f"<small>{html_text(section.config)}</small></h2>{problem if section.problem else ''}"
        f'<details class="tempo-verdicts"><summary>{len(own)} claims</summary>'
        f'<ul>{verdicts}</ul></details><div class="tempo-pictures">{pictures}</div>'
        "<details><summary>Evidence: config, sets and raw numbers</summary>"
        f"{_facts(facts)}{''.join(texts)}</details></section>"
    )


def _provenance(report: Report, at: str) -> str:
    facts = list(report.about.items()) or [("Session", "not on record")]
    return f'<section id="{at}tempo-provenance"><h2>Provenance</h2>{_facts(facts)}</section>'


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    """A list of names and values."""
    entries = [f"<dt>{html_text(name)}</dt><dd>{html_text(value)}</dd>" for name, value in facts]
    return f'<dl class="tempo-about">{"".join(entries)}</dl>'


def _tests(tests: Sequence[TestRow], whose: str = "") -> str:
    """The session's tests, folded; those that did not pass first, with what they said."""
    if not tests:
        return ""
    outcomes = Counter(test.outcome for test in tests)
    counted = ", ".join(f"{n} {outcome}" for outcome, n in outcomes.most_common())
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("Test", "Outcome", "Verdict", "Seconds")
    )
    rows = "\n".join(map(_test, sorted(tests, key=lambda test: test.outcome == "passed")))
    return (
        f'<section id="{TESTS}" class="tempo-tests"><h2>Tests of this session{html_text(whose)}'
        f"</h2><details><summary>{html_text(counted)}</summary>"
        '<div class="tempo-scroll" tabindex="0" role="region" aria-label="Tests of this session">'
        f'<table class="tempo-table tempo-stacked"><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{rows}\n</tbody></table></div></details></section>"
    )


def _test(test: TestRow) -> str:
    message = f"<pre>{_lines(test.message)}</pre>" if test.message else ""
    alarm = " tempo-alarm" if test.outcome in ("failed", "error") else ""
    return (
        f'<tr><td data-label="Test"><code>{html_text(test.name)}</code>{message}</td>'
        f'<td data-label="Outcome" class="tempo-whole{alarm}">{html_text(test.outcome)}</td>'
        f'<td data-label="Verdict" class="tempo-whole">{html_text(test.verdict.lower())}</td>'
        f'<td data-label="Seconds" class="tempo-number">{test.seconds:.2f}</td></tr>'
    )


def _variant(section: Section, sections: Sequence[Section]) -> str:
    """What tells a config from the others of its experiment; empty if it is the only one."""
    if sum(other.experiment == section.experiment for other in sections) == 1:
        return ""
    own = section.folder.removeprefix(section.experiment).strip("_")
    return f" ({own or section.config})"


def _range(values: Iterable[int]) -> str:
    """`no`, `162`, or `9 to 162`."""
    distinct = sorted(set(values))
    if len(distinct) > 1:
        return f"{distinct[0]} to {distinct[-1]}"
    return str(distinct[0]) if distinct else "no"


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _lines(text: str) -> str:
    """Text with its line breaks kept."""
    return "\n".join(map(html_text, text.split("\n")))
