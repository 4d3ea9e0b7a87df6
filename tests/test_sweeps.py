"""tempo.stream over many runs: shared passes, rows by memory, arrays on disk, and stored traces."""

import gc
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

import tempo
from tempo import capture, engine
from tempo.cache import Prompts
from tempo.capture import needed_bytes
from tempo.errors import MemoryBudgetError, TraceError
from tempo.spec import CAPTURES
from tempo.store import TraceStore
from tests.checks import same_runs
from tests.test_trace import differences
from tests.tiny_models import llama, mistral

PROMPT, OTHER = "The cat sat on the", "A dog"
EVERYTHING = CAPTURES


@pytest.fixture
def forwarded(monkeypatch):
    """The number of tokens of each forward pass so far."""
    found, original = [], engine._pass_context

    def spied(*args):
        context = original(*args)
        found.append(len(context.rows))
        return context

    monkeypatch.setattr(engine, "_pass_context", spied)
    return found


def modes(prompt=PROMPT, **settings):
    """One run for each visibility."""
    common = {"threshold": 0.03, "max_steps": 5, "stop_at_eos": False, "capture": EVERYTHING}
    return [
        tempo.RunSpec(prompt=prompt, visibility=visibility, **common | settings)
        for visibility in ("isolated", "visible", "causal")
    ]


def but_for_time(one, other):
    """What differs between two traces, apart from the seconds they took."""
    return [name for name in differences(one, other) if not name.startswith("seconds")]


def test_modes_share_passes_until_the_first_wide_set(tiny, forwarded):
    runs = tempo.generate_batch(tiny, modes())
    first = next(k for k, width in enumerate(runs[0].widths) if width > 1)
    num_prompt = len(runs[0].prompt_tokens)
    alike = runs[0].widths[:first]
    widths = np.array([run.widths for run in runs])
    apart = widths[:, first:].sum(axis=0).tolist()
    assert forwarded == [num_prompt, *alike, *apart]
    assert apart[0] == 3 * runs[0].widths[first], (
        "the set is the same, but its members see each other or not"
    )


@pytest.mark.parametrize("lm", [llama(), mistral()], ids=["llama", "sliding window"])
def test_a_prompt_is_forwarded_once_for_several_calls(lm, forwarded):
    prompt, longer = [3, 14, 15, 9, 26, 5], [3, 14, 15, 9, 8, 40, 7]
    specs = [tempo.RunSpec(prompt=text, replay=[[7, 8], [9]]) for text in (prompt, longer)]
    alone = [tempo.generate_batch(lm, [spec])[0] for spec in specs]
    assert forwarded == [6, 3, 7, 3]
    prompts = Prompts(2**20)
    for spec, expected in zip([*specs, *specs], [*alone, *alone], strict=True):
        ((_, trace),) = tempo.stream(lm, [spec], prompts=prompts)
        for one, other in zip(trace.steps, expected.steps, strict=True):
            assert np.abs(one.distribution - other.distribution).max() < 1e-5
    # of the longer one only what follows the four tokens that both have
    assert forwarded[4:] == [6, 3, 3, 3, 3, 3]


def test_prompts_that_do_not_fit_are_forwarded_in_every_call(tiny, forwarded):
    """So that the calls for two modes make the same passes."""
    spec, prompts = tempo.RunSpec(prompt=PROMPT, replay=[[65], [66]]), Prompts(1000)
    for prompt in (PROMPT, OTHER, PROMPT, OTHER):
        dict(tempo.stream(tiny, [spec.but(prompt=prompt)], prompts=prompts))
    assert forwarded == [len(PROMPT), 2, len(OTHER), 2] * 2
    assert prompts.num_bytes == 0


def test_keys_before_rotation_are_not_kept(tiny, forwarded):
    spec, prompts = tempo.RunSpec(prompt=PROMPT, replay=[[65], [66]], capture="kv"), Prompts(2**20)
    first, second = (dict(tempo.stream(tiny, [spec], prompts=prompts))[0] for _ in range(2))
    assert but_for_time(first, second) == []
    assert forwarded[:2] == forwarded[2:]


def test_runs_that_never_part_are_one(tiny, forwarded):
    runs = tempo.generate_batch(tiny, modes(threshold=1.0))
    assert forwarded == [len(runs[0].prompt_tokens), 1, 1, 1, 1, 1]


def test_runs_of_other_prompts_weights_or_positions_share_nothing_they_must_not(tiny, forwarded):
    spec = tempo.RunSpec(prompt=PROMPT, replay=[[65], [66]], capture="kv")
    half = {"replay_weights": [[1.0], [0.5]]}
    specs = [
        spec,
        spec.but(prompt=OTHER),
        # the same as the first, because no set is wide
        spec.but(positions="sequential"),
        spec.but(**half),
        # its own key weighs half
        spec.but(**half, visibility="visible"),
        spec.but(replay_positions=[[20], [21]]),
    ]
    tempo.generate_batch(tiny, specs)
    assert forwarded == [len(tiny.encode(PROMPT)) + len(tiny.encode(OTHER)), 2 * 5]


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_prompt_is_forwarded_once_however_many_runs_have_it(tiny, forwarded, rows):
    """Runs that enter later begin with the keys that an earlier one left, in any row."""
    num_prompt = len(tiny.encode(PROMPT))
    specs = [
        tempo.RunSpec(prompt=PROMPT, replay=[[65 + i, 70], [66]], capture=("kv", "logits"))
        for i in range(5)
    ]
    runs = tempo.generate_batch(tiny, specs, max_rows=rows)
    assert sum(forwarded) == num_prompt + 5 * 3
    for run in runs:
        (alone,) = tempo.generate_batch(tiny, [run.spec])
        same_runs(run, alone, f"{rows} rows", rounded=True)
    forwarded.clear()
    mixed = [spec.but(prompt=prompt) for prompt in (PROMPT, OTHER) for spec in specs]
    for run in tempo.generate_batch(tiny, mixed[::-1], max_rows=rows):
        (alone,) = tempo.generate_batch(tiny, [run.spec])
        same_runs(run, alone, f"{rows} rows, two prompts", rounded=True)


def test_a_run_with_keys_captured_does_not_begin_as_one_without(tiny, forwarded):
    spec = tempo.RunSpec(prompt=PROMPT, replay=[[65, 70], [66]])
    specs = [spec.but(capture="logits"), spec.but(capture="kv")]
    plain, rich = tempo.generate_batch(tiny, specs, max_rows=1)
    assert sum(forwarded) == 2 * (len(plain.prompt_tokens) + 3)
    assert rich.raw_keys.shape == rich.keys.shape


@pytest.mark.parametrize("replay", [False, True])
def test_shared_passes_give_what_single_runs_give(tiny, replay):
    specs = [*modes(), *modes(OTHER), *modes(capture=())]
    if replay:
        specs = [spec.but(replay=tempo.generate_batch(tiny, [spec])[0]) for spec in specs]
    for spec, run in zip(specs, tempo.generate_batch(tiny, specs), strict=True):
        (alone,) = tempo.generate_batch(tiny, [spec])
        same_runs(run, alone, f"{spec.visibility}, {spec.prompt!r}", rounded=True)


def test_as_many_runs_at_once_as_the_memory_allows(tiny, forwarded):
    spec = tempo.RunSpec(prompt=PROMPT, max_width=1, max_steps=2, stop_at_eos=False)
    num_prompt = len(tiny.encode(PROMPT))
    others = ("The dog sat on the", "The cow sat on the", "The pig sat on the")
    specs = [spec, *(spec.but(prompt=prompt) for prompt in others)]
    for rows, expected in (
        (1, [num_prompt, 1] * 4),
        (2, [2 * num_prompt, 2] * 2),
        (4, [4 * num_prompt, 4]),
    ):
        forwarded.clear()
        enough = needed_bytes(tiny, specs[:rows], [num_prompt] * rows, rows)
        budget = sum(enough.values())
        assert len(list(tempo.stream(tiny, specs, memory_budget=budget))) == 4
        assert forwarded == expected
    one = sum(needed_bytes(tiny, [spec], [num_prompt]).values())
    with pytest.raises(MemoryBudgetError, match=f"1 run.s. may need .*{one} bytes"):
        list(tempo.stream(tiny, specs, memory_budget=one - 1))


def test_a_stream_that_is_over_holds_no_keys(tiny, monkeypatch):
    made, original = [], engine.SlotCache

    def kept(*args):
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(engine, "SlotCache", kept)
    tempo.generate(tiny, PROMPT, max_steps=2)
    stopped = tempo.stream(tiny, modes())
    next(stopped)
    assert made[1].layers
    stopped.close()
    assert not any(cache.layers or cache.step for cache in made)


def test_a_stream_holds_no_run_that_is_over(tiny):
    prompts = (PROMPT, OTHER, "So", "It was")
    specs = [spec.but(prompt=prompt) for prompt in prompts for spec in modes()]
    seen = []
    for _, trace in tempo.stream(tiny, specs, max_rows=2):
        seen.append(weakref.ref(trace.steps[0].logits))
        del trace
        gc.collect()
        assert sum(array() is not None for array in seen) <= 2, (
            "more than the runs that ended in the last pass"
        )


def test_spooled_arrays_are_those_of_memory_to_the_bit(tiny, tmp_path):
    runs = tempo.generate_batch(tiny, modes(), spool=tmp_path / "new")
    for plain, spooled in zip(tempo.generate_batch(tiny, modes()), runs, strict=True):
        assert but_for_time(plain, spooled) == []
        for step in spooled.steps:
            arrays = (step.distribution, step.logits, step.attention)
            assert all(isinstance(array, np.memmap) for array in arrays)
    assert list((tmp_path / "new").iterdir()) == [], (
        "the file has no name, so that nothing is left behind"
    )
    assert differences(tempo.load_trace(runs[0].save(tmp_path / "saved")), runs[0]) == []


def test_what_is_spooled_needs_no_memory(tiny, tmp_path):
    kept = ("attention", "logits")
    spec = tempo.RunSpec(prompt=PROMPT, max_width=3, threshold=0.02, max_steps=6, capture=kept)
    prompts = [len(tiny.encode(PROMPT))]
    least = sum(needed_bytes(tiny, [spec], prompts, spool=tmp_path).values())
    assert least < sum(needed_bytes(tiny, [spec], prompts).values())
    with pytest.raises(MemoryBudgetError, match=r"spool=FOLDER"):
        tempo.generate_batch(tiny, [spec], memory_budget=least)
    (run,) = tempo.generate_batch(tiny, [spec], memory_budget=least, spool=tmp_path)
    assert run.widths
    with pytest.raises(MemoryBudgetError, match="masks"):
        tempo.generate_batch(tiny, [spec], memory_budget=least - 1, spool=tmp_path)


def test_a_disk_without_room_is_refused_before_and_reported_during_a_run(
    tiny, tmp_path, monkeypatch, forwarded
):
    monkeypatch.setattr(capture.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(MemoryBudgetError, match=r"may spool .* where 0.0 MiB are free"):
        tempo.generate(tiny, PROMPT, spool=tmp_path)
    assert not forwarded
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    for place in ("spool", "store"):
        with pytest.raises(TraceError, match="file cannot be used as a folder"):
            tempo.generate(tiny, PROMPT, **{place: tmp_path / "file"})
    assert not forwarded, "no run is begun whose result has no place"

    def full_disk(**_):
        return open("/dev/full", "wb", buffering=0)

    monkeypatch.setattr(capture.tempfile, "TemporaryFile", full_disk)
    with pytest.raises(TraceError, match="cannot spool .* No space left on device"):
        tempo.generate(tiny, PROMPT, spool=tmp_path)


def test_a_known_run_runs_no_model(tiny, tmp_path, forwarded):
    first = tempo.generate_batch(tiny, modes(), store=tmp_path)
    forwarded.clear()
    again = tempo.generate_batch(tiny, modes(), store=tmp_path)
    assert not forwarded
    assert [differences(a, b) for a, b in zip(first, again, strict=True)] == [[]] * 3
    settings = modes()[0].model_dump(exclude={"prompt"})
    alone = tempo.generate(tiny, PROMPT, store=tmp_path, **settings)
    assert alone.sets == first[0].sets
    assert not forwarded


def test_an_interrupted_sweep_goes_on(tiny, tmp_path, forwarded):
    specs = [
        tempo.RunSpec(prompt=prompt, max_width=1, max_steps=2, stop_at_eos=False)
        for prompt in (PROMPT, OTHER, "So")
    ]
    begun = tempo.stream(tiny, specs, max_rows=1, store=tmp_path)
    next(begun)
    begun.close()
    forwarded.clear()
    rest = tempo.stream(tiny, specs, max_rows=1, store=tmp_path)
    assert sorted(index for index, _ in rest) == [0, 1, 2]
    assert len(forwarded) == 2 * 2


def test_another_spec_model_or_code_is_another_run(tiny, tmp_path, monkeypatch):
    spec = modes()[0]
    place = TraceStore(tiny, tmp_path).place(spec)
    assert TraceStore(tiny, tmp_path / "x").place(spec).name == place.name
    assert TraceStore(tiny, tmp_path).place(spec.but(capture=())) != place
    with tempo.load_model("tiny", dtype="float64") as other:
        assert TraceStore(other, tmp_path).place(spec) != place
    monkeypatch.setattr("tempo.identity.JUDGING", {"engine.py"})
    assert TraceStore(tiny, tmp_path).place(spec) != place


def test_a_damaged_trace_is_computed_anew_with_a_warning(tiny, tmp_path, forwarded):
    spec = modes()[0]
    (run,) = tempo.generate_batch(tiny, [spec], store=tmp_path)
    arrays = TraceStore(tiny, tmp_path).place(spec) / "arrays.npz"
    data = bytearray(arrays.read_bytes())
    data[len(data) // 2] ^= 1
    arrays.write_bytes(data)
    forwarded.clear()
    with pytest.warns(UserWarning, match="computed anew: .* is damaged"):
        (again,) = tempo.generate_batch(tiny, [spec], store=tmp_path)
    assert forwarded
    assert again.sets == run.sets
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tempo.generate_batch(tiny, [spec], store=tmp_path)


def test_spool_and_store_together(tiny, tmp_path):
    first = tempo.generate_batch(tiny, modes(), spool=tmp_path / "spool", store=tmp_path / "store")
    again = tempo.generate_batch(tiny, modes(), spool=tmp_path / "spool", store=tmp_path / "store")
    assert [differences(a, b) for a, b in zip(first, again, strict=True)] == [[]] * 3
    del first, again
    gc.collect()


def first_of_stream(*args, **kwargs):
    return next(tempo.stream(*args, **kwargs))


@pytest.mark.parametrize(
    ("specs", "rows", "message"),
    [
        ([tempo.RunSpec(prompt=PROMPT)], 0, "max_rows is 0; expected"),
        ([tempo.RunSpec(prompt=PROMPT)], 1.5, "max_rows is 1.5; expected"),
        (
            [tempo.RunSpec(prompt=PROMPT), PROMPT],
            2,
            "'The cat sat on the'; expected a list of tempo.RunSpec",
        ),
        (tempo.RunSpec(prompt=PROMPT), 2, "expected a list of tempo.RunSpec"),
    ],
)
def test_what_is_no_list_of_runs_or_number_of_rows_is_refused_and_not_waited_for(
    tiny, specs, rows, message
):
    for attempt in (tempo.generate_batch, first_of_stream):
        with pytest.raises(tempo.SpecError, match=message):
            attempt(tiny, specs, max_rows=rows)


def test_specs_may_come_from_a_generator(tiny):
    assert len(tempo.generate_batch(tiny, (spec for spec in modes()))) == 3
    assert len(list(tempo.stream(tiny, (spec for spec in modes())))) == 3


def test_generate_says_how_to_run_a_spec(tiny):
    with pytest.raises(tempo.SpecError, match="generate_batch"):
        tempo.generate(tiny, tempo.RunSpec(prompt=PROMPT))
