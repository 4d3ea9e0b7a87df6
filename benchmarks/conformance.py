"""Compare the engine with the oracle on the real model, over twenty prompts.

All settings are run: every visibility, positions, readout and weighting, isolated layers, and in
the comparison "posterior" weightings by query, pruning and selection rules.
`python -m benchmarks.conformance [COMPARISON ...]` prints the largest deviations and writes them to
reports/published/conformance.json.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

import tempo
from fixtures.suite import suite_texts
from tempo import LanguageModel, RunSpec, Trace
from tempo.selection import select
from tempo.spec import BY_QUERY, POSITIONS, READOUTS, VISIBILITIES, WEIGHTINGS

BY_KEY = [weighting for weighting in WEIGHTINGS if weighting not in BY_QUERY]
SETTINGS = [
    {"visibility": v, "positions": p, "readout": r, "weighting": w}
    for v, p, r, w in itertools.product(VISIBILITIES, POSITIONS, READOUTS, BY_KEY)
] + [
    {"visibility": "visible", "isolated_layers": (10, 20), "isolated_mass": mass}
    for mass in ("spread", "self")
]
# What needs to know which member came before which, and the rules that choose a set.
LATTICES: list[dict[str, Any]] = [
    {"visibility": v, "positions": p, "weighting": w}
    for v, p, w in itertools.product(VISIBILITIES, POSITIONS, BY_QUERY)
] + [
    {"visibility": "visible", "weighting": "posterior", "isolated_layers": (10, 20)},
    {"weighting": "posterior", "weighting_layers": (10, 20)},
    {"visibility": "visible", "weighting": "probability", "weighting_layers": (0, 10)},
    {"prune": 0.2},
    {"prune": 0.2, "prune_by": "attention"},
    {"weighting": "posterior", "prune": 0.2},
    {"weighting": "posterior", "visibility": "visible", "prune": 0.3, "prune_by": "attention"},
    {"weighting": "best_parent", "prune": 0.2},
    {"threshold": 0.0, "top_k": 3},
    {"threshold": 0.0, "top_p": 0.4, "max_width": 8},
    {"threshold": 0.02, "top_p": 0.5, "min_p": 0.1},
    {"schedule": (0.3, 0.06, 0.03)},
    {"threshold": 0.0, "sample": 3},
    {"weighting": "posterior", "threshold": 0.02, "sample": 4, "seed": 1},
]
# Both sides are float32. Each is up to 4e-5 in attention from float64, and partly in the same
# direction.
BOUNDS = {"probabilities": 1e-5, "logits": 1e-3, "attention": 5e-5, "kv": 2e-3, "links": 1e-4}
# In units of the largest number of a run's residuals.
BOUNDS |= {"residual": 1e-5}
# transformers computes softmax and norms in float32 even in a float64 model. So about 1e-6 is the
# best there is.
FLOAT64_BOUNDS = dict.fromkeys(BOUNDS, 1e-5) | {"logits": 1e-4, "kv": 1e-4}
# name: (engine, oracle, settings, bounds)
# The second one only says how far float32 is from the truth. It has no bounds.
COMPARISONS: dict[str, tuple[str, str, list[dict[str, Any]], dict[str, float]]] = {
    "float32": ("float32", "float32", SETTINGS, BOUNDS),
    "float32 against float64": ("float32", "float64", SETTINGS, {}),
    "float64": ("float64", "float64", SETTINGS[::6], FLOAT64_BOUNDS),
    "posterior": ("float32", "float32", LATTICES, BOUNDS),
}
# Rounding may add or drop a token whose probability is this near the threshold.
# It may exchange two tokens whose probabilities are this near each other.
TIE = 1e-5
NUM_PROMPTS, NUM_STEPS, THRESHOLD = 20, 3, 0.06


def specs(prompt: str, settings: Sequence[dict[str, Any]]) -> list[RunSpec]:
    """One run for each of the settings, with everything captured."""
    common = {
        "prompt": prompt,
        "threshold": THRESHOLD,
        "max_steps": NUM_STEPS,
        "capture": ("attention", "logits", "kv", "residual"),
    }
    return [RunSpec(**common | chosen) for chosen in settings]


def deviations(oracle: LanguageModel, run: Trace) -> dict[str, Any]:
    """The largest differences of a run from the oracle's, each having chosen its sets freely.

    If the sets differ, nothing after that step can be compared. Then `from_a_tie` says how far the
    oracle is from a tie there, which rounding may decide either way.
    """
    exact = tempo.reference.generate(oracle, **run.spec.model_dump())
    if run.sets != exact.sets:
        return {"same_sets": False, "from_a_tie": _from_a_tie(run, exact)}
    if [step.dropped for step in run.steps] != [step.dropped for step in exact.steps]:
        raise AssertionError(f"{run.spec!r} drops other members than the oracle's")
    pairs = list(zip(run.steps, exact.steps, strict=True))
    links = [(a.links, b.links) for a, b in pairs[:-1] if a.links is not None]
    cached = [(getattr(run, n), getattr(exact, n)) for n in ("keys", "values", "raw_keys")]
    return {
        "same_sets": True,
        "widest": max(run.widths),
        "probabilities": max(_largest_gap(a.distribution, b.distribution) for a, b in pairs),
        "logits": max(_largest_gap(a.logits, b.logits) for a, b in pairs),
        "attention": max(_largest_gap(a.attention, b.attention) for a, b in pairs),
        "kv": max(_largest_gap(a, b) for a, b in cached),
        "links": max((_largest_gap(a, b) for a, b in links), default=0.0),
        "residual": max(_largest_gap(a.residual, b.residual) for a, b in pairs)
        / max(float(np.abs(b.residual).max()) for _, b in pairs),
        "forbidden": _largest_forbidden(run),
    }


def _largest_gap(one: Any, other: Any) -> float:
    return float(np.abs(one - other).max())


def _from_a_tie(run: Trace, exact: Trace) -> float:
    """How far the oracle is from a tie in the first step where the two differ, in probability.

    For tokens that only one of them has, it is the distance from the threshold. If only the order
    differs, it is the distance between the tokens at the same place. Under other rules than a
    threshold it is how far the two distributions are apart, if each gives its set by the rules. It
    is infinite if no step differs.
    """
    for k, (one, other) in enumerate(zip(run.steps, exact.steps, strict=False)):
        if one.tokens != other.tokens:
            p = other.distribution
            rules = run.spec.rules(k, run.prompt_tokens)
            if any(rules[name] is not None for name in ("top_p", "min_p", "sample")):
                chosen = select(torch.from_numpy(one.distribution), **rules)
                follows = chosen.tokens == one.tokens
                return _largest_gap(one.distribution, p) if follows else float("inf")
            if only := sorted(set(one.tokens) ^ set(other.tokens)):
                return float(np.abs(p[only] - rules["threshold"]).max())
            return float(np.abs(p[one.tokens] - p[other.tokens]).max())
    return float("inf")


def _largest_forbidden(run: Trace) -> float:
    """The largest weight between two members that may not see each other."""
    largest = 0.0
    for step in run.steps:
        width = len(step.tokens)
        may = {
            "isolated": np.eye(width),
            "visible": np.ones((width, width)),
            "causal": np.tri(width),
        }[run.spec.visibility]
        block = step.attention[..., step.slots[0] :]
        largest = max(largest, float(block[..., may == 0].max(initial=0.0)))
    return largest


def main() -> int:
    """Measure, print, write; 1 if a run breaks its bound."""
    names = sys.argv[1:]
    if unknown := [name for name in names if name not in COMPARISONS]:
        raise SystemExit(f"no comparison {unknown[0]!r}; expected any of {', '.join(COMPARISONS)}")
    prompts = suite_texts(NUM_PROMPTS)
    target = Path("reports/published/conformance.json")
    report: dict[str, Any] = (
        json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    )
    report |= {
        "prompts": prompts,
        "settings": len(SETTINGS) + len(LATTICES),
        "steps": NUM_STEPS,
        "threshold": THRESHOLD,
    }
    beyond = 0
    for name in names or COMPARISONS:
        engine, oracle, settings, bounds = COMPARISONS[name]
        with (
            tempo.load_model("smollm2-135m", dtype=engine) as lm,
            tempo.load_model("smollm2-135m", dtype=oracle) as exact,
        ):
            found = measure(lm, exact, prompts, settings, bounds)
        report["comparisons"] = report.get("comparisons", {}) | {name: found}
        beyond += found["beyond_a_bound"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(json.dumps({name: found}, indent=1), flush=True)
    return int(beyond > 0)


def measure(
    lm: LanguageModel,
    oracle: LanguageModel,
    prompts: Sequence[str],
    settings: Sequence[dict[str, Any]],
    bounds: Mapping[str, float],
) -> dict[str, Any]:
    """The largest deviations over all prompts and settings, and how many runs break a bound."""
    began = time.perf_counter()
    found = []
    for prompt in track(prompts, description=str(lm.dtype), disable=not sys.stderr.isatty()):
        runs = tempo.generate_batch(lm, specs(prompt, settings), max_rows=24)
        found += [deviations(oracle, run) for run in runs]
    return {
        "oracle": str(oracle.dtype).removeprefix("torch."),
        **summary(found, bounds),
        "seconds": round(time.perf_counter() - began),
        **lm.provenance(),
    }


def summary(found: Sequence[Mapping[str, Any]], bounds: Mapping[str, float]) -> dict[str, Any]:
    """The largest of each deviation, and how many runs break a bound."""
    matched = [f for f in found if f["same_sets"]]
    ties = [f["from_a_tie"] for f in found if not f["same_sets"]]
    quantities = ("probabilities", "logits", "attention", "kv", "links", "residual", "forbidden")
    num_over = 0
    for f in matched:
        num_over += any(f[name] > bound for name, bound in bounds.items())
    largest = {}
    for name in quantities:
        largest[name] = max(f[name] for f in matched)
    return {
        "runs": len(found),
        "other_sets": len(ties),
        "other_sets_from_a_tie": max(ties, default=None),
        "runs_with_a_wide_set": sum(f["widest"] > 1 for f in matched),
        **largest,
        "beyond_1e-5": sum(max(f["probabilities"], f["attention"]) > 1e-5 for f in matched),
        "bounds": dict(bounds),
        "beyond_a_bound": sum(tie > TIE for tie in ties) + num_over,
    }


if __name__ == "__main__":
    sys.exit(main())
