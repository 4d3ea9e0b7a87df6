"""Random configs inside and outside the space that each study declares.

Inside it, on the model `tiny`, nothing may crash, no control may support its claim, and no
invariant may be violated. Outside it there is one line at collection, which names file and setting.
`python -m benchmarks.campaign --only configs` tries 300 and 60.
`python -m benchmarks.configs [NUMBER] [STUDY ...]` tries so many inside, and a fifth of it outside.
"""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tempo
from tempo import LanguageModel
from tempo.errors import TempoError
from tempo.harness import Plan, Study, StudyConfig
from tempo.harness.checks import check_study
from tempo.harness.config import VISIBILITIES
from tempo.harness.evidence import Evidence
from tempo.harness.plan import plans_of
from tempo.harness.prompts import Suite, SuitePrompt

ROOT = Path(__file__).resolve().parent.parent
# exp16 makes other experiments' claims again, on suites that are read once a model.
LEFT_OUT = "test_exp16"
PROMPTS = ("The cat sat on the", "Numbers: 1, 2", "def f(")
SEED = 31


def studies() -> dict[str, tuple[Study, Path]]:
    """Each experiment's study and module, by its name."""
    found = {}
    for path in sorted((ROOT / "test_experiments").glob("test_exp*.py")):
        if not path.stem.startswith(LEFT_OUT):
            study = import_module(f"test_experiments.{path.stem}").study
            found[study.name] = (study, path)
    return found


def draw(study: Study, rng: random.Random) -> StudyConfig:
    """A config inside the study's space; each setting is often at the end of its range."""
    return StudyConfig(experiment=study.name, prompt=PROMPTS[0], **study.space.draw(rng))


def problems_of(study: Study, module: Path, config: StudyConfig, lm: LanguageModel) -> list[str]:
    """What goes wrong with a config, a line each; nothing if all is well."""
    suite = Suite(tuple(map(SuitePrompt, PROMPTS)), "three prompts")
    check_study(study, config)
    plan = Plan(study, study.name, config, module, suite.prompts, suite)
    with tempfile.TemporaryDirectory() as folder:
        evidence = Evidence(lm, [plan], Path(folder))
        evidence.gather(silent)
        found = [f"could not be measured: {why}" for why in evidence.failures.values()]
        found += [f"{id} could not be judged: {why}" for (_, id), why in evidence.unjudged.items()]
        for f in evidence.findings:
            if not f.control_holds:
                found.append(f"{f.claim} supports its own control ({f.control_estimate:.3g})")
            if f.kind == "invariant" and f.verdict == "REFUTED":
                found.append(f"{f.claim} is violated: {f.reason}")
        if not found and study.draw:
            found += _drawn(study, evidence, plan)
    return found


def _drawn(study: Study, evidence: Evidence, plan: Plan) -> list[str]:
    """What goes wrong with the pictures."""
    assert study.draw is not None
    cases = [case for case in evidence.cases[plan.name] if case is not None]
    try:
        list(study.draw(evidence.store(plan), cases))
    except Exception as error:
        return [f"pictures: {type(error).__name__}: {error}"]
    return []


@contextmanager
def silent(*_: Any) -> Iterator[Any]:
    """Progress that shows nothing, for `Evidence.gather`."""

    def nothing(*_: Any) -> None:
        pass

    yield SimpleNamespace(report=nothing, ran=nothing)


def campaign(number: int, names: Sequence[str] = ()) -> list[str]:
    """What goes wrong in so many random configs, each study in turn, a line each."""
    known = {name: pair for name, pair in studies().items() if name in names or not names}
    rng, found = random.Random(SEED), []
    with tempo.load_model("tiny") as lm:
        for index in range(number):
            name = list(known)[index % len(known)]
            study, module = known[name]
            config = draw(study, rng)
            settings = config.model_dump(exclude={"experiment", "prompt", "results", "suite"})
            for problem in problems_of(study, module, config, lm):
                found.append(f"{name} {settings}: {problem}")
                print(found[-1], flush=True)
    return found


def draw_outside(study: Study, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """The name of one setting that is outside the study's space, and settings with it.

    Of a study that can judge any config it is a value that no config may have.
    """
    space, (fewest, most) = study.space, study.space.steps
    settings: dict[str, Any] = {"experiment": study.name, "prompt": PROMPTS[0]}
    settings |= space.draw(rng)
    wrong: list[dict[str, Any]] = []
    if others := sorted({*VISIBILITIES} - {*space.visibility}):
        wrong.append({"visibility": rng.choice(others)})
    if fewest > 1:
        wrong.append({"max_steps": rng.randrange(1, fewest)})
    if most is not None:
        wrong.append({"max_steps": most + rng.randint(1, 100)})
    if space.widest is not None:
        width = space.widest + rng.randint(1, 100)
        wrong += [{"max_width": width, "threshold": 1 / (width + 1)}]
        wrong += [{"max_width": None, "threshold": rng.uniform(0.001, 0.9 / space.widest)}]
    if not wrong:
        wrong = [
            {"threshold": rng.choice((0, -0.1, 1.5, math.nan, "high"))},
            {"max_steps": rng.choice((0, -3, 2.5, "many"))},
            {"max_width": rng.choice((0, -1, 1.5))},
            {"visibility": rng.choice(("sideways", "", 1))},
            {"capture": rng.choice((["everything"], "kv ", 7))},
            {"steps": 3},
        ]
    chosen = rng.choice(wrong)
    return next(iter(chosen)), settings | chosen


def problem_outside(study: Study, module: Path, name: str, settings: dict[str, Any]) -> str:
    """What is wrong with what collection says of such a config; "" if nothing."""
    suite = Suite(tuple(map(SuitePrompt, PROMPTS)), "three prompts")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outside.yaml"
        path.write_text(json.dumps(settings).replace("NaN", ".nan"), encoding="utf-8")
        try:
            plans_of(study, module, [path], suite, None)
        except TempoError as error:
            said = str(error)
        except Exception as error:
            return f"raised {type(error).__name__}: {error}"
        else:
            return "was not refused"
    if "\n" in said or "outside.yaml" not in said or name not in said:
        return f"was refused with {said!r}"
    return ""


def campaign_outside(number: int, names: Sequence[str] = ()) -> list[str]:
    """What goes wrong with so many configs outside, each study in turn, a line each."""
    known = {name: pair for name, pair in studies().items() if name in names or not names}
    rng, found = random.Random(SEED), []
    for index in range(number):
        name = list(known)[index % len(known)]
        study, module = known[name]
        setting, settings = draw_outside(study, rng)
        if problem := problem_outside(study, module, setting, settings):
            found.append(f"{name} {settings}: {problem}")
            print(found[-1], flush=True)
    return found


def main() -> int:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    inside = campaign(number, sys.argv[2:])
    outside = campaign_outside(number // 5, sys.argv[2:])
    print(f"{number} configs inside, {len(inside)} problems")
    print(f"{number // 5} configs outside, {len(outside)} problems")
    return 1 if inside or outside else 0


if __name__ == "__main__":
    sys.exit(main())
