"""What is read from disk is read within bounds: each thing that once did harm is one line now."""

import json
import time
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import tempo
from benchmarks.fuzzing import BOMBS
from tempo import arrays
from tempo.arrays import read_arrays
from tempo.errors import SpecError, TempoError, TraceError
from tempo.harness.config import StudyConfig
from tempo.harness.expectations import Expectations
from tempo.harness.prompts import read_suite
from tempo.parsing import dump_yaml, parse_json, parse_yaml, read_bytes, seal, unseal
from tempo.records import read_findings, read_jsonl
from tempo.spec import RunSpec, load_yaml
from tempo.trace import load_trace

# YAML


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x [b]\nprompt: *x", r"line 2: \*x is an alias"),
        ("prompt: " + "[" * 2000, "line 1: it is nested more than 40 deep"),
        ("prompt: " + "9" * 5000, "line 1: an integer of 5000 digits"),
        ("prompt: a\nprompt: b", "line 2: the key 'prompt' occurs twice"),
        ("prompt: a\nmax_steps: 010", "line 2: 010 is read as different things"),
        ("prompt: a\nmax_steps: 1:0", "line 2: 1:0 is read as different things"),
        ("prompt: a\nmax_steps: 0x10", "line 2: 0x10 is read as different things"),
        ("prompt: a\nmax_steps: 1_0", "line 2: 1_0 is read as different things"),
        ("prompt: a\nstop_at_eos: no", "line 2: no is read .* plain true or false"),
        ("prompt: a\nthreshold: 1e999", "line 2: 1e999 is too large"),
        ("prompt: a\n---\nprompt: b", "line 2: a second document"),
        ("prompt: !!str a", "line 1: the tag .* is not taken"),
        ('prompt: "\\ud800"', "line 1: half a character"),
        ("self: 1\nprompt: a", "unknown key 'self'"),
        ("? [a]\n: b", "line 1: a key is no text"),
    ],
)
def test_yaml_that_people_or_programs_read_differently_is_refused_in_one_line(tmp_path, text, said):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=said) as error:
        RunSpec.from_yaml(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_number_may_be_written_with_an_exponent():
    assert RunSpec.from_yaml("prompt: a\nthreshold: 1e-3").threshold == 1e-3
    assert yaml.safe_load("a: 1e-3") == {"a": "1e-3"}  # which is why there is a loader of our own


@pytest.mark.parametrize("text", BOMBS, ids=range(len(BOMBS)))
def test_a_few_bytes_take_no_time_and_no_memory(tmp_path, text):
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    began = time.process_time()
    tracemalloc.start()
    with suppress(TempoError):
        load_yaml(StudyConfig, path)
    with suppress(TempoError):
        load_yaml(Expectations, path)
    with suppress(TempoError):
        read_suite(str(path))
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert time.process_time() - began < 5


PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=20)
PLAIN |= st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(
    ["010", "1e-3", "no", "1:0", "~", ".5", "<<"]
)
TREES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)


@given(TREES)
@settings(max_examples=200, deadline=None)
def test_what_is_written_as_yaml_comes_back(value):
    # C1 controls and the like PyYAML escapes only if asked to write ASCII
    assert parse_yaml(dump_yaml(value)) == value


# JSON and its checksums


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested more than 40 deep"),
        ("[" * 50 + "]" * 50, "nested more than 40 deep"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ("1" * 5000, "limit"),
        (b"\xff", "no UTF-8"),
        ("{", "it is no JSON"),
    ],
)
def test_json_is_read_within_bounds(text, said):
    with pytest.raises(ValueError, match=said):
        parse_json(text)


@given(st.dictionaries(st.text(), PLAIN, min_size=1), st.data())
@settings(max_examples=200, deadline=None)
def test_a_record_with_any_other_value_does_not_fit_its_checksum(record, data):
    record.pop("checksum", None)
    sealed = json.loads(json.dumps(seal(record)))
    assert unseal(sealed) == record
    key = data.draw(st.sampled_from([*sealed]))
    other = data.draw(PLAIN)
    if json.dumps(sealed[key]) != json.dumps(other):
        with pytest.raises(ValueError, match="checksum"):
            unseal(sealed | {key: other})


# files


@pytest.mark.parametrize(
    "read",
    [
        load_trace,
        read_findings,
        lambda name: read_jsonl(Path(name)),
        lambda name: read_suite(f"{name}.txt"),
        lambda name: RunSpec.from_yaml(Path(name)),
        lambda name: tempo.generate_batch(tempo.load_model("tiny"), [], store=name),
    ],
)
@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_a_name_that_no_file_can_have_is_refused_in_words(read, name):
    with pytest.raises(TempoError) as error:
        read(name)
    assert "\n" not in str(error.value)


def test_what_never_ends_is_not_read():
    with pytest.raises(ValueError, match="no regular file"):
        read_bytes("/dev/zero")


def test_too_large_a_file_is_not_read(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(1 << 34)  # sixteen gigabytes that no disk holds
    with pytest.raises(TraceError, match="expected at most"):
        read_jsonl(tmp_path / "a")


# arrays


def header(shape, kind="<f4"):
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00\x76\x00" + text.encode()


def test_arrays_that_unpack_to_gigabytes_are_not_unpacked(tmp_path, monkeypatch):
    """Of three gigabytes, to be quick, where half of one is the most."""
    monkeypatch.setattr(arrays, "MOST_UNPACKED", 1 << 29)
    path = tmp_path / "a.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w", force_zip64=True) as member,
    ):
        member.write(header((3 << 28,)))
        for _ in range(3):
            member.write(bytes(1 << 30))
    assert path.stat().st_size < 20e6
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"unpacks to 3.2 GB, expected at most 0.5"):
        read_arrays(path)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (header((10**12,)) + bytes(400), "more than it holds"),
        (header((-1,)) + bytes(400), "claims the shape"),
        (header((200,)) + bytes(400), "more than it holds"),
        (header((1,), "|O") + bytes(400), "Python objects"),
        (header("(" * 200), "no whole archive|Cannot parse|shape"),
        (b"nonsense", "magic"),
        (b"", "no whole archive|magic|reading"),
    ],
    ids=range(7),
)
def test_an_array_holds_what_its_header_claims(tmp_path, content, said):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content)
    with pytest.raises(ValueError, match=said):
        read_arrays(tmp_path / "a.npz")


def test_an_encrypted_archive_and_two_arrays_of_one_name_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(3))
    assert read_arrays(path)["a"].tolist() == [0, 1, 2]
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag of an encrypted entry
    path.write_bytes(content)
    with pytest.raises(ValueError, match="'a.npy' is encrypted"):
        read_arrays(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header((1,)) + bytes(4))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", header((1,)) + bytes(4))
    with pytest.raises(ValueError, match="is there twice"):
        read_arrays(path)
