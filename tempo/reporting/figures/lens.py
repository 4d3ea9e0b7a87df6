"""A picture of what each layer would predict at the members of one set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tempo.interpret import LensStep
from tempo.reporting.figures.drawing import WIDTH, Picture, clip, cmap_of, picture, token_ticks
from tempo.text import number

# A cell above this share of the colour scale has its text in white.
DARK = 0.6
MOST_SHOWN = 8  # members whose texts fit side by side
TEXT_LENGTH = 12


def lens_map(
    step: LensStep, members: Sequence[str], title: str = "What each layer would predict"
) -> Picture:
    """KL to the prediction by layer and member, with the most probable token of each in its cell.

    members: the texts of the set's members; of more than eight the first eight are shown.
    """
    kl = step.kl[:, :MOST_SHOWN]
    num_rows, width = kl.shape
    end = float(kl.max()) or 1.0

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        norm = PowerNorm(0.5, 0.0, end)
        # layers from the bottom up, as a residual passes them
        image = ax.imshow(kl, norm=norm, cmap=cmap_of("Blues"), aspect="auto", origin="lower")
        for layer in range(num_rows):
            for member in range(width):
                colour = "white" if norm(kl[layer, member]) > DARK else "black"
                text = clip(step.texts[layer][member].replace(" ", "·"), TEXT_LENGTH)
                style = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
                ax.text(member, layer, text, **style)
        token_ticks(ax, "x", members[:MOST_SHOWN])
        ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        ax.set(xlabel="member of the set", ylabel="residual before layer")
        bar = figure.colorbar(image, ax=ax, fraction=0.05, pad=0.03)
        bar.set_label("KL to what is predicted, nats")

    leads = []  # the layer from which on the predicted token is the most probable one
    for member in range(width):
        others = np.flatnonzero(step.tokens[:, member] != step.tokens[-1, member])
        leads.append(int(others[-1]) + 1 if len(others) else 0)
    means = kl.mean(axis=1)
    said = f"mean KL {number(means[0])} nats before layer 0, {number(means[num_rows // 2])} halfway"
    caption = (
        "Each cell holds the token that its residual would predict by the model's own "
        f"unembedding. Row {num_rows - 1} is what the model predicts. {said[0].upper()}{said[1:]}. "
        f"The predicted token leads from layer {', '.join(map(str, leads))} on (by member). The "
        "colour scale is that of square roots."
    )
    if width < step.kl.shape[1]:
        caption += f" The first {width} of {step.kl.shape[1]} members are shown."
    alt = f"Heatmap of KL to the prediction for {num_rows} layers and {width} members: {said}."
    size = (min(WIDTH, 2.2 + 0.9 * width), 1.1 + 0.17 * num_rows)
    return picture(title, caption, alt, size, draw)
