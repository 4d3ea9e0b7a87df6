"""Sets, legends and comparisons as styled text for a terminal.

Token texts are hostile: they pass `escaped`, and are never parsed as markup.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text

from tempo.spec import VISIBILITIES
from tempo.text import escaped
from tempo.trace import Trace

if TYPE_CHECKING:
    from tempo.reporting.comparison import Comparison

# Lower ends of the probability colours. The number beside each colour says the same without it.
SHADES = ((0.5, "green"), (0.2, "yellow"), (0.0, "red"))
MOST_MEMBERS = 12  # of a set that `compare` shows; `generate` shows all
REASONS = {
    "max_steps": "stopped after max_steps",
    "eos": "stopped at end of sequence",
    "replay": "replay ended",
}


def must_agree(num_steps: int, wide: int | None, largest: float) -> str:
    """Whether the modes agree where they must, or why there is nothing to see."""
    but_rounding = f"they must agree but for rounding (largest TV {short(largest)})."
    if wide is None:
        return f"No set is wider than one, so {but_rounding} A lower threshold makes wide sets."
    said = f"Up to and including the first wide set, step {wide}, {but_rounding}"
    return (
        said
        if wide < num_steps - 1
        else f"{said} Nothing was computed after that set, where they may differ."
    )


def new_table(*columns: str) -> Table:
    return Table(*columns, box=HORIZONTALS, pad_edge=False, padding=(0, 1, 0, 0))


def table(
    rows: Sequence[Mapping[str, Mapping[str, Any]]], free: bool, wide: int | None, width: int
) -> Table:
    """One row a step, and a line under the last step at which the modes must agree."""
    table = new_table("step", *(() if free else ("set, replayed",)), *VISIBILITIES)
    # What a set has of the line, so that its breaks come between members: a third, or what
    # "KL .0029 TV .017" leaves.
    room = (width - 8) // 3 - 2 if free else max(16, width - 64)
    for k, row in enumerate(rows):
        sets = {}
        for mode, entry in row.items():
            pieces = members(entry["texts"], entry["probabilities"])
            more = (
                [Text(f" {len(pieces) - MOST_MEMBERS} more]")] if len(pieces) > MOST_MEMBERS else []
            )
            sets[mode] = Text("\n").join(wrap([pieces[:MOST_MEMBERS] + more], room))
        cells = [] if free else [sets["isolated"]]
        for mode in VISIBILITIES:
            if mode not in row:
                cells.append(Text("ended", "dim"))
                continue
            kl, tv, top = (row[mode][name] for name in ("kl", "tv", "top"))
            cell = sets[mode] if free else member(top["text"], top["probability"], "bold ")
            distance = "-" if kl is None else f"KL {short(kl)} TV {short(tv)}"
            cells.append(
                cell if mode == "isolated" else Text.assemble(cell, "\n", (distance, "dim"))
            )
        table.add_row(Text(str(k), "dim"), *cells, end_section=k == wide)
    return table


def short(value: float) -> str:
    """Two digits that count, one below 1e-4: .12, .0052, 3e-06, 1.0; a plain 0 for exactly none."""
    return (
        (f"{value:#.2g}".removeprefix("0") if value >= 1e-4 else f"{value:.0e}") if value else "0"
    )


def member(text: str, probability: float, weight: str) -> Text:
    color = next(color for least, color in SHADES if probability >= least)
    number = f" {short(probability)}", weight.replace("bold", "") + color
    return Text.assemble((escaped(text), weight + color), number)


def members(texts: Sequence[str], probabilities: Sequence[float]) -> list[Text]:
    """The pieces of a set, between which a line may break: `[ cat .12/`, ` mat .10]`.

    A set of one is dim.
    """
    weight = "dim " if len(texts) == 1 else "bold "
    pieces = [
        member(text, probability, weight)
        for text, probability in zip(texts, probabilities, strict=True)
    ]
    pieces = [piece.append("/", weight) for piece in pieces[:-1]] + [pieces[-1].append("]", weight)]
    return [Text.assemble(("[", weight), pieces[0]), *pieces[1:]]


def paths(trace: Trace) -> list[Text]:
    """The best path as text, and who came most probably before each member of a set.

    Sets after a single token are left out: there is no doubt about their parent.
    """
    lines = [Text.assemble(("best path ", "dim"), escaped(trace.best_text))]
    for k in range(1, len(trace.steps)):
        before, step = trace.steps[k - 1], trace.steps[k]
        if before.links is None or len(before.tokens) == 1:
            continue
        found = []
        for i, parent in enumerate(trace.parents(k)):
            share = short(float(before.links[parent, i]))
            pair = f"{escaped(before.texts[parent])} →{escaped(step.texts[i])}"
            found.append(Text.assemble(pair, (f" {share}", "dim")))
        lines.append(Text.assemble((f"  parents in step {k}: ", "dim"), Text("; ").join(found)))
    return [*lines, Text()]


def words(text: str) -> list[Text]:
    return [Text(word) for word in re.findall(r" *[^ ]+| +", text)]


def wrap(groups: Sequence[Sequence[Text]], width: int) -> list[Text]:
    """Lines of pieces that keep their leading spaces. A group that fits on a line stays whole."""
    lines = [Text()]
    for pieces in groups:
        whole = sum(piece.cell_len for piece in pieces)
        if lines[-1].cell_len + whole > width >= whole:
            lines.append(Text())
        for piece in pieces:
            if lines[-1] and lines[-1].cell_len + piece.cell_len > width:
                lines.append(Text())
            lines[-1].append_text(piece)
    return lines


def legend(in_colour: bool) -> Text:
    """How to read a set; what the colours mean is said only where there are some."""
    said = " a set, with probabilities" + (":" if in_colour else "")
    if not in_colour:
        return Text.assemble(*members((" a", " b"), (0.62, 0.21)), said)
    shades = [
        (f" {color} {f'{short(least)}+' if least else 'below'}", color) for least, color in SHADES
    ]
    return Text.assemble(*members((" a", " b"), (0.62, 0.21)), (said, "dim"), *shades)


def summary(trace: Trace) -> Text:
    widths = trace.widths
    shown = " ".join(map(str, widths)) if len(widths) <= 20 else f"{min(widths)} to {max(widths)}"
    parts = [
        f"{escaped(trace.provenance['model'])}, {trace.spec.visibility}",
        f"{len(widths)} steps of widths {shown}",
        f"{trace.num_slots} slots with the prompt's {len(trace.prompt_tokens)}",
        f"{trace.seconds:.2f} s",
        REASONS[trace.stop_reason],
    ]
    if trace.ended:
        parts.append(f"{len(trace.ended)} end-of-sequence tokens that did not lead were left out")
    return Text("; ".join(parts), "dim")


def comparison_table(comparison: Comparison) -> list[Table | Text]:
    """The claims that differ between two records, and how many do not."""
    # imported here, since only this command needs SciPy and should wait for it
    from tempo.reporting.comparison import UNCHANGED, comparison_rows

    changed = [row for row in comparison_rows(comparison) if row[-1] != UNCHANGED]
    table = new_table("claim", "what changed")
    table.columns[0].no_wrap = True
    for claim, verdict, effect, _, what in changed:
        table.add_row(Text(escaped(claim)), Text(escaped(f"{what}: {verdict}\n{effect}")))
    same = len(comparison.pairs) - len(changed)
    first, second = comparison.labels
    return [
        Text(escaped(f"first {first}; second {second}")),
        table,
        Text(f"{same} of {len(comparison.pairs)} claims: {UNCHANGED}", "dim"),
    ]
