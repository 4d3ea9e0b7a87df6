"""From findings to what people read: terminal table, Markdown, HTML.

Every string that comes from data or models passes `visible` and then the escaping of its target.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence

from tempo.claims import Finding
from tempo.reporting.figures import Picture, forest, number, slug, to_html
from tempo.reporting.text import visible

_NUMBER = ' class="tempo-number"'
MAX_LINES = 20  # of the table in a terminal: what fits above the fold of a small window
_VERDICTS = {"REFUTED": "✕", "INCONCLUSIVE": "◇", "SUPPORTED": "●"}  # most in need of attention first


def findings_table(findings: Sequence[Finding]) -> list[str]:
    """The findings as at most 20 lines of at most 110 columns; if not all fit, those that need attention come first."""
    room = MAX_LINES - 2  # the header, and the line that says how many more
    shown = list(findings)
    if len(shown) > room:
        shown.sort(key=lambda f: (f.control_holds, list(_VERDICTS).index(f.verdict)))
        shown.sort(key=lambda f: f.verdict == "SUPPORTED" and f.control_holds)
    lines = [f"{'verdict':<13}{'claim':<40} {'estimate [95 % interval]':<32}{'n':>5} {'p corr.':>9}"]
    for f in shown[:room]:
        row = f"{f.verdict:<13}{_cut(f.label, 40):<40} {_interval(f):<32}{f.n:>5} {number(_deciding(f)[1]):>9}"
        lines.append(row + ("" if f.control_holds else " control!"))
    if rest := shown[room:]:
        counts = [f"{n} {v.lower()}" for v in _VERDICTS if (n := sum(f.verdict == v for f in rest))]
        only_supported = all(f.verdict == "SUPPORTED" for f in rest)
        lines.append(f"... and {len(rest)} more " + ("supported" if only_supported else f"({', '.join(counts)})"))
    return lines


def findings_markdown(findings: Sequence[Finding]) -> str:
    """The findings as a Markdown table, one row per claim."""
    head = ("verdict", "claim", "statement", "estimate [95 % interval]", "n", "p corrected", "control")
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|--:|--:|--:|---|"]
    for f in findings:
        control = f"{f.control}: {number(f.control_estimate)}, {_behaved(f)}"
        verdict = f"{_VERDICTS[f.verdict]} {f.verdict.lower()}"
        cells = (verdict, f.label, f.statement, _interval(f), f"{f.n} {f.unit}s", number(_deciding(f)[1]), control)
        lines.append("| " + " | ".join(_markdown(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def findings_summary(findings: Sequence[Finding], problems: Sequence[str], notes: Sequence[str] = ()) -> str:
    """The findings for the summary page of a CI job, in Markdown: what went wrong first, then the table."""
    counts = [f"{n} {v.lower()}" for v in reversed(_VERDICTS) if (n := sum(f.verdict == v for f in findings))]
    lines = [f"## tempo: {', '.join(counts) or 'no findings'}", ""]
    lines += [f"- **regression** {_markdown(' '.join(problem.split()))}" for problem in problems]
    lines += [f"- **invariant** {_markdown(f.label)}: {_markdown(f.reason)}" for f in findings if _violated(f)]
    lines += [f"- **control** {_markdown(f.label)}: the check supports its own control as well" for f in findings if not f.control_holds]
    lines += [f"- {_markdown(note)}" for note in notes]
    return "\n".join([*lines, "", findings_markdown(findings)])


def findings_html(findings: Sequence[Finding], pictures_by_experiment: Mapping[str, Sequence[Picture]], about: Mapping[str, str]) -> str:
    """The findings as an HTML fragment: headline, table, forest plot, pictures by experiment, provenance.

    It carries its own CSS (every class begins with `tempo-`) and follows the reader's choice of light or dark.
    """
    parts = [f'<style>{_CSS}</style><section class="tempo-report"><h2>Findings</h2>{_headline(findings)}']
    if pictures_by_experiment:
        links = (f'<a href="#tempo-{slug(name)}">{_text(name)}</a>' for name in pictures_by_experiment)
        parts.append(f'<p class="tempo-nav">Pictures: {" ".join(links)}</p>')
    if findings:
        parts += [_table(findings), to_html(forest(findings))]
    for name, pictures in pictures_by_experiment.items():
        parts.append(f'<h3 id="tempo-{slug(name)}">{_text(name)}</h3><div class="tempo-pictures">')
        parts += [*map(to_html, pictures), "</div>"]
    if about:
        entries = "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in about.items())
        parts.append(f'<h3>Provenance</h3><dl class="tempo-about">{entries}</dl>')
    return "\n".join([*parts, "</section>"])


def _text(value: object) -> str:
    return html.escape(visible(str(value)))


def _cut(text: str, length: int) -> str:
    text = visible(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _markdown(cell: str) -> str:
    """Plain text in a cell: no markup, no HTML, no mathematics, no second column."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(visible(cell), quote=False))


def _interval(finding: Finding) -> str:
    return f"{number(finding.estimate)} [{number(finding.low)}, {number(finding.high)}]"


def _violated(finding: Finding) -> bool:
    return finding.kind == "invariant" and finding.verdict == "REFUTED"


def _deciding(finding: Finding) -> tuple[float, float]:
    """The p, raw and corrected, that the verdict rests on: of a refutation the one against the claim."""
    return (finding.p_against, finding.p_against_corrected) if finding.verdict == "REFUTED" else (finding.p, finding.p_corrected)


def _behaved(finding: Finding) -> str:
    if not finding.control_holds:
        return "SUPPORTS IT TOO: this check proves nothing"
    if math.isnan(finding.control_estimate):
        return "not measured: nothing shows here that this check can fail"
    return "does not support it, as it should"


def _headline(findings: Sequence[Finding]) -> str:
    """What was found, in one paragraph, from the findings alone."""
    counts = [f"<b>{sum(f.verdict == v for f in findings)} {v.lower()}</b>" for v in reversed(_VERDICTS)]
    said = f"{len(findings)} {'claim' if len(findings) == 1 else 'claims'}: {', '.join(counts)}."
    models = sorted({str(f.context["model"]) for f in findings if f.context.get("model")})
    prompts = sorted({int(f.context["n_prompts"]) for f in findings if f.context.get("n_prompts")})
    if models:
        said += f" {'Model' if len(models) == 1 else 'Models'}: <b>{_text(', '.join(models))}</b>."
    if prompts:
        said += f" Prompts: <b>{prompts[0]}</b>." if len(prompts) == 1 else f" Prompts: {prompts[0]} to {prompts[-1]}."
    if failed := [f.label for f in findings if not f.control_holds]:
        said += f" <b>Negative control did not behave:</b> {_text(', '.join(failed))}."
    return f'<p class="tempo-headline">{said}</p>'


def _table(findings: Sequence[Finding]) -> str:
    head = ("Verdict", "Claim", "Effect [95 % interval]", "n", "Test and margin", "p, corrected", "Negative control")
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(str(finding.context.get("experiment", "")), []).append(finding)
    body = ""
    for experiment, members in groups.items():
        if experiment:
            body += f'<tr><th class="tempo-group" colspan="{len(head)}" scope="rowgroup">{_text(experiment)}</th></tr>'
        body += "".join(map(_row, members))
    numeric = ("Effect [95 % interval]", "n", "p, corrected")
    columns = "".join(f'<th scope="col"{_NUMBER * (name in numeric)}>{name}</th>' for name in head)
    return (
        '<div class="tempo-scroll" tabindex="0" role="region" aria-label="Table of claims"><table class="tempo-table">'
        f"<thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(f: Finding) -> str:
    verdict = f.verdict.lower()
    size = "" if math.isnan(f.effect_size) else f"<small>d<sub>z</sub> = {number(f.effect_size)}</small>"
    margin = (f"margin {number(f.margin)}: " if f.margin else "") + _text(f.margin_reason)
    raw_p, corrected_p = _deciding(f)
    corrected = number(corrected_p) if f.kind == "empirical" else "exact"
    raw = f"<small>raw {number(raw_p)}</small>" if f.kind == "empirical" else "<small>invariant</small>"
    mark = "" if f.control_holds else ' class="tempo-alarm"'
    return (
        f'<tr><td><span class="tempo-badge tempo-{slug(verdict)}">{_VERDICTS[f.verdict]} {_text(verdict)}</span></td>'
        f"<td><code>{_text(f.label)}</code><br>{_text(f.statement)}<small>{_text(f.reason)}</small></td>"
        f"<td{_NUMBER}>{number(f.estimate)}<br>[{number(f.low)}, {number(f.high)}]{size}</td>"
        f"<td{_NUMBER}>{f.n}<small>{_text(f.unit)}{'' if f.n == 1 else 's'}</small></td>"
        f"<td>{_text(f.test)}: {_text(f.statistic)}<small>{margin}</small></td>"
        f"<td{_NUMBER}>{corrected}{raw}</td>"
        f"<td{mark}>{_text(f.control)}<small>{number(f.control_estimate)}: {_behaved(f)}</small></td></tr>"
    )


_CSS = """
body:has(.tempo-report) { min-width: 0 }
.tempo-report { --ink: #222; --paper: #fff; --soft: #5f5f5f; --line: #ddd; --link: #00558a; --alarm: #a63d00;
  color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; color-scheme: light dark;
  padding: 1rem; margin: 0 0 1rem; max-width: 80rem; box-sizing: border-box; overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) { .tempo-report { --ink: #ddd; --paper: #111; --soft: #a5a5a5; --line: #3a3a3a;
  --link: #7cc4f0; --alarm: #ff9a5c } }
.tempo-report h2, .tempo-report h3, .tempo-report p { color: inherit }
.tempo-report h2 { font-size: 1.4rem; margin: 0 0 .5rem }
.tempo-report h3 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.tempo-report a { color: var(--link) }
.tempo-report small { display: block; color: var(--soft); font-size: .8rem }
.tempo-headline { font-size: 1.1rem; max-width: 60rem }
.tempo-scroll { overflow-x: auto; max-width: 100% }
.tempo-table { border-collapse: collapse; font-size: .875rem; width: 100%; min-width: 62rem }
.tempo-table { font-variant-numeric: tabular-nums }
.tempo-table th, .tempo-table td { text-align: left; vertical-align: top; padding: .4rem .6rem }
.tempo-table th, .tempo-table td { border-bottom: 1px solid var(--line) }
.tempo-table .tempo-number { text-align: right; white-space: nowrap }
.tempo-table .tempo-group { padding-top: 1rem }
.tempo-badge { white-space: nowrap; color: #fff; border-radius: .3rem; padding: .1rem .45rem; font-weight: 600 }
.tempo-supported { background: #00664b }
.tempo-refuted { background: #a63d00 }
.tempo-inconclusive { background: #82406c }
.tempo-report .tempo-alarm, .tempo-report .tempo-alarm small { color: var(--alarm); font-weight: 600 }
.tempo-pictures { display: flex; flex-wrap: wrap; gap: 0 2rem }
.tempo-figure { margin: 1rem 0; max-width: 100%; min-width: 0 }
.tempo-figure figcaption { max-width: 45rem; font-size: .875rem }
.tempo-about { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr; gap: .2rem 1rem }
.tempo-about dt { font-weight: 600 }
.tempo-about dd { margin: 0 }
"""
