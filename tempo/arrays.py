"""Arrays are read from `.npz` files within bounds: what a file claims to hold is checked first."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil

from tempo.text import escaped

# What a compressed file may hold: a few kilobytes can claim to hold ten gigabytes.
MOST_UNPACKED = 1 << 32
NPY_HEADER = 10_000  # bytes; NumPy writes 128


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file, by name.

    What each claims to hold is checked before any memory is asked for.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no whole archive of plain arrays, is encrypted, or would not fit.
    """
    with open(path, "rb") as file:
        return arrays_in(file)


def arrays_in(file: BinaryIO) -> dict[str, np.ndarray]:
    """The arrays of an open `.npz` file. Raises as `read_arrays`."""
    found = {}
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check_sizes(entries, os.fstat(file.fileno()).st_size)
            for entry in entries:
                name = entry.filename.removesuffix(".npy")
                if name in found or name == entry.filename:
                    raise ValueError(f"{entry.filename!r:.60} is no array, or is there twice")
                with archive.open(entry) as member:
                    found[name] = _array(member, entry)
    except Exception as error:  # zipfile, zlib and NumPy's reader of headers raise some ten kinds
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"it is no whole archive of arrays: {escaped(why)}") from None
    return found


def _check_sizes(entries: list[zipfile.ZipInfo], size: int) -> None:
    """Raise ValueError if the entries are encrypted or claim to hold more than can be."""
    for entry in entries:
        if entry.flag_bits & 1:
            raise ValueError(f"{entry.filename!r:.60} is encrypted; expected plain arrays")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{entry.filename!r:.60} is compressed in an unknown way")
    stored = sum(e.file_size for e in entries if e.compress_type == zipfile.ZIP_STORED)
    total = sum(entry.file_size for entry in entries)
    if stored > size:
        raise ValueError(f"it claims to hold {stored:,} bytes and has {size:,}")
    if total - stored > MOST_UNPACKED:
        raise ValueError(
            f"it unpacks to {total / 1e9:.1f} GB, expected at most {MOST_UNPACKED / 1e9:.1f}"
        )
    if total > (free := psutil.virtual_memory().available):
        raise ValueError(f"it needs {total / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")


def _array(member: Any, entry: zipfile.ZipInfo) -> np.ndarray:
    """One array, whose header says no more than there is."""
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{entry.filename!r:.60} is an array of format {version}")
    header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = header(member, max_header_size=NPY_HEADER)
    if dtype.hasobject:
        raise ValueError(f"{entry.filename!r:.60} holds Python objects; expected numbers")
    count = 1
    for length in shape:  # Python's integers do not overflow
        if length < 0:
            raise ValueError(f"{entry.filename!r:.60} claims the shape {shape}")
        count *= length
    if count * dtype.itemsize > entry.file_size:
        raise ValueError(f"{entry.filename!r:.60} claims the shape {shape}, more than it holds")
    content = member.read(count * dtype.itemsize + 1)  # one more: the end checks the CRC
    if len(content) != count * dtype.itemsize:
        raise ValueError(f"{entry.filename!r:.60} holds {len(content):,} bytes, not its shape's")
    array = np.frombuffer(bytearray(content), dtype=dtype)
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)
