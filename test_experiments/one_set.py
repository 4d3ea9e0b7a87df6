"""A wide set right after plain text and a token that reads it: the smallest text in which siblings can matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fixtures.study import wide_steps
from tempo import RunSpec, Trace
from tempo.statistics import SEED


@dataclass(frozen=True)
class OneSet:
    """A plain prefix, the members of one wide set (most probable first), and the token that reads on.

    The reader is drawn from the exact distribution after the set: the mixture of the members' own outputs, each weighted with
    what it was chosen with, which a free isolated run has computed to choose its next set.
    """

    prefix: tuple[int, ...]
    members: tuple[int, ...]
    reader: int

    def spec(self, **changes: Any) -> RunSpec:
        """A run that forces the set, then the reader; with `logits` captured, step 1 holds what the reader predicts."""
        return RunSpec(
            **{"prompt": self.prefix, "replay": (self.members, (self.reader,)), **changes}
        )


def first_wide_set(free: Trace, prompt: str) -> OneSet | None:
    """The first wide set of a free isolated run and its reader; None if the run has none, or ended with it."""
    wide = wide_steps(free)
    if not wide or wide[0] + 1 == len(free.steps):
        return None
    k = wide[0]
    prefix = (*free.prompt_tokens, *(step.tokens[0] for step in free.steps[:k]))
    ends = np.cumsum(free.steps[k + 1].distribution, dtype=np.float64)
    draw = np.random.default_rng([SEED, *prompt.encode()]).random() * ends[-1]
    return OneSet(
        prefix, tuple(free.steps[k].tokens), int(np.searchsorted(ends, draw, side="right"))
    )
