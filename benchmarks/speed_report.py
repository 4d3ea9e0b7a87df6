"""The report of benchmarks.speed: a Markdown table, and a plot of ratios and growth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.growth import SPOOLED
from benchmarks.timing import AT_ONCE
from tempo.reporting.figures import Picture
from tempo.reporting.figures.drawing import BLUE, GREEN, VERMILLION, picture

Report = Mapping[str, Any]

INTRODUCTION = """\
Made by `make speed`. Every ratio compares works done in alternation in one process. It is the
median over rounds, with the least and the most round beside it. Seconds depend on the machine,
ratios depend on it less. "Required" is the bound that was set before measuring.
"""
SWEEP = """\
The sweep is {runs} greedy runs of {steps} steps, attention and logits captured. All peers do the
same runs with exactly as many steps. "Same runs" counts those that chose the same tokens as tempo.
transformers and nnsight keep a cache of keys and values. A loop of `run_with_cache` runs the whole
text at each step. tempo forwards one set more than the others, to capture what the last set gives.
"""
GROWTH = f"""\
Exponents of time and of peak memory, one quantity varied at a time. "Fitted" is over all
points, in logarithms; "last" is between the last two. An exponent below 1 means that a part does
not grow, such as reading the weights once a step, or the memory of one pass. "Over the floor" is
the time of the last point over what as many tokens take the bare model in passes of {AT_ONCE}.
"""


def markdown(report: Report) -> str:
    """The report as Markdown: tables of ratios, of memory and of growth."""
    peers = ", ".join(
        f"{name} {release or 'not installed: measured without'}"
        for name, release in report["peers"].items()
    )
    setting = f"{report['threads']} threads{_state(report)}; {versions_of(report)}, {peers}"
    parts = ["# Speed and memory\n", INTRODUCTION, SWEEP.format(**report)]
    parts.append(f"{setting}; measured in {report['took']} s.\n")
    for measured in models_of(report):
        parts.append(f"## {measured['model']}, {measured['dtype']}, {measured['device']}\n")
        parts.append(ratio_table(measured["rows"]))
    if "skipped" in report["gpu"]:
        parts.append(f"GPU: skipped, because {report['gpu']['skipped']}.\n")
    parts += ["## Memory\n", memory_line(report["peak"])]
    parts += ["## Growth\n", GROWTH, growth_table(report)]
    return "\n".join(parts)


def _state(report: Report) -> str:
    """What else the machine did; empty of a record that does not say it."""
    if "machine" not in report:
        return ""
    before, after = report["machine"], report["machine_after"]
    state = f" on {before['cores']} cores, OMP_WAIT_POLICY {before['wait_policy']}"
    if before["load"] is None:
        return state
    return f"{state}, load {before['load']:.1f} before and {after['load']:.1f} after"


def models_of(report: Report) -> list[Report]:
    """What was measured on the processor, then on the GPU if there was one."""
    return [*report["models"], *([] if "skipped" in report["gpu"] else [report["gpu"]])]


def versions_of(report: Report) -> str:
    """The libraries and their releases."""
    versions = report["models"][0]["versions"]
    return ", ".join(f"{name} {release}" for name, release in versions.items())


def ratio_table(rows: Sequence[Report]) -> str:
    """One line a ratio."""
    head = ["", "what over what", "ms", "ratio (least to most)", "required", "met"]
    lines = []
    for row in rows:
        seconds = " / ".join(milliseconds(s) for s in row["seconds"])
        ratio = f"**{row['ratio']:.3g}** ({row['least']:.3g} to {row['most']:.3g})"
        what = row["what"] + same(row)
        lines.append([row["name"], what, seconds, ratio, required(row), verdict(row)])
    return table(head, lines)


def same(row: Report) -> str:
    """How far two works gave the same, where that was compared."""
    if "same_runs" in row:
        return f"; same runs: {row['same_runs']}"
    if "same_bits" in row:
        return "; the same to the last bit" if row["same_bits"] else "; NOT the same bits"
    return ""


def required(row: Report) -> str:
    """The bounds that were set before measuring."""
    bounds = [
        f"≥ {row['at_least']:g}" if row["at_least"] is not None else "",
        f"≤ {row['at_most']:g}" if row["at_most"] is not None else "",
    ]
    return ", ".join(filter(None, bounds))


def verdict(row: Report) -> str:
    """Whether the bounds are met; empty where there are none."""
    if row["met"] is None:
        return ""
    return "yes" if row["met"] else "**no**"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def memory_line(peak: Report) -> str:
    """The largest runs' peak memory in one sentence."""
    if "skipped" in peak:
        return f"Skipped: {peak['skipped']}.\n"
    runs = f"{peak['runs']} runs x {peak['steps']} steps of {peak['width']} siblings"
    computed, growth = (f"{peak[key] / 2**20:.0f} MiB" for key in ("computed", "peak"))
    bounds = f"required: {required(peak)}; met: {verdict(peak)}"
    return (
        f"{runs} after {peak['context']} tokens, attention and logits captured: "
        f"computed {computed}, growth of the peak resident set {growth}, "
        f"ratio **{peak['ratio']:.3g}** ({bounds}).\n"
    )


def growth_table(report: Report) -> str:
    """One line for each quantity that time and memory grow with."""
    rows = []
    for name, curve in report["time"].items():
        power = [f"{curve['exponents'][key]:.2f}" for key in ("fitted", "last")]
        limit = f"≤ {curve['at_most']:g}: {verdict(curve)}" if "at_most" in curve else ""
        over = f"{curve['seconds'][-1] / curve['floor'][-1]:.3g}" if "floor" in curve else ""
        rows.append(["time", name, span(curve), curve["what"], *power, over, limit])
    for name, curve in report["memory"].items():
        power = [f"{curve['exponents'][key]:.2f}" for key in ("fitted", "last")]
        computed = [f"{curve['computed_exponents'][key]:.2f}" for key in ("fitted", "last")]
        where = ", over steps, arrays on disk" if name == SPOOLED else ""
        what = f"peak{where}; computed: {', '.join(computed)}"
        rows.append(["memory", name, span(curve), what, *power, "", ""])
    head = ["", "against", "from, to", "of", "fitted", "last", "over the floor", "required"]
    return table(head, rows)


def span(curve: Report) -> str:
    """The first and the last value."""
    return f"{curve['values'][0]}, {curve['values'][-1]}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


def picture_of(report: Report) -> Picture:
    """Ratios with their bounds above, curves of time and memory below."""
    labelled = list(labelled_rows(report))
    described = "; ".join(f"{label}: {row['ratio']:.3g}" for label, row in labelled)
    height = 0.22 * len(labelled)

    def draw(figure: Figure) -> None:
        above, below = figure.subfigures(2, 1, height_ratios=(height + 0.6, 4.2))
        draw_ratios(above.subplots(), labelled)
        axes = below.subplots(2, 6, squeeze=False)
        for column, (name, curve) in enumerate(report["time"].items()):
            times = [s * 1e3 for s in curve["seconds"]]
            floor = [s * 1e3 for s in curve.get("floor", ())][: len(times)]
            draw_curve(axes[0][column], f"ms ~ {name}", curve, [times, *([floor] if floor else [])])
        for column, (name, curve) in enumerate(report["memory"].items()):
            peak = [size / 2**20 for size in curve["peak"]]
            computed = [size / 2**20 for size in curve["computed"]]
            draw_curve(axes[1][column], f"MiB ~ {name}", curve, [peak, computed])
        for ax in [*axes[0][len(report["time"]) :], *axes[1][len(report["memory"]) :]]:
            ax.set_axis_off()

    caption = (
        "Ratios of times: the dot is the median, the line runs from the least to the most, and a "
        "caret is the required bound (> at least, < at most). Below: growth of time and of peak "
        "memory with fitted exponents. Dashed is the floor of a time, and the memory computed "
        "beforehand."
    )
    return picture("Speed", caption, f"{caption} {described}.", (9.5, height + 5.2), draw)


def labelled_rows(report: Report) -> Iterator[tuple[str, Report]]:
    """Every ratio of every model with its label in the plot."""
    for measured in models_of(report):
        where = measured["dtype"] + ("" if measured["device"] == "cpu" else ", GPU")
        for row in measured["rows"]:
            yield f"{row['name']} ({where})", row


def draw_ratios(ax: Axes, labelled: Sequence[tuple[str, Report]]) -> None:
    """One line a ratio, from the least to the most, with median and bounds."""
    for y, (_, row) in enumerate(labelled):
        colour = {None: BLUE, True: GREEN, False: VERMILLION}[row["met"]]
        ax.plot([row["least"], row["most"]], [y, y], color=colour, linewidth=1.5)
        symbol = "X" if row["met"] is False else "o"
        ax.plot(row["ratio"], y, symbol, color=colour, markersize=5)
        # markers 5 and 4 are carets that point to the side the bound allows
        for bound, marker in ((row["at_least"], 5), (row["at_most"], 4)):
            if bound is not None:
                ax.plot(bound, y, marker=marker, color=colour, markersize=7, fillstyle="none")
    ax.set_yticks(range(len(labelled)), [label for label, _ in labelled], fontsize=7.5)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xticks(ticks := [0.5, 1, 2, 4, 8, 16, 32], [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.axvline(1, linewidth=0.8, color="grey")
    ax.grid(axis="x")
    ax.set_title("ratio of times")


def draw_curve(ax: Axes, title: str, curve: Report, ys: Sequence[Sequence[float]]) -> None:
    """A curve and what was computed for it, on logarithmic axes."""
    x = curve["values"]
    for y, style, colour in zip(ys, ("o-", "s--"), (BLUE, VERMILLION), strict=False):
        ax.loglog(x, y, style, color=colour, markersize=3.5, linewidth=1)
    low, high = min(map(min, ys)), max(map(max, ys))
    ax.minorticks_off()
    ticks = [x[0], x[len(x) // 2], x[-1]]
    ax.set_xticks(ticks, [f"{n:g}" for n in ticks], fontsize=7.5)
    ax.set_yticks([low, high], [f"{n:.3g}" for n in (low, high)], fontsize=7.5)
    ax.set_title(f"{title}^{curve['exponents']['fitted']:.2f}", fontsize=8.5)
