"""A step, a finding, and a list of findings, as a notebook shows them: HTML without a script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tempo.claims import Finding
from tempo.text import html_text, number
from tempo.trace import Step
from tempo.viewing.data import shown

# No MathJax here, see `page.py`. The colours are the notebook's own.
OPEN = '<div class="tex2jax_ignore mathjax_ignore">'
MOST_MEMBERS = 50
SIGNS = {"SUPPORTED": "✓", "REFUTED": "✗", "INCONCLUSIVE": "?"}
LEFT = ' style="text-align:left"'


def step_html(step: Step) -> str:
    """The members of a set with their probabilities."""
    rows = []
    for i, (text, probability) in enumerate(zip(step.texts, step.probabilities, strict=True)):
        if i == MOST_MEMBERS:
            rows.append(f"<tr><td></td><td{LEFT}>and {len(step.texts) - i} more</td></tr>")
            break
        rows.append(
            f"<tr><td>{i}</td><td{LEFT}><bdi><code>{html_text(shown(text))}</code></bdi></td>"
            f"<td>{number(probability)}</td><td{LEFT}>{_bar(probability)}</td>"
            f"<td>{step.tokens[i]}</td><td>{step.slots[i]}</td></tr>"
        )
    captured = [
        name for name in ("logits", "attention", "siblings") if getattr(step, name) is not None
    ]
    said = f"{len(step.tokens)} tokens at position {step.position}"
    said += f"; captured: {', '.join(captured)}" if captured else ""
    heads = _heads("", "token", "probability", "", "id", "slot")
    caption = f"<caption{LEFT}>{said}</caption>"
    return f"{OPEN}<table>{caption}{heads}<tbody>{''.join(rows)}</tbody></table></div>"


def findings_html(findings: Sequence[Finding]) -> str:
    """One line for each finding: claim, verdict, estimate with its interval, n, control."""
    rows = []
    for finding in findings:
        control = number(finding.control_estimate)
        control += "" if finding.control_holds else ", misbehaves"
        rows.append(
            f"<tr><td{LEFT}><code>{html_text(finding.label)}</code><br/>"
            f"{html_text(finding.statement)}</td><td{LEFT}>{_verdict(finding)}</td>"
            f"<td>{_interval(finding)}</td><td>{finding.n}</td><td>{html_text(control)}</td>"
            f"<td{LEFT}>{html_text(finding.context.get('model', ''))}</td></tr>"
        )
    heads = _heads("claim", "verdict", "estimate [95 % interval]", "n", "control", "model")
    return f"{OPEN}<table>{heads}<tbody>{''.join(rows)}</tbody></table></div>"


def finding_html(finding: Finding) -> str:
    """A finding in full sentences: the statement, the verdict and its reason, and the numbers."""
    facts = {
        "estimate": f"{_interval(finding)}, n {finding.n} {finding.unit}s",
        "margin": f"{number(finding.margin)} {finding.margin_reason}",
        "control": f"{finding.control}: {number(finding.control_estimate)}"
        + ("" if finding.control_holds else ", MISBEHAVES"),
        "p corrected": f"{number(finding.p_corrected)} for, "
        f"{number(finding.p_against_corrected)} against",
        "refuted by": finding.refuted_by,
        "model": str(finding.context.get("model", "")),
    }
    rows = [
        f"<tr><th{LEFT}>{name}</th><td{LEFT}>{html_text(said)}</td></tr>"
        for name, said in facts.items()
        if said.strip()
    ]
    return (
        f"{OPEN}<p><b>{html_text(finding.statement)}</b> "
        f"<code>{html_text(finding.label)}</code><br/>{_verdict(finding)}: "
        f"{html_text(finding.reason)}</p>"
        f"<table><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _verdict(finding: Finding) -> str:
    sign = SIGNS.get(finding.verdict, "")
    return f"<b>{sign} {html_text(str(finding.verdict).lower())}</b>"


def _interval(finding: Finding) -> str:
    return f"{number(finding.estimate)} [{number(finding.low)}, {number(finding.high)}]"


def _heads(*names: str) -> str:
    cells = "".join(f'<th scope="col"{LEFT}>{escape(name)}</th>' for name in names)
    return f"<thead><tr>{cells}</tr></thead>"


def _bar(probability: float) -> str:
    """A bar beside the number. The number says the same."""
    width = round(100 * min(1.0, max(0.0, probability)))
    return (
        f'<span style="display:inline-block;height:.7em;background:#0072B2;width:{width}px"></span>'
    )
