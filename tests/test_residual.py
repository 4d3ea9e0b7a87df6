"""Residuals are transformers' own; hooks change what they are for; both are refused in words."""

import numpy as np
import pytest
import torch
import transformers

import tempo
from benchmarks.architectures import PROMPTS, SETS, build, quiet
from tempo import ModelError, SpecError, engine
from tempo import run as one_run
from tempo.interpret import as_nnsight, as_transformer_lens, unembed
from tempo.reporting.figures.lens import MOST_SHOWN, lens_map
from tempo.support import read_registry
from tests.checks import same_runs

pytestmark = pytest.mark.usefixtures("one_thread")

SUPPORTED = [
    name
    for name, entry in read_registry().get(transformers.__version__, {}).items()
    if entry["status"] == "supported"
]
# They run, and hand on something else than one state a token from layer to layer.
WITHOUT_STREAM = {
    "gemma3n_text": "do not each hand on one state a token",
    "hrm_text": "has no list of 32 decoder layers with one attention each",
    "longcat_flash": "has no list of 4 decoder layers with one attention each",
}
# In units of the largest number of a residual, or of the range of logits. The largest difference
# seen is 1.8e-6.
ROUNDING = 1e-5
PROMPT = "The cat"


def twice(residual):
    return 2 * residual


def spec_of(**changes):
    common = {"prompt": PROMPT, "replay": [[65, 66, 67], [68], [69, 70]]}
    return tempo.RunSpec(**common | {"capture": ("logits", "residual")} | changes)


def residuals(trace):
    """All of a run, [L + 1, tokens of the sets, E]."""
    return np.concatenate([step.residual for step in trace.steps], axis=1)


def gap(found, expected):
    """The largest difference, in units of the largest number."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@torch.inference_mode()
def hidden_states(lm, text):
    """transformers' own, of plain text, without the last one: that is after the final norm."""
    output = lm.model(torch.tensor([text]), output_hidden_states=True, use_cache=False)
    return torch.cat(output.hidden_states[: lm.num_layers]).numpy()


@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in WITHOUT_STREAM])
def test_residuals_are_those_of_transformers_and_of_the_oracle(name):
    prompt, alone = PROMPTS[0], [(members[0],) for members in SETS]
    text = [*prompt, *(members[0] for members in alone)]
    with quiet(), tempo.wrap_model(build(name), name=name) as lm:
        size = {"capture": ("logits", "residual"), "prompt": prompt}
        plain = tempo.generate(lm, replay=alone, **size)
        own = residuals(plain)
        assert own.shape == (lm.num_layers + 1, len(SETS), lm.residual_stream.size)
        states = hidden_states(lm, text)[:, len(prompt) :]
        assert gap(own[:-1], states) < ROUNDING
        # one layer on, it is another one
        assert gap(own[1:], states) > 100 * ROUNDING
        # what the model makes of the last one are its logits
        logits = np.concatenate([step.logits for step in plain.steps])
        assert gap(unembed(lm, own[-1]).float().numpy(), logits) < ROUNDING
        hooks = {(0, 1, 1): twice, (2, 3, lm.num_layers): twice}
        spec = tempo.RunSpec(replay=SETS, **size)
        wide, hooked = tempo.generate_batch(lm, [spec] * 2, hooks=[None, hooks])
        for run, given in ((wide, None), (hooked, hooks)):
            exact = tempo.reference.generate(lm, **spec.model_dump(), hooks=given)
            assert gap(residuals(run), residuals(exact)) < ROUNDING
        assert gap(residuals(hooked), residuals(wide)) > 100 * ROUNDING
        assert not any(layer._forward_pre_hooks for layer in lm.residual_stream.layers)


@pytest.mark.parametrize("name", WITHOUT_STREAM)
def test_a_model_without_a_stream_is_refused_for_it_alone(name):
    with quiet(), tempo.wrap_model(build(name), name=name) as lm:
        with pytest.raises(ModelError, match=WITHOUT_STREAM[name]):
            print(lm.residual_stream)
        given = {"prompt": [1, 2], "max_steps": 1}
        for asked in ({"capture": "residual"}, {"hooks": {(0, 0, 0): twice}}):
            with pytest.raises(SpecError, match=f"{WITHOUT_STREAM[name]}.*leave 'residual' out"):
                tempo.generate(lm, **given, **asked)
        assert tempo.generate(lm, capture=("logits", "attention"), **given).steps[0].logits.any()


def test_a_stream_that_is_changed_between_layers_is_none():
    model = build("llama")
    layer = model.model.layers[1]
    plain = layer.forward
    with tempo.wrap_model(model) as lm:
        # another input than the hook of a layer sees
        model.model.layers[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        with pytest.raises(ModelError, match="changes the state between its layers 1 and 2"):
            print(lm.residual_stream)
    assert layer.forward == plain


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_residuals_are_float32_whatever_the_model_is(dtype):
    seen = []
    with tempo.load_model("tiny", dtype=dtype) as lm:
        hooks = {(0, 1, 2): lambda residual: seen.append(residual) or residual}
        trace = tempo.generate_batch(lm, [spec_of()], hooks=[hooks])[0]
        assert seen[0].dtype == lm.dtype
        assert trace.steps[0].residual.dtype == np.float32
        assert np.array_equal(trace.steps[0].residual[2, 1], seen[0].float().numpy())


def test_a_set_forwarded_in_parts_has_the_residuals_of_one_pass(tiny, monkeypatch):
    spec = spec_of(replay=[[*range(60, 80)], [65, 66, 67]])
    hooks = {(0, 5, 1): twice, (0, 17, 3): twice}
    whole = tempo.generate_batch(tiny, [spec], hooks=[hooks])[0]
    for module in (engine, one_run):
        monkeypatch.setattr(module, "MAX_NEW_TOKENS", 4)
    parts = tempo.generate_batch(tiny, [spec], hooks=[hooks])[0]
    same_runs(parts, whole, "in parts", rounded=True)
    assert parts.steps[0].residual.shape == (4, 20, 64)


def test_spooled_residuals_are_those_of_memory(tiny, tmp_path):
    plain, spooled = (
        tempo.generate(tiny, PROMPT, threshold=0.03, max_steps=3, capture="residual", spool=folder)
        for folder in (None, tmp_path)
    )
    assert all(isinstance(step.residual, np.memmap) for step in spooled.steps)
    assert np.array_equal(residuals(plain), residuals(spooled))


@pytest.mark.parametrize("layers", [(0, 1), (1, 3), (0, 3)])
def test_isolated_layers_part_the_stream_from_there_on(tiny, layers):
    spec = spec_of(visibility="visible")
    visible, partly = (
        tempo.generate_batch(tiny, [each])[0] for each in (spec, spec.but(isolated_layers=layers))
    )
    first = layers[0]
    one, other = visible.steps[0].residual, partly.steps[0].residual
    assert np.array_equal(one[: first + 1], other[: first + 1])
    assert not np.array_equal(one[first + 1], other[first + 1])


def test_a_hook_of_a_free_run_changes_what_it_chooses(tiny):
    settings = {"threshold": 0.03, "max_steps": 3, "stop_at_eos": False}
    plain = tempo.generate(tiny, PROMPT, **settings)
    hooked = tempo.generate(tiny, PROMPT, hooks={(0, 0, 3): torch.neg}, **settings)
    assert plain.sets[0] == hooked.sets[0]
    assert plain.sets[1] != hooked.sets[1]
    assert (hooked.provenance["hooks"], "hooks" in plain.provenance) == ([[0, 0, 3]], False)


def test_a_hook_at_the_last_set_is_called_though_nothing_is_captured(tiny):
    seen = []
    hooks = {(2, 1, 3): lambda residual: seen.append(residual) or residual}
    tempo.generate_batch(tiny, [spec_of(capture=())], hooks=[hooks])
    assert [len(residual) for residual in seen] == [64]


def test_a_hook_may_change_what_it_gets_in_place(tiny):
    def doubled(residual):
        return residual.mul_(2)

    one, other = (
        tempo.generate_batch(tiny, [spec_of()], hooks=[{(0, 0, 1): change}])[0]
        for change in (doubled, twice)
    )
    assert np.array_equal(residuals(one), residuals(other))


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ({(3, 0, 0): twice}, "for step 3 and the run has 3, counted from 0"),
        ({(1, 1, 0): twice}, "for member 1 of step 1, whose set has 1"),
        ({(0, 0, 4): twice}, "for layer 4: tiny has 3 layers; .* or 3 for after the last"),
        ({(0, 0): twice}, r"places as \(step, member, layer\).* not \(0, 0\)"),
        ({(0, -1, 0): twice}, "whole numbers from 0"),
        ({"a": twice}, "whole numbers from 0, not 'a'"),
        ({(0, 0, 0): 5}, r"a function of a residual at \(0, 0, 0\)"),
        (twice, "expected a mapping from"),
        ({(0, 0, 1): lambda residual: None}, "a hook at layer 1 returned None; expected"),
        ({(0, 0, 1): lambda residual: residual[:5]}, r"returned shape \[5\]; .* 64 numbers"),
        ({(0, 0, 1): lambda residual: "words"}, "returned 'words'"),
    ],
)
def test_a_hook_that_cannot_be_is_refused_in_words(tiny, hooks, message):
    with pytest.raises(SpecError, match=message) as error:
        tempo.generate_batch(tiny, [spec_of()], hooks=[hooks])
    assert "\n" not in str(error.value)
    assert not any(layer._forward_pre_hooks for layer in tiny.residual_stream.layers)
    if not callable(hooks) and set(map(len, hooks)) == {3} and message.startswith("for"):
        with pytest.raises(SpecError, match=message):
            tempo.reference.generate(tiny, **spec_of().model_dump(), hooks=hooks)


def test_a_member_that_a_free_run_did_not_choose_is_told(tiny):
    with pytest.raises(SpecError, match="member 9 of step 1, whose set has"):
        tempo.generate(tiny, PROMPT, threshold=0.05, max_steps=3, hooks={(1, 9, 0): twice})


def test_a_step_that_a_run_did_not_reach_is_told(tiny, monkeypatch):
    free = tempo.generate(tiny, PROMPT, threshold=0.5, max_steps=4, stop_at_eos=False)
    monkeypatch.setattr(tiny, "eos_token_ids", frozenset(free.sets[1][:1]))
    settings = {"threshold": 0.5, "max_steps": 4}
    assert len(tempo.generate(tiny, PROMPT, **settings).steps) == 2
    with pytest.raises(SpecError, match=r"for step 3, and the run ended after 2 sets \(eos\)"):
        tempo.generate(tiny, PROMPT, hooks={(3, 0, 0): twice}, **settings)


def test_a_run_with_hooks_has_no_name_in_a_store(tiny, tmp_path):
    tempo.generate_batch(tiny, [spec_of()], store=tmp_path)
    with pytest.raises(SpecError, match="no name in a store"):
        tempo.generate_batch(
            tiny, [spec_of()] * 2, hooks=[None, {(0, 0, 0): twice}], store=tmp_path
        )
    (again,) = tempo.generate_batch(tiny, [spec_of()], hooks=[None], store=tmp_path)
    assert "hooks" not in again.provenance


def test_hooks_come_one_mapping_a_spec(tiny):
    for hooks, message in (
        ([None], "1 entries for 2 specs"),
        ({(0, 0, 0): twice}, "a list with a mapping or None a spec"),
        ("ab", "a list with"),
    ):
        with pytest.raises(SpecError, match=message):
            tempo.generate_batch(tiny, [spec_of()] * 2, hooks=hooks)


def hooks_of(lm):
    """The hooks of each layer, by what calls them."""
    layers = lm.residual_stream.layers
    return [
        [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()] for layer in layers
    ]


def test_no_hook_is_left_when_one_fails(tiny):
    def fails(residual):
        raise RuntimeError("mine")

    before = hooks_of(tiny)  # transformers may have left hooks with which it looks
    with pytest.raises(RuntimeError, match="mine"):
        tempo.generate(tiny, PROMPT, max_steps=2, hooks={(0, 0, 1): fails})
    assert hooks_of(tiny) == before


def test_without_residuals_nothing_is_hooked(tiny, monkeypatch):
    monkeypatch.setattr(engine, "tapped", None)  # would fail if it were called
    assert tempo.generate(tiny, PROMPT, max_steps=2, capture=("logits", "attention", "kv")).steps
    with pytest.raises(TypeError):
        tempo.generate(tiny, PROMPT, max_steps=2, capture="residual")


# --- the lens, patches and exports


@pytest.fixture(scope="module")
def trace(tiny):
    return tempo.generate_batch(tiny, [spec_of(capture=("logits", "residual", "attention", "kv"))])[
        0
    ]


def test_the_lens_ends_in_what_the_model_predicts(tiny, trace):
    lens = tempo.lens(tiny, trace)
    for k, (step, seen) in enumerate(zip(trace.steps, lens.steps, strict=True)):
        assert (seen.tokens[-1] == step.logits.argmax(axis=-1)).all()
        assert (seen.kl[-1] == 0).all()
        assert (seen.kl[:-1] > 0).all()
        logits = unembed(tiny, step.residual).double()
        logs = logits.log_softmax(dim=-1).numpy()
        final = np.exp(logs[-1])
        assert np.allclose(seen.kl, (final * (logs[-1] - logs)).sum(axis=-1), atol=1e-9)
        after = trace.sets[k + 1] if k + 1 < len(trace.steps) else []
        assert seen.ranks.shape == seen.shares.shape == (4, len(step.tokens), len(after))
        for i, token in enumerate(after):
            more = (logs > logs[..., token : token + 1]).sum(axis=-1)
            assert (seen.ranks[..., i] == more).all()
            assert np.allclose(seen.shares[..., i], np.exp(logs[..., token]))
    assert repr(lens) == "<Lens of 3 sets, layers 0 to 3>"


def test_the_lens_of_one_layer_is_not_that_of_the_next(tiny, trace):
    step = tempo.lens(tiny, trace).steps[0]
    assert (step.kl[0] != step.kl[1]).all()
    early = unembed(tiny, trace.steps[0].residual[1]).numpy()
    assert np.abs(early - trace.steps[0].logits).max() > 0.1


def test_the_lens_needs_the_residuals_of_this_model(tiny, trace):
    with pytest.raises(SpecError, match="generate it with capture='residual'"):
        tempo.lens(tiny, tempo.generate(tiny, PROMPT, max_steps=1))
    expected = r"residuals are \[4, 3, 64\]; expected .*\[5, w, 64\]"
    with tempo.wrap_model(build("llama")) as other, pytest.raises(SpecError, match=expected):
        tempo.lens(other, trace)
    for wrong in (np.zeros((2, 5)), "ab", np.float32(3), [["a"]]):
        with pytest.raises(SpecError, match="unembed: residual"):
            unembed(tiny, wrong)


def test_a_patch_takes_the_place_that_it_is_told(tiny, trace):
    spec = spec_of()
    swapped = tempo.patch(tiny, trace, spec, at={(0, 0, 1): (0, 2, 1), (1, 0, 3): (0, 1, 3)})
    assert np.array_equal(swapped.steps[0].residual[1, 0], trace.steps[0].residual[1, 2])
    assert np.array_equal(swapped.steps[0].residual[:, 1:], trace.steps[0].residual[:, 1:])
    assert np.array_equal(swapped.steps[1].residual[3, 0], trace.steps[0].residual[3, 1])
    again = tempo.patch(tiny, trace, trace, at=[(0, 1, 2), (2, 0, 3)])
    assert np.array_equal(residuals(again), residuals(trace))


def test_a_patch_that_cannot_be_is_refused_in_words(tiny, trace):
    for at, message in (
        ([(0, 3, 0)], r"no residual at \(0, 3, 0\) .* widths \[3, 1, 2\] and the layers 0 to 3"),
        ([(0, 0, 4)], "no residual at"),
        ([(5, 0, 0)], "no residual at"),
        ({(0, 3, 0): (0, 0, 0)}, "member 3 of step 0, whose set has 3"),
        ([(0, 0)], r"patch: at .*\(step, member, layer\)"),
        (5, "patch: at is 5; expected places"),
    ):
        with pytest.raises(SpecError, match=message):
            tempo.patch(tiny, trace, spec_of(), at=at)
    with pytest.raises(SpecError, match="target is 'ab'; expected a RunSpec or a Trace"):
        tempo.patch(tiny, trace, "ab", at=[(0, 0, 0)])
    with pytest.raises(SpecError, match="holds no residuals"):
        tempo.patch(tiny, tempo.generate(tiny, PROMPT, max_steps=1), spec_of(), at=[(0, 0, 0)])


def test_the_exports_hold_what_was_captured_by_their_names(tiny, trace):
    own = torch.from_numpy(residuals(trace))
    cache, modules = as_transformer_lens(trace), as_nnsight(tiny, trace)
    for layer in range(tiny.num_layers):
        for states in (
            cache[f"blocks.{layer}.hook_resid_pre"],
            modules[f"model.layers.{layer}.input"],
        ):
            assert torch.equal(states[0], own[layer])
        for states in (
            cache[f"blocks.{layer}.hook_resid_post"],
            modules[f"model.layers.{layer}.output"],
        ):
            assert torch.equal(states[0], own[layer + 1])
    assert "blocks.3.hook_resid_pre" not in cache
    pattern = cache["blocks.1.attn.hook_pattern"]
    assert pattern.shape == (1, 4, 6, trace.num_slots)
    assert torch.allclose(pattern.sum(dim=-1), torch.ones(1, 4, 6))
    assert np.array_equal(pattern[0, :, 3, :11], trace.steps[1].attention[1, :, 0])
    assert np.array_equal(cache["blocks.2.attn.hook_rot_k"][0, :, 1], trace.keys[2, 1])
    with pytest.raises(SpecError, match="capture 'residual' to export it"):
        as_transformer_lens(tempo.generate(tiny, PROMPT, max_steps=1))


def test_the_picture_of_the_lens_shows_members_and_texts(tiny):
    wide = spec_of(replay=[[*range(60, 72)], [65]])
    step = tempo.lens(tiny, tempo.generate_batch(tiny, [wide])[0]).steps[0]
    members = [f"<b>{i}$" for i in range(12)]
    picture = lens_map(step, members)
    assert "&lt;b&gt;0$" in picture.svg
    assert f"first {MOST_SHOWN} of 12 members" in picture.caption
    assert "&lt;b&gt;9$" not in picture.svg
