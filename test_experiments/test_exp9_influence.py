"""exp9: influence, not attention: what does leaving one sibling out, or replacing it, change?

In the other siblings (isolated: exactly nothing) and in the next step. An exact reader would weigh each sibling with its
posterior, the probability of having been the token that was written, given the token that follows; leaving one out would
then move the next distribution by about that weight times how far that sibling's own prediction is from the rest.
Influence is total variation, which is proportional to such a weight; KL goes with its square for small weights.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import kendalltau

from fixtures.floors import rounding
from fixtures.raw import keep_log, lattice, spread
from fixtures.session import test_claim  # noqa: F401  every claim below is a test
from fixtures.store import Store
from fixtures.study import Context, Run, Study
from tempo import Trace
from tempo.claims import Case, Claim
from tempo.metrics import kl_divergence, softmax, total_variation
from tempo.reporting.figures import Picture, bars, lines_by
from tempo.statistics import SEED
from test_experiments.one_set import OneSet, first_wide_set
from test_experiments.truth import Branches, forced, read_spec

TV_MARGIN, KL_MARGIN = 0.02, 0.005
BFLOAT16_REASON = "what running the same model in bfloat16 changes"
MIN_MEMBERS = 3  # a slope or a rank correlation over two members says nothing about proportion
# Weights and influences below this count as this much: leaving out a member of posterior weight p moves an exact reader by at
# most p, and what is less than the model's own rounding to bfloat16 makes no order and no slope.
FLOOR = TV_MARGIN
# Of log posterior weights over members, at least: over less, a slope divides noise by nearly nothing.
MIN_LOG_SPREAD = 0.5
SLOPE_MARGIN = 0.25
SLOPE_REASON = (
    "a quarter of the way from uniform influence (slope 0) to proportional influence (slope 1)"
)
TAU_MARGIN = 0.2
TAU_REASON = "six pairs in ten in the same order, which is hardly better than a coin"
TAU_DIFFERENCE = 0.1
PLANNED_SLOPE_SD, PLANNED_TAU_SD = 0.6, 0.5
PLANNED_FROM = "no earlier data; the spread that a slope, or a rank correlation, of three to five members has if half of it is noise"


def measure(context: Context) -> Generator[Sequence[Run], Sequence[Trace], dict[str, Any]]:
    """One prompt: the first wide set and a reader, whole, with one member replaced, and without each member in turn."""
    (free,) = yield [Run(context.config.spec(context.prompt))]
    scene = first_wide_set(free, context.prompt)
    if scene is None:
        return {"width": None}
    members, width = scene.members, len(scene.members)
    rng = np.random.default_rng([SEED, *context.prompt.encode()])
    place = int(rng.integers(width))
    chosen_from = free.steps[len(scene.prefix) - len(free.prompt_tokens)].distribution
    replaced = (*members[:place], _another(chosen_from, members, rng), *members[place + 1 :])
    shift = int(rng.integers(1, width))
    captured = (
        ("attention", "logits", "kv") if context.lm.has_plain_keys else ("attention", "logits")
    )
    # one of each name on every prompt, so that batches have the same shapes and a difference of one bit is no rounding
    pairs = [
        Run(
            scene.spec(replay=(tokens, (scene.reader,)), visibility=mode, capture=capture),
            batch=f"exp9.{name}",
        )
        for mode in ("isolated", "visible")
        for name, tokens, capture in (
            ("full", members, captured if mode == "isolated" else ("logits",)),
            ("replaced", replaced, ("logits",)),
        )
    ]
    full, isolated_replaced, visible, visible_replaced = yield pairs
    others = [i for i in range(width) if i != place]
    reader = softmax(full.steps[1].logits[0])
    case: dict[str, Any] = {
        "width": width,
        "isolated_others_difference": _max_difference(full, isolated_replaced, others),
        "visible_others_difference": _max_difference(visible, visible_replaced, others),
        "isolated_others_kl": _kl_of(full, isolated_replaced, others),
        "visible_others_kl": _kl_of(visible, visible_replaced, others),
        "replaced_reader_tv": total_variation(
            reader, softmax(isolated_replaced.steps[1].logits[0])
        ),
    }
    del visible, visible_replaced, isolated_replaced  # rows of the whole vocabulary
    branches = Branches(scene.prefix, (members,), (scene.reader,))
    paths = yield branches.runs()
    log_posterior = branches.log_posterior(paths, lag=2)
    prior = np.array([path.steps[0].probabilities[0] for path in paths])
    exact = _exact_influence(log_posterior, branches.predictions(paths, lag=2))
    again, *without = yield [
        forced(_without(scene, ())),
        *(forced(_without(scene, (i,))) for i in range(width)),
    ]
    case["floor_tv"] = total_variation(reader, again.steps[2].distribution)
    influence = np.array(
        [total_variation(reader, trace.steps[2].distribution) for trace in without]
    )
    kl = [kl_divergence(reader, trace.steps[2].distribution) for trace in without]
    if context.store:
        _keep(context.store, free, full, [trace.steps[2].distribution for trace in without])
    same_mass = yield [forced(_without(scene, (i,), same_mass=True)) for i in range(width)]
    influence_same_mass = np.array(
        [total_variation(reader, trace.steps[2].distribution) for trace in same_mass]
    )
    weights = {
        "posterior": np.exp(log_posterior),
        "prior": prior / prior.sum(),
        **_attention(full, context.lm.num_heads),
    }
    case |= {
        "members": {
            "texts": full.steps[0].texts,
            "influence": influence.tolist(),
            "influence_kl": kl,
            "influence_same_mass": influence_same_mass.tolist(),
            "influence_exact": exact.tolist(),
            **{name: values.tolist() for name, values in weights.items()},
        },
        "least_probable_tv": float(influence[-1]),
    }
    if context.store:
        context.store.json(
            "influence", {"reader": context.lm.token_text(scene.reader), "members": case["members"]}
        )
        context.store.text("analysis", _table(context, full, scene, case))
    if width < MIN_MEMBERS:
        return case
    posterior = weights["posterior"] = np.maximum(weights["posterior"], FLOOR)
    case["tau"] = {name: _tau(influence, values) for name, values in weights.items()}
    case["tau_shifted"] = {
        name: _tau(influence, np.roll(values, shift)) for name, values in weights.items()
    }
    if np.log(posterior).std() >= MIN_LOG_SPREAD:
        case["slope"] = _slope(posterior, influence)
        case["slope_shifted"] = _slope(np.roll(posterior, shift), influence)
        case["slope_exact"] = _slope(posterior, exact)
        case["slope_same_mass"] = _slope(posterior, influence_same_mass)
        case["slope_same_mass_shifted"] = _slope(np.roll(posterior, shift), influence_same_mass)
    return case


def _another(distribution: np.ndarray, members: Sequence[int], rng: np.random.Generator) -> int:
    """A token outside the set, drawn from the distribution that the set was chosen from: as good a text as rare members are."""
    rest = distribution.astype(np.float64)
    rest[list(members)] = 0.0
    ends = np.cumsum(rest)
    return int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))


def _without(scene: OneSet, left_out: Sequence[int], same_mass: bool = False) -> Any:
    """The set without some members, then the reader; with `same_mass` the rest weighs what the whole set did."""
    rest = [token for i, token in enumerate(scene.members) if i not in left_out]
    spec = read_spec(scene.prefix, [rest], (scene.reader,))
    if not same_mass:
        return spec
    return spec.but(replay_weights=[[len(scene.members) / len(rest)] * len(rest), [1.0], [1.0]])


def _exact_influence(log_posterior: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Total variation [n] between the exact mixture of all branches [n, V] and that without each."""
    posterior = np.exp(log_posterior)
    whole = posterior @ predictions
    without = [
        np.delete(posterior, i) / np.delete(posterior, i).sum() @ np.delete(predictions, i, axis=0)
        for i in range(len(posterior))
    ]
    return np.array([total_variation(whole, other) for other in without])


def _max_difference(one: Trace, other: Trace, rows: Sequence[int]) -> float:
    return float(np.abs(one.steps[0].logits[rows] - other.steps[0].logits[rows]).max())


def _kl_of(one: Trace, other: Trace, rows: Sequence[int]) -> float:
    """KL(one || other) in nats of what those members of the set give, mean over them."""
    pairs = zip(
        softmax(one.steps[0].logits[rows]), softmax(other.steps[0].logits[rows]), strict=True
    )
    return float(np.mean([kl_divergence(p, q) for p, q in pairs]))


def _attention(full: Trace, num_heads: int) -> dict[str, np.ndarray]:
    """The reader's weight on each member [n], mean over layers and heads; also times the length of the member's value.

    The second is the norm of what a head takes from a member before its output projection (Kobayashi et al. 2020,
    arXiv 2004.10102, with the projection left out).
    """
    slots = full.steps[0].slots
    weights = full.steps[1].attention[:, :, 0, slots].astype(np.float64)  # [L, H, n]
    found = {"attention": weights.mean(axis=(0, 1))}
    if full.values is not None:
        norms = np.linalg.norm(full.values[:, :, slots].astype(np.float64), axis=-1)  # [L, Hkv, n]
        found["attention_value_norm"] = (
            weights * norms.repeat(num_heads // norms.shape[1], axis=1)
        ).mean(axis=(0, 1))
    return found


def _tau(influence: np.ndarray, weights: np.ndarray) -> float | None:
    """Kendall's rank correlation over the members; None where either has no order."""
    tau = float(kendalltau(influence, weights).statistic)
    return tau if np.isfinite(tau) else None


def _slope(weights: np.ndarray, influence: np.ndarray) -> float:
    """Of log influence on log weight over the members: 1 where influence is proportional, 0 where it is the same for all."""
    return float(np.polyfit(np.log(weights), np.log(np.maximum(influence, FLOOR)), 1)[0])


def _keep(store: Store, free: Trace, full: Trace, without: Sequence[np.ndarray]) -> None:
    keep_log(store, free)
    store.arrays(
        "influence",
        full=softmax(full.steps[1].logits[0]).astype(np.float32),
        without=np.stack(without),
        reader_attention=full.steps[1].attention[:, :, 0],
    )


def _table(context: Context, full: Trace, scene: OneSet, case: Mapping[str, Any]) -> str:
    columns = [name for name in case["members"] if name != "texts"]
    lines = [
        f"{context.lm.decode(scene.prefix)!r} + {full.text}",
        "  ".join(["member".ljust(14), *columns]),
    ]
    for i, text in enumerate(case["members"]["texts"]):
        lines.append(
            "  ".join(
                [
                    repr(text).ljust(14),
                    *(f"{case['members'][name][i]:{len(name)}.4f}" for name in columns),
                ]
            )
        )
    return "\n".join(lines)


def _below(key: str, bound: float) -> Callable[[Case], bool | None]:
    return lambda case: None if case["width"] is None else case[key] <= bound


def _get(key: str) -> Callable[[Case], float | None]:
    return lambda case: case.get(key)


def _tau_of(
    name: str, against: str | None = None, shifted: bool = False
) -> Callable[[Case], float | None]:
    """The rank correlation of influence with `name` (its members shifted, for a control), less that with `against`."""

    def value(case: Case) -> float | None:
        if "tau" not in case:
            return None
        taus = [
            case["tau_shifted" if shifted else "tau"][name],
            case["tau"][against] if against else 0.0,
        ]
        return None if None in taus else taus[0] - taus[1]

    return value


def _less_exact(key: str) -> Callable[[Case], float | None]:
    return lambda case: case[key] - case["slope_exact"] if key in case else None


SLOPE = (
    f"slope of log influence on log posterior weight over the members, at least {MIN_MEMBERS}; influence is the total variation of what "
    f"the reader predicts with and without the member; both count as {FLOOR} where they are less"
)
TAU = "Kendall's tau between the influence of the members and "
SHIFTED = "the members' weights moved round by a random number of places"

CLAIMS = (
    Claim(
        id="exp9.isolated-siblings-do-not-influence",
        statement="Replacing an isolated sibling leaves what the others give unchanged to the last bit.",
        statistic="largest difference of any logit of any other member is exactly 0.0",
        values=_below("isolated_others_difference", 0.0),
        test="always",
        refuted_by="one logit that differs in one bit",
        control=_below("visible_others_difference", 0.0),
        control_statement="the same replacement in visible mode",
    ),
    Claim(
        id="exp9.visible-siblings-influence",
        statement="Replacing a visible sibling changes what the others predict.",
        statistic="KL in nats of the other members' own outputs before and after one was replaced, mean over them",
        values=_get("visible_others_kl"),
        test="greater",
        margin=KL_MARGIN,
        margin_reason=BFLOAT16_REASON,
        family="exp9",
        planned_effect=0.05,
        planned_sd=0.1,
        planned_from="a fifth of the 0.26 nats by which a pilot's siblings moved each other in all, with twice as much spread",
        refuted_by="a mean below 0.005 nats",
        control=_get("isolated_others_kl"),
        control_statement="the same replacement in isolated mode",
    ),
    Claim(
        id="exp9.least-probable-matters",
        statement="Even the least probable sibling matters to the next step.",
        statistic="total variation of what the reader predicts with and without the set's least probable member",
        values=_get("least_probable_tv"),
        test="greater",
        margin=TV_MARGIN,
        margin_reason=BFLOAT16_REASON,
        family="exp9",
        planned_effect=0.06,
        planned_sd=0.1,
        planned_from="three times the margin, with a spread as large as such a distance has",
        refuted_by="a mean below 0.02",
        control=_get("floor_tv"),
        control_statement="the whole set twice, in different batches",
    ),
    Claim(
        id="exp9.influence-follows-posterior",
        statement="The more probable a sibling is, given what follows, the more it influences the next step.",
        statistic=SLOPE,
        values=_get("slope"),
        test="greater",
        margin=SLOPE_MARGIN,
        margin_reason=SLOPE_REASON,
        estimand="pseudomedian",
        family="exp9",
        planned_effect=0.5,
        planned_sd=PLANNED_SLOPE_SD,
        planned_from=PLANNED_FROM,
        refuted_by="a slope below 0.25 on a typical prompt",
        control=_get("slope_shifted"),
        control_statement=SHIFTED,
    ),
    Claim(
        id="exp9.influence-as-of-exact-reader",
        statement="Influence grows with posterior weight as it does for an exact reader.",
        statistic=f"{SLOPE}; less the same slope of the exact mixture of the branches",
        values=_less_exact("slope"),
        test="equivalent",
        margin=SLOPE_MARGIN,
        margin_reason=SLOPE_REASON,
        estimand="pseudomedian",
        family="exp9",
        planned_effect=0.0,
        planned_sd=PLANNED_SLOPE_SD,
        planned_from=PLANNED_FROM,
        refuted_by="a slope on a typical prompt that is more than 0.25 below, or above, the exact one",
        control=_less_exact("slope_shifted"),
        control_statement=SHIFTED,
    ),
    Claim(
        id="exp9.influence-is-uniform",
        statement="All siblings influence the next step alike, however probable they are.",
        statistic=SLOPE,
        values=_get("slope"),
        test="equivalent",
        margin=SLOPE_MARGIN,
        margin_reason=SLOPE_REASON,
        estimand="pseudomedian",
        family="exp9",
        planned_effect=0.0,
        planned_sd=PLANNED_SLOPE_SD,
        planned_from=PLANNED_FROM,
        refuted_by="a slope on a typical prompt that is above 0.25 or below -0.25",
        control=_get("slope_exact"),
        control_statement="the same slope of the exact mixture of the branches, which weighs them with their posterior",
    ),
    Claim(
        id="exp9.follows-posterior-at-same-mass",
        statement="Influence follows the posterior also if those who stay weigh as much as the whole set did.",
        statistic=f"{SLOPE}, the others weighing n / (n - 1) each: leaving one out then does not make the set lighter",
        values=_get("slope_same_mass"),
        test="greater",
        margin=SLOPE_MARGIN,
        margin_reason=SLOPE_REASON,
        estimand="pseudomedian",
        family="exp9",
        planned_effect=0.5,
        planned_sd=PLANNED_SLOPE_SD,
        planned_from=PLANNED_FROM,
        refuted_by="a slope below 0.25 on a typical prompt",
        control=_get("slope_same_mass_shifted"),
        control_statement=SHIFTED,
    ),
    Claim(
        id="exp9.attention-predicts-influence",
        statement="The siblings that the reader attends to more are those with more influence.",
        statistic=f"{TAU}the reader's attention to them, mean over layers and heads",
        values=_tau_of("attention"),
        test="greater",
        margin=TAU_MARGIN,
        margin_reason=TAU_REASON,
        family="exp9",
        planned_effect=0.4,
        planned_sd=PLANNED_TAU_SD,
        planned_from=PLANNED_FROM,
        refuted_by="a mean below 0.2",
        control=_tau_of("attention", shifted=True),
        control_statement=SHIFTED,
    ),
    Claim(
        id="exp9.attention-tells-more-than-posterior",
        statement="Attention orders the siblings' influence better than their posterior weights do.",
        statistic=f"{TAU}attention, less that with posterior weight",
        values=_tau_of("attention", "posterior"),
        test="greater",
        margin=TAU_DIFFERENCE,
        margin_reason="one pair in twenty more in the right order",
        family="exp9",
        planned_effect=0.3,
        planned_sd=PLANNED_TAU_SD,
        planned_from=PLANNED_FROM,
        refuted_by="a mean below 0.1",
        control=_tau_of("attention", "posterior", shifted=True),
        control_statement=SHIFTED,
    ),
    Claim(
        id="exp9.posterior-tells-more-than-prior",
        statement="What follows matters: posterior weights order the siblings' influence better than those they were chosen with.",
        statistic=f"{TAU}posterior weight, less that with the weight they were chosen with",
        values=_tau_of("posterior", "prior"),
        test="greater",
        margin=TAU_DIFFERENCE,
        margin_reason="one pair in twenty more in the right order",
        family="exp9",
        planned_effect=0.3,
        planned_sd=PLANNED_TAU_SD,
        planned_from=PLANNED_FROM,
        refuted_by="a mean below 0.1",
        control=_tau_of("posterior", "prior", shifted=True),
        control_statement=SHIFTED,
    ),
)

CURVES = {
    "in the model": "influence",
    "in the model, same mass": "influence_same_mass",
    "in the exact mixture": "influence_exact",
}
LAST_BIN = 3  # doublings from the members' geometric mean; what lies further out counts here


def _binned(cases: Sequence[Case], name: str) -> list[tuple[float, float, float, float]]:
    """Doublings of influence at each whole number of doublings of posterior weight, both from their geometric means over members."""
    found: dict[int, list[float]] = {}
    for case in cases:
        x, y = (np.log2(np.maximum(case["members"][key], FLOOR)) for key in ("posterior", name))
        bins = np.clip(np.rint(x - x.mean()), -LAST_BIN, LAST_BIN).astype(int)
        for at in set(bins.tolist()):
            found.setdefault(at, []).append(float((y - y.mean())[bins == at].mean()))
    return [(float(at), *spread(values)) for at, values in found.items() if len(values) >= 5]


def pictures(store: Store, cases: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Influence against posterior weight, what orders it, and the family's own set."""
    found = [lattice(store)]
    enough = [case for case in cases if "slope" in case]
    groups = {label: points for label, name in CURVES.items() if (points := _binned(enough, name))}
    if groups:
        ends = (-float(LAST_BIN), float(LAST_BIN))
        groups |= {
            "slope 1: proportional": [(x, x, x, x) for x in ends],
            "slope 0: uniform": [(x, 0.0, 0.0, 0.0) for x in ends],
        }
        caption = (
            f"How the influence of siblings grows with their posterior weight, both in doublings from their geometric mean over the set; "
            f"mean and 95 % interval over {len(enough)} prompts; beyond {LAST_BIN} doublings counted at the ends, less than {FLOOR} as "
            f"{FLOOR}. An exact reader lies near slope 1, but for siblings that predict the same; one that heeds all alike at slope 0."
        )
        labels = "doublings of posterior weight", "doublings of influence"
        found.append(lines_by(groups, *labels, "Influence against posterior weight", caption))
    taus = {
        name: [case["tau"][name] for case in cases if case.get("tau", {}).get(name) is not None]
        for name in TAU_NAMES
    }
    taus = {name: values for name, values in taus.items() if values}
    if taus:
        caption = "Kendall's tau with the influence of the siblings on the next step, mean over prompts: 1 is the same order, 0 none."
        heights = [float(np.mean(values)) for values in taus.values()]
        names = [TAU_NAMES[name] for name in taus]
        found.append(
            bars(
                {"tau": heights},
                names,
                "weight",
                "tau with influence",
                "What orders influence",
                caption,
            )
        )
    return found


TAU_NAMES = {
    "posterior": "posterior",
    "prior": "prior",
    "attention": "attention",
    "attention_value_norm": "attention x value norm",
}

STUDY = Study("exp9", "Influence, not attention", measure, CLAIMS, pictures)


def test_rounding_is_far_below_influence(cases: list[Case]) -> None:
    """Harness check: the whole set in another batch gives the same next distribution, so that an influence is real."""
    floor = max(case["floor_tv"] for case in cases if case["width"])
    assert floor < rounding("tv"), f"the same set twice differs by {floor:.2g} in total variation"


def test_weights_of_members_sum_to_one(cases: list[Case]) -> None:
    """Prior and posterior are distributions over the members."""
    for case in cases:
        if case["width"]:
            assert (
                abs(sum(case["members"]["posterior"]) - 1) < 1e-9
                and abs(sum(case["members"]["prior"]) - 1) < 1e-9
            )


def test_influence_of_own_prompt_is_on_disk(store: Store, own_case: Case) -> None:
    """One next distribution for each member left out, whose distance from the whole set's is the reported influence."""
    arrays = store.load("influence")
    found = [total_variation(arrays["full"], row) for row in arrays["without"]]
    assert np.allclose(found, own_case["members"]["influence"], atol=1e-6)
