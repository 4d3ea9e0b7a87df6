"""Deliberate faults in the engine, planted by monkeypatch, which the exactness checks must find.

Most are faults that implementations of TEMPO have had. Those of an earlier public one are marked
(earlier).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tempo import attention, engine, lattice, residual, selection, trace
from tempo import run as one_run
from tempo.cache import SlotCache, SlotLayer
from tempo.lattice import Lattice
from tempo.layout import Layout
from tempo.spec import RunSpec
from tests.planting import at_other_positions, change_attention, change_pass, under_one_mask
from tests.tiny_models import THETA, gpt_oss, llama, mistral

Plant = Callable[[pytest.MonkeyPatch], None]


def mask_off_by_one_slot(patch: pytest.MonkeyPatch) -> None:
    """The mask of each generated set is shifted by one slot."""

    def change(context: attention.PassContext, runs: Any) -> None:
        for row, run in enumerate(runs):
            if not run.layout.new_tokens_are_prompt():
                rows = context.allowed[row, : run.num_new, : run.layout.num_slots]
                rows.copy_(rows.roll(1, dims=-1))

    change_pass(patch, change)


def mask_by_list_index(patch: pytest.MonkeyPatch) -> None:
    """(earlier) Siblings are masked at their set's index in the list of sets.

    Once a set was wide, other tokens are in the slots of that number.
    """

    def change(context: attention.PassContext, runs: Any) -> None:
        for row, run in enumerate(runs):
            layout, sets = run.layout, run.layout.slot_set
            if layout.new_tokens_are_prompt():
                continue
            block = layout.block()
            for offset in range(run.num_new):
                index = sets[layout.start + offset]
                own = [i for i in range(run.num_new) if sets[layout.start + i] == index]
                seen = context.allowed[row, offset]
                seen[: layout.start + own[-1] + 1] = True
                seen[index : index + len(own)] = block[offset, own]

    change_pass(patch, change)


def one_row_broadcast(patch: pytest.MonkeyPatch) -> None:
    """(earlier) All queries of a pass get the mask of its first query."""

    def change(context: attention.PassContext, runs: Any) -> None:
        first = context.allowed[:, :1]
        context.allowed.copy_(first.expand_as(context.allowed).clone())

    change_pass(patch, change)


def position_plus_one(patch: pytest.MonkeyPatch) -> None:
    """Every generated set stands one position too far; the trace reports the right one."""

    def move(layout: Layout) -> list[int]:
        return [position + 1 for position in layout.slot_position[layout.start :]]

    at_other_positions(patch, move)


def positions_by_slot(patch: pytest.MonkeyPatch) -> None:
    """(earlier) The model counts slots instead of positions; the trace reports shared positions."""
    at_other_positions(patch, lambda layout: list(range(layout.start, layout.num_slots)))


def last_sibling_only_in_the_cache(patch: pytest.MonkeyPatch) -> None:
    """(earlier) Only the last member of each set is fed to the model and read."""
    append, extend, read_out = Layout.append_set, Lattice.extend, one_run.read_out

    def append_last(layout: Layout, tokens: Any, probabilities: Any) -> None:
        # their rows are as long as the whole set
        layout.replay_positions = layout.replay_weights = None
        append(layout, tokens[-1:], probabilities[-1:])

    def extend_by_last(lattice: Lattice, logits: Any, tokens: Any, links: Any = None) -> Any:
        return extend(lattice, logits, tokens[-1:])

    def read_last(logits: Any, probabilities: Any, readout: str) -> Any:
        return read_out(logits, [1.0], readout)

    patch.setattr(Layout, "append_set", append_last)
    patch.setattr(Lattice, "extend", extend_by_last)
    patch.setattr(one_run, "read_out", read_last)


def prompt_token_repeated(patch: pytest.MonkeyPatch) -> None:
    """(earlier) The last prompt token is fed twice before the first set is chosen."""
    append = Layout.append_prompt

    def append_one_more(layout: Layout, tokens: Any) -> None:
        append(layout, [*tokens, tokens[-1]])

    patch.setattr(Layout, "append_prompt", append_one_more)


def window_by_slot(patch: pytest.MonkeyPatch) -> None:
    """A sliding window counts slots, so that siblings push context out of it."""

    def change(context: attention.PassContext, runs: Any) -> None:
        for row, run in enumerate(runs if context.slot_positions is not None else ()):
            context.slot_positions[row] = torch.arange(context.num_slots)
            queries = torch.arange(run.layout.start, run.layout.num_slots)
            context.query_positions[row, : run.num_new] = queries

    change_pass(patch, change)


def sink_ignored(patch: pytest.MonkeyPatch) -> None:
    """Attention sinks are accepted and not used."""
    change_attention(patch, lambda module, arguments: {"s_aux": None})


def sibling_values_swapped(patch: pytest.MonkeyPatch) -> None:
    """The first two tokens of a pass over sets have each other's value in the cache."""
    original = SlotLayer.update

    @wraps(original)
    def changed(
        layer: SlotLayer, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        step, values = layer.cache.step, values.clone()
        for row in step.rows.unique():
            of_run = torch.nonzero(step.rows == row).flatten()
            if step.slots[of_run[0]] > 0 and len(of_run) > 1:
                first, second = of_run[:2]
                values[:, :, [first, second]] = values[:, :, [second, first]]
        return original(layer, keys, values, *args, **kwargs)

    patch.setattr(SlotLayer, "update", changed)


def capture_one_pass_early(patch: pytest.MonkeyPatch) -> None:
    """(earlier) The attention recorded of a set is that of the pass that predicted it.

    It is 0 where the set's members are.
    """
    # by run: the weights [L, H, N] of the last query of the pass before
    passed: dict[int, np.ndarray] = {}
    original = engine._forward

    @wraps(original)
    def changed(lm: Any, cache: Any, runs: Any) -> None:
        original(lm, cache, runs)
        for run in (run for run in runs if run.attention is not None):
            before, early = passed.get(run.index), np.zeros_like(run.attention)
            # weights of as many slots or more were left by an earlier run of this index
            if before is not None and before.shape[-1] < early.shape[-1]:
                early[..., : before.shape[-1]] = before[:, :, None]
            passed[run.index] = run.attention[:, :, -1].copy()
            run.attention = early

    patch.setattr(engine, "_forward", changed)


def mode_applied_to_the_prompt(patch: pytest.MonkeyPatch) -> None:
    """Prompt tokens are treated as siblings.

    Under `visible` they see later ones, under `isolated` they see none of the prompt.
    """

    shapes = {
        "isolated": torch.eye,
        "visible": torch.ones,
        "causal": lambda *size: torch.ones(*size).tril(),
    }

    original = Layout.block

    @wraps(original)
    def changed(layout: Layout, visibility: str | None = None) -> Tensor:
        width = layout.num_slots - layout.start
        if layout.new_tokens_are_prompt():
            return shapes[visibility or layout.visibility](width, width).bool()
        return original(layout, visibility)

    patch.setattr(Layout, "block", changed)


def isolated_from_later_sets_too(patch: pytest.MonkeyPatch) -> None:
    """Under `isolated`, later sets see only the first member of a set."""

    def change(context: attention.PassContext, runs: Any) -> None:
        for row, run in enumerate(runs):
            sets = run.layout.slot_set
            for offset in range(run.num_new if run.spec.visibility == "isolated" else 0):
                own = sets[run.layout.start + offset]
                others = [
                    slot for slot in range(1, len(sets)) if sets[slot] == sets[slot - 1] != own
                ]
                context.allowed[row, offset, others] = False

    change_pass(patch, change)


def mode_not_wired(patch: pytest.MonkeyPatch) -> None:
    """(earlier) The visibility is accepted and reaches no mask: siblings see all earlier slots."""

    def block(layout: Layout, visibility: str | None = None) -> Tensor:
        width = layout.num_slots - layout.start
        return torch.ones(width, width).bool().tril()

    patch.setattr(Layout, "block", block)


def first_mode_stays(patch: pytest.MonkeyPatch) -> None:
    """(earlier) A run in isolated mode leaves every later run of the process isolated."""
    original, isolated = Layout.block, []

    @wraps(original)
    def changed(layout: Layout, visibility: str | None = None) -> Tensor:
        if layout.visibility == "isolated":
            isolated.append(True)
        return original(layout, "isolated" if isolated else visibility)

    patch.setattr(Layout, "block", changed)


def visible_siblings_at_own_positions(patch: pytest.MonkeyPatch) -> None:
    """The shared position reaches the model in all modes but `visible`."""

    def move(layout: Layout) -> list[int]:
        if layout.visibility == "visible":
            return list(range(layout.start, layout.num_slots))
        return layout.slot_position[layout.start :]

    at_other_positions(patch, move)


def last_member_read_out(patch: pytest.MonkeyPatch) -> None:
    """(earlier) The last member's distribution stands for the set, whatever read-out was asked."""
    original = one_run.read_out

    def read_last(logits: Any, probabilities: Any, readout: str) -> Any:
        return original(logits, probabilities, "last")

    patch.setattr(one_run, "read_out", read_last)


def weighting_not_applied(patch: pytest.MonkeyPatch) -> None:
    """The bias of a weighting does not reach the attention."""

    def change(context: attention.PassContext, runs: Any) -> None:
        context.bias = None

    change_pass(patch, change)


def own_set_always_biased(patch: pytest.MonkeyPatch) -> None:
    """The weighting reaches a set's own members in every mode, though isolated ones see none."""
    original = Layout.bias
    patch.setattr(Layout, "bias", lambda layout, visibility=None: original(layout, "visible"))


def isolated_layers_ignored(patch: pytest.MonkeyPatch) -> None:
    """The layers in which siblings should be isolated are not."""

    def change(context: attention.PassContext, runs: Any) -> None:
        context.isolated_layers = {}

    change_pass(patch, change)


def isolated_layers_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Siblings are isolated one layer after those that were asked for."""

    def change(context: attention.PassContext, runs: Any) -> None:
        layers = context.isolated_layers.items()
        context.isolated_layers = {row: (first + 1, end + 1) for row, (first, end) in layers}

    change_pass(patch, change)


def mass_not_kept(patch: pytest.MonkeyPatch) -> None:
    """Isolated siblings that should keep their set's mass spread it over all slots they see."""
    original = Layout.own_mass
    patch.setattr(Layout, "own_mass", lambda layout: 0 * original(layout))


def replayed_weights_ignored(patch: pytest.MonkeyPatch) -> None:
    """The weights given for a replay's members change nothing."""
    patch.setattr(Layout, "_bias", lambda layout, step, probabilities: [0.0] * len(probabilities))


def threshold_halved(patch: pytest.MonkeyPatch) -> None:
    """Tokens join a set from half the threshold on."""
    original = one_run.select

    def select(distribution: Any, *, threshold: float, **rules: Any) -> Any:
        return original(distribution, threshold=threshold / 2, **rules)

    patch.setattr(one_run, "select", select)


def replayed_members_weigh_alike(patch: pytest.MonkeyPatch) -> None:
    """A replay forgets the members' probabilities."""
    original = one_run.Selection

    def alike(tokens: Any, found: Any, *rest: Any) -> Any:
        return original(tokens, [1 / len(found)] * len(found), *rest)

    patch.setattr(one_run, "Selection", alike)


def scale_ignored(patch: pytest.MonkeyPatch) -> None:
    """Attention scores are not divided by the root of the head size."""
    change_attention(patch, lambda module, arguments: {"scaling": 1.0})


def wrong_theta(patch: pytest.MonkeyPatch) -> None:
    """The rotary table is that of theta / 10, in the engine and in transformers alike."""
    for lm in (llama(), llama(1), mistral(), gpt_oss()):
        for module in lm.model.modules():
            if "inv_freq" in module._buffers:
                size = 2 * len(module._buffers["inv_freq"])
                frequencies = (THETA / 10) ** (-torch.arange(0, size, 2) / size)
                patch.setitem(module._buffers, "inv_freq", frequencies)


def capture_replaces_the_output(patch: pytest.MonkeyPatch) -> None:
    """While weights are recorded, the output is made from them, by other arithmetic."""

    def change(module: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        recording = arguments["tempo_pass"].recording is not None
        # A cap far above all scores changes no weight beyond rounding. It makes the output from
        # the weights.
        return {"softcap": 1e4} if recording else {}

    change_attention(patch, change)


def layers_recorded_under_one_mask(patch: pytest.MonkeyPatch) -> None:
    """Layers that are recorded together all get the weights of the first one's mask."""
    patch.setattr(attention.Recording, "take", under_one_mask)


def shorter_runs_see_the_padding(patch: pytest.MonkeyPatch) -> None:
    """In a batch, a run may attend to slots that only longer runs have filled."""

    def change(context: attention.PassContext, runs: Any) -> None:
        for row, run in enumerate(runs):
            context.allowed[row, : run.num_new, run.layout.num_slots :] = True

    change_pass(patch, change)


def modes_never_part(patch: pytest.MonkeyPatch) -> None:
    """Runs of one prompt and the same sets share their passes, whatever their modes are."""

    def ignored(run: one_run.Run, start: int, mode: object) -> None:
        note(run, start, None)

    note = one_run.Run._note
    patch.setattr(one_run.Run, "_note", ignored)


def shared_passes_are_not_written(patch: pytest.MonkeyPatch) -> None:
    """A pass made once for several runs fills the cache of only the first of them."""
    patch.setattr(engine, "_copies", lambda lm, groups: None)


def prompt_taken_over_without_its_keys(patch: pytest.MonkeyPatch) -> None:
    """A run that enters later takes over its prompt's distribution, but not its keys and values."""
    patch.setattr(SlotCache, "copy", lambda cache, source, target, num_slots: None)


def links_transposed(patch: pytest.MonkeyPatch) -> None:
    """The kernel between two sets is read by row instead of by column."""
    original = lattice.link

    def link(*args: Any) -> tuple[Tensor, Tensor]:
        links, log_weights = original(*args)
        return links.T.reshape(links.shape), log_weights

    patch.setattr(lattice, "link", link)


def parents_weigh_alike(patch: pytest.MonkeyPatch) -> None:
    """Bayes' rule is taken without the weights of the members that it asks about."""
    original = lattice.link

    def link(logits: Tensor, log_weights: Tensor, tokens: Any) -> tuple[Tensor, Tensor]:
        return original(logits, torch.zeros_like(log_weights), tokens)

    patch.setattr(lattice, "link", link)


def kernels_multiplied_in_the_wrong_order(patch: pytest.MonkeyPatch) -> None:
    """The kernel of the newest set comes first where it can, instead of last."""
    original = Lattice.extend

    @wraps(original)
    def extend(self: Lattice, *args: Any) -> Tensor:
        before = self.ancestors
        links = original(self, *args)
        if before is not None and len(before) and len(links) == links.shape[1] > 1:
            kernel, width = self.ancestors[-len(links) :], len(links)
            # the rows of the set before last; it must be as wide for the product to exist
            if len(before) > width:
                self.ancestors[-2 * width : -width] = kernel @ before[-width:]
        return links

    patch.setattr(Lattice, "extend", extend)


def weights_by_query(patch: pytest.MonkeyPatch, change: Callable[[Layout, Tensor], Tensor]) -> None:
    """Let `change(layout, bias)` alter what posteriors add to attention logits, [w, N]."""
    original = Layout._bias_by_query

    @wraps(original)
    def changed(layout: Layout, ancestors: Tensor) -> Tensor:
        return change(layout, original(layout, ancestors))

    patch.setattr(Layout, "_bias_by_query", changed)


def lone_members_weighted(patch: pytest.MonkeyPatch) -> None:
    """A set of one weighs its probability, as if the tokens that did not join were there."""
    original = Layout._bias

    @wraps(original)
    def changed(layout: Layout, step: int, probabilities: Any) -> list[float]:
        if layout.weighting == "probability" and layout.replay_weights is None:
            return [float(np.log(max(share, 1e-30))) for share in probabilities]
        return original(layout, step, probabilities)

    patch.setattr(Layout, "_bias", changed)


def last_set_not_weighted(patch: pytest.MonkeyPatch) -> None:
    """Posteriors reach older sets only, and not the one before the query."""

    def change(layout: Layout, bias: Tensor) -> Tensor:
        own = layout.slot_set[layout.start]
        before = [slot for slot, of_set in enumerate(layout.slot_set) if of_set == own - 1]
        bias[:, before] = 0.0
        return bias

    weights_by_query(patch, change)


def older_sets_not_weighted(patch: pytest.MonkeyPatch) -> None:
    """Posteriors reach the set before the query, and no older one."""

    def change(layout: Layout, bias: Tensor) -> Tensor:
        own = layout.slot_set[layout.start]
        older = [slot for slot, of_set in enumerate(layout.slot_set) if of_set < own - 1]
        bias[:, older] = 0.0
        return bias

    weights_by_query(patch, change)


def posterior_by_key(patch: pytest.MonkeyPatch) -> None:
    """Every member of a set gets the same posterior: the mean over its members."""
    weights_by_query(
        patch, lambda layout, bias: bias.exp().mean(dim=0, keepdim=True).log().expand_as(bias)
    )


def own_set_in_the_posterior(patch: pytest.MonkeyPatch) -> None:
    """The members' own set is weighted too, by -log n."""

    def change(layout: Layout, bias: Tensor) -> Tensor:
        bias[:, layout.start :] = -np.log(layout.num_slots - layout.start)
        return bias

    weights_by_query(patch, change)


def least_probable_parent(patch: pytest.MonkeyPatch) -> None:
    """`best_parent` takes the least probable one."""
    original = lattice.best_parents
    patch.setattr(lattice, "best_parents", lambda links: original(-links))


def most_probable_parent_of_the_set(patch: pytest.MonkeyPatch) -> None:
    """`best_parent` takes one parent for the whole set."""
    original = lattice.best_parents

    def best_parents(links: Tensor) -> Tensor:
        return original(links.sum(dim=1, keepdim=True).expand_as(links).contiguous())

    patch.setattr(lattice, "best_parents", best_parents)


def most_probable_pruned(patch: pytest.MonkeyPatch) -> None:
    """Pruning drops the most probable members and keeps the least probable one."""
    original = one_run.dropped

    def dropped(shares: Any, seen: Any, least: float) -> Any:
        return original(shares.max() + shares.min() - shares, seen, least)

    patch.setattr(one_run, "dropped", dropped)


def pruned_one_step_late(patch: pytest.MonkeyPatch) -> None:
    """A member is dropped one step after the trace says so."""
    original = one_run.Run._append
    waiting: dict[int, Any] = {}

    @wraps(original)
    def late(run: one_run.Run, chosen: Any, gone: Any) -> None:
        before = waiting.get(id(run), [])
        waiting[id(run)] = gone
        original(run, chosen, before if run.slots else [])

    patch.setattr(one_run.Run, "_append", late)


def pruned_members_come_back(patch: pytest.MonkeyPatch) -> None:
    """A member is dropped for one step only."""
    original = one_run.Run._append

    @wraps(original)
    def forgetful(run: one_run.Run, chosen: Any, gone: Any) -> None:
        run.layout.dropped = []
        original(run, chosen, gone)

    patch.setattr(one_run.Run, "_append", forgetful)


def lattices_never_part(patch: pytest.MonkeyPatch) -> None:
    """Runs of the same sets share passes, whatever came before whom and whatever is dropped."""
    original = one_run.Run._note

    @wraps(original)
    def note(run: one_run.Run, start: int, mode: object) -> None:
        layout, kept = run.layout, (run.layout.ancestors, run.layout.dropped)
        layout.ancestors, layout.dropped = None, []
        original(run, start, mode)
        layout.ancestors, layout.dropped = kept

    patch.setattr(one_run.Run, "_note", note)


def a_rule_ignored(patch: pytest.MonkeyPatch, name: str) -> None:
    original = one_run.select

    def select(distribution: Any, **rules: Any) -> Any:
        return original(distribution, **rules | {name: None})

    patch.setattr(one_run, "select", select)


def top_p_ignored(patch: pytest.MonkeyPatch) -> None:
    """The nucleus is accepted and chooses nothing."""
    a_rule_ignored(patch, "top_p")


def top_k_ignored(patch: pytest.MonkeyPatch) -> None:
    """`top_k` is accepted and chooses nothing."""
    a_rule_ignored(patch, "top_k")


def min_p_ignored(patch: pytest.MonkeyPatch) -> None:
    """`min_p` is accepted and chooses nothing."""
    a_rule_ignored(patch, "min_p")


def schedule_starts_over(patch: pytest.MonkeyPatch) -> None:
    """Every step gets the first threshold of the schedule."""
    original = RunSpec.rules
    patch.setattr(RunSpec, "rules", lambda spec, step, prompt: original(spec, 0, prompt))


def drawn_with_replacement(patch: pytest.MonkeyPatch) -> None:
    """A draw may take one token several times."""

    def draw(probabilities: Any, tokens: Any, vocab_size: int, num_drawn: int, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(probabilities, num_drawn, True, generator=generator)
        return drawn.sort().values

    patch.setattr(selection, "_draw", draw)


def drawn_from_one_stream(patch: pytest.MonkeyPatch) -> None:
    """Draws come from one stream of random numbers, so they depend on what was run before."""
    original, drawn = selection._draw, [0]

    def draw(probabilities: Any, tokens: Any, vocab_size: int, num_drawn: int, seed: int) -> Any:
        drawn[0] += 1
        return original(probabilities, tokens, vocab_size, num_drawn, drawn[0])

    patch.setattr(selection, "_draw", draw)


def seed_ignored(patch: pytest.MonkeyPatch) -> None:
    """Every run of a prompt draws the same."""
    original = RunSpec.rules
    patch.setattr(RunSpec, "rules", lambda spec, *step: original(spec, *step) | {"seed": 0})


def change_residuals(patch: pytest.MonkeyPatch, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Let `change(residuals)` alter what a pass recorded of them, [L + 1, n, E]."""
    original = engine._hand_out

    def hand_out(residuals: np.ndarray, groups: Any) -> None:
        original(change(residuals), groups)

    patch.setattr(engine, "_hand_out", hand_out)


def residual_of_the_next_member(patch: pytest.MonkeyPatch) -> None:
    """Each token's residual is recorded for the token after it."""
    change_residuals(patch, lambda residuals: np.roll(residuals, 1, axis=1))


def residual_after_the_layer(patch: pytest.MonkeyPatch) -> None:
    """What is recorded is what leaves a layer, and not what enters it."""
    change_residuals(patch, lambda residuals: np.concatenate([residuals[1:], residuals[-1:]]))


def residual_before_the_hook(patch: pytest.MonkeyPatch) -> None:
    """A residual is recorded as it was before its hook changed it."""
    original = residual.Tap.at

    @wraps(original)
    def at(tap: residual.Tap, layer: int, hidden: Tensor) -> Tensor:
        changed = original(tap, layer, hidden)
        if tap.rows is not None:
            tap.found[-1] = hidden[0].index_select(0, tap.rows)
        return changed

    patch.setattr(residual.Tap, "at", at)


def residuals_rounded_on_the_way(patch: pytest.MonkeyPatch) -> None:
    """While residuals are recorded, the layers get them in bfloat16."""
    original = engine.tapped

    @contextmanager
    def tapped(stream: Any, tap: residual.Tap) -> Iterator[None]:
        def rounded(module: Any, args: Any, output: Any) -> Any:
            return output.bfloat16().to(output.dtype)

        with original(stream, tap):
            handle = stream.layers[0].register_forward_hook(rounded)
            try:
                yield
            finally:
                handle.remove()

    patch.setattr(engine, "tapped", tapped)


def change_hooks(
    patch: pytest.MonkeyPatch, change: Callable[[one_run.Run, int, int], tuple[int, int]]
) -> None:
    """Let `change(run, layer, offset)` move the hooks of each pass."""
    original = one_run.Run.changes

    @wraps(original)
    def changes(run: one_run.Run) -> Iterator[Any]:
        for layer, offset, function in original(run):
            yield *change(run, layer, offset), function

    patch.setattr(one_run.Run, "changes", changes)


def hook_at_the_next_member(patch: pytest.MonkeyPatch) -> None:
    """A hook changes the residual of the token after the one that it is for."""
    change_hooks(patch, lambda run, layer, offset: (layer, (offset + 1) % run.num_new))


def hook_after_the_layer(patch: pytest.MonkeyPatch) -> None:
    """A hook changes what leaves a layer, and not what enters it."""
    change_hooks(patch, lambda run, layer, offset: (min(layer + 1, run.lm.num_layers), offset))


def hooks_not_called(patch: pytest.MonkeyPatch) -> None:
    """Hooks are accepted, and nothing is changed."""
    patch.setattr(one_run.Run, "changes", lambda run: iter(()))


def hooks_never_part(patch: pytest.MonkeyPatch) -> None:
    """Runs of the same sets share their passes, whatever hooks they have."""
    original = one_run.Run._note

    @wraps(original)
    def note(run: one_run.Run, start: int, mode: Any) -> None:
        original(run, start, "hooked" if isinstance(mode, tuple) and len(mode) == 2 else mode)

    patch.setattr(one_run.Run, "_note", note)
    patch.setattr(one_run.Run, "_is_hooked", lambda run, step: False)


def weighting_layers_ignored(patch: pytest.MonkeyPatch) -> None:
    """The layers in which members should be weighted are all layers."""

    def change(context: attention.PassContext, runs: Any) -> None:
        context.weighted_layers = {}

    change_pass(patch, change)


def weighting_layers_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Members are weighted one layer after those that were asked for."""

    def change(context: attention.PassContext, runs: Any) -> None:
        layers = context.weighted_layers.items()
        context.weighted_layers = {row: (first + 1, end + 1) for row, (first, end) in layers}

    change_pass(patch, change)


def raw_keys_not_saved(patch: pytest.MonkeyPatch) -> None:
    """One of the arrays is left out of the file."""
    original = trace.Trace._arrays

    def arrays(run: trace.Trace) -> dict[str, Any]:
        return {name: array for name, array in original(run).items() if name != "raw_keys"}

    patch.setattr(trace.Trace, "_arrays", arrays)


# In the order of the table. The first ten are those that the checks were made for.
FAULTS: dict[str, Plant] = {
    plant.__name__.replace("_", " "): plant
    for plant in (
        mask_off_by_one_slot,
        mask_by_list_index,
        one_row_broadcast,
        position_plus_one,
        last_sibling_only_in_the_cache,
        prompt_token_repeated,
        window_by_slot,
        sink_ignored,
        sibling_values_swapped,
        capture_one_pass_early,
        mode_not_wired,
        first_mode_stays,
        mode_applied_to_the_prompt,
        isolated_from_later_sets_too,
        positions_by_slot,
        visible_siblings_at_own_positions,
        last_member_read_out,
        weighting_not_applied,
        own_set_always_biased,
        isolated_layers_ignored,
        isolated_layers_off_by_one,
        mass_not_kept,
        replayed_weights_ignored,
        threshold_halved,
        replayed_members_weigh_alike,
        scale_ignored,
        wrong_theta,
        capture_replaces_the_output,
        layers_recorded_under_one_mask,
        shorter_runs_see_the_padding,
        modes_never_part,
        shared_passes_are_not_written,
        prompt_taken_over_without_its_keys,
        raw_keys_not_saved,
        links_transposed,
        parents_weigh_alike,
        kernels_multiplied_in_the_wrong_order,
        lone_members_weighted,
        last_set_not_weighted,
        older_sets_not_weighted,
        posterior_by_key,
        own_set_in_the_posterior,
        least_probable_parent,
        most_probable_parent_of_the_set,
        most_probable_pruned,
        pruned_one_step_late,
        pruned_members_come_back,
        lattices_never_part,
        top_p_ignored,
        top_k_ignored,
        min_p_ignored,
        schedule_starts_over,
        drawn_with_replacement,
        drawn_from_one_stream,
        seed_ignored,
        residual_of_the_next_member,
        residual_after_the_layer,
        residual_before_the_hook,
        residuals_rounded_on_the_way,
        hook_at_the_next_member,
        hook_after_the_layer,
        hooks_not_called,
        hooks_never_part,
        weighting_layers_ignored,
        weighting_layers_off_by_one,
    )
}
