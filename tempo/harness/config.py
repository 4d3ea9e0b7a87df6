"""The YAML beside a study: which run chooses the sets, on which prompt, and where results go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tempo.errors import SpecError
from tempo.spec import Captures, Strict, load_yaml


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
