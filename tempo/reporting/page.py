"""The findings report as one HTML page: answer, claims, evidence, provenance, and pytest-html's list of tests below.

Every string that comes from data, prompts, models or configs passes `escaped` and then HTML's escaping. Nothing in the page
refers to anything outside it, and a content security policy forbids that it could.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files

from tempo.claims import Finding
from tempo.reporting.answers import TITLE, UNDETERMINED, Answer, evidence, questions, scenario
from tempo.reporting.comparison import Comparison, comparison_html
from tempo.reporting.conclusion import advice, criteria, just_fine, recommended_mode
from tempo.reporting.figures.drawing import to_html
from tempo.reporting.figures.forest import forest
from tempo.reporting.findings import ROLES, SIGNS, counts, deciding, interval, role, violated
from tempo.reporting.report import Report, Section, names_of
from tempo.reporting.sidebyside import opposed, side_by_side_html
from tempo.reporting.table import claims_table
from tempo.text import escaped, number, slug

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
ASKED = (
    "At each step every token that reaches a probability threshold is appended, all at one position. Does the model cope, and does "
    "it matter whether such siblings attend to each other (visible) or not (isolated)?"
)
_EMPTY = '<!DOCTYPE html>\n<html>\n<head>\n<meta charset="utf-8"/>\n<title>tempo</title>\n</head>\n<body>\n</body>\n</html>\n'


def report_html(*reports: Report, against: Comparison | None = None) -> str:
    """The whole page, of one model or of several; with `against`, the comparison with another record as a section of its own."""
    tests = (
        reports[0].tests if len({report.root for report in reports}) == 1 else ""
    )  # of several folders none speaks for all
    page = tests or _EMPTY
    page = re.sub(
        r'<a href="https?://[^"]*">(.*?)</a>', r"\1", page
    )  # the page is to hold no external reference
    page = re.sub(r'<h1 id="title">(.*?)</h1>', r'<h2 id="title">Tests of this session</h2>', page)
    title = f"<title>{_text(title_of(reports))}</title>"
    page = re.sub(r"<title[^>]*>.*?</title>", lambda _: title, page, count=1, flags=re.DOTALL)
    page = page.replace("<html>", '<html lang="en">', 1)
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n<meta name="color-scheme" content="light dark"/>\n'
    )
    before, _, rest = page.partition("</head>")
    start, body, below = rest.partition("<body>")
    below, _, end = below.rpartition("</body>")
    style, script = (
        files("tempo.reporting").joinpath(name).read_text(encoding="utf-8")
        for name in ("report.css", "report.js")
    )
    if tests:
        whose = f" ({_text(reports[0].model)})" if len(reports) > 1 else ""
        below = f'<details class="tempo-tests" id="tempo-tests"><summary>Tests of this session{whose}</summary>{below}</details>'
    ours = fragment(*reports, against=against, has_tests=bool(tests))
    return f"{before}{head}<style>\n{style}</style>\n</head>{start}{body}\n{ours}\n{below}\n<script>\n{script}</script>\n</body>{end}"


def title_of(reports: Sequence[Report]) -> str:
    if len(reports) > 1:
        return f"tempo: {', '.join(names_of(reports))}"
    return f"tempo: {just_fine(reports[0].findings).short}; {_scenario(reports[0])} ({reports[0].model or 'no model'})"


def fragment(*reports: Report, against: Comparison | None = None, has_tests: bool = False) -> str:
    """What stands before the list of tests."""
    prefixes = [
        "",
        *(f"m{i}-" for i in range(2, len(reports) + 1)),
    ]  # of the ids of each model's part
    compared = ""
    if against:
        compared = f'<section id="tempo-comparison"><h2>Compared with another record</h2>{comparison_html(against)}</section>'
    if len(reports) == 1:
        links = [*_links(reports[0], ""), *([("tempo-tests", "Tests")] if has_tests else [])]
        parts = [
            _top(reports[0], links),
            _questions(reports[0], ""),
            compared,
            *_evidence(reports[0], ""),
        ]
    else:
        names = names_of(reports)
        links = [
            ("tempo-models", "Side by side"),
            *((f"{at}tempo-model", name) for at, name in zip(prefixes, names, strict=True)),
        ]
        links += [("tempo-tests", f"Tests of {reports[0].model}")] if has_tests else []
        parts = [_top_of_several(reports, links), compared, side_by_side_html(reports, prefixes)]
        for report, at, name in zip(reports, prefixes, names, strict=True):
            head = f'<h2 class="tempo-model">{_text(name)}</h2>{_alarms(report)}<p class="tempo-kicker">{_conditions(report)}</p>'
            parts.append(
                f'<section id="{at}tempo-model" aria-label="{_text(name)}">{head}{_nav(_links(report, at), name)}'
            )
            parts += [_questions(report, at), *_evidence(report, at), "</section>"]
    return "\n".join(['<main class="tempo-report">', *filter(None, parts), "</main>"])


def _evidence(report: Report, at: str) -> list[str]:
    """Claims, sections of the configs, and provenance of one model."""
    findings = list(report.findings)
    parts = []
    if findings:
        picture = forest(
            [f for f in findings if f.kind == "empirical"], "Empirical claims at a glance"
        )
        parts = [
            f'<section id="{at}tempo-claims"><h2>Claims</h2><p>{_text(roles(findings))}</p>', claims_table(findings, at),
            to_html(picture, at), "</section>",
        ]  # fmt: skip
    return [
        *parts,
        *(_section(section, findings, at) for section in report.sections),
        _provenance(report, at),
    ]


def roles(findings: Sequence[Finding]) -> str:
    """What the roles of claims mean, and how many claims have each."""
    number_of = {name: sum(role(f) == name for f in findings) for name in ROLES}
    meaning = {
        "confirmatory": "fixed before the data that decide them; p Holm-corrected over their whole family, run or not",
        "exploratory": "Holm-corrected within their experiment only; to be confirmed on other data",
        "invariant": "must hold exactly everywhere; no statistics",
    }
    return (
        "; ".join(
            f"{n} {name}{'s' * (name == 'invariant' and n > 1)} ({meaning[name]})"
            for name, n in number_of.items()
            if n
        )
        + "."
    )


def _links(report: Report, at: str) -> list[tuple[str, str]]:
    """Where in one model's part of the page what is."""
    links = [
        ("tempo-questions", "Questions"),
        *([("tempo-claims", "Claims")] if report.findings else []),
    ]
    links += [
        (
            section.anchor,
            f"{section.experiment} {section.title}{_variant(section, report.sections)}",
        )
        for section in report.sections
    ]
    return [
        (f"{at}{anchor}", name) for anchor, name in [*links, ("tempo-provenance", "Provenance")]
    ]


def _nav(links: Sequence[tuple[str, str]], of: str = "") -> str:
    label = _text(f"Sections of {of}" if of else "Sections")
    return f'<nav aria-label="{label}">{" ".join(f"""<a href="#{anchor}">{_text(name)}</a>""" for anchor, name in links)}</nav>'


def _conditions(report: Report) -> str:
    conditions = [
        report.model,
        *sorted({str(f.context["dtype"]) for f in report.findings if f.context.get("dtype")}),
    ]
    conditions += [
        f"{_range(f.context['n_prompts'] for f in report.findings if f.context.get('n_prompts'))} prompts"
    ]
    conditions += [report.about["Made"]] if "Made" in report.about else []
    return _text(" · ".join(filter(None, conditions)))


def _alarms(report: Report) -> str:
    return "".join(
        f'<p class="tempo-alarm" role="alert">{_text(line)}</p>' for line in alarms_of(report)
    )


def _header(
    kicker: str, alarms: str, entries: Sequence[tuple[str, str]], links: Sequence[tuple[str, str]]
) -> str:
    """What was asked, what was found, how sure it is, what to do: to be read without scrolling."""
    brief = "".join(f"<div><dt>{name}</dt><dd>{said}</dd></div>" for name, said in entries)
    return f'<header><p class="tempo-kicker">{kicker}</p><h1>{TITLE}</h1>{alarms}<dl class="tempo-brief">{brief}</dl>{_nav(links)}</header>'


def _top(report: Report, links: Sequence[tuple[str, str]]) -> str:
    mode = recommended_mode(report.findings).short
    entries = [
        ("Asked", _text(ASKED)),
        ("Found", found_html(report)),
        ("How sure", " ".join(_text(line) for line in certainty(report))),
        (
            "What to do",
            f'<b class="tempo-answer">{_text(mode)}.</b> {_text(advice(report.findings))}',
        ),
    ]
    return _header(_conditions(report), _alarms(report), entries, links)


def _top_of_several(reports: Sequence[Report], links: Sequence[tuple[str, str]]) -> str:
    """The same for several models, a line for each."""
    found, sure, do = [], [], []
    for name, report in zip(map(_text, names_of(reports)), reports, strict=True):
        what = _text(f"{just_fine(report.findings).short}; {_scenario(report)}")
        found.append(f'<p>{name}: <b class="tempo-answer">{what}.</b></p>')
        sure.append(f"<p>{name}: {_text(_counted(report))}</p>")
        do.append(f"<p>{name}: {_text(recommended_mode(report.findings).short)}.</p>")
    entries = [
        ("Asked", _text(ASKED)), ("Found", "".join(found) + f"<p>{_text(opposed(reports))}.</p>"), ("How sure", "".join(sure)),
        ("What to do", "".join(do)),
    ]  # fmt: skip
    alarms = "".join(
        f'<p class="tempo-alarm" role="alert">{_text(f"{name}: {line}")}</p>'
        for name, report in zip(names_of(reports), reports, strict=True) for line in alarms_of(report)
    )  # fmt: skip
    return _header(_text(" · ".join(names_of(reports))), alarms, entries, links)


def _scenario(report: Report) -> str:
    found = scenario(report.findings)
    return "scenario undetermined" if found.short == UNDETERMINED else f"scenario {found.short}"


def found_html(report: Report) -> str:
    """The conclusion with its criteria, and the scenario; with its numbers only where the criteria have none."""
    fine, numbers = (
        just_fine(report.findings),
        "" if criteria(report.findings) else scenario(report.findings).text,
    )
    answers = (fine.short, fine.text), (f"S{_scenario(report)[1:]}", numbers)
    return " ".join(
        f'<b class="tempo-answer">{_text(short)}.</b> {_text(text)}' for short, text in answers
    ).strip()


def certainty(report: Report) -> list[str]:
    """How sure it is, computed from the findings."""
    lines = [_counted(report)]
    if ps := _deciding_ps(report):
        lines.append(
            f"Behind the scenario: {len(ps)} verdicts, corrected p at most {number(max(ps))}."
        )
    lines.append(
        "95 % intervals over prompts. One model and short English prompts: no more than that."
    )
    return lines


def _counted(report: Report) -> str:
    """How many claims of each role have which verdict, and whether their controls behaved."""
    found = report.findings
    said = [
        f"{len(own)} {name}{'s' * (name == 'invariant' and len(own) > 1)} ({counts(own)})"
        for name in ROLES
        if (own := [f for f in found if role(f) == name])
    ]
    behaved = sum(f.control_holds for f in found)
    controls = (
        "all of their negative controls behaved"
        if behaved == len(found)
        else f"{behaved} of {len(found)} negative controls behaved"
    )
    quick = (
        f" A quick look at {report.quick_look} prompts of the suite only."
        if report.quick_look
        else ""
    )
    return f"{len(found)} registered {'claim' if len(found) == 1 else 'claims'}: {', '.join(said) or 'none'}; {controls}.{quick}"


def _deciding_ps(report: Report) -> list[float]:
    """The corrected p of each verdict that the scenario rests on; none if it is undetermined."""
    found = scenario(report.findings)
    if found.short == UNDETERMINED:
        return []
    behind = [f for f in report.findings if f.claim in found.claims and f.verdict != "INCONCLUSIVE"]
    return [p for f in behind if math.isfinite(p := deciding(f)[1])]


def alarms_of(report: Report) -> list[str]:
    """What makes the harness itself doubtful, before anything it says."""
    broken = [f.label for f in report.findings if violated(f)]
    blind = [f.label for f in report.findings if not f.control_holds]
    lines = (
        [f"Invariant violated: {', '.join(broken)}. The harness is not sound; trust nothing below."]
        if broken
        else []
    )
    return lines + (
        [f"Negative control did not behave: {', '.join(blind)}. These checks prove nothing."]
        if blind
        else []
    )


def _questions(report: Report, at: str) -> str:
    found = report.findings
    cards = [just_fine(found), *questions(found), scenario(found), recommended_mode(found)]
    shown = "".join(_card(answer, found, at) for answer in cards)
    return f'<section id="{at}tempo-questions"><h2>The questions</h2><div class="tempo-cards">{shown}</div></section>'


def _card(answer: Answer, findings: Sequence[Finding], at: str) -> str:
    """An answer, the claims it rests on with their numbers, and the rule that gives it."""
    rests = "".join(f"<li>{_grounds(claim, f, at)}</li>" for claim, f in evidence(answer, findings))
    return (
        f'<article class="tempo-card"><h3>{_text(answer.question)}</h3><p><b class="tempo-answer">{_text(answer.short)}.</b> '
        f"{_text(answer.text)}</p><details><summary>By which rule</summary><p>{_text(answer.rule)}</p></details>"
        f'<ul class="tempo-grounds">{rests}</ul></article>'
    )


def _grounds(claim: str, f: Finding | None, at: str) -> str:
    if f is None:
        return f"<code>{_text(claim)}</code> not measured in this record"
    control = "" if f.control_holds else ", MISBEHAVES"
    said = f"{SIGNS[f.verdict]} {f.verdict.lower()}, {role(f)}: {interval(f)}, n {f.n}, control {number(f.control_estimate)}{control}"
    return f'<a href="#{at}claim-{slug(f.label)}"><code>{_text(f.label)}</code></a> {_text(said)}'


def _section(section: Section, findings: Sequence[Finding], at: str) -> str:
    """One config: its verdicts in a line, its figures, its evidence."""
    own = [f for f in findings if f.context.get("config") == section.config]
    verdicts = "".join(
        f'<li><a href="#{at}claim-{slug(f.label)}">{_text(f.statement)}</a> <b>{_text(f.verdict.lower())}</b></li>'
        for f in own
    )
    pictures = "\n".join(to_html(picture, at) for picture in section.pictures)
    problem = (
        f'<p class="tempo-alarm">No pictures: {_text(section.problem)}</p>'
        if section.problem
        else ""
    )
    settings = "".join(
        f"<dt>{_text(k)}</dt><dd>{_text(_json(v))}</dd>" for k, v in section.settings.items()
    )
    evidence = (
        f'<dl class="tempo-about">{settings}<dt>prompts measured</dt><dd>{section.num_prompts}</dd>'
    )
    evidence += (
        f"<dt>raw results</dt><dd>{_text(section.folder)}/: {_text(', '.join(section.files))}</dd>"
    )
    evidence += f"<dt>fingerprint</dt><dd>{_text(section.fingerprint)}</dd></dl>"
    evidence += f"<pre>{_text(section.text)}</pre>" if section.text else ""
    evidence += f"<pre>{_lines(section.analysis)}</pre>" if section.analysis else ""
    name = f"{_text(section.experiment)}: {_text(section.title)} <small>{_text(section.config)}</small>"
    return (
        f'<section id="{at}{section.anchor}"><h2>{name}</h2>{problem}'
        f'<details class="tempo-verdicts"><summary>{len(own)} claims</summary><ul>{verdicts}</ul></details>'
        f'<div class="tempo-pictures">{pictures}</div>'
        f"<details><summary>Evidence: config, sets and raw numbers</summary>{evidence}</details></section>"
    )


def _provenance(report: Report, at: str) -> str:
    entries = "".join(
        f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in report.about.items()
    )
    entries = entries or "<dt>Session</dt><dd>not on record</dd>"
    return f'<section id="{at}tempo-provenance"><h2>Provenance</h2><dl class="tempo-about">{entries}</dl></section>'


def _variant(section: Section, sections: Sequence[Section]) -> str:
    """What tells a config from the others of its experiment; empty if it is the only one."""
    alone = sum(other.experiment == section.experiment for other in sections) == 1
    return (
        ""
        if alone
        else f" ({section.folder.removeprefix(section.experiment).strip('_') or section.config})"
    )


def _range(values: Iterable[int]) -> str:
    distinct = sorted(set(values))
    return (
        "no"
        if not distinct
        else str(distinct[0])
        if len(distinct) == 1
        else f"{distinct[0]} to {distinct[-1]}"
    )


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _lines(text: str) -> str:
    return "\n".join(map(_text, text.split("\n")))


def _text(value: object) -> str:
    return html.escape(escaped(str(value)))
