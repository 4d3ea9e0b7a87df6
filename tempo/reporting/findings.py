"""From findings to what people read: a table for the terminal, and Markdown.

Every string that comes from data or models passes `escaped` and then the escaping of its target.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

from tempo.claims import Finding, standing
from tempo.text import escaped, number

NARROW, WIDE = 80, 120  # columns of a table in a terminal: at least, at most
CLAIM = 28  # of which so many name a claim
MAX_LINES = 20  # of the table in a terminal: what fits above the fold of a small window
# The one family of claims that answers the questions. Every other empirical claim is secondary.
PRIMARY = "primary"
ROLES = (PRIMARY, "secondary", "invariant")
BLIND = "control!"  # in place of a p: the control supports the claim as well
# The verdicts, most in need of attention first.
SIGNS = {"REFUTED": "✕", "INCONCLUSIVE": "◇", "INAPPLICABLE": "–", "SUPPORTED": "●"}


def role(finding: Finding) -> str:
    """What the claim is for. An invariant checks the harness itself; no statistics decide it."""
    if finding.kind == "invariant":
        return "invariant"
    return PRIMARY if finding.family == PRIMARY else "secondary"


def rank(finding: Finding) -> str:
    """The role and, where statistics decide, whether the finding can confirm its claim."""
    name = role(finding)
    return name if name == "invariant" else f"{name}, {standing(finding).word}"


def primary_first(findings: Iterable[Finding]) -> list[Finding]:
    """The primary claims, then all others; each in the order they had."""
    return sorted(findings, key=lambda f: role(f) != PRIMARY)


def counts(findings: Sequence[Finding]) -> str:
    """`3 supported, 1 refuted`."""
    return ", ".join(
        f"{n} {v.lower()}" for v in reversed(SIGNS) if (n := sum(f.verdict == v for f in findings))
    )


def findings_table(findings: Sequence[Finding], columns: int = NARROW) -> list[str]:
    """The findings as at most 20 lines of at most so many columns, of which 80 are needed.

    What a terminal has beyond them goes to the names of claims.
    The primary ones come first, marked with *. If not all fit, those that need attention stay.
    """
    room = MAX_LINES - 2  # the header, and the line that says how many more
    shown = list(findings)
    if len(shown) > room:
        shown.sort(key=lambda f: (f.control_holds, list(SIGNS).index(f.verdict)))
        shown.sort(key=lambda f: f.verdict == "SUPPORTED" and f.control_holds)
    shown = primary_first(shown)
    claim = "claim (* primary)" if any(role(f) == PRIMARY for f in shown) else "claim"
    wide = CLAIM + max(0, min(columns, WIDE) - NARROW)
    lines = [_line("verdict", claim.ljust(wide), "estimate [95 % interval]", "n", "p corr.")]
    for f in shown[:room]:
        name = f"{_cut(f.label, wide - 2)} *" if role(f) == PRIMARY else _cut(f.label, wide)
        p = number(deciding(f)[1]) if f.control_holds else BLIND
        lines.append(_line(f.verdict, name.ljust(wide), _short_interval(f), str(f.n), p))
    if rest := shown[room:]:
        only_supported = all(f.verdict == "SUPPORTED" for f in rest)
        lines.append(
            f"... and {len(rest)} more " + ("supported" if only_supported else f"({counts(rest)})")
        )
    return lines


def findings_markdown(findings: Sequence[Finding]) -> str:
    """The findings as a Markdown table, one row per claim, the primary ones first."""
    lines = [
        "| verdict | claim | role | statement | estimate [95 % interval] | n | p corrected "
        "| control |",
        "|---|---|---|---|--:|--:|--:|---|",
    ]
    for f in primary_first(findings):
        control = f"{f.control}: {number(f.control_estimate)}, {behaved(f)}"
        verdict = f"{SIGNS[f.verdict]} {f.verdict.lower()}"
        claim = (verdict, f.label, rank(f), f.statement)
        numbers = (interval(f), f"{f.n} {f.unit}s", number(deciding(f)[1]))
        lines.append(markdown_row(*claim, *numbers, control))
    return "\n".join(lines) + "\n"


def findings_summary(
    findings: Sequence[Finding], problems: Sequence[str], notes: Sequence[str] = ()
) -> str:
    """The findings in Markdown for the page of a CI job: what went wrong, then the table."""
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


def alarms(findings: Sequence[Finding]) -> list[str]:
    """What makes the harness itself doubtful, before anything it says."""
    broken = ", ".join(f.label for f in findings if violated(f))
    blind = ", ".join(f.label for f in findings if not f.control_holds)
    lines = []
    if broken:
        lines.append(
            f"Invariant violated: {broken}. The harness is not sound; trust nothing below."
        )
    if blind:
        lines.append(f"Negative control did not behave: {blind}. These checks prove nothing.")
    return lines


def _line(verdict: str, claim: str, estimate: str, n: str, p: str) -> str:
    """A line of the table; with a claim of 28 it has 79 columns unless a number is very long."""
    return f"{verdict:<12} {claim} {estimate:<24} {n:>3} {p:>8}"


def _short_interval(f: Finding) -> str:
    """The interval, with as many digits as fit, of three."""
    said = interval(f)
    for digits, room in ((2, 24), (1, 25)):  # what the table has, and one column that it can spare
        if len(said) > room:
            ends = (number(float(f"{x:.{digits}g}")) for x in (f.estimate, f.low, f.high))
            said = "{} [{}, {}]".format(*ends)
    return said


def _cut(text: str, length: int) -> str:
    """The text, without its middle if it is too long: names differ at both ends."""
    text = escaped(text)
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[head + 1 - length :]}"


def markdown_cell(cell: str) -> str:
    """Plain text in a cell: no markup, no HTML, no mathematics, no second column."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(escaped(cell), quote=False))


def markdown_row(*cells: str) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(markdown_cell, cells))} |"


def interval(finding: Finding) -> str:
    return f"{number(finding.estimate)} [{number(finding.low)}, {number(finding.high)}]"


def violated(finding: Finding) -> bool:
    return finding.kind == "invariant" and finding.verdict == "REFUTED"


def deciding(finding: Finding) -> tuple[float, float]:
    """The p, raw and corrected, behind the verdict: for a refutation the one against the claim."""
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
