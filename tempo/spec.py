"""RunSpec: everything that determines a run, checked before any of it is computed."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, get_args, get_origin

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
from tempo.inputs import conform, place, seen, unknown_key
from tempo.parsing import MOST_YAML_BYTES, dump_yaml, parse_yaml, read_text
from tempo.text import escaped

Visibility = Literal["isolated", "visible", "causal"]
Positions = Literal["shared", "sequential"]
Readout = Literal["mixture", "mean_logits", "last", "first"]
Weighting = Literal["none", "count", "probability", "posterior", "best_parent"]
PruneBy = Literal["posterior", "attention"]
IsolatedMass = Literal["spread", "self"]
Capture = Literal["attention", "siblings", "logits", "kv", "residual"]

VISIBILITIES: tuple[Visibility, ...] = get_args(Visibility)
POSITIONS: tuple[Positions, ...] = get_args(Positions)
READOUTS: tuple[Readout, ...] = get_args(Readout)
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
CAPTURES: tuple[Capture, ...] = get_args(Capture)
# Their number depends on the query, through which member came before which.
BY_QUERY: tuple[Weighting, ...] = ("posterior", "best_parent")

# What is taken as a prompt: text, token ids, or what a tokenizer returns (see `plain_prompt`).
Prompt: TypeAlias = str | Iterable[Any]

LINK_SLACK = 1e-4  # how far from one the columns of links that went through float32 may sum
LONGEST_REPR = 40  # characters of one value that the repr of a spec shows


def plain_prompt(value: Any) -> Any:
    """A prompt as text or as a tuple of token ids, from any form that tokenizers give.

    Taken are text, token ids, an array or tensor [P] or [1, P], a list of one list, and a mapping
    that holds such `input_ids`: what `tokenizer(...)` or `apply_chat_template` returns. A value
    that is none of these is returned as it is, for the caller to refuse.

    Raises:
        SpecError: if there are several rows, if the tokens are padded, if a mapping has no
            `input_ids`, or if the items are messages.
    """
    if isinstance(value, Mapping):
        value = _input_ids(value)
    if not _is_row(value):
        return value
    items = _items(value)
    if any(isinstance(item, Mapping) for item in items):
        raise SpecError(
            "holds messages or other mappings; expected token ids, as lm.chat(messages) gives"
        )
    if any(map(_is_row, items)):
        if len(items) != 1:
            raise SpecError(
                f"holds {len(items)} rows, and a run has one prompt; "
                "for several prompts use generate_batch with one RunSpec each"
            )
        items = _items(items[0])
    return tuple(map(_integer, items))


def _input_ids(encoding: Mapping[str, Any]) -> Any:
    """The token ids of what a tokenizer returned."""
    if "input_ids" not in encoding:
        raise SpecError(
            f"is a mapping with the keys {sorted(map(str, encoding))}; "
            "expected text, token ids, or what a tokenizer returns, which holds input_ids"
        )
    mask = encoding.get("attention_mask")
    if mask is not None:
        rows = [_items(row) if _is_row(row) else [row] for row in _items(mask)]
        if any(entry == 0 for row in rows for entry in row):
            raise SpecError(
                "is padded (its attention_mask holds zeros), and a run would read the padding; "
                "call the tokenizer without padding"
            )
    return encoding["input_ids"]


def _is_row(value: Any) -> bool:
    """Whether this is a sequence of something, and not text or a single number."""
    if isinstance(value, str | bytes | Mapping) or getattr(value, "ndim", 1) == 0:
        return False
    return isinstance(value, Iterable)


def _items(row: Any) -> list[Any]:
    # tolist() gives plain numbers, and brings a tensor from the device at once
    return row.tolist() if hasattr(row, "tolist") else list(row)


def _integer(item: Any) -> Any:
    """An integer of any library as int; anything else is left for pydantic to refuse."""
    # Python takes True for 1; in a prompt it is a mistake. So is NumPy's.
    if isinstance(item, bool) or type(item).__name__ in ("bool", "bool_"):
        return item
    try:
        return operator.index(item)
    except TypeError:
        return item


def _token_ids(value: Any) -> Any:
    """Integers of any kind as a tuple of int; anything else is left for pydantic to refuse."""
    return tuple(map(_integer, _items(value))) if _is_row(value) else value


def _replayed_sets(value: Any) -> Any:
    """The sets of a trace, or nested integers, as tuples of int."""
    if hasattr(value, "steps"):  # a Trace, which this module cannot import
        value = [step.tokens for step in value.steps]
    return _token_sets(value)


def _token_sets(value: Any) -> Any:
    """Nested integers as tuples of int; anything else is left for pydantic to refuse."""
    return tuple(map(_token_ids, value)) if _is_row(value) else value


def _weight_sets(value: Any) -> Any:
    """Nested numbers as tuples of float; anything else is left for pydantic to refuse."""
    if not _is_row(value):
        return value
    return tuple(tuple(map(_float, _items(row))) if _is_row(row) else row for row in value)


def _float(item: Any) -> Any:
    """A number of any library as float; anything else is left for pydantic to refuse."""
    return float(item) if isinstance(item, Real) and not isinstance(item, bool) else item


def _matrices(value: Any) -> Any:
    """Matrices as nested tuples of float; anything else is left for pydantic to refuse."""
    return tuple(map(_weight_sets, value)) if isinstance(value, Iterable) else value


def _numbers(value: Any) -> Any:
    """Numbers as a tuple of float; anything else is left for pydantic to refuse."""
    return tuple(_items(value)) if _is_row(value) else value


def _names(value: Any) -> Any:
    """Names, each once and in the order of `CAPTURES`, so that equal specs compare equal."""
    if isinstance(value, str):
        names: Any = [value]
    else:
        names = list(value) if isinstance(value, Iterable) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return names
    known = [name for name in CAPTURES if name in names]
    return (*known, *(name for name in names if name not in CAPTURES))


TokenIds = Annotated[tuple[int, ...], BeforeValidator(_token_ids)]
Captures = Annotated[tuple[Capture, ...], BeforeValidator(_names)]


class Strict(BaseModel):
    """A frozen pydantic model whose errors are SpecErrors: they name key, value and remedy."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, /, **settings: Any) -> None:  # a file may hold the key "self"
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise SpecError(_explain(error, type(self))) from None


class RunSpec(Strict):
    """All settings of one TEMPO run: frozen, checked when it is made, and comparable.

    Attributes:
        prompt: Text, or token ids in any form that a tokenizer or `lm.chat` returns: a list, an
            array or tensor [P] or [1, P], a list of one list, or a mapping with `input_ids`.
        threshold: Every token with at least this probability joins the set. If no token reaches
            it, the most probable one joins alone. 0 lets every token in, for another rule to
            choose from.
        schedule: Thresholds by step, instead of `threshold`; the last one holds for later steps.
        top_k: Only the k most probable tokens may join a set.
        top_p: Only the most probable tokens that together first reach this probability may join.
        min_p: Only tokens with at least this share of the top probability may join.
        sample: Draw so many of the tokens that may join, without replacement, each in proportion
            to its probability. None takes all of them.
        seed: Of the draws. The same seed, prompt and step give the same draw.
        max_steps: A free run generates at most this many sets. A replay runs all its sets.
        visibility: Which siblings a sibling attends to: none (`isolated`), all (`visible`), or
            those in earlier slots (`causal`).
        positions: One rotary position for a whole set (`shared`), or the next position for each
            token (`sequential`, the control).
        readout: How the members' logits become the one next distribution: the mixture of their
            softmaxes by probability (`mixture`), the softmax of their mean (`mean_logits`), or
            the softmax of one member (`last`, `first`).
        weighting: What is added to the attention logits of keys in sets wider than one: nothing
            (`none`), -log n for n members (`count`), the log of the member's share
            (`probability`), or the log of the probability that this member came before the one
            that attends (`posterior`; `best_parent` keeps only the most probable path to it).
        prune: Drop an earlier member for all later queries once its posterior, over the members
            of the newest set, is below this. The most probable one of each set stays.
        prune_by: What is compared with `prune`: the `posterior`, or the member's share of the
            `attention` that its set got from the newest forwarded set, over layers and heads.
        max_width: Only this many of the most probable tokens join a set; None sets no limit.
        stop_at_eos: Whether a run ends after a set that an end-of-sequence token leads. Such a
            token that does not lead is then never appended.
        replay: Token sets to force, one a step, instead of choosing; or a Trace, whose sets are
            taken. Their order is the order of the slots. A set may hold one token twice.
        replay_positions: With a replay, the rotary position of each member of each set, instead
            of what `positions` gives.
        replay_weights: With a replay, the weight of each member of each set (1 leaves it as it
            is), instead of what `weighting` gives. Its log is added to that key's attention
            logits.
        replay_links: With a replay and weighting `posterior` or `best_parent`, the probability
            that each member came before each member of the next set, [w, w'] for every set but
            the last, instead of what the members predict. Columns sum to one.
        weighting_layers: The layers (first, end), end excluded, in which `weighting` or
            `replay_weights` count. None means all. It excludes `isolated_layers`.
        isolated_layers: The layers (first, end), end excluded, in which siblings are isolated
            whatever `visibility` says.
        isolated_mass: Where a sibling's attention goes in those layers: to all it still sees
            (`spread`), or to itself (`self`: its own key counts for all n members, +log n).
        capture: What to record beside the sets, one name or several: "attention" [L, H, w, N],
            "siblings" (the set's own columns of attention, [L, H, w, w]), "logits" [w, V], "kv"
            (keys and values [L, Hkv, N, D]), "residual" (the stream before each layer and after
            the last, [L + 1, w, E]).

    Raises:
        SpecError: if a setting is unknown or cannot be run; the message names every problem.

    Example:
        >>> import tempo
        >>> spec = tempo.RunSpec(prompt="The cat", threshold=0.05)
        >>> spec.but(visibility="visible")
        RunSpec(prompt='The cat', threshold=0.05, visibility='visible')
        >>> tempo.RunSpec(prompt="The cat", treshold=0.05)
        Traceback (most recent call last):
        tempo.errors.SpecError: RunSpec: unknown key 'treshold'; did you mean 'threshold'?
    """

    prompt: str | tuple[int, ...]
    threshold: float = 0.1
    schedule: tuple[float, ...] | None = None
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = None
    min_p: float | None = None
    sample: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    max_steps: int = Field(default=10, ge=1)
    visibility: Visibility = "isolated"
    positions: Positions = "shared"
    readout: Readout = "mixture"
    weighting: Weighting = "none"
    prune: float | None = None
    prune_by: PruneBy = "posterior"
    max_width: int | None = Field(default=None, ge=1)
    stop_at_eos: bool = True
    replay: tuple[tuple[int, ...], ...] | None = None
    replay_positions: tuple[tuple[int, ...], ...] | None = None
    replay_weights: tuple[tuple[float, ...], ...] | None = None
    replay_links: tuple[tuple[tuple[float, ...], ...], ...] | None = None
    weighting_layers: tuple[int, int] | None = None
    isolated_layers: tuple[int, int] | None = None
    isolated_mass: IsolatedMass = "spread"
    capture: tuple[Capture, ...] = ()

    _plain_prompt = field_validator("prompt", mode="before")(plain_prompt)
    _plain_sets = field_validator("replay", mode="before")(_replayed_sets)
    _plain_positions = field_validator("replay_positions", mode="before")(_token_sets)
    _plain_weights = field_validator("replay_weights", mode="before")(_weight_sets)
    _plain_links = field_validator("replay_links", mode="before")(_matrices)
    _plain_schedule = field_validator("schedule", mode="before")(_numbers)
    _plain_layers = field_validator("weighting_layers", "isolated_layers", mode="before")(
        _token_ids
    )
    _plain_captures = field_validator("capture", mode="before")(_names)

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
        if not 0.0 <= threshold <= 1.0:
            raise ValueError("expected a probability from 0 to 1, for example 0.1")
        return threshold

    @field_validator("top_p", "min_p", "prune")
    @classmethod
    def _share_is_probability(cls, share: float | None) -> float | None:
        if share is not None and not 0.0 < share <= 1.0:
            raise ValueError("expected a probability above 0 and at most 1, for example 0.1")
        return share

    @field_validator("schedule")
    @classmethod
    def _schedule_is_probabilities(
        cls, schedule: tuple[float, ...] | None
    ) -> tuple[float, ...] | None:
        if schedule is not None and not (schedule and all(0.0 < t <= 1.0 for t in schedule)):
            raise ValueError(
                "expected at least one threshold, each above 0 and at most 1, "
                "for example [0.3, 0.1]"
            )
        return schedule

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

    @field_validator("weighting_layers", "isolated_layers")
    @classmethod
    def _layers_are_range(cls, layers: tuple[int, int] | None) -> tuple[int, int] | None:
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
            given, needed = [len(row) for row in rows], [len(tokens) for tokens in self.replay]
            if given != needed:
                raise ValueError(
                    f"{name} has rows of {given} numbers, the replay sets of {needed} tokens; "
                    "give one number for each token"
                )
        positions = [position for row in self.replay_positions or () for position in row]
        if any(position < 0 for position in positions):
            raise ValueError(
                "replay_positions holds a negative position; "
                "positions count from 0, the first prompt token"
            )
        weights = [weight for row in self.replay_weights or () for weight in row]
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ValueError(
                "replay_weights holds a weight that is not above 0; "
                "its logarithm is added to attention logits"
            )
        if self.isolated_mass == "self" and self.isolated_layers is None:
            raise ValueError(
                "isolated_mass='self' says what isolated_layers do with the attention; "
                "give isolated_layers as well"
            )
        if self.weighting_layers is not None:
            if self.weighting == "none" and self.replay_weights is None:
                raise ValueError(
                    "weighting_layers says in which layers members are weighted; "
                    "give weighting or replay_weights as well"
                )
            if self.isolated_layers is not None:
                raise ValueError(
                    "weighting_layers and isolated_layers both say what some layers do; "
                    "give one of them"
                )
        return self

    @model_validator(mode="after")
    def _rules_bound_a_set(self) -> RunSpec:
        others = (self.schedule, self.top_k, self.top_p, self.min_p, self.sample, self.max_width)
        if self.threshold == 0 and self.replay is None and all(other is None for other in others):
            raise ValueError(
                "threshold=0 lets the whole vocabulary into every set; "
                "give top_k, top_p, min_p, sample or max_width as well, or a threshold above 0"
            )
        return self

    @model_validator(mode="after")
    def _posteriors_can_be_had(self) -> RunSpec:
        needs = "prune" if self.prune is not None else ""
        if self.weighting in BY_QUERY:
            needs = f"weighting='{self.weighting}'"
        if needs and self.readout != "mixture":
            raise ValueError(
                f"{needs} needs readout='mixture', not {self.readout!r}: only a mixture is the sum "
                "over members that Bayes' rule takes apart"
            )
        if self.weighting in BY_QUERY and self.replay_weights is not None:
            raise ValueError(
                f"{needs} and replay_weights both say what members weigh; give one of them"
            )
        if self.replay_links is not None:
            self._check_links(self.replay_links)
        if self.prune_by != "posterior" and self.prune is None:
            raise ValueError(
                f"prune_by='{self.prune_by}' says how prune decides; give prune as well"
            )
        return self

    def _check_links(self, links: tuple[tuple[tuple[float, ...], ...], ...]) -> None:
        """ValueError unless these are the links of the replay's sets."""
        if self.replay is None or self.weighting not in BY_QUERY:
            raise ValueError(
                "replay_links says how the sets of a replay are linked, for weighting='posterior' "
                "or 'best_parent'; give both"
            )
        widths = list(map(len, self.replay))
        if len(links) > len(widths) - 1:
            raise ValueError(
                f"replay_links holds {len(links)} matrices; expected {len(widths) - 1}, one for "
                "every set but the last"
            )
        for k, width in enumerate(widths[1:]):
            rows = links[k] if k < len(links) else ()
            if [len(row) for row in rows] != [width] * widths[k]:
                raise ValueError(
                    f"replay_links[{k}] has rows of {[len(row) for row in rows]} numbers; expected "
                    f"{widths[k]} rows of {width}, a row for each member of set {k} and a number "
                    f"for each of set {k + 1}"
                )
            sums = [math.fsum(column) for column in zip(*rows, strict=True)]
            numbers = [number for row in rows for number in row]
            off = max(abs(total - 1.0) for total in sums)
            if not (min(numbers) >= 0.0 and off <= LINK_SLACK):
                raise ValueError(
                    f"replay_links[{k}] holds a negative number, or columns that sum to {sums}; "
                    "expected probabilities that sum to one over the members of the earlier set"
                )

    @property
    def goes_by_sets(self) -> bool:
        """Whether a set must be read before the next one can be forwarded, even in a replay."""
        return self.prune is not None or self.weighting in ("probability", *BY_QUERY)

    def rules(self, step: int, prompt: Sequence[int]) -> dict[str, Any]:
        """How `tempo.selection.select` chooses the set of one step: its arguments, by name.

        Args:
            step: The number of the step, from 0.
            prompt: The token ids of the prompt, on which draws depend.
        """
        rules = {"threshold": self.threshold, "max_width": self.max_width}
        if self.schedule is not None:
            rules["threshold"] = self.schedule[min(step, len(self.schedule) - 1)]
        for name in ("top_k", "top_p", "min_p", "sample"):
            rules[name] = getattr(self, name)
        if self.sample is not None:
            text = f"{self.seed} {step} {list(prompt)}"
            rules["seed"] = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
        return rules

    def but(self, /, **changes: Any) -> RunSpec:
        """This spec with some settings changed, checked again."""
        return RunSpec(**{**self.model_dump(), **changes})

    def key(self, *, with_capture: bool = True) -> str:
        """A short hash of the settings, the same in every process.

        Without capture, runs that compute the same thing share it.
        """
        settings = self.model_dump(mode="json", exclude=None if with_capture else {"capture"})
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The settings as YAML; `from_yaml` gives an equal spec back."""
        # PyYAML folds these line breaks where it writes them as they are
        breaks = isinstance(self.prompt, str) and not {"\x85", "\u2028", "\u2029"}.isdisjoint(
            self.prompt
        )
        return dump_yaml(self.model_dump(mode="json"), allow_unicode=not breaks)

    @classmethod
    def from_yaml(cls, source: str | Path) -> RunSpec:
        """The spec in a YAML file (`Path`) or in YAML text (`str`).

        Raises:
            SpecError: which names the file, the key and the nearest key.
        """
        return load_yaml(cls, source)

    def __repr__(self) -> str:
        """The settings that differ from their defaults; long values are cut."""
        shown = []
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if field.is_required() or value != field.default:
                shown.append(f"{name}={_cut(repr(value), LONGEST_REPR)}")
        return f"{type(self).__name__}({', '.join(shown)})"

    __str__ = __repr__


S = TypeVar("S", bound=Strict)


def load_yaml(kind: type[S], source: str | Path) -> S:
    """A `Strict` model read from a YAML file (`Path`) or from YAML text (`str`).

    Raises:
        SpecError: which names the file and the key.
    """
    if not isinstance(source, str):
        source = conform(place, "the path of a YAML file", source)
    where = escaped(str(source)) if isinstance(source, Path) else "the YAML text"
    try:
        settings = parse_yaml(
            read_text(source, MOST_YAML_BYTES) if isinstance(source, Path) else source
        )
    except OSError as error:
        raise SpecError(
            f"cannot read {where}: {error.strerror}; give the path of a readable YAML file"
        ) from None
    except ValueError as error:
        raise SpecError(f"{where} cannot be read: {error}") from None
    if not isinstance(settings, Mapping):
        raise SpecError(
            f"{where} holds {type(settings).__name__}, "
            "expected keys and values such as 'threshold: 0.1'"
        )
    try:
        return kind(**settings)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """All problems of a pydantic error, one a line: key, what was seen, what is expected."""
    lines: dict[str, str] = {}  # by key: of several problems of one value the first says enough
    for problem in error.errors():
        key = str(problem["loc"][0]) if problem["loc"] else ""
        given = seen(problem["input"])
        if problem["type"] == "extra_forbidden":
            line = unknown_key(key, list(kind.model_fields))
        elif problem["type"] == "missing":
            line = f"'{key}' is missing"
        else:
            line = problem["msg"].removeprefix("Value error, ")
            line = f"{key}={given}: {line}" if key else line
            if problem["type"] == "literal_error" and isinstance(problem["input"], str):
                choices = _choices(kind.model_fields[key].annotation)
                near = difflib.get_close_matches(problem["input"], choices, n=1)
                line += f"; did you mean '{near[0]}'?" if near else ""
            elif key == "prompt" and problem["type"] in ("string_type", "tuple_type"):
                if isinstance(problem["input"], tuple):
                    continue  # what is wrong with its items is the next problem
                line = f"prompt={given}: Input should be a valid string, or a valid tuple or list "
                line += "of token ids"
        lines.setdefault(key, line)
    return f"{kind.__name__}: " + "\n  ".join(lines.values())


def _choices(annotation: Any) -> list[str]:
    """The words of a Literal, or of a Literal inside another type."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [str(part) for part in parts]
    return [choice for part in parts for choice in _choices(part)]
