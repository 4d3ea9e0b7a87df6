"""Workers of any number of hosts that share a folder: no server, file locks only.

    FOLDER/<sweep>/setup.json            what each worker is told
    FOLDER/<sweep>/units/<unit>.json     what is to be done
    FOLDER/<sweep>/held/<unit>/          the lock of whoever does it, and who tried
    FOLDER/<sweep>/answers/<unit>.json   what was found
    FOLDER/<sweep>/said/<worker>.json    a worker that is ready, or why it is refused

A killed worker's lock is free, so that the next worker takes its unit. A session that was killed
and is started again has the same sweep, and finds what was answered meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tempo import files
from tempo.errors import ResultsError, WorkerError
from tempo.parsing import parse_json, read_bytes, seal, unseal
from tempo.workers import MOST_TRIES, Answer, Setup
from tempo.workers.work import Worker, is_sound, killed_too_often, name_of_worker

SETUP, UNITS, HELD, ANSWERS, SAID = "setup.json", "units", "held", "answers", "said"
TRIES = "tries.txt"
POLL_SECONDS = 0.02  # of a driver, and of workers on its own machine
SLOWEST_POLL = 1.0  # of either, once nothing has happened for long
REFUSED = 3  # the exit code of a worker that is not what the session needs
GRACE_SECONDS = 5.0  # for a worker to end by itself


class FolderWorkers:
    """The driver's side: puts units into the folder and takes answers out."""

    number: int | None = None

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.folder, self.say = folder, say

    def run(
        self,
        setup: Setup,
        units: Sequence[Any],
        is_wanted: Callable[[int], bool] = lambda index: True,
        tick: Callable[[Path], None] = lambda sweep: None,
    ) -> Iterator[tuple[int, Answer]]:
        """As `Executor.run`; tick: called with the sweep's folder each time nothing has come."""
        sweep = self.folder / setup["name"]
        contents = {_name(index, unit): (index, unit) for index, unit in enumerate(units)}
        for place in (UNITS, HELD, ANSWERS, SAID):
            files.make_folder(sweep / place)
        _sweep_earlier(self.folder, sweep, setup)
        with files.locked(sweep, "two sessions cannot share a results folder"):
            try:
                _write(sweep / SETUP, setup)
                waiting = dict(contents)
                pause, refused = POLL_SECONDS, set()
                while waiting:
                    for name in [n for n, (index, _) in waiting.items() if not is_wanted(index)]:
                        _forget(sweep, name)
                        del waiting[name]
                    came = False
                    for name in sorted(waiting.keys() & names_in(sweep / ANSWERS)):
                        answer = read(sweep / ANSWERS / name)
                        # damaged, or of another tempo
                        if answer is None or not is_sound(setup, answer):
                            files.remove(sweep / ANSWERS / name)
                            continue
                        came = True
                        yield waiting.pop(name)[0], answer
                        _forget(sweep, name)  # only now: whoever asked has kept it
                    if came:
                        pause = POLL_SECONDS
                        continue
                    here = names_in(sweep / UNITS)
                    for name in [name for name in waiting if name not in here]:
                        _write(sweep / UNITS / name, {"unit": waiting[name][1]})
                    self._tell_refusals(sweep, refused)
                    tick(sweep)
                    time.sleep(pause)
                    pause = min(pause * 1.2, SLOWEST_POLL)
            finally:
                files.remove(sweep)

    def _tell_refusals(self, sweep: Path, told: set[str]) -> None:
        for name in sorted(names_in(sweep / SAID) - told):
            told.add(name)
            if why := (read(sweep / SAID / name) or {}).get("refused"):
                self.say(why)


def _name(index: int, unit: Any) -> str:
    """A unit's name: its order, then what it is."""
    content = json.dumps(unit, sort_keys=True)
    return f"{index:06d}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"


def _sweep_earlier(folder: Path, sweep: Path, setup: Setup) -> None:
    """Remove what killed sessions of the same owner left: their code or model was another."""
    for other in _sweeps(folder):
        if other == sweep or (read(other / SETUP) or {}).get("owner") != (setup["owner"] or None):
            continue
        with suppress(ResultsError), files.locked(other, "it is not a killed session's"):
            files.remove(other)


def _forget(sweep: Path, name: str) -> None:
    for place in (UNITS, ANSWERS, HELD):
        files.remove(sweep / place / name)


def _write(path: Path, record: Any) -> None:
    files.write(path, json.dumps(seal(record)))


def read(path: Path) -> dict[str, Any] | None:
    """The record of a file; None if it is not there, or damaged."""
    try:
        return unseal(parse_json(read_bytes(path)))
    except (OSError, ValueError):
        return None


def names_in(folder: Path) -> set[str]:
    """The files of a folder that are whole."""
    with suppress(OSError):
        return {name for name in os.listdir(folder) if not name.startswith(".")}
    return set()


def _sweeps(folder: Path) -> list[Path]:
    return sorted(folder / name for name in names_in(folder) if (folder / name / SETUP).exists())


# --- the worker's side


@contextmanager
def _taken(sweep: Path) -> Iterator[str | None]:
    """The name of the first unit that nobody else does, held meanwhile; None if there is none."""
    with ExitStack() as held:
        yield next(filter(lambda name: _hold(held, sweep, name), _free(sweep)), None)


def _free(sweep: Path) -> list[str]:
    return sorted(names_in(sweep / UNITS) - names_in(sweep / ANSWERS))


def _hold(held: ExitStack, sweep: Path, name: str) -> bool:
    """Whether this process holds the unit now, which was neither answered nor taken back."""
    try:
        held.enter_context(files.locked(sweep / HELD / name, "take another unit"))
    except (ResultsError, OSError):
        return False
    if (sweep / UNITS / name).exists() and not (sweep / ANSWERS / name).exists():
        return True
    held.close()
    return False


def serve(sweep: Path, name: str, *, stay: bool) -> int:
    """Do units of one sweep until it is gone; the exit code.

    name: under which it says that it is ready, or why it is refused. stay: wait for units that
    others hold now, in case their workers are killed.
    """
    setup = read(sweep / SETUP)
    if setup is None:
        return 0
    signal.signal(signal.SIGTERM, _end)
    try:
        worker = Worker(setup)
    except Exception as error:  # whatever it is, the session must know why there is no worker
        why = str(error) if isinstance(error, WorkerError) else f"{name_of_worker()}: {error}"
        _tell(sweep, name, {"refused": why})
        return REFUSED
    _tell(sweep, name, {"ready": name_of_worker()})
    pause = POLL_SECONDS
    while (sweep / SETUP).exists():
        with _taken(sweep) as unit:
            if unit is not None:
                _answer(sweep, setup, worker, unit)
                pause = POLL_SECONDS
                continue
        if not stay:
            break
        time.sleep(pause)
        pause = min(pause * 1.2, SLOWEST_POLL)
    return 0


def _tell(sweep: Path, name: str, what: dict[str, str]) -> None:
    if (sweep / SETUP).exists():  # else writing would make the folder again
        _write(sweep / SAID / name, what)


def _answer(sweep: Path, setup: Setup, worker: Worker, name: str) -> None:
    """Answer a unit that this process holds."""
    tries, unit = sweep / HELD / name / TRIES, read(sweep / UNITS / name)
    if unit is None:
        files.remove(sweep / UNITS / name)  # damaged; the driver writes it again
        return
    before = tries.read_text().splitlines() if tries.exists() else []
    if len(before) >= MOST_TRIES:
        answer = killed_too_often(setup, before)
    else:
        files.append(tries, f"{name_of_worker()}\n".encode())
        try:
            answer = worker.answer_to(unit["unit"])
        except BaseException:  # ended by its user, which says nothing about the unit
            files.write(tries, "".join(f"{line}\n" for line in before))
            raise
    if (sweep / SETUP).exists():
        _write(sweep / ANSWERS / name, answer)


def work(folder: Path, wait: float, say: Callable[[str], None]) -> None:
    """Do whatever sessions put into a folder, until there has been nothing for `wait` seconds.

    Each sweep is done by a process of its own, which loads its model and its code. Raises
    WorkerError if there is no such folder.
    """
    if not folder.is_dir():
        raise WorkerError(f"there is no folder {folder}; make it, and name it in --workers as well")
    signal.signal(signal.SIGTERM, _end)
    refused: set[str] = set()
    last, pause = time.monotonic(), POLL_SECONDS
    while time.monotonic() - last < wait:
        for sweep in _sweeps(folder):
            if sweep.name in refused or not _free(sweep):
                continue
            say(f"working for {sweep.name}")
            process = start(sweep, secrets.token_hex(4))
            try:
                code = process.wait()
            finally:
                kill(process, GRACE_SECONDS)
            if code == REFUSED:
                refused.add(sweep.name)
                say(f"not what {sweep.name} needs; its session says why")
            last, pause = time.monotonic(), POLL_SECONDS
        time.sleep(pause)
        pause = min(pause * 1.2, SLOWEST_POLL)
    say(f"no work for {wait:.0f} s")


# Ends with its parent, however that ends: then its standard input does.
_SERVE = """
import os, sys, threading
def end_with_parent():
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=end_with_parent, daemon=True).start()
from pathlib import Path
from tempo.workers.folder import serve
sys.exit(serve(Path(sys.argv[1]), sys.argv[2], stay="stay" in sys.argv))
"""


def start(sweep: Path, name: str, *more: str, **settings: Any) -> subprocess.Popen[Any]:
    """A process that serves a sweep, to be ended by `kill`; it ends with this one at the latest.

    more: "stay", see `serve`. settings: for `subprocess.Popen`.
    """
    command = [sys.executable, "-c", _SERVE, str(sweep), name, *more]
    # in a session of its own, as a Ctrl-C at the terminal is for the driver
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, **settings)


def _end(*_: object) -> None:
    """What a worker does when its user or a scheduler ends it: no unit is to blame."""
    sys.exit(128 + signal.SIGTERM)


def kill(process: subprocess.Popen[Any], grace: float = 0.0) -> None:
    """End a process, if it has not ended; grace: seconds that it has to end by itself."""
    if process.poll() is None and grace:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    if process.poll() is None:
        process.kill()
    process.wait()
    if process.stdin:
        process.stdin.close()
