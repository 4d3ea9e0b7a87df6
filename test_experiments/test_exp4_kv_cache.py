"""exp4: do siblings share one rotary position, are all in the cache, does the next query see them?

Positions are recovered from the cached keys by un-rotating them against the keys before rotation.
They are never read back from the engine's bookkeeping. The negative control is a run with
sequential positions, which must fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

import tempo
from fixtures.floors import rounding
from fixtures.raw import keep_log, keep_table, slot_arrays, slot_labels
from fixtures.rows import attention_of, cached, own_block
from tempo import LanguageModel, Trace
from tempo.harness import Prompt, Steps, Store, Study, run, wide_steps
from tempo.metrics import RecoveredPositions, recover_positions
from tempo.reporting.figures import Picture, key_similarity, position_map

# cos and sin of a float32 angle are off by eps times the angle, so keys at position 50 fit to about
# 1e-5. How far the nearest wrong position misses depends on how much of a key turns fast (1e-1 in
# SmolLM2, 4e-3 for Gemma 3's first token), so it is judged against the fit itself.
FIT, TIMES_WORSE = 1e-3, 100
CACHED = ("keys", "values", "raw_keys")

study = Study("exp4", title="KV cache", captures=("kv", "attention"), registered="2026-11-23")


@dataclass(frozen=True)
class Case:
    """What one prompt gives."""

    branched: bool  # some set is wide
    positions_match: dict[str, bool]  # by which positions the run had
    siblings_share: dict[str, bool]
    worst_fit: dict[str, float]  # of cached keys to the raw keys of their own slot, or another
    best_runner_up: float  # of a cached key at any other position
    num_slots: dict[str, int]
    mode_difference: list[float]  # largest of keys and values between the modes, by layer
    unreached: dict[str, int]  # slots that get no weight from a set: before it, and its siblings
    oracle_difference: float | None  # of the own prompt

    def if_branched(self, holds: bool) -> bool | None:
        """What holds, or None of a prompt without siblings, which can say nothing about them."""
        return holds if self.branched else None


@study.measure
def three_caches(prompt: Prompt) -> Steps[Case]:
    """Isolated mode chooses; both modes and isolated mode in sequence replay the sets."""
    source = yield run(prompt, capture=())
    isolated, visible, sequential = yield [
        run(prompt, replay=source, visibility="isolated"),
        run(prompt, replay=source, visibility="visible"),
        run(prompt, replay=source, positions="sequential", capture=("kv",)),
    ]
    num_prompt, widths, wide = len(source.prompt_tokens), source.widths, wide_steps(source)
    # what the positions must be, from the sets alone: P + k for every member of set k
    expected = np.repeat(np.arange(num_prompt + len(widths)), [1] * num_prompt + widths)
    found = {"shared": _recover(prompt, isolated), "sequential": _recover(prompt, sequential)}
    fit, fit_of_other = found["shared"], _recover(prompt, isolated, shift=1)
    starts = [step.slots[0] for step in isolated.steps]
    windows = prompt.lm.layer_windows
    farthest = None if None in windows else max(filter(None, windows))
    before = []
    for k, start in enumerate(starts):
        far = isolated.steps[k].position - isolated.slot_position[:start]
        in_reach = far < (farthest or np.inf)  # of the layer that sees farthest
        before.append(attention_of(isolated, k)[..., :start][..., in_reach])
    siblings = [own_block(isolated, k) * (1 - np.eye(widths[k])) for k in wide]
    oracle = None
    if prompt.store:
        _keep(prompt, fit, expected, isolated, visible)
        exact = tempo.reference.generate(prompt.lm, **isolated.spec.model_dump())
        # the oracle finds keys before rotation only where a projection of their own gives them
        names = CACHED if exact.raw_keys is not None else CACHED[:2]
        oracle = float(_differences(isolated, exact, names).max())
    return Case(
        branched=bool(wide),
        positions_match={name: bool((f.position == expected).all()) for name, f in found.items()},
        siblings_share={name: _share(f, source) for name, f in found.items()},
        worst_fit={"own": fit.residual.max(), "other": fit_of_other.residual.max()},
        best_runner_up=fit.runner_up.min(),
        num_slots={
            "cached": cached(isolated, "keys").shape[2],
            "one a step": num_prompt + len(widths),
            "expected": num_prompt + sum(widths),
        },
        mode_difference=_differences(isolated, visible, ("keys", "values")).tolist(),
        unreached={"before": _unreached(before), "siblings": _unreached(siblings)},
        oracle_difference=oracle,
    )


def _recover(prompt: Prompt, trace: Trace, shift: int = 0) -> RecoveredPositions:
    """Positions from the cache; `shift`: from another slot's raw keys, which no rotation fits."""
    keys, raw = cached(trace, "keys"), np.roll(cached(trace, "raw_keys"), shift, axis=2)
    frequencies, interleaved, scales = zip(*prompt.lm.rotations, strict=True)
    return recover_positions(keys, raw, frequencies, trace.num_slots + 2, interleaved, scales)


def _share(found: RecoveredPositions, trace: Trace) -> bool:
    """Whether the members of every set have one recovered position."""
    return all(np.ptp(found.position[step.slots]) == 0 for step in trace.steps)


def _differences(one: Trace, other: Trace, names: Sequence[str]) -> np.ndarray:
    """The largest difference between two caches for each layer [L]."""
    found = [np.abs(cached(one, name) - cached(other, name)) for name in names]
    return np.max([difference.max(axis=(1, 2, 3)) for difference in found], axis=0)


def _unreached(weights: Sequence[np.ndarray]) -> int:
    """How many slots get no weight at all, in any layer or head, from any member of a set."""
    return sum(int((of_set.max(axis=(0, 1, 2)) == 0).sum()) for of_set in weights)


def _keep(
    prompt: Prompt, found: RecoveredPositions, expected: np.ndarray, isolated: Trace, visible: Trace
) -> None:
    store, labels = prompt.store, slot_labels(prompt.lm, isolated)
    assert store is not None
    keep_log(store, isolated)
    arrays = slot_arrays(isolated)
    for trace in (isolated, visible):
        arrays |= {f"{trace.spec.visibility}_{name}": cached(trace, name) for name in CACHED}
    store.arrays("kv_cache_states", **arrays)
    names: list[str] = ["slot", "text", "step", "recovered", "expected", "residual", "runner_up"]
    slots, fit = range(isolated.num_slots), (found.residual, found.runner_up)
    columns = (slots, labels, isolated.slot_step, found.position, expected, *fit)
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    store.json("rope_positions", {"physical_to_logical": rows})
    keep_table(store, "positions of slots, recovered from the cached keys", rows, names)


@study.claim(always=True)
def test_positions_are_p_plus_k(case: Case) -> bool:
    """Every slot of set k sits at rotary position P + k.

    All positions recovered from cached keys equal P + k.
    """
    return case.positions_match["shared"]


@test_positions_are_p_plus_k.control
def sequential_positions(case: Case) -> bool | None:
    """a run of the same sets with sequential positions"""
    return case.if_branched(case.positions_match["sequential"])


@study.claim(always=True)
def test_no_other_position_fits(case: Case) -> bool:
    """No other position explains a cached key as well.

    Worst residual at the recovered position below 1e-3, and the best at any other over 100 times
    that.
    """
    worst = case.worst_fit["own"]
    return worst < FIT and case.best_runner_up > TIMES_WORSE * worst


@test_no_other_position_fits.control
def raw_keys_of_another_slot(case: Case) -> bool:
    """cached keys against the raw keys of the neighbouring slot"""
    return case.worst_fit["other"] < FIT


@study.claim(always=True, control="sequential")
def test_siblings_share_a_position(case: Case, positions: str = "shared") -> bool | None:
    """All siblings of a set share one rotary position.

    One recovered position for each wide set.
    Control: a run of the same sets with sequential positions.
    """
    return case.if_branched(case.siblings_share[positions])


@study.claim(always=True, control="one a step")
def test_every_sibling_is_cached(case: Case, kept: str = "cached") -> bool | None:
    """The cache holds every sibling: P plus the sum of all widths.

    Slots in the cached arrays equal P + sum of widths.
    Control: one slot a step, as the earlier implementation kept.
    """
    return case.if_branched(case.num_slots[kept] == case.num_slots["expected"])


@study.claim(always=True, control=-1)
def test_first_layer_is_the_same(case: Case, layer: int = 0) -> bool | None:
    """First-layer keys and values are bitwise equal in both modes; later layers see siblings.

    Largest difference in layer 1 is exactly 0.
    Control: the same in the last layer.
    """
    return case.if_branched(case.mode_difference[layer] == 0.0)


@study.claim(always=True)
def test_next_query_reaches_every_slot(case: Case) -> bool:
    """The next set's queries reach every slot before them.

    Slots that get no weight in any layer or head; where all layers have a sliding window, those
    within the longest one.
    """
    return case.unreached["before"] == 0


@test_next_query_reaches_every_slot.control
def isolated_siblings(case: Case) -> bool | None:
    """isolated siblings of the same set, which must not be reached"""
    return case.if_branched(case.unreached["siblings"] == 0)


@study.pictures
def pictures(store: Store, cases: Sequence[Case]) -> Iterator[Picture]:
    """Which logical position each slot has, as recovered, and what it does to the cached keys."""
    rows = store.load_json("rope_positions")["physical_to_logical"]
    arrays = store.load("kv_cache_states")
    recovered, texts = [row["recovered"] for row in rows], [row["text"] for row in rows]
    slots, expected = [row["slot"] for row in rows], [row["expected"] for row in rows]
    yield position_map(slots, recovered, expected, texts)
    yield key_similarity(arrays["isolated_keys"], arrays["isolated_raw_keys"], recovered, texts)


def test_cache_equals_brute_force(own_case: Case, lm: LanguageModel) -> None:
    """Keys and values are those of one full forward pass without a cache, up to rounding."""
    assert own_case.oracle_difference is not None
    assert own_case.oracle_difference < rounding("kv", lm.provenance()["dtype"])


def test_raw_positions_are_on_disk(store: Store) -> None:
    """rope_positions.json and kv_cache_states.npz agree on how many slots there are."""
    rows = store.load_json("rope_positions")["physical_to_logical"]
    arrays = store.load("kv_cache_states")
    assert len(rows) == arrays["isolated_keys"].shape[2] == len(arrays["slot_token"])
