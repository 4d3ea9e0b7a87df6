"""The pytest plugin: options, collection of claims, one measurement for all tests, and the report.

It is an entry point, so every pytest run where tempo is installed imports it. Nothing here
imports torch or transformers before a study has been collected.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tempo.errors import TempoError

if TYPE_CHECKING:
    from tempo.harness.session import Session

session_key = pytest.StashKey["Session"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tempo", "studies of parallel tokens (tempo)")
    group.addoption(
        "--model",
        default="smollm2-135m",
        metavar="NAME",
        help="a known model (tempo models), a folder, a .gguf file or a hub id",
    )
    group.addoption("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:<n>")
    group.addoption("--dtype", default="float32", metavar="T", help="float32, bfloat16 or float64")
    group.addoption(
        "--suite",
        metavar="FILE",
        help="prompts to measure: .txt, .csv, .jsonl, .yaml, or hf:dataset[:column]",
    )
    group.addoption(
        "--prompts", type=int, metavar="N", help="a part of the suite, spread over its categories"
    )
    group.addoption(
        "--chat",
        action="store_true",
        help="each prompt is a user's message in the model's template",
    )
    group.addoption(
        "--workers",
        metavar="W",
        help="who measures: a number of processes, a folder that hosts share (tempo work FOLDER), "
        "ray or ray:N; by default this process",
    )
    group.addoption(
        "--config",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="run the study this YAML file names, instead of the configs beside it; repeatable",
    )
    group.addoption(
        "--results",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="where raw results go (default: results)",
    )
    group.addoption(
        "--findings",
        type=Path,
        default=Path("reports/findings.html"),
        metavar="FILE",
        help="the report (default: reports/findings.html)",
    )
    group.addoption(
        "--update-expectations",
        action="store_true",
        help="accept what the selected claims show as the new baseline; not in CI",
    )
    group.addoption("--strict-claims", action="store_true", help="a refuted claim fails its test")
    group.addoption(
        "--summary", type=Path, metavar="FILE", help="the findings as Markdown, for a CI job's page"
    )
    parser.addini("tempo_suite", "the suite of prompts if no --suite is given")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Threads that wait sleep, unless the environment says otherwise.

    Those that spin starve beside any other load. torch reads it once, when a conftest or a study
    imports it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    from tempo.harness import hooks

    pluginmanager.add_hookspecs(hooks)


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("update_expectations"):
        if _in_ci():
            raise pytest.UsageError(
                "--update-expectations is refused in CI (CI is set): rewrite them at a desk, look "
                "at them, commit them"
            )
        if config.getoption("config"):
            raise pytest.UsageError(
                "--update-expectations is for the configs beside the studies; leave out --config"
            )

    if not hasattr(config, "workerinput"):
        _check_other_outputs(config)


def _check_other_outputs(config: pytest.Config) -> None:
    """What other plugins would only find out at the end, with a traceback that hides the report."""
    for option, name in (("htmlpath", "--html"), ("xmlpath", "--junitxml")):
        if path := config.getoption(option, None):
            from tempo.files import check_file

            try:
                check_file(os.path.expanduser(os.path.expandvars(path)), name)
            except TempoError as error:
                raise pytest.UsageError(str(error)) from None


def _session(config: pytest.Config) -> Session | None:
    """What the session knows of studies, None if no module that was collected has one."""
    if session_key not in config.stash and "tempo.harness.study" in sys.modules:
        from tempo.harness.session import Session

        config.stash[session_key] = Session(config)
        config.pluginmanager.register(config.stash[session_key], "tempo-session")
    return config.stash.get(session_key, None)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """What is wrong with a study is kept for one line of its own, instead of a traceback."""
    report: Any = yield
    error = report.call.excinfo.value if getattr(report, "call", None) and report.failed else None
    session = _session(collector.config)
    if isinstance(error, TempoError) and session:
        session.problems.append(str(error))
        report.outcome, report.longrepr, report.result = "passed", None, []
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> Any:
    """A claim becomes an item for each config of its study."""
    session = _session(collector.config)
    return session.items_of(collector, name, obj) if session else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A plain test that reads what was measured runs once for each config of its study."""
    session = _session(metafunc.config)
    if session and "plan" in metafunc.fixturenames:
        plans = session.plans_in(metafunc.module) if metafunc.module else []
        metafunc.parametrize("plan", plans, ids=[plan.slug for plan in plans])


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    if config.getoption("config") and not _session(config):
        raise pytest.UsageError("--config: no study was collected; name the folder of the studies")


# Under pytest-xdist each worker is a session of its own, which would measure everything again.
ALONE = (
    "tempo measures once for all tests of a session, which several processes cannot share; "
    "leave out -n, or say -n 0, to run the studies ({})"
)
refused_key = pytest.StashKey[str]()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended: whether it left studies out."""
    if left_out := getattr(node, "workeroutput", {}).get("tempo"):
        node.config.stash[refused_key] = left_out


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if refused_key in session.config.stash:
        session.exitstatus = pytest.ExitCode.USAGE_ERROR


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if refused_key in config.stash:
        line = f"ERROR: {ALONE.format(config.stash[refused_key])}"
        terminalreporter.write_line(line, red=True)


@pytest.fixture(scope="session")
def lm(pytestconfig: pytest.Config) -> Any:
    """The model named by --model."""
    return pytestconfig.stash[session_key].gathered.lm


@pytest.fixture
def cases(plan: Any, request: pytest.FixtureRequest) -> list[Any]:
    """What was measured: a case for each prompt that has one.

    On a model that the study cannot have the test is inapplicable.
    """
    session = request.config.stash[session_key]
    if why := session.gathered.inapplicable.get(plan.name):
        request.node.user_properties.append(("verdict", INAPPLICABLE))
        pytest.skip(f"not applicable: {why}")
    return session.cases(plan)


@pytest.fixture
def own_case(plan: Any, cases: list[Any], pytestconfig: pytest.Config) -> Any:
    """What was measured on the config's own prompt, None if it has nothing to say."""
    return pytestconfig.stash[session_key].own_case(plan)


@pytest.fixture
def store(plan: Any, own_case: Any, pytestconfig: pytest.Config) -> Any:
    """The raw results of the config's own prompt.

    Without a case of it the test is skipped. In CI it is an error: nobody would see a skip there.
    """
    if own_case is None:
        say = f"the own prompt of {plan} has nothing to say; give its config another one"
        if _in_ci():
            pytest.fail(say, pytrace=False)
        pytest.skip(say)
    return pytestconfig.stash[session_key].gathered.store(plan)


# Letters of the progress line; upper case, as they are no failures and no skips.
INAPPLICABLE = "INAPPLICABLE"
LETTERS = {"SUPPORTED": "S", "REFUTED": "R", "INCONCLUSIVE": "I", INAPPLICABLE: "N"}


def verdict_of(report: Any) -> str:
    """The verdict of a claim's test, empty for other tests."""
    # a collection report has no properties
    return dict(getattr(report, "user_properties", ())).get("verdict", "")


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> Any:
    """A test of a claim counts by its verdict: `3 supported, 1 refuted`.

    One that reads what was measured, where that is not applicable, is no skip but inapplicable.
    """
    verdict = verdict_of(report)
    judged = report.when == "call" and report.passed and verdict
    if judged or (report.skipped and verdict == INAPPLICABLE):
        return verdict.lower(), LETTERS[verdict], verdict
    return None


@pytest.hookimpl(optionalhook=True)
def pytest_html_results_table_header(cells: list[str]) -> None:
    cells.insert(1, '<th class="sortable" data-column-type="verdict">Verdict</th>')


@pytest.hookimpl(optionalhook=True)
def pytest_html_results_table_row(report: pytest.TestReport, cells: list[str]) -> None:
    cells.insert(1, f'<td class="col-verdict">{verdict_of(report).lower()}</td>')
