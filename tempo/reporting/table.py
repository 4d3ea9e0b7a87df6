"""The table of claims: verdict, effect, n, corrected p, control. It can be sorted and filtered."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tempo.claims import Finding, standing
from tempo.reporting.findings import (
    PRIMARY,
    SIGNS,
    behaved,
    deciding,
    interval,
    primary_first,
    rank,
    role,
)
from tempo.text import html_text, number, slug

_WIDTH, _HEIGHT = 150, 22  # of the drawn effect, in CSS pixels
# The heading of each column, and whether it sorts by numbers or by text.
_COLUMNS = (
    ("Verdict", "number"),
    ("Claim", "text"),
    ("Effect [95 % interval]", "number"),
    ("n", "number"),
    ("p, corrected", "number"),
    ("Negative control", "number"),
)


def claims_table(findings: Sequence[Finding], at: str = "") -> str:
    """The findings as a table, the primary ones first.

    Filters and sort buttons are there only where a script can serve them.
    at: what the ids of this table begin with, so that a page can hold several.
    """
    head = "".join(f'<th scope="col" data-sort="{kind}">{name}</th>' for name, kind in _COLUMNS)
    boxes = ""
    for verdict, sign in SIGNS.items():
        name, n = verdict.lower(), sum(f.verdict == verdict for f in findings)
        if verdict == "INAPPLICABLE" and not n:
            continue
        box = f'<input type="checkbox" checked value="{name}"/>'
        boxes += f"<label>{box} {sign} {name} ({n})</label>"
    seen: set[str] = set()
    body = "\n".join(_row(f, seen, at) for f in primary_first(findings))
    return (
        f'<fieldset class="tempo-filters" hidden><legend>Show</legend>{boxes}'
        "<output></output></fieldset>"
        '<div class="tempo-scroll" tabindex="0" role="region" aria-label="Table of claims">'
        f'<table class="tempo-table tempo-claims tempo-stacked"><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
        "<p><small>The bar is the 95 % interval and the mark the estimate. The claim would hold in "
        "the shaded region. The thin line is zero. Each row has its own scale.</small></p>"
    )


def _row(f: Finding, seen: set[str], at: str) -> str:
    """The finding's row; `seen` collects the ids, so that each stands in the page once."""
    raw, p = deciding(f)
    against = ", against it" if f.verdict == "REFUTED" else ""
    shown_p = "exact<small>invariant</small>"
    if f.kind == "empirical":
        shown_p = f"{number(p)}<small>raw {number(raw)}{against}</small>"
    # A link to a claim without its config leads to the claim's first config.
    own, shared = (f"{at}claim-{slug(name)}" for name in (f.label, f.claim))
    also = f'<span id="{shared}"></span>' if shared != own and shared not in seen else ""
    seen |= {own, shared}
    units = f.unit if f.n == 1 else f"{f.unit}s"
    control = f"{number(f.control_estimate)}: {behaved(f)}"
    cells = (
        _cell("Verdict", list(SIGNS).index(f.verdict), f"{badge(f)}<small>{rank(f)}</small>"),
        _cell(
            "Claim",
            html_text(f.label),
            f"{also}<code>{html_text(f.label)}</code><br>{html_text(f.statement)}{_how(f)}",
        ),
        _cell(
            "Effect",
            _value(f.estimate),
            f"{effect_svg(f)}<br>{interval(f)}",
            "tempo-number",
        ),
        _cell("n", f.n, f"{f.n}<small>{html_text(units)}</small>", "tempo-number"),
        _cell("p", _value(p), shown_p, "tempo-number"),
        _cell(
            "Control",
            _value(f.control_estimate),
            f"{html_text(f.control)}<small>{html_text(control)}</small>",
            "" if f.control_holds else "tempo-alarm",
        ),
    )
    leading = ' class="tempo-primary"' if role(f) == PRIMARY else ""
    return f'<tr id="{own}"{leading} data-verdict="{f.verdict.lower()}">{"".join(cells)}</tr>'


def _cell(label: str, value: object, content: str, kind: str = "") -> str:
    """A cell of HTML; `value` is what it sorts by."""
    of_class = f' class="{kind}"' if kind else ""
    return f'<td data-label="{label}" data-value="{value}"{of_class}>{content}</td>'


def badge(f: Finding) -> str:
    """The verdict as a coloured word."""
    verdict = f.verdict.lower()
    return f'<span class="tempo-badge tempo-{verdict}">{SIGNS[f.verdict]} {verdict}</span>'


def _how(f: Finding) -> str:
    margin = f"Margin {number(f.margin)}: {f.margin_reason}" if f.margin else f.margin_reason
    size = "" if math.isnan(f.effect_size) else f"Effect size {number(f.effect_size)}"
    parts = (f.reason, _dated(f), f"Statistic: {f.statistic}", f"Test: {f.test}", margin, size)
    said = "".join(f"{part}. " for part in parts if part) + f"Refuted by {f.refuted_by}."
    summary = "<summary>How it was decided</summary>"
    return f"<details>{summary}<small>{html_text(said)}</small></details>"


def _dated(f: Finding) -> str:
    """Whether the data can confirm the claim, and the dates that say so."""
    why = standing(f).why
    return "" if f.kind == "invariant" else why[0].upper() + why[1:]


def effect_svg(f: Finding, beside: Sequence[Finding] = ()) -> str:
    """The effect as a small picture: estimate, interval, where the claim would hold, and zero.

    beside: findings about the same claim whose pictures are to have the same scale.
    """
    if not math.isfinite(f.estimate):
        return ""
    low, high = _scale(f, beside)

    def at(x: float) -> str:
        return f"{_WIDTH * (min(max(x, low), high) - low) / (high - low):.1f}"

    regions = {"always": (0.98, high), "less": (low, f.margin), "equivalent": (-f.margin, f.margin)}
    start, end = regions.get(f.test, (f.margin, high))
    width = max(0.0, float(at(end)) - float(at(start)))
    middle = _HEIGHT / 2
    zero = at(0.0)
    drawn = [
        f'<rect x="{at(start)}" y="1" width="{width:.1f}" height="{_HEIGHT - 2}"/>',
        f'<line class="tempo-zero" x1="{zero}" x2="{zero}" y1="0" y2="{_HEIGHT}"/>',
    ]
    if math.isfinite(f.low) and math.isfinite(f.high):
        ends = f'x1="{at(f.low)}" x2="{at(f.high)}" y1="{middle}" y2="{middle}"'
        drawn.append(f'<line class="tempo-ci" {ends}/>')
    drawn.append(f'<circle class="tempo-mark" cx="{at(f.estimate)}" cy="{middle}" r="4"/>')
    return (
        f'<svg class="tempo-effect tempo-{f.verdict.lower()}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-hidden="true">{"".join(drawn)}</svg>'
    )


def _scale(f: Finding, beside: Sequence[Finding]) -> tuple[float, float]:
    """Both ends of the picture: it shows all estimates and intervals, the margin, and zero."""
    low, high = 0.0, 1.0
    if f.test not in ("always", "proportion"):
        ends = [x for g in (f, *beside) for x in (g.estimate, g.low, g.high) if math.isfinite(x)]
        values = [min(max(x, -1e300), 1e300) for x in ends]
        low, high = min(0.0, *values), max(0.0, f.margin, *values)
    if f.test == "equivalent":
        low = min(low, -f.margin)
    pad = 0.06 * ((high - low) or 1.0)
    return low - pad, high + pad


def _value(x: float) -> str:
    """For sorting; empty if there is no number."""
    return repr(float(x)) if math.isfinite(x) else ""
