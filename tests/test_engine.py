"""tempo.engine: what the design says holds exactly, against the oracle and against faults planted on purpose."""

import itertools

import numpy as np
import pytest
import torch

import tempo
from tempo import attention, capture, engine
from tempo.layout import Layout
from tempo.spec import POSITIONS, READOUTS, VISIBILITIES, WEIGHTINGS

PROMPT = "The cat sat on the"
EVERYTHING = ("attention", "logits", "kv")
# float32, 3 layers, logits of about 20: ten times what was seen between engine and oracle on the tiny model.
LOGITS, PROBABILITIES, WEIGHTS = 2e-4, 1e-5, 2e-5


def deviations(one, other):
    """The largest differences of two runs that must have the same sets."""
    assert one.sets == other.sets
    pairs = list(zip(one.steps, other.steps, strict=True))
    return {
        "probabilities": max(np.abs(a.distribution - b.distribution).max() for a, b in pairs),
        "logits": max(np.abs(a.logits - b.logits).max() for a, b in pairs),
        "attention": max(np.abs(a.attention - b.attention).max() for a, b in pairs),
        "kv": max(np.abs(getattr(one, n) - getattr(other, n)).max() for n in ("keys", "values", "raw_keys")),
    }


def agree(one, other):
    found = deviations(one, other)
    bounds = {"probabilities": PROBABILITIES, "logits": LOGITS, "attention": WEIGHTS, "kv": LOGITS}
    return all(found[name] <= bound for name, bound in bounds.items())


def wide(lm, **settings):
    return tempo.generate(lm, PROMPT, **{"threshold": 0.02, "max_steps": 6, "capture": EVERYTHING} | settings)


@pytest.mark.parametrize(("visibility", "positions"), list(itertools.product(VISIBILITIES, POSITIONS)))
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("readout", READOUTS)
def test_engine_equals_oracle(tiny, visibility, positions, readout, weighting):
    settings = {"visibility": visibility, "positions": positions, "readout": readout, "weighting": weighting}
    run = wide(tiny, **settings)
    assert max(run.widths) > 2, "the comparison would be empty without wide sets"
    exact = tempo.reference.generate(tiny, PROMPT, **run.spec.model_dump(exclude={"prompt"}))
    assert agree(run, exact), deviations(run, exact)
    assert (run.slot_position == exact.slot_position).all()
    assert (run.slot_step == exact.slot_step).all()


def shifted_block(layout):
    return Layout.block(layout).roll(1, 0)


def shifted_positions(lm, cache, runs, original=engine._pass_context):
    for run in runs:
        if not run.layout.new_tokens_are_prompt():
            run.layout.slot_position[-1] += 1
    return original(lm, cache, runs)


def no_context(lm, cache, runs, original=engine._pass_context):
    context = original(lm, cache, runs)
    context.allowed[:, :, 1] = False
    return context


def no_bias(lm, cache, runs, original=engine._pass_context):
    context = original(lm, cache, runs)
    context.bias = None
    return context


def swapped_values(layer, keys, values, original=tempo.cache.SlotLayer.update):
    return original(layer, keys, values.flip(2) if values.shape[2] > 1 else values)


FAULTS = {
    "a sibling too many in the mask": (engine.Layout, "block", lambda layout: torch.ones_like(Layout.block(layout))),
    "a context token masked": (engine, "_pass_context", no_context),
    "one position too far": (engine, "_pass_context", shifted_positions),
    "weighting not applied": (engine, "_pass_context", no_bias),
    "values of siblings swapped": (tempo.cache.SlotLayer, "update", swapped_values),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_oracle_comparison_sees_a_fault(tiny, monkeypatch, fault):
    settings = {"weighting": "probability", "visibility": "isolated"}
    exact = tempo.reference.generate(tiny, PROMPT, threshold=0.02, max_steps=6, capture=EVERYTHING, **settings)
    assert agree(wide(tiny, replay=exact.sets, **settings), exact)
    where, name, broken = FAULTS[fault]
    original = getattr(where, name)
    if fault == "a sibling too many in the mask":
        monkeypatch.setattr(where, name, lambda layout: torch.ones_like(original(layout)))
    else:
        monkeypatch.setattr(where, name, broken)
    assert not agree(wide(tiny, replay=exact.sets, **settings), exact)


def test_a_batch_gives_what_single_runs_give(tiny):
    specs = [
        tempo.RunSpec(
            prompt=PROMPT[: 3 + 2 * i], threshold=t, max_steps=3 + i % 4, visibility=v, positions=p, weighting=w,
            max_width=None if i % 2 else 3, capture=EVERYTHING if i % 3 else ("logits",),
        )
        for i, (v, p, w, t) in enumerate(itertools.product(VISIBILITIES, POSITIONS, WEIGHTINGS[::2], (0.03, 0.2)))
    ]  # fmt: skip
    together = tempo.generate_batch(tiny, specs, max_rows=5)
    for spec, run in zip(specs, together, strict=True):
        (alone,) = tempo.generate_batch(tiny, [spec])
        assert run.spec == alone.spec == spec
        assert run.sets == alone.sets
        assert max(np.abs(a.logits - b.logits).max() for a, b in zip(run.steps, alone.steps, strict=True)) < LOGITS
        assert (run.steps[-1].attention is None) == ("attention" not in spec.capture)


def test_stream_gives_every_run_once_as_it_ends(tiny):
    specs = [tempo.RunSpec(prompt=PROMPT, max_steps=n, max_width=1, stop_at_eos=False) for n in (9, 1, 5, 2)]
    order = [index for index, _ in tempo.stream(tiny, specs, max_rows=2)]
    assert sorted(order) == [0, 1, 2, 3]
    assert order[0] == 1


@pytest.mark.parametrize("settings", [{"max_width": 1, "threshold": 0.01}, {"threshold": 1.0}])
def test_width_one_is_greedy_decoding(tiny, settings):
    run = tempo.generate(tiny, PROMPT, max_steps=20, stop_at_eos=False, **settings)
    tokens = torch.tensor([run.prompt_tokens])
    greedy = tiny.model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    assert [step.tokens[0] for step in run.steps] == greedy[0, len(run.prompt_tokens) :].tolist()
    assert run.widths == [1] * 20


def test_modes_agree_bitwise_until_the_first_wide_set_is_read_and_differ_after(tiny):
    runs = [wide(tiny, visibility=v, replay=wide(tiny).sets) for v in VISIBILITIES]
    first = next(k for k, width in enumerate(runs[0].widths) if width > 1)
    for run in runs[1:]:
        for k in range(first + 1):
            assert (run.steps[k].distribution == runs[0].steps[k].distribution).all()
        assert (run.steps[first + 1].distribution != runs[0].steps[first + 1].distribution).any()


def test_forbidden_attention_is_exactly_zero_and_rows_sum_to_one(tiny):
    for visibility in VISIBILITIES:
        run = wide(tiny, visibility=visibility)
        for step in run.steps:
            width = len(step.tokens)
            block = step.attention[..., step.slots[0] :]
            forbidden = {"isolated": ~np.eye(width, dtype=bool), "visible": np.zeros((width, width), bool),
                         "causal": ~np.tri(width, dtype=bool)}[visibility]  # fmt: skip
            assert (block[..., forbidden] == 0.0).all()
            assert (block[..., ~forbidden] > 0.0).all()
            assert np.abs(step.attention.sum(-1) - 1).max() < 1e-5


def test_changing_one_isolated_sibling_leaves_the_others_bit_identical(tiny):
    sets = [[65, 66, 67, 68], [70]]
    changed = [[65, 66, 99, 68], [70]]
    for visibility, same in (("isolated", True), ("visible", False)):
        one, other = (tempo.generate(tiny, PROMPT, replay=s, visibility=visibility, capture="logits") for s in (sets, changed))
        others = [0, 1, 3]
        assert (one.steps[0].logits[others] == other.steps[0].logits[others]).all() == same


def test_order_of_siblings_matters_only_under_a_causal_mask(tiny):
    sets = [[65, 66, 67], [70], [71]]
    for visibility in VISIBILITIES:
        one = tempo.generate(tiny, PROMPT, replay=sets, visibility=visibility, capture="logits")
        other = tempo.generate(tiny, PROMPT, replay=[sets[0][::-1], *sets[1:]], visibility=visibility, capture="logits")
        moved = np.abs(one.steps[2].distribution - other.steps[2].distribution).max()
        assert (moved > 1e-3) == (visibility == "causal")


def test_isolated_siblings_of_the_first_wide_set_are_separate_branches_and_later_ones_are_not(tiny):
    sets = [[65, 66, 67], [70, 71]]
    run = tempo.generate(tiny, PROMPT, replay=sets, capture="logits")
    prompt = run.prompt_tokens

    def branch(tokens):
        return tiny.model(torch.tensor([prompt + tokens])).logits[0, -1].detach().numpy()

    for i, token in enumerate(sets[0]):
        assert np.abs(run.steps[0].logits[i] - branch([token])).max() < LOGITS
    assert np.abs(run.steps[1].logits[0] - branch([65, 70])).max() > 100 * LOGITS


def test_mixture_of_the_first_wide_set_is_the_exact_marginal(tiny):
    run = tempo.generate(tiny, PROMPT, replay=[[65, 66, 67], [70]], capture="logits")
    weights = np.array(run.steps[0].probabilities) / sum(run.steps[0].probabilities)
    branches = [torch.softmax(tiny.model(torch.tensor([[*run.prompt_tokens, t]])).logits[0, -1], -1).detach().numpy() for t in (65, 66, 67)]
    assert np.abs(run.steps[1].distribution - weights @ np.stack(branches)).sum() < 1e-5
    seen = tempo.generate(tiny, PROMPT, replay=[[65, 66, 67], [70]], visibility="visible")
    assert np.abs(seen.steps[1].distribution - weights @ np.stack(branches)).sum() > 1e-2


@pytest.mark.parametrize("captured", [("attention",), ("logits",), ("kv",), EVERYTHING])
def test_capture_never_changes_a_distribution(tiny, captured):
    plain, rich = wide(tiny, capture=()), wide(tiny, capture=captured)
    assert plain.sets == rich.sets
    assert all((a.distribution == b.distribution).all() for a, b in zip(plain.steps, rich.steps, strict=True))


def test_replaying_a_trace_reproduces_it(tiny):
    run = wide(tiny)
    again = wide(tiny, replay=run.sets)
    assert again.stop_reason == "replay"
    assert deviations(run, again) == dict.fromkeys(("probabilities", "logits", "attention", "kv"), 0.0)


def test_the_cache_holds_prompt_and_every_sibling_at_rope_of_its_position(tiny):
    run = wide(tiny)
    assert run.keys.shape[2] == len(run.prompt_tokens) + sum(run.widths) == run.num_slots
    cos, sin = tiny.model.model.rotary_emb(torch.zeros(1), torch.tensor(run.slot_position)[None])
    raw = torch.tensor(run.raw_keys)
    half = raw.shape[-1] // 2
    rotated = raw * cos[:, None] + torch.cat([-raw[..., half:], raw[..., :half]], -1) * sin[:, None]
    assert (rotated.numpy() == run.keys).all()


class Biased:
    """A tiny model whose next token can be forced through the bias of its head."""

    def __init__(self, lm, tokens):
        self.lm, self.tokens = lm, tokens

    def __enter__(self):
        head = self.lm.model.lm_head
        head.bias = torch.nn.Parameter(torch.zeros(head.out_features), requires_grad=False)
        head.bias[self.tokens] = 60.0
        return self

    def __exit__(self, *_):
        self.lm.model.lm_head.bias = None


def test_a_leading_end_of_sequence_token_ends_the_run_and_is_recorded(tiny):
    (eos,) = tiny.eos_token_ids
    with Biased(tiny, [eos]):
        run = tempo.generate(tiny, PROMPT, max_steps=5)
        assert (run.stop_reason, run.sets) == ("eos", [[eos]])
        assert tempo.generate(tiny, PROMPT, max_steps=5, stop_at_eos=False).widths == [1] * 5


def test_a_trailing_end_of_sequence_token_is_recorded_but_not_appended(tiny):
    (eos,) = tiny.eos_token_ids
    with Biased(tiny, [eos, 65]):
        head = tiny.model.lm_head
        head.bias[65] += 30.0
        spread = tempo.generate(tiny, PROMPT, max_steps=1, threshold=1e-30, max_width=4)
        if spread.steps[0].tokens[0] != 65:
            pytest.fail("the fixture no longer puts another token first")
        assert spread.ended == [(0, eos)]
        assert eos not in spread.steps[0].tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": [0, 10_000]}, "10000"),
        ({"prompt": [1] * 600}, "600"),
        ({"prompt": [1] * 510}, "positions"),
        ({"prompt": PROMPT, "replay": [[1], [99_999]]}, "replay step 1 holds token id 99999"),
        ({"prompt": ""}, "empty"),
        ({"prompt": PROMPT, "threshold": float("nan")}, "threshold"),
    ],
)
def test_what_cannot_run_is_refused_before_the_model_is(tiny, settings, message, monkeypatch):
    monkeypatch.setattr(engine, "_forward", lambda *_: pytest.fail("the model ran"))
    with pytest.raises(tempo.SpecError, match=message):
        tempo.generate(tiny, **settings)


def test_logits_that_are_not_finite_are_an_error_that_names_the_run_and_spares_finished_ones(tiny):
    head = tiny.model.lm_head
    specs = [tempo.RunSpec(prompt=PROMPT, max_steps=n, max_width=1, stop_at_eos=False) for n in (2, 6)]
    done = tempo.stream(tiny, specs)
    assert next(done)[0] == 0
    weight = head.weight.clone()
    try:
        head.weight[0] = float("nan")
        with pytest.raises(tempo.ModelError, match=r"not finite after set \d of run 1"):
            next(done)
    finally:
        head.weight.copy_(weight)


def one_token_pass(lm):
    """The context of a pass of one token, and query, key and value for its first attention call."""
    index = torch.zeros(1, dtype=torch.long)
    context = attention.PassContext(
        rows=index, offsets=index, slots=index, allowed=torch.ones(1, 1, 1, dtype=torch.bool), bias=None,
        query_positions=index[None], slot_positions=index[None], expected=lm.attention_calls,
    )  # fmt: skip
    return context, torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16)


def test_an_attention_argument_tempo_does_not_know_is_an_error(tiny):
    module, (context, *states) = tiny.attention_modules[0], one_token_pass(tiny)
    attention.tempo_attention(module, *states, None, tempo_pass=context, position_ids=torch.zeros(1))
    with pytest.raises(tempo.ModelError, match="mystery"):
        attention.tempo_attention(module, *states, None, tempo_pass=context, mystery=1)
    with pytest.raises(tempo.ModelError, match="does not pass keyword arguments"):
        attention.tempo_attention(module, *states, None)


def test_attention_calls_in_another_order_than_at_load_are_an_error(tiny):
    context, *states = one_token_pass(tiny)
    with pytest.raises(tempo.ModelError, match="call 0 .* the model has changed since"):
        attention.tempo_attention(tiny.attention_modules[1], *states, None, tempo_pass=context)


def test_the_model_is_a_plain_one_between_runs_and_after_an_error(tiny):
    before = tiny.model.config._attn_implementation
    wide(tiny)
    assert tiny.model.config._attn_implementation == before != attention.NAME
    with pytest.raises(tempo.TempoError):
        tempo.generate(tiny, PROMPT, replay=[[1], [99_999]])
    assert tiny.model.config._attn_implementation == before
    assert not any(m._forward_pre_hooks for m in tiny.model.modules())


def test_raw_keys_are_refused_where_the_rotation_cannot_be_replaced(tiny):
    class Other(torch.nn.Module):
        def forward(self, hidden_states, past_key_values=None):
            return hidden_states

    module = Other()
    with capture.raw_keys([module]), pytest.raises(tempo.ModelError, match="leave 'kv' out"):
        module(torch.zeros(1), past_key_values=None)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes_run_and_stay_near_float32(tiny, dtype):
    fine = wide(tiny)
    with tempo.load_model("tiny", dtype=dtype) as lm:
        run = wide(lm, replay=fine.sets)
    gap = max(np.abs(a.distribution - b.distribution).max() for a, b in zip(fine.steps, run.steps, strict=True))
    assert gap < {"float64": 1e-5, "bfloat16": 0.5}[dtype]
    assert gap > 0
