"""Processes of this machine: they share a folder that is gone at the end."""

from __future__ import annotations

import os
import secrets
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from tempo import files
from tempo.errors import WorkerError
from tempo.workers import MOST_TRIES, Answer, Setup
from tempo.workers.folder import SAID, FolderWorkers, kill, read, start


class _Process(NamedTuple):
    process: subprocess.Popen[Any]
    name: str
    log: IO[str]  # what it printed


class LocalWorkers:
    """So many processes, each with a model of its own. One that is killed is started again."""

    def __init__(self, number: int, say: Callable[[str], None] = lambda line: None) -> None:
        self.number: int | None = number
        self.say = say

    def run(
        self,
        setup: Setup,
        units: Sequence[Any],
        is_wanted: Callable[[int], bool] = lambda index: True,
    ) -> Iterator[tuple[int, Answer]]:
        running: list[_Process] = []
        number = min(self.number or 1, sum(map(is_wanted, range(len(units)))))
        stillborn = 0  # how many ended before they were ready, one after another

        def keep_running(sweep: Path) -> None:
            nonlocal stillborn
            for ended in [each for each in running if each.process.poll() is not None]:
                said = read(sweep / SAID / ended.name) or {}
                stillborn = 0 if "ready" in said else stillborn + 1
                if "refused" in said or stillborn >= MOST_TRIES:
                    raise WorkerError(said.get("refused") or _last_words(ended))
                running.remove(ended)
                _end(ended)
            while len(running) < number:
                running.append(_start(sweep, setup))

        # Removed at the end; what a killed session left, by the next one.
        with files.staging(Path(tempfile.gettempdir()) / "tempo-workers") as folder:
            try:
                yield from FolderWorkers(folder, self.say).run(
                    setup, units, is_wanted, keep_running
                )
            finally:
                for each in running:
                    _end(each)


def _start(sweep: Path, setup: Setup) -> _Process:
    """A worker with as many threads as the session has: another number rounds otherwise."""
    more = {"OMP_NUM_THREADS": str(setup["threads"])}
    # several processes share the cores, and threads that spin while they wait starve there
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | more
    log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 -- open as long as it runs
    name = secrets.token_hex(4)
    process = start(sweep, name, "stay", stdout=log, stderr=log, env=environment)
    return _Process(process, name, log)


def _end(worker: _Process) -> None:
    kill(worker.process)
    worker.log.close()


def _last_words(ended: _Process) -> str:
    """Why workers end before they are ready, as far as can be told."""
    ended.log.seek(0)
    lines = ended.log.read().strip().splitlines()
    code = ended.process.returncode
    how = f"signal {-code}, perhaps for want of memory" if code < 0 else f"exit code {code}"
    said = f": {lines[-1]}" if lines else ""
    return f"{MOST_TRIES} workers ended before they had loaded their model ({how}){said}"
