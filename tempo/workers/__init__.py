"""Work that other processes do: on this machine, on hosts that share a folder, or on Ray.

An executor takes a set-up, which every worker is told once, and units of work, which are JSON. It
gives the answer to each unit as it comes. A unit goes to the next free worker. If that is killed,
the unit is done again as a whole, by another one. Nothing else is scheduled here.

What the work is, a class says that the set-up names: windows of prompts for studies, chunks of
specs for `tempo.stream`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tempo.errors import SpecError

Setup = Mapping[str, Any]
Answer = Mapping[str, Any]
MOST_TRIES = 3  # of a unit that kills its worker each time
REMEDY = "expected a number of processes, an existing folder, 'ray' or 'ray:N'"


class Executor(Protocol):
    """Who does units of work.

    number: how many workers share this machine's memory; None if that is not known.
    """

    number: int | None

    def run(
        self, setup: Setup, units: Sequence[Any], is_wanted: Callable[[int], bool]
    ) -> Iterator[tuple[int, Answer]]:
        """(index, answer) of each unit as it comes; an answer is `work.answer_to`'s.

        A unit that is not wanted any more by the time a worker is free is left out. Raises
        WorkerError if there can be no workers. Whatever was started is ended with the iterator.
        """
        ...


def executor(workers: int | str, say: Callable[[str], None] = lambda line: None) -> Executor:
    """The executor that an argument names: a number, a folder, `ray` or `ray:N`.

    say: told in a line what a user must know meanwhile, such as a worker that is refused.
    Raises SpecError if it names none.

    >>> executor(2).number
    2
    """
    text = str(workers)
    if text.isdecimal() and int(text) > 0:
        from tempo.workers.local import LocalWorkers

        return LocalWorkers(int(text), say)
    kind, _, number = text.partition(":")
    if kind == "ray" and (number.isdecimal() or text == "ray"):
        from tempo.workers.on_ray import RayWorkers

        return RayWorkers(int(number) if number else None, say)
    if isinstance(workers, bool) or not os.path.isdir(text):
        raise SpecError(f"workers is {text!r}; {REMEDY}")
    from tempo.workers.folder import FolderWorkers

    return FolderWorkers(Path(text), say)
