"""Whatever is read from disk, damaged or forged: it is refused in words, or named and left out.

The long runs are those of `make campaign`. Each test here has a twin with a reader that believes
what it reads, and there the same cases are found.
"""

import json
import random

import pytest
import yaml

from benchmarks import fuzzing
from benchmarks.fuzzing import Bench, any_yaml, timed
from tempo import parsing, wheels
from tempo.errors import ModelError
from tempo.reporting.figures import drawing
from tests.gguf_files import write_gguf

pytestmark = pytest.mark.usefixtures("one_thread")
FLIPS, MALFORMED, YAMLS, FILES, HEADERS = 1200, 40, 200, 250, 100


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


def counted(case, number):
    return fuzzing._counted(case, range(number))


@pytest.mark.parametrize(
    ("kind", "number"),
    [("flipped", FLIPS), ("malformed", MALFORMED), ("any_yaml", YAMLS), ("any_file", FILES)],
)
def test_nothing_is_lost_nothing_is_silently_wrong_and_no_exception_is_raw(bench, kind, number):
    counts = counted(getattr(bench, kind), number)
    assert counts.failures == []
    assert counts.cases == number
    assert counts.refused + counts.told > number / 4  # else nothing was put to the test
    assert all(
        target.read() == (whole, [])
        for target, whole in zip(bench.targets, bench.whole, strict=True)
    )


def test_a_reader_that_believes_what_it_reads_is_found_out(tmp_path, monkeypatch):
    """Without checksums numbers change silently; without schemas nonsense is taken."""
    monkeypatch.setattr(parsing, "_checksum", lambda record: "0")
    counts = counted(Bench(tmp_path).flipped, 100)
    assert counts.wrong > 5


def test_a_sanitiser_that_keeps_everything_is_found_out(bench, monkeypatch):
    """A picture that holds a script would come alive in the page."""
    path = bench.results / "exp/report.json"
    whole = path.read_text()
    record = json.loads(whole)
    picture = record["pictures"][0]
    picture["svg"] = picture["svg"].replace("</svg>", "<script>alert(1)</script></svg>")
    path.write_text(json.dumps(parsing.seal(record)))
    try:
        bench._use(path)
        monkeypatch.setattr(drawing, "clean_svg", lambda svg: svg)
        with pytest.raises(AssertionError, match="came alive"):
            bench._use(path)
    finally:
        path.write_text(whole)


def test_another_yaml_loader_is_found_out(bench, monkeypatch):
    """PyYAML's own: aliases, duplicate keys and octal numbers are taken, and 1e-3 is a text."""
    monkeypatch.setattr("tempo.spec.parse_yaml", yaml.safe_load)
    monkeypatch.setattr(fuzzing, "parse_yaml", lambda text: yaml.load(text, yaml.BaseLoader))
    # those that take many seconds are left out
    quick = [n for n in range(300) if "*g" not in any_yaml(random.Random(f"yaml {n}"))]
    found = [timed(bench.any_yaml, number) for number in quick[:40]]
    assert {outcome.how for outcome in found} >= {"raw", "wrong"}


def test_a_damaged_gguf_header_is_refused_in_words(tiny, tmp_path):
    """Its sizes are read before anything is believed."""
    whole = write_gguf(tmp_path / "whole.gguf", tiny).read_bytes()
    path = tmp_path / "damaged.gguf"
    said: list[str] = []
    for number in range(HEADERS):
        rng = random.Random(f"gguf {number}")
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(4000)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            wheels._read_header(path)
        except ModelError as error:
            said.append(str(error))
    assert len(said) > HEADERS / 10
    assert "\n" not in "".join(said)
