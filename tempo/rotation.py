"""How a model rotates its keys, as transformers' own pass shows it: no convention is assumed.

Shapes: T tokens of the pass, Hkv key heads, D key size, d rotated pairs of dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from tempo.capture import raw_keys
from tempo.errors import ModelError
from tempo.support import cache_keyword

NUM_ROTATED = 24  # tokens of the pass that shows it: enough positions for a wrong frequency to show
# |R raw - cached| / |cached| under the right rotation is rounding, even in bfloat16; under a wrong
# one it is about 1.
ROTATION_FITS = 0.03
# A scale that is not told from 1 is 1.
SCALE_IS_ONE = 1e-3


class Rotation(NamedTuple):
    """How a layer rotates its keys.

    Attributes:
        frequencies: In radians a position [d]; d pairs of dimensions rotate, the others do not. A
            layer that does not rotate has one frequency, 0.
        interleaved: Whether neighbours are pairs. Else each dimension is paired with the one d
            further on.
        scale: What rotated dimensions are multiplied by (the attention factor of YaRN).
    """

    frequencies: np.ndarray
    interleaved: bool
    scale: float


@torch.inference_mode()
def rotations(
    model: PreTrainedModel, modules: Sequence[nn.Module], frequencies: Sequence[np.ndarray]
) -> list[Rotation]:
    """How each layer rotates its keys, from a plain pass that caches them.

    Args:
        model: A causal language model of transformers, each layer of which caches its own keys.
        modules: The attention module of each layer.
        frequencies: Of each layer, as its rotary table says.

    Raises:
        ModelError: if keys before rotation cannot be had, or if no known rotation turns them into
            the cached ones.
    """
    embedding: Any = model.get_input_embeddings()
    index = torch.arange(NUM_ROTATED, device=embedding.weight.device)
    tokens = (index % embedding.weight.shape[0])[None]
    cache: Any = DynamicCache()
    with raw_keys(modules) as raw:
        model(
            input_ids=tokens,
            position_ids=index[None],
            use_cache=True,
            **{cache_keyword(model): cache},
        )
    found = []
    for layer, (before, table) in enumerate(zip(raw, frequencies, strict=True)):
        first, then = (
            keys[0].double().cpu().numpy() for keys in (before, cache.layers[layer].keys)
        )
        rotation = rotation_of(first, then, table)
        if rotation is None:
            raise ModelError(
                f"the cached keys of layer {layer} are no rotation of its keys that tempo knows, "
                "so positions cannot be told from them"
            )
        found.append(rotation)
    return found


def rotation_of(raw: np.ndarray, cached: np.ndarray, table: np.ndarray) -> Rotation | None:
    """The known rotation that turns raw keys into cached ones, [Hkv, T, D] at positions 0 to T - 1.

    None if there is none.
    """
    size = np.linalg.norm(cached)
    if np.linalg.norm(cached - raw) <= ROTATION_FITS * size:
        return Rotation(np.zeros(1), False, 1.0)
    positions, half = np.arange(raw.shape[1]), len(table)
    for interleaved, sign in product((False, True), (1.0, -1.0)):
        first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        if not interleaved:
            first, second = slice(0, half), slice(half, 2 * half)
        phases = np.exp(1j * sign * np.outer(positions, table))  # [T, d]
        turned = (raw[..., first] + 1j * raw[..., second]) * phases
        rotated = cached[..., first] + 1j * cached[..., second]
        scale = float(np.linalg.norm(rotated) / np.linalg.norm(turned))
        scale = 1.0 if abs(scale - 1) < SCALE_IS_ONE else scale
        if np.linalg.norm(rotated - scale * turned) <= ROTATION_FITS * np.linalg.norm(rotated):
            return Rotation(sign * table, interleaved, scale)
    return None
