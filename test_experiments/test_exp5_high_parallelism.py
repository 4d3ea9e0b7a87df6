"""exp5: what happens with ten and with thirty siblings: is everything finite and exact, and do the modes agree less?"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

import tempo
from fixtures.floors import rounding
from fixtures.raw import keep_attention, keep_log, lattice, spread
from fixtures.session import test_claim  # noqa: F401  every claim below is a test
from fixtures.store import Store
from fixtures.study import Context, Run, Study, mean, wide_steps
from tempo import LanguageModel, Trace
from tempo.capture import trace_bytes
from tempo.claims import Case, Claim
from tempo.metrics import total_variation
from tempo.reporting.figures import Picture, bars, lines_by

ROW_SUM_TOLERANCE = 1e-5
# Engine against brute force, on probabilities: no further apart than two runs of the engine may be.
ORACLE_TOLERANCE = rounding("probability")
SHUFFLE_SEED = 11  # of the control that pairs widths with other steps
NUM_SHUFFLES = 50
WIDTH_CLASSES = (
    (1, 1),
    (2, 2),
    (3, 4),
    (5, 8),
    (9, 16),
    (17, 48),
)  # about even on a logarithmic scale
TIMED_WIDTHS = (1, 2, 4, 8, 16, 32)
TIMED_REPEATS = 5


def measure(context: Context) -> Generator[Sequence[Run], Sequence[Trace], dict[str, Any]]:
    """One prompt: isolated chooses wide sets; both modes replay them, and isolated once more in bfloat16."""
    spec = context.config.spec(context.prompt)
    (source,) = yield [Run(spec.but(capture=()))]
    isolated, visible, coarse = yield [
        Run(spec.but(replay=source, visibility="isolated")),
        Run(spec.but(replay=source, visibility="visible")),
        Run(spec.but(replay=source, capture=()), "bfloat16"),
    ]
    wide = wide_steps(source)
    first = wide[0] if wide else len(source.steps)
    after = range(first + 1, len(source.steps))
    mode_tv = {
        k: total_variation(isolated.steps[k].distribution, visible.steps[k].distribution)
        for k in after
    }
    coarse_tv = [
        total_variation(isolated.steps[k].distribution, coarse.steps[k].distribution) for k in after
    ]
    both = [(trace, step) for trace in (isolated, visible) for step in trace.steps]
    steps = [
        {"step": k, "width": max(source.widths[first:k]), "tv": tv} for k, tv in mode_tv.items()
    ]
    case: dict[str, Any] = {
        "widths": source.widths,
        "threshold": spec.threshold,
        "finite": all(
            np.isfinite(s.logits).all() and np.isfinite(s.attention).all() for _, s in both
        ),
        "finite_with_fault": bool(np.isfinite(_with_one_nan(isolated)).all()),
        "row_sum_error": max(float(np.abs(s.attention.sum(-1) - 1).max()) for _, s in both),
        "row_sum_error_without_self": max((_without_self(isolated, k) for k in wide), default=None),
        "mode_tv": mean(list(mode_tv.values())),
        "bfloat16_tv": mean(coarse_tv),
        "width_tv_rank_correlation": _rank_correlation(
            [s["width"] for s in steps], [s["tv"] for s in steps]
        ),
        "mean_width": float(np.mean(source.widths)),
        "steps": [{"width": source.widths[k - 1], "tv": mode_tv[k]} for k in after],
        "peak_bytes": isolated.peak_bytes,
    }
    if context.store:
        keep_log(context.store, source)
        keep_attention(context.store, isolated, visible)
        case["oracle_difference"] = _against_oracle(context, spec.but(replay=source), isolated)
        case["timing"] = _time_widths(context.lm, context.prompt)
        lines = [
            f"{context.prompt!r}: widths {source.widths}",
            "width  seconds (median of 5)  ratio to one  bytes of the trace",
        ]
        lines += [
            f"{t['width']:5d}  {t['seconds']:.4f}  {t['ratio']:.2f}  {t['bytes']}"
            for t in case["timing"]
        ]
        context.store.text("analysis", "\n".join(lines))
    return case


def _with_one_nan(trace: Trace) -> np.ndarray:
    """The last set's logits with one entry spoilt: the control of the finiteness check."""
    spoilt = trace.steps[-1].logits.copy()
    spoilt.flat[0] = np.nan
    return spoilt


def _without_self(trace: Trace, step: int) -> float:
    """Row sums without each member's weight on itself: the control of the row sums."""
    weights, start = trace.steps[step].attention, trace.steps[step].slots[0]
    return float(np.abs(weights.sum(-1) - np.einsum("lhii->lhi", weights[..., start:]) - 1).max())


def _rank_correlation(widths: Sequence[float], values: Sequence[float]) -> float | None:
    """Spearman's correlation within a prompt; None where fewer than three steps or no spread leave nothing to rank."""
    if len(values) < 3 or len(set(widths)) < 2 or len(set(values)) < 2:
        return None
    return float(spearmanr(widths, values).statistic)


def _against_oracle(context: Context, spec: tempo.RunSpec, isolated: Trace) -> float:
    """The largest difference of any probability from brute force."""
    exact = tempo.reference.generate(
        context.lm, context.prompt, **spec.but(capture=()).model_dump(exclude={"prompt"})
    )
    pairs = zip(isolated.steps, exact.steps, strict=True)
    return max(float(np.abs(a.distribution - b.distribution).max()) for a, b in pairs)


def _time_widths(lm: LanguageModel, prompt: str) -> list[dict[str, float]]:
    """Seconds of one step by its width, widths in turn so that a drift of the machine meets all of them alike."""
    # free runs whose sets are that wide whatever the model says; a replay would forward its sets together
    wide = {
        width: {"threshold": 1e-9, "max_width": width, "max_steps": 5, "stop_at_eos": False}
        for width in TIMED_WIDTHS
    }
    seconds: dict[int, list[float]] = {width: [] for width in TIMED_WIDTHS}
    for _ in range(TIMED_REPEATS):
        for width in TIMED_WIDTHS:
            began = time.perf_counter()
            trace = tempo.generate(lm, prompt, **wide[width])
            # the first pass reads the prompt; the others read one set each
            seconds[width].append(
                (time.perf_counter() - began - trace.steps[0].seconds) / (len(trace.steps) - 1)
            )
    medians = {width: float(np.median(found)) for width, found in seconds.items()}
    num_prompt = len(lm.encode(prompt))
    return [
        {"width": width, "seconds": medians[width], "ratio": medians[width] / medians[1],
         "bytes": sum(trace_bytes(lm, tempo.RunSpec(prompt=prompt, **wide[width]), num_prompt).values())}
        for width in TIMED_WIDTHS
    ]  # fmt: skip


def _log_ratio_to_bfloat16(case: Case) -> float | None:
    return None if case["mode_tv"] is None else float(np.log(case["mode_tv"] / case["bfloat16_tv"]))


def _sets_of(name: str, number: int) -> Claim:
    return Claim(
        id=f"exp5.sets-of-{name}",
        statement=f"At this threshold sets of {name} siblings and more do occur.",
        statistic=f"share of prompts whose widest set has at least {number} members",
        values=lambda case: max(case["widths"]) >= number,
        test="proportion",
        margin=0.05,
        margin_reason="one prompt in twenty, else the family says little about sets as wide as that",
        family="exp5",
        planned_effect=0.4,
        planned_from="two prompts in five: so many that they cannot be called rare",
        refuted_by="a share significantly below 5 %",
        control=lambda case: max(case["widths"]) > 1 / case["threshold"],
        control_statement="sets wider than 1 / threshold, which cannot be",
    )


CLAIMS = (
    _sets_of("ten", 10),
    _sets_of("thirty", 30),
    Claim(
        id="exp5.finite",
        statement="Logits and attention stay finite in both modes.",
        statistic="no NaN and no infinity in any captured array",
        values=lambda case: case["finite"],
        test="always",
        refuted_by="one value that is not finite",
        control=lambda case: case["finite_with_fault"],
        control_statement="the same arrays with one NaN planted",
    ),
    Claim(
        id="exp5.rows-sum-to-one",
        statement="Attention rows of wide sets sum to one.",
        statistic="largest |row sum - 1| is at most 1e-5",
        values=lambda case: case["row_sum_error"] <= ROW_SUM_TOLERANCE,
        test="always",
        refuted_by="one row that does not",
        control=lambda case: (
            None
            if case["row_sum_error_without_self"] is None
            else case["row_sum_error_without_self"] <= ROW_SUM_TOLERANCE
        ),
        control_statement="the same rows without each sibling's weight on itself",
    ),
    Claim(
        id="exp5.agree-less-when-wide",
        statement="The wider the sets so far, the less the modes agree.",
        statistic="within a prompt, Spearman's correlation of the widest set so far with total variation at the reader",
        values=lambda case: case["width_tv_rank_correlation"],
        test="greater",
        margin=0.1,
        margin_reason="a correlation of 0.1 explains one percent of the variance of ranks; less would not matter",
        family="exp5",
        planned_effect=0.3,
        planned_sd=0.56,
        planned_from="a correlation one would see in a plot; the spread within prompts of the first full run",
        refuted_by="a mean correlation below 0.1",
        control=lambda case: _shuffled_correlation(case),
        control_statement="widths paired with steps at random",
    ),
    Claim(
        id="exp5.more-than-bfloat16",
        statement="The choice of mode changes the next distribution more than running in bfloat16 does.",
        statistic="log of (total variation between modes / between float32 and bfloat16)",
        values=_log_ratio_to_bfloat16,
        test="greater",
        margin=float(np.log(2)),
        margin_reason="twice; less would not be told from the dtype's own scatter",
        family="exp5",
        planned_effect=float(np.log(4)),
        planned_sd=0.5,
        planned_from="four times; log ratios of the first full run spread by 0.34 over prompts",
        refuted_by="a mean log ratio below log 2",
        control=lambda case: None if (ratio := _log_ratio_to_bfloat16(case)) is None else -ratio,
        control_statement="the ratio turned over",
    ),
)


def _shuffled_correlation(case: Case) -> float | None:
    """The mean correlation over many random pairings: one alone would be as likely 1 as -1 on three steps."""
    steps = case["steps"]
    # a generator of each prompt's own, so that the control does not depend on the order of prompts
    rng = np.random.default_rng([SHUFFLE_SEED, *case["prompt"].encode()])
    widths, values = [s["width"] for s in steps], [s["tv"] for s in steps]
    found = [
        _rank_correlation(rng.permutation(widths).tolist(), values) for _ in range(NUM_SHUFFLES)
    ]
    return mean([c for c in found if c is not None])


def pictures(store: Store, cases: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """The sets of the family's own prompt; widths, agreement by width over the suite, and what a step costs by width."""
    found = [lattice(store), _widths(cases)]
    points = []
    for low, high in WIDTH_CLASSES:
        per_prompt = [
            np.mean(tvs)
            for case in cases
            if (tvs := [s["tv"] for s in case["steps"] if low <= s["width"] <= high])
        ]
        if len(per_prompt) >= 5:
            points.append(((low * high) ** 0.5, *spread(per_prompt)))
    if points:
        caption = (
            "Total variation between modes at the reader, by the width of the set just read; mean and 95 % interval over prompts. A rise "
            "to the right means that the modes agree less as sets grow."
        )
        found.append(
            lines_by(
                {"isolated against visible": points},
                "width of the set just read",
                "total variation",
                "Agreement by width",
                caption,
            )
        )
    timing = next((case["timing"] for case in cases if "timing" in case), None)
    if timing:
        costs = [(t["width"], t["ratio"], t["ratio"], t["ratio"]) for t in timing]
        caption = (
            "Time of one step by its width, as a ratio to a step of one token (medians of 5, one run, widths in turn). As long as it stays "
            "far below the width itself, siblings are cheaper than as many separate runs."
        )
        found.append(
            lines_by(
                {"this machine": costs},
                "siblings in a step",
                "time, ratio to one",
                "What siblings cost",
                caption,
            )
        )
    return found


def _widths(cases: Sequence[Mapping[str, Any]]) -> Picture:
    """How wide the sets are: of the first step, where all prompts have one, and of all later ones."""
    first, later = (
        [case["widths"][0] for case in cases],
        [width for case in cases for width in case["widths"][1:]],
    )
    shares = {
        name: [
            sum(low <= width <= high for width in widths) / max(1, len(widths))
            for low, high in WIDTH_CLASSES
        ]
        for name, widths in (("first step", first), ("later steps", later))
    }
    labels = [str(low) if low == high else f"{low}-{high}" for low, high in WIDTH_CLASSES]
    caption = (
        f"Share of sets by width, {len(first)} first steps and {len(later)} later ones of {len(cases)} prompts. Wide sets are what this "
        "experiment is about: where there are few, the intervals beside them are wide."
    )
    return bars(
        shares, labels, "members of a set", "share of sets", "How wide the sets are", caption
    )


STUDY = Study("exp5", "High parallelism", measure, CLAIMS, pictures)


def test_wide_sets_equal_brute_force(own_case: Case) -> None:
    """Harness check: probabilities after wide sets are those of full forward passes without cache."""
    assert own_case["oracle_difference"] < ORACLE_TOLERANCE
