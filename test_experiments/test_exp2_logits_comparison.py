"""exp2: are the probability distributions of both modes identical, or only their top-k selections?

Compared at the siblings (each member's own output) and at the next reader (the distribution of the
following step), on replayed sets. Free runs are compared only until their sets part, because after
that their contexts differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fixtures.floors import rounding, same_row
from fixtures.margins import BFLOAT16_TV, ONE_IN_TWENTY
from fixtures.raw import grouped_means, keep_log, keep_table, likely_texts, slot_arrays
from fixtures.rows import at_members, at_most, logits_of
from tempo import Trace
from tempo.harness import (
    Margin,
    Planned,
    Prompt,
    Space,
    Steps,
    Store,
    Study,
    average,
    run,
    wide_steps,
)
from tempo.metrics import compare, total_variation
from tempo.reporting.figures import Picture, distributions, lines_by

MODES = ("isolated", "visible")
MOST_DIFFERENT = 3  # steps of the own prompt whose distributions are pictured
NEARLY_ALL = Margin(0.95, "one prompt in twenty may differ by more than ten times the floor")
ALL = Planned(1.0, source="identical modes agree on every prompt")
# The truth at which an equivalence should be found. A distance is never negative, so its spread is
# about its mean.
HALF = "half the margin, with a spread as large: what a distance with such a mean has"
HALF_TV = Planned(BFLOAT16_TV / 2, sd=BFLOAT16_TV / 2, source=HALF)
HALF_OF_TEN = Planned(ONE_IN_TWENTY / 2, sd=ONE_IN_TWENTY / 2, source=HALF)
SHARE = "half the margin; the spread of a share of about nine steps, (0.025 * 0.975 / 9) ** 0.5"
HALF_OF_STEPS = Planned(ONE_IN_TWENTY / 2, sd=0.052, source=SHARE)
Distances = dict[str, float]  # of two distributions, by metric

study = Study(
    "exp2",
    title="Logits",
    captures=("logits",),
    registered="2026-11-23",
    space=Space(visibility=("isolated", "both")),
)


@dataclass(frozen=True)
class Case:
    """What one prompt gives: distances of distributions, a list over steps for each comparison."""

    dtype: str
    distances: dict[str, list[Distances]]
    same: float = 0.0  # the largest difference of a probability of one row computed twice

    def at(self, comparison: str, metric: str = "tv") -> list[float]:
        """One metric of a comparison, step by step; empty where no set is wide or read."""
        return [distances[metric] for distances in self.distances[comparison]]


@study.measure
def both_modes(prompt: Prompt) -> Steps[Case]:
    """Isolated mode chooses the sets, both modes replay them, and visible mode also runs free."""
    source, free = yield [run(prompt), run(prompt, visibility="visible", capture=())]
    isolated, visible = yield [run(prompt, replay=source, visibility=mode) for mode in MODES]
    steps, wide = range(len(source.steps)), wide_steps(source)
    before, after = parts_of(source)
    pairs = enumerate(zip(source.steps, free.steps, strict=False))
    parted = min([k for k, (a, b) in pairs if a.tokens != b.tokens], default=len(free.steps) - 1)
    readers = [reader(isolated, visible, k) for k in after]
    if prompt.store:
        _keep(prompt, prompt.store, isolated, visible, readers)
    distances = {
        "before": [compare_steps(isolated, k, visible, k) for k in before],
        "readers": readers,
        "siblings": [{"tv": at_members(total_variation, isolated, visible, k)} for k in wide],
        "one step earlier": [compare_steps(isolated, k, isolated, k - 1) for k in after],
        "same mode": [compare_steps(source, k, isolated, k) for k in steps],
        "free runs": [compare_steps(source, k, free, k) for k in after if k <= parted],
    }
    same = same_row(prompt.lm, "probability")
    return Case(dtype=prompt.lm.provenance()["dtype"], same=same, distances=distances)


def parts_of(trace: Trace) -> tuple[range, range]:
    """The steps up to the first wide set, and those after it."""
    steps, wide = range(len(trace.steps)), wide_steps(trace)
    first = wide[0] if wide else len(steps)
    return steps[: first + 1], steps[first + 1 :]


def compare_steps(one: Trace, step: int, other: Trace, other_step: int) -> Distances:
    """All distances between the distributions of two steps, and whether both select one set."""
    p, q = one.steps[step].distribution, other.steps[other_step].distribution
    reach = [set(np.flatnonzero(d >= one.spec.threshold)) or {d.argmax()} for d in (p, q)]
    return {**compare(p, q), "same_selection": float(reach[0] == reach[1])}


def reader(isolated: Trace, visible: Trace, step: int) -> Distances:
    """The distances between both modes at a step, and which wide set was the last before it."""
    last = max(k for k in wide_steps(isolated) if k < step)
    place = {"step": step, "width": isolated.widths[last], "lag": step - last}
    return {**place, **compare_steps(isolated, step, visible, step)}


def _keep(
    prompt: Prompt, store: Store, isolated: Trace, visible: Trace, readers: Sequence[Distances]
) -> None:
    keep_log(store, isolated)
    arrays = slot_arrays(isolated)
    for mode, trace in zip(MODES, (isolated, visible), strict=True):
        arrays[f"{mode}_distributions"] = np.stack([step.distribution for step in trace.steps])
        arrays |= {f"{mode}_logits_{k:03d}": logits_of(trace, k) for k in range(len(trace.steps))}
    store.arrays("logits_distributions", **arrays)
    about = {"unit": "nats", "first": "isolated", "second": "visible"}
    store.json("kl_divergence", {"readers": readers, **about})
    most = []
    for reader in sorted(readers, key=lambda reader: -reader["tv"])[:MOST_DIFFERENT]:
        k = int(reader["step"])
        texts = likely_texts(prompt.lm, *(t.steps[k].distribution for t in (isolated, visible)))
        most.append({"step": k, "tv": reader["tv"], "texts": texts})
    store.json("most_different", {"steps": most})
    columns = ("step", "width", "lag", "tv", "kl", "top1", "top10")
    keep_table(store, f"{prompt.text!r}: {isolated.text}", readers, columns)


@study.claim(always=True, control="readers")
def test_same_before_first_wide_set(case: Case, where: str = "before") -> bool | None:
    """Until the first wide set has been read, both modes agree to the last bit.

    Largest difference of any probability is exactly 0; on a mixture of experts, whose rows share
    matrix products, at most ten times the rounding floor.
    Control: the same comparison after the first wide set.
    """
    return at_most(max(case.at(where, "max_abs"), default=None), case.same)


@study.claim(share_above=NEARLY_ALL, planned=ALL, control="one step earlier")
def test_identical_logits(case: Case, where: str = "readers") -> bool | None:
    """After a wide set the modes still give identical distributions.

    Share of prompts on which every reader agrees within 5.2e-05 in total variation (in float32).
    Control: the distribution one step earlier in the same run.
    """
    return at_most(max(case.at(where), default=None), rounding("tv", case.dtype))


@study.claim(within=BFLOAT16_TV, planned=HALF_TV, control="one step earlier")
def test_equivalent_at_reader(case: Case, where: str = "readers") -> float | None:
    """The next step's distributions are equivalent within the bfloat16 margin.

    Total variation at the next reader, mean over steps after a wide set.
    Control: the distribution one step earlier in the same run.
    """
    return average(case.at(where))


@study.claim(within=BFLOAT16_TV, planned=HALF_TV, control="one step earlier")
def test_equivalent_at_siblings(case: Case, where: str = "siblings") -> float | None:
    """The siblings' own outputs are equivalent within the bfloat16 margin.

    Total variation of the members' own distributions, mean over members and wide sets.
    Control: the distribution one step earlier in the same run.
    """
    return average(case.at(where))


@study.claim(less_than=ONE_IN_TWENTY, planned=HALF_OF_TEN, control="one step earlier")
def test_same_top_10(case: Case, where: str = "readers") -> float | None:
    """Both modes rank the same ten tokens highest.

    Share of the top ten that differs at the next reader, mean over steps after a wide set.
    Control: the same against the distribution one step earlier.
    """
    return average([1 - overlap for overlap in case.at(where, "top10")])


@study.claim(less_than=ONE_IN_TWENTY, planned=HALF_OF_STEPS, control="one step earlier")
def test_same_selection(case: Case, where: str = "readers") -> float | None:
    """Both modes would select the same set next.

    Share of steps after a wide set at which the selected sets differ.
    Control: the same against the distribution one step earlier.
    """
    return average([1 - same for same in case.at(where, "same_selection")])


@study.pictures
def pictures(store: Store, cases: Sequence[Case]) -> Iterator[Picture]:
    """The most different steps of the own prompt, and divergence by step, width and lag."""
    arrays = store.load("logits_distributions")
    for rank, worst in enumerate(store.load_json("most_different")["steps"], start=1):
        p, q = (arrays[f"{mode}_distributions"][worst["step"]] for mode in MODES)
        texts = {int(token): text for token, text in worst["texts"].items()}
        title = f"Where the modes differ most, {rank}: step {worst['step']}"
        yield distributions(p, q, texts, title=title)
    labels = {"width": "width of the last wide set", "lag": "steps since the last wide set"}
    for key, label in {"step": "step", **labels}.items():
        prompts = [zip(c.at("readers", key), c.at("readers", "kl"), strict=True) for c in cases]
        if points := grouped_means(prompts):
            caption = (
                f"KL(isolated || visible) of the next distribution by {label}; mean and 95 % "
                "interval over prompts. 0: the modes agree; 0.005: as float32 and bfloat16 differ."
            )
            lines, title = {"KL at the next reader": points}, f"Divergence by {key}"
            yield lines_by(lines, label, "KL in nats", title, caption)


def test_rounding_floor_is_far_below_the_effect(cases: list[Case]) -> None:
    """The same mode in another batch differs by rounding only, so a larger difference is real."""
    assert all(max(case.at("same mode")) < rounding("tv", case.dtype) / 2 for case in cases)


def test_raw_distributions_sum_to_one(store: Store) -> None:
    """Full-vocabulary distributions are on disk, without pickle."""
    arrays = store.load("logits_distributions")
    for mode in MODES:
        sums = arrays[f"{mode}_distributions"].sum(axis=1, dtype=np.float64)
        assert np.abs(sums - 1).max() < 1e-4
