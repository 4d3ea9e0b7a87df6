"""Trace and Step: everything recorded of one run, and how it is kept on disk without pickle.

Shapes: L layers, H query heads, Hkv key heads, w set width, N slots, N_k slots once set k is in, D head size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tempo.errors import SpecError, TraceError
from tempo.spec import RunSpec

FORMAT = 1  # of the saved folder; raised when an older reader would misread it
STEP_ARRAYS = ("distribution", "logits", "attention", "siblings")
_ARRAYS, _RECORD = "arrays.npz", "trace.json"


@dataclass(frozen=True, eq=False)
class Step:
    """One generated set and what it was chosen from."""

    tokens: list[int]  # most probable first (in replay: as given)
    probabilities: list[float]  # of the tokens, under `distribution`
    position: int  # the rotary position of the set (of its first member, if sequential)
    slots: list[int]
    texts: list[str]
    ended: list[
        int
    ]  # end-of-sequence tokens that reached the threshold but did not lead, so were not appended
    distribution: np.ndarray  # [V] float32
    seconds: float = (
        0.0  # wall time of the pass that chose the set, shared by all runs in the batch
    )
    logits: np.ndarray | None = None  # [w, V] float32, each member's own output
    attention: np.ndarray | None = None  # [L, H, w, N_k] float32
    siblings: np.ndarray | None = (
        None  # [L, H, w, w] float32, the last w columns of attention: what members give each other
    )


@dataclass(frozen=True, eq=False)
class Trace:
    """One run: its spec, its sets, and the arrays it was asked to capture."""

    spec: RunSpec
    prompt_tokens: list[int]
    steps: list[Step]
    slot_token: np.ndarray  # [N] int64
    slot_position: np.ndarray  # [N] int64
    slot_step: np.ndarray  # [N] int64, -1 for the prompt
    stop_reason: str  # "max_steps", "eos" or "replay"
    seconds: float  # wall time from the run's start to its end, whatever else was in the batch
    peak_bytes: int  # cache of this run's slots and everything recorded of it, computed from the arrays' sizes
    provenance: dict[str, Any] = field(default_factory=dict)  # model, dtype, device, versions
    keys: np.ndarray | None = None  # [L, Hkv, N, D] as cached
    values: np.ndarray | None = None  # [L, Hkv, N, D]
    raw_keys: np.ndarray | None = None  # [L, Hkv, N, D] before rotation

    @property
    def widths(self) -> list[int]:
        return [len(step.tokens) for step in self.steps]

    @property
    def text(self) -> str:
        """The sets as text, members most probable first: `[ cat]['s/.][ sat/ was]`."""
        return "".join("[" + "/".join(step.texts) + "]" for step in self.steps)

    @property
    def sets(self) -> list[list[int]]:
        """The token sets, ready to be replayed."""
        return [list(step.tokens) for step in self.steps]

    @property
    def ended(self) -> list[tuple[int, int]]:
        """(step, token) of every end-of-sequence token that reached the threshold but was not appended."""
        return [(k, token) for k, step in enumerate(self.steps) for token in step.ended]

    @property
    def num_slots(self) -> int:
        return len(self.slot_token)

    def save(self, folder: str | Path) -> Path:
        """Write the trace to `folder`, whole or not at all; an earlier trace there is replaced only at the end.

        Raises TraceError if the folder holds something else or cannot be written (what was there stays).
        """
        folder = Path(folder)
        if (
            folder.exists()
            and not (folder / _RECORD).is_file()
            and (not folder.is_dir() or any(folder.iterdir()))
        ):
            raise TraceError(
                f"{folder} exists and is not a saved trace; choose another folder or remove it"
            )
        fresh = folder.with_name(f".{folder.name}.{os.getpid()}.new")
        stale = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            np.savez(fresh / _ARRAYS, **self._arrays())
            record = self._record() | {"sha256": _sha256(fresh / _ARRAYS)}
            (fresh / _RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
            if folder.exists():
                folder.rename(stale)
            fresh.rename(folder)
        except OSError as error:
            if stale.exists() and not folder.exists():
                stale.rename(folder)
            raise TraceError(
                f"cannot write the trace to {folder}: {error.strerror or error}; nothing there was changed"
            ) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            if folder.exists():
                shutil.rmtree(stale, ignore_errors=True)
        return folder

    def _arrays(self) -> dict[str, Any]:
        arrays: dict[str, Any] = {
            name: getattr(self, name) for name in ("slot_token", "slot_position", "slot_step")
        }
        arrays |= {
            name: kv
            for name in ("keys", "values", "raw_keys")
            if (kv := getattr(self, name)) is not None
        }
        for name in STEP_ARRAYS:
            arrays |= {
                f"{name}_{k}": a
                for k, step in enumerate(self.steps)
                if (a := getattr(step, name)) is not None
            }
        return arrays

    def _record(self) -> dict[str, Any]:
        steps = [
            {
                name: getattr(step, name)
                for name in (
                    "tokens",
                    "probabilities",
                    "position",
                    "slots",
                    "texts",
                    "ended",
                    "seconds",
                )
            }
            for step in self.steps
        ]
        return {
            "format": FORMAT,
            "spec": self.spec.model_dump(mode="json"),
            "prompt_tokens": self.prompt_tokens,
            "steps": steps,
            "stop_reason": self.stop_reason,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "provenance": self.provenance,
        }


def load_trace(folder: str | Path) -> Trace:
    """The trace that `Trace.save` wrote to `folder`, equal to the last bit.

    Raises TraceError if it is missing, of another format, or if any byte of its arrays has changed.
    """
    folder = Path(folder)
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        seen = _sha256(folder / _ARRAYS)
    except OSError as error:
        raise TraceError(
            f"no trace in {folder}: {error.strerror} ({error.filename}); expected {_RECORD} and {_ARRAYS}"
        ) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise TraceError(
            f"{folder / _RECORD} is damaged: {error}; run the generation again"
        ) from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise TraceError(
            f"{folder} has trace format {found!r}, this tempo reads {FORMAT}; run the generation again"
        )
    if seen != record.get("sha256"):
        raise TraceError(
            f"{folder / _ARRAYS} is damaged (sha256 {seen[:12]}, expected {str(record.get('sha256'))[:12]}); run again"
        )
    try:
        with np.load(folder / _ARRAYS, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        steps = [
            Step(
                **step,
                **{name: arrays[f"{name}_{k}"] for name in STEP_ARRAYS if f"{name}_{k}" in arrays},
            )
            for k, step in enumerate(record["steps"])
        ]
        kv = {name: arrays.get(name) for name in ("keys", "values", "raw_keys")}
        slots = {name: arrays[name] for name in ("slot_token", "slot_position", "slot_step")}
        rest = {
            name: record[name]
            for name in ("prompt_tokens", "stop_reason", "seconds", "peak_bytes", "provenance")
        }
        return Trace(spec=RunSpec(**record["spec"]), steps=steps, **slots, **kv, **rest)
    except (KeyError, TypeError, ValueError, SpecError, zipfile.BadZipFile) as error:
        raise TraceError(
            f"{folder} is not a whole trace: {type(error).__name__} {error}; run the generation again"
        ) from None


def made_folder(folder: str | Path) -> Path:
    """The folder, made if need be; TraceError if it cannot be, so that a run is not begun whose result has no place."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TraceError(
            f"{folder} cannot be used as a folder ({error.strerror}); name one that exists or can be made"
        ) from None
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def slot_steps(num_prompt: int, widths: Sequence[int]) -> np.ndarray:
    """Which step each slot belongs to, -1 for the prompt: int64 [N]."""
    return np.repeat(np.arange(-1, len(widths)), [num_prompt, *widths]).astype(np.int64)
