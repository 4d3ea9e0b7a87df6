"""`tempo new NAME`: a study that runs as it is, to be read and changed."""

from __future__ import annotations

import re
from pathlib import Path

from tempo import files
from tempo.errors import ResultsError, SpecError

MODULE = '''\
"""{name}: is the next distribution flatter when siblings see each other?

Siblings are the tokens of one set, all at one position. Run it with

    pytest {file} --model tiny      # a random model, in seconds: to see that it works
    pytest {file}                   # SmolLM2-135M-Instruct, downloaded once

and read reports/findings.html. Then change the question: what is measured, and what is claimed.
"""

from dataclasses import dataclass

from tempo.harness import Planned, Study, average, run
from tempo.metrics import entropy

study = Study("{name}", title="Is seeing siblings sobering?")


@dataclass(frozen=True)
class Case:
    """What one prompt gives: plain numbers, kept in results/{name}/cases.jsonl."""

    gap: float | None  # entropy, visible less isolated, in nats
    again: float | None  # the same of isolated mode twice


@study.measure
def both_modes(prompt):
    """A free run chooses the sets, and both modes replay them: so only the mode differs."""
    source = yield run(prompt)
    modes = ("isolated", "visible")
    isolated, visible = yield [run(prompt, replay=source, visibility=mode) for mode in modes]
    return Case(gap=entropy_gap(visible, isolated), again=entropy_gap(source, isolated))


def entropy_gap(one, other):
    """Entropy of the next distributions of one run less that of another, mean over steps."""
    pairs = zip(one.steps, other.steps, strict=True)
    return average([entropy(a.distribution) - entropy(b.distribution) for a, b in pairs])


# A claim is a test. It says beforehand what must be so, by how much, and where the same number
# must not show it: the control. `planned` says which effect is expected, so that pytest
# --collect-only can tell how many prompts it takes to see it.
@study.claim(
    more_than=0.05,
    because="a twentieth of a nat, less would not be noticed",
    planned=Planned(0.15, sd=0.3, source="a guess; better a pilot"),
)
def test_visible_is_less_sure(case):
    """Seeing siblings makes the next distribution flatter.

    Entropy of the next distribution, visible less isolated, in nats, mean over steps.
    """
    return case.gap


@test_visible_is_less_sure.control
def isolated_twice(case):
    """isolated mode twice, in different batches"""
    return case.again


def test_every_prompt_was_measured(cases):
    """A plain test stands beside claims: `cases` are what was measured, one for each prompt."""
    assert len(cases) > 1
'''

CONFIG = """\
# Which free run chooses the sets. Every setting of it may be changed here; see StudyConfig.
# A study may say which of them it can judge: Study(..., space=Space(steps=(2, None))).
experiment: {name}
prompt: The cat sat on the
max_steps: 8
threshold: 0.1
visibility: isolated
# The prompts to measure. Give your own with --suite FILE: .txt, .csv, .jsonl or .yaml.
suite:
  - The old lighthouse keeper climbed the stairs and
  - Water freezes at a temperature of
  - A binary search tree stores its keys so that
  - Thanks so much for your help, I really
  - My name is Anna and
  - Because the evidence was gathered over three decades, historians who
  - What is the difference between a lake and
  - not because it was difficult, but
  - one, two, three, four,
  - "for i in range(10):\\n    print("
  - On Monday the two sisters decided to
  - The capital city of Portugal is
"""


def new(name: str, folder: Path = Path()) -> list[Path]:
    """Write `test_<name>.py` and `<name>.yaml` into a folder; the paths of both.

    Raises SpecError for a name that no study can have, ResultsError if a file exists already or
    cannot be written.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise SpecError(
            f"a study cannot be called {name!r}; use lower-case letters, digits and _, "
            "such as 'entropy'"
        )
    texts = {
        folder / f"test_{name}.py": MODULE.format(name=name, file=f"test_{name}.py"),
        folder / f"{name}.yaml": CONFIG.format(name=name),
    }
    for path in texts:
        if path.exists():
            raise ResultsError(f"{path} exists already; choose another name, or remove it")
    written: list[Path] = []
    try:
        for path, text in texts.items():
            files.write(path, text)
            written.append(path)
    except OSError as error:
        for path in written:  # half an experiment would be in the way of the next try
            files.remove(path)
        raise ResultsError(
            f"cannot write to {folder}: {files.reason(error)}; choose another with --folder"
        ) from None
    return written
