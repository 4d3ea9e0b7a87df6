"""From findings to what people read: a table for the terminal, and Markdown.

Every string that comes from data or models passes `escaped` and then the escaping of its target.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

from tempo.claims import Finding
from tempo.text import escaped, number

MAX_LINES = 20  # of the table in a terminal: what fits above the fold of a small window
CONFIRMATORY = "confirmatory"  # the one family of claims that answers the questions; every other empirical claim is exploratory
ROLES = ("confirmatory", "exploratory", "invariant")
SIGNS = {"REFUTED": "✕", "INCONCLUSIVE": "◇", "SUPPORTED": "●"}  # most in need of attention first


def role(finding: Finding) -> str:
    """What the claim is for: an invariant is a check of the harness, which no statistics decide."""
    if finding.kind == "invariant":
        return "invariant"
    return "confirmatory" if finding.family == CONFIRMATORY else "exploratory"


def confirmatory_first(findings: Iterable[Finding]) -> list[Finding]:
    """The confirmatory claims, then all others; each in the order they had."""
    return sorted(findings, key=lambda f: role(f) != "confirmatory")


def counts(findings: Sequence[Finding]) -> str:
    """`3 supported, 1 refuted`."""
    return ", ".join(
        f"{n} {v.lower()}" for v in reversed(SIGNS) if (n := sum(f.verdict == v for f in findings))
    )


def findings_table(findings: Sequence[Finding]) -> list[str]:
    """The findings as at most 20 lines of at most 110 columns: the confirmatory ones, marked with *, then, if not all fit,
    those that need attention."""
    room = MAX_LINES - 2  # the header, and the line that says how many more
    shown = list(findings)
    if len(shown) > room:
        shown.sort(key=lambda f: (f.control_holds, list(SIGNS).index(f.verdict)))
        shown.sort(key=lambda f: f.verdict == "SUPPORTED" and f.control_holds)
    shown = confirmatory_first(shown)
    claim = "claim (* confirmatory)" if any(role(f) == "confirmatory" for f in shown) else "claim"
    lines = [f"{'verdict':<13}{claim:<40} {'estimate [95 % interval]':<32}{'n':>5} {'p corr.':>9}"]
    for f in shown[:room]:
        name = f"{_cut(f.label, 38)} *" if role(f) == "confirmatory" else _cut(f.label, 40)
        row = f"{f.verdict:<13}{name:<40} {interval(f):<32}{f.n:>5} {number(deciding(f)[1]):>9}"
        lines.append(row + ("" if f.control_holds else " control!"))
    if rest := shown[room:]:
        only_supported = all(f.verdict == "SUPPORTED" for f in rest)
        lines.append(
            f"... and {len(rest)} more " + ("supported" if only_supported else f"({counts(rest)})")
        )
    return lines


def findings_markdown(findings: Sequence[Finding]) -> str:
    """The findings as a Markdown table, one row per claim, the confirmatory ones first."""
    head = (
        "verdict",
        "claim",
        "role",
        "statement",
        "estimate [95 % interval]",
        "n",
        "p corrected",
        "control",
    )
    lines = ["| " + " | ".join(head) + " |", "|---|---|---|---|--:|--:|--:|---|"]
    for f in confirmatory_first(findings):
        control = f"{f.control}: {number(f.control_estimate)}, {behaved(f)}"
        verdict = f"{SIGNS[f.verdict]} {f.verdict.lower()}"
        cells = (
            verdict,
            f.label,
            role(f),
            f.statement,
            interval(f),
            f"{f.n} {f.unit}s",
            number(deciding(f)[1]),
            control,
        )
        lines.append("| " + " | ".join(markdown_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def findings_summary(
    findings: Sequence[Finding], problems: Sequence[str], notes: Sequence[str] = ()
) -> str:
    """The findings for the summary page of a CI job, in Markdown: what went wrong first, then the table."""
    lines = [f"## tempo: {counts(findings) or 'no findings'}", ""]
    lines += [
        f"- **regression** {markdown_cell(' '.join(problem.split()))}" for problem in problems
    ]
    lines += [
        f"- **invariant** {markdown_cell(f.label)}: {markdown_cell(f.reason)}"
        for f in findings
        if violated(f)
    ]
    blind = [markdown_cell(f.label) for f in findings if not f.control_holds]
    lines += [
        f"- **control** {label}: the check supports its own control as well" for label in blind
    ]
    lines += [f"- {markdown_cell(note)}" for note in notes]
    return "\n".join([*lines, "", findings_markdown(findings)])


def _cut(text: str, length: int) -> str:
    text = escaped(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def markdown_cell(cell: str) -> str:
    """Plain text in a cell: no markup, no HTML, no mathematics, no second column."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(escaped(cell), quote=False))


def interval(finding: Finding) -> str:
    return f"{number(finding.estimate)} [{number(finding.low)}, {number(finding.high)}]"


def violated(finding: Finding) -> bool:
    return finding.kind == "invariant" and finding.verdict == "REFUTED"


def deciding(finding: Finding) -> tuple[float, float]:
    """The p, raw and corrected, that the verdict rests on: of a refutation the one against the claim."""
    return (
        (finding.p_against, finding.p_against_corrected)
        if finding.verdict == "REFUTED"
        else (finding.p, finding.p_corrected)
    )


def behaved(finding: Finding) -> str:
    if not finding.control_holds:
        return "SUPPORTS IT TOO: this check proves nothing"
    if math.isnan(finding.control_estimate):
        return "not measured: nothing shows here that this check can fail"
    return "does not support it, as it should"
