"""A key-value cache addressed by slot: rows of runs, written by index, never copied from step to step.

Shapes: R rows, Hkv key heads, C capacity in slots, N slots in use, D key size, V value size, T packed tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from tempo.attention import PassContext

FIRST_CAPACITY = (
    64  # slots; doubled when full, so that growing costs a constant amount for each slot
)


class SlotLayer(CacheLayerMixin):
    """Keys [R, Hkv, C, D] and values [R, Hkv, C, V] of one layer."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            # zeros, not empty: a masked slot is multiplied by a weight of exactly 0, which only a finite value survives
            states.new_zeros(self.cache.num_rows, states.shape[1], FIRST_CAPACITY, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the packed states [1, Hkv, T, .] to their slots; the first N slots of all rows come back as views."""
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
                held[0, :, step.only.start : step.only.stop] = states[0]
            else:
                held[step.rows, :, step.slots] = packed
            if step.copies is not None:
                rows, slots, tokens = step.copies
                held[rows, :, slots] = packed[tokens]
            setattr(self, name, held)
            stored.append(held[:, :, : step.num_slots])
        return stored[0], stored[1]

    def get_seq_length(self) -> int:
        return 0 if self.cache.step is None else self.cache.step.num_slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.10


class SlotCache(Cache):
    """One `SlotLayer` for each layer; `step` says where the tokens of the coming forward pass go."""

    def __init__(self, num_layers: int, num_rows: int) -> None:
        self.num_rows = num_rows
        self.step: PassContext | None = None
        self.slot_positions = torch.zeros(
            num_rows, FIRST_CAPACITY, dtype=torch.long
        )  # [R, C], kept where a layer has a window
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])

    def place(self, rows: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Note the positions [T] of the tokens written to these slots."""
        held = _grown(
            self.slot_positions.to(positions.device)[:, None, :, None], int(slots.max()) + 1
        )
        self.slot_positions = held[:, 0, :, 0]
        self.slot_positions[rows, slots] = positions

    def copy(self, source: int, target: int, num_slots: int) -> None:
        """Let one row begin with what the first slots of another hold."""
        self.slot_positions[target, :num_slots] = self.slot_positions[source, :num_slots]
        layers: list[Any] = [layer for layer in self.layers if layer.is_initialized]  # pyright: ignore[reportAttributeAccessIssue]
        for held in (held for layer in layers for held in (layer.keys, layer.values)):
            held[target, :, :num_slots] = held[source, :, :num_slots]

    def release(self) -> None:
        """Let go of all keys and values; the layers and their cache hold each other, which the garbage collector finds late."""
        self.step = None
        self.layers.clear()

    @property
    def sizes(self) -> tuple[tuple[int, int, int], ...]:
        """(heads, key size, value size) of every layer that holds something."""
        held: list[Any] = [layer for layer in self.layers if layer.is_initialized]  # pyright: ignore[reportAttributeAccessIssue]
        return tuple(
            (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in held
        )


def _grown(held: Tensor, num_slots: int) -> Tensor:
    """`held` itself, or with its capacity doubled until `num_slots` fit."""
    capacity = held.shape[2]
    if num_slots <= capacity:
        return held
    while capacity < num_slots:
        capacity *= 2
    larger = held.new_zeros(*held.shape[:2], capacity, held.shape[3])
    larger[:, :, : held.shape[2]] = held
    return larger
