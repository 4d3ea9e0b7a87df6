"""Peak memory of runs against the bytes that tempo computes before it starts them.

`measured` starts `python -m benchmarks.memory MODEL < points.json` as a process of its own.
That process reads a list of `Point`s. For each it prints the bytes computed and the growth of the
peak resident set. It needs Linux, which can reset that peak.
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

# Arrays above 64 KiB return to the system once freed, so that the resident set holds what is used.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Point(NamedTuple):
    """Free runs of exactly `width` tokens a step, with attention and logits captured.

    They run on the given model, or on one like it with `layers` layers.
    """

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
        [sys.executable, "-m", "benchmarks.memory", model],
        input=json.dumps([point._asdict() for point in points]),
        env=os.environ | MALLOC,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def measure(lm: LanguageModel, point: Point) -> dict[str, int]:
    """Bytes computed for this point's runs, and the growth of the peak resident set."""
    capture = ("attention", "logits")
    prompts = [text_of(lm, point.context, run) for run in range(point.runs)]
    specs = [wide(prompt, point.width, point.steps, capture=capture) for prompt in prompts]
    # the first run of a process allocates more than later ones
    tempo.generate_batch(lm, [specs[0].but(max_steps=1)])
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
    on_disk = SPOOLED if spool else ()
    computed = 0
    for spec in specs:
        sizes = trace_bytes(lm, spec, point.context)
        computed += sum(size for name, size in sizes.items() if name not in on_disk)
    return {"computed": computed, "peak": _status("VmHWM") - before}


def _status(name: str) -> int:
    """Bytes that /proc/self/status gives under this name."""
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def main(model: str) -> None:
    """Measure the points given on standard input and print them with their bytes."""
    found = []
    with tempo.load_model(model) as lm:
        for point in (Point(**settings) for settings in json.load(sys.stdin)):
            used = lm if point.layers is None else layers_of(lm, point.layers)
            found.append(point._asdict() | measure(used, point))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
