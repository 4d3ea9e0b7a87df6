"""From a study and its configs to plans: what is measured on which prompts, and kept where."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tempo.claims import declared_sizes
from tempo.errors import SpecError
from tempo.harness.checks import check_study
from tempo.harness.config import StudyConfig, configs_of
from tempo.harness.prompts import Suite, SuitePrompt, read_suite
from tempo.harness.study import ClaimTest, Family, Study


@dataclass(frozen=True)
class Plan:
    """One config of one study: its prompts, own one first, and its claims.

    name: of the config's file, which names it in test ids and reports.
    folder: of its results, under the results folder.
    variant: tells it apart from the study's other configs; empty if it is the only one.
    num_judged: how many configs of the study measure a suite, selected or not: p is corrected for
    all.
    """

    study: Study
    name: str
    config: StudyConfig
    module: Path
    prompts: tuple[SuitePrompt, ...]
    suite: Suite | None = None
    variant: str = ""
    num_judged: int = 1

    @property
    def folder(self) -> str:
        return self.config.results or re.sub(r"[^A-Za-z0-9_]", "_", self.name)

    @property
    def claims(self) -> list[ClaimTest]:
        """The claims it can decide: one prompt may break an invariant, and shows no more."""
        every = self.study.claims.values()
        return [claim for claim in every if self.config.suite or claim.test == "always"]

    def judges(self, text: str) -> bool:
        """Whether a prompt counts as evidence: one of the suite, if there is a suite.

        The config's own prompt is a picture. It was known when the config was written.
        """
        return self.suite is None or text in self.suite.texts

    @property
    def num_judged_prompts(self) -> int:
        """How many prompts count as evidence."""
        return sum(self.judges(prompt.text) for prompt in self.prompts)

    @property
    def slug(self) -> str:
        """The name as a test id, which other plugins put into pages as it is: no markup in it."""
        return re.sub(r"[^A-Za-z0-9_.-]", "_", self.name)

    def __str__(self) -> str:
        return self.name


def plans_of(
    study: Study, module: Path, chosen: Sequence[Path], suite: Suite | None, number: int | None
) -> list[Plan]:
    """A plan for each config of a study. Raises SpecError in one line if one is faulty."""
    configs = configs_of(study.name, module, chosen)
    every = _declared(study, module, configs)
    num_judged = sum(config.suite is not False for config in every.values())
    found = []
    for path, config in configs.items():
        study.space.check(config, str(path))
        check_study(study, config)
        prompts, of_suite = _prompts(path, config, suite, number)
        folder = config.results or path.stem
        variant = folder.removeprefix(study.name).lstrip("_") if len(every) > 1 else ""
        found.append(Plan(study, path.stem, config, module, prompts, of_suite, variant, num_judged))
    return found


def _declared(
    study: Study, module: Path, configs: Mapping[Path, StudyConfig]
) -> Mapping[Path, StudyConfig]:
    """All configs beside the module if these are some of them: what was selected changes no name.

    Otherwise these are configs of one's own, and the only ones that count.
    """
    folder = module.parent.resolve()
    if all(path.resolve().parent == folder and _is_beside(study, path) for path in configs):
        return configs_of(study.name, module)
    return configs


def _is_beside(study: Study, path: Path) -> bool:
    return path.stem == study.name or path.stem.startswith(f"{study.name}_")


def _prompts(
    path: Path, config: StudyConfig, suite: Suite | None, number: int | None
) -> tuple[tuple[SuitePrompt, ...], Suite | None]:
    """The prompts of a config, its own first, and the suite they come from."""
    own = SuitePrompt(config.prompt, "own")
    if config.suite is False:
        return (own,), None
    if isinstance(config.suite, str):
        suite = read_suite(str(path.parent / config.suite))
    listed = config.suite if isinstance(config.suite, tuple) else ()
    if suite is None and listed:
        suite = Suite(tuple(map(SuitePrompt, dict.fromkeys(listed))), path.name)
    if suite is None:
        raise SpecError(
            f"{path.name} measures a suite of prompts, but none is given: add --suite FILE, or "
            "tempo_suite to pytest's configuration, or 'suite: false' to measure its own prompt"
        )
    limits = [number, config.suite if type(config.suite) is int else None]
    limit = min((n for n in limits if n), default=None)
    others = [prompt for prompt in suite.spread(limit) if prompt.text != own.text]
    return (own, *others), suite


def check_together(plans: Iterable[Plan]) -> None:
    """Raises SpecError if plans share a name or a results folder, or studies a name."""
    names: dict[str, Plan] = {}
    folders: dict[str, Plan] = {}
    studies: dict[str, Plan] = {}
    for plan in plans:
        first = studies.setdefault(plan.study.name, plan)
        if first.study is not plan.study:
            raise SpecError(
                f"two studies are called {plan.study.name!r}: in {first.module} and in "
                f"{plan.module}"
            )
        if names.setdefault(plan.name, plan) is not plan:
            raise SpecError(
                f"two configs are called {plan.name}: give their files names that differ"
            )
        other = folders.setdefault(plan.folder.casefold(), plan)  # one on some disks
        if other is not plan:
            raise SpecError(
                f"{other.name} and {plan.name} both keep their results in {plan.folder}/; "
                "give one of them another 'results:'"
            )


def family_sizes(plans: Iterable[Plan]) -> dict[str, int]:
    """How many empirical claims each family declares, in all configs of its studies, run or not."""
    sizes: dict[str, int] = {}
    for plan in {plan.study.name: plan for plan in plans}.values():
        every = list(plan.study.claims.values())
        declared = declared_sizes(claim.claim for claim in every)
        sizes |= {name: size * plan.num_judged for name, size in declared.items()}
    for plan in plans:
        for claim in plan.study.claims.values():
            if isinstance(claim.family, Family):
                sizes[claim.family.name] = claim.family.size
    return sizes
