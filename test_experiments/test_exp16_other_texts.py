"""exp16: does it hold on longer and on other texts, drawn after the claims were written?

The claims that decide the conclusion were written by people who had seen the suite of the other
experiments. Here they are made again, word for word, with the same statistics, margins and
controls, on two suites that were drawn afterwards: prose, technical text and code of 8, 64 and 400
tokens in five languages, most of it not of this project's writing. Each config measures one suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fixtures.margins import PRIMARY
from fixtures.raw import lattice, spread
from fixtures.readers import Readers, after_readers, answers_of
from fixtures.scenes import exact_scene
from fixtures.truth import forced
from tempo import Trace
from tempo.harness import ClaimTest, Planned, Prompt, Space, Steps, Store, Study, run
from tempo.harness.study import TESTS
from tempo.reporting.figures import Picture
from tempo.reporting.figures.intervals import interval_panels
from test_experiments import test_exp2_logits_comparison as exp2
from test_experiments import test_exp3_cross_parallel_attention as exp3
from test_experiments import test_exp11_crowding as exp11
from test_experiments import test_exp13_reading as exp13
from test_experiments import test_exp14_lattices as exp14
from test_experiments import test_exp15_free_lattices as exp15
from test_experiments.reading import Facts

# What exp11 measures with, where it differs from this experiment's configs.
AS_EXP11 = {"threshold": 0.05, "max_width": 8, "max_steps": 6}
# The runs and arms that the claims need.
READ_BY = ("isolated", "posterior", "dropped", "heavier")
ASKED_AFTER = ("isolated", "posterior")
LATTICES = ("none", "posterior", "rolled")
FREE_RUNS = ("none", "posterior")
KEYWORDS = {test: keyword for keyword, test in TESTS.items()}

study = Study(
    "exp16",
    title="On longer and other texts?",
    registered="2026-11-28T12:34Z",
    space=Space(steps=(2, None), widest=32),
)


@dataclass(frozen=True)
class OneSet:
    """What several readers of one set give."""

    readers: Readers


@dataclass(frozen=True)
class Case:
    """What one prompt gives: the cases of other experiments, as far as the claims need them."""

    kind: str  # of text: the prompt's category
    modes: exp2.Case
    company: dict[str, float]  # see exp3
    one_set: OneSet | None
    facts: exp13.Answered
    forced: exp14.Case
    free: exp15.Case


@study.measure
def everything(prompt: Prompt) -> Steps[Case]:
    """What the claims need of exp2, exp3, exp11, exp13, exp14 and exp15."""
    alone = replace(prompt, store=None)
    source = yield run(prompt)
    isolated, visible = yield [
        run(prompt, replay=source, visibility=mode, capture=("logits",)) for mode in exp2.MODES
    ]
    _, after = exp2.parts_of(source)
    distances = {
        "readers": [exp2.reader(isolated, visible, k) for k in after],
        "one step earlier": [exp2.compare_steps(isolated, k, isolated, k - 1) for k in after],
    }
    return Case(
        kind=prompt.category,
        modes=exp2.Case(prompt.lm.provenance()["dtype"], distances),
        company=(yield from exp3.effect_of_company(alone, isolated, visible)),
        one_set=(yield from _one_set(alone)),
        facts=(yield from exp13.ask(alone, Facts.draw(prompt.rng()), ASKED_AFTER)),
        forced=(yield from exp14.lattices(alone, LATTICES)),
        free=(yield from exp15.free_runs(prompt, FREE_RUNS)),
    )


def _one_set(prompt: Prompt) -> Steps[OneSet | None]:
    """How far each way to read the first wide set is from the truth after five readers."""
    config = prompt.config.model_copy(update=AS_EXP11)
    scene = yield from exact_scene(replace(prompt, config=config))
    if scene is None:
        return None
    answers = yield from answers_of(prompt.lm, scene)
    specs = exp11.read_by_all(scene, answers.posterior)
    found: list[Trace] = yield [forced(specs[arm]) for arm in READ_BY]
    after = {arm: after_readers(trace) for arm, trace in zip(READ_BY, found, strict=True)}
    after["late_branch"] = answers.late
    return OneSet(Readers.measure(answers, after))


def again(claim: ClaimTest, part: Callable[[Case], Any], name: str = "") -> ClaimTest:
    """A claim of another experiment, made of a part of these cases that is a case of that one.

    name: where two of these experiments have a claim of one name.
    """

    def of_part(function: Callable[..., Any]) -> Callable[[Case], Any]:
        def statistic(case: Case) -> Any:
            found = part(case)
            return None if found is None else function(found)

        return statistic

    assert claim.control_function is not None
    control = of_part(claim.control_function)
    control.__doc__ = claim.control_statement
    wanted: dict[str, Any] = {KEYWORDS[claim.test]: claim.margin}
    register = study.claim(
        **wanted,
        because=claim.because,
        planned=claim.planned,
        control=control,
        family=PRIMARY,
        name=name or claim.name,
        statement=claim.statement,
        statistic=claim.statistic,
    )
    return register(of_part(claim.function))


def _company(case: Case) -> exp3.Case:
    return exp3.Case(sets=[], mass_map={}, company_kl=case.company)


of_modes = partial(again, part=lambda case: case.modes)
of_company = partial(again, part=_company)
of_one_set = partial(again, part=lambda case: case.one_set)
of_facts = partial(again, part=lambda case: case.facts)
of_forced = partial(again, part=lambda case: case.forced)
of_free = partial(again, part=lambda case: case.free)

test_equivalent_at_reader = of_modes(exp2.test_equivalent_at_reader)
test_does_something_at_once = of_company(exp3.test_does_something_at_once)
test_it_matters_who_is_seen = of_company(exp3.test_it_matters_who_is_seen)
test_siblings_do_more_than_strangers = of_company(exp3.test_siblings_do_more_than_strangers)
test_plain_not_worse_than_late_branch_where_open = of_one_set(
    exp11.test_plain_not_worse_than_late_branch_where_open
)
test_posterior_beats_late_branch_where_open = of_one_set(
    exp11.test_posterior_beats_late_branch_where_open
)
test_posterior_removes_a_third_where_open = of_one_set(
    exp11.test_posterior_removes_a_third_where_open
)
test_fact_still_found = of_facts(exp13.test_fact_still_found)
test_posterior_fact_still_found = of_facts(exp13.test_posterior_fact_still_found)
test_forced_posterior_removes_two_thirds = of_forced(
    exp14.test_posterior_removes_two_thirds, name="forced_posterior_removes_two_thirds"
)
test_plain_error_does_not_grow_with_depth = of_forced(
    exp14.test_plain_error_does_not_grow_with_depth
)
test_error_does_not_grow_with_depth = of_forced(exp14.test_error_does_not_grow_with_depth)
test_plain_is_near_the_truth = of_free(exp15.test_plain_is_near_the_truth)
test_posterior_is_near_the_truth = of_free(exp15.test_posterior_is_near_the_truth)
test_posterior_removes_two_thirds = of_free(exp15.test_posterior_removes_two_thirds)
test_perfect_best_path_reads_as_well_as_greedy = of_free(
    exp15.test_perfect_best_path_reads_as_well_as_greedy
)
test_plain_best_path_reads_as_well_as_greedy = of_free(
    exp15.test_plain_best_path_reads_as_well_as_greedy
)
test_best_path_reads_as_well_as_greedy = of_free(exp15.test_best_path_reads_as_well_as_greedy)
test_best_path_reads_as_well_as_beam = of_free(exp15.test_best_path_reads_as_well_as_beam)

UNKNOWN = Planned(0.062, 0.08, "a prototype on 47 short English prompts; none of these texts")


def _if(case: Case, arm: str, is_wanted: bool) -> float | None:
    return case.free.distance(arm) if is_wanted else None


near = partial(study.claim, less_than=exp15.NEAR, planned=UNKNOWN, control="rolled")


@near()
def test_posterior_is_near_the_truth_after_400_tokens(
    case: Case, arm: str = "posterior"
) -> float | None:
    """After some 400 tokens too, a free run with posterior weighting stays near the truth.

    TV(truth, run), mean over the steps that follow two wide sets; the prompts of 400 tokens.
    Control: the same sets with each posterior given to the next member of its set.
    """
    return _if(case, arm, case.kind.endswith("400 tokens"))


@near()
def test_posterior_is_near_the_truth_in_other_languages(
    case: Case, arm: str = "posterior"
) -> float | None:
    """In German, French and Spanish too, a free run with posterior weighting stays near the truth.

    TV(truth, run), mean over the steps that follow two wide sets; the prompts in these languages.
    Control: the same sets with each posterior given to the next member of its set.
    """
    return _if(case, arm, case.kind.startswith(("German", "French", "Spanish")))


@near()
def test_posterior_is_near_the_truth_in_code(case: Case, arm: str = "posterior") -> float | None:
    """In Python code too, a free run with posterior weighting stays near the truth.

    TV(truth, run), mean over the steps that follow two wide sets; the prompts of code.
    Control: the same sets with each posterior given to the next member of its set.
    """
    return _if(case, arm, case.kind.startswith("Python"))


@study.pictures
def pictures(store: Store, cases: Sequence[Case]) -> Iterator[Picture]:
    """The own sets; the distance to the truth by kind of text."""
    yield lattice(store)
    if len(cases) < 2:
        return
    kinds = _by_kind(cases)
    panels = {}
    for arm in FREE_RUNS:
        far = {kind: _distances(of_kind, arm) for kind, of_kind in kinds.items()}
        rows = {f"{kind} ({len(tv)})": spread(tv) for kind, tv in far.items() if len(tv) > 1}
        if rows:
            panels[exp15.WEIGHTINGS[arm].capitalize()] = rows
    if not panels:
        return
    caption = (
        "Total variation between free runs and the exact mixture of their own paths, at the steps "
        f"that follow {exp15.WIDE_SETS} wide sets; mean and 95 % interval over the prompts of a "
        "kind. A perfect reader is at 0. Lengths are tokens of SmolLM2."
    )
    title = "Does it hold on other texts?"
    yield interval_panels(panels, "total variation to the truth", title, caption)


def _by_kind(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """The cases by length and by language."""
    found: dict[str, list[Case]] = {"all": list(cases)}
    for place in (-1, 0):
        for kind in dict.fromkeys(case.kind.split(", ")[place] for case in cases):
            found[kind] = [case for case in cases if case.kind.split(", ")[place] == kind]
    return found


def _distances(cases: Sequence[Case], arm: str) -> list[float]:
    return [tv for case in cases if (tv := case.free.distance(arm)) is not None]
