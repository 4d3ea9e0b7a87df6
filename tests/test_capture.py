"""tempo.capture: memory known to the byte before a run, refusals whose remedies work, raw keys."""

import itertools
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tempo
from tempo import capture, engine
from tempo.capture import (
    FREE_MEMORY_SHARE,
    check_budget,
    needed_bytes,
    raw_keys,
    trace_bytes,
    widest_set,
)
from tempo.errors import MemoryBudgetError, ModelError, TempoError
from tempo.selection import select
from tempo.spec import CAPTURES, RunSpec

PROMPT = "The cat"
EVERYTHING = CAPTURES
SUBSETS = [
    names for count in range(len(CAPTURES) + 1) for names in itertools.combinations(CAPTURES, count)
]


def nbytes(trace):
    """Bytes of the arrays that a trace really holds, by name.

    The cache holds keys and values in the model's float32.
    """
    held = {"distribution": sum(step.distribution.nbytes for step in trace.steps)}
    links = [step.links for step in trace.steps[:-1]]
    held["links"] = sum(array.nbytes for array in links if array is not None)
    for name in ("attention", "siblings", "logits", "residual"):
        arrays = [array for step in trace.steps if (array := getattr(step, name)) is not None]
        held |= {name: sum(array.nbytes for array in arrays)} if arrays else {}
    if trace.keys is not None:
        held["kv"] = trace.keys.nbytes + trace.values.nbytes + trace.raw_keys.nbytes
        held["cache"] = trace.keys.nbytes + trace.values.nbytes
    return held


@pytest.mark.parametrize(
    "spec",
    [
        {"threshold": 0.05, "max_steps": 4},
        {"threshold": 0.02, "max_steps": 3, "visibility": "visible", "weighting": "count"},
        {"threshold": 0.02, "max_steps": 2, "max_width": 2, "positions": "sequential"},
        {"threshold": 1.0, "max_steps": 1},
        {"threshold": 0.02, "max_steps": 3, "weighting": "posterior", "prune": 0.2},
        {"threshold": 0.02, "max_steps": 3, "readout": "mean_logits"},
        {"replay": [[65, 66, 67], [68], [69, 70]], "visibility": "causal"},
        {"replay": [[65]]},
    ],
    ids=str,
)
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_bytes_are_those_of_the_arrays_of_the_trace_exactly_and_by_name(tiny, spec, names):
    trace = tempo.generate(tiny, PROMPT, capture=names, **spec)
    sizes = trace_bytes(tiny, trace.spec, len(trace.prompt_tokens), trace.widths)
    held = nbytes(trace)
    assert {name: size for name, size in sizes.items() if name in held} == held
    assert set(sizes) == {"distribution", "links", "cache", *names}
    assert (sizes["links"] == 0) == (trace.spec.readout != "mixture" or len(trace.steps) == 1)
    assert trace.peak_bytes == sum(sizes.values())
    one_wider = [*trace.widths[:-1], trace.widths[-1] + 1]
    wider = trace_bytes(tiny, trace.spec, 7, one_wider)
    grows = set(sizes) - {"distribution"} - ({"links"} if not sizes["links"] else set())
    assert all((wider[name] > size) == (name in grows) for name, size in sizes.items())


def test_the_cache_counts_every_slot_whether_or_not_keys_are_kept(tiny):
    without = trace_bytes(tiny, RunSpec(prompt="a"), 5, [2, 3])
    kept = trace_bytes(tiny, RunSpec(prompt="a", capture="kv"), 5, [2, 3])
    assert without["cache"] == kept["cache"] == 3 * 2 * 10 * 2 * 16 * 4
    assert "kv" not in without
    assert without["cache"] < trace_bytes(tiny, RunSpec(prompt="a"), 6, [2, 3])["cache"]


def test_a_cache_of_half_precision_takes_half(tiny):
    names = ("vocab_size", "num_layers", "num_heads", "key_value_sizes", "residual_stream")
    shape = {name: getattr(tiny, name) for name in names}
    half = SimpleNamespace(dtype=torch.bfloat16, **shape)
    spec = RunSpec(prompt="a", capture=EVERYTHING)
    full, small = trace_bytes(tiny, spec, 5, [2, 3]), trace_bytes(half, spec, 5, [2, 3])
    assert full["cache"] == 2 * small["cache"]
    # traces are float32 whatever the model's dtype
    assert {**full, "cache": 0} == {**small, "cache": 0}


def test_bytes_of_a_replay_are_those_of_its_sets_and_of_a_free_run_those_of_the_widest(tiny):
    spec = RunSpec(prompt="a", threshold=0.2, max_steps=3, capture=EVERYTHING)
    assert trace_bytes(tiny, spec, 4) == trace_bytes(tiny, spec, 4, [5, 5, 5])
    assert trace_bytes(tiny, spec.but(max_width=2), 4) == trace_bytes(tiny, spec, 4, [2, 2, 2])
    replay = spec.but(replay=[[1, 2], [3], [4, 5, 6], [7]])
    assert trace_bytes(tiny, replay, 4) == trace_bytes(tiny, spec, 4, [2, 1, 3, 1])
    assert trace_bytes(tiny, replay, 4) != trace_bytes(tiny, spec, 4)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_bytes_are_the_sums_over_steps(widths, num_prompt):
    lm = SimpleNamespace(
        num_layers=2,
        num_heads=6,
        key_value_sizes=((3, 8, 8), (3, 8, 5)),
        vocab_size=50,
        dtype=torch.float32,
        residual_stream=SimpleNamespace(size=7),
    )
    sizes = trace_bytes(lm, RunSpec(prompt="a", capture=EVERYTHING), num_prompt, widths)
    slots = [num_prompt + sum(widths[: k + 1]) for k in range(len(widths))]
    assert sizes == {
        "attention": sum(2 * 6 * width * n * 4 for width, n in zip(widths, slots, strict=True)),
        "siblings": sum(2 * 6 * width * width * 4 for width in widths),
        "logits": sum(width * 50 * 4 for width in widths),
        "residual": sum(3 * width * 7 * 4 for width in widths),
        "kv": 3 * slots[-1] * (2 * 3 * 8 - 3) * 4,  # one layer's values are 3 shorter
        "distribution": len(widths) * 50 * 4,
        "links": sum(a * b * 4 for a, b in itertools.pairwise(widths)),
        "cache": 3 * slots[-1] * (2 * 2 * 8 - 3) * 4,
    }
    assert sizes["attention"] < sum(2 * 6 * width * (slots[-1] + 1) * 4 for width in widths)


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=60).filter(any),
    st.floats(1e-3, 1.0),
    st.integers(1, 60),
)
@settings(max_examples=200, deadline=None)
def test_no_distribution_has_a_wider_set_than_the_bound(counts, threshold, members):
    for weights in (counts, [1] * members):
        distribution = torch.softmax(torch.tensor(weights, dtype=torch.float32).log(), dim=-1)
        for level in (threshold, 1 / members, max(1e-3, float(distribution.max()))):
            spec = RunSpec(prompt="a", threshold=level)
            width = len(select(distribution, threshold=level).tokens)
            assert 1 <= width <= widest_set(spec, len(weights))
            capped = len(select(distribution, threshold=level, max_width=3).tokens)
            assert capped <= widest_set(spec.but(max_width=3), len(weights)) <= 3


def test_siblings_alone_beside_a_run_that_records_all_attention(tiny):
    spec = RunSpec(prompt=PROMPT, threshold=0.03, max_steps=4)
    specs = [spec.but(prompt="A dog sat", capture="siblings"), spec.but(capture="attention")]
    lean, full = tempo.generate_batch(tiny, specs)
    (alone,) = tempo.generate_batch(tiny, [lean.spec])
    assert max(lean.widths) > 1
    for step, other in zip(lean.steps, alone.steps, strict=True):
        assert np.abs(step.siblings - other.siblings).max() < 1e-5
    assert full.steps[0].attention is not None


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("capture", ["siblings", ("attention", "siblings")])
def test_siblings_are_the_last_columns_of_attention_whether_that_is_kept_or_not(
    tiny, capture, replayed
):
    seen = RunSpec(prompt=PROMPT, threshold=0.03, max_steps=5, visibility="visible")
    spec = seen.but(capture=("attention", "siblings"))
    spec = spec.but(replay=tempo.generate_batch(tiny, [spec])[0]) if replayed else spec
    (full,) = tempo.generate_batch(tiny, [spec])
    (lean,) = tempo.generate_batch(tiny, [spec.but(capture=capture)])
    assert max(full.widths) > 1
    for step, other in zip(full.steps, lean.steps, strict=True):
        width = len(step.tokens)
        assert (other.siblings == step.attention[..., -width:]).all()
        assert width == 1 or (other.siblings != step.attention[..., -width - 1 : -1]).any()
        assert (other.attention is None) == (capture == "siblings")


@pytest.mark.parametrize("members", [*range(1, 60), 127, 1000, 4097])
def test_the_bound_is_reached_so_a_smaller_one_would_be_wrong(members):
    distribution = torch.softmax(torch.zeros(members), dim=-1)
    threshold = float(distribution[0])
    width = len(select(distribution, threshold=threshold).tokens)
    assert width == members == widest_set(RunSpec(prompt="a", threshold=threshold), 10**6)


def test_the_bound_is_capped_by_the_vocabulary_and_the_width_asked_for():
    spec = RunSpec(prompt="a", threshold=0.01)
    assert widest_set(spec, 10**6) == 100
    assert widest_set(spec, 30) == 30
    assert widest_set(spec.but(max_width=7), 30) == 7
    assert widest_set(spec.but(max_width=500), 10**6) == 100
    assert widest_set(spec.but(threshold=1.0), 10**6) == 1


def test_the_bound_is_capped_by_every_rule_that_bounds_a_set():
    free = RunSpec(prompt="a", threshold=0, top_p=0.5)
    assert widest_set(free, 30) == 30  # many tokens of one probability may be needed
    assert widest_set(free.but(min_p=0.5), 30) == 30
    assert widest_set(free.but(top_k=7), 30) == 7
    assert widest_set(free.but(sample=6, top_k=7), 30) == 6
    assert widest_set(free.but(max_width=5, sample=6, top_k=7), 30) == 5
    assert widest_set(free.but(threshold=0.25), 30) == 4
    # the lowest threshold of a schedule counts, and the other one does not
    assert widest_set(free.but(threshold=0.5, schedule=[0.25, 0.125]), 30) == 8
    assert widest_set(free.but(threshold=0.125, schedule=[0.5]), 30) == 2


RULES = st.fixed_dictionaries(
    {
        "threshold": st.sampled_from([0.0, 0.05, 0.2]),
        "schedule": st.none() | st.lists(st.sampled_from([0.04, 0.3]), min_size=1, max_size=2),
        "top_k": st.none() | st.integers(1, 30),
        "top_p": st.none() | st.floats(0.1, 1.0),
        "min_p": st.none() | st.floats(0.01, 1.0),
        "sample": st.none() | st.integers(1, 30),
        "max_width": st.none() | st.integers(1, 30),
    }
).filter(lambda rules: any(rules.values()))


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40).filter(any), RULES)
@settings(max_examples=200, deadline=None)
def test_no_rules_choose_a_wider_set_than_the_bound(counts, rules):
    spec = RunSpec(prompt="a", **rules)
    for weights in (counts, [1] * len(counts)):
        distribution = torch.softmax(torch.tensor(weights, dtype=torch.float32).log(), dim=-1)
        for step in range(3):
            width = len(select(distribution, **spec.rules(step, [1])).tokens)
            assert 1 <= width <= widest_set(spec, len(weights))


def test_rounding_that_lets_one_more_token_in_is_provided_for():
    # a float32 softmax may sum to slightly more than one; then three members reach this threshold
    assert widest_set(RunSpec(prompt="a", threshold=(1 + 5e-7) / 3), 10) == 3
    assert math.floor(1 / ((1 + 5e-7) / 3)) == 2


def refusal(lm, specs, budget):
    """The message with which `specs` are refused."""
    with pytest.raises(MemoryBudgetError) as error:
        check_budget(lm, specs, [5] * len(specs), budget)
    return str(error.value)


def needs(lm, *specs, num_prompt=5):
    """Bytes that these runs need, one after the other."""
    return sum(needed_bytes(lm, specs, [num_prompt] * len(specs)).values())


@given(st.integers(1, 12), st.floats(0.02, 0.5), st.sampled_from(SUBSETS), st.floats(0.02, 0.98))
@settings(max_examples=80, deadline=None)
def test_the_remedies_of_a_refusal_really_fit_and_one_more_does_not(
    tiny, max_steps, threshold, names, share
):
    spec = RunSpec(prompt="a", threshold=threshold, max_steps=max_steps, capture=names)
    needed = needs(tiny, spec)
    budget = int(needed * share)
    message = refusal(tiny, [spec], budget)
    assert f"({needed} bytes" in message
    assert f"the budget is {budget / 2**20:.1f} MiB" in message
    for name in ("max_width", "max_steps"):
        found = re.search(rf"{name}=(\d+)", message)
        if found is None:
            assert needs(tiny, spec.but(**{name: 1})) > budget
            continue
        best = int(found[1])
        assert check_budget(tiny, [spec.but(**{name: best})], [5], budget) is None
        assert f"{name}=" in refusal(tiny, [spec.but(**{name: best + 1})], budget)
    found = re.search(r"capture without '(\w+)'", message)
    lean = {name: spec.but(capture=set(names) - {name}) for name in names}
    fitting = [name for name in names if needs(tiny, lean[name]) <= budget]
    assert (found is not None) == bool(fitting)
    if found:
        assert found[1] in fitting
    assert f"memory_budget={needed}" in message
    assert check_budget(tiny, [spec], [5], needed) is None
    refusal(tiny, [spec], needed - 1)


def test_a_replay_is_not_told_to_change_its_sets(tiny):
    spec = RunSpec(prompt="a", replay=[[1, 2, 3], [4]], capture=EVERYTHING)
    message = refusal(tiny, [spec], needs(tiny, spec) - 1)
    assert "max_width" not in message
    assert "max_steps" not in message
    assert "capture without" in message
    free = RunSpec(prompt="a", max_steps=2, threshold=0.3, capture=EVERYTHING)
    assert "max_width" in refusal(tiny, [free], needs(tiny, free) - 1)


def test_runs_are_counted_together_and_fewer_at_a_time_fit(tiny):
    spec = RunSpec(prompt="a", capture=EVERYTHING)
    budget = (needs(tiny, *[spec] * 2) + needs(tiny, *[spec] * 3)) // 2
    message = refusal(tiny, [spec] * 4, budget)
    assert message.startswith("4 run(s)")
    assert "2 of the 4 runs at a time" in message
    assert check_budget(tiny, [spec] * 2, [5] * 2, budget) is None
    assert "2 of the 3 runs" in refusal(tiny, [spec] * 3, budget)
    steps = int(re.search(r"max_steps=(\d+)", message)[1])
    assert check_budget(tiny, [spec.but(max_steps=steps)] * 4, [5] * 4, budget) is None
    refusal(tiny, [spec.but(max_steps=steps + 1)] * 4, budget)


def test_without_a_budget_part_of_the_free_memory_is_one(tiny, monkeypatch):
    spec = RunSpec(prompt="a", capture=EVERYTHING)
    free = math.ceil(needs(tiny, spec) / FREE_MEMORY_SHARE)
    memory = SimpleNamespace(available=free)
    monkeypatch.setattr(capture.psutil, "virtual_memory", lambda: memory)
    assert check_budget(tiny, [spec], [5], None) is None
    memory.available = free - 2
    with pytest.raises(MemoryBudgetError, match=f"{needs(tiny, spec)} bytes"):
        check_budget(tiny, [spec], [5], None)


def test_nothing_is_computed_before_a_refusal(tiny, monkeypatch):
    passes, original = [], engine._forward

    def counted(*args):
        passes.append(args)
        return original(*args)

    def one(budget):
        tempo.generate(tiny, PROMPT, max_steps=2, capture=EVERYTHING, memory_budget=budget)

    def batch(budget):
        tempo.generate_batch(tiny, [spec], memory_budget=budget)

    def stream(budget):
        list(tempo.stream(tiny, [spec], memory_budget=budget))

    monkeypatch.setattr(engine, "_forward", counted)
    spec = RunSpec(prompt=PROMPT, max_steps=2, capture=EVERYTHING)
    needed = needs(tiny, spec, num_prompt=len(tiny.encode(PROMPT)))
    for run in (one, batch, stream):
        passes.clear()
        with pytest.raises(MemoryBudgetError, match=f"{needed} bytes"):
            run(needed - 1)
        assert not passes
        run(needed)
        assert len(passes) == 3


def test_a_stream_needs_the_memory_of_the_runs_under_way_only(tiny):
    specs = [RunSpec(prompt=PROMPT, max_steps=2)] * 3
    one = needs(tiny, specs[0], num_prompt=len(tiny.encode(PROMPT)))
    assert len(list(tempo.stream(tiny, specs, max_rows=2, memory_budget=one))) == 3
    with pytest.raises(MemoryBudgetError, match="tempo.stream keeps none"):
        tempo.generate_batch(tiny, specs, max_rows=2, memory_budget=one)


def test_a_refusal_is_a_tempo_error_and_a_memory_error(tiny):
    for kind in (TempoError, MemoryError):
        with pytest.raises(kind):
            check_budget(tiny, [RunSpec(prompt="a")], [5], 1)
    assert check_budget(tiny, [], [], 0) is None


def same_logits(one, other):
    """Whether the logits of two traces are equal to the bit."""
    pairs = zip(one.steps, other.steps, strict=True)
    return all(np.array_equal(a.logits, b.logits) for a, b in pairs)


@pytest.mark.parametrize("visibility", ["isolated", "visible"])
def test_capturing_raw_keys_does_not_change_a_logit(tiny, visibility):
    settings = {"threshold": 0.02, "max_steps": 4, "visibility": visibility}
    plain = tempo.generate(tiny, PROMPT, capture="logits", **settings)
    rich = tempo.generate(tiny, PROMPT, capture=("logits", "kv"), **settings)
    assert plain.sets == rich.sets
    assert max(plain.widths) > 1
    assert same_logits(plain, rich)
    elsewhere = settings | {"replay": plain.sets, "positions": "sequential"}
    moved = tempo.generate(tiny, PROMPT, capture="logits", **elsewhere)
    assert not same_logits(plain, moved)


def test_raw_keys_are_collected_in_the_block_and_not_after_it(tiny):
    tokens = torch.tensor([[65, 66, 67]])
    with torch.inference_mode():
        plain = tiny.model(tokens, use_cache=True)
        with raw_keys(tiny.attention_modules) as found:
            watched = tiny.model(tokens, use_cache=True)
        cached = [layer.keys for layer in watched.past_key_values.layers]
        assert torch.equal(plain.logits, watched.logits)
        shape = (1, tiny.num_key_value_heads, 3, tiny.head_dim)
        assert [tuple(keys.shape) for keys in found] == [shape] * tiny.num_layers
        for raw, keys in zip(found, cached, strict=True):
            # position 0 is not rotated, and a rotation keeps lengths
            assert torch.equal(raw[:, :, 0], keys[:, :, 0])
            assert not torch.equal(raw[:, :, 1], keys[:, :, 1])
            assert torch.allclose(raw.norm(dim=-1), keys.norm(dim=-1), rtol=1e-5)
        tiny.model(tokens, use_cache=True)
    assert len(found) == tiny.num_layers
    assert not any(module._forward_pre_hooks for module in tiny.attention_modules)


def test_hooks_are_removed_when_the_pass_fails(tiny):
    hooked = []

    def fail():
        hooked.extend(module for module in tiny.attention_modules if module._forward_pre_hooks)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), raw_keys(tiny.attention_modules):
        fail()
    assert hooked == list(tiny.attention_modules)
    assert not any(module._forward_pre_hooks for module in tiny.attention_modules)


def test_a_module_that_hides_its_rotation_is_refused():
    class Hiding(nn.Module):
        def forward(self, hidden, past_key_values=None, position_embeddings=None):
            keys = hidden * position_embeddings[0] if position_embeddings else hidden
            past_key_values.update(keys, keys, 0)

    module, cache = Hiding(), SimpleNamespace(update=lambda *args: None)
    with pytest.raises(ModelError, match="leave 'kv' out of capture"), raw_keys([module]):
        module(torch.ones(2), past_key_values=cache)
    tables = (torch.zeros(2), torch.zeros(2))
    with raw_keys([module]) as found:
        module(torch.ones(2), past_key_values=cache, position_embeddings=tables)
    assert torch.equal(found[0], torch.ones(2))
