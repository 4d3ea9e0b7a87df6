"""Pictures of attention, distributions, positions and findings: arrays in, one self-contained inline SVG out.

Axes and text are drawn in `currentColor`, data in hues with a contrast of at least 3 to white and to #111, so that a
picture reads in light and in dark mode. Token texts are hostile: they go through `visible` and are never mathtext.
Shapes: L layers, H query heads, w set width, N slots, V vocabulary.
"""

from __future__ import annotations

import hashlib
import html
import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from tempo.claims import Finding
from tempo.reporting.text import visible

_INK = "#010203"  # stands for `currentColor` while matplotlib draws; used for nothing else
# Those of Okabe & Ito's colour-blind-safe hues that have contrast >= 3 to white and to #111.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#B5679B"
_SYMBOLS = {"SUPPORTED": (GREEN, "o"), "REFUTED": (VERMILLION, "X"), "INCONCLUSIVE": (PURPLE, "D")}
_MAX_LABELS = 48  # token labels along an axis that can still be told apart at the widest picture
_LABEL_LENGTH = 14
_WIDTH = 7.5  # inches at 96 CSS pixels
_RC: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "tempo", "text.parse_math": False, "axes.formatter.use_mathtext": False,
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.unicode_minus": True,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.titlesize": 9,
    "axes.titlelocation": "left", "axes.axisbelow": True, "legend.frameon": False, "grid.color": _INK,
    "grid.alpha": 0.15, "grid.linewidth": 0.5, "image.interpolation": "none", "savefig.transparent": True,
}  # fmt: skip
_XLINK = "{http://www.w3.org/1999/xlink}"


@dataclass(frozen=True)
class Picture:
    """An SVG that can stand inline in HTML, with what to see in it and a text alternative."""

    name: str  # slug, of ids and file names
    title: str
    caption: str
    alt: str
    svg: str


def number(x: float | None) -> str:
    """x with three significant digits; 'n/a' for NaN and None."""
    if x is None or math.isnan(x):
        return "n/a"
    if math.isinf(x):
        return "∞" if x > 0 else "-∞"
    if x == 0 or 1e-4 <= abs(x) < 1e3:
        return f"{x:.3g}"
    return f"{x:.0f}" if 1e3 <= abs(x) < 1e6 else re.sub(r"e([+-])0?", r"e\1", f"{x:.3g}").replace("e+", "e")


def slug(text: str) -> str:
    """The text as lower-case ASCII words joined by hyphens, for ids and file names."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "untitled"


def to_html(picture: Picture) -> str:
    """The picture as a <figure>; it scrolls by itself where the page is narrower than it can shrink."""
    title, caption = (html.escape(visible(text)) for text in (picture.title, picture.caption))
    return (
        f'<figure class="tempo-figure"><div class="tempo-scroll" tabindex="0" role="region" aria-label="{title}">'
        f"{picture.svg}</div><figcaption><strong>{title}.</strong> {caption}</figcaption></figure>"
    )


def save(picture: Picture, folder: str | Path) -> Path:
    """Write `<folder>/<name>.svg`, with a background of its own, light or dark as the viewer prefers."""
    style = "svg{color:#222;background:#fff}@media(prefers-color-scheme:dark){svg{color:#ddd;background:#111}}"
    head, body = picture.svg.split(">", 1)
    path = Path(folder) / f"{picture.name}.svg"
    path.parent.mkdir(parents=True, exist_ok=True)
    title = html.escape(visible(picture.title))
    path.write_text(f"{head}><title>{title}</title><style>{style}</style>{body}", encoding="utf-8")
    return path


def attention_heatmap(
    attention: np.ndarray, labels: Sequence[str], slots: Sequence[int], layers: Sequence[int] | None = None,
    title: str = "Attention of a set",
) -> Picture:  # fmt: skip
    """Attention [L, H, w, N] of a set at `slots`, mean over heads, one panel for each of `layers` (default four)."""
    layers = list(layers) if layers is not None else sorted({round(x) for x in np.linspace(0, len(attention) - 1, 4)})
    weights = attention[layers].astype(np.float64).mean(axis=1)  # [layers, w, N]
    _, width, num_slots = weights.shape
    top = float(weights[..., 1:].max()) if num_slots > 1 else float(weights.max())
    norm = PowerNorm(0.5, 0.0, top if top > 0 else 1.0, clip=True)
    row = min(0.22, 1.8 / width)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(layers), 1, sharex=True, squeeze=False)[:, 0]
        for ax, layer, panel in zip(axes, layers, weights, strict=True):
            image = ax.imshow(np.ma.masked_equal(panel, 0.0), norm=norm, cmap=_cmap("viridis"), aspect="auto")
            corner = (slots[0] - 0.5, -0.5)
            ax.add_patch(Rectangle(corner, width, width, fill=False, ec=VERMILLION, lw=1.8, clip_on=False))
            ax.set_title(f"layer {layer}")
            _token_ticks(ax, "y", [labels[slot] for slot in slots], max_labels=12)
            ax.tick_params(axis="x", length=2, bottom=ax is axes[-1], labelbottom=ax is axes[-1])
        _token_ticks(axes[-1], "x", labels)
        bar = figure.colorbar(image, ax=axes, extend="max", fraction=0.04, pad=0.02, aspect=25)
        bar.set_label("attention weight")
        ticks = np.array([0, 1 / 16, 1 / 4, 9 / 16, 1]) * norm.vmax  # evenly spaced after the square root
        bar.set_ticks(ticks.tolist(), labels=[f"{tick:.2g}" for tick in ticks])

    block = weights[:, :, slots[0] : slots[0] + width]
    among = block[:, ~np.eye(width, dtype=bool)]
    means = [number(m.mean()) if m.size else "none" for m in among]
    said = ", ".join(f"layer {layer}: {mean}" for layer, mean in zip(layers, means, strict=True))
    caption = (
        f"Rows: the {width} siblings as queries; columns: all {num_slots} slots, the siblings' own outlined. Mean over "
        f"heads; the square-root colour scale ends at {number(norm.vmax)}, the largest weight outside slot 0, so that "
        "the attention sink at slot 0 does not drown the rest. Grey means exactly zero. "
        f"Mean weight on each other sibling: {said}."
    )
    alt = f"Heatmap of attention from {width} siblings to {num_slots} slots. Mean weight on each other sibling: {said}."
    size = (min(_WIDTH, 2.0 + 0.22 * num_slots), 1.0 + len(layers) * (0.35 + row * width))
    return _picture(title, caption, alt, size, draw)


def layer_head_map(values: np.ndarray, title: str, label: str, caption: str) -> Picture:
    """One value per layer and head [L, H] as a heatmap; diverging around zero if any is negative, NaN grey."""
    values = np.asarray(values, np.float64)
    finite = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    signed, end = bool(finite.min() < 0), float(np.abs(finite).max()) or 1.0
    num_layers, num_heads = values.shape

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        norm, cmap = Normalize(-end if signed else 0.0, end), _cmap("PuOr_r" if signed else "viridis")
        image = ax.imshow(np.ma.masked_invalid(values), norm=norm, cmap=cmap, aspect="auto")
        ax.set(xlabel="head", ylabel="layer")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        figure.colorbar(image, ax=ax, fraction=0.05, pad=0.03).set_label(_printable(label))

    layer, head = divmod(int(np.argmax(np.where(np.isfinite(values), np.abs(values), -1.0))), num_heads)
    alt = (
        f"Heatmap of {label} for {num_layers} layers and {num_heads} heads: from {number(finite.min())} to "
        f"{number(finite.max())}, mean {number(finite.mean())}; largest in layer {layer}, head {head}."
    )
    caption += "" if np.isfinite(values).all() else " Grey: no value."
    size = (min(_WIDTH, 2.2 + 0.24 * num_heads), min(6.0, 1.0 + 0.15 * num_layers))
    return _picture(title, caption, alt, size, draw)


def lines_by(
    groups: Mapping[str, Sequence[tuple[float, float, float, float]]], xlabel: str, ylabel: str, title: str,
    caption: str, log_y: bool = False,
) -> Picture:  # fmt: skip
    """One line per group of (x, mean, low, high), with its interval as band and bars."""
    drawn = {_printable(name): np.array(sorted(points), np.float64) for name, points in groups.items() if len(points)}
    zeros = log_y and any((points[:, 1] <= 0).any() for points in drawn.values())

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for i, (name, points) in enumerate(drawn.items()):
            colour, dash = (BLUE, VERMILLION, GREEN, PURPLE)[i % 4], ("-", "--", ":")[i // 4 % 3]
            shown = points[points[:, 1] > 0] if log_y else points
            x, mean, low, high = shown.T
            errors = np.nan_to_num(np.maximum([mean - low, high - mean], 0.0))
            style = {"color": colour, "ls": dash, "marker": "osD^vPX*"[i % 8], "ms": 5, "lw": 1.6, "label": name}
            ax.errorbar(x, mean, errors, elinewidth=1, capsize=3, **style)
            ax.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
            if log_y:
                for at_zero in points[points[:, 1] <= 0, 0]:
                    ax.plot(at_zero, 0.02, "v", mfc="none", mec=colour, transform=ax.get_xaxis_transform())
        ax.set(xlabel=_printable(xlabel), ylabel=_printable(ylabel))
        ax.grid(axis="y")
        if all(float(x).is_integer() for points in drawn.values() for x in points[:, 0]):
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log_y:
            ax.set_yscale("log", nonpositive="clip")
            bottom, top = ax.get_ylim()
            ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if top / bottom > 300 else (1.0, 2.0, 5.0), numticks=12))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
            ax.yaxis.set_minor_formatter(NullFormatter())
        if len(drawn) > 1:
            figure.legend(loc="outside upper left", ncols=max(1, 80 // (max(map(len, drawn)) + 8)))

    said = "; ".join(
        f"{name}: " + " to ".join(f"{number(mean)} at {number(x)}" for x, mean, _, _ in points[[0, -1]]) for name, points in drawn.items()
    )
    caption += " Open triangles at the lower edge: zero, which a logarithmic axis cannot show." if zeros else ""
    return _picture(title, caption, f"{ylabel} against {xlabel}. {said}.", (6.2, 3.6), draw)


def distributions(
    p: np.ndarray, q: np.ndarray, texts: Callable[[int], str] | Mapping[int, str],
    names: tuple[str, str] = ("isolated", "visible"), k: int = 12, title: str = "Two distributions of the next token",
) -> Picture:  # fmt: skip
    """The k tokens that are most probable in either of two distributions [V], as paired bars."""
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    tokens = [int(t) for t in np.argsort(-np.maximum(p, q), kind="stable")[:k]]
    text = texts if callable(texts) else texts.__getitem__
    distance = 0.5 * float(np.abs(p - q).sum())

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        rows = np.arange(len(tokens))
        first, second = (_printable(name) for name in names)
        ax.barh(rows - 0.2, p[tokens], 0.36, fc=BLUE, ec=BLUE, lw=1, label=first)
        ax.barh(rows + 0.2, q[tokens], 0.36, fc="none", ec=VERMILLION, lw=1, hatch="////", label=second)
        ax.invert_yaxis()
        _token_ticks(ax, "y", [text(token) for token in tokens])
        ax.set_xlabel("probability")
        ax.grid(axis="x")
        figure.legend(loc="outside upper left", ncols=2)

    rest = ", ".join(f"{number(max(0.0, 1 - d[tokens].sum()))} ({n})" for n, d in zip(names, (p, q), strict=True))
    caption = (
        f"The {len(tokens)} tokens that are most probable in either. Probability not shown: {rest}. "
        f"Total variation over all {len(p)} tokens: {number(distance)}."
    )
    said = "; ".join(f"{text(t)}: {number(p[t])} and {number(q[t])}" for t in tokens[:5])
    alt = f"Paired bars of {names[0]} and {names[1]}, total variation {number(distance)}. Most probable: {said}."
    return _picture(title, caption, alt, (6.2, 1.1 + 0.27 * len(tokens)), draw)


def position_map(
    slots: Sequence[int], recovered_position: Sequence[float], expected_position: Sequence[float],
    labels: Sequence[str], title: str = "Physical slot to logical position",
) -> Picture:  # fmt: skip
    """Each slot's position as recovered from its cached key, and the expected one; shared positions form a band."""
    slot, found, expected = (np.asarray(a, np.float64) for a in (slots, recovered_position, expected_position))
    shared = {y: slot[found == y] for y in np.unique(found) if (found == y).sum() > 1}
    wrong = found != expected

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for y, members in shared.items():
            left, right = members.min(), members.max()
            ax.add_patch(Rectangle((left - 0.4, y - 0.36), right - left + 0.8, 0.72, facecolor=BLUE, alpha=0.25, lw=0))
            ax.annotate(f"×{len(members)}", (right + 0.5, y), va="center", fontsize=8)
        ax.plot(slot, expected, "s", mfc="none", mec=_INK, alpha=0.6, ms=9, mew=0.8, label="expected")
        ax.plot(slot[~wrong], found[~wrong], "o", color=BLUE, ms=4.5, label="recovered, as expected")
        if wrong.any():
            ax.plot(slot[wrong], found[wrong], "X", color=VERMILLION, ms=7, label="recovered, not as expected")
        ax.set(ylabel="logical position", xlim=(slot.min() - 0.8, slot.max() + 1.6))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y")
        _token_ticks(ax, "x", labels, at=slot.tolist())
        figure.legend(loc="outside upper left", ncols=3)

    said = (
        f"{len(slot)} slots at {len(np.unique(found))} positions, of which {len(shared)} are shared; "
        f"{int(wrong.sum())} slots are not where they were expected"
    )
    caption = (
        f"{said}. Left to right: slots in the order of the cache. Siblings at one position stand side by side in a "
        "band with their number; a token with a position of its own climbs by one."
    )
    size = (min(_WIDTH, 3.5 + 0.2 * len(slot)), 4.0)
    return _picture(title, caption, f"Map from slot to position: {said}.", size, draw)


_IN_MARGINS = "effect in units of the claim's margin (linear to 1, then logarithmic)"
_OWN_SCALE = "effect of claims with margin 0, each row on a scale of its own"
_SHARE = "share of units for which it is true"


def forest(findings: Sequence[Finding], title: str = "All claims at a glance") -> Picture:
    """Every finding's estimate and 95 % interval against the region in which its claim would hold.

    Three panels, because units differ: effects in units of their margin; shares; and effects whose margin is zero,
    where only sign and precision can be compared, so each has its own scale.
    """
    panels: dict[str, list[tuple[Finding, float]]] = {_IN_MARGINS: [], _OWN_SCALE: [], _SHARE: []}
    for finding in findings:
        ends = [abs(x) for x in (finding.estimate, finding.low, finding.high) if math.isfinite(x)]
        if finding.test in ("always", "proportion"):
            panels[_SHARE].append((finding, 1.0))
        elif finding.margin > 0:
            panels[_IN_MARGINS].append((finding, finding.margin))
        else:
            panels[_OWN_SCALE].append((finding, max(ends, default=0.0) or 1.0))
    panels = {label: members for label, members in panels.items() if members}

    def draw(figure: Figure) -> None:
        rows = [len(members) + 1 for members in panels.values()] or [1]
        axes = figure.subplots(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
        for ax, (label, members) in zip(axes, panels.items(), strict=False):
            values = [x / s for f, s in members for x in (f.estimate, f.low, f.high) if math.isfinite(x)]
            left, right = (-0.03, 1.03) if label == _SHARE else (1.3 * min([-1, *values]), 1.3 * max([1, *values]))
            if label == _IN_MARGINS:
                ax.set_xscale("symlog", linthresh=1.0)
                ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(x)))
            elif label == _OWN_SCALE:
                ax.set_xticks([0.0])
            for row, (finding, scale) in enumerate(members):
                _forest_row(ax, row, finding, scale, left, right)
            ax.axvline(0.0, color=_INK, lw=0.6, alpha=0.6)
            ax.set(xlim=(left, right), ylim=(len(members) - 0.4, -0.6), xlabel=label)
            ax.set_yticks(range(len(members)), [_clip(f.label, 34) for f, _ in members])
            ax.tick_params(axis="y", length=0)

    count = {v: sum(f.verdict == v for f in findings) for v in _SYMBOLS}
    caption = (
        "Estimate and 95 % interval; the shaded region is where the claim would hold. Green disc: supported; "
        "vermillion cross: refuted; purple open diamond: inconclusive. The verdict is the registered test's, not the "
        "drawing's."
    )
    alt = ", ".join(f"{n} {v.lower()}" for v, n in count.items()) + ". " + "; ".join(
        f"{f.label}: {number(f.estimate)} [{number(f.low)}, {number(f.high)}] {f.verdict.lower()}" for f in findings
    )  # fmt: skip
    return _picture(title, caption, alt, (9.5, 0.6 + 0.27 * len(findings) + 0.5 * len(panels)), draw)


def _forest_row(ax: Axes, row: int, finding: Finding, scale: float, left: float, right: float) -> None:
    unit = finding.margin / scale
    begin, end = {
        "always": (0.995, right), "proportion": (finding.margin, right), "greater": (unit, right), "less": (left, unit),
        "somewhere": (unit, right), "equivalent": (-unit, unit),
    }[finding.test]  # fmt: skip
    ax.add_patch(Rectangle((begin, row - 0.4), end - begin, 0.8, facecolor=_INK, alpha=0.13, lw=0))
    colour, symbol = _SYMBOLS[finding.verdict]
    if math.isfinite(finding.low) and math.isfinite(finding.high):
        ax.plot([finding.low / scale, finding.high / scale], [row, row], color=colour, lw=1.8, solid_capstyle="butt")
    face = "none" if finding.verdict == "INCONCLUSIVE" else colour
    ax.plot([finding.estimate / scale], [row], symbol, mfc=face, mec=colour, ms=6.5)
    interval = f"{number(finding.estimate)} [{number(finding.low)}, {number(finding.high)}]"
    margin = f"  margin {number(finding.margin)}" if finding.margin > 0 else ""
    ax.text(1.02, row, interval + margin, transform=ax.get_yaxis_transform(), va="center", fontsize=8)


def _token_ticks(ax: Axes, which: str, labels: Sequence[str], at: Sequence[float] | None = None, max_labels: int = _MAX_LABELS) -> None:
    """Token texts along an axis; only every n-th where they would overlap."""
    at = range(len(labels)) if at is None else at
    step = -(-len(labels) // max_labels)
    # SVG drops spaces at the ends of a text, and most tokens begin with one.
    shown = [_clip(re.sub("^ +| +$", lambda spaces: "·" * len(spaces[0]), text)) for text in labels[::step]]
    if which == "y":
        ax.set_yticks(at[::step], shown, fontsize=8)
    else:  # anchored, so that a viewer's font of another width still ends at its tick
        ax.set_xticks(at[::step], shown, fontsize=8, rotation=90, rotation_mode="anchor", ha="right", va="center")


def _cmap(name: str) -> Colormap:
    """The colour map, with a grey that is none of its colours for cells without a value; 64 levels, to save bytes."""
    return matplotlib.colormaps[name].resampled(64).with_extremes(bad="#b0b0b0")


def _printable(text: str) -> str:
    """`visible`, and without the two noncharacters that XML forbids."""
    return re.sub("[\ufffe\uffff]", lambda char: f"\\u{ord(char[0]):04x}", visible(text))


def _clip(text: str, length: int = _LABEL_LENGTH) -> str:
    text = _printable(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _picture(title: str, caption: str, alt: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> Picture:
    buffer = io.StringIO()
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # The text stays text: the viewer's fonts draw it, matplotlib's only estimate its width.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from", category=UserWarning)
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    raw = buffer.getvalue()
    title, caption, alt = _printable(title), _printable(caption), _printable(alt)
    prefix = f"fig{hashlib.sha256((title + alt + raw).encode()).hexdigest()[:8]}"
    return Picture(slug(title), title, caption, alt, _inline(raw, prefix, alt))


def _inline(raw: str, prefix: str, alt: str) -> str:
    """Matplotlib's SVG as an element for HTML: no style for the whole page, and only ids in use, unlike any other's."""
    root = ET.fromstring(raw)
    for parent in root.iter():
        for child in [c for c in parent if c.tag.endswith(("}style", "}metadata"))]:
            parent.remove(child)
    refers = re.compile(r"(?<=url\(#)[^)]+|(?<=^#).+")
    used = {ref for e in root.iter() for k, v in e.attrib.items() if k != "id" for ref in refers.findall(v)}
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        old = dict(element.attrib)
        element.attrib.clear()
        for key, value in old.items():
            if key == "id":
                value = f"{prefix}-{value}" if value in used else ""
            else:
                value = refers.sub(lambda match: f"{prefix}-{match[0]}", value).replace(_INK, "currentColor")
                value = re.sub(r"font-family: [^;]*(; )?", "", re.sub(r"\s+", " ", value)).strip()
            if value:
                element.set(key.replace(_XLINK, "xlink:"), value)
        element.text, element.tail = ((s if s and s.strip() else None) for s in (element.text, element.tail))
    width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
    width, height = round(width * 96 / 72), round(height * 96 / 72)
    for key, value in {
        "xmlns": "http://www.w3.org/2000/svg", "xmlns:xlink": _XLINK.strip("{}"), "role": "img", "aria-label": alt,
        "width": f"{width}", "height": f"{height}", "font-family": "system-ui, sans-serif", "stroke-linejoin": "round",
        "style": f"width:100%;max-width:{width}px;min-width:{round(0.75 * width)}px;height:auto",
    }.items():  # fmt: skip
        root.set(key, value)
    return ET.tostring(root, encoding="unicode")
