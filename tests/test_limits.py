"""Limits are known before a run: memory of a pass, files of a spool, folders that take no file."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import tempo
from tempo import capture, engine, run, trace
from tempo.capture import MAX_NEW_TOKENS, needed_bytes
from tempo.errors import MemoryBudgetError, SpecError, TraceError
from tempo.spec import RunSpec
from tests import tiny_models

resource = pytest.importorskip("resource")
PROMPT = "The cat"
LONG = [ord("a") + i % 20 for i in range(480)]
GIB = 2**30
# Measured with these cases: 0.2 to 0.65 of what is computed. A formula that forgot masks or logits
# would be under what is measured; one this far above it would refuse what fits.
LOOSEST = 10
ROUNDING = 1e-4  # between runs whose passes have other shapes, on these models


def wide(prompt, **settings):
    """A spec whose sets are as wide as they may be."""
    return {"prompt": prompt, "threshold": 1e-9, "stop_at_eos": False} | settings


WORKLOADS = {
    "one run of wide sets": ([wide(LONG, max_width=200, max_steps=3)], 1),
    "sixteen runs": ([wide(LONG[i:], max_width=200, max_steps=3) for i in range(16)], 16),
    "bias": (
        [wide(LONG[i:], max_width=100, visibility="visible", weighting="count") for i in range(4)],
        4,
    ),
    "attention and logits": (
        [
            wide(LONG[i:], max_width=100, max_steps=8, capture=["attention", "logits"])
            for i in range(4)
        ],
        4,
    ),
    "siblings and keys": (
        [wide(LONG[i:], max_width=200, max_steps=3, capture=["siblings", "kv"]) for i in range(8)],
        8,
    ),
    "isolated layers": (
        [
            wide(
                LONG[i:],
                max_width=200,
                max_steps=3,
                visibility="visible",
                isolated_layers=[0, 1],
                isolated_mass="self",
            )
            for i in range(8)
        ],
        8,
    ),
    "replays": ([{"prompt": LONG[:5], "replay": [list(range(200))] * 12}] * 2, 2),
}
REAL_WORKLOADS = {
    "a long prompt": ([wide(list(range(1000, 1900)), max_steps=2, max_width=60)], 1),
    "a wide set": ([wide(PROMPT, max_steps=3, max_width=600, visibility="visible")], 1),
}


def measured(model, workloads):
    """{name: (computed, measured)} bytes of the workloads, in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.peak", model],
        input=json.dumps(list(workloads.values())),
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    return dict(zip(workloads, json.loads(found.stdout), strict=True))


@pytest.mark.parametrize(
    ("model", "workloads"), [("tiny", WORKLOADS), ("smollm2-135m", REAL_WORKLOADS)]
)
def test_no_run_takes_more_memory_than_was_computed_before_it(model, workloads):
    for name, (computed, peak) in measured(model, workloads).items():
        assert peak <= computed, name
        assert computed <= LOOSEST * peak, f"{name}: computed {computed}, measured {peak}"


@pytest.mark.parametrize("part", ["cache", "logits of a pass", "masks of a pass"])
def test_what_one_pass_takes_is_most_of_what_wide_sets_need(tiny, part):
    # the control of the bound: without any one of these it would not hold
    specs, rows = WORKLOADS["sixteen runs"]
    specs = [RunSpec(**settings) for settings in specs]
    sizes = needed_bytes(tiny, specs, [len(spec.prompt) for spec in specs], rows)
    assert sizes[part] > sizes["distribution"]


def remedies(message):
    """(name, value) of each setting that a refusal names."""
    return re.findall(r"(max_width|max_steps)=(\d+)", message)


def test_a_pass_over_a_whole_vocabulary_is_refused_and_its_remedies_work(real):
    spec = RunSpec(prompt=PROMPT, threshold=1e-9, max_steps=2)
    with pytest.raises(MemoryBudgetError, match="logits of a pass") as refused:
        tempo.generate_batch(real, [spec], memory_budget=5 * GIB)
    needed = int(re.search(r"\((\d+) bytes", str(refused.value))[1])
    assert needed > 12 * GIB
    for name, value in remedies(str(refused.value)):
        smaller = spec.but(**{name: int(value)})
        assert sum(needed_bytes(real, [smaller], [2]).values()) <= 5 * GIB
    assert remedies(str(refused.value))


def test_more_steps_than_the_context_has_are_no_question_of_memory_and_no_remedy(tiny):
    many = RunSpec(prompt=PROMPT, max_steps=20_000)
    with pytest.raises(SpecError, match="positions"):
        tempo.generate_batch(tiny, [many], memory_budget=1)
    # as many steps as there are, all of which would fit if there were so many
    spec = RunSpec(prompt=PROMPT, max_steps=tiny.context_length - 7, max_width=1)
    budget = sum(needed_bytes(tiny, [spec], [7]).values())
    with pytest.raises(MemoryBudgetError) as refused:
        capture.check_budget(tiny, [spec.but(max_width=2)], [7], budget)
    steps = [int(value) for name, value in remedies(str(refused.value)) if name == "max_steps"]
    assert steps
    assert steps[0] + 7 <= tiny.context_length
    last = tiny.context_length - 500
    budget = sum(needed_bytes(tiny, [spec.but(max_steps=last + 5)], [500]).values())
    with pytest.raises(MemoryBudgetError) as refused:
        capture.check_budget(tiny, [spec.but(max_steps=20_000)], [500], budget)
    assert f"max_steps={last};" in str(refused.value)


def test_a_budget_that_no_machine_has_is_no_remedy(tiny, monkeypatch):
    spec = RunSpec(prompt=PROMPT)
    needed = sum(needed_bytes(tiny, [spec], [7]).values())
    for free, is_named in ((needed, True), (needed - 1, False)):
        memory = SimpleNamespace(available=free)
        monkeypatch.setattr(capture.psutil, "virtual_memory", lambda memory=memory: memory)
        with pytest.raises(MemoryBudgetError) as refused:
            capture.check_budget(tiny, [spec], [7], needed - 1)
        assert (f"memory_budget={needed}" in str(refused.value)) == is_named


def arrays_of(found):
    """All arrays of a trace by name."""
    return found._arrays()


@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.mistral, tiny_models.gpt_oss])
@pytest.mark.parametrize("replayed", [False, True])
def test_wide_sets_and_long_prompts_in_parts_give_what_one_pass_gives(make, replayed, monkeypatch):
    base = RunSpec(
        prompt=list(range(2, 13)),
        threshold=1e-3,
        max_width=9,
        max_steps=3,
        stop_at_eos=False,
        capture=("attention", "siblings", "logits", "kv"),
    )
    modes = ("isolated", "visible", "causal")
    specs = [
        base.but(visibility=mode, weighting=weighting, positions=positions)
        for mode in modes
        for weighting, positions in (("none", "shared"), ("probability", "sequential"))
    ]
    specs += [base.but(capture="siblings", visibility=mode) for mode in modes]
    specs += [base.but(visibility="visible", isolated_layers=(0, 1), isolated_mass="self")]
    specs += [base.but(weighting="posterior"), base.but(prune=0.05, prune_by="attention")]
    lm = make()
    if replayed:
        specs = [spec.but(replay=tempo.generate_batch(lm, [spec])[0].sets) for spec in specs]
    whole = tempo.generate_batch(lm, specs)
    passes, original = [], engine._forward

    def counted(lm, cache, runs):
        passes.append(sum(group[0].num_new for group in engine._same_so_far(runs)))
        original(lm, cache, runs)

    monkeypatch.setattr(engine, "_forward", counted)
    for module in (engine, run):
        monkeypatch.setattr(module, "MAX_NEW_TOKENS", 4)
    in_parts = tempo.generate_batch(lm, specs)
    assert max(max(found.widths) for found in in_parts) == 9
    assert set(passes) == {1, 3, 4, 9}  # 9: a set whose members all see each other is not parted
    for one, other in zip(whole, in_parts, strict=True):
        assert one.sets == other.sets
        assert arrays_of(one).keys() == arrays_of(other).keys()
        for name, array in arrays_of(one).items():
            assert np.abs(array - arrays_of(other)[name]).max() < ROUNDING, name


def test_parts_that_saw_each_other_would_be_seen(monkeypatch):
    # the control: a mask that forgets the set's earlier part
    spec = RunSpec(prompt=[2, 3, 4], threshold=1e-3, max_width=9, max_steps=3, capture="logits")
    lm = tiny_models.llama()
    (whole,) = tempo.generate_batch(lm, [spec])
    for module in (engine, run):
        monkeypatch.setattr(module, "MAX_NEW_TOKENS", 4)
    start = property(lambda layout: layout.start)
    monkeypatch.setattr(engine.Run.__init__.__globals__["Layout"], "first_sibling", start)
    (wrong,) = tempo.generate_batch(lm, [spec.but(replay=whole)])
    gaps = [
        np.abs(one.logits - other.logits).max()
        for one, other in zip(whole.steps, wrong.steps, strict=True)
    ]
    assert max(gaps) > ROUNDING


def test_a_long_replay_takes_several_passes_of_whole_sets(tiny, monkeypatch):
    sizes, original = [], engine._forward

    def counted(lm, cache, runs):
        sizes.append(sum(run.num_new for run in runs))
        original(lm, cache, runs)

    monkeypatch.setattr(engine, "_forward", counted)
    replay = [[65 + i for i in range(100)]] * 15
    (found,) = tempo.generate_batch(tiny, [RunSpec(prompt=PROMPT, replay=replay)])
    assert found.widths == [100] * 15
    assert sizes == [7, 1000, 500]
    assert max(sizes) <= MAX_NEW_TOKENS


def test_logits_that_are_kept_hold_no_others(tiny):
    specs = [
        RunSpec(prompt=PROMPT, capture="logits"),
        *[RunSpec(prompt="A dog", threshold=0.01)] * 3,
    ]
    kept = tempo.generate_batch(tiny, specs)[0].steps[1].logits
    while kept.base is not None and isinstance(kept.base, np.ndarray):
        kept = kept.base
    base = kept.base
    held = kept.nbytes if base is None else base.untyped_storage().nbytes()
    assert held == kept.nbytes


@pytest.fixture
def few_files():
    """As `ulimit -n 256` would."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    yield 256
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_files_of_a_spool_are_counted_before_the_run(tiny, tmp_path, few_files, monkeypatch):
    specs = [RunSpec(prompt=PROMPT, max_steps=1, max_width=1)] * 300
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forward", lambda *_: pytest.fail("the model ran"))
        with pytest.raises(TraceError, match=r"300 runs .* keep 300 files open") as refused:
            tempo.generate_batch(tiny, specs, spool=tmp_path)
    # the limit that it names is enough
    limit = int(re.search(r"ulimit -n (\d+)", str(refused.value))[1])
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    assert len(tempo.generate_batch(tiny, specs, spool=tmp_path)) == 300


def test_a_stream_whose_traces_go_needs_few_files_and_says_why_it_stops_otherwise(
    tiny, tmp_path, few_files
):
    specs = [RunSpec(prompt=PROMPT, max_steps=1, max_width=1)] * 300
    assert sum(1 for _ in tempo.stream(tiny, specs, spool=tmp_path)) == 300
    with pytest.raises(TraceError, match="let go of traces"):
        list(tempo.stream(tiny, specs, spool=tmp_path))


@pytest.mark.parametrize("place", ["spool", "store"])
def test_a_folder_that_takes_no_file_is_found_before_the_run(tiny, tmp_path, monkeypatch, place):
    def refuse(*args, **settings):
        raise OSError(30, "Read-only file system")

    spec, kept = RunSpec(prompt=PROMPT, max_steps=1), tmp_path / "kept"
    tempo.generate_batch(tiny, [spec], **{place: kept})
    monkeypatch.setattr(trace.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(engine, "_forward", lambda *_: pytest.fail("the model ran"))
    new = spec.but(max_steps=2)
    with pytest.raises(TraceError, match=r"kept \(Read-only file system\); name a folder"):
        tempo.generate_batch(tiny, [new], **{place: kept})
    if place == "store":  # from which a trace can still be read
        assert tempo.generate_batch(tiny, [spec], store=kept)[0].widths


@pytest.mark.parametrize("place", ["spool", "store"])
def test_a_folder_of_the_system_is_refused(tiny, place):
    with pytest.raises(TraceError, match=r"/proc/self"):
        tempo.generate(tiny, PROMPT, max_steps=1, **{place: "/proc/self"})
