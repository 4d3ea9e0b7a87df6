"""Which token, position and set each slot of one run holds, and the masks that follow from it.

A slot is a physical index in the cache: one token each, in order of arrival, never moved. Every prompt token is a set
of its own; generated set k has the id P + k. Shapes: w tokens just appended, N slots in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tempo.selection import member_weights


@dataclass
class Layout:
    """The slots of one run, growing by `append_prompt` once and `append_set` at each step."""

    visibility: str
    positions: str
    weighting: str
    slot_token: list[int] = field(default_factory=list)
    slot_position: list[int] = field(default_factory=list)
    slot_set: list[int] = field(default_factory=list)
    slot_bias: list[float] = field(default_factory=list)  # added to attention logits of this key
    start: int = 0  # first slot of what was appended last

    @property
    def num_slots(self) -> int:
        return len(self.slot_token)

    def append_prompt(self, tokens: Sequence[int]) -> None:
        """Each token its own set, slot and position, from 0."""
        self.slot_token = list(tokens)
        self.slot_position = list(range(len(tokens)))
        self.slot_set = list(range(len(tokens)))
        self.slot_bias = [0.0] * len(tokens)

    def append_set(self, tokens: Sequence[int], probabilities: Sequence[float]) -> None:
        """One set: consecutive slots, one shared position (or one each, if sequential)."""
        width, self.start = len(tokens), self.num_slots
        set_id = self.slot_set[-1] + 1
        first = set_id if self.positions == "shared" else self.start
        step = 0 if self.positions == "shared" else 1
        self.slot_token.extend(tokens)
        self.slot_position.extend(first + step * i for i in range(width))
        self.slot_set.extend([set_id] * width)
        self.slot_bias.extend(self._bias(probabilities))

    def _bias(self, probabilities: Sequence[float]) -> list[float]:
        if self.weighting == "none" or len(probabilities) == 1:
            return [0.0] * len(probabilities)
        weights = member_weights(probabilities)
        if self.weighting == "count":
            weights = torch.full_like(weights, 1.0 / len(weights))
        return torch.log(weights).tolist()

    def new_tokens_are_prompt(self) -> bool:
        return self.start == 0

    def block(self) -> Tensor:
        """What the tokens just appended may see of each other: bool [w, w], query by key."""
        width = self.num_slots - self.start
        if self.new_tokens_are_prompt() or self.visibility == "causal":
            return torch.ones(width, width, dtype=torch.bool).tril()
        if self.visibility == "visible":
            return torch.ones(width, width, dtype=torch.bool)
        return torch.eye(width, dtype=torch.bool)

    def bias(self) -> Tensor:
        """What is added to the attention logits of the tokens just appended: float32 [w, N], query by key.

        Earlier sets carry their bias; the own set does only where all siblings see each other (`visible`).
        """
        keys = torch.tensor(self.slot_bias)
        if self.visibility != "visible":
            keys[self.start :] = 0.0
        return keys.expand(self.num_slots - self.start, -1)


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
