"""The registered claims: their power, and their verdicts on a model compared with itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from scipy import stats

from benchmarks.simulation import (
    FEWER,
    RESAMPLES,
    RESAMPLES_CORRECTED,
    SIMULATIONS,
    SIZES,
    far_away,
    identity,
    plain_claim,
)
from fixtures.suite import suite
from tempo import statistics
from tempo.claims import Claim, judge, num_needed
from tempo.harness.checks import case_class
from tempo.harness.plan import Plan, family_sizes, plans_of
from tempo.records import read_jsonl

# Samples for the power of one claim and shape.
DRAWS = FEWER // 4


EXPERIMENTS = Path(__file__).resolve().parent.parent / "test_experiments"


def plans() -> list[Plan]:
    """A plan for every config of the experiments, over the whole suite."""
    found = []
    for path in sorted(EXPERIMENTS.glob("test_exp*.py")):
        module = importlib.import_module(f"test_experiments.{path.stem}")
        found += plans_of(module.study, path, [], suite(), None)
    return found


def read_cases(results: Path) -> dict[str, list[Any]]:
    """The cases of every config under `results`, by the config's name."""
    found = {}
    for plan in plans():
        reader = TypeAdapter(case_class(plan.study))
        records, damaged = read_jsonl(results / plan.folder / "cases.jsonl")
        if damaged:
            raise SystemExit(f"{damaged[0]}; run tempo doctor --repair {results}")
        newest = {record["prompt"]: record["case"] for record in records}
        known = [case for case in newest.values() if case is not None]
        found[plan.name] = [reader.validate_python(case) for case in known]
    if missing := [name for name, cases in found.items() if not cases]:
        raise SystemExit(
            f"no cases of {', '.join(missing)} under {results}/; "
            "run pytest test_experiments first, or name its --results"
        )
    return found


def registered_power(cases: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The power of every registered claim for its planned effect, at the suite's size.

    It is corrected for the claim's whole family.
    """
    statistics.NUM_RESAMPLES = RESAMPLES_CORRECTED
    rows = []
    every = plans()
    sizes = family_sizes(every)
    # of a study with several configs, the first one's cases stand for all
    for plan in {plan.study.name: plan for plan in reversed(every)}.values():
        for claim in [test.claim for test in plan.study.claims.values()]:
            if claim.planned_effect is None:
                continue
            size = sizes[claim.family or claim.id]
            tested = replace(claim, values=identity, control=far_away, alpha=claim.alpha / size)
            values = map(claim.values, cases[plan.name])
            real = [value for value in values if value is not None]
            row = {
                "claim": claim.id,
                "effect": claim.planned_effect,
                "sd": claim.planned_sd,
                "family": size,
                "needed": num_needed(claim, size),
                "draws": DRAWS,
                **_power(tested, np.array(real, dtype=np.float64)),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def _power(claim: Claim, real: np.ndarray) -> dict[str, float]:
    """Shares of the right verdict among samples of 160 prompts.

    `power`: samples of a normal shape. `power_real_shape`: of the measured values' own shape.
    """
    effect, n = float(claim.planned_effect or 0.0), max(SIZES)
    if claim.test == "equivalent":
        holds = abs(effect) < claim.margin
    else:
        holds = (effect < claim.margin) == (claim.test == "less")
    right = "SUPPORTED" if holds else "REFUTED"
    if claim.test == "proportion":
        held = np.arange(n + 1)
        verdicts = [judge(claim, [True] * h + [False] * (n - h)).verdict == right for h in held]
        return {"power": float(stats.binom.pmf(held, n, effect)[verdicts].sum())}
    shapes: dict[str, Callable[[np.random.Generator], np.ndarray]] = {}
    if claim.test == "somewhere":
        means = np.full(claim.cells, claim.margin - claim.planned_sd)
        means[0] = effect
        shapes["power"] = lambda rng: rng.normal(means, claim.planned_sd, (n, claim.cells))
    else:
        shapes["power"] = lambda rng: rng.normal(effect, claim.planned_sd, n)
        if np.ptp(real) > 0:
            scaled = (real - real.mean()) / real.std()
            shapes["power_real_shape"] = lambda rng: (
                effect + claim.planned_sd * rng.choice(scaled, n)
            )
    rng = np.random.default_rng(0)
    found = {}
    for name, draw in shapes.items():
        verdicts = [judge(claim, list(draw(rng))).verdict == right for _ in range(DRAWS)]
        found[name] = float(np.mean(verdicts))
    return found


# {config: (what a mode against itself measures, the margin from which it would be a difference)}
SAME_MODE = {
    "exp1_attention_weights_isolated": ("context_tv_same_mode", 0.02),
    "exp2_logits_comparison": ("floor_tv", 0.02),
    "exp3_cross_parallel_attention": ("same_mode_kl", 0.005),
}
# {config: two measures of the same prompt}
PAIRS = {
    "exp2_logits_comparison": ("reader_tv", "one_step_tv"),
    "exp3_cross_parallel_attention": ("shared_previous_score", "distance_one_score"),
    "exp5_edge_case_high_parallelism": ("mode_tv", "bfloat16_tv"),
}


def real_model(cases: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Verdicts on measurements of a real model in which there is no difference to find.

    They are a mode against itself, and paired measures with their labels shuffled.
    """
    statistics.NUM_RESAMPLES = RESAMPLES
    rng = np.random.default_rng(0)
    rows = []
    for config, (key, margin) in SAME_MODE.items():
        values = np.array([case[key] for case in cases[config] if case[key] is not None])
        claim = plain_claim("greater", margin=margin)
        for n in SIZES:
            samples = (rng.choice(values, n, replace=False) for _ in range(FEWER))
            verdicts = [judge(claim, list(sample)).verdict for sample in samples]
            row = {
                "data": f"the same mode twice: {config} {key} above {margin:g}",
                "n": n,
                "draws": FEWER,
                "false": verdicts.count("SUPPORTED") / FEWER,
                "most": float(values.max()),
            }
            rows.append(row)
    for config, (one, other) in PAIRS.items():
        pairs = [(case[one], case[other]) for case in cases[config]]
        differences = np.array([a - b for a, b in pairs if a is not None and b is not None])
        for n in SIZES:
            shuffled = [
                rng.choice(differences, n, replace=False) * rng.choice([-1.0, 1.0], n)
                for _ in range(SIMULATIONS)
            ]
            verdicts = [judge(plain_claim("greater"), list(values)).verdict for values in shuffled]
            row = {
                "data": f"labels shuffled: {config} {one} against {other}",
                "n": n,
                "draws": SIMULATIONS,
                "false": 1 - verdicts.count("INCONCLUSIVE") / SIMULATIONS,
            }
            rows.append(row)
            print(rows[-1], flush=True)
    return rows
