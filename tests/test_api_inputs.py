"""Whatever is wrong with a call of a public function is said in one line, in tempo's words."""

import warnings

import pytest

import tempo
from tempo.inputs import array, checked, seen, whole
from tests import api_inputs
from tests.api_inputs import Kind, answer

LEAST_KINDS = 1500  # of wrong input; a table that lost some would test less


def test_every_kind_of_wrong_input_is_refused_in_one_line(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = api_inputs.run(tiny, tmp_path)
    assert (found.raw, found.silent, found.wordy) == ([], [], [])
    assert found.refused == found.tried >= LEAST_KINDS
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "config",
        "empty",
        "strange",
    ], "a refused call left a folder behind"


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: 1 / 0, "raw"),
        (lambda: {}["x"], "raw"),
        (lambda: len(5), "raw"),
        (lambda: None, "silent"),
        (lambda: tempo.RunSpec(), "refused"),
        (lambda: tempo.generate_batch(), "refused"),
    ],
)
def test_each_answer_is_told_from_the_others(call, expected):
    assert answer(Kind("x", call))[0] == expected


def test_a_message_of_two_lines_is_no_message_of_one():
    def call():
        raise tempo.SpecError("one line of what is wrong\nand another")

    assert answer(Kind("x", call))[0] == "wordy"


def test_what_was_seen_fits_one_line_whatever_its_repr_does():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    assert seen("a\n\x1b[31mb" * 100).isprintable()
    assert len(seen("x" * 1000)) < 100
    assert "Broken" in seen(Broken())


def test_a_checked_function_computes_with_what_the_rule_gives():
    @checked(values=array(1), times=whole(1))
    def scaled(values, times=1):
        return (values * times).tolist()

    assert scaled([1, 2], times=2) == [2.0, 4.0]
    assert scaled(values=(1,)) == [1.0]
    with pytest.raises(tempo.SpecError, match=r"scaled: times is 0; expected a whole number from"):
        scaled([1], times=0)
    with pytest.raises(tempo.SpecError, match="did you mean 'times'"):
        scaled([1], tims=1)
    with pytest.raises(TypeError, match="missing a required argument"):
        scaled()
