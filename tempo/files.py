"""Every write of tempo: whole or not at all, on disk before it counts, and never the user's files.

A file is written beside its place under a name that tells whose it is, forced to disk, and renamed.
Lines are appended under a lock. A folder that several processes write to has one lock. A set of
files is published with a manifest: only what an earlier manifest lists is ever replaced or removed.
What a killed process left is found by its name, and removed by the next one that writes there.

All functions raise OSError where the system refuses, and what was there before is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tempo.errors import ResultsError

# `.findings.html.tempo-<machine>-<process>-<random>`: a file of ours that is not in its place yet.
OURS = re.compile(r"\..*\.tempo-([0-9a-f]{8})-(\d+)-[0-9a-f]{8}", re.DOTALL)
# What another machine left behind is taken for abandoned after a day: no write takes so long.
ABANDONED_SECONDS = 24 * 3600.0
LONGEST_NAME = 80  # bytes of a file's own name in that of its temporary one: 255 are allowed
LOCK = ".tempo.lock"  # of a folder; gone when nobody holds it
WAIT_SECONDS = 60.0  # for the lock of a save, which is held for moments
AS_LONG_AS_IT_TAKES = -1.0
MANIFEST = ".published.json"  # what the last publication wrote into a folder: names and hashes
_in_use: set[str] = set()  # the temporary files that this process is writing


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to. It takes the place of `path` if the block ends without an error.

    A link stays a link: what it points to is replaced. The mode of an earlier file is kept.
    """
    target = Path(os.path.realpath(path))
    make_folder(target.parent)
    sweep(target.parent)
    fresh = _name_beside(target)
    try:
        with _created(fresh, target) as file:
            yield file
            _settle(file)
        os.replace(fresh, target)
        _sync(target.parent)
    finally:
        _drop(fresh)


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file as `replacing` does; text as UTF-8."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _created(fresh: Path, target: Path) -> BinaryIO:
    """A new file to take the place of `target`, with its mode. OSError if that is no file."""
    mode = target.stat().st_mode if target.exists() else None
    if mode is not None and not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a file", str(target))
    file = fresh.open("xb")
    if mode is not None:
        with suppress(OSError):  # of somebody else's file: the mode is not ours to give
            os.fchmod(file.fileno(), stat.S_IMODE(mode))
    return file


def _drop(fresh: Path) -> None:
    """Forget a temporary file or folder, and remove it if it was not moved to its place."""
    remove(fresh)
    _in_use.discard(fresh.name)


def _settle(file: BinaryIO) -> None:
    """Force a file's content to disk, so that its name never stands for half of it."""
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Force the names in a folder to disk. Some network file systems cannot, and say EINVAL."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _name_beside(target: Path) -> Path:
    """A name in the target's folder that no other process, thread or host chooses."""
    own = target.name.encode()[:LONGEST_NAME].decode(errors="ignore")
    name = f".{own}.tempo-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    _in_use.add(name)
    return target.with_name(name)


@cache
def _machine() -> str:
    """Eight digits for where a process number means one process: a machine, or a container."""
    seen = [platform.node()]
    with suppress(OSError):
        seen.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        seen.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(seen).encode()).hexdigest()[:8]


def is_ours(name: str) -> bool:
    """Whether a file of this name is a temporary one or a lock of tempo's."""
    return name == LOCK or OURS.fullmatch(name) is not None


def sweep(*folders: str | Path) -> None:
    """Remove what killed processes left in these folders, not below them. Errors are no matter."""
    for folder in folders:
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                found = OURS.fullmatch(entry.name)
                if entry.name == LOCK:
                    _free_lock(entry.path)
                elif found and _is_abandoned(entry, found[1], int(found[2])):
                    remove(Path(entry.path))


def _free_lock(path: str) -> None:
    """Remove a lock that nobody holds: its process was killed."""
    from filelock import lock_descriptor

    handle = os.open(path, os.O_RDWR)
    try:
        if lock_descriptor(handle, blocking=False):
            os.unlink(path)  # while it is held, as `locked` does
    finally:
        os.close(handle)


def _is_abandoned(entry: os.DirEntry[str], machine: str, process: int) -> bool:
    """Whether nobody writes this file any more. Elsewhere only its age can tell."""
    if machine != _machine():
        with suppress(OSError):
            return time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED_SECONDS
        return False
    if process == os.getpid():
        return entry.name not in _in_use
    import psutil

    return not psutil.pid_exists(process)


def remove(path: Path) -> None:
    """Remove a file or folder of tempo's own, if it is there; what refuses stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        with suppress(OSError):
            path.unlink()


def remove_empty(folder: Path) -> None:
    """Remove a folder that has nothing in it."""
    with suppress(OSError):
        folder.rmdir()


def append(path: str | Path, text: bytes, whole: Callable[[bytes], bool] = bool) -> None:
    """Add lines to the end of a file and force them to disk. Any number of processes may do so.

    whole: whether a last line that lacks its end is kept; else it is cut off, as a killed process
        left it. What a full disk cuts short is taken back.
    """
    target = Path(path)
    make_folder(target.parent)
    is_new = not target.exists()
    as_given = getattr(os, "O_BINARY", 0)  # else Windows would write other line ends
    handle = os.open(target, os.O_RDWR | os.O_CREAT | os.O_APPEND | as_given, 0o666)
    try:
        from filelock import lock_descriptor

        lock_descriptor(handle)  # freed with the handle, or with the process
        end, tail = _tail(handle)
        if tail and whole(tail):
            text = b"\n" + text
        elif tail:
            end -= len(tail)
            os.ftruncate(handle, end)
        try:
            left = memoryview(text)
            while left:
                left = left[os.write(handle, left) :]
            os.fsync(handle)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(handle, end)
            raise
    finally:
        os.close(handle)
    if is_new:
        _sync(target.parent)


def _tail(handle: int) -> tuple[int, bytes]:
    """How long a file is, and what stands after its last line end."""
    end = os.lseek(handle, 0, os.SEEK_END)
    tail = b""
    while len(tail) < end:  # backwards, in ever larger parts: a record may be long
        start = max(0, end - max(1, 4 * len(tail)))
        os.lseek(handle, start, os.SEEK_SET)
        tail = os.read(handle, end - start)
        if b"\n" in tail:
            return end, tail.rpartition(b"\n")[2]
    return end, tail


def make_folder(folder: str | Path) -> Path:
    """The folder, made if need be, and on disk."""
    folder = Path(folder)
    if not folder.is_dir():
        missing = [at for at in (folder, *folder.parents) if not at.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for made in missing:
            _sync(made.parent)
    return folder


def move(source: Path, target: Path) -> None:
    """Give a file or folder another name beside it, under which nothing may stand yet."""
    os.replace(source, target)
    _sync(target.parent)


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to make things in. It is removed at the end."""
    make_folder(folder.parent)
    sweep(folder.parent)
    fresh = _name_beside(folder)
    try:
        fresh.mkdir()
        yield fresh
    finally:
        _drop(fresh)


def settle(made: Path, folder: Path) -> None:
    """Move a folder, whole and on disk, to its place, where nothing may stand yet."""
    for path in [*made.rglob("*"), made]:
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            _sync(path)
    move(made, folder)


@contextmanager
def locked(folder: str | Path, remedy: str, wait: float = 0.0) -> Iterator[None]:
    """Nobody else holds the lock of this folder meanwhile. A killed holder has freed it.

    wait: seconds to wait for another holder. remedy: what a refused user can do instead.
    Raises ResultsError that names the holder.
    """
    from filelock import FileLock, Timeout

    path = make_folder(folder) / LOCK
    lock = FileLock(path, timeout=wait, thread_local=False)  # any thread may end the session
    try:
        lock.acquire()
    except (Timeout, RuntimeError) as error:  # RuntimeError: this process waits for itself
        raise ResultsError(f"{folder} is in use by {_holder(path)}; {remedy}") from error
    try:
        note = {
            "pid": os.getpid(),
            "host": platform.node(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": shlex.join(map(str, sys.argv))[:200],
        }
        with path.open("w", encoding="utf-8") as file:  # not replaced: the lock is this very file
            file.write(json.dumps(note))
        yield
    finally:
        # While it is held: who opened it meanwhile sees that the file is gone, and makes another.
        with suppress(OSError):
            path.unlink()
        with suppress(OSError):  # it is freed with the process at the latest
            lock.release()


def _holder(path: Path) -> str:
    """Who holds a lock, as far as its file tells."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        return f"process {note['pid']} on {note['host']} (since {note['since']}: {note['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def publish(
    folder: str | Path,
    contents: Mapping[str, bytes],
    remedy: str,
    is_replaceable: Callable[[Path], bool] = lambda path: False,
) -> list[Path]:
    """The paths of these files, once all of them stand in place of an earlier publication's.

    All are written aside before the first one is moved to its place; then they move in order, the
    last one last. What an earlier publication wrote and this one does not is removed, unless it was
    changed since. After a kill between two moves, the next publication ends what was begun.

    contents: what each file holds, by its path below the folder.
    is_replaceable: whether a file that no manifest lists may be replaced.
    Raises ResultsError, and changes nothing, if another file is in the way.
    """
    folder = make_folder(folder)
    places = {n: Path(os.path.realpath(folder / _confined(n))) for n in contents}
    with locked(folder, remedy, WAIT_SECONDS):
        before = _read_manifest(folder)
        for name, place in places.items():
            known = name in before or not place.exists() or is_replaceable(place)
            if not known and place.read_bytes() != contents[name]:
                raise ResultsError(f"{place} is there, and not from an earlier report; {remedy}")
        now = {name: [_digest(content)] for name, content in contents.items()}
        # Whatever happens between here and the end, all that is ours is listed, old and new.
        either = {name: [*before.get(name, []), *now.get(name, [])] for name in before | now}
        fresh: dict[str, Path] = {}
        try:
            for name, place in places.items():
                make_folder(place.parent)
                sweep(place.parent)
                fresh[name] = _name_beside(place)
                with _created(fresh[name], place) as file:
                    file.write(contents[name])
                    _settle(file)
            _write_manifest(folder, either)
            for name, place in places.items():
                os.replace(fresh[name], place)
            for parent in dict.fromkeys(place.parent for place in places.values()):
                _sync(parent)
            _remove_earlier(folder, {n: seen for n, seen in before.items() if n not in now})
            _write_manifest(folder, now)
        finally:
            for path in fresh.values():
                _drop(path)
    return [folder / name for name in contents]


def _confined(name: str) -> PurePosixPath:
    """The name as a path below a folder. Raises ResultsError if it leads out of it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
        raise ResultsError(f"{name!r} is no name of a file in a report; expected a plain name")
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read_manifest(folder: Path) -> dict[str, list[str]]:
    """The hashes that each file of an earlier publication may have."""
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        listed = dict(record["files"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}  # damaged, so that nobody knows what is ours
    found = {}
    for name, hashes in listed.items():
        with suppress(ResultsError):
            _confined(name)  # the manifest is a file as any other: it cannot lead out
            found[name] = list(filter(_is_hash, hashes)) if isinstance(hashes, list) else []
    return found


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64


def _write_manifest(folder: Path, files: Mapping[str, list[str]]) -> None:
    record = {"files": {name: files[name] for name in sorted(files)}}
    write(folder / MANIFEST, json.dumps(record, indent=1) + "\n")


def _remove_earlier(folder: Path, earlier: Mapping[str, list[str]]) -> None:
    """Remove the files of an earlier publication. One that was changed since then stays."""
    for name, seen in earlier.items():
        path = folder / name
        if path.is_file() and not path.is_symlink() and _digest(path.read_bytes()) in seen:
            path.unlink()


def check_folder(folder: str | Path, option: str) -> None:
    """Raises ResultsError if nothing can be written to `folder`.

    option: with which another folder can be chosen.
    """
    probe = _name_beside(Path(folder) / "probe")
    try:
        make_folder(folder)
        with probe.open("xb") as file:
            file.write(b"0")
    except OSError as error:
        raise ResultsError(
            f"cannot write to the folder {folder}: {reason(error)}; choose another with {option}"
        ) from None
    finally:
        _drop(probe)


def check_file(path: str | Path, option: str) -> None:
    """Raises ResultsError if a file cannot be written at `path`."""
    target = Path(os.path.realpath(path))
    check_folder(target.parent, option)
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "no file"
        raise ResultsError(f"{path} is {kind}; give {option} the name of a file")


def reason(error: OSError) -> str:
    """Why the system refused, in its words."""
    return error.strerror or str(error)
