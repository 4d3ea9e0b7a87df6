"""Work that workers do in the tests: quick, without a model, and as deadly as a unit says."""

import os
import signal
import time
from pathlib import Path

from tempo.errors import SpecError


class Doubling:
    """Twice a unit's number; each time that a unit is begun, a line in the set-up's log."""

    def __init__(self, setup):
        if setup.get("stillborn"):
            raise SystemExit("no room for the model")
        self.log, self.made_by = Path(setup["log"]), {"number of threads": "1"}
        if setup.get("threads_of_worker"):
            self.made_by = {"number of threads": os.environ["OMP_NUM_THREADS"]}

    def do(self, unit):
        with self.log.open("a") as log:
            log.write(f"{unit['number']} {os.getpid()}\n")
        time.sleep(unit.get("seconds", 0))
        if unit.get("wrong"):
            raise SpecError("this one cannot be done")
        deaths = sum(line.split()[0] == str(unit["number"]) for line in self.log.open())
        if deaths <= unit.get("kills", 0):
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * unit["number"]


def setup(folder, **more):
    """A set-up of such work."""
    return {
        "work": "tests.worker_toys:Doubling",
        "name": "toy",
        "owner": "toy",
        "threads": 1,
        "device": "cpu",
        "log": str(folder / "log.txt"),
        "paths": [str(Path(__file__).resolve().parent.parent)],
        "made_by": {"number of threads": "1"},
        **more,
    }


def begun(folder):
    """How often each unit was begun, and by which processes."""
    lines = [line.split() for line in (folder / "log.txt").read_text().splitlines()]
    return [int(number) for number, _ in lines], [int(process) for _, process in lines]


if __name__ == "__main__":  # a driver of its own, to be killed: FOLDER WORKERS UNITS
    import sys

    from tempo.workers import executor

    place, workers, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    units = [{"number": i, "seconds": 0.3} for i in range(number)]
    for index, _ in executor(workers).run(setup(place), units, lambda i: True):
        print(index, flush=True)
