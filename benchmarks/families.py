"""Run every experiment on every architecture that tempo supports: what each model family shows.

Each architecture is built tiny and at random, see `benchmarks.architectures`, with a tokenizer of
bytes, and is run by pytest over three prompts as a user would run it, with fewer steps. On a random
model only invariants say anything: they are supported, or not applicable with a reason. One that is
refuted, a control that fails, a claim that cannot be judged or any test that fails is a fault of
tempo. `python -m benchmarks.families` writes reports/published/families.json and .md.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from benchmarks.architectures import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    build,
    quiet,
    save_registry,
    tiny_config,
)
from tempo.parsing import parse_yaml
from tempo.support import read_registry
from tempo.tiny import build_tiny

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("The cat sat on the mat", "She opened the door and", "Numbers: 1, 2, 3,")
# Bytes are the tokens, so texts are long. Windows are wider than any of them: of texts that outgrow
# one there is no exact mixture of branches to compare with, which the experiments say.
SIZES = {
    "vocab_size": 258,
    "vocab_size_per_layer_input": 258,
    "max_position_embeddings": 768,
    "sliding_window": 700,
}
# Logits spread by so much, whatever an architecture does to them last: sets then are wide.
SPREAD = 3.0
# Enough for several wide sets, one after the other.
MOST_STEPS = 4
# The two configs of exp16 differ in the suite only, which here is the three prompts.
LEFT_OUT = "exp16_replication"
# Of each kind one: these get their page and its pictures as well, which take most of the time.
WITH_PAGE = ("llama", "cohere2", "deepseek_v3", "gemma3n_text", "gpt_neox", "gpt_oss", "qwen3_moe")
read_tokenizer = PreTrainedTokenizerFast.from_pretrained
FOLDER = ROOT / "reports/published"


@dataclass
class Family:
    """What the experiments found on one architecture.

    verdicts: of invariants by experiment, how many have which verdict; others: how many other
    claims were judged, by experiment; reasons: why claims are not applicable, by experiment;
    inapplicable: these claims, or the experiment if they are all of its claims; wrong: what should
    not be, a line each; seconds: of the processor.
    """

    name: str
    verdicts: dict[str, dict[str, int]] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    inapplicable: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


class _Outcomes:
    """A pytest plugin that keeps the outcome of every test."""

    def __init__(self, family: Family) -> None:
        self.family = family
        # by experiment, each claim and whether it is applicable
        self.claims: dict[str, dict[str, bool]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        family, properties = self.family, dict(report.user_properties)
        if report.failed:
            why = str(report.longrepr).strip().splitlines()
            family.wrong.append(f"{report.nodeid.rpartition('/')[2]}: {why[-1] if why else ''}")
        if report.when != "call" or "finding" not in properties:
            return
        finding = json.loads(properties["finding"])
        experiment = finding["context"]["experiment"]
        applies = finding["verdict"] != "INAPPLICABLE"
        self.claims.setdefault(experiment, {})[finding["claim"]] = applies
        if not applies:
            family.reasons[experiment] = finding["reason"]
        counts = family.verdicts.setdefault(experiment, {})
        if finding["kind"] == "invariant":
            counts[finding["verdict"]] = counts.get(finding["verdict"], 0) + 1
        elif applies:
            family.others[experiment] = family.others.get(experiment, 0) + 1

    def pytest_sessionfinish(self) -> None:
        for experiment, claims in sorted(self.claims.items()):
            without = sorted(name for name, applies in claims.items() if not applies)
            if without:
                whole = len(without) == len(claims)
                self.family.inapplicable += [experiment] if whole else without


def save_folder(architecture: str, folder: Path) -> None:
    """The architecture as a model folder: config, random weights, and a tokenizer of bytes."""
    with quiet():
        model = build(architecture, **SIZES)
        spread_out(model)
        model.save_pretrained(folder)
        whole = tiny_config(architecture, **SIZES)
        if model.config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            # of a text model that is loaded as a part of its whole (Emu3)
            whole.text_config = model.config
            whole.save_pretrained(folder)
        _, tokenizer = build_tiny(torch.float32)
        tokenizer.save_pretrained(folder)


@torch.inference_mode()
def spread_out(model: Any) -> None:
    """Scale the output layer so that logits spread by `SPREAD`.

    One that is the embedding makes a random model repeat its last token, with a set of it alone. It
    becomes a layer of its own.
    """
    head = model.get_output_embeddings()
    if model.config.tie_word_embeddings or head.weight is model.get_input_embeddings().weight:
        generator = torch.Generator().manual_seed(2)
        head.weight = torch.nn.Parameter(torch.randn(head.weight.shape, generator=generator))
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    for _ in range(4):  # a soft-capped spread is not in proportion
        logits = model(input_ids=torch.tensor([list(b"The cat sat")]), use_cache=False).logits
        head.weight *= SPREAD / float(logits.std(dim=-1).mean())


def save_configs(folder: Path) -> list[Path]:
    """The configs of all experiments, with fewer steps and without suites of their own."""
    configs = []
    for path in sorted((ROOT / "test_experiments").glob("exp*.yaml")):
        settings = parse_yaml(path.read_text(encoding="utf-8"))
        settings["max_steps"] = min(settings["max_steps"], MOST_STEPS)
        settings["prompt"] = PROMPTS[0]
        if isinstance(settings.get("suite"), str):
            settings.pop("suite")
        if path.stem != LEFT_OUT:
            configs.append(folder / path.name)
            configs[-1].write_text(json.dumps(settings), encoding="utf-8")
    return configs


def run_all(architecture: str, arguments: Sequence[str] = ()) -> Family:
    """All experiments on one architecture."""
    family, began = Family(architecture), time.process_time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_folder(architecture, folder / architecture)
        suite = folder / "prompts.txt"
        suite.write_text("\n".join(PROMPTS), encoding="utf-8")
        said = io.StringIO()
        options = ["--model", folder / architecture, "--suite", suite, "--results", folder / "r"]
        options += ["--findings", folder / "f.html", "-p", "no:cacheprovider", "-q", "--tb=line"]
        options += ["--assert", "plain"]  # nothing is rewritten for each architecture anew
        options += ["-W", "ignore:Module already imported", *arguments]
        for path in save_configs(folder):
            options += ["--config", path]
        drawn = architecture in WITH_PAGE
        page = nullcontext() if drawn else patch("tempo.harness.report.write", return_value=[])
        # nothing is on disk that other code may have measured
        code = patch("tempo.harness.evidence.code_fingerprint", return_value="")
        # of some types transformers takes the tokenizer that they usually have (Qwen2)
        own = patch("transformers.AutoTokenizer.from_pretrained", read_tokenizer)
        with redirect_stdout(said), redirect_stderr(said), page, code, own:
            code = pytest.main(
                [str(ROOT / "test_experiments"), *map(str, options)], [_Outcomes(family)]
            )
        if code not in (0, 1):
            family.wrong.append(said.getvalue().strip().splitlines()[-1])
    family.seconds = round(time.process_time() - began, 1)
    return family


def table(families: Sequence[Family]) -> str:
    """Architectures by experiments, and why what is not applicable is not."""
    every = [name for family in families for name in family.verdicts]
    names = sorted(set(every), key=lambda name: int(name.removeprefix("exp")))
    lines = [
        "# Every experiment on every architecture",
        "",
        __doc__.partition("\n\n")[2].partition("`python")[0].strip() if __doc__ else "",
        "",
        "A cell says how many invariants are supported, and after the `+` how many other claims",
        "could be judged, whatever their verdict. `n/a`: invariants that are not applicable; `?`:",
        "the random model shows nothing to judge them by; `✕`: refuted.",
        "",
        "| architecture | " + " | ".join(names) + " | wrong |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for family in families:
        cells = [_cell(family, name) for name in names]
        lines.append(f"| {family.name} | {' | '.join(cells)} | {len(family.wrong) or ''} |")
    lines += ["", "## Not applicable", ""]
    for reason, of in _by_reason(families).items():
        lines.append(f"- {reason}: {', '.join(of)}")
    lines += ["", "## Wrong", ""]
    wrong = [f"- {family.name}: {line}" for family in families for line in family.wrong]
    return "\n".join([*lines, *(wrong or ["Nothing."]), ""])


def _cell(family: Family, experiment: str) -> str:
    counts = family.verdicts.get(experiment, {})
    signs = {"SUPPORTED": "", "INAPPLICABLE": " n/a", "INCONCLUSIVE": " ?", "REFUTED": " ✕"}
    cell = ", ".join(f"{counts[name]}{sign}" for name, sign in signs.items() if counts.get(name))
    others = family.others.get(experiment)
    return f"{cell} + {others}".strip() if others else cell


def _by_reason(families: Sequence[Family]) -> dict[str, list[str]]:
    """The architectures of which each reason was given, with the experiment."""
    found: dict[str, list[str]] = {}
    for family in families:
        for experiment, reason in family.reasons.items():
            known = found.setdefault(reason, [])
            known.append(f"{family.name} ({experiment})")
    return found


def write(families: Sequence[Family]) -> None:
    """The record, its table, and in the registry what cannot be judged on which architecture."""
    record = {"transformers": transformers.__version__, "families": list(map(asdict, families))}
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    (FOLDER / "families.json").write_text(text, encoding="utf-8")
    (FOLDER / "families.md").write_text(table(families), encoding="utf-8")
    registry = read_registry()
    for family in families:
        registry[transformers.__version__][family.name]["inapplicable"] = family.inapplicable
    save_registry(registry)


def main() -> int:
    """Run those named, or all that are supported; of all, write the record. 1 if any is wrong."""
    known = read_registry()[transformers.__version__]
    supported = [name for name, entry in known.items() if entry["status"] == "supported"]
    names, began = sys.argv[1:] or supported, time.perf_counter()
    families = []
    # a process for each core: pytest runs one session at a time in a process
    with ProcessPoolExecutor(
        os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for family in pool.map(run_all, names):
            families.append(family)
            said = f"{len(family.wrong)} wrong" if family.wrong else "nothing wrong"
            print(f"{family.name:28} {family.seconds:6.1f} s  {said}", flush=True)
            for line in family.wrong:
                print(f"    {line[:200]}", flush=True)
    wrong = sum(bool(family.wrong) for family in families)
    seconds = sum(family.seconds for family in families)
    wall = time.perf_counter() - began
    print(
        f"{len(families)} architectures, {wrong} wrong: {seconds:.0f} s of processors, {wall:.0f} s"
    )
    if not sys.argv[1:]:
        write(families)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
