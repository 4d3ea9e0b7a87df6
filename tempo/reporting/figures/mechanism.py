"""The picture that defines set, sibling and reader, and how slots of the cache become positions.

It is drawn, not measured: the tokens are an example.
"""

from __future__ import annotations

from itertools import pairwise

from tempo.reporting.figures.drawing import BLUE, GREEN, VERMILLION, Picture
from tempo.text import html_text

WIDTH, HEIGHT = 440, 262
TOKENS = (["the"], ["cat"], ["'s", ".", "walk"], ["back"])
NAMES = ("prompt", "set 0", "set 1", "reader")
FIRST = 4  # the position of the last prompt token, whose set begins the picture
_BOX = (78, 34)
_HUES = ("currentColor", "currentColor", BLUE, GREEN)


def mechanism() -> tuple[Picture, Picture]:
    """The lattice of sets, and the map from slot to position."""
    return _lattice(), _staircase()


def _lattice() -> Picture:
    """Sets from left to right, the members of one below each other."""
    wide, tall = _BOX
    xs = [10 + 113 * column for column in range(len(TOKENS))]
    middle = 128
    drawn = []
    centres = []
    for x, members in zip(xs, TOKENS, strict=True):
        ys = [middle + 58 * (row - (len(members) - 1) / 2) for row in range(len(members))]
        centres.append([(x, y) for y in ys])
    for left, right in ((0, 1), (1, 2), (2, 3)):
        hue = GREEN if right == 3 else "currentColor"
        weight = 2.2 if right == 3 else 1
        for x, y in centres[left]:
            for to, below in centres[right]:
                drawn.append(
                    f'<line x1="{x + wide}" y1="{y:.0f}" x2="{to}" y2="{below:.0f}" '
                    f'stroke="{hue}" stroke-width="{weight}" stroke-opacity="0.75"/>'
                )
    siblings = centres[2]
    for (x, y), (_, below) in pairwise(siblings):
        at = x + wide / 2
        drawn.append(
            f'<line x1="{at}" y1="{y + tall / 2}" x2="{at}" y2="{below - tall / 2}" '
            f'stroke="{VERMILLION}" stroke-width="2.2" stroke-dasharray="4 3"/>'
        )
    for column, members in enumerate(TOKENS):
        for (x, y), token in zip(centres[column], members, strict=True):
            drawn.append(_box(x, y, token, _HUES[column]))
        x = xs[column] + wide / 2
        drawn.append(_text(x, 18, NAMES[column], bold=True))
        drawn.append(_text(x, 34, f"position {FIRST + column}"))
    drawn.append(_text(10, 236, "dashed: siblings see each other if visible,", "start"))
    drawn.append(_text(10, 253, "not at all if isolated", "start"))
    drawn.append(_text(430, 253, "green: the reader sees every member", "end"))
    caption = (
        "A set is all tokens that reach the threshold at one step. Its members are siblings: they "
        "stand at one position. A reader is a token of the next set: it attends to every member. "
        "An example, not data."
    )
    alt = (
        "Four columns from left to right: the prompt's last token at position 4, set 0 with one "
        "token at position 5, set 1 with three siblings at position 6, and a reader at position 7 "
        "that is joined to all three. Dashed lines join the siblings: they see each other only in "
        "visible mode."
    )
    return _picture(
        "mechanism-lattice", "What a set, a sibling and a reader are", caption, alt, drawn
    )


def _box(x: float, y: float, token: str, hue: str) -> str:
    wide, tall = _BOX
    return (
        f'<rect x="{x}" y="{y - tall / 2:.0f}" width="{wide}" height="{tall}" rx="5" '
        f'fill="{hue}" fill-opacity="0.14" stroke="{hue}" stroke-width="1.5"/>'
        f'<text x="{x + wide / 2}" y="{y + 5:.0f}" text-anchor="middle" font-size="14" '
        f'fill="currentColor">{html_text(token)}</text>'
    )


def _staircase() -> Picture:
    """Slot against position: siblings share a step."""
    slots = []
    for column, members in enumerate(TOKENS):
        slots += [(token, FIRST + column, _HUES[column]) for token in members]
    left, step, bottom, rise = 74, 58, 196, 44
    drawn = []
    for position in range(FIRST, FIRST + len(TOKENS)):
        y = bottom - rise * (position - FIRST)
        drawn.append(
            f'<line x1="{left - 8}" x2="432" y1="{y}" y2="{y}" stroke="currentColor" '
            'stroke-opacity="0.15"/>'
        )
        drawn.append(_text(left - 14, y + 4, str(position), "end"))
    for i, (token, position, hue) in enumerate(slots):
        x, y = left + step * i, bottom - rise * (position - FIRST)
        drawn.append(
            f'<rect x="{x}" y="{y - 15}" width="{step - 6}" height="30" rx="5" fill="{hue}" '
            f'fill-opacity="0.14" stroke="{hue}" stroke-width="1.5"/>'
        )
        drawn.append(_text(x + (step - 6) / 2, y + 5, token, size=13))
        drawn.append(_text(x + (step - 6) / 2, bottom + 32, str(FIRST + i)))
    drawn.append(
        _text(left + step * 2 - 6, 68, "three siblings, one position", bold=True, anchor="start")
    )
    drawn.append(_text(left, bottom + 52, "slot of the cache: one for each token", "start"))
    drawn.append(_text(10, 18, "position that the model is told (RoPE)", "start"))
    caption = (
        "Every token has a slot of its own in the cache. Siblings have slots of their own as well, "
        "but share one position."
    )
    alt = (
        "Tokens in slots 4 to 9. Slots 4 and 5 stand at positions 4 and 5, the three siblings in "
        "slots 6, 7 and 8 all at position 6, the reader in slot 9 at position 7."
    )
    return _picture("mechanism-positions", "From slot to position", caption, alt, drawn)


def _text(
    x: float, y: float, words: str, anchor: str = "middle", size: float = 12, bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size:g}"{weight} '
        f'fill="currentColor">{html_text(words)}</text>'
    )


def _picture(name: str, title: str, caption: str, alt: str, drawn: list[str]) -> Picture:
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html_text(alt)}" '
        f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="system-ui, sans-serif" style="width:100%;max-width:{WIDTH}px;height:auto">'
        f"{''.join(drawn)}</svg>"
    )
    return Picture(name, title, caption, alt, svg)
