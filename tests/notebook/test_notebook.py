"""What needs pandas and a kernel: frames, and the notebook of the documentation."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tempo
from tempo.claims import Claim, judge
from tempo.records import Findings
from tests.test_trace import make_trace
from tests.viewing import two_modes

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
MOST_BYTES = 300_000  # of the notebook with its outputs


def outputs(notebook):
    """Of each cell of code, what kinds of output it has; an error is a kind too."""
    found = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            kinds = [
                sorted(output.get("data", {})) or output["output_type"]
                for output in cell["outputs"]
            ]
            found.append(kinds)
    return found


def execute(path, target):
    """The notebook at `path`, executed by the script of the documentation."""
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import notebook\n"
        "notebook.NOTEBOOK = pathlib.Path(sys.argv[2]); sys.argv[1:] = sys.argv[3:]\n"
        "notebook.main()"
    )
    command = [sys.executable, "-c", code, str(DOCS), str(path), str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_notebook_runs_and_shows_what_is_committed(tmp_path):
    path = DOCS / "notebook.ipynb"
    done = execute(path, tmp_path / "again.ipynb")
    assert done.returncode == 0, done.stderr
    committed, again = (
        json.loads(file.read_text(encoding="utf-8")) for file in (path, tmp_path / "again.ipynb")
    )
    assert outputs(committed) == outputs(again)
    assert all(outputs(again))  # every cell shows something
    kinds = [kind for cell in outputs(again) for kind in cell]
    assert ["text/html", "text/plain"] in kinds
    assert ["image/png", "text/plain"] in kinds
    assert "stream" in kinds
    assert "error" not in kinds
    assert path.stat().st_size < MOST_BYTES
    views = [
        "".join(output["data"]["text/html"])
        for cell in again["cells"]
        for output in cell.get("outputs", [])
        if "tempo-view" in "".join(output.get("data", {}).get("text/html", []))
    ]
    assert len(views) == 2
    assert views[0].startswith("<div class=")


def test_a_cell_that_fails_would_be_seen(tmp_path):
    broken = json.loads((DOCS / "notebook.ipynb").read_text(encoding="utf-8"))
    broken["cells"] = [cell for cell in broken["cells"] if cell["cell_type"] == "code"][:1]
    broken["cells"][0]["source"] = "raise ValueError('planted')"
    path = tmp_path / "broken.ipynb"
    path.write_text(json.dumps(broken))
    done = execute(path, tmp_path / "again.ipynb")
    assert done.returncode != 0
    assert "planted" in done.stderr
    assert not (tmp_path / "again.ipynb").exists()


@pytest.fixture(scope="module")
def trace(tiny):
    return two_modes(tiny)[0]


def test_a_frame_has_a_row_for_each_member(trace):
    frame = trace.to_frame()
    assert list(frame.columns) == [
        *("step", "member", "token", "text", "probability", "position", "slot"),
        *("parent", "parent_probability", "on_best_path"),
    ]
    assert len(frame) == sum(trace.widths)
    assert frame.groupby("step").token.apply(list).tolist() == trace.sets
    assert frame[frame.on_best_path].token.tolist() == trace.best_path
    for k in range(1, len(trace.steps)):
        of_step = frame[frame.step == k]
        assert of_step.parent.tolist() == trace.parents(k)
        assert of_step.parent_probability.tolist() == pytest.approx(
            trace.steps[k - 1].links.max(axis=0)
        )
    assert frame[frame.step == 0].parent.isna().all()
    assert (frame.slot == np.arange(len(frame)) + len(trace.prompt_tokens)).all()


def test_what_is_not_known_is_missing_in_the_frame():
    frame = make_trace().to_frame()  # of a trace without links
    assert len(frame) == 3
    assert frame[["parent", "parent_probability", "on_best_path"]].isna().all(axis=None)


def test_findings_are_a_frame_with_a_row_for_each():
    claim = Claim("a.b", "It is small", "", float, "less", "", float, "", margin=1.0)
    found = [judge(claim, [0.1, 0.2, 0.3], {"model": name}) for name in ("one", "two")]
    frame = Findings(found, []).to_frame()
    assert frame.model.tolist() == ["one", "two"]
    assert frame.estimate.tolist() == [finding.estimate for finding in found]
    assert {"claim", "verdict", "low", "high", "n", "p_corrected", "experiment"} <= set(frame)
    assert Findings([], []).to_frame().empty
    assert list(Findings([], []).to_frame()) == list(frame)


def test_a_frame_is_of_a_read_record_as_well(trace, tmp_path):
    loaded = tempo.load_trace(trace.save(tmp_path / "trace"))
    assert loaded.to_frame().equals(trace.to_frame())
