"""Pictures of attention and of cached keys.

Shapes: L layers, H query heads, Hkv key heads, w set width, N slots, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from tempo.reporting.figures.drawing import (
    VERMILLION,
    WIDTH,
    Picture,
    cmap_of,
    picture,
    token_ticks,
)
from tempo.text import number, printable


def attention_heatmap(
    attention: np.ndarray,
    labels: Sequence[str],
    slots: Sequence[int],
    layers: Sequence[int] | None = None,
    title: str = "Attention of a set",
) -> Picture:
    """Attention [L, H, w, N] of a set at `slots`, mean over heads, one panel for each layer.

    labels: the texts of all N slots. layers: which to show; by default four.
    """
    four = sorted({round(x) for x in np.linspace(0, len(attention) - 1, 4)})
    layers = four if layers is None else list(layers)
    weights = attention[layers].astype(np.float64).mean(axis=1)  # [layers, w, N]
    _, width, num_slots = weights.shape
    top = float(weights[..., 1:].max()) if num_slots > 1 else float(weights.max())
    norm = PowerNorm(0.5, 0.0, top if top > 0 else 1.0, clip=True)
    row = min(0.22, 1.8 / width)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
        for ax, layer, panel in zip(axes, layers, weights, strict=True):
            image = ax.imshow(
                np.ma.masked_equal(panel, 0.0), norm=norm, cmap=cmap_of("viridis"), aspect="auto"
            )
            corner = (slots[0] - 0.5, -0.5)
            ax.add_patch(
                Rectangle(corner, width, width, fill=False, ec=VERMILLION, lw=1.8, clip_on=False)
            )
            ax.set_title(f"layer {layer}")
            token_ticks(ax, "y", [labels[slot] for slot in slots], max_labels=12)
            ax.tick_params(axis="x", length=2, bottom=ax is axes[-1], labelbottom=ax is axes[-1])
        token_ticks(axes[-1], "x", labels)
        bar = figure.colorbar(image, ax=axes, extend="max", fraction=0.04, pad=0.02, aspect=25)
        bar.set_label("attention weight")
        ticks = (
            np.array([0, 1 / 16, 1 / 4, 9 / 16, 1]) * norm.vmax
        )  # evenly spaced after the square root
        bar.set_ticks(ticks.tolist(), labels=[f"{tick:.2g}" for tick in ticks])

    block = weights[:, :, slots[0] : slots[0] + width]
    among = block[:, ~np.eye(width, dtype=bool)]
    means = [number(m.mean()) if m.size else "none" for m in among]
    said = ", ".join(f"layer {layer}: {mean}" for layer, mean in zip(layers, means, strict=True))
    caption = (
        f"Rows: the {width} siblings as queries. Columns: all {num_slots} slots, the siblings' own "
        f"outlined. Mean over heads. The square-root colour scale ends at {number(norm.vmax)}, the "
        "largest weight outside slot 0, so that the attention sink at slot 0 does not drown the "
        f"rest. Grey means exactly zero. Mean weight on each other sibling: {said}."
    )
    alt = (
        f"Heatmap of attention from {width} siblings to {num_slots} slots. "
        f"Mean weight on each other sibling: {said}."
    )
    size = (min(WIDTH, 2.0 + 0.22 * num_slots), 1.0 + len(layers) * (0.35 + row * width))
    return picture(title, caption, alt, size, draw)


def layer_head_map(values: np.ndarray, title: str, label: str, caption: str) -> Picture:
    """One value per layer and head [L, H] as a heatmap.

    Its colours diverge around zero if any value is negative. NaN is grey.
    """
    values = np.asarray(values, np.float64)
    finite = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    signed, end = bool(finite.min() < 0), float(np.abs(finite).max()) or 1.0
    num_layers, num_heads = values.shape

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        norm, cmap = (
            Normalize(-end if signed else 0.0, end),
            cmap_of("PuOr_r" if signed else "viridis"),
        )
        image = ax.imshow(np.ma.masked_invalid(values), norm=norm, cmap=cmap, aspect="auto")
        ax.set(xlabel="head", ylabel="layer")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        figure.colorbar(image, ax=ax, fraction=0.05, pad=0.03).set_label(printable(label))

    sizes = np.where(np.isfinite(values), np.abs(values), -1.0)
    layer, head = divmod(int(np.argmax(sizes)), num_heads)
    alt = (
        f"Heatmap of {label} for {num_layers} layers and {num_heads} heads: "
        f"from {number(finite.min())} to {number(finite.max())}, mean {number(finite.mean())}; "
        f"largest in layer {layer}, head {head}."
    )
    caption += "" if np.isfinite(values).all() else " Grey: no value."
    size = (min(WIDTH, 2.2 + 0.24 * num_heads), min(6.0, 1.0 + 0.15 * num_layers))
    table: list[Sequence[object]] = [("layer", *(f"head {h}" for h in range(num_heads)))]
    table += [(str(layer), *of_layer) for layer, of_layer in enumerate(values.tolist())]
    return picture(title, caption, alt, size, draw, table=table)


def key_similarity(
    keys: np.ndarray,
    raw_keys: np.ndarray,
    positions: Sequence[int],
    labels: Sequence[str],
    title: str = "Similarity of cached keys by position",
) -> Picture:
    """Cosine similarity of cached keys [L, Hkv, N, D], and what their rotation adds to it.

    Both are means over layers and heads. raw_keys: the same keys before rotation.
    """
    cached, raw = _cosines(keys), _cosines(raw_keys)  # [N, N]
    panels = (
        ("as cached", cached, "viridis"),
        ("what the rotation adds: cached minus raw", cached - raw, "PuOr_r"),
    )
    at = np.asarray(positions)
    shared = [np.flatnonzero(at == p) for p in np.unique(at) if (at == p).sum() > 1]
    among = [float(np.abs((cached - raw)[np.ix_(s, s)]).max()) for s in shared]
    apart = (
        float(np.abs(cached - raw)[at[:, None] != at].max()) if len(set(at.tolist())) > 1 else 0.0
    )

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2)
        for ax, (name, values, cmap) in zip(axes, panels, strict=True):
            end = float(np.abs(values).max()) or 1.0
            low = -end if cmap == "PuOr_r" else float(values.min())
            image = ax.imshow(values, cmap=cmap_of(cmap), norm=Normalize(low, end))
            for slots in shared:
                corner = (slots[0] - 0.5, slots[0] - 0.5)
                ax.add_patch(
                    Rectangle(corner, len(slots), len(slots), fill=False, ec=VERMILLION, lw=1.4)
                )
            ax.set_title(name)
            figure.colorbar(image, ax=ax, location="bottom", fraction=0.05, pad=0.02).set_label(
                "cosine"
            )
            token_ticks(ax, "x", labels)
        token_ticks(
            axes[0],
            "y",
            [f"{label} @{position}" for label, position in zip(labels, positions, strict=True)],
            max_labels=40,
        )
        axes[1].set_yticks([])

    said = (
        f"{len(labels)} slots at {len(set(at.tolist()))} positions; within a set the rotation "
        f"changes no similarity by more than {number(max(among, default=0.0))}, between positions "
        f"by up to {number(apart)}"
    )
    caption = (
        f"{said}. Left: cosine of every pair of cached keys, mean over layers and key heads. "
        "Right: minus the same before rotation. Sets are outlined. A set at one position must be "
        "blank on the right, as equal rotations cancel."
    )
    size = (9.0, 3.2 + 0.11 * len(labels))
    return picture(title, caption, f"Two heatmaps of cosine similarity. {said}.", size, draw)


def _cosines(keys: np.ndarray) -> np.ndarray:
    """[N, N] from [L, Hkv, N, D]."""
    unit = keys.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=-1, keepdims=True), np.finfo(np.float64).tiny)
    return np.einsum("lhnd,lhmd->nm", unit, unit) / (len(keys) * keys.shape[1])
