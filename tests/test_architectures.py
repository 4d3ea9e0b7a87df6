"""Every causal-LM architecture of transformers agrees with the oracle or is refused with reason."""

import pytest
import torch
import transformers

import tempo
from benchmarks import architectures
from benchmarks.architectures import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, build, compare, measure
from tempo import attention
from tempo.attention import PassContext
from tempo.cache import Prompts
from tempo.layout import Layout
from tempo.support import read_registry
from tests.planting import under_one_mask

KNOWN = read_registry().get(transformers.__version__, {})
# At least so many are supported, by version of transformers.
MANY = {"5.23.0": 85, "5.24.0": 85, "5.0.0": 55}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny: a second thread only waits
    yield
    torch.set_num_threads(before)


def test_the_registry_is_of_the_installed_transformers():
    release, num_known = transformers.__version__, len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(KNOWN) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), (
        f"tempo/architectures.json has {len(KNOWN)} architectures of transformers {release}, "
        f"which has {num_known}: run `make architectures` and look at what it says"
    )
    supported = [name for name, entry in KNOWN.items() if entry["status"] == "supported"]
    assert len(supported) >= MANY[transformers.__version__]


@pytest.mark.parametrize("name", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_an_architecture_is_what_the_registry_says(name):
    """`measure` itself raises if a supported one deviates or if its attention does not matter."""
    entry = measure(name)
    known = KNOWN[name]
    assert entry.status == known["status"]
    assert entry.reason == known["reason"]
    assert entry.architecture == known["architecture"]
    assert entry.status == "supported" or entry.reason


# Plain, with windows, with latent keys, and with layers that use another one's keys. The oldest
# transformers that is supported has no gemma4.
KINDS_OF_CACHE = ["llama", "gemma3_text", "deepseek_v3", "gemma3n_text", "gemma4"]


@pytest.mark.parametrize("name", [name for name in KINDS_OF_CACHE if name in KNOWN])
def test_a_prompt_that_was_kept_is_one_that_is_read(name):
    specs = [
        tempo.RunSpec(prompt=range(20, 32), threshold=0.01, max_width=3, max_steps=3, visibility=v)
        for v in ("isolated", "visible")
    ]
    with architectures.quiet(), tempo.wrap_model(build(name), name=name) as lm:
        expected = [dict(tempo.stream(lm, [spec]))[0] for spec in specs]
        kept = Prompts(most_bytes=2**24)
        found = [dict(tempo.stream(lm, [spec], prompts=kept))[0] for spec in specs]
    assert kept.num_bytes > 0
    for one, other in zip(expected, found, strict=True):
        assert one.sets == other.sets
        for a, b in zip(one.steps, other.steps, strict=True):
            assert abs(a.distribution - b.distribution).max() < 1e-5


def window_by_slot(context, layer, window, groups, dtype, original=PassContext.mask):
    context.slot_positions = torch.arange(context.num_slots).expand_as(context.slot_positions)
    context.query_positions[context.rows, context.offsets] = context.slots
    return original(context, layer, window, groups, dtype)


def window_ignored(context, layer, window, groups, dtype, original=PassContext.mask):
    return original(context, layer, None, groups, dtype)


def without(name):
    original = attention._weights

    def broken(query, key, mask, scaling, softcap, sinks):
        given = {"softcap": softcap, "sinks": sinks} | {name: None}
        return original(query, key, mask, scaling, **given)

    return broken


def posterior_ignored(layout, ancestors, original=Layout._bias_by_query):
    return torch.zeros_like(original(layout, ancestors))


FAULTS = {
    "posterior ignored": ("gpt_oss", Layout, "_bias_by_query", posterior_ignored),
    "layers recorded under one mask": ("cohere2", attention.Recording, "take", under_one_mask),
    "window by slot": ("mistral", PassContext, "mask", window_by_slot),
    "window ignored": ("gemma3_text", PassContext, "mask", window_ignored),
    "window of a module that does not name it": ("phimoe", PassContext, "mask", window_ignored),
    "sinks ignored": ("gpt_oss", attention, "_weights", without("sinks")),
    "soft-capping ignored": ("gemma2", attention, "_weights", without("softcap")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_plain_attention_function_forgets_is_seen(monkeypatch, fault):
    name, where, attribute, broken = FAULTS[fault]
    model = build(name)
    if name == "gemma2":  # its default cap is far above the logits of a tiny model
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = 2.0
    with tempo.wrap_model(model) as lm:
        compare(lm, name)
        monkeypatch.setattr(where, attribute, broken)
        with pytest.raises(AssertionError, match="silently wrong"):
            compare(lm, name)


def test_attention_that_does_not_matter_is_no_test():
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.mul_(1e-4)
    with tempo.wrap_model(model) as lm, pytest.raises(AssertionError, match="not tested"):
        compare(lm, "llama")


def test_a_model_that_hides_its_attention_from_the_check_is_caught_by_its_logits(monkeypatch):
    model = build("llama")
    with tempo.wrap_model(model):
        pass
    original = type(model.model.layers[0].self_attn).forward

    def secretly_scaled(self, *args, **kwargs):
        output, weights = original(self, *args, **kwargs)
        return (output * 1.5 if self.config._attn_implementation == "eager" else output), weights

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", secretly_scaled)
    with pytest.raises(tempo.ModelError, match="gives other logits under tempo's attention"):
        tempo.wrap_model(model)


def test_a_model_that_ignores_position_ids_is_refused(monkeypatch):
    model = build("llama")
    original = type(model.model.rotary_emb).forward

    def by_index(self, x, position_ids):
        return original(self, x, torch.arange(x.shape[1])[None])

    monkeypatch.setattr(type(model.model.rotary_emb), "forward", by_index)
    with pytest.raises(tempo.ModelError, match="whatever position_ids are passed"):
        tempo.wrap_model(model)


def test_an_unfinished_registry_is_seen(monkeypatch):
    unfinished = {name: entry for name, entry in KNOWN.items() if name != "llama"}
    monkeypatch.setitem(globals(), "KNOWN", unfinished)
    with pytest.raises(AssertionError, match="make architectures"):
        test_the_registry_is_of_the_installed_transformers()


def test_the_registry_is_written_by_version_and_keeps_the_others(monkeypatch, tmp_path):
    old = {"4.0": {"old": {"status": "supported"}}}
    monkeypatch.setattr(architectures, "REGISTRY", tmp_path / "architectures.json")
    monkeypatch.setattr(architectures, "read_registry", lambda: old)
    architectures.write({"llama": measure("llama")})
    text = (tmp_path / "architectures.json").read_text()
    assert '"old"' in text
    assert f'"{transformers.__version__}"' in text
