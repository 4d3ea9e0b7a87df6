"""Runs docs/notebook.ipynb in a fresh kernel and writes it with its outputs.

    python docs/notebook.py [FILE]

FILE is where to write; by default the notebook itself. What would differ from run to run is left
out: times, and ids of cells are their numbers. Needs `pip install ".[notebook]"`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent / "notebook.ipynb"
SECONDS = 600  # a cell may take on a busy machine


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh run. A cell that fails raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", record_timing=False)
    quiet = os.environ | {"PYTHONWARNINGS": "ignore:IProgress not found"}  # tqdm misses a widget
    client.execute(cwd=str(path.parent), env=quiet)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell["metadata"] = {}
    notebook["metadata"] = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return notebook


def main() -> None:
    """Write the executed notebook."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOK
    nbformat.write(executed(NOTEBOOK), target)


if __name__ == "__main__":
    main()
