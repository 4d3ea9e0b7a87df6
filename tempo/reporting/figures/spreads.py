"""Means that know the values behind them, so that a figure can show each prompt as a dot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from tempo.reporting.figures.strips import GOLDEN, QUANTILE

_BAND = 0.34  # half of the height in which a row's prompts are strewn, in rows
DOTS = "Each faint dot is a prompt; the few that lie far off stand at the edge."


class Spread(tuple[float, float, float]):
    """A mean with its interval as (mean, low, high), and the values that it is the mean of.

    Attributes:
        values: One for each prompt.

    >>> mean = Spread.of((2.0, 1.5, 2.5), [1.0, 3.0])
    >>> mean == (2.0, 1.5, 2.5), mean.values
    (True, (1.0, 3.0))
    """

    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, numbers: tuple[float, float, float], values: Iterable[float]) -> Spread:
        made = cls(numbers)
        made.values = tuple(float(value) for value in values)
        return made


def values_behind(numbers: Sequence[float]) -> tuple[float, ...]:
    """The finite values behind a mean; none if it does not know them."""
    return tuple(value for value in getattr(numbers, "values", ()) if math.isfinite(value))


def fit(ax: Axes, means: Sequence[Sequence[float]], always: Sequence[float] = ()) -> None:
    """Let the x-axis hold all means and intervals, and nearly all values behind them."""
    ends = [x for x in always if math.isfinite(x)]
    for mean in means:
        ends += [x for x in mean if math.isfinite(x)]
        if values := values_behind(mean):
            ends += np.quantile(values, [QUANTILE, 1 - QUANTILE]).tolist()
    pad = 0.04 * ((max(ends) - min(ends)) or 1.0)
    ax.set_xlim(min(ends) - pad, max(ends) + pad)


def strew(ax: Axes, values: Sequence[float], row: float, colour: str, band: float = _BAND) -> None:
    """Each value as a faint dot in the band of a row, within the limits that the axis has."""
    if not values:
        return
    low, high = ax.get_xlim()
    x = np.clip(values, low, high)
    heights = np.modf(np.arange(1, len(x) + 1) * GOLDEN)[0]
    y = row + band * (2 * heights - 1)
    # A dot is a line without length, with round ends: of all ways to say it the shortest in SVG.
    ends = np.stack([x, x + 1e-4 * (high - low)], axis=1).ravel()
    path = Path(np.stack([ends, np.repeat(y, 2)], axis=1), [Path.MOVETO, Path.LINETO] * len(x))
    path.should_simplify = False
    style = {"edgecolor": colour, "alpha": 0.4, "lw": 2.2, "capstyle": "round", "zorder": 0.5}
    style["snap"] = False  # to whole pixels, where a dot would have no length left
    ax.add_artist(PathPatch(path, fill=False, clip_on=False, **style))
