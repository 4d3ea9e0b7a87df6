"""Saved traces, found by everything that determines them.

A sweep that was interrupted continues where it stopped. A sweep whose traces are all stored runs no
model.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path

from tempo import files
from tempo.errors import TraceError
from tempo.identity import maker_sha256, unnamed_hooks
from tempo.inputs import checked, model, place
from tempo.models import LanguageModel
from tempo.spec import RunSpec
from tempo.trace import RECORD, Trace, load_trace, made_folder

MAKER = "maker"  # of a stored trace's provenance: a hash of what computed it


class TraceStore:
    """A folder of traces, one subfolder for each spec.

    A trace's name is a hash of its spec and of the model, versions and code that computed it.
    """

    @checked(lm=model, folder=place)
    def __init__(self, lm: LanguageModel, folder: str | Path) -> None:
        self.folder, self.made_by = made_folder(folder), maker_sha256(lm)
        if hooked := unnamed_hooks(lm):
            warnings.warn(
                f"{len(hooked)} modules have a hook or a method of yours whose effect cannot be "
                f"told, as it holds an object (first: {hooked[0]}): traces are stored, and never "
                "found again. A plain function with plain values would be",
                stacklevel=4,
            )

    def get(self, spec: RunSpec) -> Trace | None:
        """The trace of this spec, or None if none is stored.

        A damaged trace counts as not stored, and so does one of another spec or another model that
        was put there. A warning says so.
        """
        place = self.place(spec)
        if not (place / RECORD).exists():  # nothing, or what a killed save left: no trace yet
            return None
        files.sweep(place)
        try:
            trace = load_trace(place)
            if trace.spec != spec:
                raise TraceError(f"{place} holds a trace of another spec, {trace.spec}")
            if trace.provenance.get(MAKER) != self.made_by:
                raise TraceError(f"{place} holds a trace that another model or software made")
        except TraceError as error:
            warnings.warn(
                f"a stored trace cannot be used and is computed anew: {error}", stacklevel=2
            )
            return None
        made = {name: value for name, value in trace.provenance.items() if name != MAKER}
        return replace(trace, provenance=made)

    def put(self, trace: Trace) -> None:
        """Save a trace under its spec.

        Raises:
            TraceError: if it cannot be written.
        """
        made = {**trace.provenance, MAKER: self.made_by}
        replace(trace, provenance=made).save(self.place(trace.spec))

    def place(self, spec: RunSpec) -> Path:
        """The folder of this spec's trace, whether it exists or not."""
        name = hashlib.sha256(f"{self.made_by} {spec.key()}".encode()).hexdigest()[:32]
        return self.folder / name
