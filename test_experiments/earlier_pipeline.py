"""The earlier public pipeline in small: plain transformers with its artefacts as switches.

Kept beside exp6 and out of the library, as nothing should be built upon it. It forces sets on a
prefix, one forward pass a set. With every artefact off it is TEMPO (docs/semantics.md).

cache: what a pass feeds to the model, and so what enters the cache. `all siblings`, or
    `last only`: the least probable member, as `input_ids[:, -1]` did.
mask: which mask a pass gets. `delivered`: the mode's own, by cache slot;
    `dropped`: none arrives, and the model falls back to plain causal attention over the cache;
    `by list index`: the mode's own, but over the list of all tokens. Entry i is taken for slot i,
        which holds another token once the list has members that never entered the cache.

Positions are those of the sets in every cell; with `last only` a model counts them so by itself.
Shapes: C cells, q tokens fed in a pass, N cached slots, L layers, H heads, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from tempo import LanguageModel, ModelError
from tempo.attention import installed

CACHES = ("all siblings", "last only")
MASKS = ("delivered", "dropped", "by list index")
Row = Sequence[int]


class Cell(NamedTuple):
    """One combination of the artefacts of cache and mask."""

    cache: str
    mask: str

    def __str__(self) -> str:
        return f"{self.cache}, {self.mask}"


CELLS = tuple(Cell(*levels) for levels in product(CACHES, MASKS))
CORRECT = Cell("all siblings", "delivered")


class Pass(NamedTuple):
    """What a cell gives in one pass. Of the prefix only the last token is kept."""

    logits: np.ndarray  # [q, V] float32
    attention: np.ndarray  # [L, H, q, N] float32
    slots: list[int]  # of the q tokens


Passes = dict[Cell, list[Pass]]


@torch.inference_mode()
def run_cells(lm: LanguageModel, prefix: Row, sets: Sequence[Row], mode: str) -> Passes:
    """The passes of every cell in one mode, `isolated` or `visible`: the prefix, then each set.

    The masks of one cache share a batch, the modes never do. The batches of both modes have the
    same shapes and order, so that what is computed alike in both is equal to the last bit.
    Raises ModelError where a sliding window would matter.
    """
    length = len(prefix) + len(sets)
    window = min(filter(None, lm.layer_windows), default=length)
    if length > window:
        raise ModelError(f"a window of {window} positions cuts a text of {length}; shorten it")
    places = list(range(len(prefix)))
    with installed(lm.model, "eager"):
        cache_of_prefix = DynamicCache()
        # Neither artefact can act before there is a sibling: both caches begin with this one pass.
        masks = [_allowed(places, mode)] * len(MASKS)
        before = _forward(lm, cache_of_prefix, prefix, places, masks, keep=1)
        found = {cell: [before[MASKS.index(cell.mask)]] for cell in CELLS}
        for kind in CACHES:
            # the set that each slot of the cache, and each token of the list, belongs to
            cache, cached, listed = copy.deepcopy(cache_of_prefix), places, places
            for k, members in enumerate(sets, start=len(prefix)):
                fed = members if kind == "all siblings" else members[-1:]
                cached, listed = cached + [k] * len(fed), listed + [k] * len(members)
                # plain causal attention is what there is if every slot is a set of its own
                causal = _allowed(range(len(cached)), "visible")
                masks = [_allowed(cached, mode), causal, _allowed(listed, mode)]  # as MASKS
                passes = _forward(lm, cache, fed, cached, masks, keep=len(fed))
                for mask, made in zip(MASKS, passes, strict=True):
                    found[Cell(kind, mask)].append(made)
    return found


def reported_score(seen: Pass, siblings: Row) -> float:
    """The attention "between parallel tokens" as the earlier code had it; 0.0 if there is none.

    It is the mean over layers, heads, and pairs of one slot of the pass and another in `siblings`.
    """
    queries = [slot for slot in seen.slots if slot in siblings]
    pairs = [pair for pair in product(queries, siblings) if len(set(pair)) == 2]
    weights = [seen.attention[:, :, query - seen.slots[0], key] for query, key in pairs]
    return float(np.mean(weights)) if weights else 0.0


def _allowed(sets: Row, mode: str) -> Tensor:
    """Who may attend to whom, bool [n, n], of tokens that belong to `sets`."""
    query, key = torch.tensor(sets)[:, None], torch.tensor(sets)[None, :]
    itself = torch.eye(len(sets), dtype=torch.bool)
    return (key <= query) if mode == "visible" else (key < query) | itself


def _forward(
    lm: LanguageModel, cache: Any, tokens: Row, cached: Row, masks: Sequence[Tensor], keep: int
) -> list[Pass]:
    """The last `keep` of the tokens under each mask, a row of the batch for each mask.

    cached: the set of every slot, which is also its position. The tokens are in the last slots.
    """
    end, num_fed = len(cached), len(tokens)
    hidden = ~torch.stack([mask[end - num_fed : end, :end] for mask in masks])[:, None]
    mask = torch.zeros(hidden.shape, dtype=lm.dtype).masked_fill(hidden, -torch.inf)  # [C, 1, q, N]
    output = lm.model(
        input_ids=torch.tensor([list(tokens)] * len(masks), device=lm.device),
        position_ids=torch.tensor([list(cached[-num_fed:])] * len(masks), device=lm.device),
        attention_mask=mask.to(lm.device),
        use_cache=True,
        output_attentions=True,
        logits_to_keep=keep,
        **{lm.cache_keyword: cache},
    )
    logits = output.logits.float().cpu().numpy()  # [C, keep, V]
    layers = [layer[:, :, -keep:].float().cpu() for layer in output.attentions]
    attention = torch.stack(layers, dim=1).numpy()  # [C, L, H, keep, N]
    slots = list(range(end - keep, end))
    return [Pass(*of_mask, slots) for of_mask in zip(logits, attention, strict=True)]
