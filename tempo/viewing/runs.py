"""What `tempo view` shows: saved traces, or a prompt in both modes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tempo.errors import SpecError, TraceError
from tempo.spec import Capture, RunSpec, Visibility
from tempo.text import escaped
from tempo.trace import RECORD, Trace, load_trace
from tempo.viewing.page import View, check_target, view

if TYPE_CHECKING:
    from tempo.models import LanguageModel

__all__ = ["check_target", "folders_of", "view_folders", "view_prompt"]

MODES: tuple[Visibility, ...] = ("isolated", "visible")
CAPTURED: tuple[Capture, ...] = ("attention", "logits")
Generate = Callable[["LanguageModel", Sequence[RunSpec]], list[Trace]]


def folders_of(given: Sequence[str]) -> list[Path]:
    """The folders that a command line names; none if it is a prompt.

    Raises:
        TraceError: if one of several is no folder of a trace, or if one looks like a path and
            nothing is there.
    """
    folders = [Path(source) for source in given if os.path.isdir(source)]
    if len(folders) == len(given):
        return folders
    other = next(source for source in given if not os.path.isdir(source))
    is_like_a_path = not any(map(str.isspace, other)) and (
        os.sep in other or other.startswith((".", "~"))
    )
    if len(given) > 1 or is_like_a_path:
        raise TraceError(
            f"there is no folder {escaped(other)[:200]!r}; expected traces that --save wrote, or "
            f"one text to continue, in quotes (one that looks like a path goes into --config)"
        )
    return []


def view_folders(folders: Sequence[Path], model: tuple[str, str, str] | None) -> View:
    """The saved traces side by side.

    Args:
        folders: Where they were saved. A folder of traces, as `tempo compare --save` makes it,
            stands for all of them.
        model: Name, dtype and device of the model that knows the texts of all tokens. Without it
            the traces' own model is taken, if it is a known one that is here.

    Raises:
        TraceError: if a folder holds no trace.
    """
    places = [place for folder in folders for place in _places(folder)]
    traces = [load_trace(place) for place in places]
    with _model(traces, model) as lm:
        if lm is not None:
            _check_model(lm, traces)
        return view(*traces, lm=lm)


def _places(folder: Path) -> list[Path]:
    if (folder / RECORD).is_file():
        return [folder]
    inside = sorted(path.parent for path in folder.glob(f"*/{RECORD}"))
    return inside or [folder]  # whose loading says what is missing


def _model(
    traces: Sequence[Trace], named: tuple[str, str, str] | None
) -> AbstractContextManager[LanguageModel | None]:
    from tempo.models import load_model
    from tempo.wheels import KNOWN_MODELS

    if named:
        return load_model(*named)
    names = {str(trace.provenance.get("model")) for trace in traces}
    known = KNOWN_MODELS.get(names.pop()) if len(names) == 1 else None
    return load_model(known.name) if known and known.is_present() else nullcontext(None)


def _check_model(lm: LanguageModel, traces: Sequence[Trace]) -> None:
    """Raise unless the model has these traces' tokens: texts of another one would be wrong."""
    for trace in traces:
        for step in trace.steps:
            for token, text in zip(step.tokens, step.texts, strict=True):
                if token >= lm.vocab_size or lm.token_text(token) != text:
                    raise SpecError(
                        f"model {lm.name!r} has other tokens than the trace of "
                        f"{str(trace.provenance.get('model'))!r:.100}; name the trace's own model "
                        "with --model"
                    )


def _captured(lm: LanguageModel) -> tuple[Capture, ...]:
    """What a page shows; residuals only of a model that has a residual stream."""
    return CAPTURED if lm.reason_against_residual else (*CAPTURED, "residual")


def view_prompt(
    lm: LanguageModel,
    spec: RunSpec,
    visibility: Visibility | None,
    generate: Generate,
    captured: tuple[Capture, ...] = (),
) -> View:
    """A prompt in both modes on the sets that isolated mode chooses, or in one mode.

    Args:
        lm: The model.
        spec: The settings. What a page shows is captured in addition.
        visibility: The mode. None means both.
        generate: Makes the traces of specs.
        captured: What the page shows beside the sets; by default all that it can.
    """
    shows = captured or _captured(lm)
    spec = spec.but(capture=tuple(dict.fromkeys((*spec.capture, *shows))))
    if visibility is not None:
        return view(*generate(lm, [spec.but(visibility=visibility)]), lm=lm)
    if not spec.replay:
        source = generate(lm, [spec.but(visibility="isolated", capture=())])[0]
        spec = spec.but(replay=source)
    # Both in one batch: runs of other batch shapes differ by rounding.
    return view(*generate(lm, [spec.but(visibility=mode) for mode in MODES]), lm=lm)
