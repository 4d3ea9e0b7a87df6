"""From findings to what people read: a table for the terminal, and Markdown.

Every string that comes from data or models passes `visible` and then the escaping of its target.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence

from tempo.claims import Finding
from tempo.reporting.text import number, visible

MAX_LINES = 20  # of the table in a terminal: what fits above the fold of a small window
SIGNS = {"REFUTED": "✕", "INCONCLUSIVE": "◇", "SUPPORTED": "●"}  # most in need of attention first


def findings_table(findings: Sequence[Finding]) -> list[str]:
    """The findings as at most 20 lines of at most 110 columns; if not all fit, those that need attention come first."""
    room = MAX_LINES - 2  # the header, and the line that says how many more
    shown = list(findings)
    if len(shown) > room:
        shown.sort(key=lambda f: (f.control_holds, list(SIGNS).index(f.verdict)))
        shown.sort(key=lambda f: f.verdict == "SUPPORTED" and f.control_holds)
    lines = [f"{'verdict':<13}{'claim':<40} {'estimate [95 % interval]':<32}{'n':>5} {'p corr.':>9}"]
    for f in shown[:room]:
        row = f"{f.verdict:<13}{_cut(f.label, 40):<40} {interval(f):<32}{f.n:>5} {number(deciding(f)[1]):>9}"
        lines.append(row + ("" if f.control_holds else " control!"))
    if rest := shown[room:]:
        counts = [f"{n} {v.lower()}" for v in SIGNS if (n := sum(f.verdict == v for f in rest))]
        only_supported = all(f.verdict == "SUPPORTED" for f in rest)
        lines.append(f"... and {len(rest)} more " + ("supported" if only_supported else f"({', '.join(counts)})"))
    return lines


def findings_markdown(findings: Sequence[Finding]) -> str:
    """The findings as a Markdown table, one row per claim."""
    head = ("verdict", "claim", "statement", "estimate [95 % interval]", "n", "p corrected", "control")
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|--:|--:|--:|---|"]
    for f in findings:
        control = f"{f.control}: {number(f.control_estimate)}, {behaved(f)}"
        verdict = f"{SIGNS[f.verdict]} {f.verdict.lower()}"
        cells = (verdict, f.label, f.statement, interval(f), f"{f.n} {f.unit}s", number(deciding(f)[1]), control)
        lines.append("| " + " | ".join(markdown_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def findings_summary(findings: Sequence[Finding], problems: Sequence[str], notes: Sequence[str] = ()) -> str:
    """The findings for the summary page of a CI job, in Markdown: what went wrong first, then the table."""
    counts = [f"{n} {v.lower()}" for v in reversed(SIGNS) if (n := sum(f.verdict == v for f in findings))]
    lines = [f"## tempo: {', '.join(counts) or 'no findings'}", ""]
    lines += [f"- **regression** {markdown_cell(' '.join(problem.split()))}" for problem in problems]
    lines += [f"- **invariant** {markdown_cell(f.label)}: {markdown_cell(f.reason)}" for f in findings if violated(f)]
    blind = [markdown_cell(f.label) for f in findings if not f.control_holds]
    lines += [f"- **control** {label}: the check supports its own control as well" for label in blind]
    lines += [f"- {markdown_cell(note)}" for note in notes]
    return "\n".join([*lines, "", findings_markdown(findings)])


def _cut(text: str, length: int) -> str:
    text = visible(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def markdown_cell(cell: str) -> str:
    """Plain text in a cell: no markup, no HTML, no mathematics, no second column."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(visible(cell), quote=False))


def interval(finding: Finding) -> str:
    return f"{number(finding.estimate)} [{number(finding.low)}, {number(finding.high)}]"


def violated(finding: Finding) -> bool:
    return finding.kind == "invariant" and finding.verdict == "REFUTED"


def deciding(finding: Finding) -> tuple[float, float]:
    """The p, raw and corrected, that the verdict rests on: of a refutation the one against the claim."""
    return (finding.p_against, finding.p_against_corrected) if finding.verdict == "REFUTED" else (finding.p, finding.p_corrected)


def behaved(finding: Finding) -> str:
    if not finding.control_holds:
        return "SUPPORTS IT TOO: this check proves nothing"
    if math.isnan(finding.control_estimate):
        return "not measured: nothing shows here that this check can fail"
    return "does not support it, as it should"
