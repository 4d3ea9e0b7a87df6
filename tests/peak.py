"""Measures, in a process of its own, the peak memory of runs against what is computed beforehand.

    python -m tests.peak tiny < specs.json

Standard input holds a list of cases, each a list of specs and the number of rows. Standard output
holds [computed, measured] bytes of each case.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys

import torch

import tempo
from benchmarks.memory import CLEAR_REFS, _status
from tempo.capture import needed_bytes


def peak(lm: tempo.LanguageModel, specs: list[tempo.RunSpec], num_rows: int) -> tuple[int, int]:
    """(computed, measured) bytes of a batch of these runs."""
    # the first run of a process allocates more than later ones
    tempo.generate_batch(lm, [specs[0].but(max_steps=1, max_width=2, replay=None)])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5", encoding="ascii")
    before = _status("VmRSS")
    traces = tempo.generate_batch(lm, specs, max_rows=num_rows, memory_budget=2**62)
    measured = _status("VmHWM") - before
    prompts = [len(trace.prompt_tokens) for trace in traces]
    return sum(needed_bytes(lm, specs, prompts, min(num_rows, len(specs))).values()), measured


def main() -> None:
    """Measure the cases given on standard input, on the model that the command line names."""
    torch.set_num_threads(1)
    found = []
    with tempo.load_model(sys.argv[1]) as lm:
        for settings, num_rows in json.load(sys.stdin):
            found.append(peak(lm, [tempo.RunSpec(**spec) for spec in settings], num_rows))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
