"""A study: how one prompt is measured, and what is claimed of the measurements.

A study's module reads top to bottom: the `Study`, a frozen dataclass for what one prompt gives (its
case), one generator that measures it, then the claims, each a test function.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from tempo.claims import Claim
from tempo.errors import SpecError
from tempo.harness.config import Space
from tempo.spec import CAPTURES

if TYPE_CHECKING:
    from tempo.harness.runs import Prompt
    from tempo.models import LanguageModel

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])
# What a measurement is: it yields the runs it needs, gets their traces, and returns the case.
Steps = Generator[Any, Any, T]
Statistic = Callable[..., Any]  # from a case to a number, a truth value, a map, or None
# From a model to the reason why something cannot be judged on it; "" if it can.
Need = Callable[["LanguageModel"], str]

# Which keyword of `Study.claim` means which test of `tempo.claims`.
TESTS = {
    "always": "always",
    "more_than": "greater",
    "less_than": "less",
    "within": "equivalent",
    "share_above": "proportion",
    "somewhere_above": "somewhere",
}
REFUTED_BY = {
    "always": "one prompt on which it does not hold",
    "greater": "{a} significantly below {margin:.3g}",
    "less": "{a} significantly above {margin:.3g}",
    "equivalent": "{a} significantly beyond {margin:.3g} either way",
    "proportion": "a share significantly below {margin:.3g}",
    "somewhere": "every cell's mean significantly below {margin:.3g}",
}


class Margin(float):
    """The smallest effect that would matter, with the reason why: a float that knows its reason.

    >>> noise = Margin(0.02, "what bfloat16 changes")
    >>> -noise, (-noise).because
    (-0.02, 'what bfloat16 changes')
    """

    because: str

    def __new__(cls, value: float, because: str) -> Margin:
        margin = super().__new__(cls, value)
        margin.because = because
        return margin

    def __neg__(self) -> Margin:
        return Margin(-float(self), self.because)


@dataclass(frozen=True)
class Planned:
    """The effect that a claim is meant to detect, and what was expected of the data beforehand.

    effect: the mean (or share) over prompts; sd: its spread over prompts, not needed for a share;
    source: where both numbers come from; cells: how many cells a map is expected to have.
    """

    effect: float
    sd: float = 0.0
    source: str = ""
    cells: int = 1


@dataclass(frozen=True)
class Family:
    """Claims of several studies, corrected together; `size` counts those not run as well."""

    name: str
    size: int


class ClaimTest:
    """A claim written as a test function. Calling it gives the statistic of one case.

    `Study.claim` makes it; `control` registers where the same statistic must not support the claim.
    """

    def __init__(self, study: Study, function: Statistic, test: str, margin: float) -> None:
        self.study = study
        self.function = function
        self.test = test
        self.margin = margin
        self.name = self.__name__ = function.__name__  # pytest marks what has the latter
        self.because = getattr(margin, "because", "")
        self.statement, self.statistic, self.control_statement = _statement(function)
        self.refuted_by = self.registered = ""
        self.typical = False
        self.planned: Planned | None = None
        self.family: Family | str = study.name
        self.control_function: Statistic | None = None
        self.needs: Need | None = None

    @property
    def id(self) -> str:
        """`<study>.<name>`: the function's name in words, joined by hyphens."""
        return f"{self.study.name}.{self.name.removeprefix('test_').replace('_', '-')}"

    def control(self, function: C) -> C:
        """Register a statistic for which the claim must not hold; its docstring says which."""
        self.control_function = function
        self.control_statement = " ".join((function.__doc__ or "").split())
        return function

    @cached_property
    def claim(self) -> Claim:
        """The claim as `tempo.claims` judges it. Raises SpecError if something is missing."""
        control, said = self.control_function, self.control_statement
        if control is None:
            raise SpecError(
                f"claim {self.id} has no control, so nothing shows that it can fail; add "
                f"@{self.function.__name__}.control above a function of the case"
            )
        if not self.statement:
            raise SpecError(f"claim {self.id} says nothing: its docstring is the statement")
        if not said:
            raise SpecError(
                f"the control of claim {self.id} says nothing: add a docstring to it, or a "
                "line 'Control: ...' to the claim's"
            )
        if self.test != "always" and not self.because:
            raise SpecError(
                f"claim {self.id} has a margin of {self.margin:g} without a reason: add because="
            )
        planned = self.planned or Planned(0.0)
        family = self.family.name if isinstance(self.family, Family) else self.family
        a = "a typical value" if self.typical else "a mean"
        return Claim(
            id=self.id,
            statement=self.statement,
            statistic=self.statistic,
            values=of_cases(self.function),
            test=self.test,  # pyright: ignore[reportArgumentType]  # checked by Claim
            refuted_by=self.refuted_by or REFUTED_BY[self.test].format(a=a, margin=self.margin),
            control=of_cases(control),
            control_statement=said,
            margin=float(self.margin),
            margin_reason=self.because,
            estimand="pseudomedian" if self.typical else "mean",
            family="" if self.test == "always" else family,
            planned_effect=self.planned.effect if self.planned else None,
            planned_sd=planned.sd,
            planned_from=planned.source,
            cells=planned.cells,
            registered=self.registered,
        )

    def reason_against(self, lm: LanguageModel) -> str:
        """Why this claim cannot be judged on the model; "" if it can."""
        return self.needs(lm) if self.needs else ""

    def __call__(self, case: Any) -> Any:
        return self.function(case)

    def __str__(self) -> str:
        return self.id

    def __repr__(self) -> str:
        return f"<ClaimTest {self.id}>"


def of_cases(function: Statistic) -> Statistic:
    """The statistic, None for a prompt that gave no case."""
    return lambda case: None if case is None else function(case)


class Study:
    """An experiment: how it measures one prompt, what it claims, and how it pictures what it found.

    name: what configs, ids and `-k` call it, such as "entropy" or "exp3".
    title: the question in a few words, for the report.
    captures: what its runs must record, whatever a config says; see `RunSpec.capture`.
    registered: when its claims were written down, as an ISO date, for those that do not say.
    needs: from a model to the reason why nothing of the study can be measured on it, "" if it can.
        All its claims are then not applicable, and the report says why. A study that captures "kv"
        needs models with keys of their own in any case, one that captures "residual" models whose
        layers hand on one state a token.
    space: the configs that it can judge; by default any.

    >>> study = Study("entropy", title="Is seeing siblings sobering?", captures=("logits",))
    """

    def __init__(
        self,
        name: str,
        title: str,
        captures: Iterable[str] = (),
        registered: str = "",
        needs: Need | None = None,
        space: Space | None = None,
    ) -> None:
        self.captures, self.registered, self.needs = tuple(captures), registered, needs
        self.space = space or Space()
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise SpecError(
                f"a study is called {name!r}; expected lower-case letters, digits and _, "
                "such as 'entropy'"
            )
        if unknown := [name for name in self.captures if name not in CAPTURES]:
            raise SpecError(
                f"study {name!r} captures {unknown[0]!r}; expected some of {', '.join(CAPTURES)}"
            )
        self.name, self.title = name, title
        self.claims: dict[str, ClaimTest] = {}
        self.measurement: Callable[[Prompt], Steps[Any]] | None = None
        self.draw: Callable[..., Iterable[Any]] | None = None

    def reason_against(self, lm: LanguageModel, captures: Iterable[str] = ()) -> str:
        """Why nothing of this study can be measured on the model; "" if it can.

        captures: what the config captures beside the study.
        """
        captured = {*self.captures, *captures}
        without_keys = lm.reason_against_kv if "kv" in captured else ""
        without_stream = lm.reason_against_residual if "residual" in captured else ""
        return without_keys or without_stream or (self.needs(lm) if self.needs else "")

    def measure(self, function: C) -> C:
        """Register the generator that measures one `Prompt` and returns its case.

        The case is a frozen dataclass of plain numbers, or None if the prompt has nothing to say.
        """
        if not inspect.isgeneratorfunction(function):
            raise SpecError(
                f"{function.__name__} measures study {self.name!r} but is no generator; it asks "
                "for runs with yield: trace = yield run(prompt)"
            )
        if self.measurement is not None:
            raise SpecError(
                f"study {self.name!r} is measured twice: by {self.measurement.__name__} and by "
                f"{function.__name__}; a study has one measurement"
            )
        self.measurement = function
        return function

    def pictures(self, function: C) -> C:
        """Register the function from (store, cases) to figures for the report.

        store: the raw results of the config's own prompt; cases: those of all prompts that have
        one.
        """
        self.draw = function
        return function

    def claim(
        self,
        *,
        always: bool = False,
        more_than: float | None = None,
        less_than: float | None = None,
        within: float | None = None,
        share_above: float | None = None,
        somewhere_above: float | None = None,
        because: str = "",
        planned: Planned | None = None,
        control: Any = None,
        typical: bool = False,
        family: Family | None = None,
        registered: str = "",
        needs: Need | None = None,
        name: str = "",
        statement: str = "",
        statistic: str = "",
        refuted_by: str = "",
    ) -> Callable[[Statistic], ClaimTest]:
        """A decorator that makes a claim of a test function from a case to a statistic.

        The docstring's first paragraph is the statement; a second one says what the statistic is.
        One of six keywords says what must be so for the claim to be supported:

        always: the statistic is true for every prompt (an invariant, which fails its test);
        more_than, less_than: the mean over prompts is above, below this margin;
        within: the mean lies between minus and plus this margin;
        share_above: of the prompts, a greater share than this has a true statistic;
        somewhere_above: the statistic is a map, and in some cell the mean is above this margin.

        because: why the margin is the smallest effect that matters; a `Margin` brings its own
        reason.
        control: where the claim must not hold. A value is given to the test function as its second
            argument: the same statistic elsewhere, and a line "Control: ..." of the docstring
            says where. A function is another statistic of the case; `.control` registers one, too.
        typical: about a typical prompt (pseudomedian) instead of the mean.
        family: claims corrected together (Holm); by default those of the study.
        registered: when the claim was written down, as an ISO date; by default the study's date.
        needs: from a model to the reason why this claim cannot be judged on it, "" if it can. The
            claim is then not applicable: neither supported nor refuted.
        name, statement, statistic, refuted_by: for claims made by a helper, where they differ.
        Raises SpecError in words if any of it does not fit.
        """
        margins = {
            "always": 0.0 if always else None,
            "more_than": more_than,
            "less_than": less_than,
            "within": within,
            "share_above": share_above,
            "somewhere_above": somewhere_above,
        }
        given = [keyword for keyword, margin in margins.items() if margin is not None]

        def decorate(function: Statistic) -> ClaimTest:
            label = f"{self.name}.{name or function.__name__}"
            if len(given) != 1:
                raise SpecError(
                    f"claim {label} says {' and '.join(given) or 'not'} what must be so; expected "
                    f"one of {', '.join(TESTS)}"
                )
            margin = margins[given[0]]
            assert margin is not None
            found = ClaimTest(self, function, TESTS[given[0]], margin)
            found.name = name or found.name
            found.because = because or found.because
            found.statement = statement or found.statement
            found.statistic = statistic or found.statistic
            found.refuted_by, found.typical, found.planned = refuted_by, typical, planned
            found.family = family or found.family
            found.registered = registered or self.registered
            found.needs = needs
            if callable(control):
                found.control(control)
            elif control is not None:
                found.control_function = lambda case: function(case, control)
            if found.id in self.claims:
                raise SpecError(f"two claims are called {found.id}; each needs a name of its own")
            self.claims[found.id] = found
            return found

        return decorate

    def __repr__(self) -> str:
        return f"<Study {self.name}: {len(self.claims)} claims>"


CONTROL = "Control: "


def _statement(function: Statistic) -> tuple[str, str, str]:
    """Statement, statistic and control in words, from a claim's docstring and code.

    The first paragraph is the statement, what begins with "Control:" the control, another paragraph
    the statistic; without that it is the expression that the function returns.
    """
    text = inspect.cleandoc(function.__doc__ or "").replace(f"\n{CONTROL}", f"\n\n{CONTROL}")
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()] or [""]
    statement, *others = paragraphs
    controls = [part.removeprefix(CONTROL) for part in others if part.startswith(CONTROL)]
    statistics = [part for part in others if not part.startswith(CONTROL)]
    said = " ".join(controls).rstrip(".")  # in a report, a number follows it
    return statement, " ".join(statistics) or returned(function), said


def returned(function: Callable[..., Any]) -> str:
    """The expression that a function returns, as written; its name in words if there is none."""
    nodes = [node for node in ast.walk(syntax_of(function)) if isinstance(node, ast.Return)]
    values = [node.value for node in nodes if node.value]
    return ast.unparse(values[-1]) if values else function.__name__.replace("_", " ")


def syntax_of(function: Callable[..., Any]) -> ast.AST:
    """The syntax tree of a function; an empty one where the source cannot be had."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        return ast.Module([], [])


def average(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing.

    >>> average([1.0, 2.0]), average([])
    (1.5, None)
    """
    return sum(map(float, values)) / len(values) if len(values) else None
