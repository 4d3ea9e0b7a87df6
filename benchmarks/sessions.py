"""What a session of experiments costs in CPU time, against the least that its tokens can cost.

`python -m benchmarks.sessions` passes its arguments on to pytest, counts the passes of the model
and their tokens meanwhile, and adds the session to reports/published/sessions.json and .md. The
floor is the number of tokens times what the bare model takes for each in passes of 512 tokens, all
logits computed. Both are CPU time of one process, so that another load on the machine matters less.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import tempo
from benchmarks.speed import TARGET, machine
from benchmarks.speed_report import table
from benchmarks.timing import AT_ONCE, judged, significant, token_seconds

# The plugin is imported before pytest could rewrite its asserts.
PLUGIN_IS_THERE = "ignore::pytest.PytestAssertRewriteWarning"
# CPU time of all experiments on the whole suite over the floor.
AT_MOST = 1.5


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Passes, their tokens by dtype, and their seconds of CPU time within the block.

    Only outermost calls of a model count: a causal model calls its body, which is a model too.
    """
    found: Counter[str] = Counter()
    original, inside = PreTrainedModel.__call__, False

    def call(self: PreTrainedModel, *args: Any, **given: Any) -> Any:
        nonlocal inside
        if inside:
            return original(self, *args, **given)
        inside, began = True, time.process_time()
        try:
            return original(self, *args, **given)
        finally:
            inside = False
            texts = next(given[name] for name in ("input_ids", "inputs_embeds") if name in given)
            found["passes"] += 1
            found[str(self.dtype).removeprefix("torch.")] += texts.shape[0] * texts.shape[1]
            found["seconds"] += time.process_time() - began  # type: ignore[assignment]

    PreTrainedModel.__call__ = call
    try:
        yield found
    finally:
        del PreTrainedModel.__call__


def session(model: str, folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """The row of one session over an empty store in this folder, its report included."""
    with tempo.load_model(model) as lm:
        began = time.process_time()
        seconds = [token_seconds(lm, time.process_time)]
        apart = time.process_time() - began
        before = machine()
        with counted() as found:
            places = [f"--results={folder / 'results'}", f"--findings={folder / 'findings.html'}"]
            options = ["--model", model, *places, "-W", PLUGIN_IS_THERE]
            code = int(pytest.main(["test_experiments", *options, *arguments]))
        files = folder.glob("results/*/cases.jsonl")
        cases = sum(len(file.read_bytes().splitlines()) for file in files)
        spent = time.process_time() - apart
        seconds.append(token_seconds(lm, time.process_time))
        name = str(lm.dtype).removeprefix("torch.")
    if code > pytest.ExitCode.TESTS_FAILED:
        raise SystemExit(f"pytest ended with exit code {code}; nothing is written")
    tokens = found[name]
    floor = tokens * sum(seconds) / len(seconds)
    is_whole = not any(each.startswith("--prompts") for each in arguments)
    return {
        "arguments": shlex.join(arguments),
        "model": model,
        "dtype": name,
        "threads": torch.get_num_threads(),
        "machine": before,
        "exit_code": code,
        "cases": cases,
        "passes": found["passes"],
        "tokens": tokens,
        "milliseconds_a_token": [significant(1e3 * each) for each in seconds],
        "cpu_seconds": round(spent, 1),
        "cpu_seconds_in_passes": round(found["seconds"], 1),
        "floor_seconds": round(floor, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "over_floor": judged(spent / floor, at_most=AT_MOST if is_whole else None),
    }


TEXT = f"""# CPU time of experiments, against its floor

Made by `make sessions`. pytest gets the arguments of the first column. Each line is a session over
an empty store, from the imports to the report. The floor is what the tokens of its passes would
take the bare model in passes of {AT_ONCE} tokens, all logits computed, measured before the session
and after it. It is of the model's own dtype: a few passes in bfloat16 count in the session and not
in the floor. "Required" is for all prompts of the suite.

Some of a session does not grow with its prompts: imports, pictures, pages of the own prompts, the
times of exp5 by width, and exp11's search for the numbers of rivals.
"""
HEAD = ["arguments", "threads", "cases", "passes", "tokens", "ms a token", "CPU s", "in passes"]
HEAD += ["floor s", "CPU over floor", "required", "met", "peak GiB", "load"]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The record as a table."""
    lines = []
    for row in rows:
        judgement = row["over_floor"]
        at_most, met = judgement["at_most"], judgement["met"]
        lines.append(
            [
                f"`{row['arguments']}`" if row["arguments"] else "all prompts",
                str(row["threads"]),
                str(row["cases"]),
                str(row["passes"]),
                str(row["tokens"]),
                " to ".join(f"{each:.3g}" for each in sorted(row["milliseconds_a_token"])),
                f"{row['cpu_seconds']:.0f}",
                f"{row['cpu_seconds_in_passes']:.0f}",
                f"{row['floor_seconds']:.0f}",
                f"**{judgement['ratio']:.3g}**",
                "" if at_most is None else f"≤ {at_most}",
                "" if met is None else ("yes" if met else "**no**"),
                f"{row['peak_bytes'] / 2**30:.1f}",
                f"{row['machine']['load']:.1f}",
            ]
        )
    return TEXT + "\n" + table(HEAD, lines)


def main() -> None:
    """Run one session with these arguments, and put its row into the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--folder", type=Path, help="where results go, if they are to be kept")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        row = session(options.model, options.folder or Path(folder), arguments)
    path = TARGET / "sessions.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    rows = [each for each in known if each["arguments"] != row["arguments"]] + [row]
    rows.sort(key=lambda each: each["tokens"])
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
