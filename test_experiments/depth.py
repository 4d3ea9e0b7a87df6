"""How far a reader is from the truth after one to four consecutive sets of two: a part of exp7."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from fixtures.scenes import READER, draw
from fixtures.truth import Branches, forced, predict_after, read_spec
from tempo import Trace
from tempo.harness import Prompt, Steps, run
from tempo.metrics import total_variation
from tempo.statistics import SEED

DEPTHS = (1, 2, 3, 4)
# Any two tokens, however improbable the second, make the forced sets.
ANY_PROBABILITY = 1e-12
# The control is an error that grows: with each set, so much more of the truth gives way to what was
# predicted before the reader.
PLANTED_SHARE = 0.2

VISIBLE, WEIGHTED = {"visibility": "visible"}, {"weighting": "probability"}
WAYS = {"isolated": {}, "visible": VISIBLE, "probability": WEIGHTED}


def depth_series(prompt: Prompt) -> Steps[dict[str, list[float]] | None]:
    """Total variation at lag 2 after 1 to 4 sets of two, for each way of reading them.

    At each depth the reader is drawn from the exact mixture of all branches. None without sets.
    """
    source: Trace = yield run(
        prompt, max_steps=max(DEPTHS), max_width=2, threshold=ANY_PROBABILITY, stop_at_eos=False
    )
    if set(source.widths) != {2}:
        return None
    prefix, rng = tuple(source.prompt_tokens), prompt.rng(SEED, len(DEPTHS))
    unread = [Branches(prefix, tuple(map(tuple, source.sets[:depth]))) for depth in DEPTHS]
    # all depths in one pass: what is drawn from it depends on its last bit
    paths = [(), *chain(*(each.paths for each in unread))]
    after = yield from predict_after(prompt.lm, prefix, paths)
    branches = [replace(b, continuation=(draw(rng, b.of_tree(after).truth),)) for b in unread]
    read = [(*path, *each.continuation) for each in branches for path in each.paths]
    after |= yield from predict_after(prompt.lm, prefix, read)
    asked = []
    for each in branches:
        specs = [read_spec(prefix, each.sets, each.continuation, **way) for way in WAYS.values()]
        asked += map(forced, specs)
    traces = iter((yield asked))
    found = {name: [] for name in (*WAYS, "top_path", "last_path", "planted")}
    for depth, of_depth in zip(DEPTHS, branches, strict=True):
        tree = of_depth.of_tree(after)
        truth, predictions = tree.truth, tree.predictions
        steps = {name: next(traces).steps for name in WAYS}
        answers = {name: steps[name][depth + READER - 1].distribution for name in WAYS}
        answers |= {"top_path": predictions[0], "last_path": predictions[-1]}
        before = steps["isolated"][depth].distribution
        answers["planted"] = truth + PLANTED_SHARE * depth * (before - truth)
        for name, values in found.items():
            values.append(total_variation(truth, answers[name]))
    return found
