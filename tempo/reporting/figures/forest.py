"""Every claim at a glance: effects with intervals against the region where the claim would hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter

from tempo.claims import Finding
from tempo.reporting.figures.drawing import INK, SYMBOLS, Picture, clip, picture
from tempo.reporting.findings import PRIMARY, interval, primary_first, role
from tempo.text import number

# In units of the scale. What lies farther is drawn at the edge: from too few prompts an interval
# may have no bound to speak of.
FARTHEST = 1e6
_IN_MARGINS = "effect in units of the claim's margin (linear to 1, then logarithmic)"
_OWN_SCALE = "effect of claims with margin 0, each row on a scale of its own"
_SHARE = "share of units for which it is true"


def forest(findings: Sequence[Finding], title: str = "All claims at a glance") -> Picture:
    """Every finding's estimate and 95 % interval against the region in which its claim would hold.

    It has three panels, because units differ: effects in units of their margin; shares; and effects
    whose margin is zero. Of the last only sign and precision compare, so that each has its own
    scale.
    """
    findings = [f for f in findings if f.verdict != "INAPPLICABLE"]  # of those nothing is known
    panels: dict[str, list[tuple[Finding, float]]] = {_IN_MARGINS: [], _OWN_SCALE: [], _SHARE: []}
    for finding in primary_first(findings):
        ends = [abs(x) for x in (finding.estimate, finding.low, finding.high) if math.isfinite(x)]
        if finding.test in ("always", "proportion"):
            panels[_SHARE].append((finding, 1.0))
        elif finding.margin > 0:
            panels[_IN_MARGINS].append((finding, finding.margin))
        else:
            panels[_OWN_SCALE].append((finding, max(ends, default=0.0) or 1.0))
    panels = {label: members for label, members in panels.items() if members}

    def draw(figure: Figure) -> None:
        rows = [len(members) + 1 for members in panels.values()] or [1]
        axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
        for ax, (label, members) in zip(axes, panels.items(), strict=False):
            left, right = (-0.03, 1.03) if label == _SHARE else _limits(members)
            if label == _IN_MARGINS:
                ax.set_xscale("symlog", linthresh=1.0)
                ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(x)))
            elif label == _OWN_SCALE:
                ax.set_xticks([0.0])
            for row, (finding, scale) in enumerate(members):
                _forest_row(ax, row, finding, scale, left, right)
            ax.axvline(0.0, color=INK, lw=0.6, alpha=0.6)
            ax.set(xlim=(left, right), ylim=(len(members) - 0.4, -0.6), xlabel=label)
            ax.set_yticks(range(len(members)), [_marked(f) for f, _ in members])
            ax.tick_params(axis="y", length=0)

    count = {v: sum(f.verdict == v for f in findings) for v in SYMBOLS}
    caption = (
        "Estimate and 95 % interval; the shaded region is where the claim would hold. Green disc: "
        "supported; vermillion cross: refuted; purple open diamond: inconclusive. The verdict is "
        "the registered test's, not the drawing's."
    )
    if any(role(f) == PRIMARY for f in findings):
        caption += " ★ marks the primary claims, which decide the answers."
    counted = ", ".join(f"{n} {v.lower()}" for v, n in count.items())
    each = "; ".join(f"{f.label}: {interval(f)} {f.verdict.lower()}" for f in findings)
    alt = f"{counted}. {each}"
    table: list[Sequence[object]] = [("claim", "verdict", "estimate", "low", "high", "margin", "n")]
    for f in findings:
        table.append((f.label, f.verdict.lower(), f.estimate, f.low, f.high, f.margin, str(f.n)))
    size = (10.5, 0.6 + 0.27 * len(findings) + 0.5 * len(panels))
    return picture(title, caption, alt, size, draw, table=table)


def _limits(members: Sequence[tuple[Finding, float]]) -> tuple[float, float]:
    """From where to where the axis reaches, in each member's units; at least from -1 to 1."""
    values = [-1.0, 1.0]
    for f, scale in members:
        values += [_units(x, scale) for x in (f.estimate, f.low, f.high) if math.isfinite(x)]
    return 1.3 * min(values), 1.3 * max(values)


def _units(x: float, scale: float) -> float:
    """x in units of the scale, within what can be drawn; NaN stays NaN."""
    return x if math.isnan(x) else min(max(x / scale, -FARTHEST), FARTHEST)


def _marked(finding: Finding) -> str:
    return f"★ {clip(finding.label, 46)}" if role(finding) == PRIMARY else clip(finding.label, 48)


def _forest_row(
    ax: Axes, row: int, finding: Finding, scale: float, left: float, right: float
) -> None:
    unit = finding.margin / scale
    begin, end = {
        "always": (0.995, right),
        "proportion": (finding.margin, right),
        "greater": (unit, right),
        "less": (left, unit),
        "somewhere": (unit, right),
        "equivalent": (-unit, unit),
    }[finding.test]
    ax.add_patch(Rectangle((begin, row - 0.4), end - begin, 0.8, facecolor=INK, alpha=0.13, lw=0))
    colour, symbol = SYMBOLS[finding.verdict]
    if math.isfinite(finding.low) and math.isfinite(finding.high):
        ax.plot(
            [_units(finding.low, scale), _units(finding.high, scale)],
            [row, row],
            color=colour,
            lw=1.8,
            solid_capstyle="butt",
        )
    face = "none" if finding.verdict == "INCONCLUSIVE" else colour
    ax.plot([_units(finding.estimate, scale)], [row], symbol, mfc=face, mec=colour, ms=6.5)
    margin = f"  margin {number(finding.margin)}" if finding.margin > 0 else ""
    said = f"{interval(finding)}{margin}"
    ax.text(1.02, row, said, transform=ax.get_yaxis_transform(), va="center", fontsize=8)
