"""The token, position and set of each slot of one run, and the attention masks that follow.

A slot is a physical index in the cache. It holds one token, in order of arrival, and never moves.
Every prompt token is a set of its own. The generated set k has the id P + k.

Shapes: P prompt tokens, w tokens of the coming pass, N slots in all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tempo.selection import member_weights

# A pass takes at most this many new tokens, which bounds the memory of its masks and logits. More
# are forwarded in parts, except the members of one set that all see each other.
MAX_NEW_TOKENS = 1024
# The rows of a pass of several runs, each as wide as the widest, have at most this many places.
MAX_PADDED = 4 * MAX_NEW_TOKENS


@dataclass
class Layout:
    """The slots of one run. Call `append_prompt` once, then `append_set` for each generated set.

    Attributes:
        visibility: The setting of `RunSpec`.
        positions: The setting of `RunSpec`.
        weighting: The setting of `RunSpec`.
        replay_positions: The position of each member of each set, instead of what `positions`
            gives.
        replay_weights: The weight of each member of each set, instead of what `weighting` gives.
        slot_token: [N], the token in each slot.
        slot_position: [N], the rotary position of each slot.
        slot_set: [N], the id of the set that each slot belongs to.
        slot_bias: [N], added to the attention logits of each slot's key.
        ancestors: [G, w], the weight of each slot from the last prompt token on for each token of
            the coming pass, if weights depend on the query.
        dropped: The slots that no token of the coming pass, and none after it, may see.
        start: The first slot that the coming pass forwards.
        part_end: The slot after the last one that it forwards, if that is not the last in use.
        num_prompt: P, the number of prompt tokens.

    Example:
        >>> layout = Layout(visibility="isolated", positions="shared", weighting="none")
        >>> layout.append_prompt([11, 12])
        >>> layout.append_set([7, 8], probabilities=[0.6, 0.3])
        >>> layout.slot_token
        [11, 12, 7, 8]
        >>> layout.slot_position  # the two siblings share position 2
        [0, 1, 2, 2]
        >>> layout.block()  # an isolated sibling sees itself only
        tensor([[ True, False],
                [False,  True]])
    """

    visibility: str
    positions: str
    weighting: str
    replay_positions: Sequence[Sequence[int]] | None = None
    replay_weights: Sequence[Sequence[float]] | None = None
    slot_token: list[int] = field(default_factory=list)
    slot_position: list[int] = field(default_factory=list)
    slot_set: list[int] = field(default_factory=list)
    slot_bias: list[float] = field(default_factory=list)
    ancestors: Tensor | None = None
    dropped: list[int] = field(default_factory=list)
    start: int = 0
    part_end: int | None = None
    num_prompt: int = 0

    @property
    def num_slots(self) -> int:
        """N, the number of slots in use."""
        return len(self.slot_token)

    @property
    def end(self) -> int:
        """The slot after the last one that the coming pass forwards."""
        return self.num_slots if self.part_end is None else self.part_end

    @property
    def first_sibling(self) -> int:
        """The slot where the set of the pass's first token begins; `start`, unless it is cut."""
        first = self.start
        while first and self.slot_set[first - 1] == self.slot_set[self.start]:
            first -= 1
        return first

    def parts(self, most: int) -> list[tuple[int, int]]:
        """(start, end) of the passes that forward the new tokens, each of at most `most` tokens.

        Members of one set that all see each other cannot be parted: each needs the keys of all
        others in every layer. Such a set is one part, however wide.
        """
        if self.visibility == "visible" and not self.new_tokens_are_prompt():
            return [(self.start, self.num_slots)]
        starts = range(self.start, self.num_slots, most)
        return [(start, min(start + most, self.num_slots)) for start in starts]

    def append_prompt(self, tokens: Sequence[int]) -> None:
        """Give each prompt token its own slot, position and set, counted from 0."""
        self.slot_token = list(tokens)
        self.slot_position = list(range(len(tokens)))
        self.slot_set = list(range(len(tokens)))
        self.slot_bias = [0.0] * len(tokens)
        self.num_prompt = len(tokens)

    def append_set(self, tokens: Sequence[int], probabilities: Sequence[float]) -> None:
        """Give the members of one set consecutive slots.

        They share one position, or take one each if positions are sequential.

        Args:
            tokens: The members' token ids, [w].
            probabilities: The probabilities that the members were selected with, [w].
        """
        width, self.start = len(tokens), self.num_slots
        set_id = self.slot_set[-1] + 1
        step = set_id - self.num_prompt
        if self.replay_positions is not None:
            positions = list(self.replay_positions[step])
        elif self.positions == "shared":
            positions = [set_id] * width
        else:
            positions = list(range(self.start, self.start + width))
        self.slot_token.extend(tokens)
        self.slot_position.extend(positions)
        self.slot_set.extend([set_id] * width)
        self.slot_bias.extend(self._bias(step, probabilities))

    def _bias(self, step: int, probabilities: Sequence[float]) -> list[float]:
        """The logarithm of each member's weight, [w]."""
        if self.replay_weights is not None:
            return [math.log(weight) for weight in self.replay_weights[step]]
        if self.weighting not in ("count", "probability") or len(probabilities) == 1:
            return [0.0] * len(probabilities)
        weights = member_weights(probabilities)
        if self.weighting == "count":
            weights = torch.full_like(weights, 1.0 / len(weights))
        return torch.log(weights).tolist()

    def new_tokens_are_prompt(self) -> bool:
        """Whether the coming pass forwards the prompt."""
        return self.start < self.num_prompt

    def block(self, visibility: str | None = None) -> Tensor:
        """Which tokens of the coming pass may see each other: bool [w, w], query by key.

        If the pass forwards the later part of a set, the keys begin with the set's first member.

        Args:
            visibility: Used instead of the run's own, if given.
        """
        first = self.first_sibling
        sets = self.slot_set[first : self.end]
        return allowed(sets, visibility or self.visibility, self.start - first)

    def bias(self, visibility: str | None = None) -> Tensor:
        """The number added to each attention logit of the coming pass: float64 [w, N].

        Rows are queries, columns are keys. Keys of earlier sets carry their bias. Keys of the
        query's own set carry it only if all siblings see each other (`visible`), and none if
        weights depend on the query.

        Args:
            visibility: Used instead of the run's own, if given.
        """
        if self.ancestors is not None:
            return self._bias_by_query(self.ancestors)
        keys = torch.tensor(self.slot_bias[: self.end], dtype=torch.float64)
        keys = keys.expand(self.end - self.start, -1)
        if (visibility or self.visibility) == "visible":
            return keys
        sets = torch.tensor(self.slot_set[: self.end])
        own_set = sets[self.start :, None] == sets
        return keys.masked_fill(own_set, 0.0)

    def _bias_by_query(self, ancestors: Tensor) -> Tensor:
        """The logarithm of each earlier slot's weight for each query, [w, N]."""
        bias, first = ancestors.new_zeros(self.end - self.start, self.end), self.first_sibling
        of_part = ancestors.T[self.start - first : self.end - first]
        bias[:, self.num_prompt - 1 : first] = of_part.log()
        return bias

    def own_mass(self) -> Tensor:
        """log n where a token of the coming pass attends to itself, else 0: float64 [w, N].

        n is the width of the token's set. Its own key then counts for the whole set.
        """
        sets = torch.tensor(self.slot_set)
        widths = (sets[self.start : self.end, None] == sets).sum(dim=1)
        own = torch.zeros(self.end - self.start, self.end, dtype=torch.float64)
        own[:, self.start :].diagonal().copy_(widths.double().log())
        return own


def allowed(slot_set: Sequence[int], visibility: str, first_query: int = 0) -> Tensor:
    """Which slots may attend to which: bool [N, N], query by key.

    A slot attends to itself, to every slot of an earlier set, and to the siblings that `visibility`
    allows. The rule is in docs/semantics.md.

    Args:
        slot_set: The id of the set that each slot belongs to, [N].
        visibility: `isolated`, `visible` or `causal`.
        first_query: Rows before this slot are left out.

    Raises:
        KeyError: if there is no such visibility.

    Example:
        >>> allowed([0, 1, 1, 2], "isolated").int()  # slots 1 and 2 are siblings
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 0, 1, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
        >>> allowed([0, 1, 1, 2], "visible").int()
        tensor([[1, 0, 0, 0],
                [1, 1, 1, 0],
                [1, 1, 1, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    sets, slot = torch.tensor(slot_set), torch.arange(len(slot_set))
    query, key = sets[first_query:, None], sets[None, :]
    is_itself = slot[first_query:, None] == slot[None, :]
    sibling = {
        "isolated": is_itself,
        "visible": torch.ones_like(is_itself),
        "causal": slot[None, :] < slot[first_query:, None],
    }[visibility]
    return (key < query) | is_itself | ((key == query) & sibling)
