"""The YAML beside a study: which run chooses the sets, on which prompt, and where results go."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tempo.errors import SpecError
from tempo.spec import CAPTURES, Captures, Strict, load_yaml


def _texts(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class StudyConfig(Strict):
    """One configuration of a study, read from a YAML file.

    experiment: the name of the study that reads it.
    results: its folder under the results folder; by default the name of the file.
    prompt: the prompt whose full arrays and pictures are kept.
    visibility: the mode whose free run chooses the sets; "both" begins with isolated.
    suite: measure the session's suite of prompts (`--suite`) as well, or a stratified part of so
        many, or the prompts listed here if no suite is given; a file beside the config: its
        prompts, whatever the session's suite is; false: only `prompt`, which proves nothing about
        prompts.

    The other keys are settings of `RunSpec`.
    """

    experiment: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    prompt: str = Field(min_length=1)
    results: str = Field(default="", pattern=r"^[A-Za-z0-9_]*$")
    max_steps: int = Field(default=10, ge=1)
    threshold: float = Field(default=0.1, gt=0, le=1, allow_inf_nan=False)
    visibility: Literal["isolated", "visible", "both"] = "isolated"
    capture: Captures = ()
    suite: (
        bool
        | Annotated[int, Field(ge=1)]
        | Annotated[str, Field(min_length=1)]
        | Annotated[tuple[str, ...], BeforeValidator(_texts), Field(min_length=1)]
    ) = True
    max_width: int | None = Field(default=None, ge=1)


VISIBILITIES = ("isolated", "visible", "both")
# From where to where `Space.draw` draws if a space sets no end of its own.
LOWEST_DRAWN, MOST_STEPS_DRAWN, WIDEST_DRAWN = 0.01, 8, 12


@dataclass(frozen=True)
class Space:
    """The configs that a study can judge.

    A config outside it is refused at collection, in one line. Inside it a prompt may have nothing
    to say, but nothing fails.

    Attributes:
        visibility: The modes whose free run may choose the sets.
        thresholds: The lowest and the highest threshold.
        steps: The fewest and the most steps; None sets no limit but the model's context.
        widest: The most members that a set may have. A config keeps to that by `max_width`, or by
            its threshold: no more than 1 / threshold tokens reach it. None sets no limit.
        captures: What a config may capture beside what the study does.

    >>> Space(steps=(3, None), widest=32).describe()
    'max_steps from 3; sets of at most 32 (by max_width, or threshold 0.03125)'
    """

    visibility: tuple[str, ...] = VISIBILITIES
    thresholds: tuple[float, float] = (0.0, 1.0)
    steps: tuple[int, int | None] = (1, None)
    widest: int | None = None
    captures: tuple[str, ...] = CAPTURES

    def describe(self) -> str:
        """What it asks of a config, in words; "any" if nothing."""
        parts = []
        if self.visibility != VISIBILITIES:
            parts.append(f"visibility {' or '.join(self.visibility)}")
        if self.thresholds != (0.0, 1.0):
            parts.append("threshold from {:g} to {:g}".format(*self.thresholds))
        least, most = self.steps
        if most is not None or least > 1:
            parts.append(f"max_steps from {least}" + (f" to {most}" if most is not None else ""))
        if self.widest is not None:
            least_threshold = f"{1 / self.widest:.4g}"
            parts.append(
                f"sets of at most {self.widest} (by max_width, or threshold {least_threshold})"
            )
        if self.captures != CAPTURES:
            parts.append(f"capture {', '.join(self.captures) or 'nothing'}")
        return "; ".join(parts) or "any"

    def check(self, config: StudyConfig, where: str) -> None:
        """Raises SpecError in one line if the config is outside; `where` names it."""
        low, high = self.thresholds
        fewest, most = self.steps
        widest = min(config.max_width or math.inf, 1 / config.threshold)
        wrong = {
            "visibility": config.visibility not in self.visibility,
            "threshold": not low <= config.threshold <= high,
            "max_steps": config.max_steps < fewest or config.max_steps > (most or math.inf),
            # a threshold written with four digits is meant to be enough
            "max_width": widest > (self.widest or math.inf) * 1.001,
            "capture": bool(set(config.capture) - set(self.captures)),
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise SpecError(
                    f"{where}: {name} is {getattr(config, name)!r}, with which {config.experiment} "
                    f"cannot judge its claims; it needs {self.describe()}"
                )

    def draw(self, rng: random.Random) -> dict[str, Any]:
        """Settings inside the space, often at its ends; for tests of a study."""
        low, high = max(self.thresholds[0], LOWEST_DRAWN), self.thresholds[1]
        share = rng.choice((0.0, 1.0, rng.random(), rng.random() / 2, rng.random() / 2))
        fewest = self.steps[0]
        most = min(self.steps[1] or math.inf, fewest + MOST_STEPS_DRAWN)
        return {
            "visibility": rng.choice(self.visibility),
            "threshold": min(max(low * (high / low) ** share, low), high),
            "max_steps": rng.choice((fewest, rng.randint(fewest, int(most)))),
            "max_width": rng.randint(1, min(self.widest or WIDEST_DRAWN, WIDEST_DRAWN)),
            "capture": tuple(name for name in self.captures if rng.random() < 0.3),
        }


def configs_of(name: str, module: Path, chosen: Sequence[Path] = ()) -> dict[Path, StudyConfig]:
    """The configs of the study `name`: the chosen ones that name it, else those beside its module.

    Beside a module stand `<name>.yaml` and `<name>_*.yaml`. Raises SpecError if there is none, or
    if one of them is a config of another study.
    """
    if chosen:
        read = {path: load_yaml(StudyConfig, path) for path in chosen}
        return {path: config for path, config in read.items() if config.experiment == name}
    folder = module.parent
    paths = sorted([*folder.glob(f"{name}.yaml"), *folder.glob(f"{name}_*.yaml")])
    found = {path: load_yaml(StudyConfig, path) for path in paths}
    for path, config in found.items():
        if config.experiment != name:
            raise SpecError(
                f"{path} is a config of {config.experiment!r}, but its name makes it one of "
                f"{name!r}; rename the file, or write 'experiment: {name}' in it"
            )
    if not found:
        raise SpecError(
            f"study {name!r} in {module.name} has no config; expected {name}.yaml or {name}_*.yaml "
            f"in {folder}, for example with 'experiment: {name}' and 'prompt: The cat sat on the'"
        )
    return found
