"""The findings report as one HTML page: answer, claims, evidence, provenance, and pytest-html's list of tests below.

Every string that comes from data, prompts, models or configs passes `visible` and then HTML's escaping. Nothing in the page
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
from tempo.reporting.answers import TITLE, UNDETERMINED, Answer, just_fine, questions, recommended_mode, scenario
from tempo.reporting.comparison import Comparison, comparison_html
from tempo.reporting.figures.drawing import to_html
from tempo.reporting.figures.forest import forest
from tempo.reporting.findings import deciding, violated
from tempo.reporting.report import Report, Section
from tempo.reporting.table import claims_table
from tempo.reporting.text import number, slug, visible

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
ASKED = (
    "At each step every token that reaches a probability threshold is appended, all at one position. Do such siblings attend to "
    "each other when they may (visible), and is what the model then says any different from when they may not (isolated)?"
)
_EMPTY = '<!DOCTYPE html>\n<html>\n<head>\n<meta charset="utf-8"/>\n<title>tempo</title>\n</head>\n<body>\n</body>\n</html>\n'


def report_html(report: Report, against: Comparison | None = None) -> str:
    """The whole page; with `against`, the comparison with another record as a section of its own."""
    page = report.tests or _EMPTY
    page = re.sub(r'<a href="https?://[^"]*">(.*?)</a>', r"\1", page)  # the page is to hold no external reference
    page = re.sub(r'<h1 id="title">(.*?)</h1>', r'<h2 id="title">Tests of this session</h2>', page)
    title = f"<title>{_text(title_of(report))}</title>"
    page = re.sub(r"<title[^>]*>.*?</title>", lambda _: title, page, count=1, flags=re.DOTALL)
    page = page.replace("<html>", '<html lang="en">', 1)
    head = (
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n<meta name="color-scheme" content="light dark"/>\n'
    )
    before, _, rest = page.partition("</head>")
    start, body, tests = rest.partition("<body>")
    tests, _, end = tests.rpartition("</body>")
    style, script = (files("tempo.reporting").joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    if report.tests:
        tests = f'<details class="tempo-tests" id="tempo-tests"><summary>Tests of this session</summary>{tests}</details>'
    ours = fragment(report, against)
    return f"{before}{head}<style>\n{style}</style>\n</head>{start}{body}\n{ours}\n{tests}\n<script>\n{script}</script>\n</body>{end}"


def title_of(report: Report) -> str:
    return f"tempo: {scenario(report.findings).short} ({report.model or 'no model'})"


def fragment(report: Report, against: Comparison | None = None) -> str:
    """What stands before the list of tests."""
    findings = list(report.findings)
    parts = ['<main class="tempo-report">', _top(report), _questions(findings)]
    if against:
        parts.append(f'<section id="tempo-comparison"><h2>Compared with another record</h2>{comparison_html(against)}</section>')
    if findings:
        parts += [
            '<section id="tempo-claims"><h2>Claims</h2>', claims_table(findings),
            to_html(forest([f for f in findings if f.kind == "empirical"], "Empirical claims at a glance")), "</section>",
        ]  # fmt: skip
    parts += [_section(section, findings) for section in report.sections]
    parts += [_provenance(report), "</main>"]
    return "\n".join(parts)


def _top(report: Report) -> str:
    """What was asked, what was found, how sure it is, what to do: to be read without scrolling."""
    mode = recommended_mode(report.findings)
    conditions = [report.model, *sorted({str(f.context["dtype"]) for f in report.findings if f.context.get("dtype")})]
    conditions += [f"{_range(f.context['n_prompts'] for f in report.findings if f.context.get('n_prompts'))} prompts"]
    conditions += [report.about["Made"]] if "Made" in report.about else []
    entries = [
        ("Asked", _text(ASKED)),
        ("Found", found_html(report)),
        ("How sure", " ".join(_text(line) for line in certainty(report))),
        ("What to do", _text(mode.text)),
    ]
    alarms = "".join(f'<p class="tempo-alarm" role="alert">{_text(line)}</p>' for line in alarms_of(report))
    brief = "".join(f"<div><dt>{name}</dt><dd>{said}</dd></div>" for name, said in entries)
    links = [("tempo-questions", "Questions"), ("tempo-claims", "Claims")]
    links += [(section.anchor, f"{section.experiment} {section.title}{_variant(section, report.sections)}") for section in report.sections]
    links += [("tempo-provenance", "Provenance")] + ([("tempo-tests", "Tests")] if report.tests else [])
    nav = " ".join(f'<a href="#{anchor}">{_text(name)}</a>' for anchor, name in links)
    return (
        f'<header><p class="tempo-kicker">{_text(" · ".join(filter(None, conditions)))}</p><h1>{TITLE}</h1>{alarms}'
        f'<dl class="tempo-brief">{brief}</dl><nav aria-label="Sections">{nav}</nav></header>'
    )


def found_html(report: Report) -> str:
    """The scenario in words and numbers, and that it does not answer the title's question, as long as nothing does."""
    found, fine = scenario(report.findings), just_fine(report.findings)
    named = "Scenario undetermined" if found.short == UNDETERMINED else f"Scenario {found.short}"
    return f'<b class="tempo-answer">{_text(named)}.</b> {_text(found.text)} {_text(fine.text)}'


def certainty(report: Report) -> list[str]:
    """How sure it is, computed from the findings."""
    found = report.findings
    counts = [f"{n} {v.lower()}" for v in ("SUPPORTED", "REFUTED", "INCONCLUSIVE") if (n := sum(f.verdict == v for f in found))]
    behaved = sum(f.control_holds for f in found)
    controls = "all of their negative controls behaved" if behaved == len(found) else f"{behaved} of {len(found)} negative controls behaved"
    claims = "claim" if len(found) == 1 else "claims"
    lines = [f"{len(found)} registered {claims}: {', '.join(counts) or 'none'}; {controls}."]
    if ps := _deciding_ps(report):
        lines.append(f"Behind the scenario stand {len(ps)} verdicts with corrected p of at most {number(max(ps))}.")
    if report.quick_look:
        lines.append(f"A quick look at {report.quick_look} prompts of the suite only.")
    lines.append("95 % intervals over prompts, p Holm-corrected. One model and short English prompts: no more than that.")
    return lines


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
    lines = [f"Invariant violated: {', '.join(broken)}. The harness is not sound; trust nothing below."] if broken else []
    return lines + ([f"Negative control did not behave: {', '.join(blind)}. These checks prove nothing."] if blind else [])


def _questions(findings: Sequence[Finding]) -> str:
    cards = [*questions(findings), scenario(findings), recommended_mode(findings)]
    return f'<section id="tempo-questions"><h2>The questions</h2><div class="tempo-cards">{"".join(map(_card, cards))}</div></section>'


def _card(answer: Answer) -> str:
    links = ", ".join(f'<a href="#claim-{slug(claim)}"><code>{_text(claim)}</code></a>' for claim in answer.claims)
    rests = f"<p>Rests on {links}.</p>" if links else ""
    return (
        f'<article class="tempo-card"><h3>{_text(answer.question)}</h3><p><b class="tempo-answer">{_text(answer.short)}.</b> '
        f"{_text(answer.text)}</p><details><summary>By which rule</summary><p>{_text(answer.rule)}</p>{rests}</details></article>"
    )


def _section(section: Section, findings: Sequence[Finding]) -> str:
    """One config: its verdicts in a line, its figures, its evidence."""
    own = [f for f in findings if f.context.get("config") == section.config]
    verdicts = "".join(f'<li><a href="#claim-{slug(f.label)}">{_text(f.statement)}</a> <b>{_text(f.verdict.lower())}</b></li>' for f in own)
    pictures = "\n".join(map(to_html, section.pictures))
    problem = f'<p class="tempo-alarm">No pictures: {_text(section.problem)}</p>' if section.problem else ""
    settings = "".join(f"<dt>{_text(k)}</dt><dd>{_text(_json(v))}</dd>" for k, v in section.settings.items())
    evidence = f'<dl class="tempo-about">{settings}<dt>prompts measured</dt><dd>{section.num_prompts}</dd>'
    evidence += f"<dt>raw results</dt><dd>{_text(section.folder)}/: {_text(', '.join(section.files))}</dd>"
    evidence += f"<dt>fingerprint</dt><dd>{_text(section.fingerprint)}</dd></dl>"
    evidence += f"<pre>{_text(section.text)}</pre>" if section.text else ""
    evidence += f"<pre>{_lines(section.analysis)}</pre>" if section.analysis else ""
    name = f"{_text(section.experiment)}: {_text(section.title)} <small>{_text(section.config)}</small>"
    return (
        f'<section id="{section.anchor}"><h2>{name}</h2>{problem}'
        f'<details class="tempo-verdicts"><summary>{len(own)} claims</summary><ul>{verdicts}</ul></details>'
        f'<div class="tempo-pictures">{pictures}</div>'
        f"<details><summary>Evidence: config, sets and raw numbers</summary>{evidence}</details></section>"
    )


def _provenance(report: Report) -> str:
    entries = "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in report.about.items())
    entries = entries or "<dt>Session</dt><dd>not on record</dd>"
    return f'<section id="tempo-provenance"><h2>Provenance</h2><dl class="tempo-about">{entries}</dl></section>'


def _variant(section: Section, sections: Sequence[Section]) -> str:
    """What tells a config from the others of its experiment; empty if it is the only one."""
    alone = sum(other.experiment == section.experiment for other in sections) == 1
    return "" if alone else f" ({section.folder.removeprefix(section.experiment).strip('_') or section.config})"


def _range(values: Iterable[int]) -> str:
    distinct = sorted(set(values))
    return "no" if not distinct else str(distinct[0]) if len(distinct) == 1 else f"{distinct[0]} to {distinct[-1]}"


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _lines(text: str) -> str:
    return "\n".join(map(_text, text.split("\n")))


def _text(value: object) -> str:
    return html.escape(visible(str(value)))
