"""Runs as HTML: a lattice of sets that reads without a script, and comes alive with one.

The same fragment is a notebook's view of a trace and the body of an offline page. So its styles
hold for nothing outside it, it has no ids, and several may stand in one document. Every text that
comes from a prompt, a token, a model or a spec passes `escaped`, and the script sets only text.
Nothing refers to anything outside, and the page's policy forbids that it could.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files as resources
from pathlib import Path
from typing import TYPE_CHECKING

from tempo import files
from tempo.errors import ResultsError, SpecError, TraceError
from tempo.inputs import checked, place, seen
from tempo.text import escaped, html_text
from tempo.trace import Trace
from tempo.viewing.data import (
    NUM_PATHS,
    Distance,
    Group,
    TextOf,
    best_members,
    data_of,
    differences,
    grouped,
    has_attention,
    names_of,
    shown,
    texts_of,
)

if TYPE_CHECKING:
    from tempo.models import LanguageModel

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'; "
    "base-uri 'none'; form-action 'none'"
)
# No MathJax in what notebooks show: it would read a token such as `$x$` as a formula.
CLASSES = "tempo-view tex2jax_ignore mathjax_ignore"
LONGEST_PROMPT = 300
LONGEST_SPEC = 400
LEAST_SHARE = 0.001  # of a path, below which a number says no more
LONG_LIST = 40  # tokens of a prompt that any window shows without a scroll bar
HUES = 3  # of the runs of a group; the letters tell all of them apart
LETTERS = "ABCDEFGH"  # of the runs of a group, for numbers side by side
HEAD = 4096  # bytes at the begin of a page that hold its title
TAIL = b"</html>\n"
TITLE = "<title>tempo view: "
PAGE_STYLE = (
    "html { color-scheme: light dark } body { margin: 0; background: light-dark(#fff, #111) } "
    "h1 { margin: 0; padding: 1rem 1rem 0; font: 600 1.4rem/1.2 system-ui, sans-serif; "
    "color: light-dark(#222, #ddd) }"
)
SINGLE = (
    "the probability of each token. A column is a set, with its number and its position. "
    "A bold frame marks the best path."
)
SEVERAL = (
    "the probability of each token in each run. A column is a set, with its number and its "
    "position. A bold frame marks a best path; the letter of its run is filled."
)
PRECISION = (
    "Attention weights are kept in this page as one byte each: the square root in 255 levels, "
    "which is off by less than 0.004. Only an exact zero shows as 0 %."
)
STEERING = (
    "Point at a token, tap it, or walk with the arrow keys; "
    "Enter or a tap holds it, Escape lets go."
)


@dataclass(frozen=True, repr=False)
class View:
    """Runs to walk through. A notebook shows it; `save` writes it as a page of its own.

    Attributes:
        title: What a browser's tab says.
        html: The view as an element for HTML, with its styles and its script.
    """

    title: str
    html: str

    def __repr__(self) -> str:
        return f"<View {escaped(self.title)}, {len(self.html) / 1e3:.0f} kB>"

    def _repr_html_(self) -> str:
        return self.html

    def page(self) -> str:
        """The view as a whole HTML page, which asks for nothing and runs no other script."""
        script = self.html.rpartition("<script>")[2].partition("</script>")[0]
        return (
            f"{_opening(script)}"
            '<meta charset="utf-8"/>\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
            '<meta name="color-scheme" content="light dark"/>\n'
            f"{TITLE}{html_text(self.title)}</title>\n"
            f"<style>{PAGE_STYLE}</style>\n</head>\n"
            f"<body>\n<main>\n<h1>A run, set by set</h1>\n{self.html}</main>\n</body>\n</html>\n"
        )

    @checked(path=place)
    def save(self, path: str | Path) -> Path:
        """Write the page to a file; its path.

        Raises:
            ResultsError: if it cannot be written, or if a file is there that is no such page.
        """
        path = Path(path)
        check_target(path)
        try:
            files.write(path, self.page())
        except OSError as error:
            raise ResultsError(
                f"cannot write {path}: {files.reason(error)}; choose another file"
            ) from None
        return path


def _opening(script: str) -> str:
    """How a page begins. The policy stands first: it holds for what comes after it."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n'
        '<meta http-equiv="Content-Security-Policy" '
        f'content="{POLICY.format(script=digest)}"/>\n'
    )


def is_page(content: bytes) -> bool:
    """Whether this is a whole page of this version's: it runs no script but tempo's own.

    >>> is_page(b"<script>alert(1)</script>")
    False
    """
    return content.startswith(_opening(_script()).encode()) and content.endswith(TAIL)


def _script() -> str:
    """The script of every page, as it stands between its tags."""
    return f"\n{resources('tempo.viewing').joinpath('view.js').read_text(encoding='utf-8')}"


def check_target(path: Path) -> None:
    """Raises ResultsError if a page cannot be written there; a caller asks before a run."""
    files.check_file(path, "another path")
    if path.exists():
        with path.open("rb") as file:
            is_page = TITLE.encode() in file.read(HEAD)
        if not is_page:
            raise ResultsError(f"{path} is there, and is no page of a run; choose another file")


def view(
    trace: Trace,
    *others: Trace,
    names: Sequence[str] | None = None,
    lm: LanguageModel | None = None,
) -> View:
    """One run to walk through, or several side by side with what differs.

    Runs on the same sets, such as two modes on a replay, share one lattice.

    Args:
        trace: The run.
        others: More runs, which are compared with the first one.
        names: What to call the runs; by default their settings.
        lm: The model, for the texts of tokens that are in no set, which else show as ids, and for
            what each layer would predict, if residuals were captured.

    Raises:
        SpecError: if something else than traces is given, or not a name for each.

    Example:
        >>> import tempo
        >>> lm = tempo.load_model("tiny")
        >>> trace = tempo.generate(lm, "The cat", threshold=0.05, max_steps=3)
        >>> tempo.view(trace).title
        'The cat'
    """
    traces = [trace, *others]
    for each in traces:
        if not isinstance(each, Trace):
            raise SpecError(f"view takes traces, not {seen(each)}; tempo.load_trace reads a folder")
        if not each.steps:
            raise TraceError(
                "a trace without any set has nothing to view; run the generation again"
            )
    if names is not None and len(names) != len(traces):
        raise SpecError(f"{len(names)} names for {len(traces)} runs; give one for each, or none")
    called = [shown(str(name)) for name in names] if names else names_of(traces)
    text_of = texts_of(traces, lm.token_text if lm is not None else None)
    groups = grouped(traces, called)
    style = resources("tempo.viewing").joinpath("view.css").read_text(encoding="utf-8")
    heads = len({tuple(each.prompt_tokens) for each in traces}) == 1
    parts = [
        f'<div class="{CLASSES}">',
        f"<style>\n{style}</style>",
        _header(traces, called, text_of, with_prompt=heads),
        *(_group(group, text_of, lm, with_prompt=not heads) for group in groups),
        _compared(traces, called, text_of) if len(traces) > 1 else "",
        f'<p class="tempo-note">{PRECISION}</p>' if any(map(has_attention, traces)) else "",
        f"<script>{_script()}</script>",
        "</div>",
    ]
    return View(_title(traces[0], text_of), "\n".join(filter(None, parts)) + "\n")


def _title(trace: Trace, text_of: TextOf) -> str:
    return shown(_prompt_text(trace, text_of))


def _prompt_text(trace: Trace, text_of: TextOf) -> str:
    prompt = trace.spec.prompt
    if isinstance(prompt, str):
        return prompt
    return "".join(trace.prompt_texts) or " ".join(map(text_of, trace.prompt_tokens))


def _header(
    traces: Sequence[Trace], names: Sequence[str], text_of: TextOf, with_prompt: bool
) -> str:
    """What was run, and how to walk through it."""
    of = traces[0].provenance
    made = [of.get("model", "unknown model"), of.get("dtype"), of.get("device")]
    made += [f"{len(traces)} runs"] if len(traces) > 1 else []
    settings = "".join(
        f"<li><b>{html_text(name)}</b> <code>{html_text(_settings(trace))}</code></li>"
        for name, trace in zip(names, traces, strict=True)
    )
    prompt = f"<p>{_prompt(traces[0], text_of)}</p>" if with_prompt else ""
    return (
        '<header class="tempo-head">'
        f'<p class="tempo-kicker">{html_text(" · ".join(str(m) for m in made if m))}</p>'
        f"{prompt}"
        f'<p class="tempo-steering" hidden>{STEERING}</p>'
        f"<details><summary>Settings</summary><ul>{settings}</ul></details></header>"
    )


def _prompt(trace: Trace, text_of: TextOf) -> str:
    text = _cut(_prompt_text(trace, text_of))
    return f"<b>Prompt</b> <q><bdi>{html_text(text)}</bdi></q>"


def _settings(trace: Trace) -> str:
    """The settings that are no defaults, without the long ones that the page shows anyway."""
    spec = trace.spec.model_copy(update={"prompt": "", "replay": None})
    said = repr(spec).replace("prompt='', ", "").replace("prompt=''", "")
    said += " on given sets" if trace.spec.replay else ""
    return said if len(said) <= LONGEST_SPEC else f"{said[:LONGEST_SPEC]}…"


def _group(group: Group, text_of: TextOf, lm: LanguageModel | None, with_prompt: bool) -> str:
    """The lattice of one or several runs on the same sets, and what its script needs."""
    trace, letters = group.traces[0], _letters(group)
    named = " and ".join(group.names)
    head = f"{named}: {len(trace.steps)} sets of {_counted(trace.widths)} tokens"
    keys = "".join(
        f'<li class="tempo-run-{i % HUES}"><i>{letter}</i> {html_text(name)}</li>'
        for i, (letter, name) in enumerate(zip(letters, group.names, strict=True))
    )
    legend = f'<ul class="tempo-keys">{keys}</ul>' if len(group.traces) > 1 else ""
    data = json.dumps(data_of(group, text_of, lm), separators=(",", ":"))
    data = data.replace("<", "\\u003c")
    prompt = f"<p>{_prompt(trace, text_of)}</p>" if with_prompt else ""
    reading = SEVERAL if len(group.traces) > 1 else SINGLE
    return (
        f'<section class="tempo-group" aria-label="{html_text(named)}">'
        f"<h2>{html_text(head)}</h2>{prompt}{legend}"
        f'<div class="tempo-reading"><p class="tempo-shown">Numbers: {reading}</p></div>'
        f'<div class="tempo-columns"><div class="tempo-sets">{_lattice(group, text_of)}</div>'
        f'<div class="tempo-panel" hidden></div>{_paths(group)}</div>'
        '<p class="tempo-said" role="status" aria-live="polite"></p>'
        f'<script type="application/json">{data}</script></section>'
    )


def _letters(group: Group) -> list[str]:
    return (
        [""]
        if len(group.traces) == 1
        else [LETTERS[i % len(LETTERS)] for i in range(len(group.traces))]
    )


def _counted(widths: Sequence[int]) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low} to {high}"


def _lattice(group: Group, text_of: TextOf) -> str:
    """Prompt and sets as a list of lists; each token is a chip with a number for each run."""
    trace, letters = group.traces[0], _letters(group)
    best = [best_members(each) for each in group.traces]
    empty = "".join(
        f'<span class="tempo-n tempo-run-{i % HUES}"></span>' for i in range(len(letters))
    )
    stop = ' tabindex="0"' if len(trace.prompt_tokens) > LONG_LIST else ""  # it may scroll
    prompt = "".join(
        f'<li><ol><li><span class="tempo-chip" data-slot="{slot}">'
        f"{_text(text_of(token))}{empty}</span></li></ol></li>"
        for slot, token in enumerate(trace.prompt_tokens)
    )
    sets = []
    for k, step in enumerate(trace.steps):
        chips = []
        for i, (token, slot) in enumerate(zip(step.tokens, step.slots, strict=True)):
            on_path = [members is not None and members[k] == i for members in best]
            numbers = "".join(
                _number(letter, run, each.steps[k].probabilities[i], on_path[run])
                for run, (letter, each) in enumerate(zip(letters, group.traces, strict=True))
            )
            marked = " tempo-best" if any(on_path) else ""
            chips.append(
                f'<li><span class="tempo-chip tempo-member{marked}" data-slot="{slot}" '
                f'data-k="{k}" data-i="{i}">{_text(text_of(token))}{numbers}</span></li>'
            )
        sets.append(
            f'<li class="tempo-set"><p><b>{k}</b> <small>at {step.position}</small></p>'
            f"<ol>{''.join(chips)}</ol></li>"
        )
    return (
        f'<ol class="tempo-prompt" aria-label="Prompt"{stop}>{prompt}</ol>'
        f'<ol class="tempo-lattice" aria-label="Sets">{"".join(sets)}</ol>'
    )


def _text(text: str) -> str:
    return f"<bdi>{html_text(text)}</bdi>"


def _number(letter: str, run: int, probability: float, on_path: bool) -> str:
    filled = ' class="tempo-filled"' if on_path else ""
    key = f"<i{filled}>{letter}</i>" if letter else ""
    value = min(1.0, max(0.0, probability))
    return (
        f'<span class="tempo-n tempo-run-{run % HUES}" style="--v:{value:.3g}">{key}'
        f"<b>{digits(probability)}</b></span>"
    )


def digits(value: float) -> str:
    """Two digits that count, without the zero before the point.

    >>> digits(0.2634), digits(1.0), digits(0.00001)
    ('.26', '1', '1e-05')
    """
    return f"{value:.2g}".removeprefix("0") if 0 < value < 1 else f"{value:.2g}"


def share(value: float) -> str:
    """A share in the width of a column; of a small one only that it is small.

    >>> share(0.26), share(0.00002)
    ('.26', '&lt;.001')
    """
    return digits(value) if value >= LEAST_SHARE else f"&lt;{digits(LEAST_SHARE)}"


def _paths(group: Group) -> str:
    """The most probable whole paths of each run."""
    parts = []
    for run, (name, trace) in enumerate(zip(group.names, group.traces, strict=True)):
        try:
            found = trace.paths(NUM_PATHS)
        except SpecError as error:
            parts.append(f"<p><b>{html_text(name)}</b> {html_text(error)}.</p>")
            continue
        lines = "".join(
            f'<li><span class="tempo-path" data-run="{run}" '
            f'data-members="{",".join(map(str, path.members))}"><b>{share(path.share)}</b> '
            f"<bdi>{html_text(_cut(path.text.strip()))}</bdi></span></li>"
            for path in found
        )
        title = f"<h3>{html_text(name)}</h3>" if len(group.traces) > 1 else ""
        parts.append(f"<div>{title}<ol>{lines}</ol></div>")
    return (
        '<section class="tempo-paths"><h2>Most probable paths</h2>'
        "<p>One member of each set. The number is the share among all paths through the sets.</p>"
        f'<div class="tempo-beside">{"".join(parts)}</div></section>'
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_PROMPT else f"{text[:LONGEST_PROMPT]}…"


def _compared(traces: Sequence[Trace], names: Sequence[str], text_of: TextOf) -> str:
    """What differs, step by step: the most probable next token, KL and total variation."""
    columns = [differences(traces[0], trace) for trace in traces]
    head = "".join(f'<th scope="col">{html_text(name)}</th>' for name in names)
    rows = []
    for k in range(max(len(trace.steps) for trace in traces)):
        cells = []
        for trace, distances in zip(traces, columns, strict=True):
            base = None if trace is traces[0] else traces[0]
            cells.append(_cell(trace, k, base, distances, text_of))
        rows.append(f'<tr><th scope="row">{k}</th>{"".join(cells)}</tr>')
    return (
        '<section class="tempo-differs"><h2>What differs, set by set</h2>'
        "<p>Each cell: the most probable next token before the set was appended, its probability, "
        f"and how far the distribution is from that of {html_text(names[0])}: KL in nats, and "
        "total variation (TV). ≠ marks another top token. A dash: the texts differ by then, so "
        "distributions do not compare."
        '</p><div class="tempo-scroll" tabindex="0" role="region" aria-label="What differs">'
        f'<table><thead><tr><th scope="col">set</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _cell(
    trace: Trace,
    k: int,
    base: Trace | None,
    distances: Sequence[Distance | None],
    text_of: TextOf,
) -> str:
    if k >= len(trace.steps):
        return "<td>ended</td>"
    distribution = trace.steps[k].distribution
    top = int(distribution.argmax())
    said = f"{_text(text_of(top))} <b>{digits(float(distribution[top]))}</b>"
    if base is None:
        return f"<td>{said}</td>"
    found = distances[k]
    if found is None:
        return f"<td>{said} <small>–</small></td>"
    differs = "≠ " if top != int(base.steps[k].distribution.argmax()) else ""
    far = f"KL {digits(found.kl)} TV {digits(found.tv)}"
    return f"<td>{differs}{said} <small>{far}</small></td>"
