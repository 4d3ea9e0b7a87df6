"""Writes the requirements files: every package of `make setup` by hash.

Run by `make lock`, after a change of pyproject.toml or constraints.txt. The versions are those of
constraints.txt; what that does not name is resolved anew.

torch has two builds for Linux under one version. The one on PyPI needs the CUDA libraries. The one
for the CPU does not; its hash is that of the wheel which pip finds here. `make setup` takes the CPU
build where the index has it, else the other one with its libraries.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = "3.11"
CUDA = re.compile(r"(nvidia|cuda|triton)\b")
HEADER = "# Written by `make lock` from pyproject.toml and constraints.txt; do not edit.\n"


def resolved() -> list[str]:
    """One entry for each package: its pin, its marker and its hashes."""
    command = [
        *("uv", "pip", "compile", "--quiet", "pyproject.toml", "--extra", "test", "--extra", "dev"),
        *("--constraint", "constraints.txt", "--universal", "--python-version", OLDEST_PYTHON),
        *("--generate-hashes", "--no-annotate", "--no-header", "--no-emit-index-url"),
    ]
    command[0] = str(Path(sys.executable).with_name("uv"))
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^[a-zA-Z0-9].*\n(?:    .*\n)*", text, flags=re.MULTILINE)


def cpu_build(pin: str) -> str:
    """The entry of the CPU build of this torch, by the wheel that pip finds here."""
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*download, f"{pin}+cpu", "--dest", folder], check=True)
        (wheel,) = Path(folder).iterdir()
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return f"{pin}+cpu \\\n    --hash=sha256:{found}\n"


def main() -> None:
    """Write the files."""
    entries = resolved()
    torch = next(entry for entry in entries if entry.startswith("torch=="))
    outside = [entry for entry in entries if entry is torch or CUDA.match(entry)]
    files = {
        "requirements.txt": [entry for entry in entries if entry not in outside],
        "requirements-torch-cpu.txt": [cpu_build(torch.split()[0])],
        "requirements-torch-cuda.txt": outside,
    }
    for name, listed in files.items():
        (ROOT / name).write_text(HEADER + "".join(listed), encoding="utf-8")
        print(f"{name}: {len(listed)} packages")


if __name__ == "__main__":
    main()
