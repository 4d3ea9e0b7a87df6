"""Draws mechanism.svg, the picture of the README: `python docs/figures/mechanism.py`.

The sets are those of the README's command, as SmolLM2-135M-Instruct chose them. The picture
brings a card of its own and two palettes, so that it reads on a light and on a dark page.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

PROMPT = ["The", " cat", " sat", " on", " the"]
SETS = [
    [(" cat", 0.071)],
    [("'s", 0.26), (".", 0.13), (" walk", 0.068), ("’", 0.060)],
    [("s", 0.11), (" back", 0.10), (" favorite", 0.090)],
]
READER = 1  # the member of the last set whose attention is shown: " back"

WIDTH, HEIGHT = 900, 348
LEFT, TOP = 24, 84  # of the first box
BOX_WIDTH, BOX_HEIGHT = 96, 44
COLUMN, ROW = 108, 56  # from box to box
BELOW = TOP + 4 * ROW + 2  # of the row of positions

STYLE = """
text { font-family: -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px;
  fill: var(--ink); }
.card { fill: var(--card); stroke: var(--line); }
.token { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 14px; }
.small { font-size: 11px; fill: var(--faint); }
.title { font-size: 16px; font-weight: 600; }
.box { fill: var(--card); stroke: var(--line); stroke-width: 1.2; }
.seen { fill: var(--seen); stroke: var(--blue); }
.reader { fill: var(--blue); stroke: var(--blue); }
.reader-text { fill: var(--card); }
.sibling { stroke: var(--orange); stroke-width: 2; stroke-dasharray: 5 3; }
svg { --card: #ffffff; --ink: #1f2328; --faint: #59636e; --line: #8c959f; --seen: #ddf0ff;
  --blue: #0969da; --orange: #b35900; }
@media (prefers-color-scheme: dark) {
  svg { --card: #161b22; --ink: #e6edf3; --faint: #9da7b3; --line: #6e7681; --seen: #12304f;
    --blue: #58a6ff; --orange: #f0a35e; }
}
"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    """A line of text at a point."""
    css = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{css}>{escape(words)}</text>'


def box(x: float, y: float, token: str, below: str, kind: str, words: str = "") -> list[str]:
    """A token in its slot."""
    middle = x + BOX_WIDTH / 2
    size = f'width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"'
    return [
        f'<rect x="{x:g}" y="{y:g}" {size} class="box {kind}"/>',
        text(middle, y + 19, token.replace(" ", "␣"), f"token {words}".strip()),
        text(middle, y + 35, below, f"small {words}".strip()),
    ]


def tokens() -> list[str]:
    """A column for each set, a box for each token."""
    drawn: list[str] = []
    sets = [[(token, None)] for token in PROMPT] + SETS
    slot, last = 0, len(sets) - 1
    for position, members in enumerate(sets):
        x = LEFT + COLUMN * position
        for row, (token, probability) in enumerate(members):
            kind, words = "seen", ""
            if position == last:
                kind, words = ("reader", "reader-text") if row == READER else ("sibling", "")
            below = f"slot {slot}"
            if probability is not None:
                below = f"p {probability:#.2g} · slot {slot}".replace("0.", ".")
            drawn += box(x, TOP + ROW * row, token, below, kind, words)
            slot += 1
        drawn.append(text(x + BOX_WIDTH / 2, BELOW + 20, f"position {position}"))
    return drawn


def headings() -> list[str]:
    """What the columns are, above them."""
    first = LEFT + COLUMN * len(PROMPT)
    names = [f"set {k}" for k in range(len(SETS))]
    return [
        text(LEFT, TOP - 14, "prompt: each token is a set of its own", "small", "start"),
        *(
            text(first + COLUMN * k + BOX_WIDTH / 2, TOP - 14, name, "small")
            for k, name in enumerate(names)
        ),
    ]


def legend() -> list[str]:
    """What the colours mean, in the space below the prompt."""
    rows = [
        ("reader", "one member of set 2, as a query"),
        ("seen", "what it attends to, beside itself: every slot of every earlier set"),
        ("sibling", "its siblings: never seen if isolated, all seen if visible"),
    ]
    drawn = []
    for i, (kind, words) in enumerate(rows):
        y = TOP + 1.6 * ROW + 28 * i
        size = f'x="{LEFT}" y="{y - 11:g}" width="20" height="14" rx="3"'
        drawn += [f'<rect {size} class="box {kind}"/>', text(LEFT + 30, y, words, anchor="start")]
    words = "one box = one token = one slot of the cache; one column = one set = one position"
    drawn.append(text(LEFT, TOP + 1.6 * ROW + 88, words, "small", "start"))
    return drawn


def picture() -> str:
    """The whole picture as SVG."""
    title = "Every token that reaches the threshold is appended, all of them at one position"
    said = (
        "A lattice of sets. Five prompt tokens stand at positions 0 to 4. Set 0 has one member at "
        "position 5, set 1 four at position 6, set 2 three at position 7."
    )
    card = f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="10" class="card"/>'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{title}</title>",
        f"<desc>{said}</desc>",
        f"<style>{STYLE}</style>",
        card,
        text(LEFT, 36, title, "title", "start"),
        *headings(),
        *tokens(),
        *legend(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg")
    target.write_text(picture(), encoding="utf-8")
