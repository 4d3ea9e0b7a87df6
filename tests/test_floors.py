"""The committed rounding floors hold on this machine, and a real difference is beyond them."""

import json

import pytest

import tempo
from benchmarks.floors import CAPTURE, VARIANTS, differences, in_batches, other_mode
from fixtures import floors
from fixtures.floors import FLOORS, SLACK, rounding
from fixtures.suite import suite_texts
from tempo.errors import TraceError
from tempo.parsing import seal

QUANTITIES = ("tv", "kl", "probability", "logit", "attention", "kv")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"tv": 5.24e-06', '"tv": 5.24e-02', "checksum"),
        ('"tv": 5.24e-06', '"tv": 50', "no rounding"),
    ],
)
def test_a_changed_floor_is_seen(tmp_path, monkeypatch, old, new, said):
    """It would excuse any difference; one whose checksum fits is still no rounding."""
    text = FLOORS.read_text()
    assert old in text
    path = tmp_path / "floors.json"
    path.write_text(text.replace(old, new))
    if said != "checksum":
        path.write_text(json.dumps(seal(json.loads(path.read_text()))))
    monkeypatch.setattr(floors, "FLOORS", path)
    with pytest.raises(TraceError, match=said):
        floors._floors.__wrapped__()


@pytest.fixture(scope="module")
def specs(real):
    prompts = suite_texts(24)[20:]  # not those that the floors were measured on
    wanted = [tempo.RunSpec(prompt=p, threshold=0.05, max_steps=3) for p in prompts]
    free = tempo.generate_batch(real, wanted)
    return [trace.spec.but(replay=trace, capture=CAPTURE) for trace in free]


@pytest.fixture(scope="module")
def base(real, specs):
    return in_batches(real, specs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_run_in_another_shape_differs_by_rounding(real, specs, base, variant):
    for one, other in zip(base, VARIANTS[variant](real, specs), strict=True):
        found = differences(one, other)
        over = {name: found[name] for name in QUANTITIES if found[name] > rounding(name)}
        hint = "if this machine rounds otherwise, look closely before `make floors`"
        assert not over, f"{one.spec.prompt!r}: {over}; {hint}"


def test_another_visibility_does_not(real, specs, base):
    for one, other in zip(base, other_mode(real, specs), strict=True):
        found = differences(one, other)
        assert min(found[name] / rounding(name) for name in QUANTITIES) > 10


def test_floors_grow_with_coarser_numbers():
    for name in QUANTITIES:
        assert rounding(name, "float64") <= rounding(name, "float32") < rounding(name, "bfloat16")


def test_a_floor_is_the_largest_of_all_variants():
    for found in json.loads(FLOORS.read_text())["dtypes"].values():
        for name in QUANTITIES:
            assert found["floor"][name] == max(
                variant[name] for variant in found["variants"].values()
            )


def test_rounding_is_a_multiple_of_what_was_seen():
    assert (
        rounding("tv") == SLACK * json.loads(FLOORS.read_text())["dtypes"]["float32"]["floor"]["tv"]
    )
