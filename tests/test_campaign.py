"""The campaign of faults, in part: every kind of fault, at every operation of what is quick.

`make campaign` has all of it. Here a session and a publication meet each fault at some operations.
"""

import os

import pytest
import torch

from benchmarks import writing
from benchmarks.injector import FAULTS, Plan, forked, operations
from tempo import files

# One thread: a forked process has no others. And no fork at all where there is none.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that it forks"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.set_num_threads(1)
    return writing.Sessions(tmp_path_factory.mktemp("sessions") / "made")


def problems(tally):
    assert sum(tally.tries.values()) and tally.ended["killed"], "no fault struck"
    return tally.details


@pytest.mark.parametrize("make", [writing.append_scenario, writing.save_scenario])
def test_nothing_is_lost_at_any_operation(make, tmp_path):
    assert problems(writing.at_every_operation(make(), tmp_path / "x", stride=3)) == []


def test_nothing_of_a_sweep_is_lost(tmp_path):
    tally = writing.at_every_operation(writing.stream_scenario(), tmp_path / "x", stride=9)
    assert problems(tally) == []


def test_nothing_of_a_publication_or_of_the_users_is_lost(made, tmp_path):
    scenario = writing.publish_scenario(made, tmp_path / "published")
    tally = writing.at_every_operation(scenario, tmp_path / "x", stride=9)
    assert problems(tally) == []


def test_nothing_of_a_session_is_lost_and_a_resumed_one_is_equal_to_the_bit(made, tmp_path):
    scenario = writing.session_scenario(made)
    tally = writing.at_every_operation(scenario, tmp_path / "x", stride=23)
    assert problems(tally) == []


def test_kills_at_random_lose_nothing(tmp_path):
    tally = writing.at_random(writing.save_scenario(), tmp_path / "x", kills=10)
    assert problems(tally) == []


@pytest.mark.parametrize("number", [2, 4])
def test_several_processes_at_once_lose_nothing(number, tmp_path):
    assert writing.writers(tmp_path / "x", number, records=60).details == []
    assert writing.sharers(tmp_path / "y", number, rounds=1).details == []


# --- the campaign itself can fail


def written_in_place(path, content):
    with open(path, "w") as file:
        file.write(content)


def test_a_write_that_is_not_atomic_would_be_found(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "write", written_in_place)
    faults = ("torn", "short")
    tally = writing.at_every_operation(writing.save_scenario(), tmp_path / "x", faults)
    assert tally.problems["lost"] > 0


def test_a_raw_exception_and_a_silent_end_would_be_found(tmp_path, monkeypatch):
    def prepare(root):
        (root / "page").write_text("old")

    def act(root):
        files.write(root / "page", "new")
        return 0

    def silent(root):
        try:
            return act(root)
        except OSError:
            return 0

    def final(root):
        return [] if (root / "page").read_text() == "new" else ["the old page"]

    for how, kind in ((act, "raw exception"), (silent, "silently wrong")):
        scenario = writing.Scenario("a page", prepare, how, lambda root: [], final, 0.01)
        tally = writing.at_every_operation(scenario, tmp_path / "x", ("io",))
        assert tally.problems[kind] > 0
        assert tally.problems["lost"] == 0


def test_what_is_left_over_would_be_found(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "sweep", lambda *folders: None)
    tally = writing.at_every_operation(writing.save_scenario(), tmp_path / "x", ("kill",))
    assert tally.problems["left over"] > 0


def test_the_injector_sees_every_operation_on_a_folder_and_none_elsewhere(tmp_path):
    def act():
        files.write(tmp_path / "in/page", "x" * 10)
        files.append(tmp_path / "in/lines", b"x")
        files.write(tmp_path / "out/page", "x")
        return 0

    kinds = [kind for kind, _ in operations(act, tmp_path / "in", tmp_path / "log")]
    page = ["mkdir", "create", "write", "fsync", "rename", "fsync"]
    assert [kind for kind in kinds if kind not in ("flock", "unlink")][:6] != []
    assert kinds[0] == "mkdir"
    for kind in page:
        assert kind in kinds
    assert kinds.count("create") == 2


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_strikes(fault, tmp_path):
    def act():
        files.write(tmp_path / "in/page", "x" * 10)
        return 0

    (tmp_path / "in").mkdir()
    seen = operations(act, tmp_path / "in", tmp_path / "log")
    at = [kind for kind, _ in seen].index("write")
    (tmp_path / "in/page").unlink()
    ended = forked(act, tmp_path / "in", Plan(at, fault), tmp_path / "log")
    assert ended.code != 0
    assert not (tmp_path / "in/page").exists()
    left = [path.read_text() for path in (tmp_path / "in").iterdir()]
    assert left == {"torn": ["xxxxx"], "kill": [""]}.get(fault, [])
