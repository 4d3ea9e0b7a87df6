"""All cases and findings of a session: measured once, each on disk before the next, then judged."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import tempo
from tempo import files
from tempo.claims import Finding, correct, inapplicable, judge
from tempo.errors import ResultsError
from tempo.harness.checks import case_class
from tempo.harness.elsewhere import measure_elsewhere, setup_of
from tempo.harness.execute import (
    Failure,
    Task,
    code_fingerprint,
    prompts_at_once,
    windows_of,
)
from tempo.harness.expectations import circumstances
from tempo.harness.plan import Plan, family_sizes
from tempo.harness.runs import Prompt
from tempo.harness.store import Store
from tempo.harness.study import ClaimTest
from tempo.harness.watch import Measured, Sets, measure
from tempo.identity import maker_sha256
from tempo.models import LanguageModel
from tempo.records import append_jsonl, plain, read_jsonl
from tempo.statistics import SEED
from tempo.workers import Executor


@dataclass
class Evidence:
    """What the selected plans gave.

    cases: by plan, one for each prompt, None where the prompt has nothing to say.
    judged: by plan, the prompt of each of these cases, and the sets that its free runs chose.
    failures: by plan, why it could not be measured; unjudged: by plan and claim, why there is no
    finding; inapplicable: by plan, why nothing of it can be measured on this model.
    workers: who measures, if not this process.
    """

    lm: LanguageModel
    plans: list[Plan]
    results: Path
    chat: bool = False
    workers: Executor | None = None
    cases: dict[str, list[Any]] = field(default_factory=dict)
    own_case: dict[str, Any] = field(default_factory=dict)
    judged: dict[str, list[tuple[Prompt, Sets]]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    unjudged: dict[tuple[str, str], str] = field(default_factory=dict)
    inapplicable: dict[str, str] = field(default_factory=dict)
    num_reused: int = 0
    seconds: float = 0.0
    fingerprints: dict[str, str] = field(default_factory=dict)
    model_sha256: str = ""
    maker: str = ""  # a hash of what every result depends on beside its spec
    notes: list[str] = field(default_factory=list)  # what on disk could not be used, and why

    def gather(self, progress: Any) -> None:
        """Measure whatever is not on disk yet, and judge every claim.

        progress: from (windows of tasks, how many are on disk already, what on disk cannot be used)
        to a context manager that gives something with two functions: `report`, to be called with
        each task as it ends, and `ran`, with a task and how many runs it was given. Raises
        ResultsError if the results cannot be written.
        """
        began = time.perf_counter()
        files.check_folder(self.results, "--results")
        self._sweep()
        # The weights are read for both, so each is asked for once.
        self.model_sha256, self.maker = self.lm.sha256, maker_sha256(self.lm)
        # one for each study: its cases do not depend on which others are selected
        for plan in self.plans:
            if plan.study.name not in self.fingerprints:
                self.fingerprints[plan.study.name] = code_fingerprint(self.maker, plan.module)
        for plan in self.plans:
            if why := plan.study.reason_against(self.lm, plan.config.capture):
                self.inapplicable[plan.name] = why
        self._measure(progress)
        self._judge()
        self.seconds = time.perf_counter() - began

    def _sweep(self) -> None:
        """Remove what killed sessions left in the folders that this one writes to."""
        for plan in self.plans:
            files.sweep(self.results / plan.folder, self.results / plan.folder / "figures")

    def store(self, plan: Plan) -> Store:
        """Where the raw results of a plan's own prompt are kept."""
        manifest = {
            "family": plan.name,
            # of the prompts only the own one matters to what is kept here
            "config": plan.config.model_dump(mode="json", exclude={"suite"}),
            "chat": self.chat,
            **self.lm.provenance(),
            "model_sha256": self.model_sha256,
            "fingerprint": self.fingerprints[plan.study.name],
            "tempo": tempo.__version__,
            # decoding draws no random numbers; this is the seed of permutation and bootstrap
            "seed": SEED,
        }
        return Store(self.results / plan.folder, manifest)

    def finding(self, plan: Plan, claim: ClaimTest) -> Finding | str:
        """What the data said about a claim, or why there is no finding."""
        if why := self.failures.get(plan.name):
            return f"{plan} could not be measured: {why}"
        if why := self.unjudged.get((plan.name, claim.id)):
            file = self.results / plan.folder / "cases.jsonl"
            return f"{claim.id} could not be judged: {why}; its cases are in {file}"
        return next(
            f for f in self.findings if f.claim == claim.id and f.context["config"] == plan.name
        )

    def circumstances(self, plan: Plan) -> dict[str, Any]:
        """What the plan's numbers depend on."""
        config = plan.config.model_dump(mode="json", exclude={"suite"})
        suite = plan.suite.sha256[:16] if plan.suite else "none"
        return circumstances(
            config,
            self.lm.provenance(),
            self.model_sha256,
            self.fingerprints[plan.study.name],
            suite + (" as chats" if self.chat else ""),
        )

    def described(self) -> str:
        """A sentence about the prompts that were measured: how many, how long, from which suite."""
        suites = {plan.suite.sha256: plan.suite for plan in self.plans if plan.suite}
        said = []
        for key, suite in suites.items():
            plans = [plan for plan in self.plans if plan.suite and plan.suite.sha256 == key]
            texts = dict.fromkeys(prompt.text for plan in plans for prompt in plan.prompts)
            measured = tuple(prompt for prompt in suite.prompts if prompt.text in texts)
            lengths = [self._length(prompt.text) for prompt in measured] if measured else []
            said.append(replace(suite, prompts=measured).describe(lengths))
            if len(texts) > len(measured):
                said[-1] += ", and each config's own prompt"
        return "; ".join(said) or "each config's own prompt only"

    def _length(self, text: str) -> int:
        """How many tokens the model reads."""
        return len(self.lm.chat(text) if self.chat else self.lm.encode(text))

    def _tasks(self) -> list[Task]:
        tasks = []
        for plan in self.plans:
            if plan.name in self.inapplicable:
                continue
            for text, category in plan.prompts:
                store = self.store(plan) if text == plan.config.prompt else None
                captures = plan.study.captures
                prompt = Prompt(text, category, plan.config, self.lm, store, captures, self.chat)
                tasks.append(Task(plan, prompt))
        return tasks

    def _measure(self, progress: Any) -> None:
        """Every task's case: read if an earlier session measured it, else measured and kept."""
        tasks = self._tasks()
        keys = [task.key(self.fingerprints[task.plan.study.name]) for task in tasks]
        readers = {plan.name: TypeAdapter(case_class(plan.study)) for plan in self.plans}
        stored = self._stored()
        found: dict[str, Any] = {}
        key_of = {
            (task.plan.name, task.prompt.text): key for task, key in zip(tasks, keys, strict=True)
        }

        def own_key(task: Task) -> str:
            return key_of[task.plan.name, task.prompt.text]

        for task, key in zip(tasks, keys, strict=True):
            try:
                self._check_files(task, stored[key])
                found[key] = _read(readers[task.plan.name], stored[key]["case"])
            except (KeyError, ValidationError, ResultsError) as error:
                if key in stored:
                    why = " ".join(str(error).split())
                    self.notes.append(f"{task.plan}, {task.prompt.text!r:.40}: {why}")
        on_disk = dict(found)
        windows = []
        for window in windows_of(tasks, prompts_at_once(self.lm)):
            together = _measured_together(list(map(own_key, window)), stored, set(on_disk))
            windows.append([task for task in window if own_key(task) in together])
        to_do = [task for window in windows for task in window]
        name_of = {own_key(t): _name(map(own_key, window)) for window in windows for t in window}
        self.num_reused = len(tasks) - len(to_do)
        sets: dict[str, Sets] = {}  # by the task's key

        def is_wanted(task: Task) -> bool:
            """Its case is not on disk, and its plan has not failed on another prompt."""
            return own_key(task) not in on_disk and task.plan.name not in self.failures

        with progress(windows, self.num_reused, self.notes) as shown:
            for task, outcome, chosen in self._measured(windows, is_wanted, shown):
                key = own_key(task)
                sets[key] = chosen
                try:
                    # as it will be read back
                    found[key] = self._keep(
                        task,
                        key,
                        outcome,
                        readers[task.plan.name],
                        {"window": name_of[key], "sets": chosen},
                        stored.get(key),
                    )
                except (TypeError, ValueError) as error:
                    outcome = Failure(f"its case cannot be kept: {' '.join(str(error).split())}")
                if isinstance(outcome, Failure):
                    where = f"on {task.prompt.text!r}, {outcome.why}"
                    self.failures.setdefault(task.plan.name, where)
                shown.report(task)
        for task, key in zip(tasks, keys, strict=True):
            if task.plan.name in self.failures:
                continue
            cases = self.cases.setdefault(task.plan.name, [])
            if task.plan.judges(task.prompt.text):
                cases.append(found[key])
                known = sets.get(key) or (stored.get(key) or {}).get("sets") or {}
                self.judged.setdefault(task.plan.name, []).append((task.prompt, known))
            if task.prompt.store:
                self.own_case[task.plan.name] = found[key]

    def _measured(self, windows: list[list[Task]], is_wanted: Any, shown: Any) -> Measured:
        """What each task gives, in this process or from workers."""
        if self.workers is None:
            return measure(self.lm, windows, is_wanted, shown.ran)
        plans = [plan for plan in self.plans if plan.name not in self.inapplicable]
        setup = setup_of(self.lm, plans, self.results, self.chat, self.workers.number)
        return measure_elsewhere(self.workers, setup, windows, is_wanted, shown.ran)

    def _stored(self) -> dict[str, dict[str, Any]]:
        """The records of cases on disk, by their keys; damaged lines are noted."""
        stored = {}
        for path in {self.results / plan.folder / "cases.jsonl": None for plan in self.plans}:
            records, damaged = read_jsonl(path)
            self.notes += damaged
            stored |= {str(record.get("key")): record for record in records}
        return stored

    def _check_files(self, task: Task, record: dict[str, Any]) -> None:
        """Raise ResultsError unless the raw results on disk are those that belong to the case.

        They may have been written again since then, for another model or by another config.
        """
        if task.prompt.store is None:
            return
        written = record.get("files")
        if not isinstance(written, dict):
            raise ResultsError("its record does not say which raw results belong to it")
        for name, digest in written.items():
            if task.prompt.store.sha256(name) != digest:
                raise ResultsError(
                    f"{task.prompt.store.folder / name} is missing, or of another run; it is "
                    "measured again"
                )

    def _keep(
        self,
        task: Task,
        key: str,
        outcome: Any,
        reader: TypeAdapter[Any],
        beside: Mapping[str, Any],
        stored: Any,
    ) -> Any:
        """Keep a case and read it again. Raises TypeError or ValueError if it is not plain.

        beside: what else its record says: `window`, the name of all tasks that it was measured
        with, and `sets`, those of its free runs. stored: its record of an interrupted session, to
        which nothing is added if it says the same.
        """
        if isinstance(outcome, Failure):
            return None
        case = plain(outcome)
        read = _read(reader, json.loads(json.dumps(case)))
        record = {
            "key": key,
            "prompt": task.prompt.text,
            "category": task.prompt.category,
            "case": case,
            **beside,
        }
        if task.prompt.store:
            record["files"] = dict(task.prompt.store.written)
        known = {name: (stored or {}).get(name) for name in ("case", "window", "sets", "files")}
        if known == {name: record.get(name) for name in known}:
            return read
        append_jsonl(self.results / task.plan.folder / "cases.jsonl", [record])
        return read

    def _judge(self) -> None:
        """The finding of every claim, corrected over its family."""
        findings = []
        for plan in self.plans:
            cases = [] if plan.name in self.inapplicable else self.cases.get(plan.name)
            if cases is None:
                continue
            context = {
                "experiment": plan.study.name,
                "config": plan.name,
                "model": self.lm.name,
                "dtype": self.lm.provenance()["dtype"],
                "variant": plan.variant,
                "n_prompts": len(cases),
                "drawn": plan.suite.drawn if plan.suite else "",
                "model_sha256": self.model_sha256,
                "fingerprint": self.fingerprints[plan.study.name],
            }
            for claim in plan.claims:
                dated = context | {"registered": claim.claim.registered}
                if why := self.inapplicable.get(plan.name) or claim.reason_against(self.lm):
                    findings.append(inapplicable(claim.claim, why, dated))
                    continue
                try:
                    findings.append(judge(claim.claim, cases, dated))
                # of one claim's statistic: the findings of the others are not lost for it
                except Exception as error:
                    self.unjudged[plan.name, claim.id] = f"{type(error).__name__}: {error}"
        self.findings = correct(findings, family_sizes(self.plans))
        append_jsonl(
            self.results / "findings.jsonl", [finding.record() for finding in self.findings]
        )


def _name(keys: Iterable[str]) -> str:
    """A name for the tasks of these keys, in any order."""
    return hashlib.sha256(" ".join(sorted(keys)).encode()).hexdigest()[:16]


def _measured_together(
    keys: Sequence[str], stored: Mapping[str, Any], on_disk: set[str]
) -> set[str]:
    """Which tasks of a window to measure: those not on disk, and those that belong to them.

    A killed session leaves a part of a window. The rest alone would have batches of other shapes,
    and so other last bits. So all that was to be measured together is measured together again. What
    a session before that measured without them stays as it is.
    """
    missing = {key for key in keys if key not in on_disk}
    for name in {stored[key].get("window") for key in keys if key in on_disk} if missing else ():
        begun = {key for key in keys if key in on_disk and stored[key].get("window") == name}
        if _name(missing | begun) == name:
            return missing | begun
    return missing


def _read(reader: TypeAdapter[Any], case: Any) -> Any:
    """A case from its record, checked against its class; None stays None."""
    return None if case is None else reader.validate_python(case)


def measured_prompts(cases: Sequence[Any]) -> list[Any]:
    """The cases of the prompts that have one."""
    return [case for case in cases if case is not None]
