"""The campaign's first part: faults at every file operation of what writes.

A scenario prepares a folder with earlier results, and acts on it in a process of its own where a
fault strikes. Then: is anything of before lost? Was an end without an error one with all results?
Did an error come in words? And after the next undisturbed act: is all as if nothing had happened?
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tempo
from benchmarks.injector import FAULTS, KILLED, RAW, Ended, Plan, forked, operations
from tempo import files
from tempo.records import append_jsonl, read_findings, read_jsonl
from tempo.reporting.publish import publish
from tempo.reporting.report import read_reports
from tempo.store import TraceStore
from tempo.trace import load_trace

PROBLEMS = ("lost", "silently wrong", "raw exception", "left over")
SEED = 23
# A sweep that goes on computes its runs in other batches than one that was not interrupted, and so
# rounds them otherwise: by up to 6e-7 in a probability, of tiny and of SmolLM2. A trace that is
# read is the same to the bit.
FLOOR = 2e-6
Problem = tuple[str, str]  # one of PROBLEMS, and what was seen


@dataclass(frozen=True)
class Scenario:
    """Something that writes. `prepare`, `act` and the checks are given the folder.

    act: what is disturbed; its exit code. earlier: what is wrong with the results of before.
    final: what is not as it is after an undisturbed act.
    seconds: how long it takes about, for kills at random.
    """

    name: str
    prepare: Callable[[Path], None]
    act: Callable[[Path], int]
    earlier: Callable[[Path], Iterable[str]]
    final: Callable[[Path], Iterable[str]]
    seconds: float


@dataclass
class Tally:
    """What was done to one scenario, and what came of it.

    tries: by fault. ended: how. problems: by kind; details: what each was.
    """

    scenario: str
    operations: int = 0
    tries: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)

    def add(self, fault: str, ended: Ended, problems: Iterable[Problem]) -> None:
        self.tries[fault] += 1
        how = {KILLED: "killed", -9: "killed", 0: "went on"}
        self.ended[how.get(ended.code, "refused in words")] += 1
        for kind, what in problems:
            self.problems[kind] += 1
            self.details.append(f"{self.scenario}, {fault}: {kind}: {what}")


def disturbed(scenario: Scenario, plan: Plan, base: Path) -> tuple[Ended, list[Problem]]:
    """How an act ended in which something went wrong, and what is wrong after it."""
    shutil.rmtree(base, ignore_errors=True)
    root, log = base / "root", base / "log.txt"
    root.mkdir(parents=True)
    scenario.prepare(root)
    ended = forked(lambda: scenario.act(root), root, plan, log)
    problems: list[Problem] = [("lost", what) for what in scenario.earlier(root)]
    if ended.code == RAW or "Traceback" in ended.output or "INTERNALERROR" in ended.output:
        problems.append(("raw exception", ended.output[-2000:]))
    if ended.code == 0:  # it says that all went well
        wrong = [w for w in _unlike_the_end(scenario, root) if not w.startswith(LEFT)]
        problems += [("silently wrong", what) for what in wrong]
    again = forked(lambda: scenario.act(root), base / "nothing", Plan(), log)
    if again.code:
        problems.append(("lost", f"the next act ended with {again.code}: {again.output[-800:]}"))
    problems += [("lost", what) for what in scenario.earlier(root)]
    for what in _unlike_the_end(scenario, root):
        problems.append(("left over" if what.startswith(LEFT) else "silently wrong", what))
    return ended, problems


def _unlike_the_end(scenario: Scenario, root: Path) -> list[str]:
    try:
        return list(scenario.final(root))
    except (tempo.TempoError, OSError) as error:
        return [f"it cannot be read: {error}"]


def at_every_operation(
    scenario: Scenario,
    base: Path,
    faults: Iterable[str] = FAULTS,
    stride: int = 1,
    kill_stride: int | None = None,
) -> Tally:
    """Every fault at every operation.

    stride: at each so-manieth only, another one for each fault. kill_stride: that of kills.
    """
    shutil.rmtree(base, ignore_errors=True)
    root = base / "root"
    root.mkdir(parents=True)
    scenario.prepare(root)
    points = operations(lambda: scenario.act(root), root, base / "log.txt")
    tally = Tally(scenario.name, len(points))
    for i, fault in enumerate(faults):
        step = kill_stride if kill_stride and fault in ("kill", "torn") else stride
        for at in range(i % step, len(points), step):
            if fault in ("torn", "short") and points[at][0] != "write":
                continue  # the same as `kill` and `full`
            ended, problems = disturbed(scenario, Plan(at, fault), base)
            where = f"at {at} ({' '.join(points[at])}): "
            tally.add(fault, ended, [(kind, where + what) for kind, what in problems])
    return tally


def at_random(scenario: Scenario, base: Path, kills: int, seed: int = SEED) -> Tally:
    """Kills at random times, until so many have struck before the end."""
    rng, tally = random.Random(seed), Tally(f"{scenario.name}, at random")
    while tally.ended["killed"] < kills:
        plan = Plan(seconds=rng.uniform(0, scenario.seconds))
        tally.add("kill", *disturbed(scenario, plan, base))
    return tally


LEFT = "left over: "


def unlike(root: Path, expected: Iterable[str]) -> Iterator[str]:
    """The files that should not be there, and those that are missing."""
    found, wanted = set(names_in(root)), set(expected)
    yield from (f"{LEFT}{name}" for name in sorted(found - wanted))
    yield from (f"missing: {name}" for name in sorted(wanted - found))


def names_in(root: Path) -> list[str]:
    """The files below a folder."""
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def append_scenario() -> Scenario:
    """Records added to a file whose last line a killed run left half written."""
    first = {"a": "x" * 3000}
    added: list[dict[str, Any]] = [{"b": i, "c": "y" * 900} for i in range(3)]

    def prepare(root: Path) -> None:
        append_jsonl(root / "cases.jsonl", [first])
        with (root / "cases.jsonl").open("ab") as file:
            file.write(b'{"b": 17, "c": "yy')

    def act(root: Path) -> int:
        known = read_jsonl(root / "cases.jsonl").records
        append_jsonl(root / "cases.jsonl", [r for r in added if r not in known])
        return 0

    def earlier(root: Path) -> Iterator[str]:
        found = read_jsonl(root / "cases.jsonl").records
        if found[:1] != [first]:
            yield "the first record"
        if any(record not in [first, *added] for record in found):
            yield "a record that nobody wrote"

    def final(root: Path) -> Iterator[str]:
        found = read_jsonl(root / "cases.jsonl").records
        if sorted(map(str, found)) != sorted(map(str, [first, *added])):
            yield "other records than were written"
        yield from unlike(root, ["cases.jsonl"])

    return Scenario("append_jsonl", prepare, act, earlier, final, 0.01)


@cache
def model() -> tempo.LanguageModel:
    return tempo.load_model("tiny")


def same_trace(one: tempo.Trace, two: tempo.Trace, within: float = 0.0) -> bool:
    """Whether the spec and all sets are the same, and all distributions, to the bit or within."""
    if one.spec != two.spec or one.sets != two.sets:
        return False
    return all(
        np.abs(a.distribution - b.distribution).max() <= within
        for a, b in zip(one.steps, two.steps, strict=True)
    )


def files_of(place: Path) -> list[str]:
    """The files of a saved trace."""
    return ["trace.json", json.loads((place / "trace.json").read_text())["arrays"]]


def save_scenario() -> Scenario:
    """A trace that replaces an earlier one, in a folder with a note of the user's."""
    first = tempo.generate(model(), "The cat", threshold=0.05, max_steps=2)
    second = tempo.generate(model(), "A dog", threshold=0.05, max_steps=3, capture="logits")

    def prepare(root: Path) -> None:
        first.save(root / "trace")
        (root / "trace/notes.txt").write_text("mine")

    def act(root: Path) -> int:
        second.save(root / "trace")
        return 0

    def earlier(root: Path) -> Iterator[str]:
        if (root / "trace/notes.txt").read_text() != "mine":
            yield "the user's note"
        try:
            found = load_trace(root / "trace")
        except tempo.TraceError as error:
            yield f"neither trace can be read: {error}"
            return
        if not any(same_trace(found, known) for known in (first, second)):
            yield "a trace that is neither of both"

    def final(root: Path) -> Iterator[str]:
        if not same_trace(load_trace(root / "trace"), second):
            yield "not the trace that was saved"
        yield from unlike(root / "trace", ["notes.txt", *files_of(root / "trace")])

    return Scenario("Trace.save", prepare, act, earlier, final, 0.02)


def sweep() -> tuple[list[tempo.RunSpec], list[tempo.Trace]]:
    specs = [tempo.RunSpec(prompt=p, max_steps=2, threshold=0.05) for p in ("ab", "cd", "ef")]
    return specs, tempo.generate_batch(model(), specs)


def unlike_store(root: Path, expected: Iterable[tempo.Trace]) -> Iterator[str]:
    """What a store holds beside these traces, or holds otherwise."""
    store, names = TraceStore(model(), root), []
    for known in expected:
        place = store.place(known.spec)
        if not same_trace(load_trace(place), known, FLOOR):
            yield f"another trace of {known.spec.prompt!r}"
        names += [f"{place.name}/{name}" for name in files_of(place)]
    yield from unlike(root, names)


def stream_scenario() -> Scenario:
    """A sweep into a store that holds one of its traces already, and one of another sweep."""
    specs, expected = sweep()
    kept = tempo.generate(model(), "gh", max_steps=1)

    def prepare(root: Path) -> None:
        store = TraceStore(model(), root)
        store.put(expected[0])
        store.put(kept)

    def act(root: Path) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a torn trace would be one that a warning is about
            for index, trace in tempo.stream(model(), specs, store=root):
                if not same_trace(trace, expected[index], FLOOR):
                    return RAW
        return 0

    def earlier(root: Path) -> Iterator[str]:
        store = TraceStore(model(), root)
        for known in (expected[0], kept):
            found = store.get(known.spec)
            if found is None or not same_trace(found, known):
                yield f"the trace of {known.spec.prompt!r}"

    def final(root: Path) -> Iterator[str]:
        return unlike_store(root, [*expected, kept])

    return Scenario("stream(store=)", prepare, act, earlier, final, 0.1)


STUDY = '''
from dataclasses import dataclass

import numpy as np

from tempo.harness import Planned, Study, average, run
from tempo.metrics import entropy
from tempo.reporting import figures

study = Study("sober", title="Is seeing siblings sobering?")


@dataclass(frozen=True)
class Case:
    gap: float | None
    again: float | None


@study.measure
def modes(prompt):
    source = yield run(prompt)
    both = ("isolated", "visible")
    isolated, visible = yield [run(prompt, replay=source, visibility=v) for v in both]
    if prompt.store:
        prompt.store.arrays("first", distribution=isolated.steps[0].distribution)
    return Case(gap=gap(visible, isolated), again=gap(source, isolated))


def gap(one, other):
    pairs = zip(one.steps, other.steps, strict=True)
    return average([entropy(a.distribution) - entropy(b.distribution) for a, b in pairs])


@study.pictures
def pictures(store, cases):
    name = f"A map of {len(cases)} prompts"
    yield figures.layer_head_map(np.eye(2) * len(cases), name, "mass", "See it.")


@study.claim(more_than=0.05, because="half", planned=Planned(0.15, sd=0.3, source="guess"))
def test_visible_is_less_sure(case):
    """Seeing siblings makes the next distribution flatter."""
    return case.gap


@test_visible_is_less_sure.control
def isolated_twice(case):
    """isolated mode twice"""
    return case.again
'''
CONFIG = "experiment: sober\nprompt: The cat sat on the\nmax_steps: 3\nthreshold: 0.05\n"
PROMPTS = "Es war einmal ein\nDer Hund\nHeute ist das Wetter schlecht\nIn der Stadt\nAm Abend\n"


# They take two thirds of such a short session, and write nothing of it.
SLOW_PLUGINS = ("cacheprovider", "hypothesispytest", "unraisableexception", "threadexception")
# Else each forked process imports them anew.
WARM = ("harness.session", "harness.report", "harness.plan", "reporting.page", "reporting.figures")


def session(study: Path, root: Path, *more: str) -> int:
    """The exit code of pytest on the study, with all that it writes below `root`."""
    os.chdir(study)
    for name in ("CI", "GITHUB_STEP_SUMMARY"):
        os.environ.pop(name, None)
    command = ["test_sober.py", "--model", "tiny", "-q", "--assert=plain"]
    command += ["--import-mode=importlib", "--suite", "prompts.txt"]
    for plugin in SLOW_PLUGINS:
        command += ["-p", f"no:{plugin}"]
    command += ["--results", f"{root}/results", "--findings", f"{root}/reports/findings.html"]
    command += ["--summary", f"{root}/summary.md", *more]
    return int(pytest.main(command))


class Sessions:
    """A study, what a session of two prompts leaves, and what a later one of all leaves.

    base: a folder for them.
    """

    def __init__(self, base: Path) -> None:
        self.study, self.before, self.after = base / "study", base / "before", base / "after"
        for name in WARM:
            import_module(f"tempo.{name}")
        model()
        self.study.mkdir(parents=True)
        (self.study / "test_sober.py").write_text(STUDY)
        (self.study / "sober.yaml").write_text(CONFIG)
        (self.study / "prompts.txt").write_text(PROMPTS)
        (self.study / "pytest.ini").write_text("[pytest]\n")
        self._run(self.before, "--prompts", "2")
        shutil.copytree(self.before, self.after)
        self._run(self.after)

    def _run(self, root: Path, *more: str) -> None:
        log = self.study.parent / "log.txt"
        ended = forked(lambda: session(self.study, root, *more), root, Plan(), log)
        if ended.code:
            raise RuntimeError(ended.output)


def cases(root: Path) -> dict[str, object]:
    """The cases on disk, the last one of each prompt."""
    records = read_jsonl(root / "results/sober/cases.jsonl").records
    return {str(record["prompt"]): record["case"] for record in records}


def estimate(root: Path) -> float:
    return read_findings(root / "results/findings.jsonl").findings[0].estimate


def session_scenario(made: Sessions) -> Scenario:
    """A session that measures the rest of what an earlier one, of two prompts, left on disk."""
    known, whole, names = cases(made.before), cases(made.after), names_in(made.after)
    estimates = estimate(made.before), estimate(made.after)

    def prepare(root: Path) -> None:
        shutil.copytree(made.before, root, dirs_exist_ok=True)

    def act(root: Path) -> int:
        return session(made.study, root)

    def earlier(root: Path) -> Iterator[str]:
        found = cases(root)
        yield from (f"the case of {p!r}" for p in known if found.get(p) != known[p])
        yield from (f"another case of {p!r}" for p in found if found[p] != whole[p])
        if (seen := estimate(root)) not in estimates:
            yield f"a finding that nobody made: {seen}"
        page = root / "reports/findings.html"
        if not page.is_file() or not page.read_text().rstrip().endswith("</html>"):
            yield "the page is not whole"
        with np.load(root / "results/sober/first.npz") as stored:
            if not len(stored["distribution"]):
                yield "the arrays of the own prompt"

    def final(root: Path) -> Iterator[str]:
        if cases(root) != whole:
            yield "other cases than those of an undisturbed session"
        if estimate(root) != estimates[1]:
            yield "another finding than that of an undisturbed session"
        if "test_sober.py" not in (root / "reports/findings.html").read_text():
            yield "a page without its tests"
        yield from unlike(root, names)

    return Scenario("a session", prepare, act, earlier, final, 1.0)


def publish_scenario(made: Sessions, base: Path) -> Scenario:
    """A report over an earlier one, in a folder with things of the user's."""
    own = ["figures/photo.png", "notes.txt", "findings-of-mine.svg"]
    reports = {root: read_reports([root / "results"]) for root in (made.before, made.after)}
    whole: dict[Path, dict[str, bytes]] = {}
    for root, found in reports.items():
        out = base / root.name
        publish(found, out)
        whole[root] = {name: (out / name).read_bytes() for name in names_in(out)}
    old, new = whole.values()

    def prepare(root: Path) -> None:
        shutil.copytree(base / made.before.name, root / "paper")
        for name in own:
            (root / "paper" / name).write_text("mine")

    def act(root: Path) -> int:
        publish(reports[made.after], root / "paper")
        return 0

    def earlier(root: Path) -> Iterator[str]:
        present = {name: (root / "paper" / name) for name in (*own, *(set(old) & set(new)))}
        for name, path in present.items():
            content = path.read_bytes() if path.is_file() else b""
            if name != files.MANIFEST and content not in (b"mine", old.get(name), new.get(name)):
                yield f"{name} is neither the old nor the new one"

    def final(root: Path) -> Iterator[str]:
        for name, content in new.items():
            if (root / "paper" / name).read_bytes() != content:
                yield f"{name} is not as it should be"
        yield from unlike(root / "paper", [*new, *own])

    return Scenario("tempo report --out", prepare, act, earlier, final, 0.5)


def at_once(number: int, act: Callable[[int], None]) -> list[int]:
    """The exit codes of processes that act at the same time, each told its number."""
    began = []
    for i in range(number):
        if not (process := os.fork()):
            code = RAW
            with suppress(BaseException):
                act(i)
                code = 0
            os._exit(code)
        began.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in began]


def writers(base: Path, number: int, records: int = 400) -> Tally:
    """Processes that append to one file."""
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    path = base / "cases.jsonl"

    def act(writer: int) -> None:
        for i in range(records):
            append_jsonl(path, [{"writer": writer, "i": i, "text": "x" * (i % 700)}])

    codes = at_once(number, act)
    found = Counter((record["writer"], record["i"]) for record in read_jsonl(path).records)
    expected = {(writer, i) for writer in range(number) for i in range(records)}
    problems: list[Problem] = [("lost", f"record {key}") for key in sorted(expected - set(found))]
    problems += [("silently wrong", f"{key} {n} times") for key, n in found.items() if n > 1]
    problems += [("raw exception", f"a writer ended with {code}") for code in codes if code]
    tally = Tally(f"{number} writers of one file", number * records)
    tally.add("at once", Ended(max(codes), ""), problems)
    return tally


def sharers(base: Path, number: int, rounds: int = 5) -> Tally:
    """Processes that fill one store with the same traces, and save them over one another's."""
    specs, expected = sweep()
    root, tally = base / "root", Tally(f"{number} sharers of one store")

    def act(_: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for trace in tempo.generate_batch(model(), specs, store=root):
                TraceStore(model(), root).put(trace)

    for _ in range(rounds):
        shutil.rmtree(base, ignore_errors=True)
        codes = at_once(number, act)
        problems: list[Problem] = [("raw exception", f"ended with {c}") for c in codes if c]
        problems += [("lost", what) for what in unlike_store(root, expected)]
        tally.add("at once", Ended(max(codes), ""), problems)
    return tally


def scenarios(base: Path) -> list[Scenario]:
    """Every scenario; base: a folder for what they compare with."""
    made = Sessions(base / "sessions")
    return [
        append_scenario(),
        save_scenario(),
        stream_scenario(),
        publish_scenario(made, base / "publication"),
        session_scenario(made),
    ]


def campaign(say: Callable[[str], None], kills: int, stride: int = 1) -> list[Tally]:
    """Every fault at every operation of every scenario, kills at random, and several at once."""
    base = Path(tempfile.mkdtemp(prefix="campaign-"))
    tallies = []
    try:
        every = scenarios(base)
        for scenario in every:
            tallies.append(at_every_operation(scenario, base / "try", FAULTS, stride, 1))
            say(f"{scenario.name}: {sum(tallies[-1].tries.values())} tries")
        for scenario in every:
            tallies.append(at_random(scenario, base / "try", -(-kills // len(every))))
            say(f"{scenario.name}: {tallies[-1].ended['killed']} kills at random")
        for number in (2, 4):
            tallies += [writers(base / "try", number), sharers(base / "try", number)]
    finally:
        files.remove(base)
    return tallies
