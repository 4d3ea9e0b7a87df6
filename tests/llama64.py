"""Llama in true float64, from the papers' formulas.

This reference shares no code with tempo or with transformers. `.double()` is not float64, because
transformers computes softmax, norms and rotary angles of a float64 model in float32. Sources:
RMSNorm arXiv 1910.07467; rotary embedding (half-split) 2104.09864, eq. 34; grouped queries
2305.13245; SwiGLU 2002.05202.

Shapes: L layers, H query heads, Hkv key heads, D head size, E hidden size, N slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Pass(NamedTuple):
    """Everything one forward pass computes, float64."""

    logits: np.ndarray  # [N, V]
    attention: np.ndarray  # [L, H, N, N], query by key
    raw_keys: np.ndarray  # [L, Hkv, N, D] before rotation
    keys: np.ndarray  # [L, Hkv, N, D]
    values: np.ndarray  # [L, Hkv, N, D]


def rotary_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """theta^(-2i / D) for i = 0 .. D/2 - 1, in radians a position."""
    return theta ** (-np.arange(0, head_dim, 2) / head_dim)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Along the last axis; -inf gives exactly 0."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


class Llama64:
    """A `LlamaForCausalLM` in float64, or a Mistral, which differs only by its mask."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.weights = {
            name: tensor.double().numpy() for name, tensor in model.state_dict().items()
        }
        self.num_layers: int = config.num_hidden_layers
        default = config.hidden_size // config.num_attention_heads
        self.head_dim: int = getattr(config, "head_dim", None) or default
        self.eps: float = config.rms_norm_eps
        self.frequencies = rotary_frequencies(config.rope_parameters["rope_theta"], self.head_dim)

    def __call__(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        allowed: ArrayLike,
        bias: ArrayLike = 0.0,
    ) -> Pass:
        """All slots in one forward pass.

        allowed: who may attend to whom, bool [N, N], query by key.
        bias: what is added to attention logits, [N] by key or [N, N] query by key.
        """
        hidden = self.weights["model.embed_tokens.weight"][list(tokens)]  # [N, E]
        mask = np.where(allowed, bias, -np.inf)
        layers = []
        for layer in range(self.num_layers):
            name = f"model.layers.{layer}."
            hidden, *of_layer = self._block(name, hidden, np.asarray(positions), mask)
            layers.append(of_layer)
        logits = self._norm(hidden, "model.norm") @ self.weights["lm_head.weight"].T
        return Pass(logits, *(np.stack(arrays) for arrays in zip(*layers, strict=True)))

    def _block(
        self, name: str, hidden: np.ndarray, positions: np.ndarray, mask: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """One decoder layer.

        Returns the new hidden states [N, E], attention [H, N, N], and raw keys, keys and values
        [Hkv, N, D].
        """
        normed = self._norm(hidden, name + "input_layernorm")
        raw_queries, raw_keys, values = (
            self._heads(normed, f"{name}self_attn.{part}_proj") for part in "qkv"
        )
        queries, keys = self._rotate(raw_queries, positions), self._rotate(raw_keys, positions)
        groups = len(queries) // len(keys)  # query heads that share a key head
        scores = queries @ keys.repeat(groups, axis=0).swapaxes(1, 2) / np.sqrt(self.head_dim)
        weights = softmax(scores + mask)  # [H, N, N]
        mixed = (weights @ values.repeat(groups, axis=0)).swapaxes(0, 1).reshape(len(hidden), -1)
        hidden = hidden + self._linear(mixed, name + "self_attn.o_proj")
        normed = self._norm(hidden, name + "post_attention_layernorm")
        gate, up = (self._linear(normed, f"{name}mlp.{part}_proj") for part in ("gate", "up"))
        hidden = hidden + self._linear(gate / (1 + np.exp(-gate)) * up, name + "mlp.down_proj")
        return hidden, weights, raw_keys, keys, values

    def _linear(self, states: np.ndarray, name: str) -> np.ndarray:
        return states @ self.weights[name + ".weight"].T

    def _heads(self, states: np.ndarray, name: str) -> np.ndarray:
        """[N, E] to [heads, N, D]."""
        return self._linear(states, name).reshape(len(states), -1, self.head_dim).swapaxes(0, 1)

    def _norm(self, states: np.ndarray, name: str) -> np.ndarray:
        size = np.sqrt((states**2).mean(axis=-1, keepdims=True) + self.eps)
        return states / size * self.weights[name + ".weight"]

    def _rotate(self, states: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Pairs (i, i + D/2) of [heads, N, D] turned by position * frequency_i."""
        angles = np.outer(positions, self.frequencies)  # [N, D/2]
        first, second = np.split(states, 2, axis=-1)
        turned = (
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        )
        return np.concatenate(turned, axis=-1)
