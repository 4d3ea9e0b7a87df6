"""The exact next distribution after sets of alternatives, by running every path as plain text.

After a prefix c, sets S_1..S_d of alternatives and a continuation x, the true next distribution, given that each set's
token is one of its members, is the mixture of what the paths predict: m = sum over paths s of pi(s) p(. | c, s, x) with
pi(s) proportional to the path's own probability p(s | c) p(x | c, s): Bayes' rule. Nothing here is TEMPO's: each path is
an ordinary run of width one (`Branches`), or transformers' own forward pass over a tree of texts (`predict_after`, for many
short paths), and weights are summed in log space, in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from scipy.special import logsumexp

from fixtures.study import Run
from tempo import LanguageModel, RunSpec, SpecError, Trace

# Ends a run that is asked what comes after its last token: the distribution this token is "chosen" from is the answer.
_ANY_TOKEN = 0
# A probability that underflows to 0 in float32; its logarithm stays finite.
_SMALLEST = 1e-300

Path = tuple[int, ...]


@dataclass(frozen=True)
class Branches:
    """All paths through `sets` after `prefix`, each read on through `continuation` (token ids)."""

    prefix: tuple[int, ...]
    sets: tuple[tuple[int, ...], ...]
    continuation: tuple[int, ...] = ()

    @property
    def paths(self) -> list[Path]:
        """Every choice of one member from each set; the first members' path comes first."""
        return list(product(*self.sets))

    def runs(self) -> list[Run]:
        """One run a path, in the order of `paths`."""
        return [
            forced(read_spec(self.prefix, [(token,) for token in path], self.continuation))
            for path in self.paths
        ]

    def log_posterior(self, traces: Sequence[Trace], lag: int) -> np.ndarray:
        """log pi(s) of each path [paths], once the first lag - 1 tokens of the continuation have been read."""
        num_read = len(self.sets) + lag - 1
        logs = [
            [log_probability(trace.steps[k].probabilities[0]) for k in range(num_read)]
            for trace in traces
        ]
        return normalised(np.sum(logs, axis=1))

    def predictions(self, traces: Sequence[Trace], lag: int) -> np.ndarray:
        """Each path's own next distribution at that lag, float64 [paths, V]."""
        return np.stack(
            [trace.steps[len(self.sets) + lag - 1].distribution for trace in traces]
        ).astype(np.float64)

    def truth(self, traces: Sequence[Trace], lag: int) -> np.ndarray:
        """The true next distribution at `lag`, float64 [V]: 1 right after the last set, j after j - 1 more tokens."""
        return np.exp(self.log_posterior(traces, lag)) @ self.predictions(traces, lag)


def forced(spec: RunSpec) -> Run:
    """A forced run in batches of its own kind.

    Runs here come in other numbers for one mode than for another. Among those of the first experiments, which compare modes
    to the last bit, they would give the modes' batches different shapes.
    """
    return Run(spec, batch="truth")


def read_spec(
    prefix: Sequence[int],
    sets: Sequence[Sequence[int]],
    continuation: Sequence[int] = (),
    **changes: object,
) -> RunSpec:
    """A run that forces `sets`, then `continuation` token by token, and tells what comes after each.

    With d sets, the distribution at lag j (`Branches.truth`) is that of step d + j - 1.
    """
    forced = [*sets, *((token,) for token in continuation), (_ANY_TOKEN,)]
    return RunSpec(prompt=tuple(prefix), replay=forced, **changes)  # type: ignore[arg-type]


def log_probability(probability: float) -> float:
    """log p, finite where p underflowed to 0."""
    return float(np.log(max(probability, _SMALLEST)))


def normalised(logs: np.ndarray) -> np.ndarray:
    """Logarithms of weights that sum to one."""
    return logs - logsumexp(logs)


@torch.inference_mode()
def predict_after(
    lm: LanguageModel, prefix: Sequence[int], paths: Iterable[Path]
) -> dict[Path, np.ndarray]:
    """p(. | prefix, path) for each path (the empty one is the prefix alone): float32 [V].

    One pass of transformers' own model over the tree of all texts: a token attends to the prefix and to the path that leads
    to it, and stands where it stands in its text (SpecInfer, arXiv 2305.09781, definition 4.1). Raises SpecError for texts
    that outgrow a sliding window, which a ready-made mask bypasses.
    """
    asked = list(dict.fromkeys(paths))
    nodes = list(dict.fromkeys(path[: k + 1] for path in asked for k in range(len(path))))
    num_prefix, node_slot = len(prefix), {node: len(prefix) + i for i, node in enumerate(nodes)}
    longest = num_prefix + max(map(len, asked))
    if any(window and longest > window for window in lm.layer_windows):
        raise SpecError(
            f"texts of {longest} tokens do not fit the sliding window of {lm.name}; shorten the prompt"
        )
    allowed = torch.ones(num_prefix + len(nodes), num_prefix + len(nodes), dtype=torch.bool).tril()
    allowed[num_prefix:, num_prefix:] = False
    for node, slot in node_slot.items():
        allowed[slot, [node_slot[node[: k + 1]] for k in range(len(node))]] = True
    mask = torch.zeros(allowed.shape, dtype=lm.dtype).masked_fill(
        ~allowed, torch.finfo(lm.dtype).min
    )
    output = lm.model(
        input_ids=torch.tensor([[*prefix, *(node[-1] for node in nodes)]], device=lm.device),
        position_ids=torch.tensor(
            [[*range(num_prefix), *(num_prefix + len(node) - 1 for node in nodes)]],
            device=lm.device,
        ),
        attention_mask=mask[None, None].to(lm.device),
        use_cache=False,
        logits_to_keep=torch.tensor(
            [node_slot.get(path, num_prefix - 1) for path in asked], device=lm.device
        ),
    )
    return dict(zip(asked, output.logits[0].float().softmax(dim=-1).cpu().numpy(), strict=True))
