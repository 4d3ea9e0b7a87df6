"""exp1: do attention patterns differ between isolated and visible siblings, on the same sets?

Every step's weights are those of the pass in which the siblings are the queries. Layers L, heads H,
siblings w, slots N.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fixtures.margins import BFLOAT16_TV
from fixtures.raw import keep_attention, keep_log, lattice, slot_labels
from fixtures.rows import (
    at_most,
    attention_of,
    most_between_siblings,
    rows_are_whole,
    sum_error,
    sum_error_without,
)
from tempo import Trace
from tempo.harness import Planned, Prompt, Steps, Store, Study, average, run, wide_steps
from tempo.metrics import context_distance
from tempo.reporting.figures import Picture, attention_heatmap, layer_head_map

# Float32 softmax rows of some hundred keys sum to one within a few 1e-6. Two of them that should be
# the same differ by as much.
TOLERANCE = 1e-5

study = Study("exp1", title="Attention weights", captures=("attention",), registered="2026-11-23")


@dataclass(frozen=True)
class Case:
    """What one prompt gives; None where no set of it is wide."""

    widths: list[int]
    sum_error: float
    sum_error_without_siblings: float | None
    sibling_weight: dict[str, float | None]  # the largest, by mode
    context_tv: float | None  # between the modes
    context_tv_same_mode: float | None
    context_tv_map: list[list[float]] | None  # [L, H]
    first_set_tv: list[float] | None  # by layer, the largest over heads


@study.measure
def both_modes(prompt: Prompt) -> Steps[Case]:
    """The prompt's free run chooses the sets, both modes replay them."""
    source: Trace = yield run(prompt)
    modes = ("isolated", "visible")
    isolated, visible = yield [run(prompt, replay=source, visibility=mode) for mode in modes]
    again = isolated if source.spec.visibility == "isolated" else visible
    wide = wide_steps(source)
    between = [_context_tv(isolated, visible, k) for k in wide]
    same = [_context_tv(source, again, k) for k in wide]
    if prompt.store:
        keep_attention(prompt.store, isolated, visible)
        keep_log(prompt.store, source)
        slots = [source.steps[k].slots for k in wide]
        labels = slot_labels(prompt.lm, source)
        prompt.store.json("labels", {"labels": labels, "wide": wide, "slots": slots})
    return Case(
        widths=source.widths,
        sum_error=sum_error(isolated, visible),
        sum_error_without_siblings=sum_error_without(visible, wide, siblings=True),
        sibling_weight={
            "isolated": most_between_siblings(isolated, wide),
            "visible": most_between_siblings(visible, wide),
        },
        context_tv=average([float(d.mean()) for d in between]),
        context_tv_same_mode=average([float(d.mean()) for d in same]),
        context_tv_map=np.mean(between, axis=0).round(6).tolist() if wide else None,
        first_set_tv=between[0].max(axis=1).tolist() if wide else None,
    )


def _context_tv(one: Trace, other: Trace, step: int) -> np.ndarray:
    """Total variation [L, H] between two runs' rows of one set over the prior context."""
    start = one.steps[step].slots[0]
    return context_distance(attention_of(one, step), attention_of(other, step), start)


@study.claim(always=True, needs=rows_are_whole)
def test_rows_sum_to_one(case: Case) -> bool | None:
    """Every captured attention row sums to one, in both modes.

    Largest |row sum - 1| over steps, layers, heads and siblings is at most 1e-5.
    """
    return at_most(case.sum_error, TOLERANCE)


@test_rows_sum_to_one.control
def without_siblings(case: Case) -> bool | None:
    """the same rows in visible mode without their siblings' columns"""
    return at_most(case.sum_error_without_siblings, TOLERANCE)


@study.claim(always=True, control="visible")
def test_forbidden_is_zero(case: Case, mode: str = "isolated") -> bool | None:
    """An isolated sibling gives every other sibling a weight of exactly 0.
    Control: the same entries in visible mode.
    """
    return at_most(case.sibling_weight[mode], 0.0)


@study.claim(always=True, control=-1)
def test_first_layer_is_the_same(case: Case, layer: int = 0) -> bool | None:
    """In the first layer of the first wide set, both modes spread attention over the context alike.

    Largest total variation over heads of context-renormalised rows is at most 1e-5.
    Control: the same in the last layer, which siblings have reached.
    """
    return None if case.first_set_tv is None else case.first_set_tv[layer] <= TOLERANCE


SEEN = "half more than the margin; the spread over prompts of the first full run"


@study.claim(more_than=BFLOAT16_TV, planned=Planned(0.03, sd=0.013, source=SEEN))
def test_context_pattern_differs(case: Case) -> float | None:
    """Seeing siblings changes how attention is spread over the prior context.

    Total variation of context-renormalised rows, mean over wide sets, layers and heads.
    """
    return case.context_tv


@test_context_pattern_differs.control
def same_mode_twice(case: Case) -> float | None:
    """the same mode twice, in different batches"""
    return case.context_tv_same_mode


@study.pictures
def pictures(store: Store, cases: Sequence[Case]) -> Iterator[Picture]:
    """The sets and heatmaps of the own prompt, and where over layers and heads the modes differ."""
    yield lattice(store)
    labels = store.load_json("labels")
    if labels["wide"]:
        arrays, k = store.load("attention_weights"), labels["wide"][0]
        for mode in ("isolated", "visible"):
            weights = arrays[f"{mode}_{k:03d}"]
            title = f"Attention of the first wide set, {mode} siblings"
            texts = labels["labels"][: weights.shape[-1]]
            yield attention_heatmap(weights, texts, labels["slots"][0], title=title)
    maps = [case.context_tv_map for case in cases if case.context_tv_map is not None]
    if maps:
        caption = (
            "Total variation between isolated and visible rows over the prior context, mean over "
            f"{len(maps)} prompts. Dark: both modes look at the context alike; bright: seeing "
            "siblings changes where the context is read."
        )
        title = "Where context attention differs"
        yield layer_head_map(np.mean(maps, axis=0), title, "total variation", caption)


def test_raw_attention_opens_without_pickle(store: Store, own_case: Case) -> None:
    """np.load opens the raw arrays without allow_pickle: one for each step and mode."""
    arrays = store.load("attention_weights")
    for mode in ("isolated", "visible"):
        widths = [arrays[f"{mode}_{k:03d}"].shape[2] for k in range(len(own_case.widths))]
        assert widths == own_case.widths
