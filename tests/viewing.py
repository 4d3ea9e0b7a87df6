"""Runs to view: of the tiny model, and with hostile texts in place of its own."""

from __future__ import annotations

from dataclasses import replace

import tempo
from tempo.trace import Trace

PROMPT = "The cat sat on the"
CAPTURE = ("attention", "logits", "residual")
HOSTILE = [
    "<script>window.hacked=1</script>",
    '<img src="http://127.0.0.1:9/x.png" onerror="window.hacked=1">',
    '"><svg onload="window.hacked=1">',
    "</script><script>window.hacked=1</script>",
    "<!--<script>",
    "[x](javascript:window.hacked=1)",
    "$\\href{javascript:window.hacked=1}{x}$",
    "\x1b[31m\x00\u202eabc\u2066",
    "שלום",
    "x" * 10_000,
    "",
    "  ",
    "\n",
]


def two_modes(lm: tempo.LanguageModel, **settings) -> list[Trace]:
    """A run of isolated mode, and of visible mode on the same sets."""
    given = {"prompt": PROMPT, "threshold": 0.05, "max_steps": 8, "capture": CAPTURE} | settings
    source = tempo.generate(lm, **given)
    specs = [
        tempo.RunSpec(**given, visibility=mode, replay=source) for mode in ("isolated", "visible")
    ]
    return tempo.generate_batch(lm, specs)


def hostile(trace: Trace) -> Trace:
    """The run with hostile texts for all its tokens, and a hostile prompt and model name."""
    texts = iter(HOSTILE * 20)
    steps = [
        replace(step, texts=[next(texts) for _ in step.tokens]) for step in reversed(trace.steps)
    ]
    model = trace.provenance | {"model": HOSTILE[0] + HOSTILE[7]}
    return replace(
        trace,
        spec=trace.spec.but(prompt="".join(HOSTILE)),
        prompt_texts=[next(texts) for _ in trace.prompt_tokens],
        steps=steps[::-1],
        provenance=model,
    )
