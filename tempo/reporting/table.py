"""The table of claims: verdict, effect with interval drawn and in numbers, n, corrected p, control. Sortable, filterable."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from tempo.claims import Finding
from tempo.reporting.findings import SIGNS, behaved, confirmatory_first, deciding, interval, role
from tempo.text import escaped, number, slug

_WIDTH, _HEIGHT = 150, 22  # of the drawn effect, in CSS pixels
_COLUMNS = (("Verdict", "number"), ("Claim", "text"), ("Effect [95 % interval]", "number"), ("n", "number"), ("p, corrected", "number"),
            ("Negative control", "number"))  # fmt: skip


def claims_table(findings: Sequence[Finding], at: str = "") -> str:
    """The findings as a table, the confirmatory ones first; filters and sort buttons are there only where a script can serve them.

    at: what the ids of this table begin with, so that a page can hold several.
    """
    head = "".join(f'<th scope="col" data-sort="{kind}">{name}</th>' for name, kind in _COLUMNS)
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in SIGNS}
    boxes = "".join(
        f'<label><input type="checkbox" checked value="{verdict.lower()}"/> {SIGNS[verdict]} {verdict.lower()} ({n})</label>'
        for verdict, n in counts.items()
    )
    seen: set[str] = set()
    body = "\n".join(_row(f, seen, at) for f in confirmatory_first(findings))
    return (
        f'<fieldset class="tempo-filters" hidden><legend>Show</legend>{boxes}<output></output></fieldset>'
        '<div class="tempo-scroll" tabindex="0" role="region" aria-label="Table of claims">'
        f'<table class="tempo-table tempo-claims tempo-stacked"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
        "<p><small>The bar is the 95 % interval, the mark the estimate, the shaded region where the claim would hold, the thin line zero; "
        "each row has its own scale.</small></p>"
    )


def _row(f: Finding, seen: set[str], at: str) -> str:
    verdict = f.verdict.lower()
    raw, p = deciding(f)
    against = ", against it" if f.verdict == "REFUTED" else ""
    shown_p = (
        f"{number(p)}<small>raw {number(raw)}{against}</small>"
        if f.kind == "empirical"
        else "exact<small>invariant</small>"
    )
    own, shared = (
        f"{at}claim-{slug(f.label)}",
        f"{at}claim-{slug(f.claim)}",
    )  # of this config; of the claim, for its first config
    also = f'<span id="{shared}"></span>' if shared != own and shared not in seen else ""
    seen |= {own, shared}
    mark = "" if f.control_holds else ' class="tempo-alarm"'
    cells = (
        f'<td data-label="Verdict" data-value="{list(SIGNS).index(f.verdict)}">{badge(f)}<small>{role(f)}</small></td>',
        f'<td data-label="Claim" data-value="{_text(f.label)}">{also}<code>{_text(f.label)}</code><br>{_text(f.statement)}{_how(f)}</td>',
        f'<td data-label="Effect" data-value="{_value(f.estimate)}" class="tempo-number">{effect_svg(f)}<br>{interval(f)}</td>',
        f'<td data-label="n" data-value="{f.n}" class="tempo-number">{f.n}<small>{_text(f.unit)}{"" if f.n == 1 else "s"}</small></td>',
        f'<td data-label="p" data-value="{_value(p)}" class="tempo-number">{shown_p}</td>',
        f'<td data-label="Control" data-value="{_value(f.control_estimate)}"{mark}>{_text(f.control)}'
        f"<small>{number(f.control_estimate)}: {_text(behaved(f))}</small></td>",
    )
    leading = ' class="tempo-confirmatory"' if role(f) == "confirmatory" else ""
    return f'<tr id="{own}"{leading} data-verdict="{verdict}">{"".join(cells)}</tr>'


def badge(f: Finding) -> str:
    return f'<span class="tempo-badge tempo-{f.verdict.lower()}">{SIGNS[f.verdict]} {f.verdict.lower()}</span>'


def _how(f: Finding) -> str:
    size = "" if math.isnan(f.effect_size) else f" Effect size {number(f.effect_size)}."
    margin = (
        f" Margin {number(f.margin)}: {f.margin_reason}." if f.margin else f" {f.margin_reason}"
    )
    said = f"{f.reason}. Statistic: {f.statistic}. Test: {f.test}.{margin}{size} Refuted by {f.refuted_by}."
    return f"<details><summary>How it was decided</summary><small>{_text(said)}</small></details>"


def effect_svg(f: Finding, beside: Sequence[Finding] = ()) -> str:
    """The effect with its interval as a small picture: estimate, interval, where the claim would hold, zero.

    beside: findings about the same claim whose pictures are to have the same scale.
    """
    values = [
        min(max(x, -1e300), 1e300)
        for g in (f, *beside)
        for x in (g.estimate, g.low, g.high)
        if math.isfinite(x)
    ]
    if not math.isfinite(f.estimate):
        return ""
    shares = f.test in ("always", "proportion")
    low, high = (0.0, 1.0) if shares else (min(0.0, *values), max(0.0, f.margin, *values))
    low, high = (min(low, -f.margin), high) if f.test == "equivalent" else (low, high)
    pad = 0.06 * ((high - low) or 1.0)
    low, high = low - pad, high + pad

    def at(x: float) -> str:
        return f"{_WIDTH * (min(max(x, low), high) - low) / (high - low):.1f}"

    start, end = {
        "always": (0.98, high), "less": (low, f.margin), "equivalent": (-f.margin, f.margin),
    }.get(f.test, (f.margin, high))  # fmt: skip
    middle = _HEIGHT / 2
    verdict = f.verdict.lower()
    bar = (
        f'<line class="tempo-ci" x1="{at(f.low)}" x2="{at(f.high)}" y1="{middle}" y2="{middle}"/>'
        if math.isfinite(f.low) and math.isfinite(f.high) else ""
    )  # fmt: skip
    mark = (
        f'<circle class="tempo-mark" cx="{at(f.estimate)}" cy="{middle}" r="4"/>'
        if math.isfinite(f.estimate)
        else ""
    )
    width = max(0.0, float(at(end)) - float(at(start)))
    return (
        f'<svg class="tempo-effect tempo-{verdict}" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'aria-hidden="true">'
        f'<rect x="{at(start)}" y="1" width="{width:.1f}" height="{_HEIGHT - 2}"/>'
        f'<line class="tempo-zero" x1="{at(0.0)}" x2="{at(0.0)}" y1="0" y2="{_HEIGHT}"/>{bar}{mark}</svg>'
    )


def _value(x: float) -> str:
    """For sorting; empty if there is no number."""
    return repr(float(x)) if math.isfinite(x) else ""


def _text(value: object) -> str:
    return html.escape(escaped(str(value)))
