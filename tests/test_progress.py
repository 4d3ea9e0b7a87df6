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

    def rewrite(self, line, erase=False):
        assert erase
        self.rewritten.append(line)

    def global_and_fixture_disabled(self):
        from contextlib import nullcontext

        return nullcontext()


def task(i: int):
    lm = SimpleNamespace(vocab_size=50_000)
    return SimpleNamespace(
        prompt=SimpleNamespace(text=f"prompt {i // 2}", lm=lm),
        plan=SimpleNamespace(name="exp\x1b[31m"),
    )


@pytest.fixture
def measured(monkeypatch):
    """What is said of 64 cases, two for each prompt, in two windows that take 100 seconds each."""

    def run(isatty):
        clock = iter([0.0, *[100.0 + 20 * (i % 32) for i in range(64)], 2000.0])
        monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
        terminal = Terminal(isatty)
        tasks = [task(i) for i in range(64)]
        config = SimpleNamespace(pluginmanager=SimpleNamespace(get_plugin=lambda name: terminal))
        with Progress(config, tasks, 3) as report:
            for each in tasks:
                report(each)
        return terminal

    return run


def test_without_a_terminal_there_are_plain_lines(measured):
    terminal = measured(isatty=False)
    assert terminal.rewritten == []
    known = "tempo: 3 of 67 prompt cases are on disk already and are not run again"
    assert terminal.lines[0] == known
    assert terminal.lines[1].startswith("tempo: measuring 64 prompt cases")
    # one window of two is done
    under_way = r"tempo: measured 1/64 prompt cases, now exp\x1b[31m; about 2 min left"
    assert terminal.lines[2] == under_way
    assert terminal.lines[-1] == "tempo: measured 64 prompt cases in 33 min"


def test_at_a_terminal_one_line_is_rewritten_and_cleared(measured):
    terminal = measured(isatty=True)
    assert len(terminal.lines) == 3
    assert terminal.rewritten[0].startswith("tempo: measured 1/64")
    assert terminal.rewritten[-1] == ""
    assert max(map(len, terminal.rewritten)) < 80


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
