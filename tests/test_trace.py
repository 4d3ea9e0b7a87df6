"""tempo.trace: what is saved comes back to the bit; a failed save loses nothing that was there."""

import errno
import json
import os
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tempo
from tempo.errors import SpecError, TempoError, TraceError
from tempo.parsing import seal
from tempo.spec import CAPTURES, RunSpec
from tempo.trace import FORMAT, STEP_ARRAYS, Step, Trace, load_trace, slot_steps

SUBSETS = [names for count in range(len(CAPTURES) + 1) for names in combinations(CAPTURES, count)]
ARRAYS = ("slot_token", "slot_position", "slot_step", "keys", "values", "raw_keys")
FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


def differences(one, other):
    """Names of all fields in which two traces differ by as much as a bit."""

    def bits(array):
        return None if array is None else (array.dtype.str, array.shape, array.tobytes())

    found = [name for name in ARRAYS if bits(getattr(one, name)) != bits(getattr(other, name))]
    plain = ("spec", "prompt_tokens", "stop_reason", "seconds", "peak_bytes", "provenance")
    found += [name for name in plain if getattr(one, name) != getattr(other, name)]
    if len(one.steps) != len(other.steps):
        return [*found, "steps"]
    for k, (a, b) in enumerate(zip(one.steps, other.steps, strict=True)):
        found += [
            f"{name}_{k}"
            for name in STEP_ARRAYS
            if bits(getattr(a, name)) != bits(getattr(b, name))
        ]
        names = ("tokens", "probabilities", "position", "slots", "texts", "ended", "dropped")
        names = (*names, "seconds")
        found += [f"{name}_{k}" for name in names if getattr(a, name) != getattr(b, name)]
    return found


def make_trace(sets=((" cat",), ("'s", ".")), ended=((), ()), num_prompt=2, **changes):
    """A trace written by hand: token ids are counted up from 10."""
    widths = [len(texts) for texts in sets]
    ends = np.cumsum([num_prompt, *widths])
    steps = [
        Step(
            tokens=list(range(10 * (k + 1), 10 * (k + 1) + len(texts))),
            probabilities=[0.1 + 0.2, 1e-45, 1 / 3][: len(texts)],
            position=num_prompt + k,
            slots=list(range(int(ends[k]), int(ends[k + 1]))),
            texts=list(texts),
            ended=list(ended[k]),
            distribution=np.linspace(0, 1, 7, dtype=np.float32),
        )
        for k, texts in enumerate(sets)
    ]
    num_slots = int(ends[-1])
    prompt = list(range(1, num_prompt + 1))
    fields = {
        "spec": RunSpec(prompt=prompt),
        "prompt_tokens": prompt,
        "steps": steps,
        "slot_token": np.array([*prompt, *(token for step in steps for token in step.tokens)]),
        "slot_position": np.arange(num_slots),
        "slot_step": slot_steps(num_prompt, widths),
        "stop_reason": "max_steps",
        "seconds": 0.1,
        "peak_bytes": 10,
        "provenance": {"model": "by hand", "versions": {"numpy": "2"}},
    }
    return Trace(**{**fields, **changes})


@pytest.fixture(scope="module")
def traces(tiny):
    """A trace of the tiny model for every combination of captures."""
    specs = [
        RunSpec(
            prompt="The cat \u2028\x00",
            threshold=0.03,
            max_steps=3,
            capture=names,
            visibility="visible",
        )
        for names in SUBSETS
    ]
    return dict(zip(SUBSETS, tempo.generate_batch(tiny, specs), strict=True))


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_a_loaded_trace_is_the_saved_one_to_the_bit(traces, tmp_path, names):
    trace = traces[names]
    assert max(trace.widths) > 1
    assert trace.save(tmp_path / "trace") == tmp_path / "trace"
    loaded = load_trace(tmp_path / "trace")
    assert differences(trace, loaded) == []
    assert (loaded.text, loaded.widths, loaded.sets, loaded.num_slots) == (
        trace.text,
        trace.widths,
        trace.sets,
        trace.num_slots,
    )
    captured = {
        name
        for name in ("logits", "attention", "siblings", "residual")
        if getattr(loaded.steps[0], name) is not None
    }
    assert captured | ({"kv"} if loaded.keys is not None else set()) == set(names)
    for path in (tmp_path, tmp_path / "trace"):
        assert sorted(entry.name for entry in path.iterdir()) in (
            ["trace"],
            ["arrays.npz", "trace.json"],
        )


def test_the_comparison_sees_one_bit_of_any_array(traces, tmp_path):
    trace = traces[CAPTURES]
    loaded = load_trace(trace.save(tmp_path / "trace"))
    for name in ARRAYS:
        changed = getattr(trace, name).copy()
        changed.view(np.uint8).flat[-1] ^= 1
        assert differences(replace(trace, **{name: changed}), loaded) == [name]
    for name in STEP_ARRAYS:
        changed = getattr(trace.steps[1], name).copy()
        changed.view(np.uint8).flat[0] ^= 1
        steps = [trace.steps[0], replace(trace.steps[1], **{name: changed}), *trace.steps[2:]]
        assert differences(replace(trace, steps=steps), loaded) == [f"{name}_1"]
    assert differences(replace(trace, seconds=np.nextafter(trace.seconds, 9)), loaded) == [
        "seconds"
    ]


def linked():
    """A trace by hand of three sets, with links and probabilities that are easily multiplied."""
    trace = make_trace(sets=(("a", "b"), ("c", "d"), ("e",)), ended=((), (), ()))
    links = [np.array([[0.9, 0.2], [0.1, 0.8]]), np.array([[0.5], [0.5]]), None]
    probabilities = [[0.5, 0.25], [0.25, 0.25], [0.125]]
    steps = [
        replace(step, links=link, probabilities=chosen)
        for step, link, chosen in zip(trace.steps, links, probabilities, strict=True)
    ]
    return replace(trace, steps=steps)


def test_the_best_path_goes_back_from_the_most_probable_last_member():
    trace = linked()
    assert trace.best_path == [10, 20, 30]
    assert trace.best_text == "ace"
    other = [trace.steps[0], replace(trace.steps[1], links=np.array([[0.4], [0.6]]))]
    assert replace(trace, steps=[*other, trace.steps[2]]).best_text == "bde"
    assert [trace.parents(1), trace.parents(2)] == [[0, 1], [0]]


def test_paths_have_shares_and_the_probability_of_their_text():
    paths = linked().paths()
    assert [path.text for path in paths] == ["ace", "bde", "ade", "bce"]
    assert np.allclose([path.share for path in paths], [0.45, 0.4, 0.1, 0.05])
    together = 0.75 * 0.5 * 0.125
    for path in paths:
        assert np.isclose(np.exp(path.log_probability), path.share * together)
    assert linked().paths(2) == paths[:2]
    assert (paths[1].members, paths[1].tokens) == ([1, 1, 0], [11, 21, 30])


def test_of_one_set_every_member_is_a_path(tiny):
    trace = tempo.generate(tiny, "The cat", threshold=0.03, max_steps=1)
    assert trace.widths[0] > 1
    assert [path.members for path in trace.paths()] == [[i] for i in range(trace.widths[0])]
    for path, probability in zip(trace.paths(), trace.steps[0].probabilities, strict=True):
        assert np.isclose(np.exp(path.log_probability), probability)
    assert trace.best_path == trace.sets[0][:1]


@pytest.mark.parametrize("num_paths", [0, -1])
def test_no_number_of_paths_is_refused(num_paths):
    with pytest.raises(SpecError, match=f"num_paths is {num_paths}; expected how many paths"):
        linked().paths(num_paths)
    assert len(linked().paths(1)) == 1


@pytest.mark.parametrize("step", [-1, 0, 3])
def test_parents_are_refused_where_there_are_none(step):
    with pytest.raises(SpecError, match=f"step {step} has no set before it .*expected 1 to 2"):
        linked().parents(step)


@pytest.mark.parametrize("readout", ["mean_logits", "first", "last"])
def test_a_path_of_a_run_that_is_no_mixture_is_refused(tiny, readout):
    trace = tempo.generate(tiny, "The cat", threshold=0.03, max_steps=3, readout=readout)
    asked = (
        lambda: trace.best_path,
        lambda: trace.best_text,
        trace.paths,
        lambda: trace.parents(1),
    )
    for ask in asked:
        with pytest.raises(SpecError, match=f"readout '{readout}'.*with readout='mixture'"):
            ask()


def test_a_trace_that_was_saved_before_links_were_kept_says_so(tiny, tmp_path):
    trace = tempo.generate(tiny, "The cat", threshold=0.03, max_steps=3)
    steps = [replace(step, links=None) for step in trace.steps]
    folder = replace(trace, steps=steps).save(tmp_path / "trace")
    recorded = json.loads((folder / "trace.json").read_text())["steps"]
    for step in recorded:
        del step["dropped"]
    edit(folder, steps=recorded)
    loaded = load_trace(folder)
    assert loaded.sets == trace.sets
    assert [step.dropped for step in loaded.steps] == [[]] * 3
    with pytest.raises(SpecError, match="saved by an older tempo; run it again"):
        loaded.best_path  # noqa: B018


def test_what_was_dropped_is_saved(tiny, tmp_path):
    trace = tempo.generate(tiny, "The cat", threshold=0.03, max_steps=4, prune=0.9)
    assert any(step.dropped for step in trace.steps)
    loaded = load_trace(trace.save(tmp_path / "trace"))
    assert differences(trace, loaded) == []
    steps = [*trace.steps[:-1], replace(trace.steps[-1], dropped=[99])]
    assert differences(replace(trace, steps=steps), loaded) == [f"dropped_{len(steps) - 1}"]


def test_strange_numbers_and_texts_survive(tmp_path):
    values = np.array(
        [np.nan, -np.nan, np.inf, -0.0, 1e-45, np.finfo(np.float32).max], dtype=np.float32
    )
    trace = make_trace(sets=((" 'a\"\n", "\x00\u2028", "\ufffd日本😀"),), ended=((0,),))
    trace = replace(trace, steps=[replace(trace.steps[0], distribution=values)], seconds=1e-300)
    loaded = load_trace(trace.save(tmp_path / "trace"))
    assert differences(trace, loaded) == []
    zero = replace(trace, steps=[replace(trace.steps[0], distribution=np.abs(values))])
    assert differences(zero, loaded) == ["distribution_0"]


def test_a_trace_of_a_replay_comes_back_with_its_spec(tiny, tmp_path):
    trace = tempo.generate(tiny, [65, 66], replay=[[67, 68], [69]], capture="kv")
    loaded = load_trace(trace.save(tmp_path / "deep" / "er" / "trace"))
    assert loaded.spec == trace.spec
    assert loaded.spec.key() == trace.spec.key() != trace.spec.but(capture=()).key()
    assert loaded.stop_reason == "replay"


def test_saving_again_replaces_the_earlier_trace_whole(traces, tmp_path):
    folder = tmp_path / "trace"
    traces[CAPTURES].save(folder)
    traces[()].save(str(folder))
    assert differences(load_trace(folder), traces[()]) == []
    assert differences(load_trace(folder), traces[CAPTURES]) != []
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "trace").mkdir()
    assert differences(load_trace(make_trace().save(tmp_path / "trace")), make_trace()) == []


def test_a_folder_or_file_of_somebody_else_is_refused_and_untouched(tmp_path):
    folder, file = tmp_path / "thesis", tmp_path / "notes.txt"
    folder.mkdir()
    (folder / "chapter.tex").write_text("years of work")
    file.write_text("notes")
    for taken in (folder, file):
        with pytest.raises(
            TraceError, match="is not a saved trace; choose another folder"
        ) as error:
            make_trace().save(taken)
        assert str(taken) in str(error.value)
    assert (folder / "chapter.tex").read_text() == "years of work"
    assert file.read_text() == "notes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "thesis"]
    shutil.rmtree(folder)
    make_trace().save(folder)
    assert load_trace(folder).widths == [1, 2]


def test_a_folder_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TraceError, match="cannot write the trace"):
        make_trace().save(tmp_path / "file" / "trace")
    assert (tmp_path / "file").read_text() == "x"


def half_a_write(file, **arrays):
    file.write(b"PK\x03\x04 half of it")
    raise FULL_DISK


def full_disk(*args, **kwargs):
    raise FULL_DISK


def second_rename(source, target, original=os.replace):
    """The new arrays are there, and the record that names them cannot take its place."""
    if target.name == "trace.json":
        raise FULL_DISK
    return original(source, target)


# Every other operation fails in turn in tests/test_campaign.py.
FAULTS = {
    "arrays": (np, "savez", half_a_write),
    "record": (tempo.files, "write", full_disk),
    "any rename": (os, "replace", full_disk),
    "second rename": (os, "replace", second_rename),
    "lock": (tempo.files, "locked", full_disk),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_disk_leaves_the_earlier_trace_and_nothing_else(tmp_path, fault):
    folder = tmp_path / "trace"
    earlier, later = make_trace(), make_trace(seconds=0.2)
    earlier.save(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*FAULTS[fault])
        with pytest.raises(
            TraceError, match="No space left on device; nothing there was changed"
        ) as error:
            later.save(folder)
        assert str(folder) in str(error.value)
        assert isinstance(error.value.__cause__, OSError)
    assert differences(load_trace(folder), earlier) == []
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]
    later.save(folder)
    assert differences(load_trace(folder), earlier) == ["seconds"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_full_disk_leaves_no_part_of_a_first_trace(tmp_path, fault):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*FAULTS[fault])
        with pytest.raises(TraceError, match="No space left on device"):
            make_trace().save(tmp_path / "trace")
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_is_no_json_leaves_the_earlier_trace(tmp_path):
    make_trace().save(tmp_path / "trace")
    with pytest.raises(TypeError):
        make_trace(provenance={"model": object()}).save(tmp_path / "trace")
    assert differences(load_trace(tmp_path / "trace"), make_trace()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


def test_a_save_killed_between_arrays_and_record_is_no_trace_and_is_cleared(tmp_path):
    """Case 14: what is half there hides nothing, and the next save needs no advice."""
    folder = tmp_path / "trace"
    make_trace().save(folder)
    (folder / "arrays-2.npz").write_bytes(b"whole, but no record names it")
    assert differences(load_trace(folder), make_trace()) == []
    (folder / "trace.json").unlink()
    with pytest.raises(TraceError, match="no trace in"):
        load_trace(folder)
    later = make_trace(seconds=0.2)
    later.save(folder)
    assert differences(load_trace(folder), later) == []
    later.save(folder)
    assert len(list(folder.iterdir())) == 2


def test_saving_through_a_link_replaces_what_it_points_to(tmp_path):
    (tmp_path / "disk").mkdir()
    make_trace().save(tmp_path / "disk/trace")
    (tmp_path / "link").symlink_to(tmp_path / "disk/trace")
    later = make_trace(seconds=0.2)
    later.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert differences(load_trace(tmp_path / "disk/trace"), later) == []


def test_what_else_lies_in_a_traces_folder_stays(tmp_path):
    make_trace().save(tmp_path / "trace")
    (tmp_path / "trace/notes.txt").write_text("mine")
    make_trace(seconds=0.2).save(tmp_path / "trace")
    assert (tmp_path / "trace/notes.txt").read_text() == "mine"


def test_a_trace_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    folder = tmp_path / "trace"
    make_trace().save(folder)
    later, real, times = make_trace(seconds=0.2), tempo.trace._sha256, []

    def replaced_first(path):
        times.append(path.name)
        if len(times) == 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tempo.trace, "_sha256", real)
                later.save(folder)
        return real(path)

    monkeypatch.setattr(tempo.trace, "_sha256", replaced_first)
    assert differences(load_trace(folder), later) == []
    assert times == ["arrays.npz", "arrays-2.npz"]


def test_a_record_cannot_name_arrays_elsewhere(tmp_path):
    make_trace().save(tmp_path / "other")
    make_trace(seconds=0.2).save(tmp_path / "trace")
    edit(tmp_path / "trace", arrays="../other/arrays.npz")
    (tmp_path / "trace/arrays.npz").unlink()
    with pytest.raises(TraceError, match="no trace in"):
        load_trace(tmp_path / "trace")


@pytest.fixture(scope="module")
def saved(traces, tmp_path_factory):
    """A saved trace with everything captured; tests damage copies of it."""
    return traces[CAPTURES].save(tmp_path_factory.mktemp("saved") / "trace")


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def edit(folder, **changes):
    """Rewrite fields of the record and its checksum; a value of None removes the field."""
    record = json.loads((folder / "trace.json").read_text()) | changes
    record = {key: value for key, value in record.items() if value is not None}
    (folder / "trace.json").write_text(json.dumps(seal(record)))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_changed_byte_of_the_arrays_is_seen(saved, data):
    content = bytearray((saved / "arrays.npz").read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    damaged = saved.parent / "damaged"
    shutil.copytree(saved, damaged, dirs_exist_ok=True)
    assert load_trace(damaged).widths
    (damaged / "arrays.npz").write_bytes(content)
    with pytest.raises(TraceError, match="arrays.npz is damaged"):
        load_trace(damaged)


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_truncated_arrays_are_seen(copy, length):
    content = (copy / "arrays.npz").read_bytes()
    (copy / "arrays.npz").write_bytes(content[:length])
    with pytest.raises(TraceError, match="arrays.npz is damaged") as error:
        load_trace(copy)
    assert "run again" in str(error.value)
    (copy / "arrays.npz").write_bytes(content)
    assert load_trace(copy).widths


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b'{"format": 1', b"nonsense"])
def test_a_garbled_record_is_seen(copy, content):
    (copy / "trace.json").write_bytes(content)
    with pytest.raises(TraceError, match=r"trace\.json is damaged") as error:
        load_trace(copy)
    assert str(copy) in str(error.value)


@pytest.mark.parametrize(
    ("content", "seen"),
    [("[]", "'list'"), ("null", "'NoneType'"), ("{}", "None"), ('{"format": "1"}', "'1'")],
)
def test_a_record_of_another_kind_is_seen(copy, content, seen):
    (copy / "trace.json").write_text(content)
    with pytest.raises(TraceError, match=f"has trace format {seen}, this tempo reads {FORMAT}"):
        load_trace(copy)


@pytest.mark.parametrize("version", [FORMAT + 1, 0, True, "one"])
def test_another_format_is_refused_by_its_number(copy, version):
    edit(copy, format=version)
    with pytest.raises(
        TraceError, match=f"has trace format {version!r}, this tempo reads {FORMAT}"
    ):
        load_trace(copy)
    edit(copy, format=FORMAT)
    assert load_trace(copy).widths


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": None},
        {"steps": 3},
        {"steps": ["a"]},
        {"steps": [{}]},
        {"spec": None},
        {"spec": []},
        {"spec": {"prompt": ""}},
        {"spec": {"prompt": "a", "treshold": 1}},
        {"prompt_tokens": None},
        {"provenance": None},
    ],
    ids=str,
)
def test_a_record_that_lacks_a_part_is_not_a_whole_trace(copy, changes):
    edit(copy)
    assert load_trace(copy).widths
    edit(copy, **changes)
    with pytest.raises(TraceError, match="is not a whole trace"):
        load_trace(copy)


def test_a_record_without_its_hash_is_refused(copy):
    edit(copy, sha256=None)
    with pytest.raises(TraceError, match="is damaged"):
        load_trace(copy)


@pytest.mark.parametrize("name", ["arrays.npz", "trace.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(TraceError, match=f"no trace in .*No such file.*{name}"):
        load_trace(copy)


def test_a_place_without_a_trace_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path, tmp_path / "none", tmp_path / "file", str(tmp_path / "none")):
        with pytest.raises(TraceError, match="no trace in") as error:
            load_trace(place)
        assert str(place) in str(error.value)
        assert isinstance(error.value, TempoError)


def test_the_arrays_open_without_pickle_and_a_pickle_is_refused(copy):
    with np.load(copy / "arrays.npz", allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    assert all(array.dtype.kind in "if" for array in arrays.values())
    assert {"slot_token", "keys", "raw_keys", "distribution_0", "logits_0", "attention_0"} <= set(
        arrays
    )
    np.savez(copy / "arrays.npz", **{**arrays, "slot_token": np.array([{}], dtype=object)})
    edit(copy, sha256=tempo.trace._sha256(copy / "arrays.npz"))
    with pytest.raises(TraceError, match="holds Python objects"):
        load_trace(copy)


def test_arrays_that_are_missing_from_a_whole_file_are_seen(copy):
    with np.load(copy / "arrays.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    for missing in ("slot_step", "distribution_1"):
        np.savez(
            copy / "arrays.npz",
            **{name: array for name, array in arrays.items() if name != missing},
        )
        edit(copy, sha256=tempo.trace._sha256(copy / "arrays.npz"))
        with pytest.raises(TraceError, match="is not a whole trace"):
            load_trace(copy)
    np.savez(copy / "arrays.npz", **arrays)
    edit(copy, sha256=tempo.trace._sha256(copy / "arrays.npz"))
    assert load_trace(copy).widths


def test_text_shows_each_set_in_brackets_with_its_members_by_slashes():
    assert make_trace(sets=((" cat",), ("'s", "."))).text == "[ cat]['s/.]"
    trace = make_trace(sets=((" cat",), ("'s", "."), (" sat", " was")), ended=((), (), ()))
    assert trace.text == "[ cat]['s/.][ sat/ was]"
    assert replace(trace, steps=trace.steps[::-1]).text != trace.text
    assert replace(trace, steps=[]).text == ""


def test_widths_sets_and_ended_are_read_off_the_steps():
    trace = make_trace(sets=(("a",), ("b", "c"), ("d", "e", "f")), ended=((2,), (), (0, 2)))
    assert trace.widths == [1, 2, 3]
    assert trace.sets == [[10], [20, 21], [30, 31, 32]]
    assert trace.ended == [(0, 2), (2, 0), (2, 2)]
    assert trace.num_slots == 2 + 6
    assert make_trace().ended == []


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("The cat sat on the", "'The cat sat on the'"),
        ("x" * 28, f"'{'x' * 28}'"),
        ("x" * 100_000, f"'{'x' * 27}…'"),
        ("a\n\x1b[31m\u202e", r"'a\n\x1b[31m\u202e'"),
        ([5], "1 token id"),
        ([5] * 1000, "1000 token ids"),
    ],
    ids=["text", "just fits", "long", "hostile", "one id", "ids"],
)
def test_the_repr_of_a_trace_is_one_short_line(prompt, shown):
    trace = make_trace(spec=RunSpec(prompt=prompt, visibility="visible"))
    assert repr(trace) == f"<Trace {shown} + 2 sets, 5 slots, visible, by hand>"
    assert str(trace) == repr(trace)
    one = replace(
        trace, steps=trace.steps[:1], provenance={"model": "/a/long/path" * 9 + "/m\n.gguf"}
    )
    assert "+ 1 set, " in repr(one)
    assert repr(one).endswith(r"/long/path/m\n.gguf>")
    assert "unknown model" in repr(replace(trace, provenance={}))
    for each in (trace, one):
        assert "\n" not in repr(each)
        assert len(repr(each)) <= 100


def test_the_repr_of_a_step_is_one_short_line():
    trace = make_trace(
        sets=((" cat",), ("'s\n", "\u202e", "x" * 90), tuple("abcdefgh")), ended=[()] * 3
    )
    one, three, many = (
        replace(step, probabilities=[1 / 3, 0.25, 1e-9, 0.1] * 2) for step in trace.steps
    )
    one = replace(one, probabilities=one.probabilities[:1])
    three = replace(three, probabilities=three.probabilities[:3])
    assert repr(one) == "<Step [' cat' 0.33] at position 2>"
    shown = r"<Step [''s\n' 0.33, '\u202e' 0.25, 'xxxxxxxxxxx…' 1e-09] at position 3>"
    assert repr(three) == shown
    assert repr(many).endswith("'d' 0.1, 4 more] at position 4>")
    assert max(len(repr(step)) for step in (one, three, many)) <= 100


def test_the_repr_of_a_real_trace_shows_no_array(traces):
    for trace in traces.values():
        assert repr(trace).startswith(r"<Trace 'The cat \u2028\x00' + 3 sets, ")
        assert repr(trace).endswith(" slots, visible, tiny>")
        assert all(len(repr(step)) <= 100 for step in trace.steps)
        assert "array" not in repr(trace.steps)


def test_sets_are_copies_to_replay():
    trace = make_trace()
    trace.sets[0].append(99)
    assert trace.sets == [[10], [20, 21]]


@given(st.integers(1, 8), st.lists(st.integers(1, 5), max_size=6))
@settings(max_examples=60, deadline=None)
def test_slot_steps_are_minus_one_for_the_prompt_and_then_each_step_by_its_width(
    num_prompt, widths
):
    steps = slot_steps(num_prompt, widths)
    assert steps.dtype == np.int64
    assert steps.tolist() == [-1] * num_prompt + [
        k for k, width in enumerate(widths) for _ in range(width)
    ]
    assert slot_steps(num_prompt + 1, widths).tolist() != steps.tolist()


def test_slot_steps_are_those_of_the_layout(traces):
    for trace in traces.values():
        assert (
            trace.slot_step.tolist() == slot_steps(len(trace.prompt_tokens), trace.widths).tolist()
        )
        for k, step in enumerate(trace.steps):
            assert (trace.slot_step[step.slots] == k).all()
            assert trace.slot_token[step.slots].tolist() == step.tokens
