"""What the plain model predicts after texts: transformers' own passes, and nothing of TEMPO.

A measurement asks with `read`. All that is asked for at once shares passes. In a window of prompts
each distinct beginning of a text is read once. A token attends to the text that leads to it, and
stands where it stands in its text (SpecInfer, arXiv 2305.09781, definition 4.1).

Shapes: T tokens of a pass, U tokens read before that it attends to, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from tempo.errors import SpecError
from tempo.models import LanguageModel

R = TypeVar("R")
# A pass takes at most so many tokens, and so many pairs of a token and one that it might see. From
# a few hundred tokens on, a pass costs no less for each. Pairs of different texts are for nothing.
MOST_TOKENS, MOST_PAIRS = 512, 2**18
# Bytes: keys and values are dropped before a reading if they take more, logits after it. They are
# then computed again if they are asked for.
MOST_KEYS, MOST_LOGITS = 2**30, 2**28


class ReadRequest(NamedTuple):
    """Texts that a measurement wants to be read: `prefix` and each of `paths`, as token ids."""

    prefix: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]


def read(prefix: Iterable[int], paths: Iterable[Sequence[int]]) -> ReadRequest:
    """A request for what comes after texts of one beginning.

    Yielded by a measurement, `logits = yield read(prefix, paths)`: those of the last token of each
    text, float32 [paths, V]. The empty path is the prefix alone.

    >>> read([3, 14], [(), (15,)])
    ReadRequest(prefix=(3, 14), paths=((), (15,)))
    """
    return ReadRequest(tuple(prefix), tuple(map(tuple, paths)))


def check_fits(lm: LanguageModel, longest: int) -> None:
    """Raise SpecError for texts that outgrow a sliding window, which a ready-made mask bypasses."""
    if any(window and longest > window for window in lm.layer_windows):
        raise SpecError(
            f"texts of {longest} tokens do not fit the sliding window of {lm.name}; "
            "shorten the prompt"
        )


def now(lm: LanguageModel, steps: Generator[Any, Any, R]) -> R:
    """What steps return that ask for nothing but texts, read as they are asked for."""
    texts, logits = Texts(lm), None
    while True:
        try:
            request = steps.send(logits)
        except StopIteration as stop:
            return stop.value
        (logits,) = texts.read([request])


class Texts:
    """The texts that a model has read so far, as a tree in which each token is read once."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self._forget()

    def _forget(self) -> None:
        # A token is known by its slot. `parents` holds the slot of the token before it, -1 for the
        # first one of a text.
        self.slots: dict[tuple[int, int], int] = {}
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.num_read = 0
        self.held: dict[int, list[Tensor]] = {}  # keys and values [1, Hkv, C, D] of each layer
        self.logits: dict[int, Tensor] = {}  # [V], by slot

    @torch.inference_mode()
    def read(self, requests: Sequence[ReadRequest]) -> list[Tensor]:
        """The logits after each text of each request, float32 [paths, V]."""
        if sum(held.nbytes for layer in self.held.values() for held in layer) > MOST_KEYS:
            self._forget()
        asked = []
        for prefix, paths in requests:
            begin = self._slot_of(-1, prefix)
            asked.append([self._slot_of(begin, path) for path in paths])
        wanted = {slot for slots in asked for slot in slots if slot not in self.logits}
        waiting = sorted(slot for slot in wanted if slot < self.num_read)
        waiting += range(self.num_read, len(self.tokens))
        while waiting:
            waiting = waiting[self._pass(waiting, wanted) :]
        found = [torch.stack([self.logits[slot] for slot in slots]) for slots in asked]
        size = 4 * self.lm.vocab_size
        for slot in list(self.logits)[: max(0, len(self.logits) - MOST_LOGITS // size)]:
            del self.logits[slot]
        return found

    def _slot_of(self, slot: int, tokens: Sequence[int]) -> int:
        """The slot of the last of the tokens, read after the text that ends at `slot`."""
        for token in tokens:
            known = self.slots.get((slot, token))
            if known is None:
                known = self.slots[slot, token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(slot)
            slot = known
        return slot

    def _before(self, slot: int) -> list[int]:
        """The slots of the text before a token."""
        found = []
        while (slot := self.parents[slot]) >= 0:
            found.append(slot)
        return found

    def _pass(self, waiting: Sequence[int], wanted: set[int]) -> int:
        """Read as many of the waiting tokens as a pass takes; how many these are.

        A token that was read before is read again for its logits alone.
        """
        taken, texts, used = [], [], {}  # used: column of each token read before
        for slot in waiting[:MOST_TOKENS]:
            before = self._before(slot)
            more = [each for each in before if each < self.num_read and each not in used]
            num_tokens = len(taken) + 1
            if taken and num_tokens * (len(used) + len(more) + num_tokens) > MOST_PAIRS:
                break
            used |= {each: len(used) + i for i, each in enumerate(more)}
            taken.append(slot)
            texts.append(before)
        num_again = sum(slot < self.num_read for slot in taken)
        columns = used | {
            slot: len(used) + i for i, slot in enumerate(taken) if slot >= self.num_read
        }
        allowed = torch.zeros(len(taken), len(used) + len(taken), dtype=torch.bool)
        for row, before in enumerate(texts):
            allowed[row, [columns[slot] for slot in before]] = True
            allowed[row, len(used) + row] = True
        self._forward(taken, [len(before) for before in texts], list(used), allowed, wanted)
        self.num_read += len(taken) - num_again
        return len(taken)

    def _forward(
        self,
        taken: Sequence[int],
        positions: Sequence[int],
        used: Sequence[int],
        allowed: Tensor,  # bool [T, U + T]
        wanted: set[int],
    ) -> None:
        lm = self.lm
        # without the config every layer keeps all slots, whatever its window is
        cache: Any = DynamicCache()
        if used:
            columns = torch.tensor(used, device=lm.device)
            for layer, held in self.held.items():
                cache.update(*(states.index_select(2, columns) for states in held), layer)
        read = [i for i, slot in enumerate(taken) if slot in wanted]
        mask = torch.zeros(allowed.shape, dtype=lm.dtype)
        mask = mask.masked_fill(~allowed, torch.finfo(lm.dtype).min)
        output = lm.model(
            input_ids=torch.tensor([[self.tokens[slot] for slot in taken]], device=lm.device),
            position_ids=torch.tensor([list(positions)], device=lm.device),
            attention_mask=mask[None, None].to(lm.device),
            logits_to_keep=torch.tensor(read, device=lm.device, dtype=torch.long),
            use_cache=True,
            **{lm.cache_keyword: cache},
        )
        for i, logits in zip(read, output.logits[0].float().cpu(), strict=True):
            self.logits[taken[i]] = logits.clone()  # a view would hold those of the whole pass
        first = next((i for i, slot in enumerate(taken) if slot >= self.num_read), None)
        if first is None:
            return
        for layer, states in enumerate(cache.layers):
            if states.keys is not None:
                new = [each[:, :, len(used) + first :] for each in (states.keys, states.values)]
                self._keep(layer, new)

    def _keep(self, layer: int, new: Sequence[Tensor]) -> None:
        """Write keys and values [1, Hkv, T, D] of new tokens behind those of the others."""
        end = self.num_read + new[0].shape[2]
        held = self.held.get(layer) or [states[:, :, :0] for states in new]
        for i, states in enumerate(new):
            if held[i].shape[2] < end:
                larger = states.new_zeros(*states.shape[:2], 2 * end, states.shape[3])
                larger[:, :, : self.num_read] = held[i][:, :, : self.num_read]
                held[i] = larger
            held[i][:, :, self.num_read : end] = states
        self.held[layer] = held
