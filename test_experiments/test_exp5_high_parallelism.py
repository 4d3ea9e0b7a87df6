"""exp5: what happens with ten and with thirty siblings?

Is everything finite and exact, do the modes agree less, and what does a wide step cost?
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

import tempo
from fixtures.floors import rounding
from fixtures.margins import ONE_IN_TWENTY
from fixtures.raw import grouped_means, keep_attention, keep_log, keep_table, lattice
from fixtures.rows import (
    at_most,
    brute_force_error,
    rows_are_whole,
    step_tv,
    sum_error,
    sum_error_without,
)
from tempo import Trace
from tempo.capture import trace_bytes
from tempo.harness import Planned, Prompt, Steps, Store, Study, average, run, wide_steps
from tempo.reporting.figures import Picture, bars, lines_by

TOLERANCE = 1e-5  # float32 softmax rows of some hundred keys sum to one within a few 1e-6
# Many random pairings for a control: a single one of three steps is as likely 1 as -1.
SHUFFLE_SEED, NUM_SHUFFLES = 11, 50
# About even on a logarithmic scale.
WIDTH_CLASSES = ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 48))
TIMED_WIDTHS, TIMED_REPEATS = (1, 2, 4, 8, 16, 32), 5
IMPOSSIBLE = 1000  # siblings: more than 1 / threshold

study = Study(
    "exp5", title="High parallelism", captures=("attention", "logits"), registered="2026-11-23"
)


@dataclass(frozen=True)
class Case:
    """What one prompt gives: values, and beside them those of controls."""

    widths: list[int]
    finite: dict[str, bool]
    sum_error: dict[str, float | None]
    mode_tv: float | None  # total variation after wide sets, isolated against visible
    bfloat16_tv: float | None  # the same, isolated against itself in bfloat16
    correlation: dict[str, float | None]  # over steps, of widths and total variation between modes
    steps: list[tuple[int, float]]  # width of the set just read, total variation between modes

    def by_class(self) -> list[tuple[float, float]]:
        """The same with the centre of each width's class on a logarithmic scale."""
        found = []
        for width, tv in self.steps:
            # the last class is open above
            low, high = min((c for c in WIDTH_CLASSES if width <= c[1]), default=WIDTH_CLASSES[-1])
            found.append((math.sqrt(low * high), tv))
        return found


@study.measure
def wide_sets(prompt: Prompt) -> Steps[Case]:
    """Isolated mode chooses wide sets; both modes replay them, and isolated again in bfloat16."""
    source: Trace = yield run(prompt, capture=())
    isolated, visible, coarse = yield [
        run(prompt, replay=source, visibility="isolated"),
        run(prompt, replay=source, visibility="visible"),
        run(prompt, replay=source, capture=(), dtype="bfloat16"),
    ]
    wide, num_steps = wide_steps(source), len(source.steps)
    first = wide[0] if wide else num_steps
    after = range(first + 1, num_steps)
    tvs = [step_tv(isolated, visible, k) for k in after]
    just_read, widest = source.widths[first:-1], [max(source.widths[first:k]) for k in after]
    rng, both = prompt.rng(SHUFFLE_SEED), [*isolated.steps, *visible.steps]
    shuffled = [_correlation(rng.permutation(just_read), tvs) for _ in range(NUM_SHUFFLES)]
    arrays: list[Any] = [s.logits for s in both] + [s.attention for s in both]
    if prompt.store:
        keep_log(prompt.store, source)
        keep_attention(prompt.store, isolated, visible)
        costs = _time_widths(prompt)
        title = f"{prompt.text!r}: widths {source.widths}; a step (median of 5) by its width"
        keep_table(prompt.store, title, costs, list(costs[0]))
        error = brute_force_error(prompt, isolated)
        prompt.store.json("own_prompt", {"costs": costs, "brute_force_error": error})
    return Case(
        widths=source.widths,
        finite={
            "captured": all(np.isfinite(array).all() for array in arrays),
            "one NaN": bool(np.isfinite(np.append(arrays[0], np.nan)).all()),
        },
        sum_error={
            "captured": sum_error(isolated, visible),
            "without self": sum_error_without(isolated, wide, siblings=False),
        },
        mode_tv=average(tvs),
        bfloat16_tv=average([step_tv(isolated, coarse, k) for k in after]),
        correlation={
            "widest so far": _correlation(widest, tvs),
            "shuffled": average([c for c in shuffled if c is not None]),
        },
        steps=list(zip(just_read, tvs, strict=True)),
    )


def _correlation(widths: Sequence[int] | np.ndarray, values: Sequence[float]) -> float | None:
    """Spearman's correlation; None where fewer than three steps or no spread leave none to rank."""
    if len(values) < 3 or len(set(widths)) < 2 or len(set(values)) < 2:
        return None
    found: Any = spearmanr(widths, values)
    return float(found.statistic)


def _time_widths(prompt: Prompt) -> list[dict[str, float]]:
    """What a step costs by its width. Widths take turns: a drift of the machine meets all alike."""
    # Free runs whose sets are that wide whatever the model says: a replay forwards sets together.
    spec = prompt.spec(threshold=1e-9, max_steps=5, stop_at_eos=False, capture=())
    specs = {width: spec.but(max_width=width) for width in TIMED_WIDTHS}
    seconds: dict[int, list[float]] = {width: [] for width in TIMED_WIDTHS}
    for width in TIMED_WIDTHS * TIMED_REPEATS:
        (trace,) = tempo.generate_batch(prompt.lm, [specs[width]])
        # the first pass reads the prompt; the others read one set each
        reading = trace.seconds - trace.steps[0].seconds
        seconds[width].append(reading / (len(trace.steps) - 1))
    rows, num_prompt = [], len(prompt.lm.encode(prompt.given))
    for width, spec in specs.items():
        median, alone = float(np.median(seconds[width])), float(np.median(seconds[1]))
        size = sum(trace_bytes(prompt.lm, spec, num_prompt).values())
        row = {"width": width, "seconds": median, "ratio": median / alone, "bytes": size}
        rows.append(row)
    return rows


MANY = Planned(0.4, source="two prompts in five: so many that they cannot be called rare")


@study.claim(share_above=ONE_IN_TWENTY, planned=MANY, control=IMPOSSIBLE)
def test_sets_of_ten(case: Case, number: int = 10) -> bool:
    """At this threshold sets of ten siblings and more do occur.

    Share of prompts whose widest set has at least ten members.
    Control: sets wider than 1 / threshold, which cannot be.
    """
    return max(case.widths) >= number


@study.claim(share_above=ONE_IN_TWENTY, planned=MANY, control=IMPOSSIBLE)
def test_sets_of_thirty(case: Case, number: int = 30) -> bool:
    """At this threshold sets of thirty siblings and more do occur.

    Share of prompts whose widest set has at least thirty members.
    Control: sets wider than 1 / threshold, which cannot be.
    """
    return max(case.widths) >= number


@study.claim(always=True, control="one NaN")
def test_finite(case: Case, arrays: str = "captured") -> bool:
    """Logits and attention stay finite in both modes.

    No NaN and no infinity in any captured array.
    Control: a captured array with one NaN added.
    """
    return case.finite[arrays]


@study.claim(always=True, control="without self", needs=rows_are_whole)
def test_rows_sum_to_one(case: Case, rows: str = "captured") -> bool | None:
    """Attention rows of wide sets sum to one.

    Largest |row sum - 1| is at most 1e-5.
    Control: the same rows without each sibling's weight on itself.
    """
    return at_most(case.sum_error[rows], TOLERANCE)


@study.claim(
    more_than=0.1,
    because="a correlation of 0.1 explains one percent of the variance of ranks",
    planned=Planned(0.3, sd=0.56, source="seen in a plot; the spread of the first full run"),
    control="shuffled",
)
def test_agree_less_when_wide(case: Case, widths: str = "widest so far") -> float | None:
    """The wider the sets so far, the less the modes agree.

    Spearman's correlation within a prompt, of the widest set so far and total variation after it.
    Control: widths paired with steps at random.
    """
    return case.correlation[widths]


@study.claim(
    more_than=math.log(2),
    because="twice; less would not be told from the dtype's own scatter",
    planned=Planned(math.log(4), sd=0.5, source="four times; the first full run spread by 0.34"),
    control=-1,
)
def test_more_than_bfloat16(case: Case, sign: int = 1) -> float | None:
    """The choice of mode changes the next distribution more than running in bfloat16 does.

    Log of (total variation between modes / between float32 and bfloat16).
    Control: the ratio turned over.
    """
    if not case.mode_tv or not case.bfloat16_tv:
        return None
    return sign * math.log(case.mode_tv / case.bfloat16_tv)


@study.pictures
def pictures(store: Store, cases: Sequence[Case]) -> Iterator[Picture]:
    """The own sets; widths and agreement by width over the suite; what a step costs by width."""
    yield lattice(store)
    yield _widths(cases)
    if points := grouped_means([case.by_class() for case in cases]):
        groups = {"isolated against visible": points}
        caption = (
            "Total variation between modes at the reader, by the width of the set just read; mean "
            "and 95 % interval over prompts. A rise means that modes agree less as sets grow."
        )
        x, y = "width of the set just read", "total variation"
        yield lines_by(groups, x, y, "Agreement by width", caption)
    costs = [(c["width"], *[c["ratio"]] * 3) for c in store.load_json("own_prompt")["costs"]]
    caption = (
        "Time of a step by its width, as a ratio to a step of one token (medians of 5, widths in "
        "turn). Far below the width itself, siblings are cheaper than as many runs."
    )
    x, y = "siblings in a step", "time, ratio to one"
    yield lines_by({"this machine": costs}, x, y, "What siblings cost", caption)


def _widths(cases: Sequence[Case]) -> Picture:
    """How wide sets are: at the first step, where all prompts have one, and at all later ones."""
    first = [case.widths[0] for case in cases]
    later = [width for case in cases for width in case.widths[1:]]
    shares = {}
    for name, widths in (("first step", first), ("later steps", later)):
        found = np.array(widths)
        counts = [((low <= found) & (found <= high)).sum() for low, high in WIDTH_CLASSES]
        shares[name] = [float(count) / max(1, len(widths)) for count in counts]
    labels = [str(low) if low == high else f"{low}-{high}" for low, high in WIDTH_CLASSES]
    caption = (
        f"Share of sets by width, {len(first)} first steps and {len(later)} later ones of "
        f"{len(cases)} prompts. Where wide sets are few, the intervals beside them are wide."
    )
    title = "How wide the sets are"
    return bars(shares, labels, "members of a set", "share of sets", title, caption)


def test_wide_sets_equal_brute_force(store: Store) -> None:
    """Probabilities after wide sets are those of full forward passes without cache."""
    error = store.load_json("own_prompt")["brute_force_error"]
    assert error < rounding("probability", store.manifest["dtype"])
