"""How often the verdicts of tempo.claims are false, and how often they find what is there.

`python -m benchmarks.calibration [RESULTS]` simulates every test on null data, on planted effects and at the margin, reads the
cases that `pytest test_experiments` left in RESULTS (default: results), and writes reports/published/calibration.json and .md.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy
from scipy import stats

from fixtures.study import EXPERIMENTS, Study, families
from tempo import statistics
from tempo.claims import ALPHA, POWER, Claim, declared_sizes, judge, num_needed
from tempo.reporting.findings import read_jsonl

TARGET = Path("reports/published")
SIZES = (10, 40, 160)
SIMULATIONS = 4000  # a share of 0.05 is then known to 0.0034
FEWER = 1000  # for power and for what is only compared
# (m + 1) * alpha / 2 is a whole number for alpha 0.05 and 0.01, so that fewer resamples than in use cost no exactness.
RESAMPLES = 399
# Of a registered claim's power, where Holm's correction asks for a smaller p than 399 resamples can give.
RESAMPLES_CORRECTED = 1999
# One true rate in 740 is seen this far beyond itself.
STANDARD_ERRORS = 3
MAP = (30, 9)  # layers by heads of the maps that `somewhere` is tried on
EFFECTS = (0.1, 0.2, 0.3, 0.5, 0.8)  # in standard deviations

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def _right_skewed() -> dict[str, Draw]:
    return {
        "exponential": lambda rng, shape: rng.exponential(1, shape) - 1,
        "lognormal 0.5": lambda rng, shape: rng.lognormal(0, 0.5, shape) - math.exp(0.125),
        "lognormal 1": lambda rng, shape: rng.lognormal(0, 1, shape) - math.exp(0.5),
        "skewed ties": lambda rng, shape: rng.binomial(3, 0.25, shape) / 3 - 0.25,
        "sparse zeros": lambda rng, shape: rng.binomial(1, 0.1, shape) * rng.exponential(1, shape) - 0.1,
    }


def _mirrored(draw: Draw) -> Draw:
    return lambda rng, shape: -draw(rng, shape)


SYMMETRIC: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(0, 1, shape),
    "Student t3": lambda rng, shape: rng.standard_t(3, shape),
    "ties": lambda rng, shape: rng.integers(0, 4, shape) / 3 - 0.5,
}
# Every one has mean 0; "..., left" has its long tail on the left.
DRAWS: dict[str, Draw] = SYMMETRIC | _right_skewed() | {f"{name}, left": _mirrored(draw) for name, draw in _right_skewed().items()}


class Scenario(NamedTuple):
    """One cell of the table: a claim's test on n values of a distribution, its mean (or what is estimated) at `shift`."""

    claim: Claim
    draw: str
    n: int
    shift: float = 0.0
    simulations: int = SIMULATIONS
    seed: int = 0


class Rates(NamedTuple):
    """Shares of simulations. `false` and `false_at_01`: a verdict of either kind at alpha 0.05 and 0.01."""

    supported: float
    refuted: float
    false: float
    false_at_01: float
    missed: float  # 95 % intervals that miss the true value
    too_skewed: float  # one direction was not tested at all


def plain_claim(test: str, **changes: Any) -> Claim:
    """A claim about the numbers themselves. Its control has no spread, so it is cheap and never in the way."""
    fields: dict[str, Any] = {
        "id": test, "statement": "", "statistic": "", "refuted_by": "", "control_statement": "a constant",
        "values": identity, "control": far_away, "test": test,
    }  # fmt: skip
    return Claim(**fields | changes)


def identity(case: Any) -> Any:
    return case


def far_away(case: Any) -> Any:
    return np.zeros_like(case)


def centre(draw: str, claim: Claim) -> float:
    """The value that the claim's estimand has under a distribution of mean 0."""
    if claim.estimand == "mean" or draw in SYMMETRIC:
        return 0.0
    pairs = DRAWS[draw](np.random.default_rng(1), (2, 1_000_000))
    return float(np.median(pairs.mean(axis=0)))


def simulate(scenario: Scenario) -> Rates:
    """The rates of one cell, from seeded data."""
    claim, draw, n, shift, simulations, seed = scenario
    rng = np.random.default_rng([seed, n, *scenario.draw.encode(), *claim.id.encode()])
    shape = (n, *MAP) if claim.test == "somewhere" else (n,)
    shift -= centre(draw, claim)
    truth = scenario.shift
    found = []
    for _ in range(simulations):
        finding = judge(claim, list(DRAWS[draw](rng, shape) + shift))
        smaller = np.nanmin([finding.p, finding.p_against, 1.0])
        missed = not math.isnan(finding.low) and not finding.low <= truth <= finding.high
        found.append((
            finding.verdict == "SUPPORTED", finding.verdict == "REFUTED", finding.verdict != "INCONCLUSIVE",
            smaller < 0.01, missed, "skewed" in finding.reason,
        ))  # fmt: skip
    return Rates(*np.mean(found, axis=0).round(4).tolist())


def sign_flips_alone(scenario: Scenario) -> float:
    """The false verdicts of the plain two-sided sign-flip test on the same data: what the other half of the test is for."""
    rng = np.random.default_rng([scenario.seed, scenario.n, *scenario.draw.encode(), *scenario.claim.id.encode()])
    flips = [min(statistics.sign_flip(DRAWS[scenario.draw](rng, (scenario.n,)))) for _ in range(scenario.simulations)]
    return float(np.mean(2 * np.array(flips) < ALPHA))


def limit(simulations: int, alpha: float = ALPHA) -> float:
    """The largest share that simulation error allows where the true one is alpha."""
    return alpha + STANDARD_ERRORS * math.sqrt(alpha * (1 - alpha) / simulations)


def null_scenarios() -> list[Scenario]:
    """Data for which every verdict is false: the estimand lies exactly on the margin."""
    mean, ranks = plain_claim("greater", id="mean"), plain_claim("greater", id="pseudomedian", estimand="pseudomedian")
    one_tail = [name for name in DRAWS if not name.endswith("left")]  # both directions are counted, so one side shows both
    found = [Scenario(claim, draw, n) for claim in (mean, ranks) for draw in one_tail for n in SIZES]
    equal = plain_claim("equivalent", id="equivalence", margin=2.0)
    found += [Scenario(equal, draw, n, shift=2.0) for draw in DRAWS for n in SIZES]
    cells = plain_claim("somewhere", id="somewhere")
    return found + [Scenario(cells, draw, n, simulations=FEWER) for draw in DRAWS for n in SIZES]


def power_scenarios() -> list[Scenario]:
    """Planted effects, in standard deviations of the data (those of the t3 are infinite-tailed: its scale is 3 ** 0.5)."""
    claim = plain_claim("greater", id="mean")
    sds = {"normal": 1.0, "exponential": 1.0, "exponential, left": 1.0, "Student t3": math.sqrt(3)}
    return [Scenario(claim, d, n, effect * sd, FEWER) for d, sd in sds.items() for effect in EFFECTS for n in SIZES]


def exact_share_rates() -> list[dict[str, Any]]:
    """False verdicts of the exact binomial test with the share on the margin: summed over all counts, not simulated."""
    rows = []
    for n in SIZES:
        for margin in (0.05, 0.5, 0.95):
            chance = stats.binom.pmf(np.arange(n + 1), n, margin)
            found = [statistics.share(held, n, margin) for held in range(n + 1)]
            missed = [not r.low <= margin <= r.high for r in found]
            false, at_01 = ([min(r.p, r.p_against) < alpha for r in found] for alpha in (ALPHA, 0.01))
            rows.append({
                "test": "proportion", "draw": f"share {margin:g}", "n": n, "simulations": 0, "false": float(chance[false].sum()),
                "false_at_01": float(chance[at_01].sum()), "missed": float(chance[missed].sum()),
            })  # fmt: skip
    return rows


def studies() -> list[Study]:
    """The experiments beside the tests."""
    found = []
    for path in sorted(EXPERIMENTS.glob("test_exp*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        found.append(module.STUDY)
    return found


def read_cases(results: Path) -> dict[str, list[dict[str, Any]]]:
    """The cases of every config under `results`, by the config's name."""
    configs = [family for study in studies() for family in families(study.experiment)]
    found = {f.name: [record["case"] for record in read_jsonl(results / f.config.results / "cases.jsonl")] for f in configs}
    if missing := [name for name, cases in found.items() if not cases]:
        raise SystemExit(f"no cases of {', '.join(missing)} under {results}/; run pytest test_experiments first, or name its --results")
    return found


def registered_power(cases: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The power of every registered claim for the effect it registers, at the suite's size, corrected for its whole family."""
    statistics.NUM_RESAMPLES = RESAMPLES_CORRECTED
    rows = []
    for study in studies():
        found = families(study.experiment)
        sizes = declared_sizes(claim for _ in found for claim in study.claims)
        for claim in study.claims:
            if claim.planned_effect is None:
                continue
            size = sizes[claim.family or claim.id]
            tested = replace(claim, values=identity, control=far_away, alpha=claim.alpha / size)
            real = [v for case in cases[found[0].name] if (v := claim.values(case)) is not None]
            rows.append({
                "claim": claim.id, "effect": claim.planned_effect, "sd": claim.planned_sd, "family": size,
                "needed": num_needed(claim, size), **_power(tested, np.array(real, dtype=np.float64)),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def _power(claim: Claim, real: np.ndarray) -> dict[str, float]:
    """Shares of the right verdict among samples of 160: of a normal shape, and of the measured values' own shape."""
    effect, n = float(claim.planned_effect or 0.0), max(SIZES)
    inside = abs(effect) < claim.margin if claim.test == "equivalent" else (effect < claim.margin) == (claim.test == "less")
    right = "SUPPORTED" if inside else "REFUTED"
    if claim.test == "proportion":
        held = np.arange(n + 1)
        verdicts = [judge(claim, [True] * h + [False] * (n - h)).verdict == right for h in held]
        return {"power": float(stats.binom.pmf(held, n, effect)[verdicts].sum())}
    shapes: dict[str, Callable[[np.random.Generator], np.ndarray]] = {}
    if claim.test == "somewhere":
        one = np.zeros(MAP)
        one[0, 0] = 1
        shapes["power"] = lambda rng: (
            rng.normal(claim.margin - claim.planned_sd, claim.planned_sd, (n, *MAP)) + one * (effect - claim.margin + claim.planned_sd)
        )
    else:
        shapes["power"] = lambda rng: rng.normal(effect, claim.planned_sd, n)
        if np.ptp(real) > 0:
            scaled = (real - real.mean()) / real.std()
            shapes["power_real_shape"] = lambda rng: effect + claim.planned_sd * rng.choice(scaled, n)
    rng, rounds = np.random.default_rng(0), FEWER // 4
    return {name: float(np.mean([judge(claim, list(draw(rng))).verdict == right for _ in range(rounds)])) for name, draw in shapes.items()}


SAME_MODE = {  # by config: (what a mode against itself measures, the margin beyond which it would be a difference)
    "exp1_attention_weights_isolated": ("context_tv_same_mode", 0.02),
    "exp2_logits_comparison": ("floor_tv", 0.02),
    "exp3_cross_parallel_attention": ("same_mode_kl", 0.005),
}
PAIRS = {  # by config: two measures of the same prompt
    "exp2_logits_comparison": ("reader_tv", "one_step_tv"),
    "exp3_cross_parallel_attention": ("shared_previous_score", "distance_one_score"),
    "exp5_edge_case_high_parallelism": ("mode_tv", "bfloat16_tv"),
}


def real_model(cases: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Verdicts on what a real model gave: a mode against itself, and paired measures with their labels shuffled."""
    statistics.NUM_RESAMPLES = RESAMPLES
    rng = np.random.default_rng(0)
    rows = []
    for config, (key, margin) in SAME_MODE.items():
        values = np.array([case[key] for case in cases[config] if case[key] is not None])
        for n in SIZES:
            claim = plain_claim("greater", margin=margin)
            verdicts = [judge(claim, list(rng.choice(values, n, replace=False))).verdict for _ in range(FEWER)]
            rows.append({"data": f"the same mode twice: {config} {key} above {margin:g}", "n": n, "draws": FEWER,
                         "false": verdicts.count("SUPPORTED") / FEWER, "most": float(values.max())})  # fmt: skip
    for config, (one, other) in PAIRS.items():
        pairs = [(case[one], case[other]) for case in cases[config] if case[one] is not None and case[other] is not None]
        differences = np.array([a - b for a, b in pairs])
        for n in SIZES:
            shuffled = [rng.choice(differences, n, replace=False) * rng.choice([-1.0, 1.0], n) for _ in range(SIMULATIONS)]
            verdicts = [judge(plain_claim("greater"), list(values)).verdict for values in shuffled]
            rows.append({"data": f"labels shuffled: {config} {one} against {other}", "n": n, "draws": SIMULATIONS,
                         "false": 1 - verdicts.count("INCONCLUSIVE") / SIMULATIONS})  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def statistics_sha256() -> str:
    """Names the code whose calibration this is."""
    return hashlib.sha256(Path(statistics.__file__).read_bytes()).hexdigest()


def _cell(job: tuple[str, Scenario]) -> dict[str, Any]:
    kind, scenario = job
    statistics.NUM_RESAMPLES = RESAMPLES
    row = {"test": scenario.claim.id, "draw": scenario.draw, "n": scenario.n, "shift": scenario.shift, "simulations": scenario.simulations}
    row |= simulate(scenario)._asdict()
    if kind == "null" and scenario.claim.id == "mean":
        row["sign_flips_alone"] = sign_flips_alone(scenario._replace(simulations=FEWER))
    print(row, flush=True)
    return {"kind": kind, **row}


def main(results: Path) -> None:
    """Measure, print, write."""
    cases = read_cases(results)
    jobs = [("null", s) for s in null_scenarios()] + [("power", s) for s in power_scenarios()]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        registered, real = pool.submit(registered_power, cases), pool.submit(real_model, cases)
        found = list(pool.map(_cell, jobs))
        report = {
            "statistics_sha256": statistics_sha256(), "alpha": ALPHA, "standard_errors": STANDARD_ERRORS, "resamples": RESAMPLES,
            "numpy": np.__version__, "scipy": scipy.__version__,
            "null": [r for r in found if r.pop("kind") == "null"] + exact_share_rates(),
            "power": found[len(null_scenarios()) :], "registered": registered.result(), "real": real.result(),
        }  # fmt: skip
    TARGET.mkdir(parents=True, exist_ok=True)
    (TARGET / "calibration.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (TARGET / "calibration.md").write_text(markdown(report), encoding="utf-8")
    print(f"written: {TARGET}/calibration.json and .md")


def main_from_command_line() -> None:
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))
