"""Everything that a GPU must show, in one script of under ten minutes; it writes one record.

    python -m benchmarks.gpu [--device cuda] [--small] [--out reports/gpu.json]

Conformance of the engine to the oracle, rounding floors, the time of a step against the memory's
bandwidth, and exp1 to exp5 of SmolLM2. After each part the record is written anew, so that a part
that fails takes none along. The exit code is 1 if one failed.

`--small` runs the same code on `tiny`, on the CPU if need be. Such a record says of itself that
it shows that the script works, and nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tempo
from benchmarks import conformance, floors
from benchmarks.shapes import LLAMA_7B, random_llama, text_of
from benchmarks.speed import weights_read
from benchmarks.timing import alternate, clock, significant
from fixtures.suite import suite_texts
from tempo import RunSpec, files
from tempo.records import read_jsonl

TARGET = Path("reports/gpu.json")
NOT_A_GPU = "run on a CPU: shows that the script works, and nothing about a GPU"
ALLOWED_SECONDS = 600.0


@dataclass(frozen=True)
class Size:
    """How much is done. shape: of the random Llama whose speed is measured."""

    model: str = "smollm2-135m"
    prompts: int = 4
    every_setting: int = 4  # one in so many settings of the conformance
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    shape: dict[str, int] = field(default_factory=lambda: dict(LLAMA_7B))
    runs: int = 64
    context: int = 64
    steps: int = 16
    rounds: int = 3
    suite: int = 20


SMALL = Size(
    model="tiny",
    prompts=2,
    every_setting=20,
    shape=LLAMA_7B
    | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 500},
    runs=4,
    context=8,
    steps=2,
    rounds=1,
    suite=2,
)


def conformity(device: str, size: Size) -> dict[str, Any]:
    """The engine against the oracle on this device; in float32 within bounds."""
    prompts, found = suite_texts(size.prompts), {}
    settings = [*conformance.SETTINGS, *conformance.LATTICES][:: size.every_setting]
    if size.model == "tiny":  # it has fewer layers than these settings name
        named = ("isolated_layers", "weighting_layers")
        settings = [chosen for chosen in settings if not set(named) & set(chosen)]
    for dtype in size.dtypes:
        bounds = conformance.BOUNDS if dtype == "float32" else {}
        with tempo.load_model(size.model, dtype, device) as lm:
            found[dtype] = conformance.measure(lm, lm, prompts, settings, bounds)
    return found | {"failed": found["float32"]["beyond_a_bound"] > 0}


def rounding(device: str, size: Size) -> dict[str, Any]:
    """The rounding floors on this device, by dtype, and the effect of visibility beside them."""
    found = {}
    for dtype in size.dtypes:
        with tempo.load_model(size.model, dtype, device) as lm:
            common = {"threshold": floors.THRESHOLD, "max_steps": floors.NUM_STEPS}
            free = [RunSpec(prompt=prompt, **common) for prompt in suite_texts(size.prompts)]
            runs = tempo.generate_batch(lm, free)
            again = [run.spec.but(replay=run, capture=floors.CAPTURE) for run in runs]
            found[dtype] = floors.measure(lm, again)
    return found


def speed(device: str, size: Size) -> dict[str, Any]:
    """Seconds of a step of many runs in bfloat16, over reading the weights once.

    A step reads all weights at least once, so the ratio is at least one.
    """
    with random_llama(torch.bfloat16, device, **size.shape) as lm:
        prompts = [text_of(lm, size.context, run) for run in range(size.runs)]

        def sweep(num_steps: int) -> float:
            specs = [
                RunSpec(prompt=prompt, threshold=1.0, max_steps=num_steps, stop_at_eos=False)
                for prompt in prompts
            ]
            run = partial(tempo.generate_batch, lm, specs, max_rows=size.runs)
            return clock(run)

        def step() -> float:  # what the prompt takes is left out
            return (sweep(2 * size.steps) - sweep(size.steps)) / size.steps

        times = alternate({"step": step, "weights": weights_read(lm)}, size.rounds)
        ratios = sorted(a / b for a, b in zip(times["step"], times["weights"], strict=True))
        return {
            "runs": size.runs,
            "weights": lm.weight_bytes,
            "seconds": {name: significant(min(seconds)) for name, seconds in times.items()},
            "a step over reading the weights": [significant(ratio) for ratio in ratios],
        }


def experiments(device: str, size: Size) -> dict[str, Any]:
    """exp1 to exp5 on this device, by pytest: its exit code, and the claims of each verdict."""
    with files.staging(Path(tempfile.gettempdir()) / "tempo-gpu") as folder:
        command = [sys.executable, "-m", "pytest", "-q", "test_experiments"]
        command += ["-m", "exp1 or exp2 or exp3 or exp4 or exp5", "--prompts", str(size.suite)]
        command += ["--model", size.model, "--device", device]
        command += ["--results", f"{folder}/results", "--findings", f"{folder}/findings.html"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        findings = read_jsonl(folder / "results/findings.jsonl").records
    verdicts: dict[str, int] = {}
    for finding in findings:
        verdicts[finding["verdict"]] = verdicts.get(finding["verdict"], 0) + 1
    said = done.stdout.strip().splitlines()
    # 1 is what a claim of a random model may well give; without findings nothing was measured
    return {
        "code": done.returncode,
        "verdicts": verdicts,
        "said": said[-1] if said else done.stderr[-200:],
        "failed": not findings or (size.model != "tiny" and done.returncode != 0),
    }


PARTS: dict[str, Callable[[str, Size], dict[str, Any]]] = {
    "conformance": conformity,
    "floors": rounding,
    "speed": speed,
    "experiments": experiments,
}


def measure(
    device: str,
    size: Size,
    keep: Callable[[dict[str, Any]], None],
    parts: Sequence[str] = tuple(PARTS),
) -> dict[str, Any]:
    """The record; keep: gets what there is of it after each part."""
    began = time.perf_counter()
    is_gpu = torch.device(device).type == "cuda"
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if is_gpu else platform.processor() or "CPU",
        "is_gpu": is_gpu,
        "note": "" if is_gpu else NOT_A_GPU,
        "model": size.model,
        "torch": torch.__version__,
        "parts": {},
    }
    for name in parts:
        start = time.perf_counter()
        try:
            found = PARTS[name](device, size)
        except Exception as error:  # of one part: the others are of use without it
            found = {"failed": True, "error": f"{type(error).__name__}: {error}"}
        report["parts"][name] = found | {"took": round(time.perf_counter() - start)}
        report["took"] = round(time.perf_counter() - began)
        report["in_time"] = report["took"] < ALLOWED_SECONDS
        keep(report)
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=TARGET)
    given = parser.parse_args(arguments)
    if torch.device(given.device).type != "cuda" and not given.small:
        parser.error("there is no GPU; --small runs the same code on this CPU")

    def keep(report: dict[str, Any]) -> None:
        files.write(given.out, json.dumps(report, indent=1) + "\n")

    report = measure(given.device, SMALL if given.small else Size(), keep)
    print(json.dumps(report, indent=1))
    return int(any(part.get("failed", False) for part in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
