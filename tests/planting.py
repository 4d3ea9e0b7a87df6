"""Ways to plant a fault in the engine by monkeypatch.

A fault may change what a pass is told, an attention call, or the positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
from torch import Tensor
from transformers import AttentionInterface

from tempo import attention, engine
from tempo.layout import Layout
from tempo.models import LanguageModel


def change_pass(patch: pytest.MonkeyPatch, change: Callable[..., None]) -> None:
    """Let `change(context, runs)` alter what each forward pass is told of its runs."""
    original = engine._pass_context

    @wraps(original)
    def changed(lm: LanguageModel, cache: Any, groups: Any) -> attention.PassContext:
        context = original(lm, cache, groups)
        change(context, [group[0] for group in groups])
        return context

    patch.setattr(engine, "_pass_context", changed)


def change_attention(patch: pytest.MonkeyPatch, change: Callable[..., dict[str, Any]]) -> None:
    """Let `change(module, arguments)` alter the keyword arguments of every attention call."""

    @wraps(attention.tempo_attention)
    def changed(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Any:
        altered = kwargs | change(module, kwargs)
        return attention.tempo_attention(module, query, key, value, mask, **altered)

    patch.setitem(AttentionInterface._global_mapping, attention.NAME, changed)


def at_other_positions(patch: pytest.MonkeyPatch, move: Callable[[Layout], list[int]]) -> None:
    """Give the model other positions for each generated set than the trace reports."""
    original = engine._forward

    @wraps(original)
    def changed(lm: LanguageModel, cache: Any, runs: Any) -> None:
        reported = [list(run.layout.slot_position) for run in runs]
        for run in runs:
            if not run.layout.new_tokens_are_prompt():
                run.layout.slot_position[run.layout.start :] = move(run.layout)
        original(lm, cache, runs)
        for run, positions in zip(runs, reported, strict=True):
            run.layout.slot_position = positions

    patch.setattr(engine, "_forward", changed)


def under_one_mask(
    recording: attention.Recording,
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None,
    original: Any = attention.Recording.take,
) -> None:
    """Stand in for `Recording.take`: layers recorded together all get the first one's mask."""
    original(recording, query, key, scale, recording._mask if recording._products else mask)
