"""What a session says while it measures."""

from types import SimpleNamespace

import pytest

from tempo.harness import progress
from tempo.harness.execute import prompts_at_once
from tempo.harness.progress import Progress, duration


class Terminal:
    """Stands for pytest's terminal reporter, and for its capture manager."""

    def __init__(self, isatty: bool) -> None:
        self.isatty, self.lines, self.rewritten = isatty, [], []
        self._tw = SimpleNamespace(fullwidth=80)

    def ensure_newline(self):
        pass

    def write_line(self, line):
        self.lines.append(line)

    def rewrite(self, line):
        self.rewritten.append(line)

    def global_and_fixture_disabled(self):
        from contextlib import nullcontext

        return nullcontext()


def task(i: int):
    lm = SimpleNamespace(vocab_size=50_000)
    return SimpleNamespace(
        prompt=SimpleNamespace(text=f"prompt {i}", lm=lm),
        plan=SimpleNamespace(name="exp\x1b[31m"),
    )


@pytest.fixture
def measured(monkeypatch):
    """What is said of 64 cases in two windows, each of which gives its cases after 100 seconds."""

    def run(isatty, sizes=(32, 32)):
        clock = [0.0]
        monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
        terminal = Terminal(isatty)
        tasks = [task(i) for i in range(sum(sizes))]
        windows = [tasks[: sizes[0]], tasks[sizes[0] :]]
        config = SimpleNamespace(pluginmanager=SimpleNamespace(get_plugin=lambda name: terminal))
        with Progress(config, windows, 3) as shown:
            for window in windows:
                for each in window[:4]:
                    clock[0] += 25
                    shown.ran(each, 2)
                for each in window:
                    shown.report(each)
        return terminal

    return run


def test_without_a_terminal_there_are_plain_lines(measured):
    terminal = measured(isatty=False)
    assert terminal.rewritten == []
    known = "tempo: 3 of 67 prompt cases are on disk already and are not run again"
    assert terminal.lines[0] == known
    assert terminal.lines[1] == "tempo: measuring 64 prompt cases in 2 batches of prompts"
    end = "tempo: measured 64 prompt cases in 3 min, with 16 runs"
    assert terminal.lines[-1] == end


def test_before_a_batch_has_ended_it_says_how_much_time_is_gone_and_then_how_much_is_left(measured):
    lines = measured(isatty=False).lines[2:-1]
    now = r"now exp\x1b[31m"
    assert lines[:4] == [
        f"tempo: 0/64 prompt cases, 25 s so far, 2 runs; {now}",
        f"tempo: 0/64 prompt cases, 50 s so far, 4 runs; {now}",
        f"tempo: 0/64 prompt cases, 75 s so far, 6 runs; {now}",
        f"tempo: 0/64 prompt cases, 2 min so far, 8 runs; {now}",
    ]
    # the second batch takes as long as the first one, which took 100 seconds
    left = [line.split(", ")[1] for line in lines[4:]]
    assert left == ["about 75 s left", "about 50 s left", "about 25 s left", "longer than expected"]


def test_of_a_single_batch_no_end_is_promised(measured):
    lines = measured(isatty=False, sizes=(12, 0)).lines
    assert any("so far" in line for line in lines)
    assert not any("left" in line for line in lines)


def test_at_a_terminal_one_line_is_rewritten_and_cleared_with_the_cursor_at_its_begin(measured):
    terminal = measured(isatty=True)
    assert len(terminal.lines) == 3
    assert terminal.rewritten[0].startswith("tempo: 0/64 prompt cases, 25 s so far")
    assert terminal.rewritten[-1].strip() == ""
    # each covers what was there before, and none wraps
    assert {len(line) for line in terminal.rewritten} == {80}
    assert all(line.endswith("\r") for line in terminal.rewritten)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "0 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5340, "89 min"),
        (5400, "1 h 30 min"),
        (11100, "3 h 05 min"),
    ],
)
def test_durations_are_as_exact_as_an_estimate_deserves(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("vocab_size", "prompts"), [(97, 16), (49_152, 16), (262_144, 4), (100_000, 10)]
)
def test_a_window_holds_fewer_prompts_of_a_large_vocabulary(vocab_size, prompts):
    assert prompts_at_once(SimpleNamespace(vocab_size=vocab_size)) == prompts
