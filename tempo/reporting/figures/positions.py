"""Where tokens stand: from slot to position, and the lattice of sets a run walked through."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from tempo.reporting.figures.drawing import (
    BLUE,
    INK,
    VERMILLION,
    WIDTH,
    Picture,
    clip,
    picture,
    token_ticks,
)
from tempo.text import escaped, number


def position_map(
    slots: Sequence[int],
    recovered_position: Sequence[float],
    expected_position: Sequence[float],
    labels: Sequence[str],
    title: str = "Physical slot to logical position",
) -> Picture:
    """Each slot's position as recovered from its cached key, and the expected one.

    Shared positions form a band.
    """
    slot, found, expected = (
        np.asarray(a, np.float64) for a in (slots, recovered_position, expected_position)
    )
    shared = {y: slot[found == y] for y in np.unique(found) if (found == y).sum() > 1}
    wrong = found != expected

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for y, members in shared.items():
            left, right = members.min(), members.max()
            ax.add_patch(
                Rectangle(
                    (left - 0.4, y - 0.36),
                    right - left + 0.8,
                    0.72,
                    facecolor=BLUE,
                    alpha=0.25,
                    lw=0,
                )
            )
            ax.annotate(f"×{len(members)}", (right + 0.5, y), va="center", fontsize=8)
        ax.plot(
            slot, expected, "s", mfc="none", mec=INK, alpha=0.6, ms=9, mew=0.8, label="expected"
        )
        ax.plot(
            slot[~wrong], found[~wrong], "o", color=BLUE, ms=4.5, label="recovered, as expected"
        )
        if wrong.any():
            ax.plot(
                slot[wrong],
                found[wrong],
                "X",
                color=VERMILLION,
                ms=7,
                label="recovered, not as expected",
            )
        ax.set(ylabel="logical position", xlim=(slot.min() - 0.8, slot.max() + 1.6))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y")
        token_ticks(ax, "x", labels, at=slot.tolist())
        figure.legend(loc="outside upper left", ncols=3)

    said = (
        f"{len(slot)} slots at {len(np.unique(found))} positions, of which {len(shared)} are "
        f"shared; {int(wrong.sum())} slots are not where they were expected"
    )
    caption = (
        f"{said}. Left to right: slots in the order of the cache. Siblings at one position stand "
        "side by side in a band with their number. A token with its own position climbs by one."
    )
    size = (min(WIDTH, 3.5 + 0.2 * len(slot)), 4.0)
    return picture(title, caption, f"Map from slot to position: {said}.", size, draw)


MOST_MEMBERS = 10  # of a set that the lattice draws; pointing at the last one shows them all


def set_lattice(
    prompt: str, steps: Sequence[Mapping[str, Any]], title: str = "The sets of a run"
) -> Picture:
    """The sets of a run from left to right. A member is a box, the fuller the more probable it is.

    steps: of each set `texts`, `probabilities`, `position`, and `ended` (end-of-sequence texts that
    were left out, if any).
    """
    tips = [_tip(k, step) for k, step in enumerate(steps)]

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        tallest = max((min(len(step["texts"]), MOST_MEMBERS) for step in steps), default=1)
        ax.text(-0.85, 0, clip(prompt, 24), va="center", ha="right", fontsize=8)
        before = [(-0.80, 0.0, 1.0)]  # the prompt, whose end is read by the first set
        for k, step in enumerate(steps):
            shown = list(zip(step["texts"], step["probabilities"], strict=True))[:MOST_MEMBERS]
            here = []
            for row, (text, probability) in enumerate(shown):
                y = row - (len(shown) - 1) / 2
                more = len(step["texts"]) - len(shown) if row == len(shown) - 1 else 0
                _member(ax, k, y, text, probability, f"tip-{k}", more)
                here.append((k, y, probability))
            total = sum(probability for *_, probability in here) or 1.0
            # many lines must not drown the boxes
            faint = 0.15 if len(before) * len(here) <= 16 else 0.03
            lines: dict[float, list[tuple[float, float]]] = {}
            for x, y, weight in before:
                for _, other, probability in here:
                    alpha = round(faint + 0.6 * weight * probability / total, 2)
                    ends = (x + 0.40 if x >= 0 else x, y), (k - 0.40, other)
                    lines.setdefault(alpha, []).extend((*ends, (np.nan, np.nan)))
            for alpha, ends in lines.items():  # of one shade one path
                ax.plot(*zip(*ends, strict=True), color=INK, lw=0.8, alpha=alpha, zorder=0)
            before = [(x, y, probability / total) for x, y, probability in here]
        ax.set(
            xlim=(-2.6, len(steps) - 0.4),
            ylim=(tallest / 2 + 0.4, -tallest / 2 - 0.4),
            xlabel="position of the set",
        )
        ax.set_xticks(range(len(steps)), [str(step["position"]) for step in steps])
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)

    widths = [len(step["texts"]) for step in steps]
    caption = (
        f"{len(steps)} sets of widths {', '.join(map(str, widths))}. Every column is one step at "
        "one position. A box's colour is the fuller the more probable its token; the number is its "
        "probability. Lines join every two boxes, as every member is read by the whole next set. "
        "Point at a box to see all of its set."
    )
    size = (
        max(5.0, 0.92 * (len(steps) + 2.4)),
        1.1 + 0.34 * min(max(widths, default=1), MOST_MEMBERS),
    )
    alt = f"Lattice of sets after the prompt {escaped(prompt)!r}. " + " ".join(tips)
    return picture(title, caption, alt, size, draw, [tip for tip in tips])


def _member(
    ax: Any, x: float, y: float, text: str, probability: float, tip: str, more: int
) -> None:
    box = Rectangle(
        (x - 0.40, y - 0.38),
        0.80,
        0.76,
        fc=BLUE,
        ec=BLUE,
        lw=0,
        alpha=0.06 + 0.44 * min(1.0, probability),
        gid=tip,
    )
    ax.add_patch(box)
    ax.add_patch(Rectangle((x - 0.40, y - 0.38), 0.80, 0.76, fill=False, ec=BLUE, lw=0.9))
    shown = clip(re.sub("^ +| +$", lambda spaces: "·" * len(spaces[0]), text), 8)
    ax.text(x, y - 0.12, shown, ha="center", va="center", fontsize=8)
    label = f"{number(round(probability, 3))}" + (f"  +{more}" if more else "")
    ax.text(x, y + 0.20, label, ha="center", va="center", fontsize=6.5)


def _tip(k: int, step: Mapping[str, Any]) -> str:
    members = ", ".join(
        f"{escaped(text)!r} {number(round(p, 4))}"
        for text, p in zip(step["texts"], step["probabilities"], strict=True)
    )
    ended = f"; left out as end of sequence: {len(step['ended'])}" if step.get("ended") else ""
    return f"Step {k}, position {step['position']}: {members}{ended}."
