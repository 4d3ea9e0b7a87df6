"""Faults at file operations: each change that a process makes to a folder can be made to go wrong.

`Injector` counts the operations that change anything below a folder, and lets one of them fail, cut
it short, or end the process there. `forked` runs something in a process of its own, so that it can
be killed.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tempo.errors import TempoError

# Exit codes: ended by a fault; by an error that nobody put into words; by one in words.
KILLED, RAW, SAID = 137, 70, 1

# What can happen at an operation. `full` lasts: after it no file can be made or grow.
FAULTS = ("kill", "torn", "full", "short", "io", "denied")
ERRORS = {
    "full": errno.ENOSPC,
    "short": errno.ENOSPC,  # half of what was to be written is, then the disk is full
    "io": errno.EIO,
    "denied": errno.EACCES,
}
GROWING = ("write", "create", "mkdir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Injector:
    """Counts the operations on a folder, and lets the one of number `at` (from 0) go wrong.

    seen: the operations so far, each as its kind and the name of its file.
    """

    def __init__(self, root: Path, at: int | None = None, fault: str = "kill") -> None:
        self.root, self.at, self.fault = os.path.realpath(root), at, fault
        self.seen: list[tuple[str, str]] = []
        self.is_full = False
        self.real: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Injector:
        for name in ("replace", "rename"):
            self._patch(os, name, self._on_paths("rename", getattr(os, name)))
        for name in ("unlink", "remove", "mkdir", "rmdir", "truncate", "chmod", "link", "symlink"):
            self._patch(os, name, self._on_paths(name, getattr(os, name)))
        for name in ("fsync", "ftruncate", "fchmod"):
            self._patch(os, name, self._on_handle(name, getattr(os, name)))
        self._patch(fcntl, "flock", self._on_handle("flock", fcntl.flock))
        self._patch(os, "write", self._write(os.write))
        self._patch(os, "open", self._open_handle(os.open))
        opened = self._open(builtins.open)
        self._patch(builtins, "open", opened)
        self._patch(io, "open", opened)
        return self

    def __exit__(self, *exc_info: object) -> None:
        while self.real:
            setattr(*self.real.pop())

    def _patch(self, module: Any, name: str, value: Any) -> None:
        self.real.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def _is_inside(self, path: Any) -> bool:
        try:
            where = os.path.abspath(os.fsdecode(path))
        except TypeError:  # a handle
            return False
        return where == self.root or where.startswith(self.root + os.sep)

    def _of_handle(self, handle: int) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{handle}")
        except OSError:
            return ""

    def point(self, kind: str, path: Any, half: Callable[[], Any] | None = None) -> None:
        """One operation, about to happen; half: what does the first half of a write."""
        number = len(self.seen)
        self.seen.append((kind, os.path.basename(os.fsdecode(path))))
        if self.is_full and kind in GROWING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if number != self.at:
            return
        if half and self.fault in ("torn", "short"):
            half()
        if self.fault in ("kill", "torn"):
            os._exit(KILLED)
        self.is_full = self.fault == "full"
        if not self.is_full or kind in GROWING:
            number = ERRORS[self.fault]
            raise OSError(number, os.strerror(number), str(path))

    def _on_paths(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(path: Any, *args: Any, **kwargs: Any) -> Any:
            folder = kwargs.get("dir_fd")
            full = os.path.join(self._of_handle(folder), path) if folder is not None else path
            if self._is_inside(full):
                self.point(kind, full)
            return real(path, *args, **kwargs)

        return operation

    def _on_handle(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(handle: int, *args: Any) -> Any:
            if self._is_inside(path := self._of_handle(handle)):
                self.point(kind, path)
            return real(handle, *args)

        return operation

    def _write(self, real: Callable[..., int]) -> Callable[..., int]:
        def write(handle: int, data: Any) -> int:
            if self._is_inside(path := self._of_handle(handle)):
                self.point("write", path, lambda: real(handle, data[: len(data) // 2]))
            return real(handle, data)

        return write

    def _open_handle(self, real: Callable[..., int]) -> Callable[..., int]:
        def open_handle(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & WRITING and self._is_inside(path):
                self.point("create" if not os.path.exists(path) else "open", path)
            return real(path, flags, *args, **kwargs)

        return open_handle

    def _open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        injector = self

        class Watched(io.FileIO):
            def write(self, data: Any) -> int:
                half = bytes(data)[: len(data) // 2]
                injector.point("write", self.name, lambda: io.FileIO.write(self, half))
                return super().write(data)

        def open_file(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+") or not injector._is_inside(path):
                return real(path, mode, *args, **kwargs)
            if kwargs.get("opener"):  # a file without a name, which leaves nothing behind
                return real(path, mode, *args, **kwargs)
            injector.point("create" if not os.path.exists(path) else "open", path)
            raw = Watched(os.fsdecode(path), mode.replace("b", "").replace("t", ""))
            file = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return file if "b" in mode else io.TextIOWrapper(file, "utf-8", write_through=True)

        return open_file


class Ended(NamedTuple):
    """How a process ended: its exit code, and all that it printed."""

    code: int
    output: str


@dataclass(frozen=True)
class Plan:
    """What goes wrong in a run: nothing, an operation, or a kill after some seconds."""

    at: int | None = None
    fault: str = "kill"
    seconds: float | None = None


def forked(act: Callable[[], int], root: Path, plan: Plan, log: Path) -> Ended:
    """Run `act` in a process of its own, with a fault; how it ended.

    An error of tempo's ends it with SAID, any other one with RAW. log: a file for what it prints,
    outside of `root`.
    """
    log.write_bytes(b"")
    process = os.fork()
    if not process:
        code = RAW
        try:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            with Injector(root, plan.at, plan.fault):
                code = act()
        except TempoError as error:
            print(f"Error: {error}")
            code = SAID
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if plan.seconds is not None:
        _kill_after(process, plan.seconds)
    status = os.waitpid(process, 0)[1]
    return Ended(os.waitstatus_to_exitcode(status), log.read_text("utf-8", "replace"))


def _kill_after(process: int, seconds: float) -> None:
    import signal
    import time

    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)


def operations(act: Callable[[], int], root: Path, log: Path) -> list[tuple[str, str]]:
    """The operations that `act` does on a folder, in a process of its own, in order."""

    def counted() -> int:
        with Injector(root) as injector:
            code = act()
        print("\n".join(f"{kind}\t{name}" for kind, name in [("", ""), *injector.seen]))
        return code

    ended = forked(counted, log.parent / "nothing", Plan(), log)
    if ended.code:
        raise RuntimeError(f"without a fault it ended with {ended.code}: {ended.output}")
    lines = ended.output.rpartition("\n\t\n")[2] if "\n\t\n" in ended.output else ended.output
    pairs = [line.split("\t", 1) for line in lines.splitlines() if "\t" in line]
    return [(kind, name) for kind, name in pairs if kind]
