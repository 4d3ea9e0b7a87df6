"""What a reader makes of a run: paths through its lattice scored by the plain model, facts to find again, n-grams.

The search is transformers' ordinary forward pass with an ordinary cache: nothing here is TEMPO's but the sets it reads.
Shapes: B beams of all searches, V vocabulary, P prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from tempo import LanguageModel

Sets = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Search:
    """A beam search of this width: over the whole vocabulary, or at step k over the members of `sets[k]` alone.

    Width 1 without sets is greedy decoding; sets of one token each have one path, and the search only scores it.
    """

    num_beams: int = 1
    sets: Sets | None = None


class Path(NamedTuple):
    """Tokens after the prompt and their log probability under the plain model, in nats."""

    tokens: tuple[int, ...]
    log_probability: float

    @property
    def nll(self) -> float:
        """Negative log probability per token, in nats."""
        return -self.log_probability / len(self.tokens)


def search(
    lm: LanguageModel, prompt: Sequence[int], searches: Sequence[Search], num_steps: int
) -> list[list[Path]]:
    """The final beams of each search, best first: continuations of `prompt` by `num_steps` tokens of the plain model.

    All searches share one pass a step, in which each distinct beginning is a row. End-of-sequence tokens are tokens as any
    other, so that all paths have the same length and their sums need no length penalty.
    """
    cache = DynamicCache(config=lm.model.config)
    beams = [[Path((), 0.0)] for _ in searches]
    rows: dict[tuple[int, ...], int] = {
        (): 0
    }  # of the pass, by what each continues the prompt with
    with torch.inference_mode():
        scores = _log_probabilities(lm, cache, [list(prompt)])  # [B, V]
        for step in range(num_steps):
            if step:
                last = rows
                rows = {
                    tokens: row
                    for row, tokens in enumerate(
                        {beam.tokens: None for found in beams for beam in found}
                    )
                }
                cache.reorder_cache(
                    torch.tensor([last[tokens[:-1]] for tokens in rows], device=lm.device)
                )
                scores = _log_probabilities(lm, cache, [[tokens[-1]] for tokens in rows])
            for s, wanted in enumerate(searches):
                of_beams = scores[[rows[beam.tokens] for beam in beams[s]]]
                beams[s] = _extend(
                    beams[s], of_beams, wanted.sets[step] if wanted.sets else None, wanted.num_beams
                )
    return beams


def _log_probabilities(
    lm: LanguageModel, cache: DynamicCache, tokens: list[list[int]]
) -> torch.Tensor:
    """log p of what comes after the last of the new `tokens` of each row, float32 [B, V]."""
    ids = torch.tensor(tokens, device=lm.device)
    logits = lm.model(
        input_ids=ids, use_cache=True, logits_to_keep=1, **{lm.cache_keyword: cache}
    ).logits[:, -1]
    return logits.float().log_softmax(dim=-1)


def _extend(
    beams: Sequence[Path], scores: torch.Tensor, allowed: Sequence[int] | None, num_beams: int
) -> list[Path]:
    """The best `num_beams` extensions of `beams` by one of the `allowed` tokens (None: any), given `scores` [B, V]."""
    if allowed is None:
        best, tokens = scores.topk(num_beams)  # of one beam, no more can be among the best of all
    else:
        tokens = torch.tensor([list(allowed)] * len(beams), device=scores.device)
        best = scores.gather(1, tokens)
    longer = [
        Path((*beam.tokens, token), beam.log_probability + value)
        for beam, ids, values in zip(beams, tokens.tolist(), best.tolist(), strict=True)
        for token, value in zip(ids, values, strict=True)
    ]
    return sorted(longer, key=lambda path: -path.log_probability)[:num_beams]


def bigrams(paths: Sequence[Sequence[int]]) -> set[tuple[int, int]]:
    """The distinct pairs of consecutive tokens in any of `paths`."""
    return {pair for path in paths for pair in pairwise(path)}


def coverage(wanted: set[tuple[int, int]], sets: Sets) -> float:
    """The share of the bigrams `wanted` whose tokens are members of consecutive `sets`, wherever these stand."""
    held = {(a, b) for first, second in pairwise(sets) for a in first for b in second}
    return len(wanted & held) / len(wanted)


def parted_at(one: Sets, other: Sets) -> int | None:
    """The first step at which two runs of equal length have different sets (of whatever order), None if there is none."""
    return next(
        (k for k, (a, b) in enumerate(zip(one, other, strict=True)) if set(a) != set(b)), None
    )


NAMES = ("Clara", "Peter", "Maria", "David", "Laura", "Simon", "Helen", "Frank", "Alice", "James")
# What is said of somebody, how the text ends by asking for it, and what it may be: words of one token in most vocabularies.
KINDS = (
    (
        "{} lives in {}.",
        "{} lives in",
        ("Paris", "London", "Boston", "Tokyo", "Berlin", "Rome", "Chicago", "Moscow"),
    ),
    (
        "{} drives a {} car.",
        "{} drives a",
        ("blue", "green", "red", "white", "black", "yellow", "brown", "silver"),
    ),
    (
        "{} owns {} horses.",
        "{} owns",
        ("two", "three", "four", "five", "six", "seven", "eight", "nine"),
    ),
    (
        "{} wants a {}.",
        "{} wants a",
        ("cat", "dog", "goat", "parrot", "rabbit", "snake", "fish", "monkey"),
    ),
)


@dataclass(frozen=True)
class Facts:
    """One fact of each kind, about different people: stated before a prompt, asked for after it."""

    people: tuple[str, ...]
    answers: tuple[str, ...]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Facts:
        people = rng.choice(NAMES, size=len(KINDS), replace=False)
        return cls(
            tuple(map(str, people)), tuple(str(rng.choice(values)) for _, _, values in KINDS)
        )

    def before(self, prompt: str) -> str:
        """The prompt with the facts stated before it."""
        stated = [
            said.format(who, what)
            for (said, _, _), who, what in zip(KINDS, self.people, self.answers, strict=True)
        ]
        return " ".join(stated) + "\n\n" + prompt

    def questions(self, lm: LanguageModel) -> tuple[list[int], list[int]]:
        """The tokens of the facts told anew, in reverse order, and where in them the answers begin.

        One forced continuation asks for all facts: what is read is the prediction of the first token of each answer.
        """
        tokens, answers_at = [], []
        for i in reversed(range(len(KINDS))):
            said, begun, _ = KINDS[i]
            question, whole = (
                begun.format(self.people[i]),
                said.format(self.people[i], self.answers[i]),
            )
            start = "\n\n" if not tokens else " "
            tokens += _plain_tokens(lm, start + question)
            answers_at.append(len(tokens))
            tokens += _plain_tokens(lm, whole.removeprefix(question))
        return tokens, answers_at


def _plain_tokens(lm: LanguageModel, text: str) -> list[int]:
    """The token ids of a piece of text within a text: without the special tokens that begin one."""
    assert lm.tokenizer is not None
    return list(lm.tokenizer(text, add_special_tokens=False).input_ids)
