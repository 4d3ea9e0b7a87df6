"""What somebody else made, opened in a browser: a results folder, a tokenizer, prompts.

No script of theirs runs, nothing is asked for, and no file is written outside the folder named.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tempo
from tempo.parsing import CHECKSUM, seal
from tests.browser.test_report_in_browser import browser, show, without_policy  # noqa: F401
from tests.studies import CONFIG, STUDY

HOSTILE = [
    "<script>window.hacked=1</script>",
    '<img src="http://127.0.0.1:9/x.png" onerror="window.hacked=1">',
    '"><svg onload="window.hacked=1">',
    '<meta http-equiv="refresh" content="0;url=http://127.0.0.1:9/">',
    '<form action="http://127.0.0.1:9/"><input name="a"></form>',
    "</title></style></script><script>window.hacked=1</script>",
    "[x](javascript:window.hacked=1)",
    "<base href='http://127.0.0.1:9/'>",
    "a\x00\x1b\u202e",
]
PLANTED = [
    "<script>window.hacked=1</script>",
    '<image href="http://127.0.0.1:9/x.png"/>',
    '<path onclick="window.hacked=1" onload="window.hacked=1"/>',
    '<rect style="fill: url(http://127.0.0.1:9/x)"/>',
    "<foreignObject><form action='http://127.0.0.1:9/'><input/></form></foreignObject>",
    "</svg><meta http-equiv='refresh' content='0;url=http://127.0.0.1:9/'><svg>",
    "<title><img src='http://127.0.0.1:9/y.png' onerror='window.hacked=1'/></title>",
    "<style>@import 'http://127.0.0.1:9/z.css';</style>",
    "<a href='javascript:window.hacked=1'><text>a</text></a>",
]
DRAWN = """
from tempo.reporting import figures


@study.pictures
def picture(store, cases):
    texts = store.load_json("own")["texts"]
    return [figures.bars({text: [0.5, 1.0]}, [text, "b"], text, text, text, text) for text in texts]

"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A session with a model whose every token is hostile, on hostile prompts."""
    folder = tmp_path_factory.mktemp("hostile")
    texts = [*HOSTILE, *(f"{HOSTILE[i % 8]}{i}" for i in range(249)), "[UNK]"]
    backend = Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with tempo.load_model("tiny") as lm:
        lm.model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    study = STUDY.replace("\n\n\n@dataclass", f"{DRAWN}\n\n@dataclass", 1).replace(
        "    source = yield run(prompt)\n",
        "    source = yield run(prompt)\n"
        "    if prompt.store:\n"
        "        texts = [text for step in source.steps for text in step.texts][:3]\n"
        "        prompt.store.json('own', {'texts': texts})\n"
        "        prompt.store.json('generation_log', {'runs': [{'text': source.text}]})\n"
        "        prompt.store.text('analysis', prompt.text)\n",
    )
    (folder / "test_entropy.py").write_text(study)
    (folder / "entropy.yaml").write_text(
        CONFIG.replace("The cat sat on the", json.dumps(HOSTILE[1]))
    )
    rows = "".join(json.dumps({"prompt": text}) + "\n" for text in HOSTILE)
    (folder / "prompts.jsonl").write_text(rows)
    command = [sys.executable, "-m", "pytest", "--model", "model", "--suite", "prompts.jsonl"]
    environment = os.environ | {"PYTHONPATH": str(Path(tempo.__file__).parents[1])}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def harmless(page):
    """Nothing ran, nothing was asked for, nothing that could is there."""
    page.wait_for_timeout(300)  # a refresh or a late handler
    assert page.evaluate("window.hacked") is None
    assert page.log == []
    assert page.locator("main img, form, iframe, object, embed, base").count() == 0
    assert page.url.startswith("file:")


def test_hostile_tokens_and_prompts_stay_text(made, show):  # noqa: F811
    html = (made / "reports/findings.html").read_text(encoding="utf-8")
    page = show(html)
    harmless(page)
    assert "<script>window.hacked=1</script>" in page.evaluate("document.body.textContent")
    assert page.locator("figure svg").count() >= 3
    # the policy is the second wall: without it the page is as harmless
    harmless(show(without_policy(html)))


@pytest.mark.parametrize("number", range(len(PLANTED)))
def test_a_results_folder_of_somebody_else_is_harmless(made, show, tmp_path, number):  # noqa: F811
    """Each thing is planted wherever the records hold text, a name or a picture."""
    results = tmp_path / "inside/results"
    shutil.copytree(made / "results", results)
    planted = PLANTED[number]
    for path in (results / "report.json", results / "entropy/report.json"):
        record = json.loads(path.read_text())
        for name, value in record.items():
            if isinstance(value, str) and name not in (CHECKSUM, "model", "experiment", "config"):
                record[name] = planted
        for picture in record.get("pictures", ()):
            picture["caption"] = picture["alt"] = picture["title"] = planted
        if pictures := record.get("pictures"):
            pictures[0]["svg"] = pictures[0]["svg"].replace("</svg>", f"{planted}</svg>")
            pictures[1]["name"] = "a/../../../../x/y"
        path.write_text(json.dumps(seal(record)))
    lines = (results / "findings.jsonl").read_text().splitlines()
    findings = [json.loads(line) for line in lines]
    for finding in findings:
        finding |= {"statement": planted, "reason": planted, "control": planted}
    (results / "findings.jsonl").write_text(
        "".join(json.dumps(seal(finding)) + "\n" for finding in findings)
    )
    before = {path for path in tmp_path.rglob("*")}
    command = [sys.executable, "-m", "tempo", "report", "--results", str(results)]
    out = tmp_path / "inside/out"
    environment = os.environ | {"PYTHONPATH": str(Path(tempo.__file__).parents[1])}
    done = subprocess.run(
        [*command, "--out", str(out)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Warning: " in done.stderr  # the section with the picture is named and left out
    written = {path for path in tmp_path.rglob("*")} - before
    assert all(path == out or path.is_relative_to(out) for path in written)
    html = (out / "findings.html").read_text(encoding="utf-8")
    harmless(show(html))
    harmless(show(without_policy(html)))


def test_what_would_run_is_seen(made, show):  # noqa: F811
    """The twin: the same page with each thing planted as markup, and no policy."""
    html = without_policy((made / "reports/findings.html").read_text(encoding="utf-8"))
    seen = 0
    for planted in PLANTED:
        figure = re.search("<figure.*?</svg>", html, re.DOTALL)
        assert figure
        page = show(html.replace(figure[0], figure[0].replace("</svg>", f"{planted}</svg>"), 1))
        try:
            harmless(page)
        except AssertionError:
            seen += 1
    assert seen >= 6
