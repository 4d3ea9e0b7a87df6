"""The campaign of faults: everything that can go wrong with files, done on purpose and counted.

    python -m benchmarks.campaign [--kills 300] [--stride 1] [--only PART]

Writes reports/published/campaign.json and campaign.md. It exits with 1 if anything was lost,
silently wrong, raised what nobody put into words, or left files over.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import tempo
from benchmarks import configs, fuzzing, writing
from tempo import files
from tests import api_inputs

TARGET = Path(__file__).resolve().parent.parent / "reports/published"
KINDS = ("lost", "wrong", "raw", "left_over")  # of problems
Say = Callable[[str], None]
NUM_INSIDE, NUM_OUTSIDE = 300, 60  # random configs


@dataclass(frozen=True)
class Row:
    """What was done to one thing, and what came of it.

    part: of the campaign. what: was disturbed, or read. tries: how often. ended: how, with counts.
    lost, wrong, raw, left_over: problems by kind. details: each of them in words.
    """

    part: str
    what: str
    tries: int
    ended: Mapping[str, int]
    lost: int = 0
    wrong: int = 0
    raw: int = 0
    left_over: int = 0
    operations: int | None = None
    details: Sequence[str] = field(default_factory=tuple)

    @property
    def problems(self) -> int:
        return self.lost + self.wrong + self.raw + self.left_over


def write_faults(say: Say, options: argparse.Namespace) -> list[Row]:
    """Faults at every file operation, kills at random, several writers."""
    return [
        Row(
            "writing",
            tally.scenario,
            sum(tally.tries.values()),
            dict(tally.ended),
            *(tally.problems[kind] for kind in writing.PROBLEMS),
            tally.operations or None,
            tuple(tally.details),
        )
        for tally in writing.campaign(say, options.kills, options.stride)
    ]


def read_faults(say: Say, options: argparse.Namespace) -> list[Row]:
    """Flipped bits, malformed records, YAML and arrays of any make."""
    rows = []
    for kind, counts in fuzzing.fuzz().items():
        ended = {
            "refused in words": counts.refused + counts.told,
            "went on": counts.harmless + counts.accepted,
        }
        found = (counts.lost, counts.wrong, counts.raw + counts.slow, counts.left_over)
        details = [f"{kind} {number}: {how}" for number, how in counts.failures]
        rows.append(Row("reading", kind, counts.cases, ended, *found, details=details))
        say(f"{kind}: {counts.cases} cases")
    return rows


def wrong_inputs(say: Say, options: argparse.Namespace) -> list[Row]:
    """Wrong input of every kind to the public functions."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, tempo.load_model("tiny") as lm:
        os.chdir(folder)  # some of the inputs are relative paths
        try:
            counts = api_inputs.run(lm, Path(folder))
        finally:
            os.chdir(home)
    ended = {"refused in words": counts.refused, "went on": len(counts.silent)}
    details = (*counts.raw, *counts.silent, *counts.wordy)
    say(f"calls: {counts.tried} kinds of wrong input")
    found = {"wrong": len(counts.silent), "raw": len(counts.raw) + len(counts.wordy)}
    return [Row("inputs", "public functions", counts.tried, ended, details=details, **found)]


def random_configs(say: Say, options: argparse.Namespace) -> list[Row]:
    """Random configs inside and outside the space that each study declares."""
    tried = {
        "inside": (NUM_INSIDE, configs.campaign),
        "outside": (NUM_OUTSIDE, configs.campaign_outside),
    }
    rows = []
    for place, (number, campaign) in tried.items():
        found = campaign(number)
        how = "went on" if place == "inside" else "refused in words"
        ended = {how: number - len(found)}
        what = f"configs {place} their space"
        rows.append(Row("configs", what, number, ended, wrong=len(found), details=found))
        say(f"{what}: {number}")
    return rows


# Each part gives rows. Another part is another function here.
PARTS: dict[str, Callable[[Say, argparse.Namespace], list[Row]]] = {
    "writing": write_faults,
    "reading": read_faults,
    "inputs": wrong_inputs,
    "configs": random_configs,
}


def markdown(report: Mapping[str, Any]) -> str:
    """The table of counts."""
    lines = [
        "# The campaign of faults",
        "",
        "Made by `make campaign`. Faults strike at every file operation of what writes: the "
        "process is killed, a write is cut short, the disk is full from there on, the system "
        "refuses. Then the same is done again undisturbed, and all must be as if nothing had "
        "happened. Readers are given damaged and forged files, public functions wrong input. "
        "Random configs inside a study's space must run, with every control as it should be; "
        "others must be refused. Ended: how the process, the reading, or the call, ended.",
        "",
        "| part | what | operations | tries | killed | refused in words | went on | lost "
        "| silently wrong | raw exceptions | left over |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in report["rows"]:
        ended = [row["ended"].get(how, 0) for how in ("killed", "refused in words", "went on")]
        found = [row[kind] for kind in KINDS]
        cells = [row["part"], row["what"], row["operations"] or "", row["tries"], *ended, *found]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    made = report["made"]
    lines += ["", f"Kills: {report['kills']}. Problems: {report['problems']}.", ""]
    lines += [f"{made['machine']}, Python {made['python']}, {made['seconds']} s."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=300, help="at random, over all scenarios")
    parser.add_argument(
        "--stride", type=int, default=1, help="other faults than kills only so often"
    )
    parser.add_argument("--only", choices=PARTS, help="one part; the record keeps the others")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has no other threads
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {line}", flush=True)

    rows = []
    for name, part in PARTS.items():
        if options.only in (None, name):
            rows += part(say, options)
    for row in rows:
        for detail in row.details[:5]:
            say(detail)
    seconds = round(time.monotonic() - began)
    made = {
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "tempo": tempo.__version__,
        "stride": options.stride,
        "seconds": seconds,
    }
    all_rows = [asdict(row) for row in rows]
    if options.only:
        before = json.loads((TARGET / "campaign.json").read_text(encoding="utf-8"))
        others = [row for row in before["rows"] if row["part"] != options.only]
        all_rows, made = [*others, *all_rows], before["made"]
    report = {
        "kills": sum(row["ended"].get("killed", 0) for row in all_rows),
        "problems": sum(row[kind] for row in all_rows for kind in KINDS),
        "rows": all_rows,
        "made": made,
    }
    files.write(TARGET / "campaign.json", json.dumps(report, indent=1) + "\n")
    files.write(TARGET / "campaign.md", markdown(report))
    problems = sum(row.problems for row in rows)
    say(f"{sum(row.ended.get('killed', 0) for row in rows)} kills, {problems} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
