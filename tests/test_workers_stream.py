"""tempo.stream by workers: the same traces, whoever computes them."""

import numpy as np
import pytest

import tempo
from tempo.errors import MemoryBudgetError, SpecError, WorkerError
from tests.checks import same_runs
from tests.test_trace import differences
from tests.tiny_models import llama

pytestmark = pytest.mark.usefixtures("one_thread")
CAPTURE = ("attention", "logits")


def specs():
    """Six runs, of which one replays with positions and weights of its own."""
    free = [
        tempo.RunSpec(prompt=prompt, threshold=0.05, max_steps=3, visibility=v, capture=CAPTURE)
        for prompt in ("The cat sat on the", "A dog")
        for v in ("isolated", "visible")
    ]
    sets = {"replay": [[65, 66], [67]], "replay_positions": [[9, 9], [11]]}
    return [
        *free,
        free[0].but(**sets, replay_weights=[[0.1, 1 / 3], [1.0]]),
        tempo.RunSpec(prompt=[99, 97, 116], max_steps=2, threshold=0.07, schedule=[0.2, 0.1 / 3]),
    ]


def but_for_time(one, other):
    return [name for name in differences(one, other) if not name.startswith("seconds")]


def test_traces_do_not_depend_on_who_computes_them(tiny, tmp_path):
    alone = dict(tempo.stream(tiny, specs()))
    (together,) = [dict(tempo.stream(tiny, specs(), workers=1))]  # one chunk: the same batch
    assert sorted(together) == sorted(alone)
    assert list(together) == list(dict(tempo.stream(tiny, specs())))
    for index, trace in together.items():
        assert trace.spec == specs()[index]
        assert but_for_time(trace, alone[index]) == []
    stored = dict(tempo.stream(tiny, specs(), workers=2, max_rows=3, store=tmp_path))
    again = dict(tempo.stream(tiny, specs(), store=tmp_path))  # read, and not computed
    for index, trace in stored.items():
        assert differences(trace, again[index]) == []
        same_runs(trace, alone[index], "other chunks", rounded=True)
    assert any(  # a chunk is a batch of its own, so that rounding differs somewhere
        not np.array_equal(a.distribution, b.distribution)
        for index in alone
        for a, b in zip(alone[index].steps, stored[index].steps, strict=True)
    )


def test_a_model_that_workers_cannot_load_is_refused_by_its_weights():
    model = llama().model
    with (
        tempo.wrap_model(model, name="tiny") as lm,
        pytest.raises(WorkerError, match=r"is refused: its (weights|version|code)"),
    ):
        list(tempo.stream(lm, [tempo.RunSpec(prompt=[1, 2], max_steps=1)], workers=1))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"workers": 1, "spool": "spool"}, SpecError, "workers take neither hooks nor spool"),
        ({"workers": 1, "hooks": [{(0, 0, 1): abs}]}, SpecError, "neither hooks nor spool"),
        ({"workers": 0}, SpecError, "expected a number of processes"),
        ({"workers": 1, "memory_budget": 10}, MemoryBudgetError, "may need"),
        ({"workers": 10**9}, MemoryBudgetError, "1000000000 workers load .* at most"),
    ],
)
def test_what_cannot_be_is_refused_before_a_worker_starts(tiny, settings, error, message):
    with pytest.raises(error, match=message):
        next(tempo.stream(tiny, [tempo.RunSpec(prompt="The cat")], **settings))
