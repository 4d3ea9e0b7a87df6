"""Curves with intervals, paired bars of distributions, and plain bars. Shape: V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tempo.reporting.figures.drawing import (
    BLUE,
    GREEN,
    PURPLE,
    VERMILLION,
    Picture,
    picture,
    token_ticks,
)
from tempo.text import number, printable


def lines_by(
    groups: Mapping[str, Sequence[tuple[float, float, float, float]]],
    xlabel: str,
    ylabel: str,
    title: str,
    caption: str,
    log_y: bool = False,
) -> Picture:
    """One line per group of (x, mean, low, high), with its interval as band and bars."""
    drawn = {
        printable(name): np.array(sorted(points), np.float64)
        for name, points in groups.items()
        if len(points)
    }
    zeros = log_y and any((points[:, 1] <= 0).any() for points in drawn.values())

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for i, (name, points) in enumerate(drawn.items()):
            colour, dash = (BLUE, VERMILLION, GREEN, PURPLE)[i % 4], ("-", "--", ":")[i // 4 % 3]
            shown = points[points[:, 1] > 0] if log_y else points
            x, mean, low, high = shown.T
            errors = np.nan_to_num(np.maximum([mean - low, high - mean], 0.0))
            style = {
                "color": colour,
                "ls": dash,
                "marker": "osD^vPX*"[i % 8],
                "ms": 5,
                "lw": 1.6,
                "label": name,
            }
            ax.errorbar(x, mean, errors, elinewidth=1, capsize=3, **style)
            ax.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
            if log_y:
                for at_zero in points[points[:, 1] <= 0, 0]:
                    ax.plot(
                        at_zero,
                        0.02,
                        "v",
                        mfc="none",
                        mec=colour,
                        transform=ax.get_xaxis_transform(),
                    )
        ax.set(xlabel=printable(xlabel), ylabel=printable(ylabel))
        ax.grid(axis="y")
        if all(float(x).is_integer() for points in drawn.values() for x in points[:, 0]):
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log_y:
            ax.set_yscale("log", nonpositive="clip")
            bottom, top = ax.get_ylim()
            ax.yaxis.set_major_locator(
                LogLocator(subs=(1.0,) if top / bottom > 300 else (1.0, 2.0, 5.0), numticks=12)
            )
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
            ax.yaxis.set_minor_formatter(NullFormatter())
        if len(drawn) > 1:
            figure.legend(loc="outside upper left", ncols=max(1, 80 // (max(map(len, drawn)) + 8)))

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
    return picture(title, caption, f"{ylabel} against {xlabel}. {said}.", (6.2, 3.6), draw)


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
    return picture(title, caption, alt, (6.2, 1.1 + 0.27 * len(tokens)), draw)


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
    return picture(title, caption, f"Bars of {ylabel} by {xlabel}. {said}.", (6.2, 3.2), draw)
