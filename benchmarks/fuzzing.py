"""Everything that is read from disk, damaged and forged at random: nothing lost, nothing silent.

Four kinds: one flipped bit in a record or array; a record of the wrong make whose checksum fits; a
YAML file of any make; arrays and suites of any make. Each case has a number, and from it alone it
can be made again: `python -m benchmarks.fuzzing bits 17`. `make campaign` runs all of them.
"""

from __future__ import annotations

import copy
import io
import json
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

import tempo
from tempo import wheels
from tempo.errors import TempoError
from tempo.harness.config import StudyConfig
from tempo.harness.expectations import Expectations
from tempo.harness.prompts import read_suite
from tempo.harness.store import Store
from tempo.parsing import CHECKSUM, parse_yaml, seal
from tempo.records import append_jsonl, plain, read_findings, read_jsonl
from tempo.reporting import figures
from tempo.reporting.publish import publish
from tempo.reporting.report import Section, Session, TestRow, read_report, write_section
from tempo.reporting.report import write_session as write_report
from tempo.spec import RunSpec, load_yaml
from tempo.trace import Trace, load_trace
from tempo.trace import _sha256 as hash_of

SLOW = 5.0  # seconds of the processor: no small file may take longer
HASH = "0" * 64


@dataclass
class Counts:
    """How a kind of case ended.

    cases: how many there were. refused: an error in words. told: the damaged part was named and the
    rest kept. harmless: what was read is what was written. accepted: within all bounds.
    lost: whole parts that were not read. wrong: other content, without a word. raw: an exception
    that is none of tempo's. slow: more than SLOW seconds. left_over: files outside their folder.
    failures: the numbers of the cases that ended in one of the last five, and how.
    """

    cases: int = 0
    refused: int = 0
    told: int = 0
    harmless: int = 0
    accepted: int = 0
    lost: int = 0
    wrong: int = 0
    raw: int = 0
    slow: int = 0
    left_over: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)


class Outcome(NamedTuple):
    """How one case ended, as the name of a field of `Counts`, and what was said."""

    how: str
    said: str = ""


def fuzz(
    flips: int = 5000, malformed: int = 400, yamls: int = 200, files: int = 200
) -> dict[str, Counts]:
    """The counts of each kind, over so many cases each."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        return {
            "bit flips": _counted(bench.flipped, range(flips)),
            "malformed records": _counted(bench.malformed, range(malformed)),
            "YAML": _counted(bench.any_yaml, range(yamls)),
            "arrays and suites": _counted(bench.any_file, range(files)),
        }


def _counted(case: Callable[[int], Outcome], numbers: range) -> Counts:
    counts = Counts()
    for number in numbers:
        outcome = timed(case, number)
        counts.cases += 1
        setattr(counts, outcome.how, getattr(counts, outcome.how) + 1)
        if outcome.how in ("lost", "wrong", "raw", "slow", "left_over"):
            counts.failures.append((number, f"{outcome.how}: {outcome.said}"))
    return counts


def timed(case: Callable[[int], Outcome], number: int) -> Outcome:
    """The case's outcome; an exception of anybody else's, or too much time, is one too."""
    began = time.process_time()
    try:
        outcome = case(number)
    except TempoError as error:
        outcome = _refused(error)
    except Exception as error:
        outcome = Outcome("raw", f"{type(error).__name__}: {error}"[:300])
    seconds = time.process_time() - began
    return outcome if seconds < SLOW else Outcome("slow", f"{seconds:.1f} s, {outcome}")


def _refused(error: TempoError) -> Outcome:
    if "\n" in str(error).replace("\n  ", " "):  # several problems of a spec stand on lines
        return Outcome("raw", f"more than a line: {error}")
    return Outcome("refused", str(error))


class Target(NamedTuple):
    """A file to damage, and how its content is read: what was read, and what was told."""

    path: Path
    read: Callable[[], tuple[Any, list[str]]]


class Bench:
    """A folder of everything that tempo reads, made once; each case damages one file of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results = folder / "inside", folder / "inside/results"
        self.results.mkdir(parents=True)
        self.store = Store(self.results / "exp", {"model": "tiny"})
        self.store.arrays("weights", values=np.arange(40.0).reshape(5, 8))
        self.store.json("log", {"runs": [{"text": "[ cat]"}]})
        cases = [{"key": f"{i:024x}", "prompt": f"p{i}", "case": {"gap": i / 7}} for i in range(12)]
        append_jsonl(self.results / "exp/cases.jsonl", cases)
        findings = [finding(i).record() for i in range(14)]
        append_jsonl(self.results / "findings.jsonl", findings)
        picture = figures.bars({"a": [0.5, 1.0]}, ["one", "two"], "t", "x", "y", "c")
        section = Section("exp", "A study", "exp", "tiny", 12, (picture,), folder="exp")
        write_section(self.results, section)
        tests = (TestRow("test_a", "passed", "SUPPORTED", 0.5),)
        session = Session("tiny", {"Model": "tiny"}, None, "12 prompts", tests=tests)
        write_report(self.results, session)
        lm = tempo.load_model("tiny")
        settings: dict[str, Any] = {"threshold": 0.05, "max_steps": 3, "capture": ("logits", "kv")}
        self.trace = tempo.generate(lm, "The cat", **settings).save(self.folder / "trace")
        self.cache = self.folder / "cache"
        self.cache.mkdir()
        (self.cache / "model.safetensors").write_bytes(bytes(range(256)) * 4)
        kept = {"model.safetensors": wheels._sha256(self.cache / "model.safetensors")}
        record = seal({"name": "a", "gguf_sha256": HASH, "rope_theta": 1e4, "sha256": kept})
        (self.cache / wheels.RECORD).write_text(json.dumps(record, indent=2))
        self.targets = list(self._targets())
        self.whole = [target.read()[0] for target in self.targets]
        self.outside = self._outside()

    def _targets(self) -> Iterator[Target]:
        results = self.results
        cases, found = results / "exp/cases.jsonl", results / "findings.jsonl"
        yield Target(cases, lambda: tuple(read_jsonl(cases)))  # type: ignore[arg-type]
        yield Target(found, self._findings)
        for name in ("report.json", "exp/report.json"):
            yield Target(results / name, self._report)
        for name in ("trace.json", "arrays.npz"):
            yield Target(self.trace / name, lambda: (_content(load_trace(self.trace)), []))
        yield Target(results / "exp/log.json", lambda: (self.store.load_json("log"), []))
        yield Target(results / "exp/weights.npz", self._arrays)
        for name in (wheels.RECORD, "model.safetensors"):
            yield Target(self.cache / name, self._cached)

    def _findings(self) -> tuple[Any, list[str]]:
        found, damaged = read_findings(self.results / "findings.jsonl")
        return [plain(f.record()) for f in found], damaged

    def _report(self) -> tuple[Any, list[str]]:
        report = read_report(self.results)
        content = {name: value for name, value in vars(report).items() if name != "damaged"}
        # NaN stands for what could not be computed, and is unlike itself
        return [repr(content)], list(report.damaged)

    def _arrays(self) -> tuple[Any, list[str]]:
        # as a session does: the case's record says which bytes belong to it
        if self.store.sha256("weights.npz") != self.store.written["weights.npz"]:
            return [], ["weights.npz is of another run"]
        return [self.store.load("weights")["values"].tolist()], []

    def _cached(self) -> tuple[Any, list[str]]:
        wheels._check_folder("a", HASH, self.cache)
        return wheels.read_conversion(self.cache), []

    def _outside(self) -> set[Path]:
        inside = self.folder
        return {path for path in inside.parent.rglob("*") if not path.is_relative_to(inside)}

    def flipped(self, number: int) -> Outcome:
        """One bit of one file is flipped."""
        rng = random.Random(f"bits {number}")
        which = rng.randrange(len(self.targets))
        target, whole = self.targets[which], self.whole[which]
        content = target.path.read_bytes()
        at = rng.randrange(len(content))
        damaged = bytearray(content)
        damaged[at] ^= 1 << rng.randrange(8)
        target.path.write_bytes(damaged)
        try:
            read, told = target.read()
            if read == whole:
                return Outcome("told" if told else "harmless")
            if not told:
                return Outcome("wrong", f"{target.path.name} byte {at}")
            return _kept(read, whole, told)
        finally:
            target.path.write_bytes(content)

    def malformed(self, number: int) -> Outcome:
        """One value of a record is what it cannot be; the checksum fits."""
        rng = random.Random(f"malformed {number}")
        records = [target for target in self.targets if target.path.suffix != ".npz"]
        target = rng.choice([t for t in records if t.path.suffix != ".safetensors"])
        content = target.path.read_text()
        lines = content.splitlines() if target.path.suffix == ".jsonl" else [content]
        which = rng.randrange(len(lines))
        record = json.loads(lines[which])
        record.pop(CHECKSUM)
        what = mutate(record, rng)
        try:
            lines[which] = json.dumps(seal(record))
        except ValueError:  # of infinity or half a character: as it stands, then
            lines[which] = json.dumps(record)
        target.path.write_text("\n".join(lines))
        try:
            _, told = target.read()
            if told:
                return Outcome("told", told[0])
            self._use(target.path)
            if self._outside() != self.outside:
                return Outcome("left_over", what)
            return Outcome("accepted", what)
        finally:
            target.path.write_text(content)

    def _use(self, path: Path) -> None:
        """What follows a reading: a publication, or a replay. Fails if that is not sound."""
        if path.is_relative_to(self.results):
            out = self.folder / "out"
            publish([read_report(self.results)], out)
            page = (out / "findings.html").read_text(encoding="utf-8")
            shutil.rmtree(out)
            for planted in ("<script>alert", "<img src=x"):
                assert planted not in page, "markup of a record came alive"
        if path.is_relative_to(self.trace):
            trace = load_trace(self.trace)
            assert repr(trace) and trace.text
            assert len(trace.prompt_tokens) + sum(trace.widths) == trace.num_slots
            trace.spec.but(replay=trace)

    def any_yaml(self, number: int) -> Outcome:
        """A YAML file, read as each of the things that YAML stands for here."""
        rng = random.Random(f"yaml {number}")
        text = any_yaml(rng)
        path = self.folder / "any.yaml"
        path.write_bytes(text.encode(errors="surrogatepass"))
        outcomes = []
        kinds: list[Callable[[], Any]] = [
            lambda: RunSpec.from_yaml(path),
            lambda: load_yaml(StudyConfig, path),
            lambda: load_yaml(Expectations, path),
            lambda: read_suite(str(path)),
            lambda: _same_as_pyyaml(text),
        ]
        for read in kinds:
            outcome = timed(lambda _, read=read: read() or Outcome("accepted"), number)
            outcomes.append(outcome if isinstance(outcome, Outcome) else Outcome("accepted"))
        bad = [o for o in outcomes if o.how in ("raw", "slow", "wrong")]
        return bad[0] if bad else min(outcomes, key=lambda o: o.how)

    def any_file(self, number: int) -> Outcome:
        """The arrays of a trace, whose hash fits, or a suite of prompts, with noise in it."""
        rng = random.Random(f"files {number}")
        if rng.random() < 0.5:
            name = rng.choice(sorted(SUITES))
            path = self.folder / name
            path.write_bytes(_noisy(SUITES[name], rng))
            suite = read_suite(str(path))
            assert all(prompt.text.encode() for prompt in suite.prompts)
            return Outcome("accepted", name)
        arrays, record = self.trace / "arrays.npz", self.trace / "trace.json"
        kept = arrays.read_bytes(), record.read_bytes()
        try:
            arrays.write_bytes(_any_arrays(kept[0], rng))
            sealed = json.loads(kept[1]) | {"sha256": hash_of(arrays)}
            record.write_text(json.dumps(seal(sealed)))
            self._use(arrays)
            return Outcome("accepted", "arrays")
        finally:
            arrays.write_bytes(kept[0])
            record.write_bytes(kept[1])


SUITES = {
    "a.jsonl": b'{"prompt": "Es war", "category": "x"}\n{"prompt": "Der Hund"}\n',
    "a.csv": b'category,prompt\nx,Es war\ny,"Der ""Hund"""\n',
    "a.txt": "Es war einmal\nDer Hund läuft\n".encode(),
    "b.jsonl": b'{"prompt": ' + b"[" * 5000 + b"\n",
    "c.jsonl": b'{"prompt": "\\ud800"}\n{"prompt": "a", "prompt": "b"}\n',
}


def _noisy(content: bytes, rng: random.Random) -> bytes:
    noisy = bytearray(content)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(noisy))
        noisy[at : at + rng.randrange(2)] = rng.choice(
            (b"\0", b'"', b"\n", b"\r", b"\xff", b",", b"{", b"\\", b"9" * 5000, b"NaN", b"")
        )
    return bytes(noisy)


def _any_arrays(content: bytes, rng: random.Random) -> bytes:
    """Arrays with noise in their archive, cut short, or that claim what they do not hold."""
    kind = rng.randrange(4)
    if kind == 0:
        noisy = bytearray(content)
        for _ in range(rng.randrange(1, 5)):
            noisy[rng.randrange(len(noisy))] = rng.randrange(256)
        return bytes(noisy)
    if kind == 1:
        return content[: rng.randrange(len(content))]
    with np.load(io.BytesIO(content)) as stored:
        arrays = {name: stored[name] for name in stored.files}
    name = rng.choice(sorted(arrays))
    if kind == 2:
        changed: list[Any] = [arrays[name].astype("f8"), arrays[name][:-1], arrays[name][None]]
        changed += [-arrays[name] - 1, np.array("text"), np.array([{}], dtype=object)]
        arrays[name] = rng.choice(changed)
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as out:
        header = (
            f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10 ** rng.randrange(13)},)}}"
        )
        header = header.ljust(117) + "\n"
        out.writestr(f"{name}.npy", b"\x93NUMPY\x01\x00\x76\x00" + header.encode() + bytes(400))
    return file.getvalue()


def _kept(read: Any, whole: Any, told: list[str]) -> Outcome:
    """Of a list of records at most two are missing: a flipped line break joins two."""
    if not isinstance(whole, list) or len(whole) < 2:
        return Outcome("told", told[0])
    if any(record not in whole for record in read):
        return Outcome("wrong", told[0])
    return Outcome("told" if len(read) >= len(whole) - 2 else "lost", told[0])


def _content(trace: Trace) -> list[Any]:
    arrays = {name: array.tobytes() for name, array in trace._arrays().items()}
    return [{**trace._record(), "arrays": arrays}]


def finding(number: int) -> Any:
    """A finding about claim `number`."""
    from tempo.claims import Claim, judge

    claim = Claim(
        id=f"exp.claim-{number}",
        statement="a",
        statistic="b",
        values=float,
        test="greater",
        refuted_by="c",
        control=lambda case: 0.0,
        control_statement="d",
        margin=0.1,
    )
    context = {"experiment": "exp", "config": "exp", "model": "tiny", "n_prompts": 12}
    rng = np.random.default_rng(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return judge(claim, list(rng.normal(0.3, 0.5, 12)), context)


NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -5, 17, 1.5, -0.0, 1e308, float("inf"), float("nan"), 10**40),
    *("", "abc", "NaN", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "../../../x"),
    *("/etc/passwd", "a\0b", "\ud800", "x" * 5000, "\u202e", "a\nb", "-1", "1e999"),
    *([], {}, [[]], {"a": {}}, [None], ["abc"], [-1], list(range(300))),
)


def mutate(record: dict[str, Any], rng: random.Random) -> str:
    """Change one thing of a record, in place; says what."""
    path: list[Any] = []
    place: Any = record
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.7:
            path.append(key)
            place = place[key]
            continue
        break
    path.append(key)
    how = rng.randrange(5)
    if how == 0:
        del place[key]
    elif how == 1 and isinstance(place, list):
        place.insert(key, copy.deepcopy(place[key]))
    elif how == 1:
        place["unknown"] = rng.choice(NASTY)
    elif how == 2 and isinstance(place[key], int | float):
        place[key] = rng.choice((-place[key] - 1, place[key] * 1e6 + 1, str(place[key])))
    elif how == 3:
        deep: Any = 0
        for _ in range(rng.choice((5, 60, 500))):
            deep = [deep]
        place[key] = deep
    else:
        place[key] = copy.deepcopy(rng.choice(NASTY))
    return f"{'/'.join(map(str, path))}, way {how}"


SCALARS = (
    *("a", "1", "-5", "0.1", "1e-3", "010", "0x1F", "1_000", "1:0", "yes", "no", "on", "true"),
    *("null", "~", ".inf", ".nan", "2024-01-01", "9" * 5000, "1e999", "''", '""', '"\\ud800"'),
    *("'it''s'", '"\\x00"', "!!int '3'", "!!python/name:os.system", "*a", "&a b", "|\n  text", ">"),
    *("<<", "self", "\u202e", "a: b", "- a", "%", "@", "`", "x" * 2000, "\t", "? x", "{", "}", "["),
)
KEYS = (
    *("prompt", "threshold", "max_steps", "visibility", "capture", "replay", "experiment", "suite"),
    *("results", "model", "families", "version", "prompts", "language", "self", "cls", "kind"),
    *("__class__", "model_config", "<<", "1", "true", "", "? ", "*a", "prompt"),
)
BOMBS = (
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n"
        for a, b in zip("abcdefg", "bcdefgh", strict=True)
    )
    + "prompt: *h\n",
    "prompt: " + "[" * 2000,
    "prompt: " + "[" * 2000 + "]" * 2000,
    "prompt: " + "{a: " * 2000,
    "- " * 3000 + "x",
    "prompt: &a [*a]\n",
    "prompt: " + "9" * 5000 + "\n",
    "self: 1\nprompt: a\n",
    "prompt: a\nprompt: b\n",
    "prompt: a\n---\nprompt: b\n",
    "prompt: a\nmax_steps: 010\n",
    "prompt: a\nmax_steps: 1:0\n",
    "prompt: a\nthreshold: 1e-3\n",
    "? [a, b]\n: c\n",
    "\ufeffprompt: a\n",
    "prompt: \ud800\n",
    "prompt: a\x00b\n",
    "!!python/object/apply:os.system ['true']\n",
    "",
    "# nothing\n",
)


def any_yaml(rng: random.Random) -> str:
    """A YAML text: one of those that once did harm, a random one, or a sound one with noise."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(BOMBS)
    if kind == 1:
        return _block(rng, 0)
    sound = RunSpec(prompt="The cat", threshold=0.05, replay=[[1, 2], [3]]).to_yaml()
    if kind == 2:
        sound = "experiment: a\nprompt: The cat\nsuite: [a, b]\nmax_steps: 3\n"
    noisy = list(sound)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(noisy))
        noisy[at] = rng.choice([*"\n\t :-[]{}&*!|>'\"%@`#,?~<0159aé\0\u2028\ud800", ""])
    return "".join(noisy)


def _block(rng: random.Random, depth: int) -> str:
    lines = []
    for _ in range(rng.randrange(1, 5)):
        value = rng.choice(SCALARS)
        if depth < 4 and rng.random() < 0.3:
            inner = _block(rng, depth + 1)
            value = "\n" + "".join(f"  {line}\n" for line in inner.splitlines())
        lines.append(f"{rng.choice(KEYS)}: {value}\n" if rng.random() < 0.8 else f"- {value}\n")
    return "".join(lines)


def _same_as_pyyaml(text: str) -> Outcome:
    """Whether what is taken is what PyYAML reads, but for the differences of `_Yaml12`."""
    try:
        ours = parse_yaml(text)
    except ValueError as error:
        return Outcome("refused", str(error))
    theirs = yaml.load(text, Loader=_Yaml12)
    same = repr(theirs) == repr(ours)
    return Outcome("accepted") if same else Outcome("wrong", f"{text!r:.80} as {ours!r:.80}")


class _Yaml12(yaml.SafeLoader):
    """PyYAML without dates and merging, with floats like 1e-3, and with keys that are text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 -- PyYAML's own name for it
        first: [pair for pair in pairs if not pair[0].endswith((":timestamp", ":merge"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _mapping(loader: Any, node: Any) -> dict[str, Any]:
    return {key.value: loader.construct_object(value, deep=True) for key, value in node.value}


_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
_Yaml12.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Yaml12.add_constructor("tag:yaml.org,2002:map", _mapping)


def main() -> int:
    """Run one case again (`bits 17`), or all of them and print the counts."""
    if len(sys.argv) == 3:
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder))
            case = {"bits": bench.flipped, "malformed": bench.malformed, "yaml": bench.any_yaml}
            case["files"] = bench.any_file
            print(case[sys.argv[1]](int(sys.argv[2])))
        return 0
    failed = 0
    for kind, counts in fuzz().items():
        print(kind, counts)
        failed += len(counts.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
