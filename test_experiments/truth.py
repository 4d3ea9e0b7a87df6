"""The exact next distribution after sets of alternatives, by running every path as plain text.

After a prefix c, sets S_1..S_d of alternatives and a continuation x, the true next distribution, given that each set's
token is one of its members, is the mixture of what the paths predict: m = sum over paths s of pi(s) p(. | c, s, x) with
pi(s) proportional to the path's own probability p(s | c) p(x | c, s): Bayes' rule. Nothing here is TEMPO's: each path is
an ordinary run of width one, and weights are summed in log space, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.special import logsumexp

from fixtures.study import Run
from tempo import RunSpec, Trace

# Ends a run that is asked what comes after its last token: the distribution this token is "chosen" from is the answer.
_ANY_TOKEN = 0


@dataclass(frozen=True)
class Branches:
    """All paths through `sets` after `prefix`, each read on through `continuation` (token ids)."""

    prefix: tuple[int, ...]
    sets: tuple[tuple[int, ...], ...]
    continuation: tuple[int, ...] = ()

    @property
    def paths(self) -> list[tuple[int, ...]]:
        """Every choice of one member from each set; the first members' path comes first."""
        return list(product(*self.sets))

    def runs(self) -> list[Run]:
        """One run a path, in the order of `paths`."""
        return [Run(read_spec(self.prefix, [(token,) for token in path], self.continuation)) for path in self.paths]

    def log_posterior(self, traces: Sequence[Trace], lag: int) -> np.ndarray:
        """log pi(s) of each path [paths], once the first lag - 1 tokens of the continuation have been read."""
        num_read = len(self.sets) + lag - 1
        logs = np.array([[np.log(np.maximum(t.steps[k].probabilities[0], 1e-300)) for k in range(num_read)] for t in traces])
        logs = logs.astype(np.float64).sum(axis=1)
        return logs - logsumexp(logs)

    def predictions(self, traces: Sequence[Trace], lag: int) -> np.ndarray:
        """Each path's own next distribution at that lag, float64 [paths, V]."""
        return np.stack([trace.steps[len(self.sets) + lag - 1].distribution for trace in traces]).astype(np.float64)

    def truth(self, traces: Sequence[Trace], lag: int) -> np.ndarray:
        """The true next distribution at `lag`, float64 [V]: 1 right after the last set, j after j - 1 more tokens."""
        return np.exp(self.log_posterior(traces, lag)) @ self.predictions(traces, lag)


def read_spec(prefix: Sequence[int], sets: Sequence[Sequence[int]], continuation: Sequence[int] = (), **changes: object) -> RunSpec:
    """A run that forces `sets`, then `continuation` token by token, and tells what comes after each.

    With d sets, the distribution at lag j (`Branches.truth`) is that of step d + j - 1.
    """
    forced = [*sets, *((token,) for token in continuation), (_ANY_TOKEN,)]
    return RunSpec(prompt=tuple(prefix), replay=forced, **changes)  # type: ignore[arg-type]
