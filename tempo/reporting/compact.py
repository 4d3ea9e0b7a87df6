"""Figures of a page in fewer bytes: styles that many shapes share become classes, ids short.

A figure on record says the style of each shape anew, since it is a file of its own as well. In a
page with a hundred figures that would be a third of all bytes. The page's script writes the styles
back into a figure that a reader saves.
"""

from __future__ import annotations

import re
from collections import Counter

MARKER = 6.0  # points; the outline of a marker lies within so many around its middle
STYLES = "tempo-figure-styles"  # the id of the style element that holds the classes
_SVG = re.compile(r"<svg .*?</svg>", re.DOTALL)
# A whole tag. Within texts nothing looks like one, as their `<` are escaped.
_TAG = re.compile(r'<([a-zA-Z]+)((?: [\w:-]+="[^"<]*")+)(>(?:</\1>)?)')
_STYLE = re.compile(r' style="([^"]*)"')
_ATTRIBUTE = re.compile(r' ([\w:-]+)="([^"]*)"')
# Only plain declarations may leave their attribute: nothing that could end a rule.
_PLAIN = re.compile(r"[a-z-]+:[a-zA-Z0-9#.,% -]+(?:;[a-z-]+:[a-zA-Z0-9#.,% -]+)*")
# Ids that `drawing` makes, with what a page puts before them.
_ID = re.compile(r"(?<![\w-])(?:[mh]\d+-)?fig[0-9a-f]{8}-[\w.-]+")
_LONG = re.compile(r"-?\d+\.\d+")  # in points; a tenth of one is less than a pixel
_CLOUD = re.compile(r"(?:M-?\d+ -?\d+h0)+")  # dots, each by its place


def compact(html: str) -> tuple[str, str]:
    """The page with its figures in fewer bytes, and the rules of the classes that they now have.

    >>> line = '<path d="M 10.55 2.00 L 3 4" style="fill:red"></path>'
    >>> compact(f'<svg role="img">{line}{line}</svg>')[0]
    '<svg role="img"><path d="M10.6 2L3 4" class="s0"/><path d="M10.6 2L3 4" class="s0"/></svg>'
    >>> compact(f'<svg role="img">{line}{line}</svg>')[1]
    '.s0{fill:red}'
    >>> compact('<svg a="b"><path d="M9 5h0M7 6h0M8 6h0"></path></svg>')[0]
    '<svg a="b"><path d="m7 6h0m1 0h0m1-1h0"/></svg>'
    """
    pictures = _SVG.findall(html)
    uses = Counter(style for svg in pictures for style in _STYLE.findall(svg))
    classes: dict[str, str] = {}
    ids: dict[str, str] = {}

    def short_id(found: re.Match[str]) -> str:
        return ids.setdefault(found[0], f"f{len(ids)}")

    def attribute(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        if name == "style" and uses[value] > 1 and _PLAIN.fullmatch(value):
            return f' class="{classes.setdefault(value, f"s{len(classes)}")}"'
        if name in ("id", "href", "clip-path", "fill", "stroke", "style"):
            value = _ID.sub(short_id, value)
        elif name == "d":
            value = _path(value)
        elif name in ("x", "y"):
            value = _LONG.sub(_tenths, value)
        return f' {name}="{value}"'

    def tag(found: re.Match[str]) -> str:
        name, attributes, end = found[1], found[2], found[3]
        if name == "svg" or " class=" in attributes:  # of the page's own stylesheet
            return found[0]
        closed = "/>" if len(end) > 1 else end
        return f"<{name}{_ATTRIBUTE.sub(attribute, attributes)}{closed}"

    page = _SVG.sub(lambda svg: _TAG.sub(tag, svg[0]), html)
    return page, "".join(f".{name}{{{style}}}" for style, name in classes.items())


def _path(drawn: str) -> str:
    """The same path in fewer bytes. The small one of a marker keeps its hundredths."""
    if _CLOUD.fullmatch(drawn):
        return _cloud(drawn)
    numbers = _LONG.findall(drawn)
    if max((abs(float(number)) for number in numbers), default=0.0) > MARKER:
        drawn = _LONG.sub(_tenths, drawn)
    return re.sub(r" ?([A-Za-z]) ?", r"\1", drawn)


def _tenths(found: re.Match[str]) -> str:
    return f"{float(found[0]):.1f}".removesuffix(".0")


def _cloud(drawn: str) -> str:
    """Dots from left to right, each by its distance from the one before it."""
    dots = sorted(tuple(map(int, dot)) for dot in re.findall(r"M(-?\d+) (-?\d+)h0", drawn))
    steps, x, y = [], 0, 0
    for right, down in dots:
        far = f"{right - x} {down - y}".replace(" -", "-")
        steps.append(f"m{far}h0")
        x, y = right, down
    return "".join(steps)
