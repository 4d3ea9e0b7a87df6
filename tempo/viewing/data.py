"""What a page holds of its traces: texts that are safe to show, and numbers in little space.

Shapes: L layers, H query heads, w set width, N_k slots once set k is in, V vocabulary.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tempo.errors import ModelError, SpecError
from tempo.metrics import kl_divergence, softmax, total_variation
from tempo.text import escaped
from tempo.trace import Step, Trace

if TYPE_CHECKING:
    from tempo.models import LanguageModel

# Characters of a token that are shown. Most have fewer than ten; a hostile one may have thousands.
LONGEST_TOKEN = 60
LONGEST_NAME = 60
TOP = 8  # of the tokens that a member predicts, so many of each run are shown
NUM_PATHS = 5
LEVELS = 255  # of a weight: its square root in one byte, so that small weights differ, too
# Bytes of attention in one page. A run of sixteen sets of SmolLM2 has half a million.
MOST_ATTENTION = 4_000_000

TextOf = Callable[[int], str]


class Group(NamedTuple):
    """Runs on the same sets, which are shown as one lattice.

    Attributes:
        traces: The runs, at least one.
        names: What each is called.
    """

    traces: list[Trace]
    names: list[str]


class Distance(NamedTuple):
    """How far one distribution is from another.

    Attributes:
        kl: KL(this || first) in nats.
        tv: Their total variation.
    """

    kl: float
    tv: float


def grouped(traces: Sequence[Trace], names: Sequence[str]) -> list[Group]:
    """The runs in groups; neighbours with the same prompt and the same sets share one."""
    pairs = zip(traces, names, strict=True)
    found = []
    for _, group in groupby(pairs, key=lambda pair: (pair[0].prompt_tokens, pair[0].sets)):
        own = list(group)
        found.append(Group([trace for trace, _ in own], [name for _, name in own]))
    return found


def names_of(traces: Sequence[Trace]) -> list[str]:
    """What to call the runs: by visibility, and by the other settings in which they differ."""
    specs = [
        trace.spec.model_dump(exclude={"prompt", "capture", "replay", "visibility"})
        for trace in traces
    ]
    differs = [name for name in specs[0] if any(spec[name] != specs[0][name] for spec in specs)]
    names = []
    for trace, spec in zip(traces, specs, strict=True):
        parts = [trace.spec.visibility, *(f"{name} {spec[name]}" for name in differs)]
        models = {other.provenance.get("model") for other in traces}
        parts += [str(trace.provenance.get("model"))] if len(models) > 1 else []
        names.append(shown(", ".join(parts), LONGEST_NAME))
    return [
        name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, start=1)
    ]


def shown(text: str, longest: int = LONGEST_TOKEN) -> str:
    """The text as it is shown: `escaped`, cut, and with its outer spaces as dots.

    >>> shown(" cat"), shown("")
    ('·cat', '∅')
    """
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" "))
    after = len(text) - before - len(inner)
    dotted = escaped(("·" * before + inner + "·" * after)[: longest + 1])
    if len(dotted) > longest:
        dotted = f"{dotted[: longest - 1]}…"
    return dotted or "∅"


def texts_of(traces: Sequence[Trace], text_of: TextOf | None) -> TextOf:
    """The text of a token: as a trace has it, else by `text_of`, else its id."""
    known: dict[int, str] = {}
    for trace in traces:
        known |= dict(zip(trace.prompt_tokens, trace.prompt_texts, strict=False))
        for step in trace.steps:
            known |= dict(zip(step.tokens, step.texts, strict=True))

    def text(token: int) -> str:
        if token in known:
            return shown(known[token])
        return shown(text_of(token)) if text_of else f"#{token}"

    return text


def differences(base: Trace, other: Trace) -> list[Distance | None]:
    """How far the distribution of each step of `other` is from that of `base`.

    None once the contexts differ, since distributions after different texts are not comparable.
    """
    found: list[Distance | None] = []
    same = base.prompt_tokens == other.prompt_tokens
    for k, step in enumerate(other.steps):
        same = same and k < len(base.steps)
        same = same and len(step.distribution) == len(base.steps[k].distribution)
        if not same:
            found.append(None)
            continue
        pair = (step.distribution, base.steps[k].distribution)
        found.append(Distance(kl_divergence(*pair), total_variation(*pair)))
        same = set(step.tokens) == set(base.steps[k].tokens)
    return found


def data_of(group: Group, text_of: TextOf, lm: LanguageModel | None) -> dict[str, Any]:
    """All that the script of a page needs of a group of runs, as JSON holds it."""
    first = group.traces[0]
    reduced = [coarse(trace) for trace in group.traces]
    return {
        "names": group.names,
        "slots": [text_of(int(token)) for token in first.slot_token],
        "prompt": len(first.prompt_tokens),
        "sets": [
            {"position": step.position, "slots": step.slots, "tokens": step.tokens}
            for step in first.steps
        ],
        "probabilities": [
            [rounded(step.probabilities) for step in trace.steps] for trace in group.traces
        ],
        "links": [
            [None if step.links is None else rounded(step.links) for step in trace.steps]
            for trace in group.traces
        ],
        "attention": [
            None
            if found is None
            else {
                "layers": found[0].shape[0],
                "heads": found[0].shape[1],
                "steps": [_packed(weights) for weights in found],
            }
            for found, _ in reduced
        ],
        "kept": [kept for _, kept in reduced],
        "next": predictions(group.traces, text_of),
        "lens": [by_layer(lm, trace, text_of) for trace in group.traces],
    }


def has_attention(trace: Trace) -> bool:
    """Whether the attention of every set was captured."""
    return bool(trace.steps) and all(step.attention is not None for step in trace.steps)


def coarse(trace: Trace) -> tuple[list[np.ndarray] | None, str]:
    """The attention of each step that a page can hold, and what was averaged for that.

    Each is [L, H, w, N_k], where L or H is 1 once averaged.
    """
    if not has_attention(trace):
        return None, ""
    found = [step.attention for step in trace.steps if step.attention is not None]
    if sum(weights.size for weights in found) <= MOST_ATTENTION:
        return found, ""
    by_layer = [weights.mean(axis=1, keepdims=True) for weights in found]
    if sum(weights.size for weights in by_layer) <= MOST_ATTENTION:
        return by_layer, "the mean over heads, as all heads would take too much space"
    whole = [weights.mean(axis=(0, 1), keepdims=True) for weights in found]
    if sum(weights.size for weights in whole) <= MOST_ATTENTION:
        return whole, "the mean over layers and heads, as all would take too much space"
    return None, "left out, as it would take too much space"


def quantised(weights: np.ndarray) -> np.ndarray:
    """Weights from 0 to 1 as one byte each: the square root in 255 levels.

    Off by less than 0.004. Only an exact 0 becomes 0.

    >>> quantised(np.array([0.0, 1e-9, 0.25, 1.0])).tolist()
    [0, 1, 128, 255]
    """
    levels = np.rint(np.sqrt(np.clip(weights, 0.0, 1.0)) * LEVELS)
    return np.where(weights > 0, np.maximum(levels, 1), 0).astype(np.uint8)


def _packed(weights: np.ndarray) -> str:
    return base64.b64encode(quantised(weights).tobytes()).decode()


def predictions(traces: Sequence[Trace], text_of: TextOf) -> list[list[dict[str, Any]]] | None:
    """What each member predicts in each run: the top tokens of any run with all probabilities.

    Beside them the total variation between the first run and the last one. None if not all runs
    captured logits.
    """
    steps = list(zip(*(trace.steps for trace in traces), strict=True))
    if any(step.logits is None for of_runs in steps for step in of_runs):
        return None
    found = []
    for of_runs in steps:
        found.append([_prediction(of_runs, i, text_of) for i in range(len(of_runs[0].tokens))])
    return found


def _prediction(of_runs: Sequence[Step], member: int, text_of: TextOf) -> dict[str, Any]:
    predicted = [softmax(step.logits[member]) for step in of_runs if step.logits is not None]
    wanted: set[int] = set()
    for p in predicted:
        top = min(TOP, len(p))
        wanted |= set(np.argpartition(-p, top - 1)[:top].tolist())
    ordered = sorted(wanted, key=lambda token: (-max(float(p[token]) for p in predicted), token))
    tops = [[text_of(token), rounded([p[token] for p in predicted])] for token in ordered[:TOP]]
    same_size = len(predicted[0]) == len(predicted[-1])
    tv = total_variation(predicted[0], predicted[-1]) if len(predicted) > 1 and same_size else None
    return {"top": tops, "tv": None if tv is None else rounded([tv])[0]}


def by_layer(
    lm: LanguageModel | None, trace: Trace, text_of: TextOf
) -> list[list[list[list[Any]]]] | str | None:
    """What each layer would predict at each member: by set, member and layer a token.

    Each is its text, its probability, and the layer's KL to the output in nats. None without a
    model or without residuals; the reason if the model's residuals cannot be unembedded.
    """
    from tempo.interpret import lens

    if lm is None or any(step.residual is None for step in trace.steps):
        return None
    try:
        steps = lens(lm, trace).steps
    except ModelError as error:
        return escaped(str(error))
    found = []
    for step in steps:
        texts = [list(map(text_of, row)) for row in step.tokens.T.tolist()]
        numbers = zip(texts, rounded(step.probabilities.T), rounded(step.kl.T), strict=True)
        found.append([[list(each) for each in zip(*row, strict=True)] for row in numbers])
    return found


def best_members(trace: Trace) -> list[int] | None:
    """The member of each set that is on the best path; None if it is not known."""
    if not trace.steps:
        return None
    try:
        tokens = trace.best_path
    except SpecError:
        return None
    return [step.tokens.index(token) for step, token in zip(trace.steps, tokens, strict=True)]


def rounded(values: Any) -> Any:
    """Numbers with four significant digits, which is more than a page shows.

    >>> rounded([1 / 3, 1.0, 1e-9])
    [0.3333, 1, 1e-09]
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim > 1:
        return [rounded(row) for row in array]
    short = [float(f"{value:.4g}") for value in array]
    return [int(value) if value == int(value) else value for value in short]
