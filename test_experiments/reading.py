"""What a reader makes of a run: texts scored by the plain model, facts to find again, bigrams.

The search is by transformers' own passes. Nothing here is TEMPO's but the sets that it
reads. V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import torch

from tempo import LanguageModel
from tempo.harness import Steps, read
from tempo.harness.texts import check_fits

Sets = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Search:
    """A beam search over the whole vocabulary, or at step k over the members of `sets[k]` alone.

    Width 1 without sets is greedy decoding. Sets of one token each have one path, which is scored.
    """

    num_beams: int = 1
    sets: Sets | None = None


class Beam(NamedTuple):
    """Tokens after the prompt and their log probability under the plain model, in nats."""

    tokens: tuple[int, ...]
    log_probability: float

    @property
    def nll(self) -> float:
        """Negative log probability per token, in nats."""
        return -self.log_probability / len(self.tokens)


def search(
    lm: LanguageModel, prompt: Sequence[int], searches: Sequence[Search], num_steps: int
) -> Steps[list[list[Beam]]]:
    """The final beams of each search, best first: continuations of `prompt` by `num_steps` tokens.

    All searches read each distinct beginning once. End-of-sequence tokens are tokens as any other.
    So all texts are equally long and need no length penalty. Raises SpecError for texts that
    outgrow a sliding window.
    """
    check_fits(lm, len(prompt) + num_steps)
    beams = [[Beam((), 0.0)] for _ in searches]
    for step in range(num_steps):
        begun = [beam.tokens for found in beams for beam in found]
        rows = {tokens: row for row, tokens in enumerate(dict.fromkeys(begun))}
        logits = yield read(prompt, rows)
        scores = logits.log_softmax(dim=-1)
        for s, wanted in enumerate(searches):
            of_beams = scores[[rows[beam.tokens] for beam in beams[s]]]
            allowed = wanted.sets[step] if wanted.sets else None
            beams[s] = _extend(beams[s], of_beams, allowed, wanted.num_beams)
    return beams


def _extend(
    beams: Sequence[Beam], scores: torch.Tensor, allowed: Sequence[int] | None, num_beams: int
) -> list[Beam]:
    """The best extensions of `beams` by an allowed token (None: any), given scores [beams, V]."""
    if allowed is None:
        best, tokens = scores.topk(num_beams)  # of one beam, no more can be among the best of all
    else:
        tokens = torch.tensor([list(allowed)] * len(beams), device=scores.device)
        best = scores.gather(1, tokens)
    longer = []
    for (text, log), ids, logs in zip(beams, tokens.tolist(), best.tolist(), strict=True):
        longer += [Beam((*text, token), log + more) for token, more in zip(ids, logs, strict=True)]
    return sorted(longer, key=lambda beam: -beam.log_probability)[:num_beams]


def bigrams(texts: Sequence[Sequence[int]]) -> set[tuple[int, int]]:
    """The distinct pairs of consecutive tokens in any of `texts`."""
    return {pair for text in texts for pair in pairwise(text)}


def coverage(wanted: set[tuple[int, int]], sets: Sets) -> float:
    """The share of the bigrams `wanted` whose tokens are members of consecutive sets."""
    held = {pair for first, second in pairwise(sets) for pair in product(first, second)}
    return len(wanted & held) / len(wanted)


def parted_at(one: Sets, other: Sets) -> int | None:
    """The first step at which two runs of equal length have different sets, None if none differ."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((k for k, (a, b) in pairs if set(a) != set(b)), None)


NAMES = ("Clara", "Peter", "Maria", "David", "Laura", "Simon", "Helen", "Frank", "Alice", "James")
# What is said of somebody, how a text ends that asks for it, and what it may be: words of one token
# in most vocabularies.
KINDS = (
    ("{} lives in {}.", "{} lives in", "Paris London Boston Tokyo Berlin Rome Chicago Moscow"),
    ("{} drives a {} car.", "{} drives a", "blue green red white black yellow brown silver"),
    ("{} owns {} horses.", "{} owns", "two three four five six seven eight nine"),
    ("{} wants a {}.", "{} wants a", "cat dog goat parrot rabbit snake fish monkey"),
)


@dataclass(frozen=True)
class Facts:
    """One fact of each kind, about different people: stated before a prompt, asked for after it."""

    people: tuple[str, ...]
    answers: tuple[str, ...]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Facts:
        people = rng.choice(NAMES, size=len(KINDS), replace=False)
        answers = [rng.choice(values.split()) for *_, values in KINDS]
        return cls(tuple(map(str, people)), tuple(map(str, answers)))

    @property
    def stated(self) -> list[str]:
        """One sentence a fact."""
        facts = zip(KINDS, self.people, self.answers, strict=True)
        return [said.format(who, what) for (said, *_), who, what in facts]

    def before(self, prompt: str) -> str:
        """The prompt with the facts stated before it."""
        return " ".join(self.stated) + "\n\n" + prompt

    def questions(self, lm: LanguageModel) -> tuple[list[int], list[int]]:
        """The tokens of the facts told anew, in reverse order, and where in them the answers begin.

        One forced continuation asks for all facts: the first token of each answer is predicted.
        """
        assert lm.tokenizer is not None
        tokens, answers_at = [], []
        for who, (_, begun, _), said in [*zip(self.people, KINDS, self.stated, strict=True)][::-1]:
            question, between = begun.format(who), " " if tokens else "\n\n"
            pieces = [between + question, said.removeprefix(question)]
            # within a text: without the special tokens that begin one
            asked, answer = lm.tokenizer(pieces, add_special_tokens=False).input_ids
            answers_at.append(len(tokens) + len(asked))
            tokens += asked + answer
        return tokens, answers_at
