"""What a worker does: load what the set-up names, compare it, and answer units."""

from __future__ import annotations

import base64
import importlib
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tempo import errors
from tempo.errors import TempoError, WorkerError
from tempo.workers import MOST_TRIES, Answer, Setup

if TYPE_CHECKING:
    from tempo.models import LanguageModel

THREADS, PROCESSOR = "number of threads", "instructions of the processor"
HOW = {
    THREADS: "start it with OMP_NUM_THREADS={wanted}",
    PROCESSOR: "take hosts of one kind: others round otherwise",
    "code of tempo": "install the same tempo on all hosts",
}


class Work(Protocol):
    """What is done to units; made once by each worker, from the set-up.

    made_by: by name, what an answer depends on beside the unit; it must equal the session's.
    """

    made_by: Mapping[str, str]

    def __init__(self, setup: Setup) -> None: ...

    def do(self, unit: Any) -> Any:
        """The answer to a unit. Both are JSON."""
        ...


class Worker:
    """A worker's work, once it is loaded and found to be what the session needs.

    Raises WorkerError if it is not: the message names what differs.
    """

    def __init__(self, setup: Setup) -> None:
        for path in reversed(setup.get("paths", ())):  # so that the study's modules are found
            if path not in sys.path:
                sys.path.insert(0, path)
        module, _, name = setup["work"].partition(":")
        self.work: Work = getattr(importlib.import_module(module), name)(setup)
        if why := difference(setup["made_by"], self.work.made_by):
            raise WorkerError(f"a worker on {platform.node()} is refused: {why}")

    def answer_to(self, unit: Any) -> Answer:
        """What the work says of a unit; an error of its own making is an answer, too."""
        answer = {"made_by": dict(self.work.made_by), "worker": name_of_worker()}
        try:
            return answer | {"given": self.work.do(unit)}
        except Exception as error:
            kind = type(error).__name__
            said = str(error) if isinstance(error, TempoError) else f"{kind}: {error}"
            return answer | {"failed": said, "kind": kind}


def name_of_worker() -> str:
    """This process, as a person would look for it."""
    return f"process {os.getpid()} on {platform.node()}"


def difference(wanted: Mapping[str, str], found: Mapping[str, str]) -> str:
    """How a worker differs from what is needed, in words; "" if it does not."""
    for name in [*wanted, *found]:
        if wanted.get(name) == found.get(name):
            continue
        seen, expected = found.get(name, "missing"), wanted.get(name, "none")
        how = HOW.get(name, "start it in the same environment").format(wanted=expected)
        return f"its {name} is {seen:.60}, and that of the session {expected:.60}; {how}"
    return ""


def is_sound(setup: Setup, answer: Any) -> bool:
    """Whether an answer is one, and of a worker that is what the session needs."""
    if not isinstance(answer, dict) or not {"given", "failed"} & answer.keys():
        return False
    return answer.get("made_by") == setup["made_by"]


def killed_too_often(setup: Setup, tries: list[str]) -> Answer:
    """The answer to a unit whose workers were killed each time."""
    by = "; ".join(tries)
    why = f"its worker was killed {MOST_TRIES} times ({by}), perhaps for want of memory"
    return {"made_by": setup["made_by"], "failed": why, "kind": "WorkerError"}


def raised(answer: Answer) -> Exception:
    """The error that an answer tells of; of tempo's own kind where it was that."""
    kind = getattr(errors, str(answer.get("kind")), WorkerError)
    return kind(answer["failed"])


def parts_of(lm: LanguageModel) -> dict[str, str]:
    """What the numbers of a model depend on, by name: `maker_parts`, and the processor."""
    import torch

    from tempo.identity import maker_parts

    return maker_parts(lm) | {PROCESSOR: torch.backends.cpu.get_cpu_capability()}


def model_setup(lm: LanguageModel) -> dict[str, Any]:
    """How a worker loads the same model. One that was wrapped is refused by its weights."""
    import torch

    source = Path(lm.name).expanduser()
    return {
        "model": lm.name,
        "source": str(source.resolve()) if source.exists() else lm.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "threads": torch.get_num_threads(),
    }


def load(setup: Setup) -> LanguageModel:
    """The model that `model_setup` describes."""
    from tempo.models import load_model

    lm = load_model(setup["source"], setup["dtype"], setup["device"])
    lm.name = setup["model"]
    return lm


def packed(contents: Mapping[str, bytes]) -> dict[str, str]:
    """Files as JSON."""
    return {name: base64.b64encode(content).decode() for name, content in contents.items()}


def unpacked(contents: Mapping[str, str]) -> dict[str, bytes]:
    return {name: base64.b64decode(content) for name, content in contents.items()}
