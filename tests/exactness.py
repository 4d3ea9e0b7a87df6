"""All exactness checks by name, with the model each needs, and cases to give them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hypothesis import strategies as st

from tempo import LanguageModel
from tempo.spec import BY_QUERY, POSITIONS, READOUTS, VISIBILITIES, WEIGHTINGS
from tests import agreements, identities
from tests import lattice_identities as lattices
from tests import residual_identities as residuals
from tests.checks import Case
from tests.tiny_models import TWINS, VOCAB, gpt_oss, llama, mistral

# The last ids share one embedding. They are left to the checks that need copies of a token.
TOKENS = st.integers(0, VOCAB - len(TWINS) - 1)
# Weightings by query take the mixture apart, and no other readout is one.
PAIRS = [
    {"readout": readout, "weighting": weighting}
    for readout in READOUTS
    for weighting in WEIGHTINGS
    if readout == "mixture" or weighting not in BY_QUERY
]


@st.composite
def settings_of_runs(draw: st.DrawFn) -> dict[str, str]:
    """Any visibility, positions and weighting, and any readout that the weighting allows."""
    weighting = draw(st.sampled_from(WEIGHTINGS))
    pairs = [pair for pair in PAIRS if pair["weighting"] == weighting]
    visibility, positions = draw(st.sampled_from(VISIBILITIES)), draw(st.sampled_from(POSITIONS))
    return {"visibility": visibility, "positions": positions} | draw(st.sampled_from(pairs))


# Every one of them.
SETTINGS = [
    {"visibility": visibility, "positions": positions} | pair
    for visibility in VISIBILITIES
    for positions in POSITIONS
    for pair in PAIRS
]


class Check(NamedTuple):
    """A statement about the engine that must hold for every case on its models."""

    holds: Callable[[LanguageModel, Case], None]
    # None stands for Llamas of any depth.
    model: Callable[[], LanguageModel] | None = None

    @property
    def name(self) -> str:
        """The statement as text, with the model if the check is for only one."""
        models = {
            None: "",
            mistral: " (sliding window)",
            gpt_oss: " (attention sinks)",
            llama1: " (one layer)",
        }
        return self.holds.__name__.replace("_", " ") + models[self.model]


def llama1() -> LanguageModel:
    return llama(1)


CHECKS = {
    check.name: check
    for check in (
        Check(identities.width_one_is_greedy_decoding),
        Check(identities.an_isolated_sibling_is_what_it_would_be_alone),
        Check(identities.isolated_siblings_of_the_first_wide_set_are_branches),
        Check(identities.changing_a_sibling_leaves_the_others_bit_identical),
        Check(identities.the_order_of_siblings_changes_nothing),
        Check(identities.the_order_of_siblings_changes_nothing, mistral),
        Check(identities.copies_under_count_weigh_like_one),
        Check(identities.copies_equal_one_with_log_k),
        Check(identities.added_siblings_scale_all_other_weights_alike),
        Check(identities.the_first_layer_caches_the_same_in_all_modes),
        Check(identities.one_layer_shows_siblings_to_each_other_alone, llama1),
        Check(identities.modes_agree_until_a_wide_set_is_read),
        Check(identities.forbidden_weights_are_exactly_zero),
        Check(identities.only_differences_of_positions_matter),
        Check(identities.a_mixture_is_the_truncated_marginal),
        Check(identities.members_diverge_from_their_mixture_by_no_more_than_their_weight),
        Check(identities.sets_are_what_reaches_the_threshold),
        Check(identities.the_cache_holds_the_prompt_and_every_sibling),
        Check(identities.cached_keys_stand_at_their_positions),
        Check(lattices.one_wide_set_is_replayed_with_the_readers_posterior),
        Check(lattices.width_one_is_the_plain_run_in_every_setting),
        Check(lattices.copies_under_posterior_weigh_like_one),
        Check(lattices.best_parents_make_plain_text),
        Check(lattices.links_of_zero_and_one_make_plain_text),
        Check(lattices.links_are_bayes_rule),
        Check(lattices.paths_are_all_paths_by_share),
        Check(lattices.a_best_path_is_as_probable_as_plain_text),
        Check(lattices.dropped_slots_get_no_attention),
        Check(lattices.dropped_is_what_falls_below_the_bound),
        Check(lattices.a_bound_that_nobody_falls_under_changes_no_bit),
        Check(lattices.sets_are_what_all_rules_let_in),
        Check(lattices.a_draw_depends_on_nothing_but_its_seed),
        Check(lattices.other_seeds_draw_other_sets),
        Check(agreements.outputs_equal_float64),
        Check(agreements.outputs_equal_float64, mistral),
        Check(agreements.captured_attention_equals_float64),
        Check(agreements.cached_states_equal_float64),
        Check(agreements.a_free_run_equals_the_oracle),
        Check(agreements.a_free_run_equals_the_oracle, mistral),
        Check(agreements.a_free_run_equals_the_oracle, gpt_oss),
        Check(agreements.a_run_under_other_rules_equals_the_oracle),
        Check(agreements.a_run_under_other_rules_equals_the_oracle, mistral),
        Check(agreements.a_replay_in_detail_equals_the_oracle),
        Check(agreements.a_replay_in_detail_equals_the_oracle, mistral),
        Check(residuals.a_hooked_run_equals_the_oracle),
        Check(residuals.a_hooked_run_equals_the_oracle, mistral),
        Check(residuals.own_residuals_change_nothing),
        Check(residuals.a_layer_of_residuals_is_all_that_follows),
        Check(residuals.hooks_reach_no_other_run),
        Check(agreements.capture_never_changes_a_run),
        Check(agreements.company_changes_nothing_but_rounding),
        Check(agreements.a_run_leaves_nothing_behind),
        Check(agreements.replaying_a_free_run_reproduces_it),
        Check(agreements.saving_and_loading_is_the_identity),
    )
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Cases of any prompt and any settings.

    At most one set of width one comes first, then a wide set, then one or two sets of any width.
    """

    def members(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(TOKENS, min_size=least, max_size=most, unique=True)))

    prompt = tuple(draw(st.lists(TOKENS, min_size=2, max_size=6)))
    before = (members(1, 1),) * draw(st.integers(0, 1))
    after = tuple(members(1, 3) for _ in range(draw(st.integers(1, 2))))
    chosen = draw(settings_of_runs())
    return Case(prompt, (*before, members(2, 4), *after), pick=draw(st.integers(0, 22)), **chosen)


# Every check meets these cases under every fault, where drawing cases would take too long.
# They have all modes, both kinds of positions, all weightings, a wide set after a wide set, and
# three sets of one width after each other.
# Their widths make slots, positions and list indices all differ.
FIXED_CASES = (
    Case((3, 17, 8, 42, 5), ((11,), (7, 30, 2), (9, 44), (21,))),
    Case(
        (50, 1, 33),
        ((4, 28, 16, 39), (12, 6), (25,)),
        visibility="visible",
        readout="mean_logits",
        weighting="probability",
        pick=1,
    ),
    Case(
        (14, 2, 29, 40),
        ((10, 36), (35,), (18, 0, 55)),
        visibility="causal",
        positions="sequential",
        readout="last",
        weighting="count",
        pick=2,
    ),
    Case(
        (7, 51, 22),
        ((13, 45), (19, 6), (58, 24)),
        weighting="posterior",
        pick=4,
    ),
    Case(
        (31, 12, 48, 9),
        ((20,), (5, 37, 26), (43, 11)),
        visibility="visible",
        weighting="best_parent",
        pick=3,
    ),
)
