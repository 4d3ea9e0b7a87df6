"""exp10: where does it enter? Siblings isolated in some layers only: which layers carry what they do to each other.

Every run replays the same set and reader in visible mode, with the edges between siblings removed below a layer, from a
layer on, or within a window of layers. Removing edges also moves their attention mass elsewhere, often to the first token; so
each window is also run with that mass kept: a sibling's own key then counts for the whole set (`isolated_mass="self"`).
Measured at the siblings (KL of their own outputs) and at the reader, which sees all siblings in every layer of every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.special import log_softmax

from fixtures.floors import rounding
from fixtures.raw import keep_log, spread
from fixtures.session import test_claim  # noqa: F401  every claim below is a test
from fixtures.store import Store
from fixtures.study import Context, Run, Study
from tempo import Trace
from tempo.claims import Case, Claim
from tempo.reporting.figures import Picture, lines_by
from tempo.statistics import SEED
from test_experiments.one_set import first_wide_set
from test_experiments.truth import forced

NUM_WINDOWS = 6
KL_MARGIN = 0.005
BFLOAT16_REASON = "KL that running the same model in bfloat16 would cause"
IDENTICAL_TV, IDENTICAL_KL = rounding("tv"), rounding("kl")
LOG_MARGIN = math.log(1.25)
LOG_REASON = "a quarter more: a smaller excess would not tell where an effect is"
PLANNED_LOG, PLANNED_LOG_SD = math.log(2), 1.0
PLANNED_LOG_FROM = "twice as much, with a spread over prompts by a factor of e; no earlier data"
HALF = 0.5


def bounds_of(num_layers: int) -> list[int]:
    """First layers of the windows, all as equal as can be, and the end of the last one."""
    num = min(NUM_WINDOWS, num_layers)
    return [round(i * num_layers / num) for i in range(num + 1)]


def measure(context: Context) -> Generator[Sequence[Run], Sequence[Trace], dict[str, Any]]:
    """One prompt: the first wide set and a reader, visible, isolated, and isolated in parts of the layers."""
    (free,) = yield [Run(context.config.spec(context.prompt))]
    scene = first_wide_set(free, context.prompt)
    if scene is None:
        return {"width": None}
    num_layers, bounds = context.lm.num_layers, bounds_of(context.lm.num_layers)
    spec = scene.spec(visibility="visible", capture=("logits",))
    visible, isolated = yield [forced(spec), forced(spec.but(visibility="isolated"))]
    text, whole, apart = visible.text, _log_probabilities(visible), _log_probabilities(isolated)
    total = _effect(whole, isolated)
    effects: dict[tuple[int, int, str], dict[str, float]] = {}
    from_isolated: dict[str, dict[str, float]] = {}
    # one at a time, as each run brings the whole vocabulary for every member; batches are by layers anyway
    for first, end, mass in _cuts(bounds):
        (partly,) = yield [forced(spec.but(isolated_layers=(first, end), isolated_mass=mass))]
        effects[first, end, mass] = _effect(whole, partly)
        if (first, mass) == (0, "spread") and end >= bounds[-2]:
            from_isolated["all_layers" if end == num_layers else "all_but_last_window"] = _effect(
                apart, partly
            )
    windows = list(pairwise(bounds))
    case: dict[str, Any] = {
        "width": len(scene.members),
        "bounds": bounds,
        "total": total,
        "from_isolated": from_isolated,  # against isolated mode, all others against visible mode
        "last_layer": effects[num_layers - 1, num_layers, "spread"],
        "total_self": effects[0, num_layers, "self"],
        "windows": [effects[first, end, "spread"] for first, end in windows],
        "windows_self": [effects[first, end, "self"] for first, end in windows],
        "below": [effects[0, cut, "spread"] for cut in bounds[1:]],
        "from": [effects[cut, num_layers, "spread"] for cut in bounds[:-1]],
    }
    if context.store:
        keep_log(context.store, free)
        context.store.json(
            "layer_effects", {"reader": context.lm.token_text(scene.reader), "effects": case}
        )
        context.store.text("analysis", _table(text, case))
    return case


def _cuts(bounds: Sequence[int]) -> list[tuple[int, int, str]]:
    """Every (first layer, end, mass) that is run, each once."""
    windows, end = list(pairwise(bounds)), bounds[-1]
    spread_out = [
        *windows,
        *((0, cut) for cut in bounds[1:]),
        *((cut, end) for cut in bounds[:-1]),
        (end - 1, end),
    ]
    cuts = [(*cut, "spread") for cut in spread_out] + [
        (*cut, "self") for cut in [*windows, (0, end)]
    ]
    return list(dict.fromkeys(cuts))


def _effect(logs: np.ndarray, other: Trace) -> dict[str, float]:
    """How far another run is from `logs` [n + 1, V], rows as of `_log_probabilities`.

    sibling_kl: KL(this || other) in nats of the members' own outputs, mean over them; reader_tv: total variation at the reader;
    largest_tv: the largest of any row.
    """
    probabilities, others = np.exp(logs), _log_probabilities(other)
    kl = np.einsum("rv,rv->r", probabilities, logs - others)
    tv = np.abs(probabilities - np.exp(others)).sum(axis=1) / 2
    return {
        "sibling_kl": max(0.0, float(kl[:-1].mean())),
        "reader_tv": float(tv[-1]),
        "largest_tv": float(tv.max()),
    }


def _log_probabilities(trace: Trace) -> np.ndarray:
    """log p [n + 1, V] of what the members of the set and then the reader give."""
    return log_softmax(
        np.concatenate([step.logits for step in trace.steps]).astype(np.float64), axis=-1
    )


def _table(text: str, case: Mapping[str, Any]) -> str:
    lines = [text, "isolated in layers  sibling KL   reader TV  and with the mass kept"]
    rows = [("all", case["total"], case["total_self"])]
    names = [f"{a} to {b - 1}" for a, b in pairwise(case["bounds"])]
    rows += list(zip(names, case["windows"], case["windows_self"], strict=True))
    for name, lost, kept in rows:
        values = [effect[key] for effect in (lost, kept) for key in ("sibling_kl", "reader_tv")]
        lines.append(f"{name:>18}  " + "  ".join(f"{value:10.4f}" for value in values))
    return "\n".join(lines)


def _get(*keys: str) -> Callable[[Case], Any]:
    def value(case: Case) -> Any:
        if case["width"] is None:
            return None
        for key in keys:
            case = case[key]
        return case

    return value


def _identical(*keys: str) -> Callable[[Case], bool | None]:
    return lambda case: None if case["width"] is None else _get(*keys)(case) <= IDENTICAL_TV


def _halves(name: str, by_coin: bool = False) -> Callable[[Case], float | None]:
    """log of the effect of the lower half of the layers over that of the upper half; with `by_coin`, of either over the other."""
    lowest = {"sibling_kl": IDENTICAL_KL, "reader_tv": IDENTICAL_TV}[name]

    def value(case: Case) -> float | None:
        if case["width"] is None or case["total"][name] < lowest:
            return None
        middle = len(case["windows"]) // 2
        lower, upper = case["below"][middle - 1][name], case["from"][middle][name]
        ratio = math.log(max(lower, lowest) / max(upper, lowest))
        heads = (
            np.random.default_rng([SEED, *case["prompt"].encode()]).integers(2) if by_coin else 1
        )
        return ratio if heads else -ratio

    return value


def _share_kept(*keys: str) -> Callable[[Case], float | None]:
    """An effect on the siblings as a share of the whole one, where there is one worth sharing."""
    return lambda case: (
        None if _too_small(case) else _get(*keys)(case) / case["total"]["sibling_kl"]
    )


def _too_small(case: Case) -> bool:
    return case["width"] is None or case["total"]["sibling_kl"] < KL_MARGIN


def _log_sum(case: Case) -> float | None:
    if _too_small(case):
        return None
    return math.log(
        max(sum(window["sibling_kl"] for window in case["windows"]), IDENTICAL_KL)
        / case["total"]["sibling_kl"]
    )


def _log_nothing(case: Case) -> float | None:
    return (
        None
        if _too_small(case)
        else math.log(max(_nothing(case), IDENTICAL_KL) / case["total"]["sibling_kl"])
    )


def _map(case: Case) -> list[float] | None:
    return None if case["width"] is None else [window["sibling_kl"] for window in case["windows"]]


def _map_of_nothing(case: Case) -> list[float] | None:
    return None if case["width"] is None else [_nothing(case)] * len(case["windows"])


_nothing = _get("from_isolated", "all_layers", "sibling_kl")
NOTHING = "isolated mode against isolated layers, all of them: the same computation twice"
COIN = "the halves of each prompt named by a coin"
HALVES = "log of the effect of isolating the lower half of the layers over that of the upper half"
REMAINS = (
    "KL(visible || isolated in every layer, own key counted n-fold) of the members' own outputs"
)

CLAIMS = (
    Claim(
        id="exp10.all-layers-are-isolated",
        statement="Isolating siblings in every layer of visible mode is isolated mode.",
        statistic=f"largest total variation at any member or the reader is at most {IDENTICAL_TV:.1e}, ten rounding floors",
        values=_identical("from_isolated", "all_layers", "largest_tv"),
        test="always",
        refuted_by="one prompt on which any distribution differs by more than rounding",
        control=_identical("from_isolated", "all_but_last_window", "largest_tv"),
        control_statement="siblings isolated in all windows but the last",
    ),
    Claim(
        id="exp10.last-layer-reaches-no-reader",
        statement="What siblings do to each other in the last layer reaches no later token: its keys and values are made before.",
        statistic=f"total variation at the reader is at most {IDENTICAL_TV:.1e}, ten rounding floors",
        values=_identical("last_layer", "reader_tv"),
        test="always",
        refuted_by="one prompt on which the reader differs by more than rounding",
        control=lambda case: (
            None if case["width"] is None else case["windows"][0]["reader_tv"] <= IDENTICAL_TV
        ),
        control_statement="siblings isolated in the first window of layers",
    ),
    Claim(
        id="exp10.enters-early",
        statement="What siblings do to each other comes from the lower half of the layers more than from the upper half.",
        statistic=f"{HALVES}; KL(visible || partly isolated) of the members' own outputs",
        values=_halves("sibling_kl"),
        test="greater",
        margin=LOG_MARGIN,
        margin_reason=LOG_REASON,
        family="exp10",
        planned_effect=PLANNED_LOG,
        planned_sd=PLANNED_LOG_SD,
        planned_from=PLANNED_LOG_FROM,
        refuted_by="a mean log ratio below log 1.25",
        control=_halves("sibling_kl", by_coin=True),
        control_statement=COIN,
    ),
    Claim(
        id="exp10.reaches-reader-early",
        statement="What siblings do to the next step comes from the lower half of the layers more than from the upper half.",
        statistic=f"{HALVES}; total variation at the reader",
        values=_halves("reader_tv"),
        test="greater",
        margin=LOG_MARGIN,
        margin_reason=LOG_REASON,
        family="exp10",
        planned_effect=PLANNED_LOG,
        planned_sd=PLANNED_LOG_SD,
        planned_from=PLANNED_LOG_FROM,
        refuted_by="a mean log ratio below log 1.25",
        control=_halves("reader_tv", by_coin=True),
        control_statement=COIN,
    ),
    Claim(
        id="exp10.one-window-suffices-somewhere",
        statement="Isolating siblings in some single window of layers changes what they predict.",
        statistic="KL(visible || isolated in the window) of the members' own outputs in nats, for each window",
        values=_map,
        test="somewhere",
        margin=KL_MARGIN,
        margin_reason=BFLOAT16_REASON,
        family="exp10",
        planned_effect=0.03,
        planned_sd=0.06,
        planned_from="a pilot's 0.26 nats in all, an eighth of it in one window, with twice as much spread",
        cells=NUM_WINDOWS,
        refuted_by="every window below 0.005 nats",
        control=_map_of_nothing,
        control_statement=NOTHING,
    ),
    Claim(
        id="exp10.windows-add-up",
        statement="The windows' effects add up to the whole: no layer repeats, or repairs, what another did.",
        statistic="log of (sum of KL over windows / KL of isolating every layer), where the latter is at least 0.005 nats",
        values=_log_sum,
        test="equivalent",
        margin=LOG_MARGIN,
        margin_reason=LOG_REASON,
        family="exp10",
        planned_effect=0.0,
        planned_sd=0.5,
        planned_from="no earlier data; a spread over prompts by a factor of 1.6",
        refuted_by="a sum that is a quarter more, or less, than the whole",
        control=_log_nothing,
        control_statement=NOTHING,
    ),
    Claim(
        id="exp10.mass-is-not-the-effect",
        statement="Siblings change each other's predictions also if their attention mass stays with the set.",
        statistic=f"{REMAINS} in nats",
        values=_get("total_self", "sibling_kl"),
        test="greater",
        margin=KL_MARGIN,
        margin_reason=BFLOAT16_REASON,
        family="exp10",
        planned_effect=0.1,
        planned_sd=0.2,
        planned_from="somewhat less than half of a pilot's 0.26 nats, with twice as much spread",
        refuted_by="a mean below 0.005 nats",
        control=_nothing,
        control_statement=NOTHING,
    ),
    Claim(
        id="exp10.most-remains-at-same-mass",
        statement="Most of what siblings do to each other is what they say, not the attention mass they take from the context.",
        statistic=f"{REMAINS} / KL(visible || isolated)",
        values=_share_kept("total_self", "sibling_kl"),
        test="greater",
        margin=HALF,
        margin_reason="half of the effect",
        estimand="pseudomedian",
        family="exp10",
        planned_effect=0.75,
        planned_sd=0.5,
        planned_from="three quarters, with a spread as large as ratios of small divergences have; no earlier data",
        refuted_by="less than half of the effect on a typical prompt",
        control=_share_kept("from_isolated", "all_layers", "sibling_kl"),
        control_statement=NOTHING,
    ),
)


def _curve(
    cases: Sequence[Case], key: str, name: str, at: Sequence[float]
) -> list[tuple[float, float, float, float]]:
    return [(x, *spread([case[key][i][name] for case in cases])) for i, x in enumerate(at)]


def pictures(store: Store, cases: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """The effect by window of layers, with and without its mass, and by cut, at the siblings and at the reader."""
    branched = [case for case in cases if case["width"]]
    if len(branched) < 2:
        return []
    bounds = branched[0]["bounds"]
    middles = [(first + end - 1) / 2 for first, end in pairwise(bounds)]
    found = []
    for name, what, where in (
        ("sibling_kl", "KL in nats", "at the siblings"),
        ("reader_tv", "total variation", "at the reader"),
    ):
        total = spread([case["total"][name] for case in branched])[0]
        means = f"mean and 95 % interval over {len(branched)} prompts. Isolating siblings in every layer gives {total:.3g}."
        windows = {
            "edges removed": _curve(branched, "windows", name, middles),
            "edges removed, mass kept": _curve(branched, "windows_self", name, middles),
        }
        caption = (
            f"What isolating siblings in one window of {bounds[1]} layers changes {where}, {means} Where the second curve is as high "
            "as the first, the effect is what siblings say to each other and not the attention that they take from the context."
        )
        found.append(
            lines_by(
                windows, "layer (middle of the window)", what, f"Where it enters, {where}", caption
            )
        )
        cuts = {
            "isolated below the layer": _curve(branched, "below", name, bounds[1:]),
            "isolated from the layer on": _curve(branched, "from", name, bounds[:-1]),
        }
        caption = (
            f"What isolating siblings below a layer, or from it on, changes {where}, {means} The layers between which a curve is "
            "steep carry the effect."
        )
        found.append(
            lines_by(
                cuts, "layer of the cut", what, f"Isolated below or from a layer, {where}", caption
            )
        )
    return found


STUDY = Study("exp10", "Where it enters", measure, CLAIMS, pictures)


def test_every_layer_is_in_one_window(cases: list[Case]) -> None:
    """Harness check: the windows are a partition of the layers, and the last cut below is every layer."""
    for case in (case for case in cases if case["width"]):
        bounds = case["bounds"]
        assert bounds[0] == 0 and bounds == sorted(set(bounds))
        assert (
            len(case["windows"])
            == len(case["windows_self"])
            == len(case["below"])
            == len(case["from"])
            == len(bounds) - 1
        )
        assert case["below"][-1] == case["from"][0], (
            "isolated below the last bound and from the first on are the same run"
        )


def test_last_layer_changes_the_siblings_themselves(cases: list[Case]) -> None:
    """Harness check: the run whose reader must not move is no plain visible run: its siblings do move."""
    moved = [case["last_layer"]["largest_tv"] for case in cases if case["width"]]
    assert min(moved) > IDENTICAL_TV, (
        f"isolating the last layer changes no more than {min(moved):.2g} anywhere"
    )


def test_effects_are_on_disk(store: Store, own_case: Case) -> None:
    """layer_effects.json holds what the family's own prompt gave."""
    assert store.load_json("layer_effects")["effects"]["windows"] == own_case["windows"]
