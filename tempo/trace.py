"""Trace and Step: everything recorded of one run, and how it is kept on disk without pickle.

Shapes: L layers, H query heads, Hkv key heads, w set width, N slots, N_k slots once set k is in,
D head size, E residual size, V vocabulary, P prompt.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tempo import files
from tempo.arrays import read_arrays
from tempo.errors import ResultsError, SpecError, TraceError
from tempo.inputs import checked, place
from tempo.parsing import parse_json, read_bytes, seal, unseal
from tempo.paths import Path as SetPath
from tempo.paths import best_members, most_probable
from tempo.selection import SMALLEST_PROBABILITY, member_weights
from tempo.spec import RunSpec
from tempo.text import escaped, joined

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame  # pyright: ignore[reportMissingImports]

FORMAT = 2  # of the saved folder; raised when an older reader would misread it
# Format 1 had no checksum of the record. A flipped bit cannot make a 2 of it, or a 1 of a 2.
FORMATS = (1, FORMAT)
STEP_ARRAYS = ("distribution", "logits", "attention", "siblings", "links", "residual")
# The files of a saved folder. The record names its arrays: a trace that replaces an earlier one
# writes the other of the two names, so that the one rename of the record changes both.
_ARRAYS, RECORD = ("arrays.npz", "arrays-2.npz"), "trace.json"
_SLOT_ARRAYS = ("slot_token", "slot_position", "slot_step")
_KV_ARRAYS = ("keys", "values", "raw_keys")
_STEP_FIELDS = (
    "tokens",
    "probabilities",
    "position",
    "slots",
    "texts",
    "ended",
    "dropped",
    "seconds",
)
_TRACE_FIELDS = (
    "prompt_tokens",
    "prompt_texts",
    "stop_reason",
    "seconds",
    "peak_bytes",
    "provenance",
)

# What a repr shows at most, so that it fits one line: characters, and members of a set.
LONGEST_PROMPT = 28
LONGEST_MODEL = 24
LONGEST_TEXT = 12
MOST_MEMBERS = 4


@dataclass(frozen=True, eq=False, repr=False)
class Step:
    """One generated set, and what it was chosen from.

    Attributes:
        tokens: Token ids of the members, most probable first; of a replay, as given.
        probabilities: Of the members, under `distribution`.
        position: The rotary position of the set; of sequential positions, of its first member.
        slots: Where the members stand in the cache.
        texts: The text of each member.
        ended: End-of-sequence tokens that reached the threshold but did not lead, and so were not
            appended.
        distribution: [V] float32, what the set was chosen from.
        seconds: Wall time of the pass that gave the distribution, which all runs of a batch share.
        logits: [w, V] float32, each member's own output; None if not captured.
        attention: [L, H, w, N_k] float32, what each member gives to each slot; None if not
            captured.
        siblings: [L, H, w, w] float32, the last w columns of attention: what members give each
            other; None if not captured.
        links: [w, w'] float32, the probability that each member came before each member of the
            next set, which has w'. A column sums to one. None for the last set, and for a readout
            other than `mixture`.
        dropped: The slots that this set and all later ones no longer attend to (`prune`).
        residual: [L + 1, w, E] float32, what enters each layer at each member, and last what the
            final norm gets; None if not captured.
    """

    tokens: list[int]
    probabilities: list[float]
    position: int
    slots: list[int]
    texts: list[str]
    ended: list[int]
    distribution: np.ndarray
    seconds: float = 0.0
    logits: np.ndarray | None = None
    attention: np.ndarray | None = None
    siblings: np.ndarray | None = None
    links: np.ndarray | None = None
    dropped: list[int] = field(default_factory=list)
    residual: np.ndarray | None = None

    def __repr__(self) -> str:
        shown = [
            f"{_quoted(text, LONGEST_TEXT)} {probability:.2g}"
            for text, probability in zip(self.texts, self.probabilities, strict=True)
        ]
        if len(shown) > MOST_MEMBERS:
            shown[MOST_MEMBERS:] = [f"{len(shown) - MOST_MEMBERS} more"]
        return f"<Step [{', '.join(shown)}] at position {self.position}>"

    def _repr_html_(self) -> str:
        from tempo.viewing.objects import step_html

        return step_html(self)


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """Everything recorded of one run: its spec, its sets, and the arrays it was asked to capture.

    Attributes:
        spec: The settings of the run.
        prompt_tokens: The token ids of the prompt, P of them.
        steps: One `Step` for each generated set.
        slot_token: [N] int64, the token in each slot of the cache, prompt first.
        slot_position: [N] int64, the rotary position of each slot.
        slot_step: [N] int64, the step that filled each slot; -1 for the prompt.
        stop_reason: Why the run ended: "max_steps", "eos" or "replay".
        seconds: Wall time from the run's start to its end, whatever else was in the batch.
        peak_bytes: The size of this run's part of the cache and of all that is recorded of it.
        provenance: What made the trace: model, dtype, device, and versions of the software.
        keys: [L, Hkv, N, D] float32 as cached; None unless "kv" was captured.
        values: [L, Hkv, N, D] float32; None unless "kv" was captured.
        raw_keys: [L, Hkv, N, D] float32, before rotation; None unless "kv" was captured.
        prompt_texts: The text of each token of the prompt; empty in a trace of an older tempo.

    Example:
        >>> import tempo
        >>> lm = tempo.load_model("tiny")
        >>> trace = tempo.generate(lm, "The cat", threshold=0.05, max_steps=3, capture="kv")
        >>> trace.slot_step.tolist()
        [-1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 1, 2, 2]
        >>> trace.slot_position[trace.slot_step == 0].tolist()  # one position for the whole set
        [7, 7, 7]
        >>> trace.keys.shape
        (3, 2, 13, 16)
    """

    spec: RunSpec
    prompt_tokens: list[int]
    steps: list[Step]
    slot_token: np.ndarray
    slot_position: np.ndarray
    slot_step: np.ndarray
    stop_reason: str
    seconds: float
    peak_bytes: int
    provenance: dict[str, Any] = field(default_factory=dict)
    keys: np.ndarray | None = None
    values: np.ndarray | None = None
    raw_keys: np.ndarray | None = None
    prompt_texts: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        prompt = self.spec.prompt
        if isinstance(prompt, str):
            shown = _quoted(prompt, LONGEST_PROMPT)
        else:
            shown = f"{len(prompt)} token id" + ("s" if len(prompt) > 1 else "")
        model = escaped(str(self.provenance.get("model", "unknown model")))
        if len(model) > LONGEST_MODEL:  # of a path or a hub id the end tells most
            model = "…" + model[1 - LONGEST_MODEL :]
        sets = "1 set" if len(self.steps) == 1 else f"{len(self.steps)} sets"
        mode = self.spec.visibility
        return f"<Trace {shown} + {sets}, {self.num_slots} slots, {mode}, {model}>"

    def _repr_html_(self) -> str:
        from tempo.viewing.page import view

        return view(self).html

    @property
    def widths(self) -> list[int]:
        """How many members each set has."""
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
        """(step, token) of each end-of-sequence token at the threshold that was not appended."""
        return [(k, token) for k, step in enumerate(self.steps) for token in step.ended]

    @property
    def num_slots(self) -> int:
        """N: the tokens of the prompt and of all sets."""
        return len(self.slot_token)

    @property
    def best_path(self) -> list[int]:
        """The token ids of the best path, one of each set: the way to read a run as one text.

        It ends in the most probable member of the last set. From there it goes back to the most
        probable parent each time. So it mixes no branches, unlike the most probable members.

        Raises:
            SpecError: if the run has another readout than `mixture`.
        """
        return [step.tokens[i] for step, i in zip(self.steps, self._best_members(), strict=True)]

    @property
    def best_text(self) -> str:
        """The texts of the members of `best_path`, joined."""
        chosen = zip(self.steps, self._best_members(), strict=True)
        return joined(step.texts[i] for step, i in chosen)

    def paths(self, num_paths: int = 10) -> list[SetPath]:
        """The most probable whole paths through the sets, best first.

        The first one need not be `best_path`, which fixes the last member before it looks back.

        Args:
            num_paths: How many to return at most.

        Raises:
            SpecError: if the run has another readout than `mixture`.

        Example:
            >>> import tempo
            >>> trace = tempo.generate(tempo.load_model("tiny"), "The cat", threshold=0.05)
            >>> best, *others = trace.paths(3)
            >>> len(best.tokens) == len(trace.steps)
            True
            >>> best.log_probability >= others[0].log_probability
            True
        """
        if num_paths < 1:
            raise SpecError(f"num_paths is {num_paths}; expected how many paths to return, from 1")
        links = self._links()
        last = member_weights(self.steps[-1].probabilities).numpy()
        # the probability of all paths together: of each set, what its members have
        mass = sum(
            math.log(max(sum(step.probabilities), SMALLEST_PROBABILITY)) for step in self.steps
        )
        found = []
        for log_share, members in most_probable(links, last, num_paths):
            chosen = list(zip(self.steps, members, strict=True))
            tokens = [step.tokens[i] for step, i in chosen]
            text = joined(step.texts[i] for step, i in chosen)
            found.append(SetPath(members, tokens, text, log_share + mass, math.exp(log_share)))
        return found

    def parents(self, step: int) -> list[int]:
        """For each member of a set, the index of its most probable parent in the set before.

        Args:
            step: The number of the set, from 1.

        Raises:
            SpecError: if there is no such set with one before it, or if the run has another
                readout than `mixture`.
        """
        if not 0 < step < len(self.steps):
            raise SpecError(
                f"step {step} has no set before it in this run; expected 1 to {len(self.steps) - 1}"
            )
        return self._links()[step - 1].argmax(axis=0).tolist()

    def to_frame(self) -> DataFrame:
        """A pandas frame with one row for each member of each set.

        Its columns: step, member, token, text, probability, position, slot, parent (the most
        probable member of the set before), parent_probability, on_best_path. The last three are
        missing where they are not known.

        Raises:
            TempoError: if pandas is not installed.
        """
        from tempo.viewing.frames import trace_frame

        return trace_frame(self)

    def plot_attention(
        self, step: int, *, layer: int | None = None, head: int | None = None
    ) -> Figure:
        """A matplotlib figure: what each member of a set gives to each slot.

        Args:
            step: The number of the set, from 0.
            layer: Which layer; by default the mean of all.
            head: Which query head; by default the mean of all.

        Raises:
            SpecError: if there is no such set, layer or head, or if attention was not captured.

        Example:
            >>> import tempo
            >>> lm = tempo.load_model("tiny")
            >>> trace = tempo.generate(lm, "The cat", max_steps=2, capture="attention")
            >>> figure = trace.plot_attention(1, layer=2, head=0)
            >>> figure.axes[0].get_title(loc="left")
            'Attention of set 1: layer 2, head 0'
        """
        from tempo.viewing.exports import plot_attention

        return plot_attention(self, step, layer=layer, head=head)

    def _links(self) -> list[np.ndarray]:
        """The links of every set but the last."""
        found = [step.links for step in self.steps[:-1] if step.links is not None]
        unknown = "which member came before which is not known of this run"
        if self.spec.readout != "mixture":
            raise SpecError(
                f"{unknown} (readout {self.spec.readout!r}); generate it with readout='mixture'"
            )
        if len(found) < len(self.steps) - 1:
            raise SpecError(f"{unknown}: it was saved by an older tempo; run it again")
        return found

    def _best_members(self) -> list[int]:
        return best_members(self._links(), np.array(self.steps[-1].probabilities))

    @checked(folder=place)
    def save(self, folder: str | Path) -> Path:
        """The folder, once the trace is written there, whole or not at all.

        An earlier trace is replaced by one rename at the end, and readers find either. Nothing is
        pickled. What else lies in the folder stays.

        Raises:
            TraceError: if the folder holds something else but no trace, or cannot be written; what
                was there stays.
        """
        folder = check_place(folder)
        is_new = not folder.exists()
        try:
            with files.locked(folder, "try again, or choose another folder", files.WAIT_SECONDS):
                self._write(folder)
        except (OSError, ResultsError) as error:
            if is_new:
                files.remove_empty(folder)
            raise TraceError(
                f"cannot write the trace to {folder}: {files.reason(error)}; "
                "nothing there was changed"
            ) from error
        return folder

    def _write(self, folder: Path) -> None:
        """Write arrays, then the record that names them; then remove what it no longer names."""
        earlier = _arrays_in_use(folder)
        free = [name for name in _ARRAYS if name != earlier]
        arrays = folder / next((n for n in free if not (folder / n).exists()), free[0])
        try:
            with files.replacing(arrays) as file:
                np.savez(file, **self._arrays())
            record = seal(self._record() | {"arrays": arrays.name, "sha256": _sha256(arrays)})
            files.write(folder / RECORD, json.dumps(record, indent=1))
        except BaseException:
            if _arrays_in_use(folder) != arrays.name:
                files.remove(arrays)
            raise
        for name in _ARRAYS:
            if name != arrays.name:
                files.remove(folder / name)  # or the next save does

    def _arrays(self) -> dict[str, Any]:
        """All arrays by the name that they are saved under; those of a step end in its number."""
        arrays = {name: getattr(self, name) for name in (*_SLOT_ARRAYS, *_KV_ARRAYS)}
        for name in STEP_ARRAYS:
            arrays |= {f"{name}_{k}": getattr(step, name) for k, step in enumerate(self.steps)}
        return {name: array for name, array in arrays.items() if array is not None}

    def _record(self) -> dict[str, Any]:
        """All that is no array, as JSON holds it."""
        steps = [{name: getattr(step, name) for name in _STEP_FIELDS} for step in self.steps]
        return {
            "format": FORMAT,
            "spec": self.spec.model_dump(mode="json"),
            "prompt_tokens": self.prompt_tokens,
            "prompt_texts": self.prompt_texts,
            "steps": steps,
            "stop_reason": self.stop_reason,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "provenance": self.provenance,
        }


@checked(folder=place)
def load_trace(folder: str | Path) -> Trace:
    """The trace that `Trace.save` wrote to `folder`, equal to the last bit.

    Args:
        folder: Where the trace was saved.

    Raises:
        TraceError: if the trace is missing or of another format, or if any byte of its arrays has
            changed.

    Example:
        >>> import tempfile, tempo
        >>> lm = tempo.load_model("tiny")
        >>> trace = tempo.generate(lm, "The cat", max_steps=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = tempo.load_trace(trace.save(f"{folder}/trace"))
        >>> again.sets == trace.sets
        True
    """
    folder = Path(folder)
    try:
        record, path, seen = _read(folder)
    except OSError as error:
        raise TraceError(
            f"no trace in {folder}: {error.strerror} ({error.filename}); "
            f"expected {RECORD} and {_ARRAYS[0]}"
        ) from None
    except ValueError as error:
        where = escaped(str(folder / RECORD))
        raise TraceError(f"{where} is damaged: {error}; run the generation again") from None
    found = record.get("format") if isinstance(record, dict) else type(record).__name__
    if type(found) is not int or found not in FORMATS:
        raise TraceError(
            f"{folder} has trace format {found!r:.40}, this tempo reads {FORMAT}; "
            "run the generation again"
        )
    if seen != record.get("sha256"):
        raise TraceError(
            f"{path} is damaged (sha256 {seen[:12]}, expected {record.get('sha256')!s:.12}); "
            "run again"
        )
    try:
        if found == FORMAT:
            record = unseal(record)
        return _whole(record, read_arrays(path))
    except (OSError, ValueError) as error:  # SpecError and pydantic's among them
        raise TraceError(
            f"{folder} is not a whole trace: {_first_line(error)}; run the generation again"
        ) from None


def _read(folder: Path) -> tuple[Any, Path, str]:
    """A folder's record, its arrays, and their hash; again if they are replaced meanwhile."""
    while True:
        content = read_bytes(folder / RECORD)
        record = parse_json(content)
        fields = record if isinstance(record, dict) else {}
        name = fields.get("arrays", _ARRAYS[0])
        path = folder / (name if name in _ARRAYS else _ARRAYS[0])
        try:
            seen = _sha256(path)
        except FileNotFoundError:
            if (folder / RECORD).read_bytes() == content:
                raise
            continue
        if seen == fields.get("sha256") or (folder / RECORD).read_bytes() == content:
            return record, path, seen


def check_place(folder: str | Path) -> Path:
    """The folder that a trace can be saved to, links followed. A caller asks before a run.

    Raises:
        TraceError: if something else than a trace is there.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not (folder / RECORD).is_file():
        # What a killed save left is ours: arrays that no record names yet.
        ours = folder.is_dir() and all(
            path.name in _ARRAYS or files.is_ours(path.name) for path in folder.iterdir()
        )
        if not ours:
            raise TraceError(
                f"{folder} exists and is not a saved trace; choose another folder or remove it"
            )
    return folder


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error).partition("\n")[0]


_Tokens = list[Annotated[int, Field(ge=0)]]
_Share = Annotated[float, Field(ge=0, le=1 + 1e-3)]  # a probability, rounded
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _StepRecord(BaseModel):
    """A step without its arrays, as `trace.json` holds it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tokens: Annotated[_Tokens, Field(min_length=1)]
    probabilities: list[_Share]
    position: Annotated[int, Field(ge=0)]
    slots: _Tokens
    texts: list[str]
    ended: _Tokens
    seconds: _Seconds
    dropped: _Tokens = Field(default_factory=list)


class _TraceRecord(BaseModel):
    """All of a trace but its arrays, as `trace.json` holds it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: int
    spec: dict[str, Any]
    prompt_tokens: Annotated[_Tokens, Field(min_length=1)]
    prompt_texts: list[str] = Field(default_factory=list)
    steps: list[_StepRecord]
    stop_reason: Literal["max_steps", "eos", "replay"]
    seconds: _Seconds
    peak_bytes: Annotated[int, Field(ge=0)]
    provenance: dict[str, Any]
    arrays: Literal["arrays.npz", "arrays-2.npz"] = "arrays.npz"
    sha256: str


def _whole(record: dict[str, Any], arrays: dict[str, np.ndarray]) -> Trace:
    """The trace of a record and its arrays, if all parts fit each other. Else ValueError."""
    checked = _TraceRecord.model_validate(record)
    steps = []
    for k, fields in enumerate(checked.steps):
        captured: dict[str, Any] = {name: arrays.pop(f"{name}_{k}", None) for name in STEP_ARRAYS}
        if captured["distribution"] is None:
            raise ValueError(f"distribution_{k} is missing")
        steps.append(Step(**dict(fields), **captured))
    missing = [name for name in _SLOT_ARRAYS if name not in arrays]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    slots = {name: arrays.pop(name) for name in _SLOT_ARRAYS}
    kv: dict[str, Any] = {name: arrays.pop(name, None) for name in _KV_ARRAYS}
    if arrays:
        raise ValueError(f"an array {min(arrays)!r:.40} belongs to no step")
    rest: dict[str, Any] = {name: getattr(checked, name) for name in _TRACE_FIELDS}
    trace = Trace(spec=RunSpec(**checked.spec), steps=steps, **slots, **kv, **rest)
    _check_shapes(trace)
    return trace


def _check_shapes(trace: Trace) -> None:
    """Raise ValueError unless every list and array has the size that the sets give it."""
    ends = [len(trace.prompt_tokens)]  # the slots in use before each set, and after the last
    for k, step in enumerate(trace.steps):
        ends.append(ends[-1] + len(step.tokens))
        members = (step.probabilities, step.texts, step.slots)
        if any(len(values) != len(step.tokens) for values in members):
            raise ValueError(f"step {k} has {len(step.tokens)} tokens, and not as much of the rest")
        if any(slot >= ends[k] for slot in step.dropped):
            raise ValueError(f"step {k} drops slots that come after it")
        if step.slots != list(range(ends[k], ends[k + 1])):
            raise ValueError(f"step {k} stands in other slots than its tokens do")
    if len(trace.prompt_texts) not in (0, len(trace.prompt_tokens)):
        raise ValueError(f"{len(trace.prompt_texts)} texts of {len(trace.prompt_tokens)} tokens")
    tokens = [*trace.prompt_tokens, *(token for step in trace.steps for token in step.tokens)]
    num_slots, vocabulary = len(tokens), None
    if trace.steps:
        vocabulary = trace.steps[0].distribution.shape[0] if trace.steps[0].distribution.ndim else 0
    expected = {name: (num_slots,) for name in _SLOT_ARRAYS}
    for name, shape in expected.items():
        array = getattr(trace, name)
        if array.dtype != np.int64 or array.shape != shape:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, expected int64 {shape}")
    if trace.slot_token.tolist() != tokens:
        raise ValueError("slot_token holds other tokens than prompt and sets")
    if (trace.slot_step != slot_steps(len(trace.prompt_tokens), trace.widths)).any():
        raise ValueError("slot_step does not follow the sets")
    for k, step in enumerate(trace.steps):
        width = len(step.tokens)
        shapes = {
            "distribution": (vocabulary,),
            "logits": (width, vocabulary),
            "attention": (None, None, width, ends[k + 1]),
            "siblings": (None, None, width, width),
            "links": (width, trace.widths[k + 1] if k + 1 < len(trace.steps) else 0),
            "residual": (None, width, None),
        }
        for name, shape in shapes.items():
            _check_array(f"{name}_{k}", getattr(step, name), shape)
    for name in _KV_ARRAYS:
        _check_array(name, getattr(trace, name), (None, None, num_slots, None))


def _check_array(name: str, array: np.ndarray | None, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless the array is absent, or float32 of this shape; None is any size."""
    if array is None:
        return
    fits = array.ndim == len(shape) and all(
        wanted in (None, seen) for wanted, seen in zip(shape, array.shape, strict=True)
    )
    if array.dtype != np.float32 or not fits:
        raise ValueError(f"{name} is {array.dtype} {array.shape}, expected float32 {shape}")


def made_folder(folder: str | Path) -> Path:
    """The folder, made if need be.

    Raises:
        TraceError: if it cannot be made. A caller makes it before a run, so that no run is begun
            whose result has no place.
    """
    try:
        return files.make_folder(folder)
    except (OSError, ValueError) as error:  # a NUL in its name is a ValueError
        raise TraceError(
            f"{escaped(str(folder))} cannot be used as a folder "
            f"({getattr(error, 'strerror', None) or error}); "
            "name one that exists or can be made"
        ) from None


def _arrays_in_use(folder: Path) -> str | None:
    """The arrays that the folder's record names; None without a record that can be read."""
    try:
        record = parse_json(read_bytes(folder / RECORD))
        return record.get("arrays", _ARRAYS[0])  # an earlier tempo had one name, and did not say it
    except (OSError, ValueError, AttributeError):
        return None


def check_writable(folder: str | Path) -> None:
    """None if a file can be made in the folder, which is made if need be.

    Raises:
        TraceError: if not. A caller asks before a run.
    """
    try:
        with tempfile.TemporaryFile(dir=made_folder(folder)):
            pass
    except OSError as error:
        raise TraceError(
            f"nothing can be written to {folder} ({error.strerror}); name a folder that is yours, "
            "on a disk that is not read-only"
        ) from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def slot_steps(num_prompt: int, widths: Sequence[int]) -> np.ndarray:
    """Which step each slot belongs to, -1 for the prompt: int64 [N]."""
    return np.repeat(np.arange(-1, len(widths)), [num_prompt, *widths]).astype(np.int64)


def _quoted(text: str, longest: int) -> str:
    """The text in quotes, safe to print, cut if it is long."""
    shown = escaped(text[: longest + 1])  # enough to see whether it is longer
    return f"'{shown}'" if len(shown) <= longest else f"'{shown[: longest - 1]}…'"
