"""exp1: do attention patterns differ between isolated and visible siblings, on the same sets?

Every step's weights are those of the pass in which the siblings are the queries. Layers L, heads H, siblings w, slots N.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from fixtures.raw import keep_attention, keep_log, lattice, slot_labels
from fixtures.session import test_claim  # noqa: F401  every claim below is a test
from fixtures.store import Store
from fixtures.study import Context, Run, Study, mean, wide_steps
from tempo import Trace
from tempo.claims import Case, Claim
from tempo.metrics import context_distance
from tempo.reporting.figures import Picture, attention_heatmap, layer_head_map

# Float32 softmax rows of some hundred keys sum to one within a few 1e-6.
ROW_SUM_TOLERANCE = 1e-5
# Rows renormalised over the context differ by rounding of two float32 softmaxes when the logits are the same.
SAME_PATTERN_TOLERANCE = 1e-5
# As for distributions: smaller than what running the same model in bfloat16 changes.
PATTERN_MARGIN = 0.02


def measure(context: Context) -> Generator[Sequence[Run], Sequence[Trace], dict[str, Any]]:
    """One prompt: its free run chooses the sets, both modes replay them."""
    spec = context.config.spec(context.prompt)
    (source,) = yield [Run(spec)]
    isolated, visible = yield [
        Run(spec.but(replay=source, visibility=mode)) for mode in ("isolated", "visible")
    ]
    again = isolated if spec.visibility == "isolated" else visible
    wide = wide_steps(source)
    start = [source.steps[k].slots[0] for k in wide]
    between = [
        context_distance(isolated.steps[k].attention, visible.steps[k].attention, s)
        for k, s in zip(wide, start, strict=True)
    ]
    same = [
        context_distance(source.steps[k].attention, again.steps[k].attention, s)
        for k, s in zip(wide, start, strict=True)
    ]
    if context.store:
        keep_attention(context.store, isolated, visible)
        keep_log(context.store, source)
        context.store.json(
            "labels",
            {
                "labels": slot_labels(context.lm, source),
                "wide": wide,
                "slots": [source.steps[k].slots for k in wide],
            },
        )
    return {
        "widths": source.widths,
        "row_sum_error": max(
            float(np.abs(s.attention.sum(-1) - 1).max())
            for t in (isolated, visible)
            for s in t.steps
        ),
        "sibling_weight_isolated": max(
            (_most_to_siblings(isolated, k) for k in wide), default=None
        ),
        "sibling_weight_visible": max((_most_to_siblings(visible, k) for k in wide), default=None),
        "row_sum_error_without_siblings": max(
            (_sum_error_without_siblings(visible, k) for k in wide), default=None
        ),
        "context_tv": mean([float(d.mean()) for d in between]),
        "context_tv_same_mode": mean([float(d.mean()) for d in same]),
        "context_tv_by_layer": np.mean([d.mean(axis=1) for d in between], axis=0).tolist()
        if wide
        else None,
        "context_tv_map": np.mean(between, axis=0).round(6).tolist() if wide else None,
        "first_set_first_layer_tv": float(between[0][0].max()) if wide else None,
        "first_set_last_layer_tv": float(between[0][-1].max()) if wide else None,
    }


def _most_to_siblings(trace: Trace, step: int) -> float:
    """The largest weight any sibling of a set gives another."""
    slots = trace.steps[step].slots
    block = trace.steps[step].attention[..., slots[0] :]
    return float(block[..., ~np.eye(len(slots), dtype=bool)].max())


def _sum_error_without_siblings(trace: Trace, step: int) -> float:
    """How far rows are from one when the other siblings' weights are left out: the control of the row sums."""
    slots = trace.steps[step].slots
    weights = trace.steps[step].attention
    siblings = weights[..., slots[0] :].sum(-1) - np.einsum("lhii->lhi", weights[..., slots[0] :])
    return float(np.abs(weights.sum(-1) - siblings - 1).max())


def _at_most(key: str, bound: float) -> Any:
    def check(case: Case) -> bool | None:
        return None if case[key] is None else case[key] <= bound

    return check


CLAIMS = (
    Claim(
        id="exp1.rows-sum-to-one",
        statement="Every captured attention row sums to one, in both modes.",
        statistic="largest |row sum - 1| over steps, layers, heads and siblings is at most 1e-5",
        values=_at_most("row_sum_error", ROW_SUM_TOLERANCE),
        test="always",
        refuted_by="one row of one prompt that does not",
        control=_at_most("row_sum_error_without_siblings", ROW_SUM_TOLERANCE),
        control_statement="the same rows in visible mode without their siblings' columns",
    ),
    Claim(
        id="exp1.forbidden-is-zero",
        statement="An isolated sibling gives every other sibling a weight of exactly 0.",
        statistic="largest weight between two siblings equals 0.0",
        values=_at_most("sibling_weight_isolated", 0.0),
        test="always",
        refuted_by="one weight that is not exactly 0.0",
        control=_at_most("sibling_weight_visible", 0.0),
        control_statement="the same entries in visible mode",
    ),
    Claim(
        id="exp1.first-layer-is-the-same",
        statement="In the first layer of the first wide set, both modes spread attention over the context alike.",
        statistic="largest total variation over heads of context-renormalised rows is at most 1e-5",
        values=_at_most("first_set_first_layer_tv", SAME_PATTERN_TOLERANCE),
        test="always",
        refuted_by="a first layer that already knows the siblings' outputs",
        control=_at_most("first_set_last_layer_tv", SAME_PATTERN_TOLERANCE),
        control_statement="the same in the last layer, which siblings have reached",
    ),
    Claim(
        id="exp1.context-pattern-differs",
        statement="Seeing siblings changes how attention is spread over the prior context.",
        statistic="total variation of context-renormalised rows, mean over wide sets, layers and heads",
        values=lambda case: case["context_tv"],
        test="greater",
        margin=PATTERN_MARGIN,
        margin_reason="total variation that running the same model in bfloat16 would cause",
        family="exp1",
        planned_effect=1.5 * PATTERN_MARGIN,
        planned_sd=0.013,
        planned_from="half more than the margin; the spread over prompts of the first full run",
        refuted_by="a mean below the margin",
        control=lambda case: case["context_tv_same_mode"],
        control_statement="the same mode twice, in different batches",
    ),
)


def pictures(store: Store, cases: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """The sets and heatmaps of the family's own prompt, and where over layers and heads the modes differ."""
    found = [lattice(store)]
    labels = store.load_json("labels")
    if labels["wide"]:
        arrays, k, slots = store.load("attention_weights"), labels["wide"][0], labels["slots"][0]
        for mode in ("isolated", "visible"):
            title = f"Attention of the first wide set, {mode} siblings"
            weights = arrays[f"{mode}_{k:03d}"]
            found.append(
                attention_heatmap(
                    weights, labels["labels"][: weights.shape[-1]], slots, title=title
                )
            )
    maps = [case["context_tv_map"] for case in cases if case["context_tv_map"] is not None]
    if maps:
        caption = (
            f"Total variation between isolated and visible rows over the prior context, mean over {len(maps)} prompts. "
            "Dark: both modes look at the context alike; bright: seeing siblings changes where the context is read."
        )
        found.append(
            layer_head_map(
                np.mean(maps, axis=0), "Where context attention differs", "total variation", caption
            )
        )
    return found


STUDY = Study("exp1", "Attention weights", measure, CLAIMS, pictures)


def test_raw_attention_opens_without_pickle(store: Store, own_case: Case) -> None:
    """The seed's analysis snippet works: np.load, no allow_pickle, one array a step and mode."""
    arrays = store.load("attention_weights")
    widths = own_case["widths"]
    for mode in ("isolated", "visible"):
        assert [arrays[f"{mode}_{k:03d}"].shape[2] for k in range(len(widths))] == widths
