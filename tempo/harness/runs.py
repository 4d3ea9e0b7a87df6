"""What a measurement is given and what it asks for: a prompt, and runs on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from tempo.harness.config import StudyConfig
from tempo.harness.store import Store
from tempo.models import LanguageModel
from tempo.spec import RunSpec
from tempo.statistics import SEED
from tempo.trace import Trace


@dataclass(frozen=True)
class Prompt:
    """One prompt to be measured, with the config and the model it is measured with.

    text: the prompt as written, which also names it.
    category: of the suite it comes from; "own" for the config's own prompt.
    store: set for the config's own prompt alone: keep full arrays there.
    captures: what the study's runs record beside what the config says.
    chat: the model reads the text as a user's message in its chat template.
    """

    text: str
    category: str
    config: StudyConfig
    lm: LanguageModel
    store: Store | None = None
    captures: tuple[str, ...] = ()
    chat: bool = False

    @property
    def given(self) -> str | tuple[int, ...]:
        """What the model reads: the text, or the token ids of the chat that it makes."""
        return tuple(self.lm.chat(self.text)) if self.chat else self.text

    def spec(self, **changes: Any) -> RunSpec:
        """The config's free run on this prompt, in its first mode, with some settings changed.

        `replay` also takes a `Trace`.
        """
        config = self.config
        settings: dict[str, Any] = {
            "prompt": self.given,
            "visibility": "isolated" if config.visibility == "both" else config.visibility,
            "threshold": config.threshold,
            "max_steps": config.max_steps,
            "max_width": config.max_width,
            "capture": (*config.capture, *self.captures),
        }
        return RunSpec(**settings).but(**changes) if changes else RunSpec(**settings)

    def rng(self, *seeds: int) -> np.random.Generator:
        """A random generator of this prompt's own: with one for all, prompts would draw alike."""
        return np.random.default_rng([*(seeds or (SEED,)), *self.text.encode()])

    def but(self, text: str) -> Prompt:
        """The same with another text, which keeps nothing."""
        return replace(self, text=text, store=None)


class RunRequest(NamedTuple):
    """One run that a measurement asks for; made by `run`.

    dtype: only where it differs from the session's model.
    batch: requests of one name share batches, apart from all others. Two runs agree to the last bit
        only if their batches have the same shapes: ask for one of each name on every prompt.
    """

    spec: RunSpec
    dtype: str | None = None
    batch: str = ""


def run(
    what: Prompt | RunSpec, *, dtype: str | None = None, batch: str = "", **changes: Any
) -> RunRequest:
    """A request for one run: of a prompt as its config says, or of a spec; with settings changed.

    Yielded by a measurement, alone or in a list: `trace = yield run(prompt, visibility="visible")`.
    """
    if isinstance(what, Prompt):
        return RunRequest(what.spec(**changes), dtype, batch)
    return RunRequest(what.but(**changes) if changes else what, dtype, batch)


def wide_steps(trace: Trace) -> list[int]:
    """The steps whose set has siblings."""
    return [k for k, width in enumerate(trace.widths) if width > 1]
