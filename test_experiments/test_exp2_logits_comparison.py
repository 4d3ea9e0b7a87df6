"""exp2: are the probability distributions of both modes identical, or only their top-k selections?

Compared at the siblings (each member's own output) and at the next reader (the distribution of the following step), on
replayed sets. Free runs are compared only until their sets part: afterwards their contexts differ, and so must they.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np

from fixtures.floors import rounding
from fixtures.raw import keep_log, slot_arrays, spread
from fixtures.session import test_claim  # noqa: F401  every claim below is a test
from fixtures.store import Store
from fixtures.study import CONFIRMATORY, Context, Run, Study, mean, wide_steps
from tempo import Trace
from tempo.claims import Case, Claim
from tempo.metrics import compare, softmax, total_variation
from tempo.reporting.figures import Picture, distributions, lines_by

TV_MARGIN, KL_MARGIN = 0.02, 0.005
MARGIN_REASON = "smaller than what running the same model in bfloat16 changes (total variation 0.02, KL 0.005 nats)"
# Ten times the largest difference between runs of the same mode in other batch shapes; also measured beside the comparison
# on every prompt (`floor_tv`).
IDENTICAL_TV = rounding("tv")
MOST_DIFFERENT = 3  # steps of the own prompt whose distributions are pictured
TOLERATED_SHARE = 0.05  # of steps: one in twenty
# The truth at which an equivalence should be found. A distance is never negative, so its spread is about its mean.
HALF_REASON = "half the margin, with a spread as large: what a distance with such a mean has"


def measure(context: Context) -> Generator[Sequence[Run], Sequence[Trace], dict[str, Any]]:
    """One prompt: isolated chooses the sets, both modes replay them, and visible also runs free."""
    spec = context.config.spec(context.prompt)
    source, free = yield [Run(spec), Run(spec.but(visibility="visible", capture=()))]
    isolated, visible = yield [
        Run(spec.but(replay=source, visibility=mode)) for mode in ("isolated", "visible")
    ]
    wide = wide_steps(source)
    first = wide[0] if wide else len(source.steps)
    before = [
        _max_difference(isolated, visible, k) for k in range(min(first + 1, len(source.steps)))
    ]
    readers = [
        _reader(isolated, visible, k, wide, spec.threshold)
        for k in range(first + 1, len(source.steps))
    ]
    siblings = [_siblings(isolated, visible, k) for k in wide]
    floor = [
        total_variation(source.steps[k].distribution, isolated.steps[k].distribution)
        for k in range(len(source.steps))
    ]
    moved = [_moved(isolated, k, spec.threshold) for k in range(first + 1, len(source.steps))]
    if context.store:
        _keep(context, source, isolated, visible, readers)
    return {
        "widths": source.widths,
        "before_max_difference": max(before),
        "after_max_difference": max(
            (_max_difference(isolated, visible, r["step"]) for r in readers), default=None
        ),
        "reader": {
            name: mean([r[name] for r in readers]) for name in (readers[0] if readers else ())
        },
        "sibling": {
            name: mean([s[name] for s in siblings]) for name in (siblings[0] if siblings else ())
        },
        "reader_tv": mean([r["tv"] for r in readers]),
        "reader_max_tv": max((r["tv"] for r in readers), default=None),
        "reader_kl": mean([r["kl"] for r in readers]),
        "sibling_tv": mean([s["tv"] for s in siblings]),
        "top10_differs": mean([1 - r["top10"] for r in readers]),
        "selection_differs": mean([1 - r["same_selection"] for r in readers]),
        "floor_tv": max(floor),
        "one_step_tv": mean([m["tv"] for m in moved]),
        "one_step_top10_differs": mean([1 - m["top10"] for m in moved]),
        "one_step_selection_differs": mean([1 - m["same_selection"] for m in moved]),
        "readers": readers,
        "parted_at": _parted_at(source, free),
        "free_tv_until_parting": mean(
            [
                total_variation(source.steps[k].distribution, free.steps[k].distribution)
                for k in range(first + 1, _shared(source, free))
            ]
        ),
    }


def _max_difference(one: Trace, other: Trace, step: int) -> float:
    return float(np.abs(one.steps[step].distribution - other.steps[step].distribution).max())


def _selection(distribution: np.ndarray, threshold: float) -> set[int]:
    chosen = set(np.flatnonzero(distribution >= threshold).tolist())
    return chosen or {int(distribution.argmax())}


def _reader(
    isolated: Trace, visible: Trace, step: int, wide: Sequence[int], threshold: float
) -> dict[str, float]:
    """Both modes' distributions at a step after a wide set."""
    p, q = isolated.steps[step].distribution, visible.steps[step].distribution
    last = max(k for k in wide if k < step)
    return {
        "step": step, "width": isolated.widths[last], "lag": step - last, **compare(p, q),
        "same_selection": float(_selection(p, threshold) == _selection(q, threshold)),
    }  # fmt: skip


def _moved(isolated: Trace, step: int, threshold: float) -> dict[str, float]:
    """One mode's distribution against its own one step earlier: the control, two distributions that must differ."""
    p, q = isolated.steps[step].distribution, isolated.steps[step - 1].distribution
    return {
        **compare(p, q),
        "same_selection": float(_selection(p, threshold) == _selection(q, threshold)),
    }


def _siblings(isolated: Trace, visible: Trace, step: int) -> dict[str, float]:
    """Both modes' outputs of the members of one set, mean over members."""
    pairs = zip(
        softmax(isolated.steps[step].logits), softmax(visible.steps[step].logits), strict=True
    )
    compared = [compare(p, q) for p, q in pairs]
    return {name: float(np.mean([c[name] for c in compared])) for name in compared[0]}


def _shared(one: Trace, other: Trace) -> int:
    """How many steps two free runs have before their sets part (the step that chose differently is still shared)."""
    for k, (a, b) in enumerate(zip(one.steps, other.steps, strict=False)):
        if a.tokens != b.tokens:
            return k + 1
    return min(len(one.steps), len(other.steps))


def _parted_at(one: Trace, other: Trace) -> int | None:
    """The step at which two free runs choose different sets, None if they never do."""
    shared = _shared(one, other)
    last = shared - 1
    return None if one.steps[last].tokens == other.steps[last].tokens else last


def _keep(
    context: Context,
    source: Trace,
    isolated: Trace,
    visible: Trace,
    readers: Sequence[Mapping[str, float]],
) -> None:
    store = context.store
    assert store is not None
    keep_log(store, source)
    both = {"isolated": isolated, "visible": visible}
    arrays = {
        f"{mode}_distributions": np.stack([s.distribution for s in trace.steps])
        for mode, trace in both.items()
    }
    arrays |= {
        f"{mode}_logits_{k:03d}": s.logits
        for mode, trace in both.items()
        for k, s in enumerate(trace.steps)
    }
    store.arrays("logits_distributions", **slot_arrays(source), **arrays)
    store.json(
        "kl_divergence",
        {"readers": list(readers), "unit": "nats", "first": "isolated", "second": "visible"},
    )
    rows = []
    for reader in sorted(readers, key=lambda r: -r["tv"])[:MOST_DIFFERENT]:
        k = int(reader["step"])
        shown = {
            int(t) for trace in both.values() for t in np.argsort(-trace.steps[k].distribution)[:20]
        }
        rows.append(
            {
                "step": k,
                "tv": reader["tv"],
                "texts": {t: context.lm.token_text(t) for t in sorted(shown)},
            }
        )
    store.json("most_different", {"steps": rows})
    lines = [f"{context.prompt!r}: {source.text}", "step width lag      tv      kl  top1 top10"]
    lines += [
        f"{r['step']:4.0f} {r['width']:5.0f} {r['lag']:3.0f} {r['tv']:7.4f} {r['kl']:7.4f} {r['top1']:5.0f} {r['top10']:5.2f}"
        for r in readers
    ]
    store.text("analysis", "\n".join(lines))


def _below(key: str, bound: float) -> Callable[[Case], bool | None]:
    return lambda case: None if case[key] is None else case[key] <= bound


CLAIMS = (
    Claim(
        id="exp2.same-before-first-wide-set",
        statement="Until the first wide set has been read, both modes agree to the last bit.",
        statistic="largest difference of any probability is exactly 0.0",
        values=_below("before_max_difference", 0.0),
        test="always",
        refuted_by="one probability that differs in one bit",
        control=_below("after_max_difference", 0.0),
        control_statement="the same comparison after the first wide set",
    ),
    Claim(
        id="exp2.identical-logits",
        statement="After a wide set the modes still give identical distributions.",
        statistic=f"share of prompts on which every reader agrees within {IDENTICAL_TV:.1e} in total variation",
        values=_below("reader_max_tv", IDENTICAL_TV),
        test="proportion",
        margin=0.95,
        margin_reason="ten times the measured rounding floor; one prompt in twenty may differ",
        family="exp2",
        planned_effect=1.0,
        planned_from="identical modes agree on every prompt",
        refuted_by="a share that is significantly below 95 %",
        control=_below("one_step_tv", IDENTICAL_TV),
        control_statement="the distribution one step earlier in the same run",
    ),
    Claim(
        id="exp2.equivalent-at-reader",
        statement="The next step's distributions are equivalent within the bfloat16 margin.",
        statistic="total variation at the next reader, mean over steps after a wide set",
        values=lambda case: case["reader_tv"],
        test="equivalent",
        margin=TV_MARGIN,
        margin_reason=MARGIN_REASON,
        family=CONFIRMATORY,
        planned_effect=TV_MARGIN / 2,
        planned_sd=TV_MARGIN / 2,
        planned_from=HALF_REASON,
        refuted_by="a mean significantly above 0.02",
        control=lambda case: case["one_step_tv"],
        control_statement="the distribution one step earlier in the same run",
    ),
    Claim(
        id="exp2.equivalent-at-siblings",
        statement="The siblings' own outputs are equivalent within the bfloat16 margin.",
        statistic="total variation of the members' own distributions, mean over members and wide sets",
        values=lambda case: case["sibling_tv"],
        test="equivalent",
        margin=TV_MARGIN,
        margin_reason=MARGIN_REASON,
        family="exp2",
        planned_effect=TV_MARGIN / 2,
        planned_sd=TV_MARGIN / 2,
        planned_from=HALF_REASON,
        refuted_by="a mean significantly above 0.02",
        control=lambda case: case["one_step_tv"],
        control_statement="the distribution one step earlier in the same run",
    ),
    Claim(
        id="exp2.same-top-10",
        statement="Both modes rank the same ten tokens highest.",
        statistic="share of the top ten that differs at the next reader, mean over steps after a wide set",
        values=lambda case: case["top10_differs"],
        test="less",
        margin=TOLERATED_SHARE,
        margin_reason="one token in twenty",
        family="exp2",
        planned_effect=TOLERATED_SHARE / 2,
        planned_sd=TOLERATED_SHARE / 2,
        planned_from=HALF_REASON,
        refuted_by="a mean significantly above 0.05",
        control=lambda case: case["one_step_top10_differs"],
        control_statement="the same against the distribution one step earlier",
    ),
    Claim(
        id="exp2.same-selection",
        statement="Both modes would select the same set next.",
        statistic="share of steps after a wide set at which the selected sets differ",
        values=lambda case: case["selection_differs"],
        test="less",
        margin=TOLERATED_SHARE,
        margin_reason="one step in twenty",
        family="exp2",
        planned_effect=TOLERATED_SHARE / 2,
        planned_sd=0.052,
        planned_from="half the margin; the spread of a share of about nine steps, (0.025 * 0.975 / 9) ** 0.5",
        refuted_by="a share significantly above 0.05",
        control=lambda case: case["one_step_selection_differs"],
        control_statement="the same against the distribution one step earlier",
    ),
)


def _by(cases: Sequence[Case], key: str, name: str) -> list[tuple[float, float, float, float]]:
    """Points of a figure: mean of each prompt at each value of `key` first, then over prompts (at least 5)."""
    values = sorted({r[key] for case in cases for r in case["readers"]})
    points = []
    for value in values:
        prompts = [[r[name] for r in case["readers"] if r[key] == value] for case in cases]
        per_prompt = [float(np.mean(found)) for found in prompts if found]
        if len(per_prompt) >= 5:
            points.append((float(value), *spread(per_prompt)))
    return points


def pictures(store: Store, cases: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """The most different steps of the family's own prompt; divergence by step, width and lag over the suite."""
    found = []
    arrays = store.load("logits_distributions")
    for rank, worst in enumerate(store.load_json("most_different")["steps"], start=1):
        p, q = (arrays[f"{mode}_distributions"][worst["step"]] for mode in ("isolated", "visible"))
        texts = {int(token): text for token, text in worst["texts"].items()}
        found.append(
            distributions(
                p, q, texts, title=f"Where the modes differ most, {rank}: step {worst['step']}"
            )
        )
    for key, label in (
        ("step", "step"),
        ("width", "width of the last wide set"),
        ("lag", "steps since the last wide set"),
    ):
        points = _by(cases, key, "kl")
        if points:
            caption = (
                f"KL(isolated || visible) of the next distribution by {label}; mean and 95 % interval over prompts. At zero the modes "
                "would agree; below 0.005 nats they would be as near as float32 and bfloat16."
            )
            found.append(
                lines_by(
                    {"KL at the next reader": points},
                    label,
                    "KL in nats",
                    f"Divergence by {key}",
                    caption,
                )
            )
    return found


STUDY = Study("exp2", "Logits", measure, CLAIMS, pictures)


def test_rounding_floor_is_far_below_the_effect(cases: list[Case]) -> None:
    """Harness check: the same mode in another batch differs by rounding only, so a difference above it is real."""
    floor = max(case["floor_tv"] for case in cases)
    assert floor < IDENTICAL_TV / 2, (
        f"the same mode twice differs by {floor:.2g} in total variation"
    )


def test_raw_distributions_sum_to_one(store: Store) -> None:
    """Full-vocabulary distributions are on disk, without pickle."""
    for mode in ("isolated", "visible"):
        sums = store.load("logits_distributions")[f"{mode}_distributions"].sum(
            axis=1, dtype=np.float64
        )
        assert np.abs(sums - 1).max() < 1e-4
