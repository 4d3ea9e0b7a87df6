"""Workers as actors of Ray, on this machine or on the cluster that RAY_ADDRESS names.

The object store carries units and answers, so nothing but the code must be on the hosts.
"""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tempo.errors import WorkerError
from tempo.workers import MOST_TRIES, Answer, Setup
from tempo.workers.work import Worker, is_sound, killed_too_often, name_of_worker


class Actor:
    """A worker as Ray runs it. What goes in and out is text, so that nothing must be importable."""

    def __init__(self, setup: str) -> None:
        self.setup, self.worker = json.loads(setup), None

    def load(self) -> str:
        """Why this worker is refused; "" once it is ready."""
        try:
            self.worker = Worker(self.setup)
        except Exception as error:
            return str(error) if isinstance(error, WorkerError) else f"{name_of_worker()}: {error}"
        return ""

    def do(self, unit: str) -> str:
        """The answer to a unit."""
        assert self.worker is not None
        return json.dumps(self.worker.answer_to(json.loads(unit)))


class RayWorkers:
    """As many actors as given, else as the cluster has room for. A killed one is replaced."""

    def __init__(self, number: int | None, say: Callable[[str], None] = lambda line: None) -> None:
        self.number, self.say = number, say

    def run(
        self,
        setup: Setup,
        units: Sequence[Any],
        is_wanted: Callable[[int], bool] = lambda index: True,
    ) -> Iterator[tuple[int, Answer]]:
        if not units:
            return
        ray = _ray()
        joins = ray.is_initialized()
        if not joins:
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        try:
            yield from _run(ray, setup, units, is_wanted, self.number or _room(ray, setup))
        finally:
            if not joins:
                ray.shutdown()


def _ray() -> Any:
    # what Ray will do anyway in later releases; without it each actor without a GPU warns
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent home unasked
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise WorkerError(
            "workers on Ray need its package: pip install 'tempo-harness[ray]'"
        ) from None


def _needs(setup: Setup) -> dict[str, Any]:
    """What one worker asks of its host."""
    gpus = 1 if setup["device"].startswith("cuda") else 0
    return {"num_cpus": setup["threads"], "num_gpus": gpus}


def _room(ray: Any, setup: Setup) -> int:
    """How many workers the cluster has room for."""
    has, needs = ray.cluster_resources(), _needs(setup)
    places = int(has.get("CPU", 1) // needs["num_cpus"])
    if needs["num_gpus"]:
        places = min(places, int(has.get("GPU", 0)))
    return max(1, places)


def _run(
    ray: Any, setup: Setup, units: Sequence[Any], is_wanted: Callable[[int], bool], number: int
) -> Iterator[tuple[int, Answer]]:
    # threads as in the session: another number rounds otherwise
    variables = {"OMP_NUM_THREADS": str(setup["threads"]), "OMP_WAIT_POLICY": "PASSIVE"}
    hire = ray.remote(Actor).options(runtime_env={"env_vars": variables}, **_needs(setup)).remote
    killed = ray.exceptions.RayActorError
    told = ray.put(json.dumps(setup))
    waiting, tries = deque(range(len(units))), Counter[int]()
    actors: dict[Any, tuple[Any, int | None]] = {}  # by what is awaited: who, and which unit
    stillborn, why = 0, ""

    def begin() -> None:
        actor = hire(told)
        actors[actor.load.remote()] = actor, None

    def go_on(actor: Any) -> None:
        """Give an actor the next unit that is wanted; else let it go."""
        while waiting:
            index = waiting.popleft()
            if is_wanted(index):
                actors[actor.do.remote(json.dumps(units[index]))] = actor, index
                return
        ray.kill(actor)

    try:
        for _ in range(min(number, sum(map(is_wanted, range(len(units)))))):
            begin()
        while actors:
            (done, *_), _ = ray.wait(list(actors))
            actor, index = actors.pop(done)
            try:
                said = ray.get(done)
            except killed as error:
                lines = str(error).strip().splitlines()
                why = lines[0] if lines else type(error).__name__
                if index is None:
                    stillborn += 1
                    if stillborn >= MOST_TRIES:
                        raise WorkerError(
                            f"{stillborn} workers ended before they had loaded their model: {why}"
                        ) from None
                elif (tries[index] + 1) < MOST_TRIES:
                    tries[index] += 1
                    waiting.appendleft(index)
                else:
                    yield index, killed_too_often(setup, [why])
                if waiting:
                    begin()
                continue
            if index is None:
                if said:
                    raise WorkerError(said)
                stillborn = 0
                go_on(actor)
                continue
            answer = json.loads(said)
            if not is_sound(setup, answer):
                raise WorkerError(f"{answer.get('worker')} is not what the session needs")
            go_on(actor)
            yield index, answer
    finally:
        for actor, _ in actors.values():
            ray.kill(actor)
