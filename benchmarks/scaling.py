"""What workers cost, how they scale on this machine, and where many of them would saturate.

    python -m benchmarks.scaling [--model smollm2-135m] [--small] [--out reports/published]

Measured: the overhead of a unit of work by itself and with large answers, the same chunks of runs
by one process and by one and two workers, what the driver spends on a case, and how long a claim
takes to be judged. Simulated from these figures: 64 workers, 10,000 prompts, 20 models.
Writes scaling.json and scaling.md. A busy machine shows in the least and the most of each ratio.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import tempo
from benchmarks.shapes import text_of
from benchmarks.timing import alternate, clock, significant
from tempo import files
from tempo.claims import Claim, judge
from tempo.records import append_jsonl
from tempo.workers.local import LocalWorkers
from tempo.workers.specs import Specs
from tempo.workers.work import model_setup, parts_of

PUBLISHED = Path("reports/published")
MEGABYTE = 1_000_000
# What is simulated: a sweep of a size that a laptop cannot do.
WORKERS, PROMPTS, MODELS, STUDIES, PROMPTS_A_WINDOW = 64, 10_000, 20, 10, 16
TRAVELLING = ("1 worker, whole traces", "1 worker")
RUNS_A_CASE = 7  # exp2 and exp3 asked for 101 runs for 14 cases of SmolLM2
SPREAD = 0.3  # of the time that windows take, around their mean
CLAIMS = 100  # of a session of all studies


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    units: int = 200
    chunks: int = 12
    rows: int = 8
    steps: int = 6
    rounds: int = 3
    cases: int = 300
    prompts: tuple[int, ...] = (100, 1000, 10_000)


SMALL = Size(units=4, chunks=40, rows=1, steps=2, rounds=1, cases=5, prompts=(20,))


class Echo:
    """Work that is none: it answers with as many bytes as a unit says, at once."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self.made_by: dict[str, str] = {}

    def do(self, unit: int) -> str:
        return "x" * unit


class Widths(Specs):
    """Work as a window is: it computes as much as `Specs`, and answers in a few numbers."""

    def do(self, unit: Any) -> Any:
        specs = [tempo.RunSpec(**record) for record in unit]
        return [trace.widths for _, trace in tempo.stream(self.lm, specs, **self.limits)]


def _setup(work: str, **more: Any) -> dict[str, Any]:
    common = {"work": work, "name": "benchmark", "owner": "", "threads": torch.get_num_threads()}
    return {**common, "made_by": {}, "paths": [os.getcwd()], **more}


def seconds_a_unit(setup: Mapping[str, Any], units: Sequence[Any], number: int) -> float:
    """Seconds from one answer to the next, from when every worker has given one.

    What starting takes is left out so.
    """
    came, workers = [], set()
    for _, answer in LocalWorkers(number).run(setup, units):
        if len(workers) == number or not came:
            came.append(time.perf_counter())
        else:
            came = [time.perf_counter()]
        workers.add(answer["worker"])
    if len(workers) < number or len(came) < 2:
        raise RuntimeError(f"{number} workers are not at it before {len(units)} units are done")
    return (came[-1] - came[0]) / (len(came) - 1)


def overhead(size: Size) -> dict[str, float]:
    """Seconds that a unit takes in which nothing is computed, by the bytes of its answer."""
    setup = _setup("benchmarks.scaling:Echo")
    found = {}
    for bytes_of_answer in (0, MEGABYTE):
        units = [bytes_of_answer] * size.units
        found[f"{bytes_of_answer} bytes"] = significant(seconds_a_unit(setup, units, 1))
    return found


def speed(lm: tempo.LanguageModel, size: Size) -> dict[str, Any]:
    """Seconds a chunk of runs, in this process and by one and two workers, and their ratios."""
    specs = [
        tempo.RunSpec(prompt=text_of(lm, 24, start), max_steps=size.steps, threshold=0.05)
        for start in range(size.chunks * size.rows)
    ]
    chunks = [specs[i : i + size.rows] for i in range(0, len(specs), size.rows)]
    units = [[spec.model_dump(mode="json") for spec in chunk] for chunk in chunks]
    limits = {"max_rows": size.rows, "budget": None}
    setup = _setup("", **model_setup(lm), **limits) | {"made_by": parts_of(lm)}
    windows = setup | {"work": "benchmarks.scaling:Widths"}
    traces = setup | {"work": "tempo.workers.specs:Specs"}

    def here() -> float:
        # the first chunk is left out, as it is of the workers
        times = [clock(lambda c=chunk: list(tempo.stream(lm, c))) for chunk in chunks]
        return sum(times[1:]) / (len(times) - 1)

    works: dict[str, Callable[[], float]] = {"one process": here}
    works["1 worker"] = lambda: seconds_a_unit(windows, units, 1)
    works["2 workers"] = lambda: seconds_a_unit(windows, units, 2)
    works["1 worker, whole traces"] = lambda: seconds_a_unit(traces, units, 1)
    times = alternate(works, size.rounds, warm_up=False)
    found: dict[str, Any] = {name: significant(median(each)) for name, each in times.items()}
    for name, over, under in (
        ("one worker over one process", "1 worker", "one process"),
        ("two workers: how many times as fast as one", "1 worker", "2 workers"),
        ("a stream, whose traces travel whole, over small answers", *TRAVELLING),
    ):
        ratios = [a / b for a, b in zip(times[over], times[under], strict=True)]
        found[name] = {
            "ratio": significant(median(ratios)),
            "least": significant(min(ratios)),
            "most": significant(max(ratios)),
        }
    return found


def driver(size: Size) -> dict[str, float]:
    """Seconds that the driver spends on one case: reading its answer, and keeping it on disk."""
    case = {"key": "k" * 24, "prompt": "p" * 100, "case": {str(i): i / 7 for i in range(60)}}
    with files.staging(Path(tempfile.gettempdir()) / "tempo-scaling") as folder:
        path = files.make_folder(folder) / "cases.jsonl"
        keep = clock(lambda: [append_jsonl(path, [case]) for _ in range(size.cases)])
    text = json.dumps(case)
    read = clock(lambda: [json.loads(text) for _ in range(size.cases)])
    return {
        "keep a case": significant(keep / size.cases),
        "read a case": significant(read / size.cases),
        "bytes of a case": len(text),
    }


def judging(size: Size) -> dict[str, float]:
    """Seconds that one claim about a mean takes, by the number of prompts."""
    claim = Claim(
        id="benchmark.mean",
        statement="A mean is above a margin.",
        statistic="the value",
        values=float,
        test="greater",
        refuted_by="a mean below it",
        control=lambda case: -float(case),
        control_statement="the negative",
        margin=0.1,
        margin_reason="a benchmark",
    )
    drawn = random.Random(0)
    found = {}
    for number in size.prompts:
        cases = [drawn.gauss(0.3, 1) for _ in range(number)]
        found[str(number)] = significant(clock(judge, claim, cases, {}))
    return found


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes that a simulated sweep is made of.

    window: seconds of a worker; driver: of the driver for each window; store: bytes of its answer;
    bandwidth: bytes a second of what carries answers; start: until a worker has its model.
    """

    window: float
    driver: float
    store: float
    bandwidth: float
    start: float


def simulate(
    costs: Costs, windows: int, workers: int, drivers: int = 1, seed: int = 0
) -> dict[str, float]:
    """How sessions go: each window to the next free worker, answers one after another.

    drivers: so many sessions share the workers, and take their windows in turn.

    >>> simulate(Costs(1.0, 0.0, 0.0, 1e9, 0.0), windows=100, workers=10)["busy"] > 0.8
    True
    """
    drawn = random.Random(seed)
    free = [costs.start] * workers
    done, carried, worked = [0.0] * drivers, 0.0, 0.0  # when drivers and carrier are free again
    answers: list[float] = []
    for _ in range(windows):
        begun = heapq.heappop(free)
        takes = costs.window * drawn.uniform(1 - SPREAD, 1 + SPREAD)
        worked += takes
        heapq.heappush(free, begun + takes)
        heapq.heappush(answers, begun + takes)
    moving = costs.store / costs.bandwidth
    for number in range(windows):
        carried = max(carried, heapq.heappop(answers)) + moving
        turn = number % drivers
        done[turn] = max(done[turn], carried) + costs.driver
    end = max(done)
    return {
        "seconds": end,
        "busy": worked / (end * workers),
        "driver": windows * costs.driver / drivers / end,
        "store": windows * moving / end,
    }


def saturation(costs: Costs) -> dict[str, float]:
    """From how many workers on a single driver, or what carries answers, is the limit."""
    moving = costs.store / costs.bandwidth
    limits = {"driver": costs.driver, "store": moving}
    return {name: significant(costs.window / each) for name, each in limits.items() if each}


def simulation(costs: Costs, judge_seconds: float) -> dict[str, Any]:
    """The large sweep, a model after another and each model's session beside the others."""
    windows = -(-PROMPTS // PROMPTS_A_WINDOW)
    by_workers = {str(n): simulate(costs, windows, n) for n in (1, 4, 16, WORKERS, 256, 1024)}
    one = by_workers[str(WORKERS)]["seconds"]
    beside = simulate(costs, windows * MODELS, WORKERS, MODELS)["seconds"]
    rounded = {
        n: {name: significant(value) for name, value in found.items()}
        for n, found in by_workers.items()
    }
    return {
        "costs": {name: significant(value) for name, value in vars(costs).items()},
        "windows of a model": windows,
        "one model, by workers": rounded,
        "saturates at workers": saturation(costs),
        "hours, a model after another": significant(MODELS * (one + judge_seconds) / 3600),
        "hours, all models beside one another": significant((beside + judge_seconds) / 3600),
        "hours of judging, a model": significant(judge_seconds / 3600),
        "years of one worker": significant(windows * MODELS * costs.window / 3600 / 24 / 365),
    }


def measure(model: str, size: Size) -> dict[str, Any]:
    """All figures, and the simulation made of them."""
    began = time.perf_counter()
    with tempo.load_model(model) as lm:
        load = clock(lambda: tempo.load_model(model).close())
        chunk = speed(lm, size)
        made = lm.provenance()
    costs_of_unit, costs_of_case, judged = overhead(size), driver(size), judging(size)
    empty, full = costs_of_unit["0 bytes"], costs_of_unit[f"{MEGABYTE} bytes"]
    per_run = chunk["one process"] / size.rows
    cases = PROMPTS_A_WINDOW * STUDIES
    runs = cases * RUNS_A_CASE
    per_case = costs_of_case["keep a case"] + costs_of_case["read a case"]
    costs = Costs(
        window=runs * per_run,
        driver=cases * per_case + empty,
        store=cases * costs_of_case["bytes of a case"],
        bandwidth=MEGABYTE / max(full - empty, 1e-6),
        start=load,
    )
    return {
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), **made},
        "load before": significant(os.getloadavg()[0]),
        "model": model,
        "seconds a unit in which nothing is computed": costs_of_unit,
        "seconds a chunk of runs": chunk | {"runs": size.rows, "steps": size.steps},
        "seconds of the driver": costs_of_case,
        "seconds of judging one claim, by prompts": judged,
        "overhead of a window over its computing": significant(empty / costs.window),
        "simulated": simulation(costs, CLAIMS * judged[max(judged, key=int)]),
        "took": round(time.perf_counter() - began),
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page."""
    chunk, simulated = report["seconds a chunk of runs"], report["simulated"]
    machine, costs = report["machine"], simulated["costs"]
    return "\n".join(_lines(report, chunk, simulated, machine, costs)) + "\n"


def _lines(
    report: Mapping[str, Any],
    chunk: Mapping[str, Any],
    simulated: Mapping[str, Any],
    machine: Mapping[str, Any],
    costs: Mapping[str, Any],
) -> Iterator[str]:
    yield "# Workers: overhead, scaling, and where they saturate"
    yield ""
    yield (
        f"By `python -m benchmarks.scaling` on {machine['cores']} cores with "
        f"{machine['threads']} thread a process, {report['model']}, {machine['dtype']}, on "
        f"{machine['device']}; load {report['load before']} before. Seconds depend on the machine, "
        "ratios hardly. A busy machine shows in their spread."
    )
    yield ""
    yield "| ratio | median | least | most |"
    yield "|---|---|---|---|"
    for name, value in chunk.items():
        if isinstance(value, dict):
            yield f"| {name} | {value['ratio']} | {value['least']} | {value['most']} |"
    yield ""
    yield "| what | seconds |"
    yield "|---|---|"
    for name, value in report["seconds a unit in which nothing is computed"].items():
        yield f"| a unit with an answer of {name}, nothing computed | {value} |"
    for name in ("one process", "1 worker", "2 workers", TRAVELLING[0]):
        yield f"| a chunk of {chunk['runs']} runs, {name} | {chunk[name]} |"
    for name in ("keep a case", "read a case"):
        yield f"| the driver: {name} | {report['seconds of the driver'][name]} |"
    for number, value in report["seconds of judging one claim, by prompts"].items():
        yield f"| judging one claim of {number} prompts | {value} |"
    yield ""
    yield (
        f"## Simulated: {WORKERS} workers, {PROMPTS} prompts, {MODELS} models, {STUDIES} studies"
    )
    yield ""
    yield (
        f"A window of {PROMPTS_A_WINDOW} prompts takes {costs['window']} s of a worker and "
        f"{costs['driver']} s of its driver. Its answer has {costs['store']:.0f} bytes, carried at "
        f"{costs['bandwidth'] / 1e6:.0f} MB/s. Being handed to a worker costs a window "
        f"{report['overhead of a window over its computing']} of its computing. These are figures "
        "of this machine, not of a cluster."
    )
    yield ""
    yield "| workers | hours, one model | workers busy | driver busy | carrier busy |"
    yield "|---|---|---|---|---|"
    for number, found in simulated["one model, by workers"].items():
        shares = (f"{found[name]:.3g}" for name in ("busy", "driver", "store"))
        yield f"| {number} | {found['seconds'] / 3600:.3g} | {' | '.join(shares)} |"
    yield ""
    limits = simulated["saturates at workers"]
    yield (
        f"One driver saturates at about {limits['driver']:.0f} workers, what carries answers at "
        f"{limits['store']:.0f}. All {MODELS} models take "
        f"{simulated['hours, a model after another']} h one after another, and "
        f"{simulated['hours, all models beside one another']} h beside one another, each with a "
        f"driver of its own. Judging "
        f"{CLAIMS} claims of {PROMPTS} prompts takes {simulated['hours of judging, a model']} h a "
        "model, on one core, after the last window."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--small", action="store_true", help="only show that it runs")
    parser.add_argument("--out", type=Path, default=PUBLISHED)
    given = parser.parse_args(arguments)
    report = measure(given.model, SMALL if given.small else Size())
    files.write(given.out / "scaling.json", json.dumps(report, indent=1) + "\n")
    files.write(given.out / "scaling.md", markdown(report))
    print(markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
