"""Named quantities with their intervals, one a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from tempo.reporting.figures.drawing import BLUE, GREEN, INK, Picture, clip, picture
from tempo.text import number


def intervals(
    rows: Mapping[str, tuple[float, float, float]],
    xlabel: str,
    title: str,
    caption: str,
    notes: Sequence[str] = (),
    reference: float | None = None,
) -> Picture:
    """(mean, low, high) of each named row as a dot on a bar, with its numbers and its note.

    A row that is exactly zero is what the others are measured from: it is marked, and a line drawn
    through all rows. The row of a control, which says so, is drawn open.
    reference: where a dashed line is drawn.
    """
    texts = [f"{number(mean)} [{number(low)}, {number(high)}]" for mean, low, high in rows.values()]
    texts = [
        f"{text}  {note}".rstrip()
        for text, note in zip(texts, notes or [""] * len(texts), strict=True)
    ]

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for row, (name, (mean, low, high)) in enumerate(rows.items()):
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
    noted = notes or [""] * len(texts)
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

    def draw(figure: Figure) -> None:
        shown = figure.subplots(1, max(1, len(panels)), sharex=True, sharey=True, squeeze=False)[0]
        for ax, (heading, rows) in zip(shown, panels.items(), strict=False):
            for row, (mean, low, high) in enumerate(rows.values()):
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
