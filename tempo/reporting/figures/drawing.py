"""What all pictures share: colours, token labels, and how matplotlib's output becomes SVG and PNG.

Axes and text are drawn in `currentColor`, data in hues with a contrast of at least 3 to white and
to #111, so that a picture reads in light and in dark mode. Token texts are hostile: they go through
`escaped` and are never mathtext.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import nh3
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

from tempo import files
from tempo.errors import TraceError
from tempo.reporting.glossary import explained
from tempo.text import html_text, printable, slug

INK = "#010203"  # stands for `currentColor` while matplotlib draws; used for nothing else
# Those of Okabe & Ito's colour-blind-safe hues that have contrast >= 3 to white and to #111.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#B5679B"
SYMBOLS = {"SUPPORTED": (GREEN, "o"), "REFUTED": (VERMILLION, "X"), "INCONCLUSIVE": (PURPLE, "D")}
_MAX_LABELS = 48  # token labels along an axis that can still be told apart at the widest picture
_LABEL_LENGTH = 14
WIDTH = 7.5  # inches at 96 CSS pixels
_SHORT = 0.1  # points; what is shorter is a dot
_DPI = 300  # of a PNG, as journals ask for
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
_RC: dict[Any, Any] = {
    **dict.fromkeys(_INKED, INK),
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.unicode_minus": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "grid.linewidth": 0.5,
    "image.interpolation": "none",
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "tempo",
    "text.parse_math": False,
}
_COLUMN = 600  # CSS pixels of half a page: wider pictures get a row of their own
_XLINK = "{http://www.w3.org/1999/xlink}"
_SVG = "{http://www.w3.org/2000/svg}"
_LONG = re.compile(r"-?\d+\.\d{3,}")  # more digits than a hundredth of a point needs
# A line too short to be seen, but for its round ends: a dot.
_DOT = re.compile(r"M (-?[\d.]+) (-?[\d.]+)\s+L (-?[\d.]+) \2\s+(?=M|$)")
FORMATS = ("svg", "png")
# What a picture may be made of. None of it runs anything, or loads anything by itself.
SVG_TAGS = {"svg", "g", "defs", "use", "clipPath", "pattern", "linearGradient", "stop", "image"}
SVG_TAGS |= {"path", "rect", "line", "circle", "ellipse", "polygon", "polyline"}
SVG_TAGS |= {"text", "tspan", "title"}
_SVG_ATTRIBUTES = {
    *("xmlns", "id", "role", "aria-label", "class", "version", "viewBox", "href", "style"),
    *("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "rx", "ry", "d", "points", "dx", "dy"),
    *("width", "height", "transform", "preserveAspectRatio", "clip-path", "clipPathUnits"),
    *("patternUnits", "patternTransform", "gradientUnits", "gradientTransform", "offset"),
    *("font-family", "fill", "stroke", "stroke-linejoin", "stroke-width", "opacity"),
}
_SVG_STYLES = {
    *("width", "min-width", "max-width", "height", "font-size", "font-weight", "font-style"),
    *("text-anchor", "fill", "fill-opacity", "fill-rule", "clip-rule", "opacity", "stop-color"),
    *("stop-opacity", "stroke", "stroke-opacity", "stroke-width", "stroke-linejoin"),
    *("stroke-linecap", "stroke-dasharray", "stroke-dashoffset", "stroke-miterlimit"),
    *("image-rendering", "vector-effect", "white-space"),
}
# Of a saved file, not of a page: its background is light or dark as the viewer prefers.
_STYLE = (
    "text{pointer-events:none}svg{color:#222;background:#fff}"
    "@media(prefers-color-scheme:dark){svg{color:#ddd;background:#111}}"
)


@dataclass(frozen=True)
class Picture:
    """An SVG that can stand inline in HTML, with what to see in it and a text alternative.

    name: a slug, for ids and file names. csv: the numbers that it shows, empty if it has no table.
    png: the same on white, for a paper or a slide.
    """

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    csv: str = ""
    png: bytes = field(default=b"", repr=False)

    def named(self, name: str) -> Picture:
        """The same picture by another name."""
        return replace(self, name=name)

    def _repr_html_(self) -> str:
        return to_html(self)


def clean_svg(svg: str) -> str:
    """The picture without all that a drawing does not need: scripts, links, what loads anything.

    The sanitiser parses it as a browser does. What it returns it would leave as it is.
    """
    cleaned = nh3.clean(
        svg,
        tags=SVG_TAGS,
        clean_content_tags=set(),
        attributes={tag: _SVG_ATTRIBUTES for tag in SVG_TAGS},
        attribute_filter=_kept_attribute,
        filter_style_properties=_SVG_STYLES,
        generic_attribute_prefixes=set(),
        url_schemes={"data"},
        link_rel=None,
    )
    cleaned = cleaned.replace("&nbsp;", "\xa0")  # a name that XML does not know
    return re.sub(r"url\(&quot;(#[\w.-]+)&quot;\)", r"url(\1)", cleaned)  # as it was written


def _kept_attribute(tag: str, name: str, value: str) -> str | None:
    """The attribute's value, or None if it refers to anything outside the picture."""
    if name == "aria-label":  # text, which nothing obeys
        return value
    if name == "href":
        return value if value.startswith(("#", "data:image/png;base64,")) else None
    # Colours and clips may refer to what the picture defines itself.
    rest = re.sub(r"url\(#[\w.-]+\)", "", value).lower()
    return None if re.search(r"url|src|image-set|\\", rest) else value


def check_svg(svg: str, where: str) -> None:
    """Raise TraceError if a picture from a record holds more than a drawing: scripts, links."""
    if not svg.startswith("<svg ") or svg != clean_svg(svg):
        raise TraceError(
            f"a picture in {where} is no drawing of tempo's: it holds more than shapes and texts; "
            "run pytest on the studies to make it again"
        )


def to_html(picture: Picture, at: str = "", id: str = "") -> str:
    """The picture as a <figure> with its text alternative. It scrolls where it cannot shrink.

    Where a script can serve them, buttons give it as SVG, PNG and, if it has a table, as CSV.
    at: what its ids begin with, so that one page can hold the same picture twice. id: its anchor.
    """
    title, alt = map(html_text, (picture.title, picture.alt))
    caption = explained(picture.caption)
    width = re.search(r' width="(\d+)"', picture.svg)
    svg = re.sub(r'( id="|#)(?=fig[0-9a-f]{8}-)', rf"\1{at}", picture.svg) if at else picture.svg
    wide = " tempo-wide" if width and int(width[1]) > _COLUMN else ""
    anchor = f' id="{html_text(id)}"' if id else ""
    # The text alternative stands in the page once: the picture refers to it.
    digest = hashlib.sha256(picture.svg.encode()).hexdigest()[:8]
    words = f"words-{html_text(id) or at + digest}"
    svg = re.sub(r' aria-label="[^"]*"', f' aria-labelledby="{words}"', svg, count=1)
    table = f' data-csv="{_attribute(picture.csv)}"' if picture.csv else ""
    return (
        f'<figure class="tempo-figure{wide}"{anchor} data-name="{html_text(picture.name)}"{table}>'
        f'<div class="tempo-scroll" tabindex="0" role="region" aria-label="{title}">'
        f"{svg}</div><figcaption><strong>{title}.</strong> {caption}</figcaption>"
        f'<details><summary>As text</summary><p id="{words}">{alt}</p></details></figure>'
    )


def _attribute(table: str) -> str:
    """A table as the value of an attribute, its line breaks kept."""
    return "\n".join(map(html_text, table.split("\n")))


def save(picture: Picture, folder: str | Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write `<folder>/<name>.svg` and `.png`, or only one of both; the paths written."""
    contents = contents_of([picture], formats)
    for name, content in contents.items():
        files.write(Path(folder) / name, content)
    return [Path(folder) / name for name in contents]


def contents_of(pictures: Iterable[Picture], formats: Sequence[str] = FORMATS) -> dict[str, bytes]:
    """What the files of these pictures hold, by name. One read from a record has no PNG."""
    contents = {}
    for picture in pictures:
        kinds = {"svg": _standing_alone(picture).encode(), "png": picture.png}
        contents |= {f"{picture.name}.{kind}": kinds[kind] for kind in formats if kinds[kind]}
    return contents


def _standing_alone(picture: Picture) -> str:
    """The SVG as a file of its own, with a title and a background."""
    head, body = picture.svg.split(">", 1)
    return f"{head}><title>{html_text(picture.title)}</title><style>{_STYLE}</style>{body}"


def token_ticks(
    ax: Axes,
    which: str,
    labels: Sequence[str],
    at: Sequence[float] | None = None,
    max_labels: int = _MAX_LABELS,
) -> None:
    """Token texts along an axis; only every n-th where they would overlap."""
    at = range(len(labels)) if at is None else at
    step = -(-len(labels) // max_labels)
    # SVG drops spaces at the ends of a text, and most tokens begin with one.
    shown = [
        clip(re.sub("^ +| +$", lambda spaces: "·" * len(spaces[0]), text))
        for text in labels[::step]
    ]
    if which == "y":
        ax.set_yticks(at[::step], shown, fontsize=8)
    else:  # anchored, so that a viewer's font of another width still ends at its tick
        ax.set_xticks(
            at[::step],
            shown,
            fontsize=8,
            rotation=90,
            rotation_mode="anchor",
            ha="right",
            va="center",
        )


def csv_of(table: Sequence[Sequence[object]]) -> str:
    """The rows as comma-separated values; what a spreadsheet would take for a formula is quoted."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([_csv_cell(cell) for cell in row] for row in table)
    return out.getvalue()


def _csv_cell(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:.6g}" if math.isfinite(cell) else ""
    text = printable(str(cell))
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text


def _dot(line: re.Match[str]) -> str:
    """A dot in few bytes, as a cloud has hundreds; any other line as it is."""
    x, y, end = map(float, line.groups())
    return f"M{x:.0f} {y:.0f}h0" if abs(end - x) < _SHORT else line[0]


def _unwrap(parent: ET.Element) -> None:
    """Replace each group that says nothing by what it holds."""
    children = []
    for child in list(parent):
        _unwrap(child)
        is_bare = child.tag == "g" and not child.attrib and not child.text
        children += list(child) if is_bare else [child]
    parent[:] = children


def cmap_of(name: str) -> Colormap:
    """The colour map in 64 levels, to save bytes. Cells without a value get another grey."""
    return matplotlib.colormaps[name].resampled(64).with_extremes(bad="#b0b0b0")


def clip(text: str, length: int = _LABEL_LENGTH) -> str:
    text = printable(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def picture(
    title: str,
    caption: str,
    alt: str,
    size: tuple[float, float],
    draw: Callable[[Figure], None],
    tips: Sequence[str] = (),
    table: Sequence[Sequence[object]] = (),
) -> Picture:
    """What `draw` draws on a figure of `size` inches.

    tips: an artist with the gid `tip-<i>` shows `tips[i]` when pointed at.
    table: the numbers that it shows, in rows below a heading.
    """
    vector, raster = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # a reader's own style would make other pictures, or need LaTeX
        matplotlib.rcParams.update(_RC)
        # The text stays text: the viewer's fonts draw it, matplotlib's only estimate its width.
        warnings.filterwarnings(
            "ignore", message=r"Glyph \d+ .* missing from", category=UserWarning
        )
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(
            vector, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
        figure.set_layout_engine("none")  # laid out once is enough
        figure.savefig(
            raster,
            format="png",
            dpi=_DPI,
            transparent=False,
            facecolor="white",
            metadata={"Software": None},
        )
    raw = vector.getvalue()
    title, caption, alt = printable(title), printable(caption), printable(alt)
    prefix = f"fig{hashlib.sha256((title + alt + raw).encode()).hexdigest()[:8]}"
    return Picture(
        slug(title),
        title,
        caption,
        alt,
        _inline(raw, prefix, alt, tips),
        csv_of(table) if table else "",
        raster.getvalue(),
    )


def _inline(raw: str, prefix: str, alt: str, tips: Sequence[str] = ()) -> str:
    """Matplotlib's SVG as an element for HTML.

    It holds no style for the whole page, and only ids that are in use, unlike any other picture's.
    """
    root = ET.fromstring(raw)
    pointed = {f"tip-{i}": tip for i, tip in enumerate(tips)}
    for element in root.iter():
        if tip := pointed.get(element.get("id", "")):
            title = ET.Element("title")
            title.text = printable(tip)
            element.insert(0, title)
    for parent in root.iter():
        for child in [c for c in parent if c.tag.endswith(("}style", "}metadata"))]:
            parent.remove(child)
    refers = re.compile(r"(?<=url\(#)[^)]+|(?<=^#).+")
    used: set[str] = set()
    for element in root.iter():
        for key, value in element.attrib.items():
            if key != "id":
                used.update(refers.findall(value))
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        old = dict(element.attrib)
        element.attrib.clear()
        for key, value in old.items():
            if key == "id":
                value = f"{prefix}-{value}" if value in used else ""
            else:
                value = refers.sub(lambda match: f"{prefix}-{match[0]}", value)
                value = value.replace(INK, "currentColor")
                if key == "transform" and value.startswith("rotate(-0 "):
                    continue
                if key in ("d", "points", "x", "y"):
                    value = _DOT.sub(_dot, value)
                    value = _LONG.sub(lambda match: f"{float(match[0]):.2f}", value)
                value = re.sub(r"font-family: [^;]*(; )?", "", re.sub(r"\s+", " ", value)).strip()
            if value:
                element.set(key.replace(_XLINK, ""), value)  # as SVG 2 and all browsers have it
        element.text, element.tail = (
            (s if s and s.strip() else None) for s in (element.text, element.tail)
        )
    _unwrap(root)
    width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
    width, height = round(width * 96 / 72), round(height * 96 / 72)
    for key, value in {
        "xmlns": _SVG.strip("{}"),
        "role": "img",
        "aria-label": alt,
        "width": f"{width}",
        "height": f"{height}",
        "font-family": "system-ui, sans-serif",
        "stroke-linejoin": "round",
        "style": f"width:100%;max-width:{width}px;min-width:{round(0.75 * width)}px;height:auto",
    }.items():
        root.set(key, value)
    return clean_svg(ET.tostring(root, encoding="unicode"))
