"""One pytest session with studies: from collection over one measurement to the report."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tempo
from tempo import files
from tempo.claims import POWER, Finding, num_needed
from tempo.errors import ResultsError, TempoError
from tempo.harness.config import StudyConfig
from tempo.harness.elsewhere import described
from tempo.harness.evidence import Evidence, measured_prompts
from tempo.harness.execute import failure_of
from tempo.harness.expectations import (
    Expectations,
    check,
    file_of,
    other_weights,
    read,
    update,
)
from tempo.harness.items import ClaimItem, line_of, marks_of
from tempo.harness.plan import Plan, check_together, family_sizes, plans_of
from tempo.harness.progress import Progress
from tempo.harness.prompts import Suite, read_suite
from tempo.harness.study import ClaimTest, Study
from tempo.spec import load_yaml
from tempo.text import escaped
from tempo.workers import executor


class Session:
    """What one session knows of its studies. pytest calls its hooks once a study has been imported.

    problems: what is wrong with studies, each in a line; any of them ends the session before it
    begins.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.problems: list[str] = []
        self.plans: dict[str, list[Plan]] = {}  # by the name of the module
        self.evidence: Evidence | None = None
        self.asked: list[tuple[Plan, Finding]] = []
        self.regressions: dict[tuple[str, str], str] = {}  # by plan and claim
        self.failures: list[str] = []
        self.notices: list[str] = []
        self.report_problems: list[str] = []
        self.conclusions: Any = None
        self.tests: list[pytest.TestReport] = []
        self.expectations: dict[Path, Expectations | None] = {}
        self.studies: set[str] = set()  # names of all that were collected
        self.held = ExitStack()  # the lock of the results folder, until the session ends
        self.suite: Suite | None = None
        self.suite_is_sound = True
        try:
            if source := config.getoption("suite") or self._suite_of_ini():
                self.suite = read_suite(source)
            number = config.getoption("prompts")
            if number is not None and not 1 <= number <= self._most(number):
                raise tempo.SpecError(
                    f"--prompts {number}: expected a number from 1 to {self._most(number)}"
                )
        except TempoError as error:
            self.problems.append(str(error))
            self.suite_is_sound = False

    def _suite_of_ini(self) -> str:
        """The suite that pytest's configuration names, relative to the file it stands in."""
        named = str(self.config.getini("tempo_suite") or "")
        if not named or named.startswith("hf:"):
            return named
        return str(self.config.rootpath / named)

    def _most(self, number: int) -> int:
        return len(self.suite.prompts) if self.suite else max(1, number)

    def plans_in(self, module: ModuleType) -> list[Plan]:
        """The plans of a module's study, one a config; none if it has no study, or a faulty one."""
        name = module.__name__
        if name not in self.plans:
            self.plans[name] = []
            studies = {id(s): s for s in vars(module).values() if isinstance(s, Study)}
            path = Path(str(module.__file__))
            self.studies |= {study.name for study in studies.values()}
            if not self.suite_is_sound:  # said already, and nothing can be planned without it
                return []
            try:
                if len(studies) > 1:
                    names = ", ".join(study.name for study in studies.values())
                    raise tempo.SpecError(f"{path.name} holds several studies ({names}); keep one")
                for study in studies.values():
                    chosen = self.config.option.config
                    number = self.config.getoption("prompts")
                    self.plans[name] = plans_of(study, path, chosen, self.suite, number)
            except TempoError as error:
                self.problems.append(str(error))
        return self.plans[name]

    def items_of(self, collector: Any, name: str, obj: Any) -> list[pytest.Item] | None:
        """An item for each config of a claim's study; None if the object is no such claim."""
        module = getattr(collector, "module", None)
        if not isinstance(obj, ClaimTest) or not isinstance(module, ModuleType):
            return None
        items: list[pytest.Item] = []
        for plan in self.plans_in(module):
            if plan.study is obj.study and obj in plan.claims:
                item = ClaimItem.from_parent(
                    collector,
                    name=f"{name}[{plan.slug}]",
                    claim=obj,
                    plan=plan,
                    session_of=self,
                    line=line_of(obj, name, plan.module),
                )
                item.own_markers += marks_of(obj)
                items.append(item)
        return items

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Whatever is wrong is said now; every test of a study gets the study's name as a mark."""
        every = [plan for plans in self.plans.values() for plan in plans]
        try:
            check_together(every)
        except TempoError as error:
            self.problems.append(str(error))
        chosen: list[Path] = self.config.option.config
        read_ones = {plan.name for plan in every}
        for path in chosen if not self.problems else ():
            if path.stem not in read_ones:
                self.problems.append(_nobodys(path, self.studies))
        if self.problems:
            raise pytest.UsageError("\n".join(dict.fromkeys(map(_one_line, self.problems))))
        for plan in every:
            self.config.addinivalue_line("markers", f"{plan.study.name}: {plan.study.title}")
        for item in items:
            if plan := _plan_of(item):
                item.add_marker(plan.study.name)
        if hasattr(self.config, "workerinput"):  # of pytest-xdist; its controller says so
            self._leave_out(items, [item for item in items if _needs_evidence(item)])
            worker: Any = self.config
            worker.workeroutput["tempo"] = ", ".join(sorted(self.studies))
        if chosen:  # only the studies that a given file names are run
            self._leave_out(items, [item for item in items if self._module_plans(item) == []])

    def _leave_out(self, items: list[pytest.Item], left_out: list[pytest.Item]) -> None:
        self.config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]

    def _module_plans(self, item: pytest.Item) -> list[Plan] | None:
        """The plans of the module that a test stands in, None if that has no study."""
        module = getattr(item.getparent(pytest.Module), "obj", None)
        return self.plans.get(module.__name__) if module else None

    def pytest_report_collectionfinish(self, items: list[pytest.Item]) -> list[str]:
        """What the selected tests will run, and for how many claims there are too few prompts."""
        plans = selected(items)
        if not plans or self.problems:
            return []
        names = ", ".join(map(str, plans))
        lines = [f"tempo: model {self.config.getoption('model')}, {names}", *self._power(items)]
        return [escaped(line) for line in lines]

    def _power(self, items: Sequence[pytest.Item]) -> list[str]:
        """How many claims have too few prompts; with --collect-only how many each needs."""
        sizes = family_sizes(selected(items))
        lines, short = [], 0
        for item in items:
            if not isinstance(item, ClaimItem) or item.claim.test == "always":
                continue
            claim, planned = item.claim.claim, item.plan.num_judged_prompts
            size = sizes.get(claim.family or claim.id, 1)
            needed = num_needed(claim, size)
            short += needed is not None and needed > planned
            need = "no planned effect registered, so no one knows how many prompts it needs"
            if needed is not None:
                spread = f" (sd {claim.planned_sd:.3g})" if claim.planned_sd else ""
                few = f"TOO FEW: {planned}" if needed > planned else f"{planned}"
                need = (
                    f"{needed} prompts tell {claim.planned_effect:.3g}{spread} from "
                    f"{claim.margin:.3g}, power {POWER:g}, {size} in the family; {few} are planned"
                )
            lines.append(f"tempo: {claim} on {item.plan}: {need}")
        if self.config.option.collectonly:
            return lines
        claims = "1 claim" if short == 1 else f"{short} claims"
        say = f"tempo: too few prompts for the planned effect of {claims}"
        return [f"{say}; --collect-only says how many they need"] if short else []

    @property
    def gathered(self) -> Evidence:
        """What was measured; only tests of a study ask for it, and they run after that."""
        assert self.evidence is not None
        return self.evidence

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Everything that the selected tests need is measured before the first of them runs."""
        option = self.config.option
        stopped = session.testsfailed and not option.continue_on_collection_errors
        plans = selected(session.items)
        if not plans or stopped or option.collectonly:
            return
        try:
            self._check_outputs()
            lock = files.locked(option.results, "wait for it, or choose another with --results")
            self.held.enter_context(lock)
            workers = option.workers and executor(option.workers, self._say)
            lm = tempo.load_model(option.model, option.dtype, option.device)
            for line in described(workers, lm) if workers else ():
                self._say(line)
            evidence = Evidence(lm, plans, option.results, option.chat, workers or None)
            evidence.gather(
                lambda windows, reused, notes: Progress(self.config, windows, reused, notes)
            )
        except Exception as error:
            raise pytest.UsageError(_one_line(failure_of(error).why)) from None
        self.evidence = evidence

    def _say(self, line: str) -> None:
        """Tell the user in a line what cannot wait for the end."""
        reporter: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.write_line(f"tempo: {_one_line(line)}")

    def _check_outputs(self) -> None:
        """Whatever cannot be written is said before a model runs."""
        option = self.config.option
        files.check_folder(option.results, "--results")
        files.check_file(option.findings, "--findings")
        if option.summary:
            files.check_file(option.summary, "--summary")
        if job := os.environ.get("GITHUB_STEP_SUMMARY"):
            try:
                files.append(job, b"")
            except OSError as error:
                raise ResultsError(
                    f"cannot write to {job}, which the variable GITHUB_STEP_SUMMARY names: "
                    f"{files.reason(error)}; name a file that can be written, or unset it"
                ) from None

    def finding(self, plan: Plan, claim: ClaimTest) -> Finding | str:
        """What the data said about a claim, or why there is nothing to say."""
        if self.evidence is None:
            return "nothing was measured"
        return self.evidence.finding(plan, claim)

    def cases(self, plan: Plan) -> list[Any]:
        """The cases of a plan; a test that asks for those of a failed one fails with the reason."""
        if why := self.gathered.failures.get(plan.name):
            pytest.fail(f"{plan} could not be measured: {why}", pytrace=False)
        return measured_prompts(self.gathered.cases[plan.name])

    def own_case(self, plan: Plan) -> Any:
        return self.gathered.own_case[plan.name]

    def regression(self, finding: Finding, plan: Plan) -> str:
        """How a finding differs from the expected one; empty if not, or if it is accepted anew.

        A test that is run again, as plugins for flaky tests do, is told the same.
        """
        of = plan.name, finding.claim
        if of not in self.regressions:
            self.regressions[of] = self._regression(finding, plan)
        return self.regressions[of]

    def _regression(self, finding: Finding, plan: Plan) -> str:
        self.asked.append((plan, finding))
        if self.config.getoption("update_expectations"):
            return ""
        path = self._expected_in(plan)
        try:
            if path not in self.expectations:
                self.expectations[path] = read(path)
        except TempoError as error:
            return f"{_one_line(str(error))}; repair it, or write it again: --update-expectations"
        own = bool(self.config.getoption("config"))
        now = self.gathered.circumstances(plan)
        said = other_weights(self.expectations[path], plan.name, now, path)
        if said and said not in self.notices and not own:
            self.notices.insert(0, said)  # above all others: it is about every claim
        found = check(finding, self.expectations[path], now, path, own)
        self.failures += [found.failure] if found.failure else []
        self.notices += [found.notice] if found.notice else []
        return found.failure

    def _expected_in(self, plan: Plan) -> Path:
        lm = self.gathered.lm
        return file_of(plan.module, lm.name, lm.provenance()["dtype"])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep each test's outcome for the report."""
        if report.when == "call" or report.outcome != "passed":
            self.tests.append(report)

    @pytest.hookimpl(tryfirst=True)  # what another plugin raises here takes no result along
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Expectations are rewritten, then the records, the report and the summary written."""
        if self.evidence is None:
            return
        if session.exitstatus == pytest.ExitCode.INTERRUPTED:
            self.report_problems = [
                f"interrupted: {self.config.option.findings} was left as it is; what was measured "
                "is kept, and 'tempo report' makes a page of it"
            ]
            return
        if self.config.getoption("update_expectations") and self.asked:
            session.exitstatus = self._update() or session.exitstatus
        from tempo.harness import report

        try:
            self.report_problems = report.write(self)
        except (TempoError, OSError) as error:
            self.report_problems = [f"no report: {error}"]
        if self.report_problems and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _update(self) -> int:
        """Accept what was found, file by file; the exit code if that is refused, else 0."""
        for path in dict.fromkeys(self._expected_in(plan) for plan, _ in self.asked):
            of_file = [pair for pair in self.asked if self._expected_in(pair[0]) == path]
            findings = [finding for _, finding in of_file]
            made = {plan.name: self.gathered.circumstances(plan) for plan, _ in of_file}
            try:
                self.notices.append(update(path, self.gathered.lm.name, findings, made))
            except TempoError as error:
                self.notices.append(f"nothing rewritten: {error}")
                return pytest.ExitCode.USAGE_ERROR
        return 0

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.evidence is not None:
            from tempo.harness import report

            report.summarise(self, terminalreporter)

    def pytest_unconfigure(self) -> None:
        self.held.close()
        if self.evidence is not None:
            self.evidence.lm.close()


def selected(items: Iterable[pytest.Item]) -> list[Plan]:
    """The plans that these tests need, each once, in order."""
    found = {plan.name: plan for item in items if (plan := _plan_of(item))}
    return list(found.values())


def _plan_of(item: pytest.Item) -> Plan | None:
    if isinstance(item, ClaimItem):
        return item.plan
    found = getattr(getattr(item, "callspec", None), "params", {}).get("plan")
    return found if isinstance(found, Plan) else None


def _needs_evidence(item: pytest.Item) -> bool:
    """Whether a test reads what was measured."""
    return _plan_of(item) is not None or "lm" in getattr(item, "fixturenames", ())


def _nobodys(path: Path, studies: Iterable[str]) -> str:
    """What to say of a --config that names a study which nobody has."""
    name, known = load_yaml(StudyConfig, path).experiment, sorted(studies)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"collected: {', '.join(known) or 'none'}"
    return f"{path}: no study is called {name!r}; {hint}"


def _one_line(text: str) -> str:
    return escaped(" ".join(text.split()))
