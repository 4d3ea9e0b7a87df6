"""The cells of a factorial as a table, and effects as dots with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from tempo.reporting.figures.drawing import (
    BLUE,
    GREEN,
    INK,
    PURPLE,
    VERMILLION,
    WIDTH,
    Picture,
    picture,
)
from tempo.reporting.figures.spreads import DOTS, fit, strew, values_behind
from tempo.text import number, printable


def cell_table(
    values: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    caption: str,
) -> Picture:
    """A table of texts, each cell the fuller of colour the larger its value in [0, 1]."""

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for row, shares in enumerate(values):
            for column, share in enumerate(shares):
                ax.add_patch(
                    Rectangle(
                        (column - 0.49, row - 0.47),
                        0.98,
                        0.94,
                        fc=BLUE,
                        alpha=0.04 + 0.36 * share,
                        lw=0,
                    )
                )
                ax.text(
                    column, row, _lines(texts[row][column]), ha="center", va="center", fontsize=8
                )
        ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        ax.set_xticks(range(len(columns)), [_lines(column) for column in columns])
        ax.set_yticks(range(len(rows)), [_lines(row) for row in rows])
        ax.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
        ax.spines[:].set_visible(False)

    said = "; ".join(
        f"{_flat(row)}, {_flat(column)}: {_flat(text)}"
        for row, of_row in zip(rows, texts, strict=True)
        for column, text in zip(columns, of_row, strict=True)
    )
    num_lines = max(text.count("\n") + 1 for of_row in texts for text in of_row)
    size = (min(WIDTH, 1.6 + 1.6 * len(columns)), 0.5 + len(rows) * (0.2 + 0.16 * num_lines))
    table = [("", *map(_flat, columns))]
    table += [(_flat(row), *map(_flat, of_row)) for row, of_row in zip(rows, texts, strict=True)]
    return picture(title, caption, f"Table. {said}.", size, draw, table=table)


_HUES = (BLUE, VERMILLION, GREEN, PURPLE)


def dots(
    groups: Mapping[str, Sequence[tuple[float, float, float]]],
    labels: Sequence[str],
    xlabel: str,
    title: str,
    caption: str,
    margin: float | None = None,
) -> Picture:
    """(mean, low, high) of each group, a row for each label, with a dashed line at the margin.

    A point that is a `Spread` knows its values: each is a faint dot.
    """
    every = [point for points in groups.values() for point in points]
    behind = {printable(name): list(map(values_behind, of)) for name, of in groups.items()}
    has_dots = any(map(values_behind, every))
    caption = f"{caption} {DOTS}" if has_dots else caption
    drawn = {printable(name): np.asarray(points, np.float64) for name, points in groups.items()}

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        if has_dots:
            fit(ax, every, [0.0] if margin is None else [0.0, margin])
        for i, (name, points) in enumerate(drawn.items()):
            at = np.arange(len(labels)) + 0.5 * ((i + 0.5) / len(drawn) - 0.5)
            for height, values in zip(at, behind[name], strict=True):
                strew(ax, values, float(height), _HUES[i % 4], 0.17 / len(drawn))
            mean, low, high = points.T
            colour, marker = _HUES[i % 4], "osD^"[i % 4]
            errors = np.maximum([mean - low, high - mean], 0.0)
            ax.errorbar(
                mean,
                at,
                xerr=errors,
                fmt=marker,
                color=colour,
                ms=5,
                capsize=3,
                elinewidth=1.2,
                label=name,
            )
        if margin is not None:
            ax.axvline(margin, color=INK, lw=0.8, ls="--", alpha=0.7)
        ax.axvline(0.0, color=INK, lw=0.6, alpha=0.6)
        ax.set(xlabel=printable(xlabel), ylim=(len(labels) - 0.5, -0.5))
        ax.set_yticks(range(len(labels)), [printable(label) for label in labels])
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
        if len(drawn) > 1:
            figure.legend(loc="outside upper left", ncols=len(drawn))

    said = "; ".join(
        f"{name}: "
        + ", ".join(
            f"{label} {number(m)} [{number(low)}, {number(high)}]"
            for label, (m, low, high) in zip(labels, points, strict=True)
        )
        for name, points in drawn.items()
    )
    table: list[Sequence[object]] = [("group", "row", "estimate", "low", "high")]
    for name, points in drawn.items():
        table += [(name, label, *p) for label, p in zip(labels, points.tolist(), strict=True)]
    size = (6.8, 1.0 + 0.42 * len(labels))
    return picture(title, caption, f"Dots of {xlabel}. {said}.", size, draw, table=table)


def _lines(text: str) -> str:
    """Printable, with its line breaks kept."""
    return "\n".join(map(printable, text.split("\n")))


def _flat(text: str) -> str:
    return text.replace(",\n", ", ").replace("\n", ", ")
