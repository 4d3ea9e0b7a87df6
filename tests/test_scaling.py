"""The benchmarks of workers and of a GPU: what they say of themselves, and what they simulate."""

import json
from itertools import pairwise

import pytest

from benchmarks import gpu, scaling
from benchmarks.scaling import Costs, saturation, simulate

COSTS = Costs(window=10.0, driver=0.1, store=1e6, bandwidth=1e9, start=5.0)


def test_few_workers_are_busy_and_more_are_faster():
    times = [simulate(COSTS, 640, workers)["seconds"] for workers in (1, 2, 4, 8)]
    for slow, fast in pairwise(times):
        assert 1.9 < slow / fast < 2.1
    assert simulate(COSTS, 640, 8)["busy"] > 0.9


def test_a_driver_that_is_the_limit_is_seen_to_be():
    """The negative control: more workers help no more, and only more drivers do."""
    limit = saturation(COSTS)
    assert limit == {"driver": 100.0, "store": 10_000.0}
    below, above, far = (simulate(COSTS, 20_000, n) for n in (50, 200, 800))
    assert below["busy"] > 0.95
    assert below["driver"] < 0.6
    assert above["driver"] > 0.95
    assert far["seconds"] / above["seconds"] > 0.95
    assert simulate(COSTS, 20_000, 200, drivers=4)["busy"] > 0.9
    heavy = Costs(10.0, 0.001, 1e9, 1e9, 0.0)
    assert simulate(heavy, 2000, 100)["store"] > 0.95


def test_the_page_has_every_figure_of_the_record(tmp_path):
    costs = Costs(30.0, 0.2, 1e5, 1e8, 8.0)
    simulated = scaling.simulation(costs, 60.0)
    ratio = {"ratio": 1.01, "least": 1.0, "most": 1.02}
    report = {
        "machine": {"cores": 2, "threads": 1, "dtype": "float32", "device": "cpu"},
        "load before": 0.1,
        "model": "tiny",
        "seconds a unit in which nothing is computed": {"0 bytes": 0.011},
        "seconds a chunk of runs": {
            "one process": 1.25,
            "1 worker": 1.25,
            "2 workers": 1.25,
            "1 worker, whole traces": 1.5,
            "runs": 8,
            "one worker over one process": ratio,
        },
        "seconds of the driver": {"keep a case": 0.004, "read a case": 0.0001},
        "seconds of judging one claim, by prompts": {"10000": 0.6},
        "overhead of a window over its computing": 0.0004,
        "simulated": simulated,
    }
    page = scaling.markdown(report)
    for said in (
        "| 1.01 | 1.0 | 1.02 |",
        "0.011",
        "0.004",
        "0.0004",
        "about 150 workers",
        "| 64 |",
    ):
        assert said in page
    assert json.loads(json.dumps(report)) == report


def test_a_record_of_a_cpu_says_that_it_shows_nothing_about_a_gpu(one_thread):
    kept = []
    report = gpu.measure("cpu", gpu.SMALL, kept.append, ["speed"])
    assert kept == [report]
    assert report["note"] == gpu.NOT_A_GPU
    assert report["is_gpu"] is False
    assert min(report["parts"]["speed"]["a step over reading the weights"]) > 1


def test_a_part_that_fails_takes_no_other_along(one_thread, monkeypatch):
    def broken(device, size):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.PARTS, "conformance", broken)
    parts = gpu.measure("cpu", gpu.SMALL, lambda report: None, ["conformance", "speed"])["parts"]
    assert parts["conformance"]["failed"]
    assert parts["conformance"]["error"] == "RuntimeError: no such kernel"
    assert "failed" not in parts["speed"]


def test_without_a_gpu_the_whole_script_is_refused_in_a_line(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu"])
    assert "there is no GPU; --small runs the same code on this CPU" in capsys.readouterr().err
