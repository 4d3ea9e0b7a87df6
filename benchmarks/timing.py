"""Times of works done in alternation, their paired ratios, and exponents of growth."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch

from tempo import LanguageModel

# Tokens of a pass in which a model takes as little for each as it ever does, and how often such a
# pass is timed.
AT_ONCE, PASSES = 512, 9
# Does its work and returns how many seconds that took.
Work = Callable[[], float]
K = TypeVar("K", bound=Hashable)


def clock(work: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """Wall seconds of one call, including what it started on a GPU."""
    began = wall()
    work(*args, **kwargs)
    return wall() - began


def wall() -> float:
    """Seconds on the clock, once a GPU has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def token_seconds(lm: LanguageModel, now: Callable[[], float]) -> float:
    """What the bare model takes for each token of a large pass, all logits computed."""
    tokens = (torch.arange(AT_ONCE)[None] % lm.vocab_size).to(lm.device)
    seconds = []
    for _ in range(PASSES):
        began = now()
        with torch.inference_mode():
            lm.model(input_ids=tokens, use_cache=False)
        seconds.append((now() - began) / AT_ONCE)
    return median(seconds)


def alternate(
    works: Mapping[K, Work], rounds: int, *, warm_up: bool = True
) -> dict[K, list[float]]:
    """Seconds of each work in each round.

    Every round does all works, and each round begins with the next one. So whatever else the
    machine does slows all of them alike. A first round warms up and is not kept.
    """
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
    """The time of `over` divided by that of `under`, and the bounds set for it, if any."""

    name: str
    what: str
    over: str
    under: str
    at_least: float | None = None
    at_most: float | None = None

    def row(self, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """The median over rounds, the smallest and the largest, and the median seconds of both."""
        times = zip(seconds[self.over], seconds[self.under], strict=True)
        ratios = [over / under for over, under in times]
        measured = {
            "name": self.name,
            "what": self.what,
            "over": self.over,
            "under": self.under,
            "seconds": [significant(median(seconds[name])) for name in (self.over, self.under)],
            "least": significant(min(ratios)),
            "most": significant(max(ratios)),
        }
        return measured | judged(median(ratios), self.at_least, self.at_most)


def judged(
    value: float, at_least: float | None = None, at_most: float | None = None
) -> dict[str, Any]:
    """The value, its bounds, and whether it keeps them; `met` is None without bounds."""
    bounded = at_least is not None or at_most is not None
    met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    return {
        "ratio": significant(value),
        "at_least": at_least,
        "at_most": at_most,
        "met": met if bounded else None,
    }


def significant(value: float) -> float:
    """The value to four digits."""
    return float(f"{value:.4g}")


def exponents(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The power of x that y grows with.

    `fitted`: over all points, by least squares of the logarithms. `last`: between the last two.
    """
    log_x, log_y = np.log(x), np.log(y)
    return {
        "fitted": significant(np.polyfit(log_x, log_y, 1)[0]),
        "last": significant((log_y[-1] - log_y[-2]) / (log_x[-1] - log_x[-2])),
    }
