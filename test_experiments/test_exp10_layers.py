"""exp10: where does it enter? Which layers carry what siblings do to each other?

Every run replays one set and its reader in visible mode. The edges between siblings are removed
below a layer, from a layer on, or in a window of layers. That also moves their attention mass
elsewhere, often to the first token. So each window is run again with the mass kept: a sibling's own
key then counts for the whole set (`isolated_mass="self"`). Measured at the siblings (KL of their
own outputs) and at the reader, which sees all siblings in every layer of every run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from scipy.special import log_softmax

from fixtures.floors import rounding
from fixtures.margins import BFLOAT16_KL, QUARTER
from fixtures.raw import keep_log, keep_table, lines_of, spread
from fixtures.rows import logits_of
from fixtures.scenes import first_scene
from fixtures.truth import forced
from tempo import Trace
from tempo.harness import Planned, Prompt, Steps, Store, Study, run
from tempo.reporting.figures import Picture, lines_by

NUM_WINDOWS = 6  # a run for each, with and without its mass, on every prompt
# How far a run is from another, and which rounding floor that has. The first is the mean over the
# members' own outputs. "largest_tv" stands beside both: the largest at any member or the reader.
MEASURES = {
    "sibling_kl": ("kl", "KL in nats", "at the siblings"),
    "reader_tv": ("tv", "total variation", "at the reader"),
}
Effect = dict[str, float]

study = Study("exp10", title="Where it enters", registered="2026-11-24")


@dataclass(frozen=True)
class Case:
    """What isolating siblings in some layers changes of visible mode, for one set of a prompt.

    whole: "total" is isolated mode itself, "total_self" every layer with the mass kept. Against
    isolated mode: "all_layers", the same computation twice, and "all_but_last_window".
    parts: "windows", "windows_self" with the mass kept, "below" each bound, "from" each bound on.
    """

    dtype: str
    coin: bool
    bounds: list[int]  # first layers of the windows, and the end of the last one
    whole: dict[str, Effect]
    parts: dict[str, list[Effect]]

    def curves(self, name: str) -> dict[str, list[float]]:
        """One measure in each of the parts."""
        found = {}
        for part, effects in self.parts.items():
            found[part] = [effect[name] for effect in effects]
        return found

    def halves(self, name: str, by_coin: bool) -> float | None:
        """log of the lower half's effect over the upper half's, if the whole is no rounding."""
        lowest = rounding(MEASURES[name][0], self.dtype)
        if self.whole["total"][name] < lowest:
            return None
        middle = len(self.parts["windows"]) // 2
        lower, upper = self.parts["below"][middle - 1][name], self.parts["from"][middle][name]
        ratio = math.log(max(lower, lowest) / max(upper, lowest))
        return -ratio if by_coin and not self.coin else ratio

    def share(self, *parts: Effect) -> float | None:
        """What some effects on the siblings sum to, of a whole one that is worth sharing."""
        whole = self.whole["total"]["sibling_kl"]
        return None if whole < BFLOAT16_KL else sum(part["sibling_kl"] for part in parts) / whole


@study.measure
def parts_of_the_layers(prompt: Prompt) -> Steps[Case | None]:
    """The first wide set and a reader: visible, isolated, and isolated in parts of the layers."""
    free: Trace = yield run(prompt)
    scene = first_scene(free, prompt)
    if scene is None:
        return None
    num_layers = prompt.lm.num_layers
    num = min(NUM_WINDOWS, num_layers)
    bounds = [round(i * num_layers / num) for i in range(num + 1)]
    windows, end = list(pairwise(bounds)), num_layers
    cuts = {
        "windows": [(*window, "spread") for window in windows],
        "below": [(0, cut, "spread") for cut in bounds[1:]],
        "from": [(cut, end, "spread") for cut in bounds[:-1]],
        "last_layer": [(end - 1, end, "spread")],
        "windows_self": [(*window, "self") for window in windows],
        "total_self": [(0, end, "self")],
    }
    spec = scene.force(visibility="visible", capture="logits")
    visible, isolated = yield [forced(spec), forced(spec.but(visibility="isolated"))]
    logs, apart = _log_probabilities(visible), _log_probabilities(isolated)
    against_isolated = {cuts["below"][-1]: "all_layers", cuts["below"][-2]: "all_but_last_window"}
    whole, effects = {"total": _effect(logs, isolated)}, {}
    # one at a time, as each run brings the whole vocabulary for every member
    for cut in dict.fromkeys(chain(*cuts.values())):
        first, last, mass = cut
        partly: Trace = yield forced(spec.but(isolated_layers=(first, last), isolated_mass=mass))
        effects[cut] = _effect(logs, partly)
        if cut in against_isolated:
            whole[against_isolated[cut]] = _effect(apart, partly)
    parts = {}
    for part, of_part in cuts.items():
        parts[part] = [effects[cut] for cut in of_part]
    whole |= {name: parts.pop(name)[0] for name in ("last_layer", "total_self")}
    if prompt.store:
        keep_log(prompt.store, free)
        found = {"width": scene.width, "bounds": bounds, **whole, **parts}
        reader = prompt.lm.token_text(scene.reader)
        prompt.store.json("layer_effects", {"reader": reader, "effects": found})
        rows = [{"layers": f"{a} to {b - 1}", "mass": c, **effects[a, b, c]} for a, b, c in effects]
        keep_table(prompt.store, visible.text, rows, list(rows[0]))
    dtype, coin = prompt.lm.provenance()["dtype"], bool(prompt.rng().integers(2))
    return Case(dtype=dtype, coin=coin, bounds=bounds, whole=whole, parts=parts)


def _effect(logs: np.ndarray, other: Trace) -> Effect:
    """How far another run is from `logs` [w + 1, V], rows as of `_log_probabilities`."""
    probabilities, others = np.exp(logs), _log_probabilities(other)
    kl = np.einsum("rv,rv->r", probabilities, logs - others)
    tv = np.abs(probabilities - np.exp(others)).sum(axis=1) / 2
    sibling_kl = max(0.0, float(kl[:-1].mean()))
    return {"sibling_kl": sibling_kl, "reader_tv": float(tv[-1]), "largest_tv": float(tv.max())}


def _log_probabilities(trace: Trace) -> np.ndarray:
    """log p [w + 1, V] of what the members of the set and then the reader give."""
    logits = np.concatenate([logits_of(trace, k) for k in range(len(trace.steps))])
    return log_softmax(logits.astype(np.float64), axis=-1)


@study.claim(always=True, control="all_but_last_window")
def test_all_layers_are_isolated(case: Case, layers: str = "all_layers") -> bool:
    """Isolating siblings in every layer of visible mode is isolated mode.

    Largest total variation at any member or the reader is at most ten rounding floors.
    Control: siblings isolated in all windows but the last.
    """
    return case.whole[layers]["largest_tv"] <= rounding("tv", case.dtype)


@study.claim(always=True)
def test_last_layer_reaches_no_reader(case: Case) -> bool | None:
    """What siblings do to each other in the last layer reaches no later token.

    Total variation at the reader is at most ten rounding floors: its keys and values come first.
    """
    return _reaches_no_reader(case, case.whole["last_layer"])


@test_last_layer_reaches_no_reader.control
def first_window(case: Case) -> bool | None:
    """siblings isolated in the first window of layers"""
    return _reaches_no_reader(case, case.parts["windows"][0])


def _reaches_no_reader(case: Case, effect: Effect) -> bool | None:
    """None if nothing that siblings do to each other reaches the reader."""
    lowest = rounding("tv", case.dtype)
    return None if case.whole["total"]["reader_tv"] <= lowest else effect["reader_tv"] <= lowest


# A pilot's siblings moved each other by 0.26 nats in all.
TWICE = Planned(math.log(2), 1.0, "twice as much, spread by a factor of e; no earlier data")
EIGHTH = Planned(0.03, 0.06, "an eighth of a pilot's 0.26 nats, spread twice as much", NUM_WINDOWS)
NO_CHANGE = Planned(0.0, 0.5, "no earlier data; a spread over prompts by a factor of 1.6")
UNDER_HALF = Planned(0.1, 0.2, "under half of a pilot's 0.26 nats, spread twice as much")
MOST = Planned(0.75, 0.5, "no earlier data; spread as ratios of small divergences are")


@study.claim(more_than=QUARTER, planned=TWICE, control=True)
def test_enters_early(case: Case, by_coin: bool = False) -> float | None:
    """What siblings do to each other comes more from the lower half of layers than the upper.

    log(KL(visible || lower half isolated) / KL(visible || upper half isolated)) at the siblings.
    Control: the halves of each prompt named by a coin.
    """
    return case.halves("sibling_kl", by_coin)


@study.claim(more_than=QUARTER, planned=TWICE, control=True)
def test_reaches_reader_early(case: Case, by_coin: bool = False) -> float | None:
    """What siblings do to the next step comes more from the lower half of layers than the upper.

    log(TV(visible, lower half isolated) / TV(visible, upper half isolated)) at the reader.
    Control: the halves of each prompt named by a coin.
    """
    return case.halves("reader_tv", by_coin)


@study.claim(somewhere_above=BFLOAT16_KL, planned=EIGHTH, control=True)
def test_one_window_suffices_somewhere(case: Case, twice: bool = False) -> list[float]:
    """Isolating siblings in some single window of layers changes what they predict.

    KL(visible || isolated in the window) of the members' own outputs in nats, for each window.
    Control: isolated mode against isolated layers, all of them: the same computation twice.
    """
    windows = case.parts["windows"]
    return [(case.whole["all_layers"] if twice else part)["sibling_kl"] for part in windows]


@study.claim(within=QUARTER, planned=NO_CHANGE, control=True)
def test_windows_add_up(case: Case, twice: bool = False) -> float | None:
    """The windows' effects add up to the whole: no layer repeats, or repairs, what another did.

    log of (sum of KL over windows / KL of isolating every layer), where that is 0.005 nats or more.
    Control: isolated mode against isolated layers, all of them: the same computation twice.
    """
    parts = [case.whole["all_layers"]] if twice else case.parts["windows"]
    share, least = case.share(*parts), case.share({"sibling_kl": rounding("kl", case.dtype)})
    return None if share is None or least is None else math.log(max(share, least))


@study.claim(more_than=BFLOAT16_KL, planned=UNDER_HALF, control="all_layers")
def test_mass_is_not_the_effect(case: Case, layers: str = "total_self") -> float:
    """Siblings change each other's predictions also if their attention mass stays with the set.

    KL(visible || isolated in every layer, own key counted n-fold) of the members' own outputs.
    Control: isolated mode against isolated layers, all of them: the same computation twice.
    """
    return case.whole[layers]["sibling_kl"]


HALF = "half of the effect"


@study.claim(more_than=0.5, because=HALF, typical=True, planned=MOST, control="all_layers")
def test_most_remains_at_same_mass(case: Case, layers: str = "total_self") -> float | None:
    """Most of what siblings do to each other is what they say, not the attention they take.

    KL(visible || isolated in every layer, own key counted n-fold) / KL(visible || isolated).
    Control: isolated mode against isolated layers, all of them: the same computation twice.
    """
    return case.share(case.whole[layers])


@study.pictures
def pictures(store: Store, cases: Sequence[Case]) -> Iterator[Picture]:
    """The effect by window of layers, with and without its mass, and by cut."""
    if len(cases) < 2:
        return
    bounds = cases[0].bounds
    middles = [(first + end - 1) / 2 for first, end in pairwise(bounds)]
    for name, (_, what, where) in MEASURES.items():
        curves = [case.curves(name) for case in cases]
        total = spread([case.whole["total"][name] for case in cases])[0]
        means = (
            f"changes {where}: mean and 95 % interval over {len(cases)} prompts. Isolating "
            f"siblings in every layer gives {total:.3g}."
        )
        caption = (
            f"What isolating siblings in one window of {bounds[1]} layers {means} Where the second "
            "curve is as high as the first, the effect is what siblings say to each other and not "
            "the attention that they take from the context."
        )
        titles = {"windows": "edges removed", "windows_self": "edges removed, mass kept"}
        lines, title = lines_of(curves, titles, middles), f"Where it enters, {where}"
        yield lines_by(lines, "layer (middle of the window)", what, title, caption)
        caption = (
            f"What isolating siblings below a layer, or from it on, {means} The layers between "
            "which a curve is steep carry the effect."
        )
        lines = lines_of(curves, {"below": "isolated below the layer"}, bounds[1:])
        lines |= lines_of(curves, {"from": "isolated from the layer on"}, bounds[:-1])
        title = f"Isolated below or from a layer, {where}"
        yield lines_by(lines, "layer of the cut", what, title, caption)


def test_every_layer_is_in_one_window(cases: list[Case]) -> None:
    """The windows are a partition of the layers, and the last cut below is every layer."""
    for case in cases:
        assert case.bounds[0] == 0
        assert case.bounds == sorted(set(case.bounds))
        assert {len(found) for found in case.parts.values()} == {len(case.bounds) - 1}
        assert case.parts["below"][-1] == case.parts["from"][0], "both isolate every layer"


def test_last_layer_changes_the_siblings_themselves(cases: list[Case]) -> None:
    """The run whose reader must not move is no plain visible run: its siblings do move."""
    for case in cases:
        assert case.whole["last_layer"]["largest_tv"] > rounding("tv", case.dtype)


def test_effects_are_on_disk(store: Store, own_case: Case) -> None:
    """layer_effects.json holds what the config's own prompt gave."""
    assert store.load_json("layer_effects")["effects"]["windows"] == own_case.parts["windows"]
