"""exp3: do parallel tokens attend to each other in visible mode, more than chance, with any effect?

A softmax never gives exactly 0 to an allowed key, so "score > 0" cannot come out otherwise in
visible mode. It is tested as the original design asks. Beside it stand questions that can: more
than uniform, more than a context token, more than the same token at distance one, and the effect of
those edges on the siblings' own outputs.

Any company may have an effect, so the effect has a placebo. At the first wide set of a run, where
both modes have read the same plain text, each member sees random tokens (strangers) in its
siblings' slots, as many and in the same mode. Layers L, heads H, set width w, vocabulary V.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fixtures.margins import BFLOAT16_KL, TENTH
from fixtures.raw import keep_attention, keep_log, keep_table, slot_labels, spreads_of
from fixtures.rows import (
    at_members,
    attention_of,
    log_ratio,
    minus,
    own_block,
    predictions,
    sibling_scores,
)
from tempo import RunSpec, Trace
from tempo.harness import (
    Margin,
    Planned,
    Prompt,
    RunRequest,
    Space,
    Steps,
    Store,
    Study,
    average,
    run,
    wide_steps,
)
from tempo.metrics import kl_divergence
from tempo.reporting.figures import Picture, attention_heatmap, layer_head_map
from tempo.reporting.figures.intervals import intervals

RANDOM_CONTEXT_SEED = 7  # which context keys stand in for siblings in the control
STRANGERS_SEED = 8  # which tokens are the strangers
SCORE = "cross_parallel_score"  # of the original design: mean weight on a sibling
NOTHING = Margin(0.0, "the original design's null hypothesis")
FIFTIETH = Planned(0.02, sd=0.02, source="an equal spread over fifty keys, a spread as large")
SPREAD = "a quarter more; log ratios of attention of the first full run spread by 0.15 to 0.23"
QUARTER_MORE = Planned(math.log(1.25), sd=0.25, source=SPREAD)
TENTH_MORE = Margin(1.1, TENTH.because)  # head by head, where a weight may be 0
HEADS = "twice the uniform share in one of 30 x 9 heads, with a spread of three quarters of that"
IN_ONE_HEAD = Planned(2.0, sd=1.5, source=HEADS, cells=270)
PILOT = "more than half of a pilot's 0.26 nats [0.17, 0.36] on 46 prompts, whose spread was 0.33"
SEEN = Planned(0.15, sd=0.33, source=PILOT)
TAIL = "less than the mean's 0.15, whose long right tail a pseudomedian does not follow"
TYPICAL = Planned(0.1, sd=0.2, source=TAIL)
# The placebo was registered when the total effect (0.26 nats) had been seen on the suite, and the
# placebo had not. So the plan is no more than half of that effect.
HALF_OF_SEEN = "half of the 0.26 nats that all sets of the suite showed, with a pilot's spread"
SEEN_ALREADY = Planned(0.13, sd=0.33, source=HALF_OF_SEEN)

PLACEBO = "2026-11-28T10:15Z"  # when the claims about company were written

# What each member of the first wide set sees in its siblings' slots.
COMPANY = {
    "siblings": "its siblings",
    "strangers": "random tokens",
    "other_strangers": "other random tokens",
    "nobody": "nobody, twice (rounding)",
    "difference": "siblings against random",
}

study = Study(
    "exp3",
    title="Cross-parallel attention",
    captures=("attention", "logits"),
    registered="2026-11-23",
    space=Space(visibility=("visible",), widest=64),
)


@dataclass(frozen=True)
class Case:
    """What one prompt with wide sets gives."""

    sets: list[dict[str, float | None]]  # what is measured at each of them
    mass_map: dict[str, list]  # weight on all siblings, or on as many other keys [L, H]
    # KL(seeing this company || seeing nobody) of the members of the first wide set, in nats;
    # difference: KL(seeing siblings || seeing strangers)
    company_kl: dict[str, float]

    def mean(self, name: str) -> float | None:
        """The mean over sets of what is measured; None if it is nowhere."""
        return average([each for found in self.sets if (each := found[name]) is not None])


@study.measure
def three_readings(prompt: Prompt) -> Steps[Case | None]:
    """Visible mode chooses; both modes replay the sets, and one run reads them in sequence."""
    source = yield run(prompt)
    plain = prompt.spec(visibility="causal", positions="sequential", capture=("attention",))
    isolated, visible, sequence = yield [
        run(prompt, replay=source, visibility="isolated"),
        run(prompt, replay=source, visibility="visible"),
        run(plain, replay=source),
    ]
    wide, rng = wide_steps(source), prompt.rng(RANDOM_CONTEXT_SEED)
    company_kl = yield from effect_of_company(prompt, isolated, visible)
    seen = {k: sibling_scores(visible, k) for k in wide}
    unseen = {k: sibling_scores(isolated, k) for k in wide}
    random = {k: _random_context(visible, k, rng) for k in wide}
    sets = []
    for k, score in seen.items():
        others, drawn = source.widths[k] - 1, random[k]
        measured = {
            "step": k,
            "width": source.widths[k],
            SCORE: score.to_sibling.mean(),
            "isolated_score": unseen[k].to_sibling.mean(),
            "prior_context_score": score.to_context.mean(),
            "without_sink": score.to_context_without_sink.mean(),
            "random_context": None if drawn is None else drawn.mean() / others,
            "isolated_max": unseen[k].max_to_sibling,
            "max": score.max_to_sibling,
            "variance": score.var_to_sibling,
            "mass": score.sibling_mass.mean(),
            "random_context_mass": None if drawn is None else drawn.mean(),
            "uniform_mass": others / (source.steps[k].slots[-1] + 1),
            "shared": _to_previous(visible, k),
            "shared_again": _to_previous(source, k),
            "one_back": _to_previous(sequence, k),
            "kl": at_members(kl_divergence, visible, isolated, k),
            "same_mode_kl": at_members(kl_divergence, source, visible, k),
        }
        sets.append(measured)
    if prompt.store:
        keep_attention(prompt.store, isolated, visible)
        keep_log(prompt.store, source)
        by_layer = [{"by_layer": score.to_sibling.mean(axis=1)} for score in seen.values()]
        steps = [{**each, **layers} for each, layers in zip(sets, by_layer, strict=True)]
        prompt.store.json("cross_parallel_scores", {"steps": steps, "company_kl": company_kl})
        slots = {k: source.steps[k].slots for k in wide}
        prompt.store.json("labels", {"labels": slot_labels(prompt.lm, source), "slots": slots})
        columns = ("step", "width", SCORE, "prior_context_score", "without_sink")
        keep_table(prompt.store, f"{prompt.text!r}: {source.text}", sets, columns)
    masses = {
        "siblings": [score.sibling_mass for score in seen.values()],
        "random context": [mass for mass in random.values() if mass is not None],
    }
    if not wide:
        return None
    maps = {name: np.mean(found, axis=0).round(6) for name, found in masses.items() if found}
    mass_map = {name: found.tolist() for name, found in maps.items()}
    return Case(sets=sets, mass_map=mass_map, company_kl=company_kl)


def effect_of_company(prompt: Prompt, isolated: Trace, visible: Trace) -> Steps[dict[str, float]]:
    """What a member of the first wide set predicts with each company, against without any.

    Before that set the text is plain, so both runs have the same past. Asks for runs in one round.
    """
    wide = wide_steps(isolated)
    if not wide:
        return {}
    step, lm = wide[0], prompt.lm
    members = isolated.steps[step].tokens
    before = [token for each in isolated.steps[:step] for token in each.tokens]
    alone = RunSpec(
        prompt=(*isolated.prompt_tokens, *before), replay=(tuple(members),), capture=("logits",)
    )
    others, rng = np.setdiff1d(np.arange(lm.vocab_size), members), prompt.rng(STRANGERS_SEED)
    asked = [_apart(alone)]
    # with each member in its own slot, random tokens in all others
    for place, member in [*enumerate(members)] * 2:
        drawn = rng.choice(others, size=len(members), replace=False).tolist()
        drawn[place] = member
        asked.append(_apart(alone.but(replay=(drawn,), visibility="visible")))
    again, *runs = yield asked
    one_by_one = [predictions(trace, 0)[i % len(members)] for i, trace in enumerate(runs)]
    by_company = {
        "siblings": predictions(visible, step),
        "strangers": one_by_one[: len(members)],
        "other_strangers": one_by_one[len(members) :],
        "nobody": predictions(again, 0),
    }
    nobody = predictions(isolated, step)
    found = {name: _mean_kl(rows, nobody) for name, rows in by_company.items()}
    return found | {"difference": _mean_kl(by_company["siblings"], by_company["strangers"])}


def _apart(spec: RunSpec) -> RunRequest:
    """A request in batches of another shape than those of the runs that are compared exactly."""
    return run(spec, batch="company")


def _mean_kl(ones: Iterable[np.ndarray], others: Iterable[np.ndarray]) -> float:
    """KL(one || other) in nats, mean over the members: each of `ones` and `others` is [V]."""
    return float(np.mean(list(map(kl_divergence, ones, others))))


def _random_context(trace: Trace, step: int, rng: np.random.Generator) -> np.ndarray | None:
    """Mass [L, H] on as many context keys as a sibling has siblings, drawn without the sink."""
    start, others = trace.steps[step].slots[0], trace.widths[step] - 1
    if start - 1 < others:
        return None
    keys = 1 + rng.choice(start - 1, size=others, replace=False)
    return attention_of(trace, step)[..., keys].astype(np.float64).sum(-1).mean(-1)


def _to_previous(trace: Trace, step: int) -> float:
    """Mean weight of member i on member i - 1."""
    block = own_block(trace, step)
    return float(np.diagonal(block, offset=-1, axis1=-2, axis2=-1).mean())


@study.claim(always=True, control="max")
def test_isolated_is_zero(case: Case, largest: str = "isolated_max") -> bool:
    """In isolated mode no sibling attends to another: every weight is exactly 0.

    Largest weight between two siblings equals 0.
    Control: the same entries in visible mode.
    """
    return all(found[largest] == 0.0 for found in case.sets)


@study.claim(more_than=NOTHING, planned=FIFTIETH, control="isolated_score")
def test_score_above_zero(case: Case, score: str = SCORE) -> float | None:
    """In visible mode siblings attend to each other (H1 of the original design).

    The cross_parallel_score: mean weight on a sibling. A softmax allows no other answer.
    Control: the same score in isolated mode.
    """
    return case.mean(score)


@study.claim(more_than=TENTH, planned=QUARTER_MORE, control="random_context_mass")
def test_more_than_uniform(case: Case, mass: str = "mass") -> float | None:
    """Siblings get more attention than an equal spread over all allowed keys would give them.

    Log of (mass on siblings / uniform share).
    Control: as many context keys drawn at random, without the sink.
    """
    return log_ratio(case.mean(mass), case.mean("uniform_mass"))


@study.claim(more_than=TENTH, planned=QUARTER_MORE, control="random_context")
def test_more_than_context_token(case: Case, score: str = SCORE) -> float | None:
    """A sibling gets more attention than a context token that is not the sink.

    Log of (mean weight per sibling / per context token without slot 0).
    Control: context keys drawn at random in the siblings' place.
    """
    return log_ratio(case.mean(score), case.mean("without_sink"))


@study.claim(more_than=TENTH, planned=QUARTER_MORE)
def test_more_than_at_distance_one(case: Case) -> float | None:
    """A sibling at the same position gets more attention than the same token one position back.

    Log of (weight on the previous member, shared position / the same set as a plain sequence).
    """
    return log_ratio(case.mean("shared"), case.mean("one_back"))


@test_more_than_at_distance_one.control
def shared_position_twice(case: Case) -> float | None:
    """the shared position twice, in different batches"""
    return log_ratio(case.mean("shared_again"), case.mean("shared"))


@study.claim(somewhere_above=TENTH_MORE, planned=IN_ONE_HEAD, control="random context")
def test_more_than_uniform_somewhere(case: Case, keys: str = "siblings") -> np.ndarray | None:
    """Some head gives siblings more attention than an equal spread over all allowed keys would.

    Mass on siblings / uniform share, for each layer and head.
    Control: as many context keys drawn at random, without the sink.
    """
    mass, uniform = case.mass_map.get(keys), case.mean("uniform_mass")
    return None if mass is None or uniform is None else np.array(mass) / uniform


@study.claim(more_than=BFLOAT16_KL, planned=SEEN, control="same_mode_kl")
def test_does_something(case: Case, kl: str = "kl") -> float | None:
    """Attending to siblings changes what the siblings predict.

    KL(visible || isolated) of the members' own outputs in nats: the total effect of those edges.
    Control: visible mode twice, in different batches.
    """
    return case.mean(kl)


@study.claim(more_than=BFLOAT16_KL, planned=TYPICAL, typical=True, control="same_mode_kl")
def test_does_something_typically(case: Case, kl: str = "kl") -> float | None:
    """Attending to siblings changes what they predict on a typical prompt, not on a few only.

    KL(visible || isolated) of the members' own outputs in nats.
    Control: visible mode twice, in different batches.
    """
    return case.mean(kl)


@study.claim(more_than=BFLOAT16_KL, planned=SEEN_ALREADY, control="nobody", registered=PLACEBO)
def test_does_something_at_once(case: Case, company: str = "siblings") -> float | None:
    """Seeing siblings changes what the members of the first wide set predict, after equal texts.

    KL(visible || isolated) of the members' own outputs in nats, at the first wide set.
    Control: isolated mode twice, in batches of different shapes.
    """
    return case.company_kl.get(company)


@study.claim(
    more_than=BFLOAT16_KL, planned=SEEN_ALREADY, control="other_strangers", registered=PLACEBO
)
def test_siblings_do_more_than_strangers(case: Case, company: str = "siblings") -> float | None:
    """Seeing siblings changes what a member predicts more than seeing random tokens does.

    KL(seeing siblings || seeing nobody) - KL(seeing random tokens || seeing nobody) in nats, at the
    first wide set. Below 0, random tokens do more: the effect is then of any company.
    Control: other random tokens in the siblings' place.
    """
    return minus(case.company_kl.get(company), case.company_kl.get("strangers"))


@study.claim(more_than=BFLOAT16_KL, planned=SEEN_ALREADY, control="nobody", registered=PLACEBO)
def test_it_matters_who_is_seen(case: Case, what: str = "difference") -> float | None:
    """What a member predicts depends on who its siblings are, and not only on how many.

    KL(seeing siblings || seeing random tokens) in nats, at the first wide set.
    Control: seeing nobody twice, in batches of different shapes.
    """
    return case.company_kl.get(what)


@study.pictures
def pictures(store: Store, cases: Sequence[Case]) -> Iterator[Picture]:
    """The widest set of the own prompt, and which heads look at siblings."""
    labels = store.load_json("labels")
    if labels["slots"]:
        k, slots = max(labels["slots"].items(), key=lambda item: len(item[1]))
        weights = store.load("attention_weights")[f"visible_{int(k):03d}"]
        texts, title = labels["labels"][: weights.shape[-1]], "The widest set, visible siblings"
        yield attention_heatmap(weights, texts, slots, title=title)
    if cases:
        caption = (
            f"Mass a sibling gives its siblings in visible mode, mean over {len(cases)} prompts. "
            "Bright heads read the other members of the set."
        )
        found = np.mean([case.mass_map["siblings"] for case in cases], axis=0)
        yield layer_head_map(found, "Which heads attend to siblings", "attention mass", caption)
    if len(cases) > 1:
        rows = spreads_of([case.company_kl for case in cases], COMPANY)
        caption = (
            "What a member of the first wide set predicts when it sees this in its siblings' slots,"
            " against seeing nobody (last row: against random tokens); mean over members, then mean"
            f" and 95 % interval over {len(cases)} prompts. Random tokens are the placebo: what"
            " siblings do beyond it is due to who they are."
        )
        yield intervals(rows, "KL divergence (nats)", "What company does", caption)


def test_scores_are_on_disk(store: Store) -> None:
    """cross_parallel_scores.json holds one entry for each wide set."""
    steps = store.load_json("cross_parallel_scores")["steps"]
    widths = store.load_json("generation_log")["runs"][0]["widths"]
    assert [step["width"] for step in steps] == [width for width in widths if width > 1]
