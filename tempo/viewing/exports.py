"""Attention of a run for matplotlib, CircuitsVis and BertViz.

Neither CircuitsVis nor BertViz is needed here: each gets a dictionary of arguments.

Shapes: L layers, H query heads, w set width, N slots, N_k slots once set k is in.
"""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tempo.errors import SpecError
from tempo.inputs import conform, instance, optional, whole
from tempo.text import printable
from tempo.trace import Trace
from tempo.viewing.data import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRACE = instance("Trace", "what tempo.generate returns")
LONGEST_LABEL = 14
DPI = 110  # of a notebook's picture
MOST_LABELS = 60  # along an axis that can still be told apart
CAPTURE = "generate it with capture='attention'"


def plot_attention(
    trace: Trace, step: int, *, layer: int | None = None, head: int | None = None
) -> Figure:
    """A matplotlib figure: what each member of a set gives to each slot. See `Trace`."""
    from matplotlib import rc_context

    weights = attention_of(trace, step, layer, head)
    labels = [printable(shown(text, LONGEST_LABEL)) for text in texts(trace)]
    members = [labels[slot] for slot in trace.steps[step].slots]
    width, num_slots = weights.shape
    size = (min(16.0, 2.5 + 0.28 * num_slots), min(10.0, 1.9 + 0.28 * width))
    # A token such as `$x$` is no formula.
    with rc_context({"text.parse_math": False, "font.size": 9}):
        figure = _figure_type()(figsize=size, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(np.sqrt(weights), cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
        every = -(-num_slots // MOST_LABELS)
        axes.set_xticks(range(0, num_slots, every), labels[:num_slots:every], rotation=90)
        axes.set_yticks(range(width), members)
        axes.axvline(num_slots - width - 0.5, color="w", lw=1.0)
        parts = [
            "mean of layers" if layer is None else f"layer {layer}",
            "mean of heads" if head is None else f"head {head}",
        ]
        axes.set_title(f"Attention of set {step}: {', '.join(parts)}", loc="left", fontsize=10)
        axes.set_xlabel("slot, the set itself right of the line")
        bar = figure.colorbar(image, ax=axes, pad=0.01)
        bar.set_ticks(
            np.sqrt([0, 0.05, 0.25, 0.5, 1.0]).tolist(), labels=["0", ".05", ".25", ".5", "1"]
        )
        bar.set_label("weight")
    return figure


@cache
def _figure_type() -> type[Figure]:
    """A figure that a notebook shows whatever its backend is, and only once."""
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
            return file.getvalue()

    return ShownFigure


def attention_of(trace: Trace, step: int, layer: int | None, head: int | None) -> np.ndarray:
    """The attention [w, N_k] of a set by one layer and head; of None the mean.

    Raises:
        SpecError: if there is no such set, layer or head, or if attention was not captured.
    """
    step = conform(whole(0, len(trace.steps) - 1), "step", step)
    found = trace.steps[step].attention
    if found is None:
        raise SpecError(f"the attention of set {step} was not captured; {CAPTURE}")
    for axis, (name, chosen) in enumerate((("layer", layer), ("head", head))):
        chosen = conform(optional(whole(0, found.shape[axis] - 1)), name, chosen)
        rows = (
            found.mean(axis=axis, keepdims=True) if chosen is None else found.take([chosen], axis)
        )
        found = rows
    return found[0, 0]


def whole_attention(trace: Trace) -> np.ndarray:
    """The attention of all sets as one square, [L, H, N, N]; rows of the prompt are zero.

    Attention is captured where sets are read, so a run knows nothing of its prompt's.
    """
    found = [step.attention for step in trace.steps]
    if not found or any(weights is None for weights in found):
        raise SpecError(f"the attention of this run was not captured; {CAPTURE}")
    first: Any = found[0]
    num_slots = trace.num_slots
    square = np.zeros((*first.shape[:2], num_slots, num_slots), dtype=np.float32)
    for step, weights in zip(trace.steps, found, strict=True):
        assert weights is not None
        square[:, :, step.slots, : weights.shape[-1]] = weights
    return square


def circuitsvis_arguments(trace: Trace, layer: int) -> dict[str, Any]:
    """What `circuitsvis.attention.attention_heads` takes, for one layer of a run.

    Its attention is [H, N, N], from the row's slot to the column's. Rows of the prompt are zero.

    Args:
        trace: A run with captured attention.
        layer: Which layer, from 0.

    Raises:
        SpecError: if there is no such layer, or if attention was not captured.

    Example:
        >>> import tempo
        >>> lm = tempo.load_model("tiny")
        >>> trace = tempo.generate(lm, "The cat", max_steps=2, capture="attention")
        >>> arguments = circuitsvis_arguments(trace, layer=1)  # then attention_heads(**arguments)
        >>> arguments["attention"].shape, len(arguments["tokens"])
        ((4, 10, 10), 10)
    """
    square = whole_attention(conform(TRACE, "trace", trace))
    layer = conform(whole(0, len(square) - 1), "layer", layer)
    return {
        "attention": square[layer],
        "tokens": [printable(text) for text in texts(trace)],
        "mask_upper_tri": False,  # a visible sibling attends to later slots of its own set
    }


def bertviz_arguments(trace: Trace) -> dict[str, Any]:
    """What `bertviz.head_view` and `bertviz.model_view` take, for all layers of a run.

    Its attention is a list of L tensors [1, H, N, N]. Rows of the prompt are zero.

    Args:
        trace: A run with captured attention.

    Raises:
        SpecError: if attention was not captured.

    Example:
        >>> import tempo
        >>> lm = tempo.load_model("tiny")
        >>> trace = tempo.generate(lm, "The cat", max_steps=2, capture="attention")
        >>> arguments = bertviz_arguments(trace)  # then head_view(**arguments)
        >>> len(arguments["attention"]), tuple(arguments["attention"][0].shape)
        (3, (1, 4, 10, 10))
    """
    import torch

    square = torch.from_numpy(whole_attention(conform(TRACE, "trace", trace)))
    return {
        "attention": list(square[:, None]),
        "tokens": [printable(text) for text in texts(trace)],
        "prettify_tokens": False,  # which takes characters of a tokenizer's alphabet for spaces
    }


def texts(trace: Trace) -> list[str]:
    """The text of each slot; of a prompt whose texts are not known the token ids."""
    prompt = trace.prompt_texts or [f"#{token}" for token in trace.prompt_tokens]
    return [*prompt, *(text for step in trace.steps for text in step.texts)]
