"""Curves with intervals, paired bars of distributions, and plain bars. Shape: V vocabulary."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tempo.reporting.figures.drawing import (
    BLUE,
    GREEN,
    INK,
    PURPLE,
    VERMILLION,
    WIDTH,
    Picture,
    picture,
    token_ticks,
)
from tempo.text import number, printable

MOST_LINES = 4  # on one pair of axes; more stand in panels, each above the others in grey
_PANELS = 4  # in a row
_NEAR = 0.075  # of the axis' height: labels of line ends are kept so far apart


def lines_by(
    groups: Mapping[str, Sequence[tuple[float, float, float, float]]],
    xlabel: str,
    ylabel: str,
    title: str,
    caption: str,
    log_y: bool = False,
) -> Picture:
    """One line per group of (x, mean, low, high), with its interval as band and bars.

    Lines are labelled at their ends. A group without any interval is theory: a plain line. Of more
    than four groups each has a panel of its own, with the others in grey.
    """
    drawn = {
        printable(name): np.array(sorted(points), np.float64)
        for name, points in groups.items()
        if len(points)
    }
    zeros = log_y and any((points[:, 1] <= 0).any() for points in drawn.values())
    in_panels = len(drawn) > MOST_LINES
    columns = min(_PANELS, max(1, len(drawn))) if in_panels else 1
    rows = -(-len(drawn) // columns) if in_panels else 1

    def draw(figure: Figure) -> None:
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for ax in axes.flat:
            _scales(ax, drawn, log_y)
        if in_panels:
            for ax, name in zip(axes.flat, drawn, strict=False):
                for other in drawn:
                    if other != name:
                        _grey(ax, drawn[other], log_y)
                is_theory = _is_theory(name, drawn[name])
                _line(ax, drawn[name], BLUE, "o", log_y, is_theory, bare=True)
                ax.set_title("\n".join(wrap(name, 26)), fontsize=8)
            for ax in axes.flat[len(drawn) :]:
                ax.set_visible(False)
            figure.supxlabel(printable(xlabel), fontsize=9)
            figure.supylabel(printable(ylabel), fontsize=9)
            return
        ax = axes[0, 0]
        for i, (name, points) in enumerate(drawn.items()):
            is_theory = _is_theory(name, points)
            _line(ax, points, _HUES[i % 4], "osD^"[i % 4], log_y, is_theory)
        ax.set(xlabel=printable(xlabel), ylabel=printable(ylabel))
        if not drawn:
            ax.text(0.5, 0.5, "no prompt has a value", transform=ax.transAxes, ha="center")
        if len(drawn) > 1:
            _label_ends(ax, drawn)

    said = "; ".join(
        f"{name}: "
        + " to ".join(f"{number(mean)} at {number(x)}" for x, mean, _, _ in points[[0, -1]])
        for name, points in drawn.items()
    )
    caption += (
        " Open triangles at the lower edge: zero, which a logarithmic axis cannot show."
        if zeros
        else ""
    )
    if in_panels:
        caption += " Grey: the lines of the other panels."
    table: list[Sequence[object]] = [("line", xlabel, "estimate", "low", "high")]
    for name, points in drawn.items():
        table += [(name, *point) for point in points.tolist()]
    size = (WIDTH, 0.5 + 1.9 * rows) if in_panels else (6.6 if len(drawn) > 1 else 6.2, 3.4)
    alt = f"{ylabel} against {xlabel}. {said}."
    return picture(title, caption, alt, size, draw, table=table)


_HUES = (BLUE, VERMILLION, GREEN, PURPLE)


def _is_theory(name: str, points: np.ndarray) -> bool:
    """Whether a line is no measurement: it says so, or none of its points has an interval."""
    if re.search(r"\b(law|theory)\b", name):
        return True
    return len(points) > 1 and bool((points[:, 2] == points[:, 3]).all())


def _line(
    ax: Axes,
    points: np.ndarray,
    colour: str,
    marker: str,
    log_y: bool,
    is_theory: bool,
    bare: bool = False,
) -> None:
    """A line with its intervals as bars and band, `bare` as a band alone; of theory the line."""
    shown = points[points[:, 1] > 0] if log_y else points
    x, mean, low, high = shown.T
    if is_theory:
        ax.plot(x, mean, color=colour, lw=1.4, ls=(0, (5, 2)))
    elif bare:
        ax.plot(x, mean, color=colour, marker=marker, ms=3.5, lw=1.6)
        ax.fill_between(x, low, high, color=colour, alpha=0.22, lw=0)
    else:
        errors = np.nan_to_num(np.maximum([mean - low, high - mean], 0.0))
        style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 4.5, "lw": 1.6}
        ax.errorbar(x, mean, errors, elinewidth=1, capsize=2.5, **style)
        ax.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    if log_y:
        for at_zero in points[points[:, 1] <= 0, 0]:
            edge = ax.get_xaxis_transform()
            ax.plot(at_zero, 0.02, "v", mfc="none", mec=colour, transform=edge)


def _grey(ax: Axes, points: np.ndarray, log_y: bool) -> None:
    """A line of another panel."""
    shown = points[points[:, 1] > 0] if log_y else points
    ax.plot(shown[:, 0], shown[:, 1], color=INK, lw=0.9, alpha=0.22)


def _scales(ax: Axes, drawn: Mapping[str, np.ndarray], log_y: bool) -> None:
    """Grid and ticks; of a logarithmic axis only ticks that can be read."""
    ax.grid(axis="y")
    if all(float(x).is_integer() for points in drawn.values() for x in points[:, 0]):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not log_y:
        return
    ax.set_yscale("log", nonpositive="clip")
    ends = [y for points in drawn.values() for y in points[:, 1:].flat if y > 0]
    wide = bool(ends) and max(ends) / min(ends) > 300
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _label_ends(ax: Axes, drawn: Mapping[str, np.ndarray]) -> None:
    """Each line's name at the height of its end, to the right of the axes."""
    low, high = ax.get_ylim()
    scale = np.log if ax.get_yscale() == "log" else float
    heights = {}
    for name, points in drawn.items():
        last = float(points[-1, 1])
        inside = min(max(last, low), high) if np.isfinite(last) else low
        heights[name] = float((scale(inside) - scale(low)) / ((scale(high) - scale(low)) or 1.0))
    below = -1.0
    for name in sorted(heights, key=lambda name: heights[name]):
        lines = wrap(name, 24)
        at = max(heights[name], below + _NEAR * (1 + len(lines)) / 2)
        below = at + _NEAR * (len(lines) - 1) / 2
        i = list(drawn).index(name) % 4
        style = {"transform": ax.transAxes, "clip_on": False}
        if _is_theory(name, drawn[name]):
            ax.plot([1.015, 1.045], [at, at], color=_HUES[i], lw=1.4, ls=(0, (3, 1.5)), **style)
        else:
            ax.plot([1.03], [at], "osD^"[i], color=_HUES[i], ms=4.5, **style)
        ax.text(1.055, at, "\n".join(lines), va="center", fontsize=8, **style)


def distributions(
    p: np.ndarray,
    q: np.ndarray,
    texts: Callable[[int], str] | Mapping[int, str],
    names: tuple[str, str] = ("isolated", "visible"),
    k: int = 12,
    title: str = "Two distributions of the next token",
) -> Picture:
    """The k tokens that are most probable in either of two distributions [V], as paired bars."""
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    tokens = [int(t) for t in np.argsort(-np.maximum(p, q), kind="stable")[:k]]
    text = texts if callable(texts) else texts.__getitem__
    distance = 0.5 * float(np.abs(p - q).sum())

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        rows = np.arange(len(tokens))
        first, second = (printable(name) for name in names)
        ax.barh(rows - 0.2, p[tokens], 0.36, fc=BLUE, ec=BLUE, lw=1, label=first)
        ax.barh(
            rows + 0.2, q[tokens], 0.36, fc="none", ec=VERMILLION, lw=1, hatch="////", label=second
        )
        ax.invert_yaxis()
        token_ticks(ax, "y", [text(token) for token in tokens])
        ax.set_xlabel("probability")
        ax.grid(axis="x")
        figure.legend(loc="outside upper left", ncols=2)

    rest = ", ".join(
        f"{number(max(0.0, 1 - d[tokens].sum()))} ({n})" for n, d in zip(names, (p, q), strict=True)
    )
    caption = (
        f"The {len(tokens)} tokens that are most probable in either. Not shown: {rest}. "
        f"Total variation over all {len(p)} tokens: {number(distance)}. Where a token's bars "
        f"differ, {names[1]} changed its probability."
    )
    said = "; ".join(f"{text(t)}: {number(p[t])} and {number(q[t])}" for t in tokens[:5])
    alt = (
        f"Paired bars of {names[0]} and {names[1]}, total variation {number(distance)}. "
        f"Most probable: {said}."
    )
    table: list[Sequence[object]] = [("token", *names)]
    table += [(text(t), float(p[t]), float(q[t])) for t in tokens]
    return picture(title, caption, alt, (6.2, 1.1 + 0.27 * len(tokens)), draw, table=table)


def bars(
    groups: Mapping[str, Sequence[float]],
    labels: Sequence[str],
    xlabel: str,
    ylabel: str,
    title: str,
    caption: str,
) -> Picture:
    """Bars of each group side by side at each label. Hatching tells groups apart without colour."""
    drawn = {printable(name): np.asarray(heights, np.float64) for name, heights in groups.items()}
    share = 0.8 / max(1, len(drawn))

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        at = np.arange(len(labels))
        for i, (name, heights) in enumerate(drawn.items()):
            colour = (BLUE, VERMILLION, GREEN, PURPLE)[i % 4]
            style: dict[str, Any] = (
                {"fc": colour, "ec": colour}
                if i % 2 == 0
                else {"fc": "none", "ec": colour, "hatch": "////"}
            )
            ax.bar(
                at + share * (i - (len(drawn) - 1) / 2),
                heights,
                0.9 * share,
                lw=1,
                label=name,
                **style,
            )
        ax.set_xticks(at, [printable(label) for label in labels])
        ax.set(xlabel=printable(xlabel), ylabel=printable(ylabel))
        ax.grid(axis="y")
        if len(drawn) > 1:
            figure.legend(loc="outside upper left", ncols=2)

    said = "; ".join(
        f"{name}: "
        + ", ".join(
            f"{label}: {number(height)}" for label, height in zip(labels, heights, strict=True)
        )
        for name, heights in drawn.items()
    )
    table: list[Sequence[object]] = [(xlabel, *drawn)]
    heights = [of_group.tolist() for of_group in drawn.values()]
    table += list(zip(labels, *heights, strict=True))
    alt = f"Bars of {ylabel} by {xlabel}. {said}."
    return picture(title, caption, alt, (6.2, 3.2), draw, table=table)
