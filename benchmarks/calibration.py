"""How often the verdicts of tempo.claims are false, and how often they find what is there.

`python -m benchmarks.calibration [RESULTS]` simulates every test on null data, on planted effects
and at the margin. It also reads the cases that `pytest test_experiments` left in RESULTS (default:
results). It writes reports/published/calibration.json and calibration.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from benchmarks.registered import read_cases, real_model, registered_power
from benchmarks.simulation import (
    EFFECTS,
    FEWER,
    RESAMPLES,
    SIMULATIONS,
    SIZES,
    STANDARD_ERRORS,
    Scenario,
    exact_share_rates,
    limit,
    null_scenarios,
    power_scenarios,
    sign_flips_alone,
    simulate,
)  # fmt: skip
from tempo import statistics
from tempo.claims import ALPHA

TARGET = Path("reports/published")
Row = Mapping[str, Any]

INTRODUCTION = f"""\
Made by `python -m benchmarks.calibration`. Alpha is {ALPHA:g}, for false verdicts of both kinds
together. The mean of the data (or their pseudomedian, or share) lies exactly on the margin, so that
every verdict is false. "Left" means that the long tail is on the left. n counts prompts.

Each cell has {SIMULATIONS} simulations; cells of maps and of power have {FEWER}.
The simulation error ({STANDARD_ERRORS} standard errors) allows a share of {limit(SIMULATIONS):.1%}
({limit(FEWER):.1%}). Larger shares are **bold**. "Proportion" is summed exactly, not simulated.
No test of a mean holds for all distributions (Bahadur & Savage 1956).
These rates are for the distributions listed."""
SIGN_FLIPS_ALONE = """\
Sign flips alone, without the studentised bootstrap and the guard against skewness, would give these
shares for the mean:"""
REGISTERED = """\
Power is for the effect that each claim plans, corrected for its whole family. "Needed" is the
number of prompts for a power of 0.9. "Real shape" takes the values measured on SmolLM2-135M,
shifted and scaled to the planned effect and spread."""
REAL = """\
Two kinds of data in which there is no difference: a mode against itself on random parts of the
suite, and paired measures with the labels of random prompts exchanged. The table shows the share of
verdicts that find a difference."""


def statistics_sha256() -> str:
    """A hash of what the statistics compute on fixed data, to know what was calibrated.

    It is of their results, not of their code: another wording does not undo a calibration.
    """
    before, statistics.NUM_RESAMPLES = statistics.NUM_RESAMPLES, RESAMPLES  # as in the simulations
    rng = np.random.default_rng(0)
    samples = [rng.normal(0.1, 1, 60), rng.lognormal(0, 1, 40) - 1, rng.integers(0, 3, 25) / 2.0]
    found = []
    for sample in samples:
        for test in ("greater", "less", "equivalent"):
            found += [statistics.mean_test(sample, test, 0.2)]
            found += [statistics.pseudomedian_test(sample, test, 0.2)]
    found += [statistics.share_test(held, 40, 0.3) for held in (3, 12, 30)]
    found += [statistics.map_test(rng.normal(0.1, 1, (30, 6)), 0.2)]
    statistics.NUM_RESAMPLES = before
    numbers = []
    for result in found:
        numbers.append([f"{value:.9g}" for value in result[:6]])
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def _cell(job: tuple[str, Scenario]) -> dict[str, Any]:
    """One row of the null or the power table."""
    kind, scenario = job
    statistics.NUM_RESAMPLES = RESAMPLES
    row = {
        "test": scenario.claim.id,
        "draw": scenario.draw,
        "n": scenario.n,
        "shift": scenario.shift,
        "simulations": scenario.simulations,
    }
    row |= simulate(scenario)._asdict()
    if kind == "null" and scenario.claim.id == "mean":
        row["sign_flips_alone"] = sign_flips_alone(scenario._replace(simulations=FEWER))
    print(row, flush=True)
    return {"kind": kind, **row}


def main(results: Path) -> None:
    """Measure, print, write."""
    cases = read_cases(results)
    # now, because the file may be edited during the run
    made_by = statistics_sha256()
    jobs = [("null", s) for s in null_scenarios()] + [("power", s) for s in power_scenarios()]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        registered, real = pool.submit(registered_power, cases), pool.submit(real_model, cases)
        found = list(pool.map(_cell, jobs))
        report = {
            "statistics_sha256": made_by,
            "alpha": ALPHA,
            "standard_errors": STANDARD_ERRORS,
            "resamples": RESAMPLES,
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "null": [r for r in found if r.pop("kind") == "null"] + exact_share_rates(),
            "power": found[len(null_scenarios()) :],
            "registered": registered.result(),
            "real": real.result(),
        }
    TARGET.mkdir(parents=True, exist_ok=True)
    (TARGET / "calibration.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (TARGET / "calibration.md").write_text(markdown(report), encoding="utf-8")
    print(f"written: {TARGET}/calibration.json and .md")


def markdown(report: Mapping[str, Any]) -> str:
    """The calibration as tables for people."""
    null = report["null"]
    tests = list(dict.fromkeys(row["test"] for row in null))
    parts = [
        "# Calibration of the verdicts",
        INTRODUCTION,
        "## False verdicts",
        *(_by_size(null, test, "false", ALPHA) for test in tests),
        SIGN_FLIPS_ALONE,
        _by_size(null, "mean", "sign_flips_alone", ALPHA),
        "## False verdicts at alpha 0.01, which Holm's correction requires in a family of five",
        *(_by_size(null, test, "false_at_01", 0.01) for test in tests),
        "## 95 % intervals that miss the truth",
        *(_by_size(null, test, "missed", ALPHA) for test in tests),
        "## One direction not tested, because the data are too skewed",
        _by_size(null, "mean", "too_skewed", 1.0),
        "## Power for a mean above the margin, in standard deviations "
        "(alpha 0.05, a family of one)",
        _power_table(report["power"]),
        "## Power of the registered claims at 160 prompts",
        REGISTERED,
        _registered_table(report["registered"]),
        "## Differences found on the real model where there are none",
        REAL,
        _real_table(report["real"]),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _by_size(rows: Sequence[Row], test: str, key: str, alpha: float) -> str:
    """One line a distribution, one column a size."""
    found: dict[str, dict[int, str]] = {}
    for row in rows:
        if row["test"] == test and key in row:
            allowed = limit(row["simulations"], alpha) if row["simulations"] else alpha
            share = f"{row[key]:.1%}"
            cell = share if row[key] <= allowed + 1e-9 else f"**{share}**"
            found.setdefault(row["draw"], {})[row["n"]] = cell
    lines = []
    for draw, cells in found.items():
        lines.append([draw, *(cells[n] for n in SIZES)])
    return _table([test, *(f"n = {n}" for n in SIZES)], lines)


def _power_table(rows: Sequence[Row]) -> str:
    """One line a distribution and size, one column an effect."""
    found: dict[tuple[str, int], list[str]] = {}
    for row in rows:
        found.setdefault((row["draw"], row["n"]), []).append(f"{row['supported']:.2f}")
    # distributions in the order of the rows, sizes rising
    draws = list(dict.fromkeys(row["draw"] for row in rows))
    ordered = sorted(found, key=lambda place: (draws.index(place[0]), place[1]))
    lines = []
    for draw, n in ordered:
        cells = found[draw, n]
        lines.append([f"{draw}, {n}", *(cells[i] for i in range(len(EFFECTS)))])
    return _table(["distribution, n", *(f"{e:g} sd" for e in EFFECTS)], lines)


def _registered_table(rows: Sequence[Row]) -> str:
    """One line a claim."""
    head = [
        "claim",
        "planned effect",
        "planned sd",
        "family",
        "needed",
        "power, normal",
        "power, real shape",
    ]
    lines = []
    for row in rows:
        line = [
            row["claim"],
            f"{row['effect']:.3g}",
            f"{row['sd']:.3g}" if row["sd"] else "n/a",
            str(row["family"]),
            str(row["needed"]),
            f"{row['power']:.2f}",
            f"{row['power_real_shape']:.2f}" if "power_real_shape" in row else "n/a",
        ]
        lines.append(line)
    return _table(head, lines)


def _real_table(rows: Sequence[Row]) -> str:
    """One line a kind of data, one column a size."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["data"], []).append(f"{row['false']:.1%}")
    lines = [[data, *cells] for data, cells in found.items()]
    return _table(["data", *(f"n = {n}" for n in SIZES)], lines)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results"))
