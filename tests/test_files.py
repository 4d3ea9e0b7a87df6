"""tempo.files: whole or not at all, and nobody else's; every check with a twin that can fail."""

import ast
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tempo import files
from tempo.errors import ResultsError
from tempo.records import append_jsonl, read_jsonl

ROOT = Path(__file__).resolve().parent.parent
TEMPO = sorted((ROOT / "tempo").rglob("*.py"))


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# --- every write goes through the module

CHANGES = {
    *("write_text", "write_bytes", "mkdir", "makedirs", "rename", "unlink", "rmdir", "rmtree"),
    *("touch", "copyfile", "copytree", "move", "symlink_to", "hardlink_to", "ftruncate"),
    *("mkdtemp", "mkstemp", "TemporaryDirectory", "NamedTemporaryFile", "savefig", "getpid"),
}
# What else changes the disk, with the reason why it may.
ALLOWED = {
    ("wheels.py", "mkdir"): "in the staging folder, which files.settle moves to its place",
    ("wheels.py", "rmtree"): "in the staging folder",
    ("wheels.py", "symlink_to"): "in the staging folder",
    ("wheels.py", "open"): "in the staging folder",
    ("work.py", "getpid"): "said to a person, and no part of a name",
    ("drawing.py", "savefig"): "into memory",
    ("exports.py", "savefig"): "into memory",
}


def changes(source):
    """(line, name) of each call that changes files."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        writes = any(isinstance(mode, str) and set(mode) & set("wax+") for mode in modes[:2])
        is_path_replace = name == "replace" and len(node.args) == 1 and not node.keywords
        if getattr(getattr(node.func, "value", None), "id", "") == "files":
            continue
        if name in CHANGES or (name == "open" and writes) or is_path_replace:
            yield node.lineno, name
        if name == "replace" and getattr(getattr(node.func, "value", None), "id", "") == "os":
            yield node.lineno, name


def test_nothing_but_the_module_of_files_changes_the_disk():
    strange = [
        f"{path.name}:{line} {name}"
        for path in TEMPO
        if path.name != "files.py"
        for line, name in changes(path.read_text())
        if (path.name, name) not in ALLOWED
    ]
    assert strange == []


@pytest.mark.parametrize(
    "source",
    [
        "path.write_text(x)",
        "path.open('wb')",
        "open(path, 'a')",
        "fresh.replace(path)",
        "os.replace(a, b)",
        "shutil.rmtree(x)",
    ],
)
def test_a_change_elsewhere_would_be_seen(source):
    assert len(list(changes(source))) >= 1
    assert list(changes("text.replace('a', 'b'); path.open('rb'); replace(x, a=1)")) == []


# --- one file


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path):
    path = tmp_path / "a" / "page.html"
    files.write(path, "one")
    path.chmod(0o640)
    files.write(path, "two")
    assert path.read_text() == "two"
    assert path.stat().st_mode & 0o777 == 0o640
    assert names(path.parent) == ["page.html"]


def test_an_error_within_leaves_what_was_there_and_nothing_else(tmp_path):
    files.write(tmp_path / "page", "one")

    def half():
        with files.replacing(tmp_path / "page") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert (tmp_path / "page").read_text() == "one"
    assert names(tmp_path) == ["page"]


def test_through_a_link_the_file_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/page").write_text("one")
    (tmp_path / "link").symlink_to(tmp_path / "real/page")
    files.write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/page").read_text() == "two"
    assert names(tmp_path / "real") == ["page"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="it is not a file"):
            files.write(place, "x")
    with pytest.raises(ResultsError, match="is no file; give --summary the name of a file"):
        files.check_file(tmp_path / "pipe", "--summary")


def test_a_file_of_the_longest_name_can_be_written(tmp_path):
    for name in ("x" * 255, "ü" * 127):
        files.write(tmp_path / name, "x")
    assert len(names(tmp_path)) == 2


def test_content_and_name_are_on_disk_before_the_write_is_over(tmp_path, monkeypatch):
    seen = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, _real=real, _name=name: (seen.append(_name), _real(*a))[1]
        )
    files.write(tmp_path / "page", "x")
    assert seen == ["fsync", "replace", "fsync"]


# --- what killed processes leave


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path):
    here = files._machine()
    left = tmp_path / f".page.tempo-{here}-{dead_process()}-00000000"
    own = tmp_path / f".page.tempo-{here}-{os.getpid()}-00000000"  # an unlink of ours was refused
    for path in (left, own):
        path.write_text("half")
    files.write(tmp_path / "page", "x")
    assert names(tmp_path) == ["page"]


def test_what_others_are_writing_or_own_is_left_alone(tmp_path):
    here = files._machine()
    kept = [
        f".page.tempo-{here}-{os.getppid()}-00000000",  # alive
        f".page.tempo-00000000-{dead_process()}-00000000",  # of another machine, and fresh
        ".page.tempo-mine",
        f"page.tempo-{here}-1-00000000",
    ]
    for name in kept:
        (tmp_path / name).write_text("x")
    files.write(tmp_path / "page", "x")
    assert names(tmp_path) == sorted([*kept, "page"])
    day_ago = time.time() - files.ABANDONED_SECONDS - 60
    os.utime(tmp_path / kept[1], (day_ago, day_ago))
    files.write(tmp_path / "page", "x")
    assert names(tmp_path) == sorted([*kept[:1], *kept[2:], "page"])


def test_a_file_that_this_process_is_writing_is_not_taken_for_left_over(tmp_path):
    with files.replacing(tmp_path / "one") as file:
        files.write(tmp_path / "two", "x")
        file.write(b"y")
    assert names(tmp_path) == ["one", "two"]


# --- lines

ADD = """
import sys
from tempo.records import append_jsonl
for i in range(int(sys.argv[3])):
    text = "x" * (i * 3701 % 200_000)  # long ones show what is not written at once
    append_jsonl(sys.argv[1], [{"writer": sys.argv[2], "i": i, "text": text}])
"""


@pytest.mark.parametrize("number", [2, 4])
def test_several_processes_append_to_one_file_and_no_record_is_lost(tmp_path, number):
    """Case 13: two to four writers lost 41 of 1600 records."""
    path, each = tmp_path / "cases.jsonl", 60
    path.write_bytes(b'{"torn": ')
    command = [sys.executable, "-c", ADD, str(path)]
    began = [subprocess.Popen([*command, str(i), str(each)], cwd=ROOT) for i in range(number)]
    assert [process.wait() for process in began] == [0] * number
    found = [(record["writer"], record["i"]) for record in read_jsonl(path).records]
    assert sorted(found) == sorted((str(w), i) for w in range(number) for i in range(each))


@pytest.mark.parametrize("tail", [b'{"torn": 1', b'{"torn": "' + b"x" * 99999, b"\xff"])
def test_half_a_line_of_a_killed_run_is_dropped_and_a_whole_one_ended(tmp_path, tail):
    path = tmp_path / "cases.jsonl"
    append_jsonl(path, [{"a": 1}])
    first = path.read_bytes()
    for content in (first + tail, first.rstrip()):
        path.write_bytes(content)
        append_jsonl(path, [{"b": 2}])
        assert read_jsonl(path) == ([{"a": 1}, {"b": 2}], [])


def test_a_disk_that_fills_up_while_lines_are_added_takes_them_back(tmp_path, monkeypatch):
    path = tmp_path / "cases.jsonl"
    append_jsonl(path, [{"a": 1}])
    first, real, left = path.read_bytes(), os.write, [5]

    def write(handle, data):
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data[: left.pop()])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(ResultsError, match="No space left on device; its earlier lines"):
        append_jsonl(path, [{"b": 2}])
    assert path.read_bytes() == first


# --- locks

HOLD = """
import sys, time
from tempo import files
with files.locked(sys.argv[1], "wait"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_who_holds_a_folder_is_named_to_a_second_one(tmp_path, holder):
    with (
        pytest.raises(ResultsError, match=rf"is in use by process {holder.pid} on .*; try later"),
        files.locked(tmp_path, "try later"),
    ):
        pass


def test_the_lock_of_a_killed_process_is_taken_over_and_leaves_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert names(tmp_path) == [files.LOCK]
    with files.locked(tmp_path, "try later"):
        assert json.loads((tmp_path / files.LOCK).read_text())["pid"] == os.getpid()
    assert names(tmp_path) == []


def test_a_process_does_not_wait_for_itself(tmp_path):
    with (
        files.locked(tmp_path, "try later"),
        pytest.raises(ResultsError, match=f"in use by process {os.getpid()}"),
        files.locked(tmp_path, "try later", wait=5),
    ):
        pass


# --- folders


def test_a_folder_is_made_whole_or_not_at_all(tmp_path):
    def half():
        with files.staging(tmp_path / "model") as staging:
            (staging / "model").mkdir()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert names(tmp_path) == []
    with files.staging(tmp_path / "model") as staging:
        (staging / "model").mkdir()
        (staging / "model/weights").write_text("x")
        files.settle(staging / "model", tmp_path / "model")
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["weights"]


# --- publication


def test_a_publication_that_is_cut_short_is_ended_by_the_next(tmp_path, monkeypatch):
    files.publish(tmp_path, {"figures/a": b"1", "figures/b": b"1", "page": b"1"}, "-")
    moved = []
    real = os.replace

    def replace(source, target):
        moved.append(Path(target).name)
        if moved.count("c") and target.name == "page":
            raise OSError(errno.EIO, "Input/output error")
        return real(source, target)

    later = {"figures/a": b"2", "figures/c": b"2", "page": b"2"}
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output"):
        files.publish(tmp_path, later, "-")
    monkeypatch.setattr(os, "replace", real)
    assert (tmp_path / "page").read_bytes() == b"1"
    files.publish(tmp_path, {"figures/d": b"3", "page": b"3"}, "-")
    assert names(tmp_path / "figures") == ["d"]
    assert names(tmp_path) == [files.MANIFEST, "figures", "page"]
