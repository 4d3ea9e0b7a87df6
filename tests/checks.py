"""What the exactness checks share: their case, how they run it, and how they compare two results.

Shapes: L layers, H query heads, w set width, N slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import ArrayLike

import tempo
from tempo import LanguageModel, Trace
from tempo.spec import CAPTURES
from tempo.trace import STEP_ARRAYS
from tests import tempo64
from tests.tiny_models import exact

EVERYTHING = CAPTURES
# float32 on the models of tiny_models.py, which have up to 4 layers and logits up to about 7.
# The largest differences seen in 120 drawn cases of each check are 1.6e-5, 1.2e-6, 2.9e-6, 1.5e-5.
# These bounds are six to nine times as large.
LOGITS, PROBABILITIES, WEIGHTS, STATES = 1e-4, 1e-5, 2e-5, 1e-4
# The float64 reference against itself: twenty times the largest difference seen (5e-15).
EXACT = 1e-13


class Violation(AssertionError):
    """A check does not hold; `excess` is how many times its bound the difference is."""

    def __init__(self, message: str, excess: float = np.inf) -> None:
        super().__init__(message)
        self.excess = excess


@dataclass(frozen=True)
class Case:
    """One run to check: the sets to force on a prompt, and the settings of the run.

    At least one set is wider than one, and another set follows it. `pick` decides whatever else a
    check has to choose.
    """

    prompt: tuple[int, ...]
    sets: tuple[tuple[int, ...], ...]
    visibility: str = "isolated"
    positions: str = "shared"
    readout: str = "mixture"
    weighting: str = "none"
    pick: int = 0

    @property
    def settings(self) -> dict[str, str]:
        """The settings of the run by name."""
        names = ("visibility", "positions", "readout", "weighting")
        return {name: getattr(self, name) for name in names}

    @property
    def first_wide(self) -> int:
        """The step of the first set wider than one."""
        return next(k for k, members in enumerate(self.sets) if len(members) > 1)


def expect(condition: bool, message: str) -> None:
    """Raise a Violation with this message unless the condition holds."""
    if not condition:
        raise Violation(message)


def near(found: ArrayLike, expected: ArrayLike, bound: float, what: str) -> None:
    """Raise a Violation unless two arrays have one shape and differ by no more than the bound."""
    one, other = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    expect(one.shape == other.shape, f"{what}: shape {one.shape}, expected {other.shape}")
    gap = float(np.abs(one - other).max(initial=0.0))
    if not gap <= bound:
        raise Violation(f"{what}: off by {gap:.2g}, expected at most {bound:.0e}", gap / bound)


def same(found: Any, expected: Any, what: str) -> None:
    """Raise a Violation unless two arrays (or lists) are equal to the last bit."""
    one, other = np.asarray(found), np.asarray(expected)
    expect(one.shape == other.shape, f"{what}: shape {one.shape}, expected {other.shape}")
    unequal = int((one != other).sum())
    differ = f"{unequal} of {one.size} entries differ"
    expect(unequal == 0, f"{what}: {differ}, expected equality to the bit")


BOUNDS = {
    "probabilities": PROBABILITIES,
    "distribution": PROBABILITIES,
    "logits": LOGITS,
    "attention": WEIGHTS,
    "siblings": WEIGHTS,
    "links": PROBABILITIES,
}


def same_runs(found: Trace, expected: Trace, what: str, *, rounded: bool = False) -> None:
    """Raise a Violation unless two runs chose and recorded the same.

    They must be the same to the last bit, or, if `rounded`, to rounding.
    """

    def check(name: str, one: Any, other: Any, where: str = "") -> None:
        if one is None and other is None:
            return
        if rounded and not name.startswith("slot_"):
            near(one, other, BOUNDS.get(name, STATES), f"{what}: {name}{where}")
        else:
            same(one, other, f"{what}: {name}{where}")

    expect(found.sets == expected.sets, f"{what}: sets {found.sets}, expected {expected.sets}")
    for k, (one, other) in enumerate(zip(found.steps, expected.steps, strict=True)):
        for name in ("probabilities", *STEP_ARRAYS):
            check(name, getattr(one, name), getattr(other, name), f" of step {k}")
        gone, expected_gone = one.dropped, other.dropped
        expect(gone == expected_gone, f"{what}: step {k} drops {gone}, expected {expected_gone}")
    for name in ("slot_token", "slot_position", "slot_step", "keys", "values", "raw_keys"):
        check(name, getattr(found, name), getattr(expected, name))


def forced(lm: LanguageModel, case: Case, **changes: Any) -> Trace:
    """The case's sets replayed under its settings, with `changes`; everything is captured."""
    return forced_each(lm, case, [changes])[0]


def forced_each(lm: LanguageModel, case: Case, changes: Sequence[dict[str, Any]]) -> list[Trace]:
    """Several variants of the case's run, one after another.

    In one batch they would share the passes that are to be compared.
    """
    common = {"prompt": case.prompt, "replay": case.sets, "capture": EVERYTHING, **case.settings}
    return [tempo.generate_batch(lm, [tempo.RunSpec(**common | change)])[0] for change in changes]


def replayed64(lm: LanguageModel, case: Case, **changes: Any) -> tempo64.Replayed:
    """The same replay in float64, from the definition."""
    window = getattr(lm.model.config, "sliding_window", None)
    settings = {"sets": case.sets, "window": window, **case.settings} | changes
    return tempo64.replay(exact(lm), case.prompt, **settings)


def logits(run: Trace, k: int) -> np.ndarray:
    """The logits that each member of set k gave, [w, V]."""
    step = run.steps[k]
    assert step.logits is not None
    members, rows = len(step.tokens), len(step.logits)
    expect(rows == members, f"set {k} has {members} members and logits of {rows}")
    return step.logits


def attention(run: Trace, k: int) -> np.ndarray:
    """The attention of set k, [L, H, w, N_k], with N_k as the definition has it."""
    weights, width = run.steps[k].attention, len(run.steps[k].tokens)
    assert weights is not None
    shape, expected = weights.shape[2:], (width, len(run.prompt_tokens) + sum(run.widths[: k + 1]))
    expect(
        shape == expected,
        f"attention of set {k}: {shape} queries and slots, expected {expected}",
    )
    return weights


@torch.inference_mode()
def plain(lm: LanguageModel, texts: Sequence[Sequence[int]], first_position: int = 0) -> np.ndarray:
    """The logits of the next token, [texts, V], that transformers gives to texts of one length."""
    tokens = torch.tensor([list(text) for text in texts])
    positions = torch.arange(first_position, first_position + tokens.shape[1]).expand_as(tokens)
    return lm.model(tokens, position_ids=positions).logits[:, -1].double().numpy()


@contextmanager
def violated(by: float = 1.0) -> Iterator[None]:
    """Within the block a check must fail and miss its bound by more than this factor."""
    with pytest.raises(Violation) as caught:
        yield
    assert caught.value.excess > by, f"{caught.value}: that is no more than {by:g} times the bound"


def lets_in(
    distribution: np.ndarray,
    threshold: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> list[int]:
    """The tokens that docs/semantics.md lets into a set, each rule by itself and in plain Python.

    They come by rank: falling probability, ties by lower token id.
    """
    values = distribution.tolist()
    ranked = sorted(range(len(values)), key=lambda token: (-values[token], token))
    admitted = [token for token in ranked if values[token] > 0]
    admitted = [token for token in admitted if values[token] >= threshold]
    if min_p is not None:
        least = min_p * values[ranked[0]]
        admitted = [token for token in admitted if values[token] >= least]
    if top_k is not None:
        admitted = [token for token in admitted if token in ranked[:top_k]]
    if top_p is not None:
        nucleus, mass = [], 0.0
        for token in ranked:
            if mass >= top_p:
                break
            nucleus.append(token)
            mass += values[token]
        admitted = [token for token in admitted if token in nucleus]
    return admitted or ranked[:1]
