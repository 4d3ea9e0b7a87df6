"""tempo.engine: streams, end of sequence, refusals, other dtypes.

What holds exactly is in test_identities.py.
"""

import numpy as np
import pytest
import torch

import tempo
from tempo import attention, capture, engine
from tempo.spec import CAPTURES

PROMPT = "The cat sat on the"
EVERYTHING = CAPTURES


def wide(lm, **settings):
    return tempo.generate(
        lm, PROMPT, **{"threshold": 0.02, "max_steps": 6, "capture": EVERYTHING} | settings
    )


def test_stream_gives_every_run_once_as_it_ends(tiny):
    specs = [
        tempo.RunSpec(prompt=PROMPT, max_steps=n, max_width=1, stop_at_eos=False)
        for n in (9, 1, 5, 2)
    ]
    order = [index for index, _ in tempo.stream(tiny, specs, max_rows=2)]
    assert sorted(order) == [0, 1, 2, 3]
    assert order[0] == 1


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
    specs = [
        tempo.RunSpec(prompt=PROMPT, max_steps=n, max_width=1, stop_at_eos=False) for n in (2, 6)
    ]
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
        rows=index,
        offsets=index,
        slots=index,
        allowed=torch.ones(1, 1, 1, dtype=torch.bool),
        bias=None,
        query_positions=index[None],
        slot_positions=index[None],
        expected=lm.attention_calls,
    )
    return context, torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16)


def test_an_attention_argument_tempo_does_not_know_is_an_error(tiny):
    module, (context, *states) = tiny.attention_modules[0], one_token_pass(tiny)
    attention.tempo_attention(
        module, *states, None, tempo_pass=context, position_ids=torch.zeros(1)
    )
    with pytest.raises(tempo.ModelError, match="mystery"):
        attention.tempo_attention(module, *states, None, tempo_pass=context, mystery=1)
    with pytest.raises(tempo.ModelError, match="another thread"):
        attention.tempo_attention(module, *states, None)
    with (
        attention.installed(tiny.model),
        pytest.raises(tempo.ModelError, match="does not pass keyword arguments"),
    ):
        attention.tempo_attention(module, *states, None)


@pytest.mark.parametrize(
    ("missing", "window"),
    [
        ({"isolated_layers": {0: (0, 1)}}, None),
        ({"query_positions": None}, 3),
        ({"slot_positions": None}, 3),
    ],
)
def test_a_mask_that_lacks_what_it_needs_is_an_error_and_not_another_mask(tiny, missing, window):
    context, *_ = one_token_pass(tiny)
    assert context.mask(0, window, 1, torch.float32) is not None
    for name, value in missing.items():
        setattr(context, name, value)
    context._masks.clear()
    with pytest.raises(AssertionError):
        context.mask(0, window, 1, torch.float32)


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
    gap = max(
        np.abs(a.distribution - b.distribution).max()
        for a, b in zip(fine.steps, run.steps, strict=True)
    )
    assert gap < {"float64": 1e-5, "bfloat16": 0.5}[dtype]
    assert gap > 0


@pytest.fixture
def head_rows(tiny):
    """How many rows each pass puts through the language-model head."""
    found = []
    hook = tiny.model.lm_head.register_forward_pre_hook(
        lambda _, args: found.append(args[0].shape[1])
    )
    yield found
    hook.remove()


@pytest.mark.parametrize(
    ("captured", "last"),
    [((), None), (("attention",), 0), (("siblings", "kv"), 0), (EVERYTHING, 1)],
)
def test_logits_are_computed_of_the_last_prompt_token_of_sets_and_of_the_last_set_only_if_captured(
    tiny, head_rows, captured, last
):
    run = wide(tiny, capture=captured)
    assert max(run.widths) > 1
    end = [] if last is None else [last * run.widths[-1]]
    assert head_rows == [1, *run.widths[:-1], *end]


def test_runs_that_are_the_same_but_for_captured_logits_both_get_what_they_asked_for(tiny):
    specs = [
        tempo.RunSpec(prompt=PROMPT, threshold=0.02, max_steps=3, capture=captured)
        for captured in ("attention", ("attention", "logits"))
    ]
    bare, full = tempo.generate_batch(tiny, specs)
    assert [step.logits is None for step in bare.steps] == [True] * 3
    assert [step.logits.shape[0] for step in full.steps] == full.widths
    for one, other in zip(bare.steps, full.steps, strict=True):
        assert np.abs(one.attention - other.attention).max() < 1e-6


@pytest.mark.parametrize(
    ("captured", "what"), [("attention", "attention weights"), ("kv", "cached values")]
)
def test_a_last_pass_without_logits_still_says_what_is_not_finite(tiny, captured, what):
    layer = tiny.model.model.layers[-1].self_attn
    last = tiny.attention_modules[-1]
    assert layer is last
    spec = tempo.RunSpec(
        prompt=PROMPT, max_steps=1, max_width=1, stop_at_eos=False, capture=captured
    )

    def spoil(module, args, output):
        return output if output.shape[1] > 1 else output * float("nan")  # only the pass of the set

    hooks = [projection.register_forward_hook(spoil) for projection in (layer.q_proj, layer.v_proj)]
    try:
        with pytest.raises(
            tempo.ModelError, match=f"gave {what} that are not finite after set 0 of run 0"
        ):
            tempo.generate_batch(tiny, [spec])
    finally:
        for hook in hooks:
            hook.remove()
