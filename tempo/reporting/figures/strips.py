"""Estimates with their intervals and every prompt behind them, a row each, as SVG drawn by hand.

A row has its label above it and its numbers at its end, so that it can be read on a phone as well.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tempo.reporting.figures.drawing import (
    BLUE,
    GREEN,
    PURPLE,
    VERMILLION,
    Picture,
    csv_of,
)
from tempo.text import alike, html_text, number, printable, slug

WIDTH, ROW = 470, 51  # CSS pixels of the picture, and from row to row
_LEFT, _RIGHT = 6, 464  # of the axis
_TOP = 10
_BAND = 12  # half of the height in which a row's prompts are strewn
# How far beyond estimates, intervals and margin a scale goes for the sake of single prompts. The
# few that lie farther stand at the edge, or they would press all that matters together.
QUANTILE = 0.025
GOLDEN = 0.6180339887  # multiples of it, less their whole parts, strew prompts evenly
HUES = {"SUPPORTED": GREEN, "REFUTED": VERMILLION, "INCONCLUSIVE": PURPLE}


@dataclass(frozen=True)
class Strip:
    """One row: an estimate with its interval, and the values of single prompts behind it.

    holds: from where to where a claim would hold, which is shaded. verdict: gives the hue.
    is_control: drawn paler. note: stands after the numbers, such as n.
    """

    label: str
    estimate: float
    low: float = math.nan
    high: float = math.nan
    values: Sequence[float] = ()
    note: str = ""
    holds: tuple[float, float] | None = None
    verdict: str = ""
    is_control: bool = False

    @property
    def ends(self) -> tuple[float, ...]:
        """The estimate, and its interval if it has one."""
        has_interval = math.isfinite(self.low) and math.isfinite(self.high)
        return (self.estimate, self.low, self.high) if has_interval else (self.estimate,)


def said(rows: Sequence[Strip]) -> list[str]:
    """The numbers of each row, with equal decimals: `0.147 [0.136, 0.159]`."""
    shown = iter(alike(*(x for row in rows for x in row.ends)))
    texts = []
    for row in rows:
        middle, *ends = (next(shown) for _ in row.ends)
        texts.append(f"{middle} [{', '.join(ends)}]" if ends else middle)
    return texts


Scale = tuple[float, float]


def scale_of(strips: Sequence[Strip], always: Sequence[float] = ()) -> Scale:
    """Both ends of an axis for these rows: estimates, intervals, zero, and nearly all prompts."""
    ends = [0.0, *always]
    for strip in strips:
        ends += [strip.estimate, strip.low, strip.high]
        values = sorted(value for value in strip.values if math.isfinite(value))
        cut = int(QUANTILE * len(values))
        ends += values[cut : len(values) - cut][:: max(1, len(values) - 2 * cut - 1)]
    ends = [min(max(x, -1e300), 1e300) for x in ends if math.isfinite(x)]
    low, high = min(ends), max(ends)
    pad = 0.04 * ((high - low) or 1.0)
    return low - pad, high + pad


def cloud(values: Sequence[float], at: Callable[[float], float], middle: float, half: float) -> str:
    """Every prompt's value as a dot of one path, which needs few bytes: `M12 8h0M14 9h0`."""
    dots = []
    for i, value in enumerate(values, start=1):
        if math.isfinite(value):
            y = middle + half * (2 * math.modf(i * GOLDEN)[0] - 1)
            dots.append(f"M{at(value):.0f} {y:.0f}h0")
    return "".join(dots)


def strips(
    rows: Sequence[Strip],
    title: str,
    caption: str,
    unit: str = "",
    perfect: str = "",
    shares_scale: bool = True,
) -> Picture:
    """The rows below each other.

    unit: what the axis shows, with its unit. perfect: what stands at zero, which is then marked.
    shares_scale: whether all rows have one axis; else each has its own, on which zero is drawn.
    """
    bottom = _TOP + ROW * len(rows)
    height = bottom + (44 if shares_scale else 6)
    common = scale_of(rows)
    drawn = []
    if shares_scale:
        drawn += _axis(common, bottom, unit, perfect)
        numbers = said(rows)
    else:
        numbers = [said([row])[0] for row in rows]
    for i, row in enumerate(rows):
        ends = [x for x in row.holds or () if math.isfinite(x)]
        scale = common if shares_scale else scale_of([row], ends)
        drawn += _row(row, numbers[i], _TOP + ROW * i, scale, own_zero=not shares_scale)
    pairs = zip(rows, numbers, strict=True)
    listed = "; ".join(f"{row.label}: {text}{_beside(row)}" for row, text in pairs)
    alt = printable(f"{title}. {f'{unit}. ' if unit else ''}{listed}.")
    if perfect:
        alt += f" Zero is {printable(perfect)}."
    style = f"width:100%;max-width:{round(1.25 * WIDTH)}px;height:auto"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html_text(alt)}" '
        f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" font-size="13" style="{style}">'
        f"{''.join(drawn)}</svg>"
    )
    name = f"{slug(title)[:40]}-{hashlib.sha256(svg.encode()).hexdigest()[:6]}"
    return Picture(name, title, caption, alt, svg, csv=_csv(rows))


def _beside(row: Strip) -> str:
    return f" ({row.note})" if row.note else ""


def _row(row: Strip, numbers: str, top: float, scale: Scale, own_zero: bool) -> list[str]:
    """A row: label and numbers, then region, prompts, interval and estimate."""
    at = _positions(scale)
    middle = top + 32
    hue = HUES.get(row.verdict, BLUE)
    faint = ' opacity="0.7"' if row.is_control else ""
    room = max(12, 62 - len(numbers) - len(row.note))
    label = row.label if len(row.label) <= room else row.label[: room - 1] + "…"
    note = f' <tspan opacity="0.72">{html_text(row.note)}</tspan>' if row.note else ""
    drawn = [
        f'<text x="{_LEFT}" y="{top + 12}" fill="currentColor"{faint}>{html_text(label)}</text>',
        f'<text x="{_RIGHT}" y="{top + 12}" text-anchor="end" fill="currentColor"{faint}>'
        f"{html_text(numbers)}{note}</text>",
    ]
    if row.holds:
        begin, end = (at(x) for x in row.holds)
        drawn.append(
            f'<rect x="{begin:.1f}" y="{middle - _BAND - 1}" width="{max(0.0, end - begin):.1f}" '
            f'height="{2 * _BAND + 2}" fill="currentColor" fill-opacity="0.1"/>'
        )
    if own_zero:
        drawn.append(_line(at(0.0), middle - _BAND - 1, at(0.0), middle + _BAND + 1, 0.6))
    if dots := cloud(row.values, at, middle, _BAND - 2):
        drawn.append(
            f'<path d="{dots}" stroke="{hue}" stroke-opacity="0.7" stroke-width="3.6" '
            'stroke-linecap="round" fill="none"/>'
        )
    if math.isfinite(row.low) and math.isfinite(row.high):
        ends = f'x1="{at(row.low):.1f}" x2="{at(row.high):.1f}" y1="{middle}" y2="{middle}"'
        drawn.append(f'<line {ends} stroke="{hue}" stroke-width="5"/>')
    if math.isfinite(row.estimate):
        fill = "none" if row.is_control else hue
        drawn.append(
            f'<circle cx="{at(row.estimate):.1f}" cy="{middle}" r="5.5" fill="{fill}" '
            f'stroke="{hue if row.is_control else "currentColor"}" stroke-width="1.6"/>'
        )
    return drawn


def _positions(scale: Scale) -> Callable[[float], float]:
    """From a value to its place on the axis; what lies beyond stands at the edge."""
    low, high = scale

    def at(x: float) -> float:
        inside = low if math.isnan(x) else min(max(x, low), high)
        return _LEFT + (_RIGHT - _LEFT) * (inside - low) / (high - low)

    return at


def _axis(scale: Scale, bottom: float, unit: str, perfect: str) -> list[str]:
    """Ticks at round numbers, thin lines through all rows, and what stands at zero."""
    at = _positions(scale)
    drawn = [_line(_LEFT, bottom, _RIGHT, bottom, 0.6)]
    ticks = _ticks(scale)
    for tick in ticks:
        x = at(tick)
        drawn.append(_line(x, _TOP + 18, x, bottom + 4, 0.13))
        anchor = "start" if x < 12 else "end" if x > WIDTH - 24 else "middle"
        drawn.append(
            f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="{anchor}" font-size="12" '
            f'fill="currentColor">{number(tick)}</text>'
        )
    if perfect:
        x = at(0.0)
        # beside the rows' data only, so that no label is crossed
        tops = range(_TOP, round(bottom), ROW)
        rows = "".join(f"M{x:.1f} {top + 32 - _BAND}v{2 * _BAND}" for top in tops)
        drawn.append(f'<path d="M{x:.1f} {bottom}v-8{rows}" stroke="{GREEN}" stroke-width="2.5"/>')
    zero = f"0: {perfect}. Axis: " if perfect else ""
    drawn.append(
        f'<text x="{_LEFT}" y="{bottom + 36}" font-size="12" fill="currentColor">'
        f"{html_text(zero + unit)}</text>"
    )
    return drawn


def _ticks(scale: Scale) -> list[float]:
    """Some round numbers on the axis; zero is one of them."""
    low, high = scale
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{k * step:.6g}") for k in range(first, last + 1)]


def _line(x1: float, y1: float, x2: float, y2: float, opacity: float) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" '
        f'stroke-opacity="{opacity}"/>'
    )


def _csv(rows: Sequence[Strip]) -> str:
    """Estimates and intervals, then the value of every prompt."""
    table: list[Sequence[object]] = [("row", "kind", "estimate", "low", "high", "note")]
    for row in rows:
        table.append((row.label, "estimate", row.estimate, row.low, row.high, row.note))
        table += [(row.label, "prompt", value, "", "", "") for value in row.values]
    return csv_of(table)
