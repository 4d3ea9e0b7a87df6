"""tempo.spec: what a run may be asked, what it is told when it may not, YAML and hashing."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import BatchEncoding

import tempo
from tempo.errors import SpecError
from tempo.spec import (
    BY_QUERY,
    CAPTURES,
    POSITIONS,
    READOUTS,
    VISIBILITIES,
    RunSpec,
    load_yaml,
)
from tests.exactness import PAIRS

VALID = {
    "prompt": "a cat",
    "threshold": 0.2,
    "schedule": (0.3, 0.1),
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.05,
    "sample": 3,
    "seed": 7,
    "max_steps": 3,
    "visibility": "causal",
    "positions": "sequential",
    "readout": "mixture",
    "weighting": "count",
    "prune": 0.1,
    "prune_by": "attention",
    "max_width": 4,
    "stop_at_eos": False,
    "replay": ((1, 2), (3,)),
    "replay_positions": ((5, 5), (6,)),
    "replay_weights": ((0.5, 1.0), (2.0,)),
    "replay_links": None,
    "weighting_layers": None,
    "isolated_layers": (0, 2),
    "isolated_mass": "self",
    "capture": ("logits",),
}
CHANGED = {
    "prompt": "a dog",
    "threshold": 0.3,
    "schedule": (0.3, 0.2),
    "top_k": None,
    "top_p": 1.0,
    "min_p": None,
    "sample": 2,
    "seed": 8,
    "max_steps": 4,
    "visibility": "visible",
    "positions": "shared",
    "readout": "first",
    "weighting": "none",
    "prune": 0.2,
    "prune_by": "posterior",
    "max_width": None,
    "stop_at_eos": True,
    "replay": ((1, 2), (4,)),
    "replay_positions": ((5, 6), (6,)),
    "replay_weights": ((0.5, 1.0), (3.0,)),
    "replay_links": (((0.25,), (0.75,)),),
    "weighting_layers": (1, 2),
    "isolated_layers": (1, 2),
    "isolated_mass": "spread",
    "capture": ("kv",),
}

# Some settings exclude others. These are changed of another valid spec.
BESIDE = {
    "readout": {"prune": None, "prune_by": "posterior"},
    "replay_links": {"weighting": "posterior", "replay_weights": None},
    "weighting_layers": {"isolated_layers": None, "isolated_mass": "spread"},
}


def valid(key):
    """Valid settings of which `key` can be changed alone."""
    return VALID | BESIDE.get(key, {})


TOKEN_IDS = st.lists(st.integers(0, 2**40), min_size=1, max_size=4).map(tuple)
TOKEN_SETS = st.lists(
    st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True).map(tuple),
    min_size=1,
    max_size=3,
)
TEXT = st.text(min_size=1, max_size=20)
SHARES = st.floats(0.0, 1.0, exclude_min=True)


def of_pair(pair):
    """The settings with this readout and weighting, and any pruning that these allow."""
    pruned = {"prune": SHARES, "prune_by": st.sampled_from(["posterior", "attention"])}
    unpruned = {"prune": st.none(), "prune_by": st.just("posterior")}
    choices = [unpruned, pruned] if pair["readout"] == "mixture" else [unpruned]
    return st.one_of(map(st.fixed_dictionaries, choices)).map(lambda pruning: pair | pruning)


ALL_BUT_PAIRS = st.fixed_dictionaries(
    {
        "prompt": TEXT | TOKEN_IDS,
        "threshold": SHARES,
        "schedule": st.none() | st.lists(SHARES, min_size=1, max_size=3).map(tuple),
        "top_k": st.none() | st.integers(1, 10**6),
        "top_p": st.none() | SHARES,
        "min_p": st.none() | SHARES,
        "sample": st.none() | st.integers(1, 10**6),
        "seed": st.integers(0, 2**70),
        "max_steps": st.integers(1, 10**20),
        "visibility": st.sampled_from(VISIBILITIES),
        "positions": st.sampled_from(POSITIONS),
        "max_width": st.none() | st.integers(1, 10**6),
        "stop_at_eos": st.booleans(),
        "replay": st.none() | TOKEN_SETS.map(tuple),
        "replay_positions": st.none(),
        "replay_weights": st.none(),
        "replay_links": st.none(),
        "weighting_layers": st.none(),
        "isolated_layers": st.none() | st.integers(0, 9).map(lambda first: (first, first + 2)),
        "isolated_mass": st.just("spread"),
        "capture": st.lists(st.sampled_from(CAPTURES), max_size=4).map(tuple),
    }
)
SETTINGS = st.tuples(ALL_BUT_PAIRS, st.sampled_from(PAIRS).flatmap(of_pair)).map(
    lambda both: both[0] | both[1]
)


def refusal(**changes):
    """The message with which these settings are refused."""
    with pytest.raises(SpecError) as error:
        RunSpec(**{"prompt": "a cat", **changes})
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "bad", "seen", "expected", "good"),
    [
        ("threshold", -0.5, "-0.5", "a probability from 0 to 1", 0.5),
        ("threshold", 1.5, "1.5", "a probability from 0 to 1", 1e-9),
        ("threshold", math.nan, "nan", "a probability from 0 to 1", 1),
        ("threshold", math.inf, "inf", "a probability from 0 to 1", np.float32(0.5)),
        ("threshold", "0.1", "'0.1'", "a valid number", 0.1),
        ("threshold", True, "True", "a valid number", 1),
        ("threshold", None, "None", "a valid number", 0.1),
        ("schedule", [], "[]", "at least one threshold, each above 0", [1.0]),
        ("schedule", [0.3, 0.0], "[0.3, 0.0]", "each above 0 and at most 1", [0.3, 1e-9]),
        ("schedule", [0.3, 1.5], "[0.3, 1.5]", "each above 0 and at most 1", (0.3, 1)),
        ("schedule", [math.nan], "[nan]", "each above 0 and at most 1", np.array([0.5])),
        ("schedule", 0.3, "0.3", "a valid tuple", None),
        ("schedule", ["much"], "'much'", "a valid number", [0.5]),
        ("schedule", [True], "True", "a valid number", [1]),
        ("top_k", 0, "0", "greater than or equal to 1", 1),
        ("top_k", 2.0, "2.0", "a valid integer", None),
        ("top_p", 0.0, "0.0", "a probability above 0 and at most 1", 1e-9),
        ("top_p", 1.1, "1.1", "a probability above 0 and at most 1", 1.0),
        ("top_p", math.nan, "nan", "a probability above 0 and at most 1", None),
        ("min_p", 0.0, "0.0", "a probability above 0 and at most 1", 1.0),
        ("min_p", "0.1", "'0.1'", "a valid number", 0.1),
        ("prune", 0.0, "0.0", "a probability above 0 and at most 1", 1.0),
        ("prune", -0.1, "-0.1", "a probability above 0 and at most 1", None),
        ("prune_by", "atention", "'atention'", "did you mean 'attention'?", "posterior"),
        ("sample", 0, "0", "greater than or equal to 1", 1),
        ("sample", 1.5, "1.5", "a valid integer", None),
        ("seed", -1, "-1", "greater than or equal to 0", 0),
        ("seed", 0.5, "0.5", "a valid integer", 2**80),
        ("weighting", "posteriour", "'posteriour'", "did you mean 'posterior'?", "posterior"),
        ("weighting", "best parent", "'best parent'", "mean 'best_parent'?", "best_parent"),
        ("max_steps", 0, "0", "greater than or equal to 1", 1),
        ("max_steps", -1, "-1", "greater than or equal to 1", 1),
        ("max_steps", 2.0, "2.0", "a valid integer", 2),
        ("max_steps", True, "True", "a valid integer", 1),
        ("max_steps", "3", "'3'", "a valid integer", 3),
        ("max_width", 0, "0", "greater than or equal to 1", 1),
        ("max_width", 1.5, "1.5", "a valid integer", None),
        ("stop_at_eos", 1, "1", "a valid boolean", True),
        ("stop_at_eos", "no", "'no'", "a valid boolean", False),
        ("visibility", "all", "'all'", "'isolated', 'visible' or 'causal'", "causal"),
        ("visibility", "visble", "'visble'", "did you mean 'visible'?", "visible"),
        ("visibility", 3, "3", "'isolated', 'visible' or 'causal'", "isolated"),
        ("positions", "sharde", "'sharde'", "did you mean 'shared'?", "shared"),
        ("readout", "mixtrue", "'mixtrue'", "did you mean 'mixture'?", "mixture"),
        ("weighting", "probabilty", "'probabilty'", "did you mean 'probability'?", "probability"),
        ("prompt", "", "''", "give at least one token", " "),
        ("prompt", "a\ud800", r"'a\ud800'", "give valid Unicode", "a\ud7ff\U0001f600"),
        ("prompt", [], "[]", "give at least one token", [0]),
        ("prompt", None, "None", "a valid string", "None"),
        ("prompt", 5, "5", "a valid string", [5]),
        ("prompt", b"ab", "b'ab'", "a valid string", "ab"),
        ("prompt", [1, 2.0], "2.0", "a valid integer", [1, 2]),
        ("prompt", [1, True], "True", "a valid integer", [1, 1]),
        ("prompt", ["a"], "'a'", "a valid integer", "a"),
        ("replay", [], "[]", "leave replay out for a free run", None),
        ("replay", [[1], []], "[[1], []]", "the set of step 1 is empty", [[1], [2]]),
        ("replay", [1, 2], "1", "a valid tuple", [[1, 2]]),
        ("replay", [["a"]], "'a'", "a valid integer", [[0]]),
        ("replay", "ab", "'ab'", "a valid tuple", [[97], [98]]),
        ("replay", [[True]], "True", "a valid integer", [[1]]),
        ("capture", "weights", "'weights'", "'logits', 'kv' or 'residual'", "kv"),
        (
            "capture",
            ["kv", "weights"],
            "'weights'",
            "'logits', 'kv' or 'residual'",
            ["kv", "logits"],
        ),
        ("capture", "atention", "'atention'", "did you mean 'attention'?", "attention"),
        ("isolated_mass", "slef", "'slef'", "did you mean 'self'?", "spread"),
        ("capture", 5, "5", "a valid tuple", ()),
    ],
)
def test_a_bad_value_is_refused_by_key_value_and_expectation_and_a_good_one_is_not(
    key, bad, seen, expected, good
):
    message = refusal(**{key: bad})
    assert message.startswith("RunSpec: ")
    assert f"{key}={seen}" in message
    assert expected in message
    assert key in RunSpec(**{"prompt": "a cat", key: good}).model_fields_set


def test_a_guess_is_offered_only_for_what_is_near():
    assert "did you mean" in refusal(visibility="isolatd")
    assert "did you mean" not in refusal(visibility="everything")
    assert refusal(treshold=0.1) == "RunSpec: unknown key 'treshold'; did you mean 'threshold'?"
    far = refusal(temperature_scale=0.1)
    assert "did you mean" not in far
    assert all(key in far for key in ("unknown key 'temperature_scale'", "valid keys", *VALID))


def test_every_problem_is_named_at_once():
    message = refusal(threshold=2.0, max_steps=0, visibilty="causal")
    assert message.count("\n") == 2
    assert all(
        part in message for part in ("threshold=2.0", "max_steps=0", "did you mean 'visibility'?")
    )
    assert "max_width" not in message


def test_a_missing_prompt_is_named():
    with pytest.raises(SpecError, match="'prompt' is missing"):
        RunSpec()  # type: ignore[call-arg]


def test_a_long_value_is_cut_short_in_the_message():
    message = refusal(visibility="x" * 10_000)
    assert len(message.splitlines()[0]) < 160
    assert "..." in message
    assert "..." not in refusal(visibility="x")


@pytest.mark.parametrize(
    "kind", [np.int64, np.int32, np.uint8, torch.tensor], ids=lambda kind: kind.__name__
)
def test_integers_of_any_library_are_token_ids_and_become_int(kind):
    spec = RunSpec(prompt=[kind(3), kind(4)], replay=[[kind(5)], (kind(6), kind(7))])
    assert spec == RunSpec(prompt=(3, 4), replay=((5,), (6, 7)))
    assert {type(token) for tokens in (spec.prompt, *spec.replay) for token in tokens} == {int}
    assert "a valid integer" in refusal(prompt=[np.float32(3)])
    assert "a valid integer" in refusal(replay=[[np.True_]])


def test_arrays_are_token_ids_too():
    tokens = np.array([[3, 4], [5, 6]])
    assert RunSpec(prompt=tokens[0], replay=tokens) == RunSpec(
        prompt=[3, 4], replay=[[3, 4], [5, 6]]
    )
    assert RunSpec(prompt=torch.tensor([3, 4])).prompt == (3, 4)
    assert RunSpec(prompt=tokens[0]) != RunSpec(prompt=tokens[1])


@pytest.mark.parametrize(
    "prompt",
    [
        [[3, 4]],
        ((3, 4),),
        np.array([[3, 4]]),
        torch.tensor([[3, 4]]),
        [torch.tensor([3, 4])],
        {"input_ids": [3, 4]},
        {"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.ones(1, 2)},
        BatchEncoding({"input_ids": [[3, 4]], "attention_mask": [[1, 1]]}),
        BatchEncoding({"input_ids": [3, 4], "attention_mask": [1, 1]}),
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_what_a_tokenizer_returns_is_a_prompt(prompt):
    spec = RunSpec(prompt=prompt)
    assert spec.prompt == (3, 4)
    assert {type(token) for token in spec.prompt} == {int}
    assert spec == RunSpec(prompt=[3, 4]) == RunSpec.from_yaml(spec.to_yaml())
    assert spec.key() == RunSpec(prompt=[3, 4]).key()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([[1, 2], [3, 4]], "holds 2 rows, .* use generate_batch with one RunSpec each"),
        (np.ones((3, 2), int), "holds 3 rows, .* use generate_batch"),
        (torch.ones(2, 20, dtype=torch.long), "holds 2 rows, .* use generate_batch"),
        ({"input_ids": [[1], [2]]}, "holds 2 rows, .* use generate_batch"),
        ({"tokens": [1]}, r"the keys \['tokens'\]; .* which holds input_ids"),
        (BatchEncoding({"input_ids": [[0, 1]], "attention_mask": [[0, 1]]}), "is padded"),
        (BatchEncoding({"input_ids": [1, 0], "attention_mask": [1, 0]}), "is padded"),
        ({"input_ids": [[1]], "attention_mask": torch.zeros(1, 1)}, "without padding"),
        ([{"role": "user", "content": "a"}], r"lm\.chat\(messages\)"),
        ([[]], "the prompt is empty"),
        ([[[1]]], "a valid integer"),
        (["one text"], "a valid integer"),
        (torch.tensor([1.0]), "a valid integer"),
        (torch.tensor([True]), "a valid integer"),
        (torch.tensor(3), "a valid tuple"),
        (np.int64(3), "a valid tuple"),
    ],
)
def test_what_is_no_one_prompt_is_refused(prompt, expected):
    with pytest.raises(SpecError, match=f"(?s)^RunSpec: prompt=.*{expected}") as error:
        RunSpec(prompt=prompt)
    assert all(line.lstrip().startswith("prompt=") for line in str(error.value)[9:].split("\n"))


def test_the_repr_names_what_differs_from_the_defaults_and_is_short():
    assert repr(RunSpec(prompt="a")) == "RunSpec(prompt='a')"
    spec = RunSpec(prompt="a\n", threshold=0.05, visibility="causal", capture="kv")
    expected = r"RunSpec(prompt='a\n', threshold=0.05, visibility='causal', capture=('kv',))"
    assert repr(spec) == str(spec) == expected
    assert eval(repr(spec)) == spec
    long = RunSpec(prompt="x" * 1000, replay=[[1, 2]] * 1000)
    assert repr(long).count("...") == 2
    assert len(repr(long)) < 120
    assert len(repr(RunSpec(**VALID))) < 700


@given(st.permutations(CAPTURES), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_the_order_of_capture_does_not_matter_and_its_content_does(names, count):
    spec = RunSpec(prompt="a", capture=names[:count])
    assert (
        spec
        == RunSpec(prompt="a", capture=reversed(names[:count]))
        == RunSpec(prompt="a", capture=names[:count] * 2)
    )
    assert spec.key() == RunSpec(prompt="a", capture=set(names[:count])).key()
    assert hash(spec) == hash(RunSpec(prompt="a", capture=names[:count][::-1]))
    if count < len(names):
        assert spec != RunSpec(prompt="a", capture=names[: count + 1])


def test_one_name_is_a_capture():
    assert RunSpec(prompt="a", capture="kv").capture == ("kv",)
    assert RunSpec(prompt="a", capture="kv") != RunSpec(prompt="a")


@given(SETTINGS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_yaml_brings_every_spec_back(given_settings):
    spec = RunSpec(**given_settings)
    again = RunSpec.from_yaml(spec.to_yaml())
    assert again == spec
    assert again.key() == spec.key()
    assert again.to_yaml() == spec.to_yaml()
    assert RunSpec.from_yaml(spec.but(max_steps=spec.max_steps + 1).to_yaml()) != spec


def test_a_yaml_file_may_leave_defaults_out(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("prompt: ünïcode 日本\nreplay: [[1, 2], [3]]\nthreshold: 1\n", encoding="utf-8")
    assert RunSpec.from_yaml(path) == RunSpec(
        prompt="ünïcode 日本", replay=[[1, 2], [3]], threshold=1.0
    )
    assert RunSpec.from_yaml(path) != RunSpec(prompt="ünïcode 日本", replay=[[1, 2], [3]])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("- prompt\n", "holds list, expected keys and values"),
        ("", "holds NoneType, expected keys and values"),
        ("prompt", "holds str, expected keys and values"),
        ("prompt: [", "is not valid YAML"),
        ("prompt: a\n---\nprompt: b\n", "line 2: a second document begins"),
        ("prompt: a\n\tthreshold: 0.1\n", "is not valid YAML"),
        ("prompt: !!python/object/apply:os.getcwd []\n", "python/object/apply:os.getcwd"),
        ("!!python/object:tempo.spec.RunSpec {prompt: a}\n", "python/object:tempo.spec.RunSpec"),
        ("prompt: !!python/name:os.system\n", "python/name:os.system"),
        ("prompt: a\ntreshold: 0.1\n", "unknown key 'treshold'; did you mean 'threshold'?"),
        ("prompt: a\n5: 0.1\n", "unknown key '5'; valid keys"),
        ("prompt: a\nthreshold: 2\n", "threshold=2"),
        ("prompt: a\nreplay: &sets [*sets]\n", "line 2: *sets is an alias"),
        ("threshold: 0.1\n", "'prompt' is missing"),
    ],
)
def test_a_yaml_error_names_the_file_or_the_text(tmp_path, content, said):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(SpecError) as in_file:
        RunSpec.from_yaml(path)
    with pytest.raises(SpecError) as in_text:
        RunSpec.from_yaml(content)
    assert str(path) in str(in_file.value)
    assert "the YAML text" in str(in_text.value)
    assert said in str(in_file.value)
    assert said in str(in_text.value)
    path.write_text("prompt: a\n")
    assert RunSpec.from_yaml(path) == RunSpec(prompt="a")


def test_a_yaml_python_tag_runs_nothing(tmp_path):
    witness = tmp_path / "witness"
    path = f"!!python/object/apply:pathlib.Path ['{witness}']"
    with pytest.raises(SpecError, match="python/object"):
        RunSpec.from_yaml(f"prompt: !!python/object/apply:pathlib.Path.touch [{path}]")
    assert not witness.exists()
    Path(witness).touch()
    assert witness.exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is no UTF-8 text"),
    ],
    ids=["missing", "folder", "not utf-8"],
)
def test_a_file_that_is_not_yaml_is_named(tmp_path, make, said):
    path = tmp_path / "run.yaml"
    make(path)
    with pytest.raises(SpecError) as error:
        RunSpec.from_yaml(path)
    assert str(path) in str(error.value)
    assert said in str(error.value)


def test_load_yaml_reads_any_strict_model(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("prompt: a")
    assert load_yaml(RunSpec, path) == RunSpec(prompt="a")
    with pytest.raises(SpecError, match="unknown key 'b'"):
        load_yaml(RunSpec, "{prompt: a, b: c}")


@given(SETTINGS, SETTINGS, st.sets(st.sampled_from(sorted(VALID))))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_keys_are_equal_exactly_if_the_settings_are(one, other, taken):
    first = RunSpec(**one)
    bound = ("readout", "weighting", "prune", "prune_by")  # taken together, or the spec is refused
    chosen = taken.difference(bound) | (set(bound) if "readout" in taken else set())
    second = RunSpec(**{key: one[key] if key in chosen else other[key] for key in VALID})
    assert (first.key() == second.key()) == (first == second)
    assert (first.key(with_capture=False) == second.key(with_capture=False)) == (
        first == second.but(capture=first.capture)
    )
    assert first.key() == RunSpec(**one).key()


@pytest.mark.parametrize("key", VALID)
def test_every_setting_changes_the_key_and_capture_only_the_key_with_capture(key):
    one, other = RunSpec(**valid(key)), RunSpec(**{**valid(key), key: CHANGED[key]})
    assert one != other
    assert one.key() != other.key()
    assert (one.key(with_capture=False) == other.key(with_capture=False)) == (key == "capture")


def test_the_key_does_not_depend_on_the_process():
    # a fixed value: a stored trace must be found again by another process and on another day
    assert RunSpec(prompt="a").key() == "412fbd6ef8a87b9b"
    assert RunSpec(prompt="a").key(with_capture=False) == "8a1aac2dfd16b396"
    assert RunSpec(prompt="a", threshold=1).key() == RunSpec(prompt="a", threshold=1.0).key()
    assert RunSpec(prompt="12").key() != RunSpec(prompt=[12]).key()


@pytest.mark.parametrize("key", VALID)
def test_a_spec_is_frozen(key):
    spec = RunSpec(**valid(key))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(spec, key, CHANGED[key])
    assert spec == RunSpec(**valid(key))
    assert spec.but(**{key: CHANGED[key]}) != spec


def test_but_changes_what_it_is_told_and_nothing_else():
    spec = RunSpec(**VALID)
    changed = spec.but(threshold=0.5, capture="kv")
    assert changed.model_dump() == {**VALID, "threshold": 0.5, "capture": ("kv",)}
    assert spec == RunSpec(**VALID)
    assert spec.but() == spec != changed


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": 2.0},
        {"max_steps": 0},
        {"replay": []},
        {"capture": "all"},
        {"visibilty": "causal"},
    ],
)
def test_but_checks_again(changes):
    with pytest.raises(SpecError):
        RunSpec(prompt="a").but(**changes)
    assert RunSpec(prompt="a").but(threshold=0.5).threshold == 0.5


def test_but_replays_the_sets_of_a_trace(tiny):
    trace = tempo.generate(tiny, "ab", threshold=0.05, max_steps=3)
    assert max(trace.widths) > 1
    replayed = trace.spec.but(replay=trace, visibility="visible")
    assert replayed == RunSpec(
        **{**trace.spec.model_dump(), "visibility": "visible", "replay": trace}
    )
    assert tempo.generate(tiny, "ab", replay=trace).sets == trace.sets
    assert [list(tokens) for tokens in replayed.replay] == trace.sets
    assert (
        replayed
        == trace.spec.but(replay=trace.sets, visibility="visible")
        != trace.spec.but(visibility="visible")
    )
    assert replayed.but(replay=None) == trace.spec.but(visibility="visible")
    with pytest.raises(SpecError, match="no sets to replay"):
        trace.spec.but(replay=SimpleNamespace(steps=[]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"replay_positions": [[1]]}, "replay_positions needs a replay"),
        (
            {"replay": [[1, 2]], "replay_positions": [[1]]},
            r"rows of \[1\] numbers, the replay sets of \[2\] tokens",
        ),
        ({"replay": [[1]], "replay_positions": [[-1]]}, "positions count from 0"),
        ({"replay": [[1]], "replay_weights": [[0.0]]}, "a weight that is not above 0"),
        ({"replay": [[1]], "replay_weights": [[math.nan]]}, "a weight that is not above 0"),
        ({"replay": [[1]], "replay_weights": [["much"]]}, "replay_weights"),
        ({"isolated_layers": [2, 2]}, r"for example \[0, 4\]"),
        ({"isolated_mass": "self"}, "give isolated_layers as well"),
    ],
)
def test_details_of_a_replay_that_fit_nothing_are_refused(settings, expected):
    with pytest.raises(SpecError, match=expected):
        RunSpec(prompt="a", **settings)


@pytest.mark.parametrize(
    "bound",
    [
        {"top_k": 5},
        {"top_p": 0.5},
        {"min_p": 0.5},
        {"sample": 2},
        {"max_width": 3},
        {"schedule": [0.1]},
        {"replay": [[1]]},
        {"threshold": 1e-9},
    ],
    ids=lambda bound: next(iter(bound)),
)
def test_no_threshold_needs_another_rule(bound):
    said = "threshold=0 lets the whole vocabulary into every set; give top_k, top_p, min_p, sample"
    assert said in refusal(threshold=0)
    assert RunSpec(prompt="a", **{"threshold": 0, **bound})


@pytest.mark.parametrize("readout", [name for name in READOUTS if name != "mixture"])
@pytest.mark.parametrize(
    "needing", [*({"weighting": name} for name in BY_QUERY), {"prune": 0.1}], ids=str
)
def test_what_takes_the_mixture_apart_is_refused_with_another_readout(needing, readout):
    ((name, value),) = needing.items()
    said = refusal(readout=readout, **needing)
    assert f"{name}='{value}'" in said or f"{name} needs" in said
    assert f"needs readout='mixture', not '{readout}'" in said
    assert RunSpec(prompt="a", **needing).readout == "mixture"


@pytest.mark.parametrize("weighting", BY_QUERY)
def test_posteriors_and_given_weights_are_refused_together(weighting):
    given_weights = {"replay": [[1, 2]], "replay_weights": [[1.0, 2.0]]}
    said = refusal(weighting=weighting, **given_weights)
    assert f"weighting='{weighting}' and replay_weights both say what members weigh" in said
    assert RunSpec(prompt="a", weighting="count", **given_weights)
    assert RunSpec(prompt="a", weighting=weighting, replay=[[1, 2]])


LINKS = (((0.25, 1.0), (0.75, 0.0)), ((1.0,), (0.0,)))
LINKED = {"replay": [[1, 2], [3, 4], [5]], "weighting": "posterior"}


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        (LINKS[:1], r"replay_links\[1\] has rows of \[\] numbers; expected 2 rows of 1"),
        ((*LINKS, ((1.0,),)), "replay_links holds 3 matrices; expected 2"),
        ((((0.25,), (0.75,)), LINKS[1]), r"replay_links\[0\] has rows of \[1, 1\] numbers"),
        ((((1.0, 1.0),), LINKS[1]), "expected 2 rows of 2, a row for each member of set 0"),
        ((((0.5, 1.0), (0.75, 0.0)), LINKS[1]), r"columns that sum to \[1.25, 1.0\]"),
        ((((1.5, 1.0), (-0.5, 0.0)), LINKS[1]), "a negative number"),
        ((((math.nan, 1.0), (0.5, 0.0)), LINKS[1]), "columns that sum to"),
        ("much", "replay_links"),
        ([0.5], "replay_links"),
    ],
)
def test_links_that_do_not_fit_the_sets_are_refused(links, expected):
    with pytest.raises(SpecError, match=expected):
        RunSpec(prompt="a", **LINKED, replay_links=links)
    spec = RunSpec(prompt="a", **LINKED, replay_links=[np.array(each) for each in LINKS])
    assert spec.replay_links == LINKS
    assert RunSpec.from_yaml(spec.to_yaml()) == spec


@pytest.mark.parametrize(
    "missing",
    [{"weighting": "none"}, {"weighting": "count"}, {"replay": None}],
    ids=str,
)
def test_links_are_refused_where_they_say_nothing(missing):
    with pytest.raises(SpecError, match="replay_links says how the sets of a replay are linked"):
        RunSpec(**{"prompt": "a", "replay_links": LINKS, **LINKED, **missing})


def test_how_to_prune_is_refused_without_a_bound():
    assert "prune_by='attention' says how prune decides; give prune" in refusal(
        prune_by="attention"
    )
    assert RunSpec(prompt="a", prune_by="attention", prune=0.1).prune == 0.1


def test_the_rules_of_a_step_are_those_of_the_schedule_and_its_last_one_holds():
    spec = RunSpec(prompt="a", threshold=0.5, schedule=[0.3, 0.1], top_k=4, max_width=2)
    thresholds = [spec.rules(step, [1])["threshold"] for step in range(4)]
    assert thresholds == [0.3, 0.1, 0.1, 0.1]
    assert spec.but(schedule=None).rules(3, [1]) == {
        "threshold": 0.5,
        "top_k": 4,
        "top_p": None,
        "min_p": None,
        "sample": None,
        "max_width": 2,
    }


def test_each_seed_step_and_prompt_has_a_draw_of_its_own():
    spec = RunSpec(prompt="a", sample=2)
    seeds = [
        each.rules(step, prompt)["seed"]
        for each in (spec, spec.but(seed=1))
        for step in range(3)
        for prompt in ([1], [1, 2])
    ]
    assert len(set(seeds)) == len(seeds)
    # a fixed value: the same draw in another process and on another day
    assert seeds[0] == 24718257996425452
    assert spec.but(capture="kv", max_steps=3).rules(0, [1])["seed"] == seeds[0]


def test_layers_a_model_does_not_have_and_positions_beyond_its_context_are_refused(tiny):
    with pytest.raises(SpecError, match=f"has {tiny.num_layers} layers"):
        tempo.generate(tiny, "ab", isolated_layers=(0, tiny.num_layers + 1))
    with pytest.raises(SpecError, match="positions"):
        tempo.generate(tiny, "ab", replay=[[1]], replay_positions=[[tiny.context_length]])
    run = tempo.generate(
        tiny, "ab", replay=[[1], [1, 1]], replay_positions=[[tiny.context_length - 1], [3, 4]]
    )
    assert run.slot_position[-3:].tolist() == [tiny.context_length - 1, 3, 4]


@pytest.mark.parametrize("prompt", ["\x85", "a\u2028b", "\u2029", "日本\x85"])
def test_yaml_keeps_every_kind_of_line_break(prompt):
    assert RunSpec.from_yaml(RunSpec(prompt=prompt).to_yaml()).prompt == prompt
