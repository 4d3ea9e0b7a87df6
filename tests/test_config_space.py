"""Every config inside the space that a study declares works; outside it there is one line."""

import random

import pytest

from benchmarks import configs
from benchmarks.configs import campaign, campaign_outside, draw, studies
from tempo import SpecError
from tempo.harness import Space, StudyConfig
from tempo.harness.plan import plans_of
from tempo.harness.prompts import Suite, SuitePrompt

NUM_TRIED = 40  # `make campaign` tries 300
STUDIES = studies()


def config(**settings):
    return StudyConfig(experiment="exp0", prompt="a", **settings)


def test_random_configs_inside_the_space_work():
    assert campaign(NUM_TRIED) == []


def test_a_study_that_fails_inside_its_space_is_seen(monkeypatch):
    def broken(prompt):
        yield []
        return 1 / 0

    study, module = STUDIES["exp13"]
    monkeypatch.setattr(study, "measurement", broken)
    monkeypatch.setattr(configs, "check_study", lambda *_: None)
    monkeypatch.setattr(configs, "studies", lambda: {"exp13": (study, module)})
    monkeypatch.setattr("tempo.harness.evidence.case_class", lambda _: dict)
    assert "division by zero" in campaign(1)[0]


@pytest.mark.parametrize(
    ("space", "inside", "outside", "said"),
    [
        (Space(visibility=("visible",)), {"visibility": "visible"}, {}, "visibility is 'isolated'"),
        (Space(steps=(2, 4)), {"max_steps": 2}, {"max_steps": 5}, "max_steps from 2 to 4"),
        (Space(thresholds=(0.1, 0.5)), {"threshold": 0.5}, {"threshold": 0.6}, "from 0.1 to 0.5"),
        (Space(widest=8), {"threshold": 0.01, "max_width": 8}, {"threshold": 0.01}, "at most 8"),
        (Space(widest=32), {"threshold": 0.03125}, {"threshold": 0.02}, "threshold 0.03125"),
        (Space(captures=()), {}, {"capture": ["kv"]}, "capture is ('kv',)"),
    ],
)
def test_a_config_outside_is_told_in_one_line(space, inside, outside, said):
    space.check(config(**inside), "a.yaml")
    with pytest.raises(SpecError) as told:
        space.check(config(**outside), "a.yaml")
    assert "a.yaml: " in str(told.value) and said in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", STUDIES)
def test_what_is_drawn_lies_inside_and_the_shipped_configs_do(name):
    study, module = STUDIES[name]
    rng = random.Random(1)
    for _ in range(50):
        study.space.check(draw(study, rng), "drawn")
    plans_of(study, module, (), Suite((SuitePrompt("a"),), "one"), None)


def test_random_configs_outside_the_space_are_one_line_each():
    assert campaign_outside(60) == []


def test_a_config_outside_that_is_taken_or_told_badly_is_seen(monkeypatch):
    monkeypatch.setattr(Space, "check", lambda *_: None)
    assert "was not refused" in campaign_outside(1, ["exp3"])[0]

    def wordy(self, config, where):
        raise SpecError("two\nlines")

    monkeypatch.setattr(Space, "check", wordy)
    assert "was refused with" in campaign_outside(1, ["exp3"])[0]


def test_the_docs_say_which_configs_each_experiment_can_judge():
    page = (configs.ROOT / "docs/limits.md").read_text(encoding="utf-8")
    for name, (study, _) in STUDIES.items():
        assert f"| {name} | {study.space.describe()} |" in page


def test_a_config_outside_is_refused_at_collection(tmp_path):
    study, module = STUDIES["exp3"]
    path = tmp_path / "mine.yaml"
    path.write_text("experiment: exp3\nprompt: a\nvisibility: isolated\n", encoding="utf-8")
    with pytest.raises(SpecError, match=r"mine\.yaml: visibility is 'isolated', with which exp3"):
        plans_of(study, module, [path], Suite((SuitePrompt("a"),), "one"), None)
