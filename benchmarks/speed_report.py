"""The report of benchmarks.speed as a Markdown table and as a plot of ratios and growth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.growth import SPOOLED
from tempo.reporting.figures import Picture
from tempo.reporting.figures.drawing import BLUE, GREEN, VERMILLION, picture

Report = Mapping[str, Any]

INTRODUCTION = """\
Made by `make speed`. Every ratio is the median over rounds of works done in alternation in one process, with the least and the most
round; seconds depend on the machine, ratios less. "Demanded" is what was set before measuring.
"""
SWEEP = """\
The sweep is {runs} greedy runs of {steps} steps, attention and logits captured. All peers do the same runs, exactly so many steps; "same
runs" chose the same tokens as tempo. transformers and nnsight keep a cache of keys and values; a loop of `run_with_cache` runs the whole
text at each step. tempo forwards one set more than the others, to capture what the last set itself gives.
"""
GROWTH = """\
Exponents of time and of peak memory, one quantity varied at a time: fitted to all points in logarithms, and between the last two.
Below 1: a part that does not grow (reading the weights once a step, the memory of one pass).
"""


def markdown(report: Report) -> str:
    """Tables of ratios, of memory and of growth."""
    peers = ", ".join(
        f"{name} {release or 'not installed: measured without'}"
        for name, release in report["peers"].items()
    )
    parts = [
        "# Speed and memory\n", INTRODUCTION,
        SWEEP.format(**report),
        f"{report['threads']} threads; {versions_of(report)}, {peers}; measured in {report['took']} s.\n",
    ]  # fmt: skip
    for measured in models_of(report):
        parts += [
            f"## {measured['model']}, {measured['dtype']}, {measured['device']}\n",
            ratio_table(measured["rows"]),
        ]
    if "skipped" in report["gpu"]:
        parts.append(f"GPU: skipped, as {report['gpu']['skipped']}.\n")
    parts += [
        "## Memory\n",
        memory_line(report["peak"]),
        "## Growth\n",
        GROWTH,
        growth_table(report),
    ]
    return "\n".join(parts)


def models_of(report: Report) -> list[Report]:
    """Those measured on the processor, then the GPU's if there was one."""
    return [*report["models"], *([] if "skipped" in report["gpu"] else [report["gpu"]])]


def versions_of(report: Report) -> str:
    return ", ".join(
        f"{name} {release}" for name, release in report["models"][0]["versions"].items()
    )


def ratio_table(rows: Sequence[Report]) -> str:
    cells = [
        [
            row["name"], row["what"] + same(row), " / ".join(milliseconds(s) for s in row["seconds"]),
            f"**{row['ratio']:.3g}** ({row['least']:.3g} to {row['most']:.3g})", demand(row), verdict(row),
        ]
        for row in rows
    ]  # fmt: skip
    return table(["", "what over what", "ms", "ratio (least to most)", "demanded", "met"], cells)


def same(row: Report) -> str:
    if "same_runs" in row:
        return f"; same runs: {row['same_runs']}"
    return (
        f"; {'the same to the last bit' if row['same_bits'] else 'NOT the same bits'}"
        if "same_bits" in row
        else ""
    )


def demand(row: Report) -> str:
    bounds = [
        f"≥ {row['at_least']:g}" if row["at_least"] is not None else "",
        f"≤ {row['at_most']:g}" if row["at_most"] is not None else "",
    ]
    return ", ".join(filter(None, bounds))


def verdict(row: Report) -> str:
    return "" if row["met"] is None else "yes" if row["met"] else "**no**"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def memory_line(peak: Report) -> str:
    if "skipped" in peak:
        return f"Skipped: {peak['skipped']}.\n"
    return (
        f"{peak['runs']} runs x {peak['steps']} steps of {peak['width']} siblings after {peak['context']} tokens, attention and logits "
        f"captured: computed {peak['computed'] / 2**20:.0f} MiB, growth of the peak resident set {peak['peak'] / 2**20:.0f} MiB, ratio "
        f"**{peak['ratio']:.3g}** (demanded: {demand(peak)}; met: {verdict(peak)}).\n"
    )


def growth_table(report: Report) -> str:
    rows = []
    for name, curve in report["time"].items():
        power = curve["exponents"]
        limit = f"≤ {curve['at_most']:g}: {verdict(curve)}" if "at_most" in curve else ""
        rows.append(
            [
                "time",
                name,
                span(curve),
                curve["what"],
                f"{power['fitted']:.2f}",
                f"{power['last']:.2f}",
                limit,
            ]
        )
    for name, curve in report["memory"].items():
        power, computed = curve["exponents"], curve["computed_exponents"]
        what = f"peak{', over steps, arrays on disk' if name == SPOOLED else ''}; computed: {computed['fitted']:.2f}, {computed['last']:.2f}"
        rows.append(
            [
                "memory",
                name,
                span(curve),
                what,
                f"{power['fitted']:.2f}",
                f"{power['last']:.2f}",
                "",
            ]
        )
    return table(["", "against", "from, to", "of", "fitted", "last", "demanded"], rows)


def span(curve: Report) -> str:
    return f"{curve['values'][0]}, {curve['values'][-1]}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines) + "\n"


def picture_of(report: Report) -> Picture:
    """Ratios with their demands above, curves of time and memory below."""
    labelled = list(labelled_rows(report))
    described = "; ".join(f"{label}: {row['ratio']:.3g}" for label, row in labelled)
    height = 0.22 * len(labelled)

    def draw(figure: Figure) -> None:
        above, below = figure.subfigures(2, 1, height_ratios=(height + 0.6, 4.2))
        draw_ratios(above.subplots(), labelled)
        axes = below.subplots(2, 6, squeeze=False)
        for column, (name, curve) in enumerate(report["time"].items()):
            draw_curve(
                axes[0][column], f"ms ~ {name}", curve, [[s * 1e3 for s in curve["seconds"]]]
            )
        for column, (name, curve) in enumerate(report["memory"].items()):
            draw_curve(
                axes[1][column],
                f"MiB ~ {name}",
                curve,
                [[b / 2**20 for b in curve[key]] for key in ("peak", "computed")],
            )
        for ax in [*axes[0][len(report["time"]) :], *axes[1][len(report["memory"]) :]]:
            ax.set_axis_off()

    caption = (
        "Ratios of times (dot: median; line: least to most; caret: what is demanded, at least > or at most <), and growth of time and "
        "of peak memory with fitted exponents (dashed: the memory computed beforehand)."
    )
    return picture("Speed", caption, f"{caption} {described}.", (9.5, height + 5.2), draw)


def labelled_rows(report: Report) -> Iterator[tuple[str, Report]]:
    for measured in models_of(report):
        for row in measured["rows"]:
            yield (
                f"{row['name']} ({measured['dtype']}{'' if measured['device'] == 'cpu' else ', GPU'})",
                row,
            )


def draw_ratios(ax: Axes, labelled: Sequence[tuple[str, Report]]) -> None:
    for y, (_, row) in enumerate(labelled):
        colour = {None: BLUE, True: GREEN, False: VERMILLION}[row["met"]]
        ax.plot([row["least"], row["most"]], [y, y], color=colour, linewidth=1.5)
        ax.plot(
            row["ratio"], y, "o" if row["met"] is not False else "X", color=colour, markersize=5
        )
        for bound, marker in (
            (row["at_least"], 5),
            (row["at_most"], 4),
        ):  # carets: the side that is demanded
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
    x = curve["values"]
    for y, style, colour in zip(ys, ("o-", "s--"), (BLUE, VERMILLION), strict=False):
        ax.loglog(x, y, style, color=colour, markersize=3.5, linewidth=1)
    low, high = min(map(min, ys)), max(map(max, ys))
    ax.minorticks_off()
    ax.set_xticks(
        [x[0], x[len(x) // 2], x[-1]],
        [f"{n:g}" for n in (x[0], x[len(x) // 2], x[-1])],
        fontsize=7.5,
    )
    ax.set_yticks([low, high], [f"{n:.3g}" for n in (low, high)], fontsize=7.5)
    ax.set_title(f"{title}^{curve['exponents']['fitted']:.2f}", fontsize=8.5)
