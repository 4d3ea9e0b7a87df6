"""The earlier public pipeline in small: plain transformers with its artefacts as switches, each on or off.

Kept beside the experiment and out of the library, as nothing here should be built upon. It forces a list of sets on a prefix,
one forward pass a set. With every artefact off it is TEMPO by design semantics 3 and 4.

cache: what a pass feeds to the model, and so what enters the cache.
    `all siblings`: every member of the set; `last only`: its last and least probable member, as `input_ids[:, -1]` did.
mask: which mask a pass gets.
    `delivered`: that of the mode, by cache slot;
    `dropped`: none of it arrives, so that the model falls back to plain causal attention over the cache;
    `by list index`: that of the mode, but of the list of all tokens: row and column i are taken for cache slot i, which is
    another token once the list has members that never entered the cache.

Positions are those of the sets in every cell; with `last only` they are what a model counts by itself.
Shapes: C cells, P prefix, q tokens fed in a pass, N cached slots, L layers, H heads, V vocabulary.
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


class Cell(NamedTuple):
    """One combination of the artefacts of cache and mask."""

    cache: str
    mask: str


CELLS = tuple(Cell(*levels) for levels in product(CACHES, MASKS))
CORRECT = Cell("all siblings", "delivered")


class Pass(NamedTuple):
    """What a cell gives in one pass. Of the prefix only its last token is kept."""

    logits: np.ndarray  # [q, V] float32
    attention: np.ndarray  # [L, H, q, N] float32
    slots: list[int]  # of the q tokens

    @property
    def num_cached(self) -> int:
        """N, the slots in the cache once the pass is made."""
        return self.attention.shape[-1]


@torch.inference_mode()
def run_cells(
    lm: LanguageModel, prefix: Sequence[int], sets: Sequence[Sequence[int]], mode: str
) -> dict[Cell, list[Pass]]:
    """The passes of every cell in one mode, `isolated` or `visible`: first the prefix, then each of `sets`.

    The masks of one cache share their passes as rows of a batch. The two modes never share one: made in the same shapes and
    order, what is computed alike in both comes out equal to the last bit. Raises ModelError where a sliding window would matter.
    """
    windows = [window for window in lm.layer_windows if window]
    if windows and len(prefix) + len(sets) > min(windows):
        raise ModelError(
            f"a window of {min(windows)} positions cuts a text of {len(prefix) + len(sets)}; the replica has no windows"
        )
    with installed(lm.model, "eager"):
        cache_of_prefix = DynamicCache()
        causal = torch.ones(len(prefix), len(prefix), dtype=torch.bool).tril()
        # neither artefact can act before there is a sibling, so both caches begin with this one pass
        before = _forward(
            lm, cache_of_prefix, prefix, range(len(prefix)), [causal] * len(MASKS), keep=1
        )
        found = {cell: [before[MASKS.index(cell.mask)]] for cell in CELLS}
        for kind in CACHES:
            cache = copy.deepcopy(cache_of_prefix)
            cached, listed = (
                list(range(len(prefix))),
                list(range(len(prefix))),
            )  # the set that each slot, each token belongs to
            for k, members in enumerate(sets, start=len(prefix)):
                fed = members if kind == "all siblings" else members[-1:]
                new = slice(len(cached), len(cached) + len(fed))
                cached, listed = cached + [k] * len(fed), listed + [k] * len(members)
                masks = {
                    "delivered": _allowed(cached, mode)[new],
                    "dropped": torch.ones(len(cached), len(cached), dtype=torch.bool).tril()[new],
                    "by list index": _allowed(listed, mode)[new, : len(cached)],
                }
                passes = _forward(
                    lm, cache, fed, [k] * len(fed), [masks[name] for name in MASKS], keep=len(fed)
                )
                for name, made in zip(MASKS, passes, strict=True):
                    found[Cell(kind, name)].append(made)
    return found


def reported_score(seen: Pass, siblings: Sequence[int]) -> float:
    """The attention "between parallel tokens" as the earlier code came to it: 0.0 if the pass has no such pair.

    Mean over layers, heads and all pairs of two slots in `siblings` of which one is a query of the pass and the other a key.
    """
    pairs = [
        seen.attention[:, :, query, key]
        for query, slot in enumerate(seen.slots)
        for key in siblings
        if slot in siblings and key != slot and key < seen.num_cached
    ]
    return float(np.mean(pairs)) if pairs else 0.0


def _allowed(sets: Sequence[int], mode: str) -> Tensor:
    """Who may attend to whom, bool [n, n], of tokens that belong to `sets`."""
    query, key = torch.tensor(sets)[:, None], torch.tensor(sets)[None, :]
    itself = torch.eye(len(sets), dtype=torch.bool)
    return (key <= query) if mode == "visible" else (key < query) | itself


def _forward(
    lm: LanguageModel,
    cache: Any,
    tokens: Sequence[int],
    positions: Sequence[int],
    masks: Sequence[Tensor],
    keep: int,
) -> list[Pass]:
    """The same tokens under each mask [q, N], a row of the batch each; the last `keep` of them are recorded."""
    allowed = torch.stack(list(masks))[:, None]  # [C, 1, q, N]
    output = lm.model(
        input_ids=torch.tensor([list(tokens)] * len(masks), device=lm.device),
        position_ids=torch.tensor([list(positions)] * len(masks), device=lm.device),
        attention_mask=torch.zeros(allowed.shape, dtype=lm.dtype)
        .masked_fill(~allowed, -torch.inf)
        .to(lm.device),
        use_cache=True,
        output_attentions=True,
        logits_to_keep=keep,
        **{lm.cache_keyword: cache},
    )
    logits = output.logits.float().cpu().numpy()  # [C, keep, V]
    attention = torch.stack(
        [layer[:, :, -keep:].float().cpu() for layer in output.attentions], dim=1
    ).numpy()  # [C, L, H, keep, N]
    slots = list(range(attention.shape[-1] - keep, attention.shape[-1]))
    return [Pass(logits[row], attention[row], slots) for row in range(len(masks))]
