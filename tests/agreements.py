"""The engine against two references, and what may not change a run: capture, company, order, replay, saving.

Each function raises Violation where what it states does not hold.
"""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path

import tempo
from tempo import LanguageModel
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

THRESHOLD, STEPS = 0.05, 4  # of free runs: sets of one to about eight on the tiny models


def outputs_equal_float64(lm: LanguageModel, case: Case) -> None:
    """Logits of every member and distribution of every step: those of the whole lattice in one forward pass."""
    run, exact = forced(lm, case), replayed64(lm, case)
    for k, step in enumerate(run.steps):
        near(
            logits(run, k),
            exact.out.logits[exact.slots.slots(k, len(case.prompt))],
            LOGITS,
            f"logits of set {k}",
        )
        near(step.distribution, exact.distributions[k], PROBABILITIES, f"distribution of step {k}")


def captured_attention_equals_float64(lm: LanguageModel, case: Case) -> None:
    """What is recorded of a set are the weights of the pass that holds it, siblings included."""
    run, exact = forced(lm, case), replayed64(lm, case)
    for k in range(len(run.steps)):
        weights = attention(run, k)
        expected = exact.out.attention[
            :, :, exact.slots.slots(k, len(case.prompt)), : weights.shape[-1]
        ]
        near(weights, expected, WEIGHTS, f"attention of set {k}")


def cached_states_equal_float64(lm: LanguageModel, case: Case) -> None:
    """Keys before and after rotation, and values, of every slot."""
    run, exact = forced(lm, case), replayed64(lm, case)
    for name in ("raw_keys", "keys", "values"):
        near(getattr(run, name), getattr(exact.out, name), STATES, name)


def a_free_run_equals_the_oracle(lm: LanguageModel, case: Case) -> None:
    """The same sets as tempo.reference chooses, and every array it records."""
    settings = {"threshold": THRESHOLD, "max_steps": STEPS, "capture": EVERYTHING, **case.settings}
    run, oracle = (
        generate(lm, case.prompt, **settings)
        for generate in (tempo.generate, tempo.reference.generate)
    )
    expect(run.sets == oracle.sets, f"sets {run.sets}, the oracle's {oracle.sets}")
    for k, (step, other) in enumerate(zip(run.steps, oracle.steps, strict=True)):
        near(step.distribution, other.distribution, PROBABILITIES, f"distribution of step {k}")
        near(logits(run, k), logits(oracle, k), LOGITS, f"logits of set {k}")
        near(attention(run, k), attention(oracle, k), WEIGHTS, f"attention of set {k}")
    for name in ("keys", "values", "raw_keys"):
        near(getattr(run, name), getattr(oracle, name), STATES, name)
    for name in ("slot_token", "slot_position", "slot_step"):
        near(getattr(run, name), getattr(oracle, name), 0.0, name)


def a_replay_in_detail_equals_the_oracle(lm: LanguageModel, case: Case) -> None:
    """Positions and weights given for each member, and siblings isolated in some layers, with their mass spread or kept."""
    places = [
        [len(case.prompt) + 2 * k + (i + case.pick) % 2 for i in range(len(s))]
        for k, s in enumerate(case.sets)
    ]
    weights = [
        [1 / (1 + (i + k + case.pick) % 3) for i in range(len(members))]
        for k, members in enumerate(case.sets)
    ]
    last = (lm.num_layers - 1, lm.num_layers)
    for changes in (
        {"replay_positions": places, "replay_weights": weights},
        {"visibility": "visible", "isolated_layers": (0, 1)},
        {
            "visibility": "visible",
            "isolated_layers": last,
            "isolated_mass": "self",
            "replay_weights": weights,
        },
    ):
        run = forced(lm, case, **changes)
        oracle = tempo.reference.generate(lm, **run.spec.model_dump())
        for k, (step, other) in enumerate(zip(run.steps, oracle.steps, strict=True)):
            near(
                step.distribution,
                other.distribution,
                PROBABILITIES,
                f"{changes}: distribution of step {k}",
            )
            near(logits(run, k), logits(oracle, k), LOGITS, f"{changes}: logits of set {k}")
            near(
                attention(run, k), attention(oracle, k), WEIGHTS, f"{changes}: attention of set {k}"
            )
        near(run.keys, oracle.keys, STATES, f"{changes}: keys")
        near(run.slot_position, oracle.slot_position, 0.0, f"{changes}: positions")


def capture_never_changes_a_run(lm: LanguageModel, case: Case) -> None:
    """Whatever is recorded, the sets and their distributions are the same to the bit."""
    settings = {"threshold": THRESHOLD, "max_steps": STEPS, **case.settings}
    bare = tempo.generate(lm, case.prompt, **settings)
    for captured in (*((name,) for name in EVERYTHING), EVERYTHING):
        run = tempo.generate(lm, case.prompt, capture=captured, **settings)
        expect(run.sets == bare.sets, f"capture {captured}: sets {run.sets}, without {bare.sets}")
        for k, (step, other) in enumerate(zip(run.steps, bare.steps, strict=True)):
            same(
                step.distribution,
                other.distribution,
                f"capture {captured}: distribution of step {k}, with and without",
            )


def company_changes_nothing_but_rounding(lm: LanguageModel, case: Case) -> None:
    """Other runs in the batch (other prompts, widths, modes, captures), fewer rows at a time, another order."""
    common = {"threshold": THRESHOLD, "max_steps": STEPS, **case.settings}
    of_case = {
        "prompt": case.prompt,
        "replay": case.sets,
        "capture": ("attention", "kv"),
        **case.settings,
    }
    specs = [
        tempo.RunSpec(**of_case | {"capture": EVERYTHING}),
        tempo.RunSpec(
            **of_case | {"prompt": case.prompt[:1], "visibility": "visible", "weighting": "count"}
        ),
        tempo.RunSpec(
            **common
            | {"prompt": case.prompt[::-1] * 2, "visibility": "causal", "capture": EVERYTHING}
        ),
        tempo.RunSpec(
            **common
            | {
                "prompt": case.prompt,
                "max_width": 2,
                "positions": "sequential",
                "capture": "logits",
            }
        ),
        # these are the same as the first until they part
        *(
            tempo.RunSpec(**of_case | {"visibility": mode, "capture": EVERYTHING})
            for mode in ("isolated", "visible")
        ),
        *(
            tempo.RunSpec(
                **common | {"prompt": case.prompt, "visibility": mode, "capture": EVERYTHING}
            )
            for mode in ("isolated", "visible")
        ),
    ]
    alone = [tempo.generate_batch(lm, [spec])[0] for spec in specs]
    batches = {f"{rows} rows": tempo.generate_batch(lm, specs, max_rows=rows) for rows in (2, 16)}
    batches["reversed"] = tempo.generate_batch(lm, specs[::-1])[::-1]
    for name, (spec, run, other) in (
        (name, runs) for name, batch in batches.items() for runs in zip(specs, batch, alone, strict=True)
    ):  # fmt: skip
        expect(
            run.spec == spec and run.sets == other.sets,
            f"{name}: sets {run.sets} of another run than {other.sets}",
        )
        for k, (step, single) in enumerate(zip(run.steps, other.steps, strict=True)):
            near(
                step.distribution,
                single.distribution,
                PROBABILITIES,
                f"{name}: distribution of step {k}",
            )
            expect(
                (step.attention is None) == ("attention" not in spec.capture),
                f"{name}: captured what was not asked for",
            )
            if "logits" in spec.capture:
                near(logits(run, k), logits(other, k), LOGITS, f"{name}: logits of set {k}")
            if "attention" in spec.capture:
                near(
                    attention(run, k), attention(other, k), WEIGHTS, f"{name}: attention of set {k}"
                )
        if "kv" in spec.capture:
            near(run.keys, other.keys, STATES, f"{name}: keys")


def a_run_leaves_nothing_behind(lm: LanguageModel, case: Case) -> None:
    """A run, others of every mode, and the run again: equal to the bit."""
    first = forced(lm, case)
    for visibility, positions, weighting in (
        ("isolated", "sequential", "count"),
        ("visible", "shared", "probability"),
    ):
        forced(lm, case, visibility=visibility, positions=positions, weighting=weighting)
    same_runs(forced(lm, case), first, "the run again, after others")


def replaying_a_free_run_reproduces_it(lm: LanguageModel, case: Case) -> None:
    """Forcing the sets that a run chose gives that run, to rounding: a replay forwards them together."""
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
                expect(
                    found is not None and found.dtype == saved.dtype,
                    f"{name} came back as {getattr(found, 'dtype', None)}",
                )
            else:
                expect(found == saved, f"{name} came back as {found!r}, saved was {saved!r}")
