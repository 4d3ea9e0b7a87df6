"""A run that grows, is replayed, loses slots and changes its capture, beside one from scratch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

import tempo
from tempo.spec import CAPTURES
from tests import tempo64
from tests.checks import (
    LOGITS,
    PROBABILITIES,
    STATES,
    WEIGHTS,
    Violation,
    attention,
    expect,
    logits,
    near,
    same,
)
from tests.exactness import TOKENS, settings_of_runs
from tests.faults import FAULTS
from tests.tiny_models import exact, llama

pytestmark = pytest.mark.usefixtures("one_thread")

MEMBERS = st.lists(TOKENS, min_size=1, max_size=4, unique=True)
RUNS, RULES_OF_A_RUN = 40, 12
# The most sets that a run grows to.
LONGEST = 8
reproducible = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "max_examples": RUNS,
    "stateful_step_count": RULES_OF_A_RUN,
}


class Slots(RuleBasedStateMachine):
    """The sets of one run, and the trace that the engine made of them last."""

    @initialize(
        depth=st.sampled_from((1, 2, 4)),
        prompt=st.lists(TOKENS, min_size=1, max_size=5),
        chosen=settings_of_runs(),
        members=MEMBERS,
    )
    def begin(self, depth, prompt, chosen, members):
        self.lm, self.prompt, self.chosen = llama(depth), prompt, chosen
        self.sets, self.captured, self.run = [], CAPTURES, None
        self.force([members], kept=0)

    @rule(members=MEMBERS)
    @precondition(lambda self: len(self.sets) < LONGEST)
    def append(self, members):
        self.force([*self.sets, members], kept=len(self.sets))

    @rule()
    def replay(self):
        self.force(self.sets, kept=len(self.sets))

    @rule(data=st.data())
    @precondition(lambda self: len(self.sets) > 1)
    def prune_last_sets(self, data):
        kept = data.draw(st.integers(1, len(self.sets) - 1))
        self.force(self.sets[:kept], kept=kept)

    @rule(data=st.data())
    @precondition(lambda self: any(len(members) > 1 for members in self.sets))
    def prune_a_member(self, data):
        wide = [k for k, members in enumerate(self.sets) if len(members) > 1]
        k = data.draw(st.sampled_from(wide))
        pruned = data.draw(st.sampled_from(self.sets[k]))
        survivors = [token for token in self.sets[k] if token != pruned]
        before = self.run
        self.force([*self.sets[:k], survivors, *self.sets[k + 1 :]], kept=k)
        captured = before.steps[k].logits is not None and self.run.steps[k].logits is not None
        mode = (self.chosen["visibility"], self.chosen["positions"])
        if captured and mode == ("isolated", "shared"):
            kept = [i for i, token in enumerate(before.steps[k].tokens) if token != pruned]
            found, expected = logits(self.run, k), logits(before, k)[kept]
            near(found, expected, LOGITS, "logits of isolated survivors")

    @rule(captured=st.sets(st.sampled_from(CAPTURES)))
    def capture(self, captured):
        self.captured = tuple(captured)
        self.force(self.sets, kept=len(self.sets))

    @rule(members=MEMBERS)
    def take_the_row_of_a_longer_run(self, members):
        """The same run where another one has left keys and values in every slot."""
        doubled, longer_by_one = [*self.prompt, *self.prompt], [*self.sets, members]
        longer = self.spec(prompt=doubled, replay=longer_by_one, capture=())
        _, run = tempo.generate_batch(self.lm, [longer, self.spec()], max_rows=1)
        self.compare(run, self.run, kept=len(self.sets))

    def spec(self, **changes):
        """The run as it is now, with changes."""
        fields = {"prompt": self.prompt, "replay": self.sets, "capture": self.captured}
        return tempo.RunSpec(**fields | self.chosen | changes)

    def force(self, sets, kept):
        """Run the sets and compare them with the run before and with the same from scratch.

        The first `kept` sets of the run before must be unchanged, to rounding.
        """
        before, self.sets = self.run, sets
        self.run = tempo.generate_batch(self.lm, [self.spec()])[0]
        if before is not None:
            self.compare(self.run, before, kept)
        self.compare_with_scratch()

    def compare(self, run, before, kept):
        """Raise a Violation unless the first `kept` sets of two runs are the same, to rounding."""
        # the distribution of set k follows from the sets before it
        for k in range(min(kept + 1, len(run.steps), len(before.steps))):
            found, expected = run.steps[k].distribution, before.steps[k].distribution
            near(found, expected, PROBABILITIES, f"distribution of step {k}, before and after")
        for k in range(kept):
            for name, bound in (("logits", LOGITS), ("attention", WEIGHTS)):
                one, other = getattr(run.steps[k], name), getattr(before.steps[k], name)
                if one is not None and other is not None:
                    near(one, other, bound, f"{name} of set {k}, before and after")
        num_slots = len(self.prompt) + sum(map(len, self.sets[:kept]))
        if run.keys is not None and before.keys is not None:
            for name in ("keys", "values", "raw_keys"):
                found, expected = (getattr(each, name)[:, :, :num_slots] for each in (run, before))
                near(found, expected, STATES, f"{name}, before and after")

    def compare_with_scratch(self):
        """Raise a Violation unless the run is that of the float64 reference, to rounding."""
        scratch = tempo64.replay(exact(self.lm), self.prompt, self.sets, **self.chosen)
        same(self.run.slot_token, scratch.slots.tokens, "tokens of the slots")
        same(self.run.slot_position, scratch.slots.positions, "positions of the slots")
        for k, step in enumerate(self.run.steps):
            slots = scratch.slots.slots(k, len(self.prompt))
            found, expected = step.distribution, scratch.distributions[k]
            near(found, expected, PROBABILITIES, f"distribution of step {k}")
            absent = (step.logits is None, step.attention is None)
            expect(absent == self.left_out("logits", "attention"), f"capture of set {k}")
            if step.logits is not None:
                near(logits(self.run, k), scratch.out.logits[slots], LOGITS, f"logits of set {k}")
            if step.attention is not None:
                expected = scratch.out.attention[:, :, slots, : slots[-1] + 1]
                near(attention(self.run, k), expected, WEIGHTS, f"attention of set {k}")
        expect((self.run.keys is None,) == self.left_out("kv"), "capture of keys")
        if self.run.keys is not None:
            for name in ("keys", "values", "raw_keys"):
                near(getattr(self.run, name), getattr(scratch.out, name), STATES, name)

    def left_out(self, *names):
        return tuple(name not in self.captured for name in names)


TestSlots = Slots.TestCase
TestSlots.settings = settings(**reproducible)


SEEN = (
    "mask by list index",
    "sibling values swapped",
    "capture one pass early",
    "last sibling only in the cache",
)


@pytest.mark.parametrize("fault", SEEN)
def test_the_machine_sees_a_fault(fault, monkeypatch):
    FAULTS[fault](monkeypatch)
    quick = settings(**reproducible, phases=[Phase.generate], report_multiple_bugs=False)
    with pytest.raises(Violation):
        run_state_machine_as_test(Slots, settings=quick)


def test_the_machine_reaches_the_growth_of_the_cache():
    """A run past the cache's first capacity is the same as before it.

    What the rules above compare is shorter.
    """
    sets = [[i % 60, (i + 7) % 60, (i + 23) % 60] for i in range(30)]
    long = tempo.generate(llama(), [1, 2, 3], replay=sets, capture=CAPTURES)
    short = tempo.generate(llama(), [1, 2, 3], replay=sets[:15], capture=CAPTURES)
    assert short.num_slots < tempo.cache.FIRST_CAPACITY < long.num_slots
    for one, other in zip(short.steps, long.steps, strict=False):
        assert np.abs(one.logits - other.logits).max() < LOGITS
    exactly = tempo64.replay(exact(llama()), [1, 2, 3], sets)
    assert np.abs(long.steps[-1].logits - exactly.out.logits[-3:]).max() < LOGITS
