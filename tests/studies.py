"""A study as a user would write it, to be broken in every way by the tests of the harness."""

STUDY = '''\
from dataclasses import dataclass

from tempo.harness import Planned, Study, average, run
from tempo.metrics import entropy

study = Study("entropy", title="Is seeing siblings sobering?")


@dataclass(frozen=True)
class Case:
    gap: float | None
    again: float | None


@study.measure
def modes(prompt):
    source = yield run(prompt)
    both = ("isolated", "visible")
    isolated, visible = yield [run(prompt, replay=source, visibility=v) for v in both]
    return Case(gap=gap(visible, isolated), again=gap(source, isolated))


def gap(one, other):
    pairs = zip(one.steps, other.steps, strict=True)
    return average([entropy(a.distribution) - entropy(b.distribution) for a, b in pairs])


EFFECT = Planned(0.15, sd=0.3, source="guess")


@study.claim(more_than=0.05, because="a twentieth of a nat", planned=EFFECT)
def test_visible_is_less_sure(case):
    """Seeing siblings makes the next distribution flatter."""
    return case.gap


@test_visible_is_less_sure.control
def isolated_twice(case):
    """isolated mode twice"""
    return case.again


def test_cases(cases):
    assert cases
'''

CONFIG = """\
experiment: entropy
prompt: The cat sat on the
max_steps: 4
threshold: 0.05
"""

PROMPTS = (
    "Es war einmal ein\nDer Hund lief\nHeute ist das Wetter\nIn der Stadt\nMeine Mutter\nAm Abend\n"
)
