"""What determines a result: whatever changes one changes the identity, and nothing else does."""

import warnings

import pytest
import torch
from transformers.activations import ACT2FN

import tempo
from tempo import models
from tempo.identity import maker_parts, maker_sha256, model_sha256
from tempo.store import TraceStore

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = tempo.RunSpec(prompt="The cat", threshold=0.05, max_steps=2)


@pytest.fixture
def lm():
    """A model of the test's own, to be changed."""
    with tempo.load_model("tiny") as lm:
        yield lm


def norm(lm):
    return lm.model.model.norm


def attention(lm):
    return lm.model.model.layers[1].self_attn


def scale(factor):
    def hook(module, inputs, output):
        return factor * output

    return hook


class Steering:
    """A hook with a state that nobody can name."""

    def __init__(self):
        self.strength = object()

    def __call__(self, module, inputs, output):
        return output


def with_config(**settings):
    def change(lm):
        for name, value in settings.items():
            setattr(lm.model.config, name, value)

    return change


def in_place(lm):
    """Not even the version counter of the tensor sees this one."""
    lm.model.lm_head.weight.data.view(-1).numpy()[5] += 1e-6


def swapped_tokens(lm):
    vocabulary = lm.tokenizer.backend_tokenizer.model
    lm.tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    assert vocabulary


CHANGES = {
    "rms_norm_eps": with_config(rms_norm_eps=1.0),
    "the epsilon of one norm": lambda lm: setattr(norm(lm), "variance_epsilon", 1.0),
    "rope_theta": with_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "rotary table": lambda lm: lm.model.model.rotary_emb.inv_freq.mul_(1.01),
    "rotary scaling": lambda lm: setattr(lm.model.model.rotary_emb, "attention_scaling", 1.1),
    "hidden_act": with_config(hidden_act="gelu"),
    "activation": lambda lm: setattr(lm.model.model.layers[0].mlp, "act_fn", ACT2FN["gelu"]),
    "eos_token_id": with_config(eos_token_id=7),
    "eos of the generation config": lambda lm: setattr(
        lm.model.generation_config, "eos_token_id", 7
    ),
    "eos of the wrapper": lambda lm: setattr(lm, "eos_token_ids", frozenset({7})),
    "tokenizer": swapped_tokens,
    "chat template": lambda lm: setattr(lm.tokenizer, "chat_template", "x"),
    "forward hook": lambda lm: norm(lm).register_forward_hook(scale(1.5)),
    "pre-hook": lambda lm: norm(lm).register_forward_pre_hook(lambda module, inputs: None),
    "method": lambda lm: setattr(norm(lm), "forward", lambda x: x),
    "attention scaling": lambda lm: setattr(attention(lm), "scaling", 0.3),
    "weights": in_place,
    "dtype": lambda lm: lm.model.model.layers[0].mlp.to(torch.float64),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_in_place_is_another_identity(lm, what):
    before = model_sha256(lm)
    assert model_sha256(lm) == before
    CHANGES[what](lm)
    assert model_sha256(lm) != before


@pytest.mark.parametrize("what", ["rms_norm_eps", "forward hook", "weights", "attention scaling"])
def test_a_stored_trace_of_the_model_before_is_not_given_for_the_one_now(lm, tmp_path, what):
    tempo.generate_batch(lm, [SPEC], store=tmp_path)
    assert TraceStore(lm, tmp_path).get(SPEC)
    CHANGES[what](lm)
    assert TraceStore(lm, tmp_path).get(SPEC) is None


def test_running_closing_and_loading_again_change_no_identity(lm, tiny):
    before = maker_sha256(lm)
    tempo.generate(lm, "The cat", threshold=0.05, max_steps=3, capture=("attention", "kv"))
    tempo.reference.generate(lm, "The cat", max_steps=2, capture=("attention", "kv"))
    assert maker_sha256(lm) == maker_sha256(tiny) == before


def test_saving_a_model_makes_no_other_of_it(lm, tmp_path):
    before = model_sha256(lm)
    lm.model.config.dtype = None
    lm.model.save_pretrained(tmp_path)
    assert lm.model.config.dtype is not None  # transformers writes it into the config
    assert model_sha256(lm) == before
    lm.model.to(torch.bfloat16)
    assert model_sha256(lm) != before


def test_a_hook_is_known_by_its_code_and_its_values(lm):
    found = []
    for hook in (scale(1.5), scale(1.5), scale(2.0)):
        handle = norm(lm).register_forward_hook(hook)
        found.append(model_sha256(lm))
        handle.remove()
    assert found[0] == found[1] != found[2]
    assert model_sha256(lm) not in found


def test_a_hook_with_a_state_of_its_own_is_never_taken_for_another(lm, tmp_path):
    norm(lm).register_forward_hook(Steering())
    assert model_sha256(lm) != model_sha256(lm)
    with pytest.warns(UserWarning, match="whose effect cannot be told.*first: model.norm"):
        tempo.generate_batch(lm, [SPEC], store=tmp_path)


def test_a_trace_under_the_name_of_another_is_not_believed(lm, tmp_path):
    store = TraceStore(lm, tmp_path)
    other = SPEC.but(threshold=0.5)
    tempo.generate_batch(lm, [SPEC, other], store=tmp_path)
    store.place(SPEC).rename(tmp_path / "kept")
    store.place(other).rename(store.place(SPEC))
    with pytest.warns(UserWarning, match="computed anew: .* holds a trace of another spec"):
        assert store.get(SPEC) is None
    attention(lm).scaling = 0.3
    now = TraceStore(lm, tmp_path)
    (tmp_path / "kept").rename(now.place(SPEC))
    with pytest.warns(UserWarning, match="that another model or software made"):
        assert now.get(SPEC) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (again,) = tempo.generate_batch(lm, [other], store=tmp_path)
        assert again.spec == other


def test_of_a_gpu_its_kind_counts_and_not_its_number(monkeypatch):
    names = {0: "A", 1: "A", 2: "B"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    one, same, other = (models._kind_of(torch.device(f"cuda:{i}")) for i in range(3))
    assert one == same == "cuda (A)"
    assert other == "cuda (B)"
    assert models._kind_of(torch.device("cpu")) == "cpu"


def test_threads_and_each_other_part_of_the_maker_have_a_name(lm):
    parts = maker_parts(lm)
    assert parts["number of threads"] == "1"
    assert parts["dtype"] == "float32"
    assert maker_sha256(lm) == maker_sha256(lm)
    torch.set_num_threads(2)
    try:
        differs = {name for name, part in maker_parts(lm).items() if part != parts[name]}
    finally:
        torch.set_num_threads(1)
    assert differs == {"number of threads"}
