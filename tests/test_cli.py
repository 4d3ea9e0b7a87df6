"""The command line: what it prints where, what it exits with, that hostile text stays text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from subprocess import PIPE

import pytest
from typer.testing import CliRunner, Result

import tempo
from tempo import cli
from tempo.harness import starter
from tempo.reporting import terminal
from tempo.text import escaped

ROOT = Path(__file__).parents[1]
HOSTILE = "a[red]b[/red]\x1b[31m\n\u202e\u200bc\x07\x00\u2028\ue000😀"
# At this threshold the model `tiny` gives sets of one and of several tokens.
TINY = ("--model", "tiny", "--threshold", "0.05", "--max-steps", "6")
# Rows of one float32 batch differ by rounding: 3e-6 was the largest total variation seen.
ROUNDING = 1e-4


def run(*args: object, **env: str) -> Result:
    unset = {"NO_COLOR": None, "FORCE_COLOR": None, "COLUMNS": "80"}
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], env={**unset, **env})


def run_json(*args: object) -> dict:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def unseen(text: str) -> set[str]:
    """Characters that a terminal would obey or hide."""
    return {
        char for char in text if unicodedata.category(char) in {"Cc", "Cf", "Zl", "Zp", "Cs", "Co"}
    } - {"\n"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\n\t\0", r"\n\t\x00"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\u202e\u200b\u2028\u2029", r"\u202e\u200b\u2028\u2029"),
        ("\ud800\ue000\xad\x85", r"\ud800\ue000\xad\x85"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_escaped_escapes_what_is_not_seen(text: str, shown: str) -> None:
    assert escaped(text) == shown
    assert not unseen(escaped(text))


@pytest.mark.parametrize(
    "text", ["", " the", "[red]", "\\n", "naïve é", "日本語 مرحبا", "😀", "\ufffd", "\xa0"]
)
def test_escaped_leaves_what_is_seen(text: str) -> None:
    assert escaped(text) == text


def test_generate_prints_every_token_with_its_probability() -> None:
    result = run("generate", "ab", *TINY)
    steps = run_json("generate", "ab", *TINY)["steps"]
    assert result.exit_code == 0
    assert result.stderr == ""
    line = result.stdout.split("\n\n")[0].replace("\n", "")
    pairs = [zip(step["texts"], step["probabilities"], strict=True) for step in steps]
    sets = ["/".join(f"{escaped(text)} {terminal.short(p)}" for text, p in pair) for pair in pairs]
    assert line == "ab" + "".join(f"[{members}]" for members in sets)
    assert {1, 2} <= {len(step["texts"]) for step in steps}
    assert "tiny, isolated; 6 steps of widths" in result.stdout


def test_generate_json_is_the_trace_of_the_library() -> None:
    record = run_json("generate", "ab", *TINY)
    with tempo.load_model("tiny") as lm:
        trace = tempo.generate(lm, "ab", threshold=0.05, max_steps=6)
        other = tempo.generate(lm, "ab", threshold=0.05, max_steps=6, visibility="visible")
    assert record["text"] == trace.text != other.text
    assert record["widths"] == trace.widths
    assert record["model"] == "tiny"
    assert record["stop_reason"] == "max_steps"
    assert record["provenance"] == trace.provenance
    assert tempo.RunSpec(**record["spec"]) == trace.spec != other.spec
    names = ("tokens", "texts", "probabilities", "position", "slots", "ended", "dropped")
    parents = [step.pop("parents", None) for step in record["steps"]]
    assert record["steps"] == [
        {name: getattr(step, name) for name in names} for step in trace.steps
    ]
    assert parents == [None, *(trace.parents(k) for k in range(1, len(trace.steps)))]
    assert record["best_path"] == trace.best_path
    assert record["best_text"] == trace.best_text
    assert [path["members"] for path in record["paths"]] == [
        path.members for path in trace.paths(cli.NUM_PATHS)
    ]


@pytest.mark.parametrize("weighting", ["none", "posterior"])
def test_generate_shows_the_best_path_and_each_members_most_probable_parent(weighting) -> None:
    settings = ("--weighting", weighting)
    shown, record = (
        run("generate", "ab", *TINY, *settings),
        run_json("generate", "ab", *TINY, *settings),
    )
    lines = shown.stdout.split("\n")
    assert f"best path {escaped(record['best_text'])}" in lines
    steps = record["steps"]
    after_wide = [k for k in range(1, len(steps)) if len(steps[k - 1]["tokens"]) > 1]
    assert after_wide
    assert [line.split(":")[0] for line in lines if "parents in" in line] == [
        f"  parents in step {k}" for k in after_wide
    ]
    for k in after_wide:
        text = next(line for line in lines if line.startswith(f"  parents in step {k}:"))
        before, step = steps[k - 1], steps[k]
        for child, parent in zip(step["texts"], step["parents"], strict=True):
            assert f"{escaped(before['texts'][parent])} →{escaped(child)} " in text


def test_a_readout_without_paths_shows_none() -> None:
    shown = run("generate", "ab", *TINY, "--readout", "last")
    assert shown.exit_code == 0
    assert "best path" not in shown.stdout
    assert run_json("generate", "ab", *TINY, "--readout", "last")["best_path"] is None


def test_a_schedule_that_is_no_list_of_numbers_is_wrong_usage() -> None:
    result = run("generate", "ab", "--model", "tiny", "--schedule", "0.3,x")
    assert result.exit_code == 2
    assert "'0.3,x' is not a list of numbers" in result.stderr


def test_output_without_json_is_not_json() -> None:
    with pytest.raises(json.JSONDecodeError):
        json.loads(run("generate", "ab", *TINY).stdout)


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        (("--threshold", "0.3"), "threshold", 0.3),
        (("--max-steps", "3"), "max_steps", 3),
        (("--visibility", "causal"), "visibility", "causal"),
        (("--positions", "sequential"), "positions", "sequential"),
        (("--readout", "last"), "readout", "last"),
        (("--weighting", "count"), "weighting", "count"),
        (("--weighting", "posterior"), "weighting", "posterior"),
        (("--schedule", "0.3,0.05"), "schedule", [0.3, 0.05]),
        (("--top-k", "2"), "top_k", 2),
        (("--top-p", "0.5"), "top_p", 0.5),
        (("--min-p", "0.5"), "min_p", 0.5),
        (("--sample", "2"), "sample", 2),
        (("--seed", "3"), "seed", 3),
        (("--prune", "0.2"), "prune", 0.2),
        (("--max-width", "1"), "max_width", 1),
        (("--no-stop-at-eos",), "stop_at_eos", False),
    ],
)
def test_each_option_changes_its_setting_and_no_other(
    option: tuple[str, ...], name: str, value: object
) -> None:
    plain = tempo.RunSpec(prompt="ab").model_dump(mode="json")
    changed = run_json("generate", "ab", "--model", "tiny", *option)["spec"]
    assert changed == {**plain, name: value} != plain


def test_without_options_the_settings_are_the_defaults() -> None:
    assert run_json("generate", "ab", "--model", "tiny")["spec"] == tempo.RunSpec(
        prompt="ab"
    ).model_dump(mode="json")


def test_explicit_options_override_the_config_and_others_do_not(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("prompt: ab\nthreshold: 0.3\nmax_steps: 2\nstop_at_eos: false\n")
    spec = run_json("generate", "--model", "tiny", "--config", config)["spec"]
    assert (spec["prompt"], spec["threshold"], spec["max_steps"], spec["stop_at_eos"]) == (
        "ab",
        0.3,
        2,
        False,
    )
    # 0.1 is the option's default: that it was given is what counts
    options = ("--config", config, "--threshold", 0.1, "--stop-at-eos")
    spec = run_json("generate", "cd", "--model", "tiny", *options)["spec"]
    assert (spec["prompt"], spec["threshold"], spec["max_steps"], spec["stop_at_eos"]) == (
        "cd",
        0.1,
        2,
        True,
    )


def test_a_config_may_lack_the_prompt_only_if_one_is_given(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("max_steps: 2\n")
    assert (
        run_json("generate", "ab", "--model", "tiny", "--config", config)["spec"]["max_steps"] == 2
    )
    result = run("generate", "--model", "tiny", "--config", config)
    assert result.exit_code == 2
    assert "PROMPT: give a text to continue" in result.stderr


def test_a_prompt_of_token_ids_is_shown_as_text(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("prompt: [97, 98]\n")
    assert run("generate", "--model", "tiny", "--config", config).stdout.startswith("ab[")


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (
            ("generate", "ab", "--threshold", "1.5"),
            2,
            "threshold=1.5: expected a probability from 0 to 1",
        ),
        (("generate", "ab", "--threshold", "nan"), 2, "threshold=nan"),
        (("generate", "ab", "--max-steps", "0"), 2, "max_steps=0"),
        (("generate", ""), 2, "the prompt is empty"),
        (("generate", "ab", "--model", "smolm2"), 2, "did you mean 'smollm2-135m'?"),
        (("generate", "ab", "--model", "tiny", "--dtype", "int8"), 2, "expected one of float32"),
        (("generate", "ab", "--config", "none.yaml"), 2, "cannot read none.yaml"),
        (
            ("generate", "ab", "--visibility", "all"),
            2,
            "'all' is not one of 'isolated', 'visible', 'causal'",
        ),
        (("generate", "ab", "--threshold", "high"), 2, "--threshold"),
        (("generate", "ab", "cd"), 2, "unexpected extra argument"),
        (("generate", "a\udcff", "--model", "tiny"), 2, "lone surrogate"),
        (("generate",), 2, "PROMPT"),
        (("compare", "ab", "--visibility", "visible"), 2, "No such option"),
        (("generat", "ab"), 2, "Did you mean 'generate'?"),
    ],
)
def test_errors_are_one_message_on_stderr_and_an_exit_code(
    args: tuple[str, ...], code: int, said: str
) -> None:
    result = run(*args)
    assert result.exit_code == code
    assert said in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_an_error_that_is_no_tempo_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(tempo, "load_model", broken)
    assert isinstance(run("generate", "ab").exception, ZeroDivisionError)


def test_an_interrupt_exits_130_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tempo, "load_model", interrupted)
    result = run("generate", "ab")
    assert (result.exit_code, result.output) == (130, "")


def hostile_outputs(tmp_path: Path) -> list[Result]:
    config = tmp_path / "run.yaml"
    config.write_text(
        tempo.RunSpec(prompt=HOSTILE, replay=[list(range(32)), [127]]).to_yaml(), encoding="utf-8"
    )
    return [
        run("generate", HOSTILE, *TINY),
        run("generate", "--model", "tiny", "--config", config),
        run("compare", "--model", "tiny", "--config", config),
        run("compare", HOSTILE, "--free", *TINY),
        run("generate", "ab", "--model", "./" + HOSTILE.replace("\0", "")),
        run("generate", "ab", "--config", HOSTILE.replace("\0", "")),
        run("generate", "ab", HOSTILE),
        run("generate", "ab", "--" + HOSTILE),
        run(HOSTILE),
    ]


def test_hostile_text_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    results = hostile_outputs(tmp_path)
    assert [result.exit_code for result in results] == [0, 0, 0, 0, 2, 2, 2, 2, 2]
    assert [unseen(result.output) for result in results] == [set()] * len(results)
    assert results[0].stdout.replace("\n", "").startswith(escaped(HOSTILE) + "[")
    assert results[1].stdout.startswith("a[red]b[/red]\\x1b[31m\\n\\u202e")


def test_hostile_text_would_be_obeyed_without_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (cli, terminal):
        monkeypatch.setattr(module, "escaped", lambda text: text)
    assert sum(bool(unseen(result.output)) for result in hostile_outputs(tmp_path)) >= 6


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_hostile_model_names_are_shown_too(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tempo.load_model("tiny")
    lm.name = HOSTILE
    monkeypatch.setattr(tempo, "load_model", lambda *args: lm)
    result = run(command, "ab")
    assert result.exit_code == 0
    assert escaped(HOSTILE) in result.stdout.replace("\n", "")
    assert not unseen(result.output)


def test_hostile_prompts_come_back_from_json() -> None:
    result = run("generate", HOSTILE, *TINY, "--json")
    assert result.stdout.isascii()
    assert not unseen(result.stdout)
    assert json.loads(result.stdout)["spec"]["prompt"] == HOSTILE


@pytest.mark.parametrize(
    "command", [("generate", "ab", *TINY), ("compare", "ab", *TINY), ("models",)]
)
def test_escape_codes_only_where_colour_is_wanted(command: tuple[str, ...]) -> None:
    assert "\x1b[" in run(*command, FORCE_COLOR="1", TERM="xterm-256color").stdout
    assert "\x1b" not in run(*command, FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1").output
    assert "\x1b" not in run(*command, TERM="xterm-256color").output


def test_lines_fit_the_terminal_and_keep_leading_spaces() -> None:
    pieces = [
        terminal.words("one two"),
        terminal.members([" three", " four"], [0.5, 0.25]),
        terminal.members([" five"], [1.0]),
    ]
    assert [line.plain for line in terminal.wrap(pieces, 40)] == [
        "one two[ three .50/ four .25][ five 1.0]"
    ]
    assert [line.plain for line in terminal.wrap(pieces, 39)] == [
        "one two[ three .50/ four .25]",
        "[ five 1.0]",
    ]
    narrow = [line.plain for line in terminal.wrap(pieces, 13)]
    assert narrow == ["one two", "[ three .50/", " four .25]", "[ five 1.0]"]
    wide, narrow = (
        run("generate", "ab", *TINY, COLUMNS=str(columns)).stdout.split("\n\n")[0]
        for columns in (200, 50)
    )
    assert "\n" not in wide
    assert "\n" in narrow
    assert max(map(len, narrow.split("\n"))) <= 50
    assert narrow.replace("\n", "") == wide


def test_of_a_long_prompt_the_end_is_shown() -> None:
    assert run("generate", "x" * 400, *TINY).stdout.startswith("x" * 80)
    # 803 characters once escaped
    shown = run("generate", "\x01" * 200 + "yyy", *TINY).stdout.replace("\n", "")
    assert shown.startswith("…")
    assert shown.index("yyy[") == cli.LONGEST_PROMPT - 2


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (1.0, "1.0"), (0.123, ".12"), (0.1, ".10"), (0.00519, ".0052"), (3.4e-6, "3e-06")],
)
def test_numbers_keep_the_digits_that_count(value: float, shown: str) -> None:
    assert terminal.short(value) == shown


def test_save_keeps_a_trace_that_loads(tmp_path: Path) -> None:
    record = run_json("generate", "ab", *TINY, "--save", tmp_path / "trace")
    assert tempo.load_trace(tmp_path / "trace").sets == [step["tokens"] for step in record["steps"]]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other").touch()
    result = run("generate", "ab", *TINY, "--save", tmp_path / "full")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "is not a saved trace" in result.stderr


def test_compare_replays_isolated_sets_and_shows_where_the_modes_part() -> None:
    record = run_json("compare", "ab", *TINY)
    isolated = run_json("generate", "ab", *TINY)
    for run_of_mode in record["runs"].values():
        assert [step["tokens"] for step in run_of_mode["steps"]] == [
            step["tokens"] for step in isolated["steps"]
        ]
        assert run_of_mode["stop_reason"] == "replay"
    wide = record["first_wide_step"]
    assert isolated["widths"][wide] > 1
    assert set(isolated["widths"][:wide]) <= {1}
    assert record["max_tv_until_then"] < ROUNDING
    after = record["steps"][wide + 1]
    assert after["visible"]["tv"] > ROUNDING < after["causal"]["tv"]
    assert {step["isolated"]["kl"] for step in record["steps"]} == {0.0}


def test_compare_numbers_are_those_of_the_metrics() -> None:
    steps = run_json("compare", "ab", *TINY)["steps"]
    with tempo.load_model("tiny") as lm:
        base = tempo.generate(lm, "ab", threshold=0.05, max_steps=6)
        other = tempo.generate(lm, "ab", visibility="visible", replay=base.sets)
    from tempo.metrics import kl_divergence, total_variation

    p, q = other.steps[3].distribution, base.steps[3].distribution
    assert steps[3]["visible"]["kl"] == pytest.approx(kl_divergence(p, q), abs=ROUNDING)
    assert steps[3]["visible"]["kl"] != pytest.approx(kl_divergence(q, p), abs=ROUNDING)
    assert steps[3]["visible"]["tv"] == pytest.approx(total_variation(p, q), abs=ROUNDING)
    assert steps[3]["visible"]["top"]["token"] == p.argmax()


def test_free_runs_are_compared_until_their_sets_first_differ() -> None:
    record = run_json("compare", "ab", *TINY, "--free")
    for mode in ("visible", "causal"):
        same = [
            set(step[mode]["tokens"]) == set(step["isolated"]["tokens"]) for step in record["steps"]
        ]
        first = same.index(False)
        assert [step[mode]["kl"] is None for step in record["steps"]] == [
            k > first for k in range(len(same))
        ]
    assert {step["isolated"]["kl"] for step in record["steps"]} == {0.0}
    assert record["runs"]["visible"]["text"] != record["runs"]["isolated"]["text"]


def test_compare_says_what_is_compared() -> None:
    replayed, free = (
        run("compare", "ab", *TINY).stdout,
        run("compare", "ab", *TINY, "--free").stdout,
    )
    alone = run("compare", "ab", *TINY, "--max-width", 1).stdout
    short = run("compare", "ab", *TINY, "--max-steps", 1).stdout
    said = [" ".join(text.split("─")[0].split()) for text in (replayed, free, alone, short)]
    assert "All modes replay the same sets" in said[0]
    assert "All modes replay the same sets" not in said[1]
    assert "after different contexts are not comparable" in said[1]
    assert "not comparable" not in said[0]
    assert "Up to and including the first wide set, step 0, they must agree" in said[0]
    assert "No set is wider than one" in said[2]
    assert "No set is wider than one" not in said[0]
    assert "Nothing was computed after that set" in said[3]
    assert "Nothing was computed" not in said[0]
    dashes = [len(re.findall(r" -( |$)", text, re.M)) for text in (replayed, free)]
    assert dashes[0] == 0 < dashes[1]


def test_compare_takes_the_sets_of_a_config_and_free_refuses_them(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("prompt: ab\nreplay: [[97, 98], [99]]\n")
    record = run_json(
        "compare", "--model", "tiny", "--config", config, "--save", tmp_path / "saved"
    )
    assert [step["causal"]["tokens"] for step in record["steps"]] == [[97, 98], [99]]
    assert tempo.load_trace(tmp_path / "saved" / "causal").spec.visibility == "causal"
    result = run("compare", "--model", "tiny", "--config", config, "--free")
    assert result.exit_code == 2
    assert "replays sets" in result.stderr


def test_models_lists_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPO_CACHE", str(tmp_path))
    listed = {model["name"]: model for model in run_json("models")["models"]}
    assert [listed[name]["present"] for name in ("smollm2-135m", "gemma3-270m", "tiny")] == [
        False,
        False,
        True,
    ]
    (tmp_path / "smollm2-135m").mkdir()
    listed = {model["name"]: model for model in run_json("models")["models"]}
    assert [listed[name]["present"] for name in ("smollm2-135m", "gemma3-270m", "tiny")] == [
        True,
        False,
        True,
    ]
    assert listed["smollm2-135m"]["folder"] == str(tmp_path / "smollm2-135m")
    assert listed["tiny"]["folder"] is None
    table = run("models").stdout
    assert re.search(r"smollm2-135m +93 MB +yes +Apache-2.0", table)
    assert re.search(r"gemma3-270m +238 MB +no +Gemma Terms of Use", table)
    assert str(tmp_path) in table


def test_new_writes_an_experiment_and_says_how_to_run_it(tmp_path: Path) -> None:
    result = run("new", "entropy", "--folder", tmp_path / "my study")
    assert result.exit_code == 0, result.stderr
    *written, command = result.stdout.splitlines()
    paths = [Path(line.removeprefix("written: ")) for line in written]
    assert sorted(path.suffix for path in paths) == [".py", ".yaml"]
    assert all(path.is_file() and path.parent == tmp_path / "my study" for path in paths)
    module = next(path for path in paths if path.suffix == ".py")
    assert command == f"run it: pytest '{module}' --model tiny"
    again = run("new", "entropy", "--folder", tmp_path / "my study")
    assert again.exit_code == 1
    assert "exists" in again.stderr
    assert again.stdout == ""


def test_new_refuses_a_name_that_no_experiment_can_have(tmp_path: Path) -> None:
    result = run("new", "My Study", "--folder", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_hostile_paths_of_a_new_experiment_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "new", lambda name, folder: [Path(f"{HOSTILE}.py")])
    result = run("new", "entropy")
    assert result.exit_code == 0
    assert not unseen(result.output)
    assert escaped(HOSTILE) in result.stdout


def test_no_help_names_this_repository() -> None:
    for command in ("", "generate", "compare", "models", "new", "report"):
        shown = run(*command.split(), "--help").stdout
        assert "test_experiments" not in shown
        assert "fixtures" not in shown
        assert max(map(len, shown.splitlines())) <= 80


def test_version_and_help() -> None:
    assert run("--version").stdout == f"tempo {tempo.__version__}\n"
    shown = run("--help").stdout
    assert "Exit codes: 0 done; 1 the run failed" in shown
    assert run().stdout == shown
    assert "isolated|visible|causal" in run("generate", "--help").stdout
    assert "isolated|visible|causal" not in run("compare", "--help").stdout


def test_the_options_show_the_defaults_of_the_settings() -> None:
    shown = " ".join(run("generate", "--help").stdout.split())
    for name in ("threshold", "max_steps", "visibility", "positions", "readout", "weighting"):
        default = tempo.RunSpec.model_fields[name].default
        option = f"--{name.replace('_', '-')}"
        assert f"[default: {default}]" in shown[shown.index(option) :].split(" --")[0], name


def start(*command: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command], stdout=PIPE, stderr=PIPE, text=True, env=env
    )


def test_as_a_process_it_tells_errors_and_minds_no_closed_pipe() -> None:
    failing = start("-m", "tempo", "generate", "ab", "--threshold", "0")
    closed = start("-m", "tempo.cli", "models")
    unguarded = start(
        "-c",
        "import contextlib as c, sys; from tempo import cli; cli._write = sys.stdout.write; "
        "cli._standard_output = c.nullcontext; cli.app(['models'])",
    )
    with failing, closed, unguarded:
        closed.stdout.close()
        unguarded.stdout.close()
        out, err = failing.communicate(timeout=120)
        assert (failing.returncode, out) == (2, "")
        assert err.startswith("Error: RunSpec: threshold=0 lets")
        assert "Traceback" not in err
        assert (closed.stderr.read(), closed.wait(timeout=120)) == ("", 0)
        assert unguarded.wait(timeout=120) == 1


POLICY = "import os; print(os.environ.get('OMP_WAIT_POLICY'))"


@pytest.mark.parametrize(
    ("code", "given", "then"),
    [
        ("from tempo import cli; cli.app = lambda: None; cli.main()", None, "PASSIVE"),
        ("from tempo import cli; cli.app = lambda: None; cli.main()", "ACTIVE", "ACTIVE"),
        (
            "from tempo.harness.plugin import pytest_load_initial_conftests as f; f()",
            None,
            "PASSIVE",
        ),
        ("import tempo, tempo.cli, tempo.harness.plugin; tempo.generate", None, "None"),
    ],
)
def test_waiting_threads_sleep_where_tempo_is_the_program(monkeypatch, code, given, then) -> None:
    """The command line and pytest say so before torch is there; an import never does."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    out, err = start("-c", f"{code}; {POLICY}").communicate(timeout=120)
    assert out.strip() == then, err


def test_help_imports_nothing_heavy() -> None:
    """`tempo --help` took five seconds of processor time, which torch and transformers made."""
    code = """
import sys
from tempo import cli
try:
    cli.app(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code
print(*sys.modules)
"""
    heavy = {"torch", "transformers", "numpy", "scipy", "matplotlib", "rich"}
    for arguments in (["--help"], ["generate", "--help"], ["--version"]):
        process = start("-c", code, *arguments)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        loaded = set(out.splitlines()[-1].split())
        assert "tempo.spec" in loaded
        assert not heavy & loaded
