"""Saved traces, by everything that determines them: a sweep that was interrupted goes on, one that is known runs no model."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path

import torch

from tempo.errors import TraceError
from tempo.models import LanguageModel
from tempo.spec import RunSpec
from tempo.trace import Trace, load_trace, made_folder

# What reads results and makes none: a change here must not throw measurements away.
JUDGING = {"claims.py", "statistics.py", "cli.py"}


class TraceStore:
    """A folder of traces, each under a name made of its spec and of the model, versions and code that computed it."""

    def __init__(self, lm: LanguageModel, folder: str | Path) -> None:
        self.folder, self.made_by = made_folder(folder), maker_sha256(lm)

    def get(self, spec: RunSpec) -> Trace | None:
        """The trace of this spec, None if there is none; a damaged one counts as none, with a warning."""
        place = self.place(spec)
        if not place.exists():
            return None
        try:
            return load_trace(place)
        except TraceError as error:
            warnings.warn(
                f"a stored trace cannot be used and is computed anew: {error}", stacklevel=2
            )
            return None

    def put(self, trace: Trace) -> None:
        """Save a trace; TraceError if it cannot be written."""
        trace.save(self.place(trace.spec))

    def place(self, spec: RunSpec) -> Path:
        """The folder of this spec's trace."""
        return (
            self.folder / hashlib.sha256(f"{self.made_by} {spec.key()}".encode()).hexdigest()[:32]
        )


def maker_sha256(lm: LanguageModel) -> str:
    """A hash of all that a trace depends on beside its spec: weights, dtype, device, versions, threads, and tempo's own code."""
    digest = hashlib.sha256(
        json.dumps([lm.sha256, lm.provenance(), sys.version, torch.get_num_threads()]).encode()
    )
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in JUDGING:
            digest.update(path.read_bytes())
    return digest.hexdigest()
