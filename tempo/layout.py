"""Which token, position and set each slot of one run holds, and the masks that follow from it.

A slot is a physical index in the cache: one token each, in order of arrival, never moved. Every prompt token is a set
of its own; generated set k has the id P + k. Shapes: w tokens of the coming pass, N slots in all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tempo.selection import member_weights


@dataclass
class Layout:
    """The slots of one run, growing by `append_prompt` once and `append_set` for each set."""

    visibility: str
    positions: str
    weighting: str
    replay_positions: Sequence[Sequence[int]] | None = (
        None  # of each set's members, in place of what `positions` gives
    )
    replay_weights: Sequence[Sequence[float]] | None = (
        None  # of each set's members, in place of what `weighting` gives
    )
    slot_token: list[int] = field(default_factory=list)
    slot_position: list[int] = field(default_factory=list)
    slot_set: list[int] = field(default_factory=list)
    slot_bias: list[float] = field(default_factory=list)  # added to attention logits of this key
    start: int = 0  # first slot of what the coming pass forwards
    num_prompt: int = 0

    @property
    def num_slots(self) -> int:
        return len(self.slot_token)

    def append_prompt(self, tokens: Sequence[int]) -> None:
        """Each token its own set, slot and position, from 0."""
        self.slot_token = list(tokens)
        self.slot_position = list(range(len(tokens)))
        self.slot_set = list(range(len(tokens)))
        self.slot_bias = [0.0] * len(tokens)
        self.num_prompt = len(tokens)

    def append_set(self, tokens: Sequence[int], probabilities: Sequence[float]) -> None:
        """One set: consecutive slots, one shared position (or one each, if sequential)."""
        width, self.start = len(tokens), self.num_slots
        set_id = self.slot_set[-1] + 1
        if self.replay_positions is not None:
            positions = list(self.replay_positions[set_id - self.num_prompt])
        elif self.positions == "shared":
            positions = [set_id] * width
        else:
            positions = list(range(self.start, self.start + width))
        self.slot_token.extend(tokens)
        self.slot_position.extend(positions)
        self.slot_set.extend([set_id] * width)
        self.slot_bias.extend(self._bias(set_id - self.num_prompt, probabilities))

    def _bias(self, step: int, probabilities: Sequence[float]) -> list[float]:
        if self.replay_weights is not None:
            return [math.log(weight) for weight in self.replay_weights[step]]
        if self.weighting == "none" or len(probabilities) == 1:
            return [0.0] * len(probabilities)
        weights = member_weights(probabilities)
        if self.weighting == "count":
            weights = torch.full_like(weights, 1.0 / len(weights))
        return torch.log(weights).tolist()

    def new_tokens_are_prompt(self) -> bool:
        return self.start == 0

    def block(self, visibility: str | None = None) -> Tensor:
        """What the tokens of the coming pass may see of each other: bool [w, w], query by key.

        visibility: that of the run, unless another is given.
        """
        return allowed(self.slot_set[self.start :], visibility or self.visibility)

    def bias(self, visibility: str | None = None) -> Tensor:
        """What is added to the attention logits of the tokens of the coming pass: float32 [w, N], query by key.

        Earlier sets carry their bias; the own set does only where all siblings see each other (`visible`).
        """
        keys = torch.tensor(self.slot_bias).expand(self.num_slots - self.start, -1)
        if (visibility or self.visibility) == "visible":
            return keys
        sets = torch.tensor(self.slot_set)
        return keys.masked_fill(sets[self.start :, None] == sets, 0.0)

    def own_mass(self) -> Tensor:
        """log n where a token of the coming pass looks at itself, n the width of its set: float32 [w, N]."""
        sets = torch.tensor(self.slot_set)
        widths = (sets[self.start :, None] == sets).sum(dim=1)
        own = torch.zeros(self.num_slots - self.start, self.num_slots)
        own[:, self.start :].diagonal().copy_(widths.log())
        return own


def allowed(slot_set: Sequence[int], visibility: str) -> Tensor:
    """The whole mask of a finished run, bool [N, N], query by key, from the definition (design: semantics, 4)."""
    sets = torch.tensor(slot_set)
    query, key = sets[:, None], sets[None, :]
    slot = torch.arange(len(slot_set))
    sibling = {
        "isolated": torch.zeros(len(slot_set), len(slot_set), dtype=torch.bool),
        "visible": torch.ones(len(slot_set), len(slot_set), dtype=torch.bool),
        "causal": slot[None, :] < slot[:, None],
    }[visibility]
    return (key < query) | (slot[:, None] == slot[None, :]) | ((key == query) & sibling)
