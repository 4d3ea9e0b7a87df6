"""Times of works done in alternation, their paired ratios, and exponents of growth."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch

Work = Callable[[], float]  # does its work and says how many seconds that took
K = TypeVar("K", bound=Hashable)


def clock(work: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """Wall seconds of one call, with what it started on a GPU."""
    began = _now()
    work(*args, **kwargs)
    return _now() - began


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(
    works: Mapping[K, Work], rounds: int, *, warm_up: bool = True
) -> dict[K, list[float]]:
    """Seconds of each work in each round. Every round does all of them, beginning one further on each time, so that what else
    the machine does falls on all alike; one more round, first of all, warms up and is not kept."""
    names = list(works)
    seconds: dict[K, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            spent = works[name]()
            if number >= 0:
                seconds[name].append(spent)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """The time of `over` divided by that of `under`, and what is demanded of it, if anything is."""

    name: str
    what: str
    over: str
    under: str
    at_least: float | None = None
    at_most: float | None = None

    def row(self, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """The median over rounds with the smallest and the largest, and the median seconds of both."""
        pairs = [
            over / under
            for over, under in zip(seconds[self.over], seconds[self.under], strict=True)
        ]
        return {
            "name": self.name, "what": self.what, "over": self.over, "under": self.under,
            "seconds": [significant(median(seconds[name])) for name in (self.over, self.under)],
            "least": significant(min(pairs)), "most": significant(max(pairs)),
        } | judged(median(pairs), self.at_least, self.at_most)  # fmt: skip


def judged(
    value: float, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    """The value beside what is demanded of it, and whether it is met: None if nothing is demanded."""
    demanded = at_least is not None or at_most is not None
    met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return {
        "ratio": significant(value),
        "at_least": at_least,
        "at_most": at_most,
        "met": met if demanded else None,
    }


def significant(value: float) -> float:
    return float(f"{value:.4g}")


def exponents(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """`fitted`: the power of x that fits all points best, by least squares of the logarithms; `last`: between the last two."""
    log_x, log_y = np.log(x), np.log(y)
    return {
        "fitted": significant(np.polyfit(log_x, log_y, 1)[0]),
        "last": significant((log_y[-1] - log_y[-2]) / (log_x[-1] - log_x[-2])),
    }
