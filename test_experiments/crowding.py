"""What exp11 and exp12 share: short readings after exp7's set, of the set itself or of copies of its top member."""

from __future__ import annotations

from collections.abc import Sequence

from tempo import RunSpec
from test_experiments.branching import Scene
from test_experiments.truth import read_spec

# Of the text that reads on, so many tokens are enough here: lags up to 4.
NUM_READ = 3


def short_spec(scene: Scene, members: Sequence[int], **changes: object) -> RunSpec:
    """A run that reads `members` in the set's place, then the first tokens of the scene's text."""
    return read_spec(scene.prefix, [members], scene.continuation[:NUM_READ], **changes)


def copies_spec(scene: Scene, **changes: object) -> RunSpec:
    """The same with as many copies of the top member as the set has members: its width without its diversity."""
    return short_spec(scene, scene.members[:1] * len(scene.members), **changes)


def weighted_spec(scene: Scene, weights: Sequence[float]) -> RunSpec:
    """The same with the set itself, each member weighing what `weights` says."""
    return short_spec(scene, scene.members, replay_weights=[weights, *[(1.0,)] * (NUM_READ + 1)])
