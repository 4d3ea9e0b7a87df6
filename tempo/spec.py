"""RunSpec: everything that determines a run, checked before any of it is computed."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from tempo.errors import SpecError

Visibility = Literal["isolated", "visible", "causal"]
Positions = Literal["shared", "sequential"]
Readout = Literal["mixture", "mean_logits", "last", "first"]
Weighting = Literal["none", "count", "probability"]
IsolatedMass = Literal["spread", "self"]
Capture = Literal["attention", "siblings", "logits", "kv"]

VISIBILITIES: tuple[str, ...] = get_args(Visibility)
POSITIONS: tuple[str, ...] = get_args(Positions)
READOUTS: tuple[str, ...] = get_args(Readout)
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)
CAPTURES: tuple[str, ...] = get_args(Capture)


def _token_ids(value: Any) -> Any:
    """Integers of any kind (NumPy's too) as a tuple of int; anything else is left for pydantic to refuse."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return value
    items = list(value)
    if any(isinstance(item, bool) or not hasattr(item, "__index__") for item in items):
        return tuple(items)
    return tuple(operator.index(item) for item in items)


def _token_sets(value: Any) -> Any:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return value
    return tuple(_token_ids(item) for item in value)


def _weight_sets(value: Any) -> Any:
    """Nested sequences of numbers as tuples of float; anything else is left for pydantic to refuse."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return value
    return tuple(
        tuple(map(float, row))
        if isinstance(row, Iterable) and not isinstance(row, str | bytes)
        else row
        for row in value
    )


def _names(value: Any) -> Any:
    """One name or several, without repetition, in the order of `CAPTURES` so that equal specs compare equal."""
    names = (
        [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else value
    )
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        known = [name for name in CAPTURES if name in names]
        return tuple(known + [name for name in names if name not in CAPTURES])
    return names


TokenIds = Annotated[tuple[int, ...], BeforeValidator(_token_ids)]
TokenSets = Annotated[tuple[TokenIds, ...], BeforeValidator(_token_sets)]
WeightSets = Annotated[tuple[tuple[float, ...], ...], BeforeValidator(_weight_sets)]
LayerRange = Annotated[tuple[int, int], BeforeValidator(_token_ids)]
Captures = Annotated[tuple[Capture, ...], BeforeValidator(_names)]


class Strict(BaseModel):
    """A frozen pydantic model whose errors are `SpecError`s that name the key, the value and the remedy."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise SpecError(_explain(error, type(self))) from None


class RunSpec(Strict):
    """All settings of one TEMPO run.

    prompt: text, or a list of token ids.
    threshold: every token with at least this probability joins the set, in (0, 1].
    max_steps: how many sets a free run generates at most; a replay always runs all its sets.
    visibility: which siblings a sibling attends to: none (`isolated`), all (`visible`), earlier slots (`causal`).
    positions: one rotary position for a whole set (`shared`), or one for each slot (`sequential`, the control).
    readout: how the members' logits become the one next distribution.
    weighting: added to the attention logits of keys in sets wider than one: nothing, -log n, or +log w_i.
    max_width: keep only this many of the most probable members.
    stop_at_eos: end after a set led by an end-of-sequence token, and never append one that does not lead.
    replay: token sets to force, one a step, instead of choosing; their order is the order of the slots. A set may hold
        copies of one token, which no free run does.
    replay_positions: with a replay, the rotary position of each member of each set, instead of what `positions` gives.
    replay_weights: with a replay, how much each member of each set weighs (1: as it is), instead of what `weighting` gives:
        its logarithm is added to the attention logits of that key.
    isolated_layers: [first, end) of the layers in which siblings are isolated, whatever `visibility` says.
    isolated_mass: where a sibling's attention goes in those layers: over all it may still see (`spread`, what removing
        edges does), or to itself (`self`: its own key counts for the whole set, +log n, so that the set keeps about its mass).
    capture: any of "attention", "siblings" (of attention the columns of a set's own members only), "logits", "kv".
    """

    prompt: str | TokenIds
    threshold: float = 0.1
    max_steps: int = Field(default=10, ge=1)
    visibility: Visibility = "isolated"
    positions: Positions = "shared"
    readout: Readout = "mixture"
    weighting: Weighting = "none"
    max_width: int | None = Field(default=None, ge=1)
    stop_at_eos: bool = True
    replay: TokenSets | None = None
    replay_positions: TokenSets | None = None
    replay_weights: WeightSets | None = None
    isolated_layers: LayerRange | None = None
    isolated_mass: IsolatedMass = "spread"
    capture: Captures = ()

    @field_validator("prompt")
    @classmethod
    def _prompt_not_empty(cls, prompt: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if len(prompt) == 0:
            raise ValueError("the prompt is empty; give at least one token")
        if isinstance(prompt, str) and not prompt.isascii():
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"character {error.start} is no text (a lone surrogate); give valid Unicode"
                ) from None
        return prompt

    @field_validator("threshold")
    @classmethod
    def _threshold_is_probability(cls, threshold: float) -> float:
        if not (math.isfinite(threshold) and 0.0 < threshold <= 1.0):
            raise ValueError("expected a probability above 0 and at most 1, for example 0.1")
        return threshold

    @field_validator("replay")
    @classmethod
    def _replay_is_sets(
        cls, replay: tuple[tuple[int, ...], ...] | None
    ) -> tuple[tuple[int, ...], ...] | None:
        if replay is None:
            return None
        if not replay:
            raise ValueError(
                "no sets to replay; give at least one, or leave replay out for a free run"
            )
        for step, tokens in enumerate(replay):
            if not tokens:
                raise ValueError(
                    f"the set of step {step} is empty; every step appends at least one token"
                )
        return replay

    @field_validator("isolated_layers")
    @classmethod
    def _isolated_layers_is_range(cls, layers: tuple[int, int] | None) -> tuple[int, int] | None:
        if layers is not None and not 0 <= layers[0] < layers[1]:
            raise ValueError(
                "expected the first layer and the one after the last, for example [0, 4]"
            )
        return layers

    @model_validator(mode="after")
    def _details_fit_the_replay(self) -> RunSpec:
        for name in ("replay_positions", "replay_weights"):
            rows = getattr(self, name)
            if rows is None:
                continue
            if self.replay is None:
                raise ValueError(
                    f"{name} needs a replay: it says something about each member of its sets"
                )
            if [len(row) for row in rows] != [len(tokens) for tokens in self.replay]:
                raise ValueError(
                    f"{name} has rows of {[len(row) for row in rows]} numbers, the replay sets of {[len(t) for t in self.replay]} tokens; "
                    "give one number for each token"
                )
        if any(position < 0 for row in self.replay_positions or () for position in row):
            raise ValueError(
                "replay_positions holds a negative position; positions count from 0, the first prompt token"
            )
        if any(
            not (math.isfinite(weight) and weight > 0)
            for row in self.replay_weights or ()
            for weight in row
        ):
            raise ValueError(
                "replay_weights holds a weight that is not above 0; its logarithm is added to attention logits"
            )
        if self.isolated_mass == "self" and self.isolated_layers is None:
            raise ValueError(
                "isolated_mass='self' says what isolated_layers do with the attention; give isolated_layers as well"
            )
        return self

    def but(self, **changes: Any) -> RunSpec:
        """This spec with some settings changed, checked again. `replay` also takes a `Trace`."""
        replay = changes.get("replay")
        if replay is not None and hasattr(replay, "steps"):
            changes["replay"] = [step.tokens for step in replay.steps]
        return RunSpec(**{**self.model_dump(), **changes})

    def key(self, *, with_capture: bool = True) -> str:
        """A short stable hash of the settings; without capture, runs that compute the same thing share it."""
        settings = self.model_dump(mode="json", exclude=None if with_capture else {"capture"})
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The settings as YAML; `from_yaml` gives an equal spec back."""
        # PyYAML folds these line breaks where it writes them as they are
        breaks = isinstance(self.prompt, str) and not {"\x85", "\u2028", "\u2029"}.isdisjoint(
            self.prompt
        )
        return yaml.safe_dump(
            self.model_dump(mode="json"), sort_keys=False, allow_unicode=not breaks
        )

    @classmethod
    def from_yaml(cls, source: str | Path) -> RunSpec:
        """The spec in a YAML file (`Path`) or YAML text (`str`). Raises SpecError naming file, key and nearest key."""
        return load_yaml(cls, source)


S = TypeVar("S", bound=Strict)


def load_yaml(kind: type[S], source: str | Path) -> S:
    """A `Strict` model read from a YAML file (`Path`) or YAML text (`str`); SpecError names the file and the key."""
    where = str(source) if isinstance(source, Path) else "the YAML text"
    try:
        settings = yaml.safe_load(
            source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        )
    except OSError as error:
        raise SpecError(
            f"cannot read {where}: {error.strerror}; give the path of a readable YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, Mapping):
        raise SpecError(
            f"{where} holds {type(settings).__name__}, expected keys and values such as 'threshold: 0.1'"
        )
    try:
        return kind(**{str(key): value for key, value in settings.items()})
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """All problems of a pydantic error, one a line: key, what was seen, what is expected."""
    lines = []
    for problem in error.errors():
        key = str(problem["loc"][0]) if problem["loc"] else ""
        seen = repr(problem["input"])
        seen = seen if len(seen) <= 80 else seen[:77] + "..."
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, kind.model_fields, n=1)
            hint = (
                f"did you mean '{near[0]}'?"
                if near
                else f"valid keys: {', '.join(kind.model_fields)}"
            )
            line = f"unknown key '{key}'; {hint}"
        elif problem["type"] == "missing":
            line = f"'{key}' is missing"
        else:
            line = (f"{key}={seen}: " if key else "") + problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "literal_error" and isinstance(problem["input"], str):
                choices = [
                    str(choice)
                    for choice in get_args(kind.model_fields[key].annotation) or CAPTURES
                ]
                near = difflib.get_close_matches(problem["input"], choices, n=1)
                line += f"; did you mean '{near[0]}'?" if near else ""
        if line not in lines:
            lines.append(line)
    return f"{kind.__name__}: " + "\n  ".join(lines)
