"""How far a reader is from the truth after one to four consecutive sets of two: a part of exp7."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from fixtures.study import Context, Run
from tempo.metrics import total_variation
from tempo.statistics import SEED
from test_experiments.branching import READER, Steps, draw
from test_experiments.truth import forced, log_probability, normalised, predict_after, read_spec

DEPTHS = (1, 2, 3, 4)
# Any two tokens, however improbable the second, make the forced sets.
ANY_PROBABILITY = 1e-12
# The control, an error that grows: so much of the truth is replaced, per set, by what was predicted before the reader.
PLANTED_SHARE = 0.2


def depth_series(context: Context) -> Steps:
    """Total variation at lag 2 after one to four sets of two, [depths] for each way of reading them; None if none can be forced.

    At each depth the reader is drawn from the exact mixture of all paths.
    """
    spec = context.config.spec(
        context.prompt,
        max_steps=max(DEPTHS),
        max_width=2,
        threshold=ANY_PROBABILITY,
        stop_at_eos=False,
        capture=(),
    )
    (source,) = yield [Run(spec)]
    if set(source.widths) != {2}:
        return None
    prompt, sets = source.prompt_tokens, source.sets
    rng = np.random.default_rng([SEED, len(DEPTHS), *context.prompt.encode()])
    paths = {depth: list(product(*sets[:depth])) for depth in DEPTHS}
    after = predict_after(
        context.lm, prompt, [(), *(path for depth in DEPTHS for path in paths[depth])]
    )
    priors = {
        d: normalised(
            np.array([sum(log_probability(after[p[:k]][p[k]]) for k in range(d)) for p in paths[d]])
        )
        for d in DEPTHS
    }
    readers = {
        d: draw(rng, np.exp(priors[d]) @ np.stack([after[p] for p in paths[d]]).astype(np.float64))
        for d in DEPTHS
    }
    read = predict_after(
        context.lm, prompt, [(*path, readers[depth]) for depth in DEPTHS for path in paths[depth]]
    )
    ways: dict[str, dict[str, Any]] = {
        "isolated": {},
        "visible": {"visibility": "visible"},
        "probability": {"weighting": "probability"},
    }
    traces = iter(
        (
            yield [
                forced(read_spec(prompt, sets[:d], (readers[d],), **way))
                for d in DEPTHS
                for way in ways.values()
            ]
        )
    )
    found: dict[str, list[float]] = {
        name: [] for name in (*ways, "top_path", "last_path", "planted")
    }
    for depth in DEPTHS:
        posterior = normalised(
            priors[depth] + [log_probability(after[path][readers[depth]]) for path in paths[depth]]
        )
        predictions = np.stack([read[*path, readers[depth]] for path in paths[depth]]).astype(
            np.float64
        )
        truth = np.exp(posterior) @ predictions
        of_depth = {name: next(traces) for name in ways}
        answers = {
            name: trace.steps[depth + READER - 1].distribution for name, trace in of_depth.items()
        }
        unread = of_depth["isolated"].steps[depth].distribution
        answers |= {"top_path": predictions[0], "last_path": predictions[-1]}
        answers["planted"] = truth + PLANTED_SHARE * depth * (unread - truth)
        for name, answer in answers.items():
            found[name].append(total_variation(truth, answer))
    return found
