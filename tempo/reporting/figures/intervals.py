"""Named quantities with their intervals, one a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from tempo.reporting.figures.drawing import BLUE, GREEN, INK, Picture, clip, picture
from tempo.reporting.figures.spreads import DOTS, fit, strew, values_behind
from tempo.text import alike, number


def intervals(
    rows: Mapping[str, tuple[float, float, float]],
    xlabel: str,
    title: str,
    caption: str,
    notes: Sequence[str] = (),
    reference: float | None = None,
) -> Picture:
    """(mean, low, high) of each named row as a disc on a bar, with its numbers and its note.

    A row that is a `Spread` knows its values: each is a faint dot.
    A row that is exactly zero is what the others are measured from: it is marked, and a line drawn
    through all rows. The row of a control, which says so, is drawn open.
    reference: where a dashed line is drawn.
    """
    noted = notes or [""] * len(rows)
    shown = alike(*(x for row in rows.values() for x in row))
    triples = zip(shown[::3], shown[1::3], shown[2::3], noted, strict=True)
    texts = [f"{mean} [{low}, {high}]  {note}".rstrip() for mean, low, high, note in triples]
    has_dots = any(map(values_behind, rows.values()))
    caption = f"{caption} {DOTS}" if has_dots else caption

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        if has_dots:
            fit(ax, list(rows.values()), [] if reference is None else [reference])
        for row, (name, (mean, low, high)) in enumerate(rows.items()):
            strew(ax, values_behind(rows[name]), row, BLUE)
            if mean == low == high == 0:
                ax.axvline(0.0, color=GREEN, lw=1.4)
                ax.plot([0.0], [row], "D", color=GREEN, ms=6)
            else:
                face = "none" if "control" in name else BLUE
                ax.plot([low, high], [row, row], color=BLUE, lw=2.2, solid_capstyle="butt")
                ax.plot([mean], [row], "o", mfc=face, mec=BLUE, ms=6)
            ax.text(
                1.02, row, texts[row], transform=ax.get_yaxis_transform(), va="center", fontsize=8
            )
        if reference is not None:
            ax.axvline(reference, color=INK, lw=0.8, ls="--", alpha=0.6)
        ax.set_yticks(range(len(rows)), [clip(name, 48) for name in rows])
        ax.tick_params(axis="y", length=0)
        ax.set(xlabel=xlabel, ylim=(len(rows) - 0.4, -0.6))
        ax.grid(axis="x")

    said = "; ".join(f"{name}: {text}" for name, text in zip(rows, texts, strict=True))
    table: list[Sequence[object]] = [("row", "estimate", "low", "high", "note")]
    table += [(name, *found, n) for (name, found), n in zip(rows.items(), noted, strict=True)]
    size = (8.4, 0.9 + 0.27 * len(rows))
    return picture(title, caption, f"{xlabel}. {said}.", size, draw, table=table)


def interval_panels(
    panels: Mapping[str, Mapping[str, tuple[float, float, float]]],
    xlabel: str,
    title: str,
    caption: str,
) -> Picture:
    """(mean, low, high) of the same named rows in panels side by side, on one scale."""
    names = list(next(iter(panels.values()), {}))
    every = [row for rows in panels.values() for row in rows.values()]
    has_dots = any(map(values_behind, every))
    caption = f"{caption} {DOTS}" if has_dots else caption

    def draw(figure: Figure) -> None:
        shown = figure.subplots(1, max(1, len(panels)), sharex=True, sharey=True, squeeze=False)[0]
        for ax, (heading, rows) in zip(shown, panels.items(), strict=False):
            if has_dots:
                fit(ax, every)
            for row, (name, (mean, low, high)) in enumerate(rows.items()):
                strew(ax, values_behind(rows[name]), row, BLUE)
                ax.plot([low, high], [row, row], color=BLUE, lw=1.8, solid_capstyle="butt")
                ax.plot([mean], [row], "o", color=BLUE, ms=5)
                ax.text(mean, row - 0.22, number(mean), ha="center", va="bottom", fontsize=7)
            ax.set_title(heading, fontsize=8)
            ax.tick_params(axis="y", length=0)
            ax.grid(axis="x")
        shown[0].set_yticks(range(len(names)), [clip(name, 48) for name in names])
        shown[0].set_ylim(len(names) - 0.4, -0.8)
        figure.supxlabel(xlabel, fontsize=9)

    said = []
    for heading, rows in panels.items():
        values = "; ".join(f"{name}: {number(mean)}" for name, (mean, _, _) in rows.items())
        said.append(f"{heading}: {values}.")
    size = (8.4, 1.2 + 0.36 * max(1, len(names)))
    table: list[Sequence[object]] = [("panel", "row", "estimate", "low", "high")]
    for heading, rows in panels.items():
        table += [(heading, name, *found) for name, found in rows.items()]
    return picture(title, caption, f"{xlabel}. {' '.join(said)}", size, draw, table=table)
