"""The engine against two references, and against what must not change a run.

These are capture, other runs in the batch, their order, replay and saving.
Each function raises Violation where its statement does not hold.
"""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import tempo
from tempo import LanguageModel, Trace
from tempo.spec import BY_QUERY
from tests.checks import (
    EVERYTHING,
    LOGITS,
    PROBABILITIES,
    STATES,
    WEIGHTS,
    Case,
    attention,
    expect,
    forced,
    logits,
    near,
    replayed64,
    same,
    same_runs,
)
from tests.lattice_identities import RULES

# Of free runs: sets of one to about eight tokens on the tiny models.
THRESHOLD, STEPS = 0.05, 4


def outputs_equal_float64(lm: LanguageModel, case: Case) -> None:
    """Every member's logits and every step's distribution equal the float64 reference.

    The reference computes the whole lattice in one forward pass.
    """
    run, exact = forced(lm, case), replayed64(lm, case)
    for k, step in enumerate(run.steps):
        expected = exact.out.logits[exact.slots.slots(k, len(case.prompt))]
        near(logits(run, k), expected, LOGITS, f"logits of set {k}")
        near(step.distribution, exact.distributions[k], PROBABILITIES, f"distribution of step {k}")


def captured_attention_equals_float64(lm: LanguageModel, case: Case) -> None:
    """The weights recorded of a set are those of the pass that holds it, siblings included."""
    run, exact = forced(lm, case), replayed64(lm, case)
    for k in range(len(run.steps)):
        weights = attention(run, k)
        queries = exact.slots.slots(k, len(case.prompt))
        expected = exact.out.attention[:, :, queries, : weights.shape[-1]]
        near(weights, expected, WEIGHTS, f"attention of set {k}")


def cached_states_equal_float64(lm: LanguageModel, case: Case) -> None:
    """Keys before and after rotation, and values, equal the float64 reference in every slot."""
    run, exact = forced(lm, case), replayed64(lm, case)
    for name in ("raw_keys", "keys", "values"):
        near(getattr(run, name), getattr(exact.out, name), STATES, name)


def a_free_run_equals_the_oracle(lm: LanguageModel, case: Case) -> None:
    """A free run chooses the same sets as tempo.reference and records the same arrays."""
    settings = {"threshold": THRESHOLD, "max_steps": STEPS, "capture": EVERYTHING, **case.settings}
    run = tempo.generate(lm, case.prompt, **settings)
    oracle = tempo.reference.generate(lm, case.prompt, **settings)
    expect(run.sets == oracle.sets, f"sets {run.sets}, the oracle's {oracle.sets}")
    for k, (step, other) in enumerate(zip(run.steps, oracle.steps, strict=True)):
        near(step.distribution, other.distribution, PROBABILITIES, f"distribution of step {k}")
        near(logits(run, k), logits(oracle, k), LOGITS, f"logits of set {k}")
        near(attention(run, k), attention(oracle, k), WEIGHTS, f"attention of set {k}")
    for name in ("keys", "values", "raw_keys"):
        near(getattr(run, name), getattr(oracle, name), STATES, name)
    for name in ("slot_token", "slot_position", "slot_step"):
        near(getattr(run, name), getattr(oracle, name), 0.0, name)
    same_runs(run, oracle, "engine and oracle", rounded=True)


def a_run_under_other_rules_equals_the_oracle(lm: LanguageModel, case: Case) -> None:
    """Free runs under each selection rule and pruning choose and drop what tempo.reference does.

    They also link their sets alike.
    """
    settings = {"max_steps": STEPS, "capture": ("logits", "attention"), **case.settings}
    prunings: list[dict[str, Any]] = [{}]
    if case.readout == "mixture":
        prunings += [{"prune": 0.3}, {"prune": 0.3, "prune_by": "attention"}]
    for i, rules in enumerate(RULES):
        changed = settings | rules | prunings[(case.pick + i) % len(prunings)]
        run = tempo.generate(lm, case.prompt, **changed)
        same_runs(
            run, tempo.reference.generate(lm, case.prompt, **changed), str(rules), rounded=True
        )


def a_replay_in_detail_equals_the_oracle(lm: LanguageModel, case: Case) -> None:
    """A replay equals tempo.reference with given positions and weights, or in parts of the layers.

    Layers that isolate siblings are tried with the set's mass spread and with it kept. Weights are
    tried in the first and in the last layer alone.
    """
    positions, weights = [], []
    for k, members in enumerate(case.sets):
        first = len(case.prompt) + 2 * k
        positions.append([first + (i + case.pick) % 2 for i in range(len(members))])
        weights.append([1 / (1 + (i + k + case.pick) % 3) for i in range(len(members))])
    last = (lm.num_layers - 1, lm.num_layers)
    spread = {"visibility": "visible", "isolated_layers": (0, 1)}
    kept = {"visibility": "visible", "isolated_layers": last, "isolated_mass": "self"}
    # weights that are given cannot be combined with those that posteriors give
    given = {} if case.weighting in BY_QUERY else {"replay_weights": weights}
    linked = {"weighting": "posterior", "readout": "mixture", "replay_links": _some_links(case)}
    weighted = linked | {"weighting_layers": (0, 1)}
    last_weighted = {"weighting": "none", "replay_weights": weights, "weighting_layers": last}
    moved = {"replay_positions": positions}
    every = (moved | given, spread, kept | given, linked, weighted, last_weighted)
    for changes in every:
        run = forced(lm, case, **changes)
        oracle = tempo.reference.generate(lm, **run.spec.model_dump())
        for k, (step, other) in enumerate(zip(run.steps, oracle.steps, strict=True)):
            found, expected = step.distribution, other.distribution
            near(found, expected, PROBABILITIES, f"{changes}: distribution of step {k}")
            near(logits(run, k), logits(oracle, k), LOGITS, f"{changes}: logits of set {k}")
            found, expected = attention(run, k), attention(oracle, k)
            near(found, expected, WEIGHTS, f"{changes}: attention of set {k}")
        near(run.keys, oracle.keys, STATES, f"{changes}: keys")
        near(run.slot_position, oracle.slot_position, 0.0, f"{changes}: positions")


def _some_links(case: Case) -> list[list[list[float]]]:
    """Links through the case's sets that no model gave."""
    links = []
    for k, (members, of_next) in enumerate(zip(case.sets, case.sets[1:], strict=False)):
        shares = [
            [1 + (i + u + k + case.pick) % 3 for u, _ in enumerate(of_next)]
            for i, _ in enumerate(members)
        ]
        totals = [sum(column) for column in zip(*shares, strict=True)]
        links.append(
            [[share / total for share, total in zip(row, totals, strict=True)] for row in shares]
        )
    return links


def capture_never_changes_a_run(lm: LanguageModel, case: Case) -> None:
    """Whatever is recorded, the sets and their distributions are the same to the bit."""
    settings = {"threshold": THRESHOLD, "max_steps": STEPS, **case.settings}
    bare = tempo.generate(lm, case.prompt, **settings)
    for captured in (*((name,) for name in EVERYTHING), EVERYTHING):
        run = tempo.generate(lm, case.prompt, capture=captured, **settings)
        expect(run.sets == bare.sets, f"capture {captured}: sets {run.sets}, without {bare.sets}")
        for k, (step, other) in enumerate(zip(run.steps, bare.steps, strict=True)):
            what = f"capture {captured}: distribution of step {k}, with and without"
            same(step.distribution, other.distribution, what)


def company_changes_nothing_but_rounding(lm: LanguageModel, case: Case) -> None:
    """Other runs in the batch, fewer rows at a time, and another order change only rounding.

    The other runs differ in prompt, widths, mode and capture.
    """
    common = {"prompt": case.prompt, "capture": EVERYTHING, **case.settings}
    replayed = common | {"replay": case.sets}
    of_mixture = {"readout": "mixture", "replay": case.sets}
    free = common | {"threshold": THRESHOLD, "max_steps": STEPS}
    of_one_token = {"prompt": case.prompt[:1], "visibility": "visible", "weighting": "count"}
    of_twice_as_many = {"prompt": case.prompt[::-1] * 2, "visibility": "causal"}
    narrow = {"max_width": 2, "positions": "sequential", "capture": "logits"}
    settings = [
        replayed,
        replayed | of_one_token | {"capture": ("attention", "kv")},
        free | of_twice_as_many,
        free | narrow,
        # these are the same as the first until they part
        replayed | {"visibility": "isolated"},
        replayed | {"visibility": "visible"},
        free | {"visibility": "isolated"},
        free | {"visibility": "visible"},
        # these part from each other only by what each member's own path weighs
        common | of_mixture | {"weighting": "none"},
        common | of_mixture | {"weighting": "posterior"},
        common | of_mixture | {"weighting": "best_parent", "prune": 0.3},
    ]
    specs = [tempo.RunSpec(**each) for each in settings]
    alone = [tempo.generate_batch(lm, [spec])[0] for spec in specs]
    batches = {f"{rows} rows": tempo.generate_batch(lm, specs, max_rows=rows) for rows in (2, 16)}
    batches["reversed"] = tempo.generate_batch(lm, specs[::-1])[::-1]
    for name, batch in batches.items():
        for run, spec, single in zip(batch, specs, alone, strict=True):
            expect(run.spec == spec, f"{name}: the run of another spec")
            _same_but_for_rounding(run, single, name)


def _same_but_for_rounding(run: Trace, single: Trace, name: str) -> None:
    """Nothing if a run of a batch equals the same run alone, to rounding, else a Violation."""
    expect(run.sets == single.sets, f"{name}: sets {run.sets} of another run than {single.sets}")
    captured = run.spec.capture
    for k, (step, other) in enumerate(zip(run.steps, single.steps, strict=True)):
        found, expected = step.distribution, other.distribution
        near(found, expected, PROBABILITIES, f"{name}: distribution of step {k}")
        as_asked = (step.attention is None) == ("attention" not in captured)
        expect(as_asked, f"{name}: captured what was not asked for")
        if "logits" in captured:
            near(logits(run, k), logits(single, k), LOGITS, f"{name}: logits of set {k}")
        if "attention" in captured:
            found, expected = attention(run, k), attention(single, k)
            near(found, expected, WEIGHTS, f"{name}: attention of set {k}")
    if "kv" in captured:
        near(run.keys, single.keys, STATES, f"{name}: keys")


def a_run_leaves_nothing_behind(lm: LanguageModel, case: Case) -> None:
    """A run is equal to the bit before and after others of every mode."""
    first = forced(lm, case)
    forced(lm, case, visibility="isolated", positions="sequential", weighting="count")
    forced(lm, case, visibility="visible", positions="shared", weighting="probability")
    same_runs(forced(lm, case), first, "the run again, after others")


def replaying_a_free_run_reproduces_it(lm: LanguageModel, case: Case) -> None:
    """Forcing the sets that a run chose gives that run, to rounding.

    It is not equal to the bit, because a replay forwards the sets together.
    """
    run = tempo.generate(
        lm, case.prompt, threshold=THRESHOLD, max_steps=STEPS, capture=EVERYTHING, **case.settings
    )
    again = tempo.generate_batch(lm, [run.spec.but(replay=run)])[0]
    same_runs(again, run, "the replay", rounded=True)
    expect(again.stop_reason == "replay", f"stopped by {again.stop_reason}")


def saving_and_loading_is_the_identity(lm: LanguageModel, case: Case) -> None:
    """Every field of a trace comes back: arrays to the bit and in their type, the rest equal."""
    run = forced(lm, case)
    with tempfile.TemporaryDirectory() as folder:
        loaded = tempo.load_trace(run.save(Path(folder) / "trace"))
    same_runs(loaded, run, "the loaded trace")
    pairs = [(run, loaded), *zip(run.steps, loaded.steps, strict=True)]
    for one, other in pairs:
        for name in (field.name for field in fields(one) if field.name != "steps"):
            saved, found = getattr(one, name), getattr(other, name)
            if hasattr(saved, "dtype"):
                dtype = getattr(found, "dtype", None)
                expect(dtype == saved.dtype, f"{name} came back as {dtype}")
            else:
                expect(found == saved, f"{name} came back as {found!r}, saved was {saved!r}")
