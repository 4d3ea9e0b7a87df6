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
from tempo.reporting.beside import Address, figure_file, nowhere, of_runs, run_file
from tempo.reporting.certainty import (
    alarms_of,
    certainty,
    counted_claims,
    measured_on,
    roles,
    standings,
)
from tempo.reporting.compact import STYLES, compact
from tempo.reporting.comparison import Comparison, comparison_html
from tempo.reporting.differences import differences_html
from tempo.reporting.figures.drawing import Picture, to_html
from tempo.reporting.figures.forest import forest
from tempo.reporting.figures.mechanism import mechanism
from tempo.reporting.findings import counts, rank
from tempo.reporting.glossary import explained, glossary_html
from tempo.reporting.hero import hero_of
from tempo.reporting.prompts import claim_id, data_html, known, values_of
from tempo.reporting.report import Report, Section, TestRow, names_of, unlike_names
from tempo.reporting.sidebyside import answers_html, opposed, side_by_side_html
from tempo.reporting.table import aligned, badge, claims_table, effect_svg
from tempo.text import html_text, number, slug
from tempo.wheels import KNOWN_MODELS

# No script runs but the page's own, which is known by its hash.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
TESTS, WORDS = "tempo-tests", "tempo-glossary"  # anchors of the tests, and of the words
MOST_SENTENCES = 2  # of models on the first screen
# Bytes of figures that a page holds of models after the first one. Those of all experiments of a
# second model have three times as many, and would make it larger than 4 MB.
MOST_HELD = 500_000
WALK = "Walk through the run on its own prompt"
Link = tuple[str, str]  # the anchor within the page, and what the link says


def report_html(
    *reports: Report, against: Comparison | None = None, address: Address = nowhere
) -> str:
    """The whole page, of one model or of several.

    against: a comparison with another record, shown as a section of its own.
    address: says where files beside the page are. If the models after the first one have many
    figures, the page links to those of their experiments in place of holding them.
    """
    style, script = (
        files("tempo.reporting").joinpath(name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js")
    )
    script = f"\n{script}"  # as it stands between its tags, which is what the hash is of
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    body, rules = compact(fragment(*reports, against=against, address=address))
    return (
        # The policy stands first: it holds for what comes after it.
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY.format(script=digest)}"/>\n'
        '<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        '<meta name="color-scheme" content="light dark"/>\n'
        f"<title>{html_text(title_of(reports))}</title>\n<style>\n{style}</style>\n"
        f'<style id="{STYLES}">{rules}</style>\n</head>\n'
        f"<body>\n{body}\n<script>{script}</script>\n</body>\n"
        "</html>\n"
    )


def title_of(reports: Sequence[Report]) -> str:
    """What a browser's tab says."""
    names = ", ".join(names_of(reports))
    if len(reports) > 1:
        return f"tempo: {names}"
    return f"tempo: {reports[0].conclusions.in_short} ({names})"


def fragment(
    *reports: Report, against: Comparison | None = None, address: Address = nowhere
) -> str:
    """What the page holds, as one <main> element."""
    compared = ""
    if against:
        compared = (
            '<section id="tempo-comparison"><h2>Compared with another record</h2>'
            f"{comparison_html(against)}</section>"
        )
    prefixes = ["", *(f"m{i}-" for i in range(2, len(reports) + 1))]
    further = [p for r in reports[1:] for section in r.sections for p in section.pictures]
    if sum(len(picture.svg) for picture in further) <= MOST_HELD:
        address = of_runs(address)
    if len(reports) == 1:
        parts = _one(reports[0], compared, address)
    else:
        parts = _several(reports, prefixes, compared, address)
    data = data_html(reports, prefixes)
    return "\n".join(['<main class="tempo-report">', *filter(None, [*parts, data]), "</main>"])


def _one(report: Report, compared: str, address: Address) -> list[str]:
    links = [*_links(report, ""), *([(TESTS, "Tests")] if report.tests else [])]
    links.append((WORDS, "Words"))
    top = [_top(report), _nav(links, "Contents"), _questions(report, ""), compared]
    return [*top, *_evidence(report, "", address), _tests(report.tests), glossary_html()]


def _several(
    reports: Sequence[Report], prefixes: Sequence[str], compared: str, address: Address
) -> list[str]:
    """The models side by side, then a part for each; its ids begin with a prefix of its own."""
    names = names_of(reports)
    # Of several folders none has the tests of all.
    tests = reports[0].tests if len({report.root for report in reports}) == 1 else ()
    own = f"Tests of {names[0]}"
    differing = differences_html(reports)
    links = [("tempo-models", "Side by side")]
    links += [("tempo-differences", "Differences")] if differing else []
    links += [(f"{at}tempo-model", name) for at, name in zip(prefixes, names, strict=True)]
    links += [(TESTS, own)] if tests else []
    links.append((WORDS, "Words"))
    parts = [_top_of_several(reports), _nav(links, "Contents"), compared]
    parts += [side_by_side_html(reports, prefixes), differing]
    for report, at, name in zip(reports, prefixes, names, strict=True):
        inner = [f"<li>{_link(link)}</li>" for link in _links(report, at)]
        parts += [
            f'<section id="{at}tempo-model" aria-label="{html_text(name)}">',
            f'<h2 class="tempo-model">{html_text(name)}</h2>',
            _alarms(alarms_of(report)),
            f'<p class="tempo-kicker">{_conditions(report)}</p>',
            f'<nav class="tempo-inner" aria-label="Sections of {html_text(name)}">'
            f"<ul>{''.join(inner)}</ul></nav>",
            _questions(report, at),
            *_evidence(report, at, address),
            "</section>",
        ]
    return [*parts, _tests(tests, f" ({names[0]})"), glossary_html()]


def _evidence(report: Report, at: str, address: Address) -> list[str]:
    """Claims, experiments, and provenance of one model."""
    findings = report.findings
    parts = []
    if findings:
        empirical = [f for f in findings if f.kind == "empirical"]
        glance = ""
        if empirical:
            picture = to_html(forest(empirical, "Empirical claims at a glance"), at)
            glance = f"<details><summary>All claims in one figure</summary>{picture}</details>"
        parts = [
            f'<section id="{at}tempo-claims"><h2>Claims</h2>'
            f'<p class="tempo-prose">{explained(roles(findings))}</p>'
            f'<p class="tempo-prose">{explained(standings(findings))}</p>',
            claims_table(findings, at, lambda f: _values(report, f)),
            glance,
            "</section>",
        ]
    if report.sections:
        folds = [_section(section, report, at, address) for section in report.sections]
        parts += [
            f'<section id="{at}tempo-experiments"><h2>Experiments</h2>'
            "<p>Each with its figures, its config, and where its raw results lie.</p>",
            *folds,
            "</section>",
        ]
    return [*parts, _provenance(report, at)]


def _values(report: Report, f: Finding) -> list[float]:
    values = values_of(report, f)
    return known(values.claim) if values else []


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
    shown = [f"<li>{_link(link)}</li>" for link in links]
    return f'<nav class="tempo-toc" aria-label="{label}"><ul>{"".join(shown)}</ul></nav>'


def _link(link: Link) -> str:
    anchor, name = link
    return f'<a href="#{anchor}">{html_text(name)}</a>'


def _conditions(report: Report) -> str:
    """Model, precision, prompts, and when: `tiny · float32 · 162 prompts · 2026-11-24`."""
    contexts = [f.context for f in report.findings]
    dtypes = {str(context["dtype"]) for context in contexts if context.get("dtype")}
    prompts = [context["n_prompts"] for context in contexts if context.get("n_prompts")]
    about = (f"{_range(prompts)} prompts", report.about.get("Made"))
    parts = [report.model, _weights_of(report.model), *sorted(dtypes), *about]
    return html_text(" · ".join(part for part in parts if part))


def _weights_of(model: str) -> str:
    """What the weights are, where they are not the model's own: 4-bit files are dequantised."""
    if model.endswith(".gguf"):
        return "a GGUF file, dequantised"
    about = KNOWN_MODELS[model].description if model in KNOWN_MODELS else ""
    return about.partition(";")[0] if "dequantised" in about else ""


def _alarms(lines: Iterable[str]) -> str:
    return "".join(f'<p class="tempo-alarm" role="alert">{html_text(line)}</p>' for line in lines)


def _header(
    kicker: str, title: str, alarms: str, entries: Sequence[tuple[str, str]], heroes: Sequence[str]
) -> str:
    """The first screen: what was asked and found beside one figure, then what the words mean."""
    said = [f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in entries if text]
    beside = f'<div class="tempo-hero">{"".join(heroes)}</div>' if any(heroes) else ""
    drawn = "".join(to_html(picture) for picture in mechanism())
    drawn = f'<div class="tempo-mechanism">{drawn}</div>'
    inner, below = (drawn, "") if len(heroes) < 2 else ("", drawn)
    return (
        f'<header class="tempo-top"><p class="tempo-kicker">{kicker}</p>'
        f'<h1>{html_text(title)}</h1>{alarms}<div class="tempo-first">'
        f'<dl class="tempo-brief">{"".join(said)}</dl><div>{beside}{inner}</div></div>'
        f"{below}</header>"
    )


def _top(report: Report) -> str:
    conclusions = report.conclusions
    advice = [_answered("", answer.short, answer.plain) for answer in conclusions.advice]
    entries = [
        ("Asked", explained(conclusions.asked)),
        ("Found", _found(brief(conclusions))),
        ("How sure", explained(" ".join(certainty(report)))),
        ("What to do", " ".join(advice)),
    ]
    hero = hero_of(report)
    alarms = _alarms(alarms_of(report))
    heroes = [to_html(hero)] if hero else []
    return _header(_conditions(report), conclusions.title, alarms, entries, heroes)


def _found(said: Sequence[tuple[str, str, str]]) -> str:
    """The answers, as a list if there are several."""
    answers = [_answered(*each) for each in said]
    if len(answers) == 1:
        return answers[0]
    return f'<ul class="tempo-found">{"".join(f"<li>{answer}</li>" for answer in answers)}</ul>'


def _top_of_several(reports: Sequence[Report]) -> str:
    """The same for several models: their answers beside each other, and a sentence for each of two.

    Of more models the figures alone say the numbers.
    """
    names = names_of(reports)
    found, sure, advice, alarms, heroes = [], [], [], [], []
    for i, (name, report) in enumerate(zip(names, reports, strict=True)):
        conclusions = report.conclusions
        sentence = next((a.sentence for a in conclusions.headlines if a.sentence), "")
        if sentence and len(reports) <= MOST_SENTENCES:
            found.append(f"<p>{html_text(f'{name}:')} {explained(sentence)}</p>")
        sure.append(f"<p>{html_text(f'{name}: {counted_claims(report)}')}</p>")
        alarms += [f"{name}: {line}" for line in alarms_of(report)]
        if conclusions.advice:
            do = "; ".join(answer.short for answer in conclusions.advice)
            advice.append(f"<p>{html_text(f'{name}: {do}.')}</p>")
        if hero := hero_of(report):
            heroes.append(f"<h3>{html_text(name)}</h3>{to_html(hero, f'h{i}-')}")
    asked = [report.conclusions.asked for report in reports]
    entries = [
        ("Asked", explained(next(filter(None, asked), ""))),
        ("Found", f"{answers_html(reports)}{''.join(found)}<p>{html_text(opposed(reports))}.</p>"),
        ("How sure", f"{''.join(sure)}<p>{explained(measured_on(reports))}</p>"),
        ("What to do", "".join(advice)),
    ]
    title = reports[0].conclusions.title
    return _header(html_text(" · ".join(names)), title, _alarms(alarms), entries, heroes)


def _answered(question: str, short: str, text: str = "") -> str:
    asked = f'<span class="tempo-asked">{html_text(question)}</span>' if question else ""
    answer = f'<b class="tempo-answer">{html_text(short)}.</b>'
    return f"{asked} {answer} {explained(text)}".strip()


def _shown_above(report: Report) -> dict[str, str]:
    """The pictures that stand at a question: from their titles to the question."""
    titles = {picture.title for section in report.sections for picture in section.pictures}
    asked = [answer for answer in report.conclusions.explained if answer.figure in titles]
    return {answer.figure: answer.question for answer in reversed(asked)}


def _figure_id(section: Section, picture: Picture, at: str) -> str:
    return f"{at}figure-{slug(section.config)}-{picture.name}"


def _questions(report: Report, at: str) -> str:
    cards, placed = [], set()
    for answer in report.conclusions.explained:
        figure = ""
        if answer.figure not in placed:
            figure = _figure_of(answer, report, at)
            placed.add(answer.figure)
        cards.append(_card(answer, report, at, figure))
    if not cards:
        return ""
    return (
        f'<section id="{at}tempo-questions"><h2>The questions</h2>'
        f'<div class="tempo-cards">{"".join(cards)}</div></section>'
    )


def _figure_of(answer: Answer, report: Report, at: str) -> str:
    """The picture on record that the answer names; empty if there is none."""
    for section in report.sections:
        for picture in unlike_names(section.pictures):
            if answer.figure and picture.title == answer.figure:
                return to_html(picture, at, _figure_id(section, picture, at))
    return ""


def _card(answer: Answer, report: Report, at: str, figure: str) -> str:
    """An answer with its figure, the rule that gives it, and the claims behind it."""
    behind = [_grounds(claim, f, report, at) for claim, f in evidence(answer, report.findings)]
    rule = f"<details><summary>By which rule</summary><p>{html_text(answer.rule)}</p></details>"
    options = [_option(name, means, answer.short) for name, means in answer.options]
    legend = f'<dl class="tempo-options">{"".join(options)}</dl>' if options else ""
    return (
        f'<article class="tempo-card"><div class="tempo-said"><h3>{html_text(answer.question)}</h3>'
        f'<p class="tempo-prose">{_answered("", answer.short, answer.text)}</p>{legend}'
        f"{rule if answer.rule else ''}</div>{figure}"
        f'<ul class="tempo-grounds">{"".join(behind)}</ul></article>'
    )


def _option(name: str, means: str, given: str) -> str:
    """An answer that was possible; the one that was given is marked."""
    mark = ' class="tempo-given"' if name == given else ""
    return f"<div{mark}><dt>{html_text(name)}</dt><dd>{explained(means)}</dd></div>"


def _grounds(claim: str, f: Finding | None, report: Report, at: str) -> str:
    """A claim behind an answer, with its effect and the prompts behind that."""
    if f is None:
        return f"<li><code>{html_text(claim)}</code> not measured in this record</li>"
    said = (
        f"{aligned(f)}, n {f.n}, "
        f"control {number(f.control_estimate)}{'' if f.control_holds else ', MISBEHAVES'}"
    )
    picture = effect_svg(f, values=_values(report, f), of=claim_id(f, at))
    return (
        f"<li>{badge(f)} <div>{_claim_link(f, html_text(f.statement), at)} "
        f"<small>{html_text(f.label)}, {rank(f)}</small></div>"
        f"<div>{picture} <small>{html_text(said)}</small></div></li>"
    )


def _claim_link(f: Finding, shown: str, at: str) -> str:
    return f'<a href="#{claim_id(f, at)}">{shown}</a>'


def _section(section: Section, report: Report, at: str, address: Address) -> str:
    """One config, folded: its verdicts, its figures, its evidence, and the run on its own prompt.

    Figures that stand at a question already, or in files of their own, are links.
    """
    shown = _shown_above(report)
    own = [f for f in report.findings if f.context.get("config") == section.config]
    verdicts = "".join(
        f"<li>{_claim_link(f, html_text(f.statement), at)} <b>{f.verdict.lower()}</b></li>"
        for f in own
    )
    pictures, elsewhere, beside = [], [], []
    for picture in unlike_names(section.pictures):
        anchor = _figure_id(section, picture, at)
        if picture.title in shown:
            elsewhere.append(
                f'<li><a href="#{anchor}">{html_text(picture.title)}</a>: at the question '
                f"“{html_text(shown[picture.title])}”</li>"
            )
        elif at and (file := address(report, figure_file(section, picture.name))):
            beside.append(f'<li><a href="{html_text(file)}">{html_text(picture.title)}</a></li>')
        else:
            pictures.append(to_html(picture, at, anchor))
    if beside:
        beside = [f"<p>Figures in files beside this page:</p><ul>{''.join(beside)}</ul>"]
    if section.run and (file := address(report, run_file(section))):
        beside.append(f'<p><a href="{html_text(file)}">{WALK}</a>, set by set, in both modes.</p>')
    links = "".join(beside)
    above = f"<p>Figures that stand above:</p><ul>{''.join(elsewhere)}</ul>" if elsewhere else ""
    problem = f'<p class="tempo-alarm">No pictures: {html_text(section.problem)}</p>'
    raw = f"{section.folder}/: {', '.join(section.files)}"
    facts = [*((name, _json(value)) for name, value in section.settings.items())]
    facts += [("prompts measured", str(section.num_prompts)), ("raw results", raw)]
    facts += [("fingerprint", section.fingerprint)]
    texts = [f"<pre>{_lines(text)}</pre>" for text in (section.text, section.analysis) if text]
    counted = counts(own) or "no claims"
    return (
        f'<section id="{at}{section.anchor}"><details class="tempo-fold"><summary>'
        f"<h3>{html_text(section.experiment)}: {html_text(section.title)}</h3> "
        f"<small>{html_text(section.config)}; {len(own)} claims: {counted}</small></summary>"
        f"{problem if section.problem else ''}"
        f'<details class="tempo-verdicts"><summary>{len(own)} claims</summary>'
        f'<ul>{verdicts}</ul></details>{above}{links}<div class="tempo-pictures">'
        f"{chr(10).join(pictures)}</div>"
        "<details><summary>Evidence: config, sets and raw numbers</summary>"
        f"{_facts(facts)}{''.join(texts)}</details></details></section>"
    )


def _provenance(report: Report, at: str) -> str:
    facts = list(report.about.items()) or [("Session", "not on record")]
    facts += [("Prompts", report.suite)] if report.suite else []
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
