"""Studies outside this repository run as they are; what is wrong with one is a line."""

import json
import re
from xml.etree import ElementTree

import pytest

# What a run inside this process imports is forgotten after it, and compiled modules cannot be
# imported twice: so they are imported here.
import tempo
import tempo.harness.report
import tempo.harness.session
from tempo.claims import Claim, judge
from tempo.harness.execute import code_fingerprint, imported_files
from tempo.reporting import figures
from tests.studies import CONFIG, PROMPTS, STUDY

ARGUMENTS = ("--model", "tiny", "-p", "no:cacheprovider", "-p", "no:hypothesispytest")


@pytest.fixture(scope="module", autouse=True)
def imported(tiny):
    """Whatever is imported late, by a first run and a first judgement."""
    tempo.generate(tiny, "Es war", max_steps=1)
    claim = Claim("a.b", "a", "a", float, "greater", "less", float, "none", margin=0.1)
    judge(claim, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])


@pytest.fixture
def folder(pytester, monkeypatch):
    """A folder with a sound study, its config, and six German prompts; at a desk, not in CI."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    pytester.path.joinpath("test_entropy.py").write_text(STUDY, encoding="utf-8")
    pytester.path.joinpath("entropy.yaml").write_text(CONFIG, encoding="utf-8")
    pytester.path.joinpath("prompts.txt").write_text(PROMPTS, encoding="utf-8")
    return pytester


def run(folder, *arguments):
    return folder.runpytest_inprocess(*ARGUMENTS, *map(str, arguments))


def change(folder, name, old, new):
    """Replace a piece of one of the study's files, which must be there."""
    path = folder.path / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def write(folder, name, text):
    path = folder.path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def page(folder):
    return (folder.path / "reports/findings.html").read_text(encoding="utf-8")


def test_a_study_runs_in_a_folder_of_its_own_on_prompts_of_its_own(folder):
    result = run(folder, ".", "--suite", "prompts.txt", "--junit-xml", "junit.xml")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*entropy.visible-is-less-sure*", "*1 passed, 1 *"])
    report = page(folder)
    assert "Seeing siblings makes the next distribution flatter." in report
    assert "6 prompts" in report
    assert "prompts.txt" in report
    assert "English" not in report
    records = (folder.path / "results/entropy/cases.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in records]
    assert prompts == ["The cat sat on the", *PROMPTS.splitlines()]


def test_a_claim_is_a_test_of_its_own_module_with_its_own_line_and_mark(folder):
    result = run(
        folder, "--suite", "prompts.txt", "--junit-xml", "junit.xml", "-o", "junit_family=xunit1"
    )
    assert result.ret == 0
    (case,) = [
        case
        for case in ElementTree.parse(folder.path / "junit.xml").iter("testcase")
        if case.get("name") == "test_visible_is_less_sure[entropy]"
    ]
    assert case.get("file") == "test_entropy.py"
    line = STUDY.splitlines()[int(case.get("line"))]
    assert line.startswith("@study.claim")
    found = {p.get("name"): p.get("value") for p in case.iter("property")}
    assert found["verdict"] in ("SUPPORTED", "REFUTED", "INCONCLUSIVE")
    for selection in (
        ("-k", "entropy"),
        ("-m", "entropy"),
        ("test_entropy.py::test_visible_is_less_sure[entropy]",),
    ):
        assert run(folder, "--suite", "prompts.txt", "--collect-only", *selection).ret == 0
    assert run(folder, "--suite", "prompts.txt", "--collect-only", "-m", "not entropy").ret == 5


def test_measuring_is_apart_from_the_first_test(folder):
    """What the first test is said to take is its own: all was measured before."""
    result = run(folder, "--suite", "prompts.txt", "--durations=0", "-vv")
    shown = re.findall(r"([\d.]+)s (?:setup|call)\s+test_entropy", result.stdout.str())
    assert all(float(seconds) < 0.5 for seconds in shown)
    result.stdout.fnmatch_lines(["*tempo: measured 7 prompt cases in*"])


# What is wrong, which file is changed how, with which arguments, and what the one line says.
WRONG = {
    "no config": (
        (),
        (),
        "study 'entropy' in test_entropy.py has no config; expected entropy.yaml",
    ),
    "a config of another study": (
        [("entropy.yaml", "experiment: entropy", "experiment: exp3")],
        (),
        "entropy.yaml is a config of 'exp3', but its name makes it one of 'entropy'",
    ),
    "a misspelt key": (
        [("entropy.yaml", "threshold:", "treshold:")],
        (),
        "unknown key 'treshold'; did you mean 'threshold'?",
    ),
    "two claims of one id": (
        [
            (
                "test_entropy.py",
                "def test_cases(cases):\n    assert cases",
                STUDY[STUDY.index("@study.claim") : STUDY.index("@test_visible")],
            )
        ],
        (),
        "two claims are called entropy.visible-is-less-sure",
    ),
    "a yield of no run": (
        [("test_entropy.py", "source = yield run(prompt)", "source = yield prompt")],
        (),
        "modes of study 'entropy' yields a Prompt (test_entropy.py, line 17); expected run(prompt",
    ),
    "a claim that reads what the case has not": (
        [("test_entropy.py", "return case.gap", "return case.gpa")],
        (),
        "test_visible_is_less_sure reads case.gpa; did you mean 'gap'?",
    ),
    "a case made with a misspelt field": (
        [("test_entropy.py", "Case(gap=", "Case(gp=")],
        (),
        "modes of study 'entropy' gives its case 'gp'; did you mean 'gap'?",
    ),
    "a case made without a field": (
        [("test_entropy.py", ", again=gap(source, isolated)", "")],
        (),
        "modes of study 'entropy' makes a case without again",
    ),
    "a claim without a control": (
        [("test_entropy.py", "@test_visible_is_less_sure.control\n", "")],
        (),
        "claim entropy.visible-is-less-sure has no control, so nothing shows that it can fail",
    ),
    "a claim without a statement": (
        [
            (
                "test_entropy.py",
                '    """Seeing siblings makes the next distribution flatter."""\n',
                "",
            )
        ],
        (),
        "claim entropy.visible-is-less-sure says nothing: its docstring is the statement",
    ),
    "a margin without a reason": (
        [("test_entropy.py", ', because="a twentieth of a nat"', "")],
        (),
        "claim entropy.visible-is-less-sure has a margin of 0.05 without a reason",
    ),
    "two directions": (
        [("test_entropy.py", "more_than=0.05", "more_than=0.05, less_than=0.5")],
        (),
        "claim entropy.test_visible_is_less_sure says more_than and less_than what must be so",
    ),
    "a planned effect that is the margin": (
        [("test_entropy.py", "Planned(0.15", "Planned(0.05")],
        (),
        "entropy.visible-is-less-sure",
    ),
    "a measurement that is no generator": (
        [("test_entropy.py", "yield ", "")],
        (),
        "modes measures study 'entropy' but is no generator",
    ),
    "a measurement that returns no dataclass": (
        [
            (
                "test_entropy.py",
                "return Case(gap=gap(visible, isolated), again=gap(source, isolated))",
                "return {}",
            )
        ],
        (),
        "modes of study 'entropy' returns no dataclass",
    ),
    "no measurement": (
        [("test_entropy.py", "@study.measure\n", "")],
        (),
        "study 'entropy' measures nothing",
    ),
    "a capture that there is not": (
        [("test_entropy.py", 'sobering?")', 'sobering?", captures=("logit",))')],
        (),
        "study 'entropy' captures 'logit'; expected some of",
    ),
    "a name that no study can have": (
        [("test_entropy.py", 'Study("entropy"', 'Study("Entropy!"')],
        (),
        "a study is called 'Entropy!'; expected lower-case letters",
    ),
    "two studies in one module": (
        [
            (
                "test_entropy.py",
                "@dataclass",
                'other = Study("other", title="Other")\n\n\n@dataclass',
            )
        ],
        (),
        "test_entropy.py holds several studies (entropy, other); keep one",
    ),
    "a config of nobody's": (
        [],
        ("--config", "mine.yaml"),
        "mine.yaml: no study is called 'entropie'; did you mean 'entropy'?",
    ),
    "two configs of one name": (
        [],
        ("--config", "a/mine.yaml", "--config", "b/mine.yaml"),
        "two configs are called mine",
    ),
    "a model that there is not": ([], ("--model", "smollm2-135"), "did you mean 'smollm2-135m'?"),
    "a dtype that there is not": ([], ("--dtype", "float8"), "dtype is 'float8'; expected one of"),
    "a device that there is not": ([], ("--device", "gpu"), "device is 'gpu'; expected 'cpu'"),
    "a suite that there is not": ([], ("--suite", "none.txt"), "cannot read the suite none.txt"),
    "a suite of a config that there is not": (
        [("entropy.yaml", CONFIG, CONFIG + "suite: none.txt\n")],
        (),
        "cannot read the suite",
    ),
    "a suite without prompts": (
        [],
        ("--suite", "table.csv"),
        "table.csv line 2 has no 'prompt'; rename 'promt'",
    ),
    "more prompts than there are": (
        [],
        ("--prompts", "7"),
        "--prompts 7: expected a number from 1 to 6",
    ),
    "a report that is a folder": ([], ("--findings", "a"), "a is a folder; give --findings the"),
    "a report in no folder": ([], ("--findings", "mine.yaml/x.html"), "with --findings"),
    "no suite": (
        [],
        ("--no-suite",),
        "entropy.yaml measures a suite of prompts, but none is given",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_a_study_is_one_line(folder, wrong):
    changes, arguments, line = WRONG[wrong]
    if changes == ():
        (folder.path / "entropy.yaml").unlink()
    for name, old, new in changes:
        change(folder, name, old, new)
    write(folder, "mine.yaml", CONFIG.replace("entropy", "entropie"))
    write(folder, "a/mine.yaml", CONFIG)
    write(folder, "b/mine.yaml", CONFIG)
    write(folder, "table.csv", "promt,category\nEs war,x\n")
    write(folder, "reports/findings.html", "an earlier report")
    suite = () if "--no-suite" in arguments else ("--suite", "prompts.txt")
    given = [argument for argument in arguments if argument != "--no-suite"]
    result = run(folder, ".", *suite, *given)
    errors = [text for text in result.stderr.lines if text.strip()]
    assert result.ret == 4, result.stdout.str()[-2000:]
    assert len(errors) == 1, errors
    assert errors[0].startswith("ERROR: ")
    assert line in errors[0]
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    # a run that gathered no evidence replaces no report
    assert (folder.path / "reports/findings.html").read_text() == "an earlier report"
    assert not list((folder.path / "results").glob("*"))


def test_a_config_may_name_the_suite_that_it_measures(folder):
    write(folder, "own.yaml", "drawn: 2026-11-28\nprompts: [Es war einmal, Der Hund]\n")
    write(folder, "sub/mine.yaml", CONFIG + "suite: ../own.yaml\n")
    for suite in ((), ("--suite", "prompts.txt")):
        assert run(folder, ".", *suite, "--config", "sub/mine.yaml").ret == 0
        records = (folder.path / "results/mine/cases.jsonl").read_text(encoding="utf-8")
        prompts = {json.loads(line)["prompt"] for line in records.splitlines()}
        assert prompts == {"The cat sat on the", "Es war einmal", "Der Hund"}
    assert "2 prompts" in page(folder)
    assert run(folder, ".", "--suite", "prompts.txt").ret == 0  # the control: another config's
    assert len((folder.path / "results/entropy/cases.jsonl").read_text().splitlines()) == 7


def test_a_config_that_is_selected_keeps_the_name_that_it_has_among_all(folder):
    write(folder, "entropy_other.yaml", CONFIG + "results: entropy_other\n")
    assert run(folder, "--suite", "prompts.txt", "--config", "entropy_other.yaml").ret == 0
    records = (folder.path / "results/findings.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["context"]["variant"] for line in records} == {"other"}
    write(folder, "mine/other.yaml", CONFIG)  # the control: of one's own, it is the only one
    assert run(folder, "--suite", "prompts.txt", "--config", "mine/other.yaml").ret == 0
    records = (folder.path / "results/findings.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(records[-1])["context"]["variant"] == ""


def test_two_studies_may_not_share_a_results_folder_or_a_name(folder):
    write(folder, "test_other.py", STUDY.replace('"entropy"', '"other"'))
    write(folder, "other.yaml", CONFIG.replace("entropy", "other") + "results: entropy\n")
    result = run(folder, "--suite", "prompts.txt")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["ERROR: entropy and other both keep their results in entropy/*"])
    write(folder, "sub/test_entropy2.py", STUDY)
    write(folder, "sub/entropy.yaml", CONFIG)
    (folder.path / "other.yaml").write_text(CONFIG.replace("entropy", "other"))
    result = run(folder, "--suite", "prompts.txt", "--import-mode=importlib")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["ERROR: two studies are called 'entropy'*"])


def test_a_yield_of_no_run_later_on_fails_the_study_in_words_and_no_other(folder):
    write(
        folder,
        "test_other.py",
        STUDY.replace('"entropy"', '"other"').replace(
            "yield [run(prompt, replay=source, visibility=v)", "yield [(v, 3)[1]"
        ),
    )
    write(folder, "other.yaml", CONFIG.replace("entropy", "other"))
    result = run(folder, "--suite", "prompts.txt")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["*modes of study 'other' yields a list with a int in it (test_other.py, line 19)*"]
    )
    assert "entropy.visible-is-less-sure" in (folder.path / "results/findings.jsonl").read_text()


def test_an_error_in_a_measurement_is_said_with_file_and_line(folder):
    change(folder, "test_entropy.py", "    return Case(", "    1 / 0\n    return Case(")
    result = run(folder, "--suite", "prompts.txt")
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["*entropy could not be measured: on 'The cat sat on the', ZeroDivisionError*line 20*"]
    )
    assert "INTERNALERROR" not in result.stdout.str()


def test_a_case_that_is_not_plain_is_said(folder):
    change(folder, "test_entropy.py", "gap=gap(visible, isolated)", 'gap="wide"')
    result = run(folder, "--suite", "prompts.txt")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*its case cannot be kept*gap*valid number*"])


def test_what_a_study_captures_is_added_to_what_its_config_leaves_out(folder):
    change(folder, "test_entropy.py", 'sobering?")', 'sobering?", captures=("logits",))')
    change(
        folder,
        "test_entropy.py",
        "return Case(",
        "assert source.steps[0].logits is not None\n    return Case(",
    )
    assert run(folder, "--suite", "prompts.txt").ret == 0


def test_the_code_that_a_study_imports_belongs_to_its_identity(folder):
    """A constant beside the module changes: what the old one gave is measured again."""
    change(
        folder,
        "test_entropy.py",
        "import Planned",
        "import Planned  # noqa\nfrom knobs import FACTOR\nfrom tempo.harness import Planned",
    )
    change(folder, "test_entropy.py", "average([", "FACTOR * average([")
    write(folder, "knobs.py", "FACTOR = 1\n")
    folder.syspathinsert()
    assert run(folder, "--suite", "prompts.txt").ret == 0
    again = folder.runpytest_subprocess(*ARGUMENTS, "--suite", "prompts.txt")
    again.stdout.fnmatch_lines(["*7 of 7 prompt cases are on disk already*"])
    write(folder, "knobs.py", "FACTOR = 1000\n")
    changed = folder.runpytest_subprocess(*ARGUMENTS, "--suite", "prompts.txt")
    changed.stdout.fnmatch_lines(["*tempo: measured 7 prompt cases*"])


PICTURED = """
import numpy as np
from tempo.reporting import figures


@study.pictures
def picture(store, cases):
    seen = store.load("own")["threshold"]
    return [figures.bars({"a": [float(seen), 1.0]}, ["seen", "one"], "t", "x", "y", "c")]
"""


@pytest.fixture
def pictured(folder):
    """The same study, which keeps its own prompt's threshold as an array and draws it."""
    change(
        folder,
        "test_entropy.py",
        "    source = yield run(prompt)\n",
        "    source = yield run(prompt)\n"
        "    if prompt.store:\n"
        "        prompt.store.arrays('own', threshold=np.array(prompt.config.threshold))\n",
    )
    path = folder.path / "test_entropy.py"
    path.write_text(path.read_text().replace("\n\n\n@dataclass", PICTURED + "\n\n@dataclass", 1))
    return folder


def shown(folder):
    """What the picture of the report says that the threshold was."""
    return re.search(r"a: seen: ([\d.]+),", page(folder))[1]


def test_pictures_are_drawn_from_the_arrays_of_their_own_config(pictured):
    """Threshold .02, .5, .02 in one results folder: the third run's arrays are the first's again"""
    for number, threshold in enumerate(("0.02", "0.5", "0.02")):
        write(pictured, "mine/entropy.yaml", CONFIG.replace("0.05", threshold))
        result = run(
            pictured, "--suite", "prompts.txt", "--config", pictured.path / "mine/entropy.yaml"
        )
        assert result.ret == 0
        assert float(shown(pictured)) == float(threshold)
        if number == 2:
            result.stdout.fnmatch_lines(
                ["*cannot be used: entropy, 'The cat sat on the'*own.npz*measured again*"]
            )
            # with its whole window: a batch of another shape would round otherwise
            result.stdout.fnmatch_lines(["*tempo: measured 7 prompt cases*"])


def test_what_was_drawn_from_the_same_is_not_drawn_again(pictured, monkeypatch):
    monkeypatch.setattr(figures, "bars", figures.bars)  # put back after what conftest.py does
    arguments = ("--suite", "prompts.txt")
    assert run(pictured, *arguments).ret == 0
    record, png = (
        next(pictured.path.glob(f"results/*/{at}")) for at in ("r*.json", "figures/*.png")
    )
    before, pixels = record.read_text(), png.read_bytes()
    refuse = "from tempo.reporting import figures\n\ndef no(*args): raise ValueError('drawn')\n\n"
    write(pictured, "conftest.py", f"{refuse}figures.bars = no\n")
    assert run(pictured, *arguments).ret == 0
    assert (record.read_text(), png.read_bytes()) == (before, pixels)
    png.write_bytes(pixels[:-1])  # a file that is not the one that was recorded
    result = run(pictured, *arguments)
    result.stdout.fnmatch_lines(["*no pictures of entropy: ValueError: drawn*"])


def test_raw_results_that_were_damaged_or_deleted_are_measured_again(pictured):
    assert run(pictured, "--suite", "prompts.txt").ret == 0
    arrays = pictured.path / "results/entropy/own.npz"
    whole = arrays.read_bytes()
    for content in (whole[:-1] + bytes([whole[-1] ^ 1]), b"", None):
        arrays.unlink()
        if content is not None:
            arrays.write_bytes(content)
        result = run(pictured, "--suite", "prompts.txt")
        result.stdout.fnmatch_lines(["*cannot be used: entropy,*own.npz*"])
        assert result.ret == 0 and shown(pictured) == "0.05"
    result = run(pictured, "--suite", "prompts.txt")
    result.stdout.fnmatch_lines(["*7 of 7 prompt cases are on disk already*"])


def test_a_damaged_case_is_named_by_its_line_and_measured_again(folder):
    assert run(folder, "--suite", "prompts.txt").ret == 0
    cases = folder.path / "results/entropy/cases.jsonl"
    lines = cases.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"gap": ', b'"gap": 1')
    cases.write_bytes(b"".join(lines))
    result = run(folder, "--suite", "prompts.txt")
    result.stdout.fnmatch_lines(
        ["*cannot be used: *cases.jsonl line 3 is damaged*", "*tempo: measured 7 prompt cases*"]
    )
    assert result.ret == 0


def test_a_damaged_finding_of_another_run_is_a_notice_and_stands_in_the_report(folder):
    assert run(folder, "--suite", "prompts.txt").ret == 0
    findings = folder.path / "results/findings.jsonl"
    findings.write_bytes(b'{"claim": "torn' + b"\n" + findings.read_bytes())
    result = run(folder, "--suite", "prompts.txt")
    result.stdout.fnmatch_lines(["tempo: *findings.jsonl line 1 is damaged*"])
    assert result.ret == 0 and "Damaged and left out" in page(folder)


def test_two_configs_of_one_name_or_one_results_folder_are_refused(folder):
    """Not run as one, with the numbers of the first under the claims of the second."""
    write(folder, "a/x.yaml", CONFIG)
    write(folder, "b/x.yaml", CONFIG.replace("0.05", "0.5"))
    write(folder, "b/y.yaml", CONFIG.replace("0.05", "0.5") + "results: x\n")
    write(folder, "b/X.yaml", CONFIG.replace("0.05", "0.5"))
    for other, said in (
        ("b/x.yaml", "two configs are called x"),
        ("b/y.yaml", "both keep their results in x/"),
        ("b/X.yaml", "both keep their results in"),
    ):
        given = [folder.path / "a/x.yaml", folder.path / other]
        options = [option for path in given for option in ("--config", path)]
        result = run(folder, "--suite", "prompts.txt", *options)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        assert said in "\n".join(result.errlines)
        assert not (folder.path / "results").exists()


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("from knobs import FACTOR", "knobs.py"),
        ("from knobs import FACTOR", "knobs/__init__.py"),
        ("import knobs.deep as knobs; FACTOR = knobs.FACTOR", "knobs/deep.py"),
        ("import knobs.deep", "knobs/__init__.py"),
        ("def f():\n    from knobs import deep", "knobs/deep.py"),
        ("def f():\n    import knobs", "knobs.py"),
    ],
)
def test_whatever_is_imported_belongs_to_the_code(tmp_path, monkeypatch, line, name):
    """A package's own file as well, and what is imported only when a function runs."""
    monkeypatch.syspath_prepend(tmp_path)
    module, imported = tmp_path / "study_of_imports.py", tmp_path / name
    imported.parent.mkdir(exist_ok=True)
    for each in (tmp_path / "knobs" / "__init__.py",) if imported.parent != tmp_path else ():
        each.write_text("")
    module.write_text(line)
    imported.write_text("FACTOR = 1\n")
    assert imported in imported_files(module)
    before = code_fingerprint("a maker", module)
    assert before == code_fingerprint("a maker", module) != code_fingerprint("another", module)
    imported.write_text("FACTOR = 1000\n")
    assert code_fingerprint("a maker", module) != before


def test_a_first_look_is_a_notice_that_says_how_to_accept_it(folder):
    result = run(folder, "--suite", "prompts.txt")
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["*entropy.visible-is-less-sure: seen for the first time; *--update-expectations*"]
    )
    assert run(folder, "--suite", "prompts.txt", "--update-expectations").ret == 0
    assert (folder.path / "expectations/tiny.yaml").exists()
    result = run(folder, "--suite", "prompts.txt")
    assert "first time" not in result.stdout.str()
    # expectations are those of a dtype: another one is a notice, not a failure
    result = run(folder, "--suite", "prompts.txt", "--dtype", "bfloat16")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*seen for the first time*"])
    # and those of a suite
    write(folder, "others.txt", PROMPTS.replace("e", "a"))
    result = run(folder, "--suite", "others.txt")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*other prompts than its expectation's; not compared*"])


def test_a_gate_on_other_weights_than_its_expectations_says_so(folder, tiny):
    """Of the same name: the verdicts are met, and say nothing of the weights they were made for."""
    tiny.model.save_pretrained(folder.path / "mine")
    tiny.tokenizer.save_pretrained(folder.path / "mine")
    arguments = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "--model", "mine")
    arguments += ("--suite", "prompts.txt")
    assert folder.runpytest_inprocess(*arguments, "--update-expectations").ret == 0
    same = folder.runpytest_inprocess(*arguments)
    assert same.ret == 0
    same.stdout.no_fnmatch_line("*other weights*")
    with tempo.load_model(str(folder.path / "mine")) as other:
        other.model.model.layers[-1].mlp.down_proj.weight.mul_(1.0001)
        other.model.save_pretrained(folder.path / "mine")
    changed = folder.runpytest_inprocess(*arguments)
    assert changed.ret == 0
    changed.stdout.fnmatch_lines(["tempo: the expectations in * are of other weights (sha256 *"])


def test_a_chat_is_another_prompt_than_its_text(folder):
    """Each prompt is a user's message in the template: longer, and measured apart."""
    assert run(folder, "--suite", "prompts.txt").ret == 0
    plain = re.search(r"6 prompts, (\d+) to (\d+) tokens", page(folder))
    result = run(folder, "--suite", "prompts.txt", "--chat")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*tempo: measured 7 prompt cases*"])
    chats = re.search(r"6 prompts, (\d+) to (\d+) tokens", page(folder))
    assert plain
    assert chats
    assert int(chats[1]) > int(plain[1])


def test_nothing_selected_replaces_no_report(folder):
    write(folder, "reports/findings.html", "an earlier report")
    assert run(folder, "--suite", "prompts.txt", "-k", "entropie").ret == 5
    assert (folder.path / "reports/findings.html").read_text() == "an earlier report"


def test_a_pytest_run_without_studies_is_left_alone(pytester):
    pytester.makepyfile("def test_nothing():\n    assert True\n")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=1)
    assert "tempo:" not in result.stdout.str()
    assert {path.name for path in pytester.path.iterdir()} <= {
        "test_a_pytest_run_without_studies_is_left_alone.py",
        "__pycache__",
        ".pytest_cache",
    }


def test_a_mark_above_a_claim_is_respected(folder):
    change(
        folder,
        "test_entropy.py",
        "@study.claim",
        "import pytest\n\n\n@pytest.mark.skip(reason='not now')\n@study.claim",
    )
    result = run(folder, "--suite", "prompts.txt")
    result.assert_outcomes(passed=1, skipped=1)
