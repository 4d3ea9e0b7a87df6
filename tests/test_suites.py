"""Suites of prompts: the formats they are read from, and the part of one that is measured."""

import sys
from types import SimpleNamespace

import pytest

from fixtures.suite import suite, suite_texts
from tempo import SpecError
from tempo.harness.prompts import Suite, SuitePrompt, read_suite

TWO = [("Es war einmal", "Märchen"), ("Der Hund", "Tiere")]
TEXTS = {
    "a.jsonl": (
        '{"prompt": "Es war einmal", "category": "Märchen", "language": "German"}\n\n'
        '{"prompt": "Der Hund", "category": "Tiere", "language": "German"}\n'
    ),
    "a.csv": "category,prompt,language\nMärchen,Es war einmal,German\nTiere,Der Hund,German\n",
    "a.yaml": (
        "language: German\nprompts:\n  Märchen:\n  - Es war einmal\n  Tiere: ['Der Hund']\n"
    ),
}


def written(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", TEXTS)
def test_every_format_gives_the_same_suite(tmp_path, name):
    found = read_suite(written(tmp_path, name, TEXTS[name]))
    assert found.prompts == tuple(SuitePrompt(*pair) for pair in TWO)
    assert found.describe([3, 2]) == f"2 prompts in German of 2 categories, 2 to 3 tokens ({name})"


def test_a_text_file_has_a_prompt_a_line_and_says_nothing_of_language(tmp_path):
    lines = "\ufeffEs war einmal\n\nDer Hund\nDer Hund\n"
    found = read_suite(written(tmp_path, "a.txt", lines))
    assert [prompt.text for prompt in found.prompts] == ["Es war einmal", "Der Hund"]
    assert found.describe() == "2 prompts (a.txt)"


def test_prompts_with_line_breaks_commas_and_quotes_survive(tmp_path):
    rows = 'prompt\n"one, ""two""\nthree"\n'
    assert read_suite(written(tmp_path, "a.csv", rows)).prompts[0].text == 'one, "two"\nthree'
    row = '{"prompt": "Zutaten:\\n- Mehl"}\n'
    assert read_suite(written(tmp_path, "a.jsonl", row)).prompts[0].text == "Zutaten:\n- Mehl"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.pdf", "x", "is of no known format; expected .txt"),
        ("a.txt", "\n\n", "holds no prompt"),
        ("a.csv", "text,category\nEs war,x\n", "line 2 has no 'prompt'; it has 'text', 'category'"),
        ("a.csv", "promt\n", "has no 'prompt'; rename 'promt'"),
        ("a.jsonl", '{"prompt": "x"}\n[1]\n', "line 2 is no JSON object"),
        ("a.jsonl", '{"prompt": 7}\n', "line 1: the prompt is 7, expected text"),
        ("a.yaml", "one: two\n", "one holds no list of prompts"),
        ("a.yaml", "- 3\n", "the prompt is 3, expected text; quote it"),
        ("a.yaml", "a: [b\n", "is not valid YAML"),
    ],
)
def test_what_is_wrong_with_a_suite_is_said_in_one_line(tmp_path, name, text, said):
    with pytest.raises(SpecError) as error:
        read_suite(written(tmp_path, name, text))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_or_no_text_is_said(tmp_path):
    with pytest.raises(SpecError, match="No such file"):
        read_suite(str(tmp_path / "none.txt"))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(SpecError, match="no UTF-8 text"):
        read_suite(str(tmp_path / "a.txt"))


class Rows(list):
    """Stands for a split of a dataset."""

    column_names = ("text", "category")

    def select(self, places):
        return Rows(self[i] for i in places)


def test_a_dataset_of_the_hub_is_read_if_the_package_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SpecError, match="pip install datasets"):
        read_suite("hf:someone/prompts:text")
    rows = Rows([{"text": "Es war einmal", "category": "Märchen"}])
    loaded = SimpleNamespace(load_dataset=lambda name: {"train": rows})
    monkeypatch.setitem(sys.modules, "datasets", loaded)
    assert read_suite("hf:someone/prompts:text").prompts == (
        SuitePrompt("Es war einmal", "Märchen"),
    )
    with pytest.raises(SpecError, match="has no column 'prompt'; it has text, category"):
        read_suite("hf:someone/prompts")


def test_a_part_is_spread_over_the_categories_in_proportion():
    prompts = [
        SuitePrompt(f"{name}{i}", name) for name, n in (("a", 6), ("b", 3)) for i in range(n)
    ]
    found = Suite(tuple(prompts), "x")
    assert [prompt.text for prompt in found.spread(6)] == ["a0", "b0", "a1", "b1", "a2", "a3"]
    assert len(found.spread()) == len(found.spread(9)) == len(found.spread(100)) == 9
    for number in range(1, 10):
        part = found.spread(number)
        assert len(part) == number == len(set(part))
        of_a = sum(prompt.category == "a" for prompt in part)
        assert abs(of_a - number * 2 / 3) < 1


def test_identity_is_of_the_prompts_not_of_the_file():
    one = Suite((SuitePrompt("x", "a"), SuitePrompt("y", "a")), "one.txt")
    assert one.sha256 == Suite((SuitePrompt("y", "b"), SuitePrompt("x", "a")), "two.csv").sha256
    assert one.sha256 != Suite((SuitePrompt("x", "a"),), "one.txt").sha256


def test_the_suite_of_the_experiments_has_sixteen_prompts_a_category_and_two_of_the_seed():
    sizes: dict[str, int] = {}
    for prompt in suite().prompts:
        sizes[prompt.category] = sizes.get(prompt.category, 0) + 1
    assert (sizes.pop("seed"), sizes.pop("seed of exp5")) == (1, 1)
    assert set(sizes.values()) == {16}
    assert len(sizes) == 10
    firsts = {prompt.text: prompt.category for prompt in suite().prompts}
    assert len({firsts[text] for text in suite_texts(10)}) == 10
