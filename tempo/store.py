"""Saved traces, found by everything that determines them.

A sweep that was interrupted continues where it stopped. A sweep whose traces are all stored runs no
model.
"""

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
from tempo.trace import RECORD, Trace, load_trace, made_folder

# Files that read results but make none. A change in one of them must not discard measurements.
JUDGING = {"claims.py", "statistics.py", "cli.py"}


class TraceStore:
    """A folder of traces, one subfolder for each spec.

    A trace's name is a hash of its spec and of the model, versions and code that computed it.
    """

    def __init__(self, lm: LanguageModel, folder: str | Path) -> None:
        self.folder, self.made_by = made_folder(folder), maker_sha256(lm)

    def get(self, spec: RunSpec) -> Trace | None:
        """The trace of this spec, or None if none is stored.

        A damaged trace counts as not stored. A warning says so.
        """
        place = self.place(spec)
        if not (place / RECORD).exists():  # nothing, or what a killed save left: no trace yet
            return None
        try:
            return load_trace(place)
        except TraceError as error:
            warnings.warn(
                f"a stored trace cannot be used and is computed anew: {error}", stacklevel=2
            )
            return None

    def put(self, trace: Trace) -> None:
        """Save a trace under its spec.

        Raises:
            TraceError: if it cannot be written.
        """
        trace.save(self.place(trace.spec))

    def place(self, spec: RunSpec) -> Path:
        """The folder of this spec's trace, whether it exists or not."""
        name = hashlib.sha256(f"{self.made_by} {spec.key()}".encode()).hexdigest()[:32]
        return self.folder / name


def maker_sha256(lm: LanguageModel) -> str:
    """A hash of everything that a trace depends on beside its spec.

    It covers weights, dtype, device, versions, the number of threads, and tempo's own code.
    """
    maker = [lm.sha256, lm.provenance(), sys.version, torch.get_num_threads()]
    digest = hashlib.sha256(json.dumps(maker).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name not in JUDGING:
            digest.update(path.read_bytes())
    return digest.hexdigest()
