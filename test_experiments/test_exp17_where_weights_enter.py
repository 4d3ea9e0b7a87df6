"""exp17: where should the weights enter? In which layers does a reader weigh siblings wrongly?

The scene, the readers and the truth are exp11's. Each branch is read as plain text, and its
residuals at each reader are kept. Their mean by posterior is what a reader would hold if branches
mixed as Bayes' rule says. It is put into the plain run before one layer at a time. The layers above
go on reading siblings as they are. So the distance to the truth by layer tells from where on
nothing is spoilt any more. Other means must do worse: all branches alike, and the same reader after
another text.

The other way round, posterior weights count in some layers only: in one window of layers, below a
layer, or from it on (`weighting_layers`).

Shapes: L layers, R readers, n members, E size of a residual, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

import tempo
from fixtures.margins import ANY_GAIN, BFLOAT16_TV, THIRD
from fixtures.raw import curve, keep_table, lines_of
from fixtures.readers import Answers, after_readers, answers_of
from fixtures.rivals import TUNING_TEXTS
from fixtures.rows import logits_of
from fixtures.scenes import ExactScene, exact_scene
from fixtures.truth import forced
from tempo import RunSpec, Trace
from tempo.harness import Planned, Prompt, Space, Steps, Store, Study
from tempo.metrics import total_variation
from tempo.reporting.figures import Picture, lines_by
from tempo.residual import Hooks

# A run for each, of each mean, on every prompt; and one for each window, below and from its bounds.
NUM_PLACES, NUM_WINDOWS = 11, 6
READERS_AT = 1  # the step of the readers, right after the set
# No suite holds it.
OTHER_TEXT = TUNING_TEXTS[0]
MEANS = {
    "posterior": "branches by posterior",
    "alike": "branches alike",
    "elsewhere": "the same reader after another text (control)",
}
PARTS = {
    "windows": "weights in one window",
    "below": "weights below the layer",
    "from": "weights from the layer on",
}

study = Study(
    "exp17",
    title="Where the weights should enter",
    registered="2026-11-28T12:45Z",
    needs=lambda lm: lm.reason_against_residual,
    space=Space(widest=32),
)


@dataclass(frozen=True)
class Case:
    """Total variation to the exact mixture, mean over the readers of one prompt.

    plain: siblings as they are; weighted: with posterior weights in all layers. patched: by mean,
    with it put in at each of `places`. parts: with posterior weights in some layers only, between
    `bounds`. same_bits: whether a run's logits stay the same to the bit, by what was changed.
    """

    places: list[int]  # layers, the last one after all
    bounds: list[int]
    coin: bool
    plain: float
    weighted: float
    patched: dict[str, list[float]]
    parts: dict[str, list[float]]
    same_bits: dict[str, bool]

    @property
    def halfway(self) -> float:
        """The distance of a run that has lost half of what the last layer's mean removes."""
        return (self.plain + self.patched["posterior"][-1]) / 2

    def halves(self, by_coin: bool) -> float:
        """How much nearer weights in the upper half come than weights in the lower half."""
        middle = len(self.bounds) // 2
        lower, upper = self.parts["below"][middle - 1], self.parts["from"][middle]
        return lower - upper if by_coin and self.coin else upper - lower


@study.measure
def every_layer(prompt: Prompt) -> Steps[Case | None]:
    """The reader's residual from the branches at each place, and weights in parts of the layers."""
    scene = yield from exact_scene(prompt)
    if scene is None:
        return None
    lm, answers = prompt.lm, (yield from answers_of(prompt.lm, scene))
    num_layers = lm.num_layers
    places = sorted({round(x) for x in np.linspace(0, num_layers, NUM_PLACES)})
    num = min(NUM_WINDOWS, num_layers)
    bounds = [round(i * num_layers / num) for i in range(num + 1)]
    spec = scene.read_by_all(scene.members, capture=("logits", "residual"))
    # alone, as all runs that are compared to the bit
    own = tempo.generate_batch(lm, [spec])[0]
    means = _means(lm, scene, spec, answers.posterior)
    patched = {name: _patched(lm, spec, mean, places, answers) for name, mean in means.items()}
    cuts = {
        "windows": list(pairwise(bounds)),
        "below": [(0, cut) for cut in bounds[1:]],
        "from": [(cut, num_layers) for cut in bounds[:-1]],
    }
    by_posterior = spec.but(weighting="posterior", capture="logits")
    asked = list(dict.fromkeys(cut for of_part in cuts.values() for cut in of_part))
    found = yield [forced(by_posterior.but(weighting_layers=cut)) for cut in asked]
    far = dict(zip(asked, (_distance(trace, answers) for trace in found), strict=True))
    parts = {}
    for part, of_part in cuts.items():
        parts[part] = [far[cut] for cut in of_part]
    case = Case(
        places=places,
        bounds=bounds,
        coin=bool(prompt.rng().integers(2)),
        plain=_distance(own, answers),
        weighted=far[0, num_layers],
        patched=patched,
        parts=parts,
        same_bits=_same_bits(lm, own, by_posterior, means["posterior"], bounds),
    )
    if prompt.store:
        rows = [{"mean": name, "at": places, "tv": values} for name, values in patched.items()]
        rows += [{"mean": name, "at": cuts[name], "tv": values} for name, values in parts.items()]
        keep_table(prompt.store, repr(prompt.text), rows, ["mean", "at", "tv"])
        readers = list(map(lm.token_text, scene.readers))
        prompt.store.json("patches", {"readers": readers, "places": places, "tv": patched})
    return case


def _means(
    lm: tempo.LanguageModel, scene: ExactScene, spec: RunSpec, posterior: np.ndarray
) -> dict[str, np.ndarray]:
    """What is put in the place of the readers' residuals, by mean: [L + 1, R, E] each."""
    specs = [spec.but(replay=((member,), scene.readers)) for member in scene.members]
    specs.append(spec.but(prompt=OTHER_TEXT, replay=(scene.readers,)))
    *branches, elsewhere = tempo.generate_batch(lm, specs)
    of_branches = np.stack([_residual(branch, READERS_AT) for branch in branches])
    return {
        "posterior": np.einsum("rn,nlre->lre", posterior, of_branches),
        "alike": of_branches.mean(axis=0),
        "elsewhere": _residual(elsewhere, 0),
    }


def _residual(trace: Trace, step: int) -> np.ndarray:
    """The residuals [L + 1, w, E] of a set, float64."""
    residual = trace.steps[step].residual
    assert residual is not None
    return residual.astype(np.float64)


def _hooks(mean: np.ndarray, layers: Sequence[int]) -> Hooks:
    """Hooks that put the mean [L + 1, R, E] in the place of all readers' residuals."""
    hooks = {}
    for layer in layers:
        for reader, residual in enumerate(mean[layer]):
            hooks[READERS_AT, reader, layer] = lambda _, residual=residual: residual
    return hooks


def _patched(
    lm: tempo.LanguageModel,
    spec: RunSpec,
    mean: np.ndarray,
    places: Sequence[int],
    answers: Answers,
) -> list[float]:
    """How far the readers are from the truth with the mean put in before each of these layers."""
    hooks = [_hooks(mean, [layer]) for layer in places]
    traces = tempo.generate_batch(lm, [spec.but(capture="logits")] * len(places), hooks=hooks)
    return [_distance(trace, answers) for trace in traces]


def _distance(trace: Trace, answers: Answers) -> float:
    """Total variation of what the readers predict to the truth, mean over readers."""
    pairs = zip(answers.truth, after_readers(trace), strict=True)
    return round(float(np.mean([total_variation(truth, found) for truth, found in pairs])), 9)


def _same_bits(
    lm: tempo.LanguageModel,
    own: Trace,
    by_posterior: RunSpec,
    mean: np.ndarray,
    bounds: Sequence[int],
) -> dict[str, bool]:
    """Whether the readers' logits stay the same, each run made alone."""
    all_layers = range(bounds[-1] + 1)
    itself = _hooks(_residual(own, READERS_AT), all_layers)
    weighted = tempo.generate_batch(lm, [by_posterior])[0]
    runs = {
        "own": (own, own.spec, itself),
        "branches": (own, own.spec, _hooks(mean, all_layers)),
        "all layers": (weighted, by_posterior.but(weighting_layers=(0, bounds[-1])), None),
        "all but a window": (weighted, by_posterior.but(weighting_layers=bounds[1:3]), None),
    }
    found = {}
    for name, (expected, spec, hooks) in runs.items():
        trace = tempo.generate_batch(lm, [spec], hooks=[hooks])[0]
        pair = logits_of(trace, READERS_AT), logits_of(expected, READERS_AT)
        found[name] = bool(np.array_equal(*pair))
    return found


@study.claim(always=True, control="branches")
def test_own_residual_changes_nothing(case: Case, what: str = "own") -> bool:
    """A run into which its own residuals are put, in every layer, stays the same to the bit.

    Equality of all logits of all readers.
    Control: the branches' mean by posterior in their place.
    """
    return case.same_bits[what]


@study.claim(always=True, control="all but a window")
def test_weights_in_all_layers_are_the_weighting(case: Case, what: str = "all layers") -> bool:
    """Posterior weights that count in every layer by name are posterior weighting, to the bit.

    Equality of all logits of all readers.
    Control: weights that count in the second window of layers alone.
    """
    return case.same_bits[what]


def planned(effect: float, sd: float) -> Planned:
    return Planned(effect, sd, "a guess before any data")


@study.claim(
    less_than=ANY_GAIN,
    because="two thirds are gone",
    planned=planned(-0.02, 0.1),
    control="elsewhere",
)
def test_mean_residual_is_near_the_truth(case: Case, mean: str = "posterior") -> float:
    """The branches' mean residual, put in after the last layer, is read nearly as the mixture.

    TV(truth, mean put in after the last layer) - 0.35 TV(truth, siblings as they are).
    Control: the same reader's residual after another text.
    """
    return case.patched[mean][-1] - THIRD * case.plain


@study.claim(less_than=-BFLOAT16_TV, planned=planned(-0.08, 0.12), control="elsewhere")
def test_it_matters_how_branches_weigh(case: Case, mean: str = "posterior") -> float:
    """The mean by posterior is nearer to the truth than that of all branches alike.

    TV(truth, mean by posterior) - TV(truth, mean of branches alike), after the last layer.
    Control: the same reader's residual after another text.
    """
    return case.patched[mean][-1] - case.patched["alike"][-1]


@study.claim(
    more_than=ANY_GAIN,
    because="more than half of the way is left",
    planned=planned(0.03, 0.08),
    control="after the last",
)
def test_truth_is_lost_in_the_upper_half(case: Case, where: str = "middle") -> float:
    """With the truth put in at the middle layer, the layers above lose more than half of it.

    TV(truth, put in at the middle) - (TV(truth, as they are) + TV(truth, put in at the end)) / 2.
    Control: put in after the last layer, where nothing can be lost.
    """
    by_layer = case.patched["posterior"]
    at = len(case.places) // 2 if where == "middle" else -1
    return by_layer[at] - case.halfway


@study.claim(
    more_than=ANY_GAIN,
    because="it must not help at all",
    planned=planned(0.3, 0.2),
    control="posterior",
)
def test_another_text_does_not_help(case: Case, mean: str = "elsewhere") -> float:
    """The same reader's residual after another text leads away from the truth.

    TV(truth, put in) - TV(truth, as they are), mean over the places from the first layer's end on.
    Control: the branches' mean by posterior.
    """
    return float(np.mean(case.patched[mean][1:])) - case.plain


@study.claim(less_than=-BFLOAT16_TV, planned=planned(-0.04, 0.1), control=True)
def test_upper_half_carries_the_weights(case: Case, by_coin: bool = False) -> float:
    """Posterior weights help more in the upper half of the layers than in the lower half.

    TV(truth, weights in the upper half) - TV(truth, weights in the lower half).
    Control: the halves of each prompt named by a coin.
    """
    return case.halves(by_coin)


@study.claim(
    more_than=ANY_GAIN,
    because="more than half of the way is left",
    planned=planned(0.05, 0.08),
    control="all",
)
def test_no_window_is_enough(case: Case, layers: str = "window") -> float:
    """No sixth of the layers carries half of what posterior weights do in all of them.

    Least TV(truth, weights in one window) - (TV(truth, none) + TV(truth, all layers)) / 2.
    Control: weights in all layers in the place of the best window.
    """
    best = min(case.parts["windows"]) if layers == "window" else case.weighted
    return best - (case.plain + case.weighted) / 2


@study.pictures
def pictures(store: Store, cases: Sequence[Case]) -> Iterator[Picture]:
    """The distance to the truth by the layer at which a mean is put in, and by weighted layers."""
    if len(cases) < 2:
        return
    places, bounds, far = cases[0].places, cases[0].bounds, "total variation to the truth"
    over = f"mean and 95 % interval over {len(cases)} prompts"
    lines = lines_of([case.patched for case in cases], MEANS, places)
    plain = [case.plain for case in cases]
    lines["siblings as they are"] = curve([plain] * len(places), places)
    caption = (
        "The reader's residual is replaced before one layer; the last place is after all layers. "
        f"The layers above read siblings as they are; {over}. Where the first curve falls, what "
        "siblings as they are would do wrong is over."
    )
    title = "The truth put in, layer by layer"
    yield lines_by(lines, "layer at which it is put in", far, title, caption)
    middles = [(first + end - 1) / 2 for first, end in pairwise(bounds)]
    at: Mapping[str, Sequence[float]] = {
        "windows": middles,
        "below": bounds[1:],
        "from": bounds[:-1],
    }
    weights: dict[str, list[tuple[float, float, float, float]]] = {}
    for part, words in PARTS.items():
        weights |= lines_of([case.parts for case in cases], {part: words}, at[part])
    ends = (bounds[0], bounds[-1])
    weights["no weights"] = curve([plain] * 2, ends)
    caption = (
        f"Posterior weights that count in some layers only; {over}. A window has {bounds[1]} "
        "layers and stands at its middle."
    )
    yield lines_by(weights, "layer", far, "Where posterior weights count", caption)


def test_the_first_place_changes_nothing(cases: list[Case]) -> None:
    """Before the first layer a reader is its embedding in every branch: nothing can differ."""
    for case in cases:
        assert case.places[0] == 0
        for mean in MEANS:
            assert abs(case.patched[mean][0] - case.plain) < BFLOAT16_TV / 100


def test_every_layer_is_weighted_once(cases: list[Case]) -> None:
    """The windows are a partition of the layers, and both cuts end in every layer."""
    for case in cases:
        assert case.bounds == sorted(set(case.bounds))
        assert case.places[-1] == case.bounds[-1]
        assert case.parts["below"][-1] == case.parts["from"][0] == case.weighted


def test_patches_are_on_disk(store: Store, own_case: Case) -> None:
    """patches.json holds what the config's own prompt gave."""
    assert store.load_json("patches")["tv"] == own_case.patched
