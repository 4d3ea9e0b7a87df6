"""The table of claims: verdict, effect, n, corrected p, control. It can be sorted and filtered."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tempo.claims import Finding, standing
from tempo.reporting.figures.strips import Strip, scale_of
from tempo.reporting.findings import (
    PRIMARY,
    SIGNS,
    behaved,
    deciding,
    primary_first,
    rank,
    role,
    violated,
)
from tempo.reporting.glossary import explained
from tempo.reporting.prompts import claim_id
from tempo.text import alike, html_text, number, slug

_WIDTH, _HEIGHT = 200, 26  # of the drawn effect, in CSS pixels
# The heading of each column, and whether it sorts by numbers or by text.
_COLUMNS = (
    ("Verdict", "number"),
    ("Claim", "text"),
    ("Effect [95 % interval]", "number"),
    ("n", "number"),
    ("p, corrected", "number"),
    ("Negative control", "number"),
)
OWN_ROW = "."  # in place of an anchor: the claim whose row this is
# From a finding to the values of its prompts, none where they are not on record.
ValuesOf = Callable[[Finding], Sequence[float]]


def no_values(f: Finding) -> Sequence[float]:
    """Of a record that keeps no values."""
    return ()


def claims_table(findings: Sequence[Finding], at: str = "", values: ValuesOf = no_values) -> str:
    """The findings as a table, the primary ones first; invariants in a table of their own, folded.

    Filters, sort buttons and tables of prompts are there only where a script can serve them.
    at: what the ids of this table begin with, so that a page can hold several.
    """
    seen: set[str] = set()
    empirical = [f for f in findings if f.kind != "invariant"]
    invariants = [f for f in findings if f.kind == "invariant"]
    parts = []
    if empirical:
        legend = (
            "The bar is the 95 % interval, the disc the estimate. The claim would hold in the "
            "shaded region. The thin line is zero. Each row has its own scale; what lies far "
            "beyond stands at the edge."
        )
        dots = '<span class="tempo-scripted" hidden> Each faint dot is a prompt.</span>'
        parts += [_table(empirical, seen, at, values, "Table of claims")]
        parts += [f"<p><small>{html_text(legend)}{dots}</small></p>"]
    if invariants:
        broken = sum(map(violated, invariants))
        said = f"{broken} VIOLATED" if broken else "all held"
        if broken == 0 and any(f.verdict != "SUPPORTED" for f in invariants):
            said = "none violated"
        names = "1 invariant" if len(invariants) == 1 else f"{len(invariants)} invariants"
        alarm = ' class="tempo-alarm"' if broken else ""
        parts.append(
            f"<details{' open' if broken else ''}><summary{alarm}>{names}, {said}: they check "
            f"the harness, and must be true for every prompt</summary>"
            f"{_table(invariants, seen, at, values, 'Table of invariants')}</details>"
        )
    return "".join(parts)


def _table(
    findings: Sequence[Finding], seen: set[str], at: str, values: ValuesOf, label: str
) -> str:
    head = "".join(
        f'<th scope="col" data-sort="{kind}">{explained(name) if name == "n" else name}</th>'
        for name, kind in _COLUMNS
    )
    boxes = ""
    for verdict, sign in SIGNS.items():
        name, n = verdict.lower(), sum(f.verdict == verdict for f in findings)
        if verdict == "INAPPLICABLE" and not n:
            continue
        box = f'<input type="checkbox" checked value="{name}"/>'
        boxes += f"<label>{box} {sign} {name} ({n})</label>"
    body = "\n".join(_row(f, seen, at, values(f)) for f in primary_first(findings))
    return (
        '<div class="tempo-block"><fieldset class="tempo-filters" hidden><legend>Show</legend>'
        f"{boxes}<output></output></fieldset>"
        f'<div class="tempo-scroll" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="tempo-table tempo-claims tempo-stacked"><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div></div>"
    )


def _row(f: Finding, seen: set[str], at: str, values: Sequence[float]) -> str:
    """The finding's row; `seen` collects the ids, so that each stands in the page once."""
    raw, p = deciding(f)
    against = ", against it" if f.verdict == "REFUTED" else ""
    shown_p = "exact<small>invariant</small>"
    if f.kind == "empirical":
        shown_p = f"{number(p)}<small>raw {number(raw)}{against}</small>"
    # A link to a claim without its config leads to the claim's first config.
    own, shared = claim_id(f, at), f"{at}claim-{slug(f.claim)}"
    also = f'<span id="{shared}"></span>' if shared != own and shared not in seen else ""
    seen |= {own, shared}
    units = f.unit if f.n == 1 else f"{f.unit}s"
    control = f"{number(f.control_estimate)}: {behaved(f)}"
    name = f'<small class="tempo-id">{html_text(f.label)}</small>'
    cells = (
        _cell("Verdict", list(SIGNS).index(f.verdict), f"{badge(f)}<small>{rank(f)}</small>"),
        _cell(
            "Claim",
            None,
            f"{also}<span>{html_text(f.statement)}</span>{name}{_how(f)}",
        ),
        _cell(
            "Effect",
            _value(f.estimate),
            f"{effect_svg(f, values=values, of=OWN_ROW)}<br>{aligned(f)}",
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
    """A cell of HTML; `value` is what it sorts by, None its text."""
    of_class = f' class="{kind}"' if kind else ""
    sorts = "" if value is None else f' data-value="{value}"'
    return f'<td data-label="{label}"{sorts}{of_class}>{content}</td>'


def aligned(f: Finding) -> str:
    """The interval with equal decimals: `0.240 [0.174, 0.305]`."""
    if math.isfinite(f.estimate) and math.isnan(f.low) and math.isnan(f.high):
        return f"{number(f.estimate)} [too few prompts]"
    return "{} [{}, {}]".format(*alike(f.estimate, f.low, f.high))


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
    return f'<details class="tempo-how">{summary}<small>{html_text(said)}</small></details>'


def _dated(f: Finding) -> str:
    """Whether the data can confirm the claim, and the dates that say so."""
    why = standing(f).why
    return "" if f.kind == "invariant" else why[0].upper() + why[1:]


def region(f: Finding) -> tuple[float, float]:
    """From where to where the claim would hold; an end may be infinite."""
    regions = {
        "always": (0.98, math.inf),
        "less": (-math.inf, f.margin),
        "equivalent": (-f.margin, f.margin),
    }
    return regions.get(f.test, (f.margin, math.inf))


def effect_svg(
    f: Finding, beside: Sequence[Finding] = (), values: Sequence[float] = (), of: str = ""
) -> str:
    """The effect as a small picture: estimate, interval, prompts, where the claim would hold, zero.

    beside: findings about the same claim whose pictures are to have the same scale.
    values: the statistic of each prompt, which fit the scale. of: the anchor of the claim whose
    prompts the page's script draws as dots; drawn here, they would be a quarter of the page.
    """
    if not math.isfinite(f.estimate):
        return ""
    low, high = _scale(f, beside, values)

    def at(x: float) -> float:
        return _WIDTH * (min(max(x, low), high) - low) / (high - low)

    start, end = region(f)
    width = max(0.0, at(end) - at(start))
    middle = _HEIGHT // 2
    drawn = [
        f'<rect x="{at(start):.1f}" y="1" width="{width:.1f}" height="{_HEIGHT - 2}"/>',
        f'<path class="tempo-zero" d="M{at(0.0):.1f} 0v{_HEIGHT}"/>',
    ]
    if math.isfinite(f.low) and math.isfinite(f.high):
        ends = f"M{at(f.low):.1f} {middle}H{at(f.high):.1f}"
        drawn.append(f'<path class="tempo-ci" d="{ends}"/>')
    drawn.append(f'<circle cx="{at(f.estimate):.1f}" cy="{middle}" r="4.5"/>')
    dots = f' data-claim="{of}" data-scale="{low:.4g} {high:.4g}"' if of and values else ""
    return (
        f'<svg class="tempo-effect tempo-{f.verdict.lower()}"{dots} '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-hidden="true">{"".join(drawn)}</svg>'
    )


def _scale(f: Finding, beside: Sequence[Finding], values: Sequence[float]) -> tuple[float, float]:
    """Both ends of the picture: all estimates, intervals, the margin, zero, nearly all prompts."""
    if f.test in ("always", "proportion"):
        return -0.06, 1.06
    both = [f.margin, -f.margin] if f.test == "equivalent" else [f.margin]
    rows = [Strip("", g.estimate, g.low, g.high) for g in (f, *beside)]
    rows.append(Strip("", math.nan, values=values))
    return scale_of(rows, both)


def _value(x: float) -> str:
    """For sorting; empty if there is no number."""
    return f"{x:.6g}" if math.isfinite(x) else ""
