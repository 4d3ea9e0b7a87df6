"""A key-value cache addressed by slot.

Each run has a row. Keys and values are written by row and slot, and never copied from step to step.

Shapes: R rows, Hkv key heads, C capacity in slots, N slots in use, D key size, V value size,
T packed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from tempo.attention import PassContext

States: TypeAlias = tuple[Tensor, Tensor]  # keys and values [Hkv, P, D] of a prompt
# In slots. It is doubled when full, so that growing costs a constant amount for each slot.
FIRST_CAPACITY = 64


class SlotLayer(CacheLayerMixin):
    """Keys [R, Hkv, C, D] and values [R, Hkv, C, V] of one layer."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for states of this size, dtype and device."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._room_for(key_states), self._room_for(value_states)
        self.is_initialized = True

    def _room_for(self, states: Tensor) -> Tensor:
        # Zeros, not empty: a masked slot is multiplied by a weight of exactly 0. The product is 0
        # only if what the slot holds is finite.
        shape = self.cache.num_rows, states.shape[1], FIRST_CAPACITY, states.shape[-1]
        return states.new_zeros(shape)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the packed tokens' keys and values, and return those of the first N slots.

        Args:
            key_states: The keys of the packed tokens, [1, Hkv, T, D].
            value_states: Their values, [1, Hkv, T, V].
            args: What transformers passes beside them, not used.
            kwargs: What transformers passes beside them, not used.

        Returns:
            Keys [R, Hkv, N, D] and values [R, Hkv, N, V] of the rows of the pass.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        step = self.cache.step
        if step is None:
            raise RuntimeError(
                "SlotCache.step is not set; the engine sets it before each forward pass"
            )
        stored = []
        for name, states in (("keys", key_states), ("values", value_states)):
            held = _grown(getattr(self, name), step.num_slots)
            packed = states[0].transpose(0, 1)
            if step.only is not None:
                held[step.held, :, step.only.start : step.only.stop] = states
            else:
                held[step.cache_rows, :, step.slots] = packed
            if step.copies is not None:
                rows, slots, tokens = step.copies
                held[rows, :, slots] = packed[tokens]
            setattr(self, name, held)
            stored.append(held[step.held, :, : step.num_slots])
        return stored[0], stored[1]

    def get_seq_length(self) -> int:
        return 0 if self.cache.step is None else self.cache.step.num_slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.10


class SlotCache(Cache):
    """The keys and values of all layers and rows.

    Attributes:
        step: Where the tokens of the coming forward pass go. The engine sets it before each pass.
        slot_positions: The position of each slot, [R, C]. Only kept if a layer has a window.
    """

    def __init__(self, num_layers: int, num_rows: int) -> None:
        self.num_rows = num_rows
        self.step: PassContext | None = None
        self.slot_positions = torch.zeros(num_rows, FIRST_CAPACITY, dtype=torch.long)
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])

    def place(self, rows: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Keep the positions [T] of the tokens that are written to these rows and slots."""
        positions_so_far = self.slot_positions.to(positions.device)
        # `_grown` expects [R, Hkv, C, D]
        held = _grown(positions_so_far[:, None, :, None], int(slots.max()) + 1)
        self.slot_positions = held[:, 0, :, 0]
        self.slot_positions[rows, slots] = positions

    def copy(self, source: int, target: int, num_slots: int) -> None:
        """Make one row start with the first slots of another."""
        self.slot_positions[target, :num_slots] = self.slot_positions[source, :num_slots]
        for layer in self._initialized_layers():
            for held in (layer.keys, layer.values):
                held[target, :, :num_slots] = held[source, :, :num_slots]

    def write(self, row: int, states: Mapping[int, States], num_slots: int) -> None:
        """Make a row start with the first slots of a prompt.

        Args:
            row: The row.
            states: Keys and values [Hkv, P, D] by layer, which were those of an equal cache.
            num_slots: How many slots, at most P.
        """
        self.slot_positions = _grown(self.slot_positions[:, None, :, None], num_slots)[:, 0, :, 0]
        self.slot_positions[row, :num_slots] = torch.arange(num_slots)
        layers: list[Any] = list(self.layers)
        for number, (keys, values) in states.items():
            layer = layers[number]
            if not layer.is_initialized:
                layer.lazy_initialization(keys[None], values[None])
            for name, given in (("keys", keys), ("values", values)):
                held = _grown(getattr(layer, name), num_slots)
                held[row, :, :num_slots] = given[:, :num_slots]
                setattr(layer, name, held)

    def release(self) -> None:
        """Drop all keys and values now.

        The layers and their cache refer to each other. The garbage collector would find them late.
        """
        self.step = None
        self.layers.clear()

    @property
    def sizes(self) -> tuple[tuple[int, int, int], ...]:
        """(heads, key size, value size) of each layer that holds something."""
        return tuple(
            (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
            for layer in self._initialized_layers()
        )

    def _initialized_layers(self) -> list[Any]:
        layers: list[Any] = list(self.layers)
        return [layer for layer in layers if layer.is_initialized]


class Prompts:
    """What passes over prompts gave, to be kept between calls of `tempo.stream`.

    A prompt that is kept is not forwarded again, and of a longer one only what follows it. What
    does not fit is never kept, so that equal calls after one another make equal passes.

    Example:
        >>> import tempo
        >>> lm, prompts = tempo.load_model("tiny"), Prompts(most_bytes=2**20)
        >>> for mode in ("isolated", "visible"):
        ...     spec = tempo.RunSpec(prompt="The cat", visibility=mode, max_steps=2)
        ...     _ = dict(tempo.stream(lm, [spec], prompts=prompts))
        >>> prompts.num_bytes > 0
        True
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.num_bytes = most_bytes, 0
        # keys and values of each layer that has its own, and the logits [1, V] of the last token
        self._kept: dict[tuple[int, ...], tuple[dict[int, States], Tensor]] = {}
        self._refused: set[tuple[int, ...]] = set()

    def keep(self, prompt: tuple[int, ...], cache: SlotCache, row: int, logits: Tensor) -> None:
        """Copy a prompt's keys and values from a row of the cache, if there is room for them."""
        if prompt in self._kept or prompt in self._refused:
            return
        held, layers = slice(0, len(prompt)), enumerate(list[Any](cache.layers))
        states = {
            number: (layer.keys[row, :, held], layer.values[row, :, held])
            for number, layer in layers
            if layer.is_initialized
        }
        size = logits.nbytes + sum(each.nbytes for of_layer in states.values() for each in of_layer)
        if self.num_bytes + size > self.most_bytes:
            self._refused.add(prompt)
            return
        self.num_bytes += size
        copied = {
            number: (keys.clone(), values.clone()) for number, (keys, values) in states.items()
        }
        self._kept[prompt] = copied, logits.clone()

    def begin(
        self, prompt: tuple[int, ...], cache: SlotCache, row: int
    ) -> tuple[int, Tensor | None]:
        """How many tokens of a prompt the row now holds, and its logits if these are all."""
        if prompt in self._kept:
            cache.write(row, self._kept[prompt][0], len(prompt))
            return len(prompt), self._kept[prompt][1]
        # at least one token is left to be forwarded, for its logits
        shared = {kept: min(_num_shared(kept, prompt), len(prompt) - 1) for kept in self._kept}
        best = max(shared, key=lambda kept: shared[kept], default=())
        if not best or not shared[best]:
            return 0, None
        cache.write(row, self._kept[best][0], shared[best])
        return shared[best], None


def _num_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def capacity(num_slots: int) -> int:
    """C, the room that a cache makes for this many slots."""
    room = FIRST_CAPACITY
    while room < num_slots:
        room *= 2
    return room


def _grown(held: Tensor, num_slots: int) -> Tensor:
    """`held` [R, Hkv, C, D] itself, or with C doubled until `num_slots` fit."""
    if num_slots <= held.shape[2]:
        return held
    larger = held.new_zeros(*held.shape[:2], capacity(num_slots), held.shape[3])
    larger[:, :, : held.shape[2]] = held
    return larger
