"""The command line: `tempo generate`, `compare`, `view`, `models`, `new`, `report` and so on.

`tempo --help` must be quick. So torch, NumPy and Rich are imported inside the commands.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

import tempo
from tempo.errors import SpecError, TempoError
from tempo.spec import (
    VISIBILITIES,
    Positions,
    PruneBy,
    Readout,
    RunSpec,
    Visibility,
    Weighting,
    load_yaml,
)
from tempo.text import escaped

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# Characters of a prompt that are shown. Of a longer one its end is, which the sets continue.
LONGEST_PROMPT = 600
NUM_PATHS = 5  # of the most probable paths in the JSON record
REPLAYED = (
    "All modes replay the same sets, chosen by isolated mode or given. Cells: the most probable "
    "next token, and KL (nats) and TV of the mode's distribution against isolated's."
)
FREE = (
    "Each mode chooses its own sets. Cells: its set, and KL (nats) and TV of its distribution "
    "against isolated's until the sets first differ; after that a dash, as distributions after "
    "different contexts are not comparable."
)
# Exit codes, as `tempo --help` says them.
USAGE, INTERRUPTED = 2, 130
# The base of all usage errors; not every typer exports it by name.
USAGE_ERROR: Any = typer.BadParameter.__base__


class _Commands(TyperGroup):
    """The commands; an expected failure is one message on stderr and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        try:
            sys.exit(super().main(*args, **kwargs | {"standalone_mode": False}) or 0)
        except USAGE_ERROR as error:
            hint = f"\nTry '{error.ctx.command_path} --help'" if error.ctx else ""
            _fail(error.format_message().replace("Value error, ", "") + hint, error.exit_code)
        except SpecError as error:  # a value that cannot be is wrong usage
            _fail(str(error), USAGE)
        except TempoError as error:
            _fail(str(error), 1)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help, which unlike Rich's panels keeps option names and choices whole at 80 columns.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULT = {name: field.default for name, field in RunSpec.model_fields.items()}
Prompt = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="Text to continue; may come from --config.")
]
Threshold = Annotated[
    float,
    typer.Option(help="Append every token with at least this probability; 0: all that may join."),
]
Schedule = Annotated[
    str | None,
    typer.Option(metavar="P,P,...", help="Thresholds by step instead; the last one goes on."),
]
TopK = Annotated[int | None, typer.Option(help="Only the k most probable tokens may join.")]
TopP = Annotated[
    float | None, typer.Option(help="Only the top tokens that together reach this may join.")
]
MinP = Annotated[
    float | None, typer.Option(help="Only tokens with this share of the top probability may join.")
]
Sample = Annotated[
    int | None, typer.Option(help="Draw so many of the tokens that may join, each once.")
]
Seed = Annotated[int, typer.Option(help="Of the draws.")]
Prune = Annotated[
    float | None, typer.Option(help="Drop earlier members whose posterior is below this.")
]
HowPruned = Annotated[
    PruneBy, typer.Option(help="Prune by the posterior, or by the attention a member gets.")
]
MaxSteps = Annotated[int, typer.Option(help="Generate at most this many sets.")]
WhichSiblings = Annotated[
    Visibility, typer.Option(help="A sibling attends to no siblings, to all, to earlier ones.")
]
WhichPositions = Annotated[
    Positions, typer.Option(help="One rotary position for a whole set, or one for each token.")
]
HowRead = Annotated[Readout, typer.Option(help="How the members' logits become one distribution.")]
HowWeighted = Annotated[
    Weighting, typer.Option(help="Weight of the members of a wide set as attention keys.")
]
MaxWidth = Annotated[
    int | None, typer.Option(help="Keep only this many of the most probable members.")
]
StopAtEos = Annotated[
    bool, typer.Option(help="End after a set that an end-of-sequence token leads.")
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        help="A name from 'tempo models', a folder, a .gguf file, or a hub id (ID@COMMIT pins it).",
    ),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float64.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:<n>.")]
Config = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A RunSpec as YAML; explicit options override it."),
]
Save = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Keep the trace, with what the config captures."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Version = Annotated[bool, typer.Option("--version", help="Print the version.")]


@app.callback(invoke_without_command=True)
def _tempo(context: typer.Context, version: Version = False) -> None:
    """Decode with every token that reaches a threshold, all at one rotary position.

    Exit codes: 0 done; 1 the run failed, and the message says what to do; 2 wrong usage; 130
    interrupted.
    """
    if version:
        _write(f"tempo {tempo.__version__}\n")
    elif context.invoked_subcommand is None:
        _write(context.get_help() + "\n")


@app.command()
def generate(
    context: typer.Context,
    prompt: Prompt = None,
    threshold: Threshold = DEFAULT["threshold"],
    schedule: Schedule = DEFAULT["schedule"],
    top_k: TopK = DEFAULT["top_k"],
    top_p: TopP = DEFAULT["top_p"],
    min_p: MinP = DEFAULT["min_p"],
    sample: Sample = DEFAULT["sample"],
    seed: Seed = DEFAULT["seed"],
    max_steps: MaxSteps = DEFAULT["max_steps"],
    visibility: WhichSiblings = DEFAULT["visibility"],
    positions: WhichPositions = DEFAULT["positions"],
    readout: HowRead = DEFAULT["readout"],
    weighting: HowWeighted = DEFAULT["weighting"],
    prune: Prune = DEFAULT["prune"],
    prune_by: HowPruned = DEFAULT["prune_by"],
    max_width: MaxWidth = DEFAULT["max_width"],
    stop_at_eos: StopAtEos = DEFAULT["stop_at_eos"],
    model: ModelName = "smollm2-135m",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    config: Config = None,
    save: Save = None,
    as_json: Json = False,
) -> None:
    """Print the sets that TEMPO generates, and the best path through them.

    Each token stands with its probability. Under the sets is the best path, and for each member of
    a set after a wide one its most probable parent.
    """
    from rich.text import Text

    from tempo.reporting import terminal

    spec = _spec(context, config)
    _check_places([save] if save else [])
    with tempo.load_model(model, dtype, device) as lm:
        trace = _run(lm, [spec])[0]
        shown = escaped(spec.prompt if isinstance(spec.prompt, str) else lm.decode(spec.prompt))
    if save:
        trace.save(save)
    if as_json:
        _write(json.dumps(_record(trace)) + "\n")
        return
    shown = shown if len(shown) <= LONGEST_PROMPT else "…" + shown[-LONGEST_PROMPT:]
    console = _console()
    sets = [terminal.members(step.texts, step.probabilities) for step in trace.steps]
    lines = terminal.wrap([terminal.words(shown), *sets], console.width)
    found = terminal.paths(trace) if trace.spec.readout == "mixture" else []
    legend = terminal.legend(console.color_system is not None)
    _show(console, *lines, Text(), *found, legend, terminal.summary(trace))


@app.command()
def compare(
    context: typer.Context,
    prompt: Prompt = None,
    threshold: Threshold = DEFAULT["threshold"],
    schedule: Schedule = DEFAULT["schedule"],
    top_k: TopK = DEFAULT["top_k"],
    top_p: TopP = DEFAULT["top_p"],
    min_p: MinP = DEFAULT["min_p"],
    sample: Sample = DEFAULT["sample"],
    seed: Seed = DEFAULT["seed"],
    max_steps: MaxSteps = DEFAULT["max_steps"],
    positions: WhichPositions = DEFAULT["positions"],
    readout: HowRead = DEFAULT["readout"],
    weighting: HowWeighted = DEFAULT["weighting"],
    prune: Prune = DEFAULT["prune"],
    prune_by: HowPruned = DEFAULT["prune_by"],
    max_width: MaxWidth = DEFAULT["max_width"],
    stop_at_eos: StopAtEos = DEFAULT["stop_at_eos"],
    model: ModelName = "smollm2-135m",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    config: Config = None,
    save: Save = None,
    free: Annotated[bool, typer.Option("--free", help="Each mode chooses its own sets.")] = False,
    as_json: Json = False,
) -> None:
    """Put the three visibilities side by side, on the same sets.

    The sets are those that the isolated mode chooses, or those of a replay in --config. KL is
    KL(mode || isolated) in nats, TV the total variation, both of the distributions of the next
    token. --save makes a folder for each mode.
    """
    from rich.text import Text

    from tempo.reporting import terminal

    spec = _spec(context, config)
    if free and spec.replay:
        raise typer.BadParameter(
            f"{config} replays sets, so no mode can choose its own", param_hint="--free"
        )
    _check_places([save / mode for mode in VISIBILITIES] if save else [])
    with tempo.load_model(model, dtype, device) as lm:
        if not free and not spec.replay:
            spec = spec.but(replay=_run(lm, [spec.but(visibility="isolated", capture=())])[0])
        # All three in one batch: runs of other batch shapes differ by rounding.
        runs = _run(lm, [spec.but(visibility=mode) for mode in VISIBILITIES])
        traces = dict(zip(VISIBILITIES, runs, strict=True))
        rows = list(_comparison(lm, traces))
    for mode, trace in traces.items():
        if save:
            trace.save(save / mode)
    widest = [max(len(entry["tokens"]) for entry in row.values()) for row in rows]
    wide = next((k for k, width in enumerate(widest) if width > 1), None)
    # Until the first wide set is in the cache, contexts are equal in free runs too.
    early = rows if wide is None else rows[: wide + 1]
    largest = max(entry["tv"] for row in early for entry in row.values() if entry["tv"] is not None)
    if as_json:
        record = {
            "model": lm.name,
            "replayed": not free,
            "first_wide_step": wide,
            "max_tv_until_then": largest,
        }
        record |= {"steps": rows, "runs": {mode: _record(t) for mode, t in traces.items()}}
        _write(json.dumps(record) + "\n")
        return
    agreement = terminal.must_agree(len(rows), wide, largest)
    what = f"{lm.name}. {FREE if free else REPLAYED} {agreement}"
    console = _console()
    _show(
        console,
        Text(escaped(what)),
        terminal.table(rows, free, wide, console.width),
        terminal.legend(console.color_system is not None),
    )


@app.command(name="view")
def view_run(
    context: typer.Context,
    run: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN...", help="Folders that --save wrote, or a text to continue."),
    ] = None,
    threshold: Threshold = DEFAULT["threshold"],
    schedule: Schedule = DEFAULT["schedule"],
    top_k: TopK = DEFAULT["top_k"],
    top_p: TopP = DEFAULT["top_p"],
    min_p: MinP = DEFAULT["min_p"],
    sample: Sample = DEFAULT["sample"],
    seed: Seed = DEFAULT["seed"],
    max_steps: MaxSteps = DEFAULT["max_steps"],
    visibility: Annotated[
        Visibility | None,
        typer.Option(help="Only this mode, on sets of its own; else isolated and visible."),
    ] = None,
    positions: WhichPositions = DEFAULT["positions"],
    readout: HowRead = DEFAULT["readout"],
    weighting: HowWeighted = DEFAULT["weighting"],
    prune: Prune = DEFAULT["prune"],
    prune_by: HowPruned = DEFAULT["prune_by"],
    max_width: MaxWidth = DEFAULT["max_width"],
    stop_at_eos: StopAtEos = DEFAULT["stop_at_eos"],
    model: ModelName = "smollm2-135m",
    dtype: Dtype = "float32",
    device: Device = "cpu",
    config: Config = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page.")] = Path("run.html"),
) -> None:
    """Write one offline page to walk through a run, or through several side by side.

    RUN is a folder that --save wrote, or several of them, or a text to continue. Of a text, the
    isolated and the visible mode are shown on the same sets, with attention and logits. Token
    texts that a saved trace lacks come from its model, if that is here or named by --model.
    """
    from tempo.viewing import runs

    runs.check_target(out)
    folders = runs.folders_of(run or [])
    given = context.get_parameter_source("model")
    if folders:
        by_user = given is not None and given.name == "COMMANDLINE"
        made = runs.view_folders(folders, (model, dtype, device) if by_user else None)
    else:
        context.params["prompt"] = run[0] if run else None
        spec = _spec(context, config, ["prompt"] if run else [])
        with tempo.load_model(model, dtype, device) as lm:
            made = runs.view_prompt(lm, spec, visibility, _run)
    _write(f"written: {escaped(str(made.save(out)))}\n")


@app.command()
def models(
    architectures: Annotated[
        bool,
        typer.Option(
            "--architectures",
            help="List which transformers architectures run, and why others do not.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the models that need no account, or the architectures that run."""
    if architectures:
        _list_architectures(as_json)
        return
    from tempo.reporting import terminal
    from tempo.wheels import KNOWN_MODELS

    listed = [
        {
            "name": model.name,
            "description": model.description,
            "license": model.license,
            "download_bytes": model.size_bytes,
            "present": model.is_present(),
            "folder": str(model.folder()) if model.wheels else None,
        }
        for model in KNOWN_MODELS.values()
    ]
    if as_json:
        _write(json.dumps({"models": listed}) + "\n")
        return
    table = terminal.new_table("name", "download", "here", "licence", "description")
    for model in listed:
        size = f"{model['download_bytes'] / 1e6:.0f} MB" if model["folder"] else "none"
        table.add_row(
            model["name"],
            size,
            "yes" if model["present"] else "no",
            model["license"],
            model["description"],
        )
    root = next(model.folder().parent for model in KNOWN_MODELS.values() if model.wheels)
    _show(_console(), table)
    _write(
        f"Folders: {escaped(str(root))}/<name> (the environment variable TEMPO_CACHE moves them)\n"
        "A folder with safetensors, a .gguf file or a hub id is a model too.\n"
    )


def _list_architectures(as_json: bool) -> None:
    from importlib.metadata import version

    from packaging.version import Version

    from tempo.reporting import terminal
    from tempo.support import read_registry

    registry, installed = read_registry(), version("transformers")
    release = installed if installed in registry else max(registry, key=Version)
    entries = registry[release]
    if as_json:
        _write(
            json.dumps({"transformers": release, "installed": installed, "architectures": entries})
            + "\n"
        )
        return
    table = terminal.new_table("model type", "status", "deviation", "experiments", "reason")
    # What runs stands last, next to the reader's prompt.
    statuses = ("not measured", "refused", "supported")
    by_status = [
        (name, entry)
        for status in statuses
        for name, entry in sorted(entries.items())
        if entry["status"] == status
    ]
    for name, entry in by_status:
        deviation = "" if entry["deviation"] is None else f"{entry['deviation']:.1e}"
        judged = _judged(entry.get("inapplicable"))
        table.add_row(name, entry["status"], deviation, judged, escaped(entry["reason"]))
    found = [entry["status"] for entry in entries.values()]
    counts = ", ".join(f"{found.count(status)} {status}" for status in reversed(statuses))
    _show(_console(), table)
    if release != installed:
        release += (
            f" (not the installed {installed}, which was not measured: "
            "what cannot run is still refused at load)"
        )
    _write(
        f"transformers {release}: {counts}. Deviation: largest difference of a logit from the "
        "oracle's, of the logit range. Experiments: which of tempo's can judge it.\n"
    )


def _judged(inapplicable: Sequence[str] | None) -> str:
    """Which experiments can judge an architecture; nothing if they were not tried on it."""
    if inapplicable is None:
        return ""
    return f"all but {', '.join(inapplicable)}" if inapplicable else "all"


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call the experiment.")],
    folder: Annotated[
        Path, typer.Option(metavar="DIR", help="Where to write it; made if need be.")
    ] = Path(),
) -> None:
    """Write an experiment of your own, a module and its config, which runs as it is."""
    from tempo.harness.starter import new as write_experiment

    written = write_experiment(name, folder)
    for path in written:
        _write(f"written: {escaped(str(path))}\n")
    module = next(path for path in written if path.suffix == ".py")
    _write(f"run it: pytest {escaped(shlex.quote(str(module)))} --model tiny\n")


@app.command()
def report(
    results: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Results folder of the experiments (default: results); again for more models.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the report.")] = Path(
        "reports"
    ),
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Another results folder to compare with: before a change."
        ),
    ] = None,
    figures: Annotated[
        Literal["svg", "png"],
        typer.Option("--format", help="Of the figures, each of which is written once."),
    ] = "svg",
) -> None:
    """Make the report again from the records alone; no model is run.

    Several models stand side by side. Writes findings.html, findings.md, findings.svg (of several
    models findings-<model>.svg), every figure under figures/, and with --against comparison.md.
    Files of yours in that folder stay: only what an earlier report wrote is replaced.
    """
    from tempo.reporting import terminal
    from tempo.reporting.comparison import compare_findings
    from tempo.reporting.publish import publish
    from tempo.reporting.report import names_of, read_report, read_reports
    from tempo.reporting.sidebyside import said

    folders = results or [Path("results")]
    if against and len(folders) > 1:
        raise typer.BadParameter(
            "compares two folders: give --results once", param_hint="--against"
        )
    found, comparison = read_reports(folders), None
    for line in (line for each in found for line in each.damaged):
        print(f"Warning: {escaped(line)}", file=sys.stderr)
    if against:
        other, this = read_report(against), found[0]
        names = f"{against} ({other.model})", f"{folders[0]} ({this.model})"
        answers = other.conclusions.in_short, this.conclusions.in_short
        comparison = compare_findings(other.findings, this.findings, names, answers)
        _show(_console(), *terminal.comparison_table(comparison))
    if len(found) > 1:
        lines = [f"models: {', '.join(names_of(found))}", *said(found)]
        _write("".join(f"{escaped(line)}\n" for line in lines))
    written = publish(found, out, comparison, format=figures)
    beside = [path for path in written if path.parent == out]
    others = f"{len(written) - len(beside)} files under {escaped(str(out))}/figures/"
    _write(f"written: {', '.join(escaped(str(path)) for path in beside)}, and {others}\n")


def _check_places(folders: Sequence[Path]) -> None:
    """A place where no trace can be saved is said before a model runs."""
    from tempo import files
    from tempo.trace import check_place

    for folder in map(check_place, folders):
        files.check_folder(folder if folder.exists() else folder.parent, "--save")


@app.command()
def work(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of --workers.")],
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="End after so long without work.")
    ] = 600.0,
) -> None:
    """Measure for sessions that were started with --workers FOLDER, on any host that sees it.

    Start as many as you like, such as an array of Slurm. They must have the same code, versions
    and OMP_NUM_THREADS as the sessions. Whoever may write to the folder can run code here.
    """
    from tempo.workers.folder import work

    work(folder, wait, lambda line: _write(f"{escaped(line)}\n"))


@app.command()
def doctor(
    repair: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Set aside what is damaged in a folder of results or traces; keep the rest.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Say what this model and its runs take of the memory."),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Say what is installed, what would be slow or refused; or repair a folder.

    A repair deletes nothing: damaged lines and files get a name that ends in .damaged. It says
    what is missing now, and how to get it back.
    """
    from tempo import doctor as doctors

    if model is not None:
        with tempo.load_model(model, dtype, device) as lm:
            _write("".join(f"{escaped(line)}\n" for line in doctors.memory_plan(lm)))
        return
    if repair is None:
        _write("".join(f"{escaped(line)}\n" for line in doctors.describe()))
        return
    found = doctors.repair(repair)
    for damage in found:
        for part in damage.parts:
            _write(f"set aside: {escaped(part)}\n")
        _write(f"to get it back: {escaped(damage.back)}\n")
    what = f"{sum(len(each.parts) for each in found)} damaged parts" if found else "nothing damaged"
    _write(f"{escaped(str(repair))}: {what}\n")


class Settings(RunSpec):
    """A RunSpec whose prompt may come from the command line."""

    prompt: str | tuple[int, ...] = ""


def _spec(context: typer.Context, config: Path | None, also: Sequence[str] = ()) -> RunSpec:
    """The settings of the config file, overridden by the options that were given.

    also: parameters that were given in another way.
    """
    settings = load_yaml(Settings, config).model_dump(exclude_unset=True) if config else {}
    for name in context.params.keys() & DEFAULT.keys():
        source = context.get_parameter_source(name)
        if name in also or (source is not None and source.name == "COMMANDLINE"):
            value = context.params[name]
            settings[name] = _thresholds(value) if name == "schedule" else value
    if "prompt" not in settings:
        raise typer.BadParameter(
            "give a text to continue, or a --config file that holds one", param_hint="PROMPT"
        )
    return RunSpec(**settings)


def _thresholds(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not a list of numbers, such as 0.3,0.2,0.1", param_hint="--schedule"
        ) from None


def _run(lm: tempo.LanguageModel, specs: Sequence[RunSpec]) -> list[tempo.Trace]:
    """The traces, made under a spinner if someone watches."""
    from rich.console import Console
    from rich.text import Text

    # FORCE_COLOR asks for colour, not for a spinner in a log file.
    with Console(stderr=True, force_terminal=sys.stderr.isatty()).status(
        Text(escaped(f"{lm.name} generates ..."))
    ):
        return tempo.generate_batch(lm, specs)


def _record(trace: tempo.Trace) -> dict[str, Any]:
    """A trace without its arrays, as JSON holds it."""
    names = ("tokens", "texts", "probabilities", "position", "slots", "ended", "dropped")
    steps = [{name: getattr(step, name) for name in names} for step in trace.steps]
    found: dict[str, Any] = {"best_path": None, "best_text": None, "paths": None}
    if trace.spec.readout == "mixture":
        paths = [path._asdict() for path in trace.paths(NUM_PATHS)]
        found = {"best_path": trace.best_path, "best_text": trace.best_text, "paths": paths}
        for k in range(1, len(steps)):
            steps[k]["parents"] = trace.parents(k)
    return {
        "model": trace.provenance["model"],
        "spec": trace.spec.model_dump(mode="json"),
        "prompt_tokens": trace.prompt_tokens,
        "steps": steps,
        "text": trace.text,
        **found,
        "widths": trace.widths,
        "stop_reason": trace.stop_reason,
        "seconds": trace.seconds,
        "provenance": trace.provenance,
    }


def _comparison(
    lm: tempo.LanguageModel, traces: Mapping[Visibility, tempo.Trace]
) -> Iterator[dict[str, dict[str, Any]]]:
    """{mode: what it chose, and how far it is from isolated} of each step.

    There is no distance once contexts differ.
    """
    from tempo.metrics import kl_divergence, total_variation

    base = traces["isolated"]
    comparable = dict.fromkeys(traces, True)
    for k in range(max(len(trace.steps) for trace in traces.values())):
        row = {}
        for mode, trace in traces.items():
            if k >= len(trace.steps):
                continue
            step = trace.steps[k]
            top = int(step.distribution.argmax())
            comparable[mode] = comparable[mode] and k < len(base.steps)
            pair = (step.distribution, base.steps[k].distribution) if comparable[mode] else None
            row[mode] = {
                "tokens": step.tokens,
                "texts": step.texts,
                "probabilities": step.probabilities,
                "top": {
                    "token": top,
                    "text": lm.token_text(top),
                    "probability": float(step.distribution[top]),
                },
                "kl": kl_divergence(*pair) if pair else None,
                "tv": total_variation(*pair) if pair else None,
            }
            comparable[mode] = bool(pair) and set(step.tokens) == set(base.steps[k].tokens)
        yield row


def _console() -> Console:
    from rich.console import Console

    # Rich keeps bold and dim under NO_COLOR, which are escape codes too.
    return Console(
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        highlight=False,
        soft_wrap=False,
    )


def _show(console: Console, *parts: RenderableType) -> None:
    with _standard_output():
        with console.capture() as capture:
            for part in parts:
                console.print(part)
        _write(capture.get())


def _write(text: str) -> None:
    """Print to stdout at once; one that was closed before the start is nobody's."""
    if sys.stdout is not None:
        with _standard_output():
            sys.stdout.write(text)
            sys.stdout.flush()


@contextlib.contextmanager
def _standard_output() -> Iterator[None]:
    """A reader that has gone (`| head`) has seen what it wanted; a full disk is one line."""
    try:
        yield
    except OSError as error:
        # else the flush at exit complains
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            _fail(f"cannot write to standard output: {error.strerror}", 1)


def _fail(message: str, code: int) -> NoReturn:
    # a standard error that is closed or full cannot be told about
    with contextlib.suppress(OSError):
        print("Error:", "\n".join(map(escaped, message.split("\n"))), file=sys.stderr, flush=True)
    sys.exit(code)


def main() -> None:
    """The console entry point."""
    # Before torch is imported, which reads it once: threads that spin while they wait starve beside
    # any other load.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a character shows its code.
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
