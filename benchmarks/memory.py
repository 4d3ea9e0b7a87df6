"""Peak memory of runs against the bytes that tempo computes before it starts them.

`python -m benchmarks.memory MODEL < points.json` is a process of its own, started by `measured`: it reads a list of `Point`s
and prints for each the bytes computed and the growth of the peak resident set. Linux only, which can reset that peak.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tempo
from benchmarks.shapes import layers_of, text_of, wide
from tempo import LanguageModel
from tempo.capture import SPOOLED, trace_bytes

# Arrays above 64 KiB go back to the system as soon as they are freed, so that the resident set holds what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Point(NamedTuple):
    """Free runs of exactly `width` tokens a step with attention and logits captured, on the model or one of so many layers."""

    runs: int
    width: int
    context: int  # prompt tokens
    steps: int
    layers: int | None = None
    spooled: bool = False  # arrays go to disk


def measured(model: str, points: Sequence[Point]) -> list[dict[str, Any]]:
    """Every point with its `computed` and `peak` bytes; empty where the peak cannot be reset."""
    if not CLEAR_REFS.exists():
        return []
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", model], input=json.dumps([point._asdict() for point in points]),
        env=os.environ | MALLOC, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def measure(lm: LanguageModel, point: Point) -> dict[str, int]:
    specs = [
        wide(
            text_of(lm, point.context, run),
            point.width,
            point.steps,
            capture=("attention", "logits"),
        )
        for run in range(point.runs)
    ]
    tempo.generate_batch(
        lm, [spec.but(max_steps=1) for spec in specs[:1]]
    )  # what only the first run in a process allocates
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5", encoding="ascii")
    before = _status("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        spool = folder if point.spooled else None
        traces = tempo.generate_batch(
            lm, specs, max_rows=len(specs), memory_budget=2**62, spool=spool
        )
    assert all(trace.widths == [point.width] * point.steps for trace in traces)
    in_memory = [
        n
        for spec in specs
        for name, n in trace_bytes(lm, spec, point.context).items()
        if not (spool and name in SPOOLED)
    ]
    return {
        "computed": sum(in_memory),
        "peak": _status("VmHWM") - before,
    }


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def main(model: str) -> None:
    found = []
    with tempo.load_model(model) as lm:
        for point in (Point(**settings) for settings in json.load(sys.stdin)):
            used = lm if point.layers is None else layers_of(lm, point.layers)
            found.append(point._asdict() | measure(used, point))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
