"""Every sentence of the README's results is traced to findings that are published with it.

A comment that no reader sees follows each sentence and stands in each row of the table:
`<!-- exp16.same=REFUTED -->` says which claim decides it, and how that claim came out. Findings of
all models lie in reports/published/exp16/.
"""

import math
import re
from pathlib import Path

import pytest

from tempo.records import read_findings
from tempo.text import number

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "reports/published/exp16"
# What the README calls each model.
MODELS = {
    "SmolLM2-135M-Instruct": "smollm2-135m",
    "Gemma 3 270M instruct": "gemma3-270m",
    "Qwen2.5-Coder-0.5B-Instruct": "qwen2.5-coder-0.5b-instruct",
    "Qwen2.5-Coder-1.5B-Instruct": "qwen2.5-coder-1.5b-instruct",
}
MAIN = "smollm2-135m"
TRACE = re.compile(r"<!-- (.*?) -->", re.DOTALL)
MEASURED = re.compile(r"([-+]?[\d.]+) \[([-+]?[\d.]+), ([-+]?[\d.]+)\](?:, n = (\d+))?")
PERPLEXITY = re.compile(r"perplexity ([\d.]+) % (lower|higher)")


@pytest.fixture(scope="module")
def published():
    """The findings of each model, by claim: one for each suite."""
    found = {}
    for path in PUBLISHED.glob("*.jsonl"):
        of_model = found.setdefault(path.stem, {})
        for finding in read_findings(path).findings:
            of_model.setdefault(finding.claim, []).append(finding)
    return found


def section():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return readme.partition("## What it found\n")[2].partition("\n## ")[0]


def pieces(text):
    """Rows of tables, and sentences: each with its comment."""
    text = text.partition("### ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| ") and "<!--" in line]
    lines = [line for line in text.splitlines() if not line.startswith("|")]
    prose = "\n".join(re.sub(r"^\d\. ", "", line) for line in lines)
    sentences = re.split(r"(?<=-->)", prose)
    return rows, [" ".join(each.split()) for each in sentences if each.strip()]


def claims_of(piece):
    """The claims that a piece rests on, with the verdict it says each has, if it says one."""
    found = [each.partition("=") for comment in TRACE.findall(piece) for each in comment.split()]
    return [(claim, verdict) for claim, _, verdict in found]


def fits(shown, finding):
    """Whether estimate, interval and n, as printed, are those of a finding."""
    values = (finding.estimate, finding.low, finding.high)
    signs = [number(value) for value in values]
    printed = [f"{float(each):g}" for each in shown[:3]]
    exact = [f"{float(each):g}" for each in signs]
    return printed == exact and (not shown[3] or int(shown[3]) == finding.n)


def untraced(text, published):
    """What of a text does not follow from the published findings, in words."""
    rows, sentences = pieces(text)
    wrong = []
    for piece in (*rows, *sentences):
        claims, said = claims_of(piece), TRACE.sub("", piece)
        if not claims:
            wrong.append(f"rests on nothing: {said}")
        if piece in sentences and len(re.findall(r"[.!?](?:\s|$)", said)) != 1:
            wrong.append(f"not one sentence: {said}")
        found = [
            f for each in published.values() for claim, _ in claims for f in each.get(claim, ())
        ]
        wrong += [
            f"no such number: {shown}"
            for shown in MEASURED.findall(said)
            if not any(fits(shown, f) for f in found)
        ]
        for claim, verdict in claims:
            known = {f.verdict for f in published[MAIN].get(claim, [])}
            if not known or (verdict and known != {verdict}):
                wrong.append(f"{claim} is {known or 'unknown'}: {said}")
        for percent, direction in PERPLEXITY.findall(said):
            changes = [100 * math.expm1(f.estimate) for f in found]
            wanted = float(percent) if direction == "higher" else -float(percent)
            if not any(abs(change - wanted) <= 0.5 for change in changes):
                wrong.append(f"no such perplexity: {percent} % {direction}")
    return wrong


def test_every_result_in_the_readme_follows_from_published_findings(published):
    assert published.keys() == set(MODELS.values())
    rows, sentences = pieces(section())
    assert len(rows) >= 5 and len(sentences) >= 3
    assert untraced(section(), published) == []


def test_every_model_of_the_table_is_called_by_its_full_name():
    head = next(line for line in section().splitlines() if line.startswith("| |"))
    assert [cell.strip() for cell in head.split("|")[2:-1]] == list(MODELS)


def test_each_column_holds_the_numbers_of_its_model(published):
    rows, _ = pieces(section())
    for row in rows:
        claims = [claim for claim, _ in claims_of(row)]
        for cell, model in zip(row.split("|")[2:-1], MODELS.values(), strict=True):
            found = [f for claim in claims for f in published[model][claim]]
            shown = MEASURED.findall(cell)
            assert shown and all(any(fits(each, f) for f in found) for each in shown), row


WORDS = {"supported": "SUPPORTED", "refuted": "REFUTED", "open": "INCONCLUSIVE"}
# Cells of a table in docs/results.md, by claim: one a suite, or one a model.
CLAIM_ROW = re.compile(r"^\| [^|]* \| `([a-z0-9-]+)` \| ([^|]*) \| ([^|]*) \|$", re.MULTILINE)


def read_of(model):
    return read_findings(ROOT / f"reports/published/exp17/{model}.jsonl").findings


def is_second(finding):
    return finding.context["variant"] == "replication"


def columns_of(experiment, published):
    """The findings of the two columns of an experiment's table, by claim."""
    if experiment == "exp16 on two models":
        models = (MAIN, "gemma3-270m")
        return [
            {f.claim: f for of in published[model].values() for f in of if is_second(f)}
            for model in models
        ]
    if experiment == "exp16":
        both = published[MAIN].values()
        suites = ("confirmatory", "replication")
        return [
            {f.claim: f for of in both for f in of if f.context["variant"] == suite}
            for suite in suites
        ]
    return [{f.claim: f for f in read_of(model)} for model in ("smollm2-135m", "gemma3-270m")]


def wrong_cells(text, experiment, columns):
    """Cells of a table of claims that do not follow from its columns' findings."""
    wrong = []
    for claim, *cells in CLAIM_ROW.findall(text):
        for cell, column in zip(cells, columns, strict=True):
            finding = column.get(f"{experiment.partition(' ')[0]}.{claim}")
            word, _, numbers = cell.partition(": ")
            shown = MEASURED.findall(numbers)
            if not finding or WORDS[word] != finding.verdict or not fits(shown[0], finding):
                wrong.append(f"{claim}: {cell}")
    return wrong


@pytest.mark.parametrize(
    ("experiment", "heading", "num_rows"),
    [
        ("exp16", "## On texts drawn afterwards", 22),
        ("exp16 on two models", "### Four models", 22),
        ("exp17", "## Where the weights should enter", 6),
    ],
)
def test_every_cell_of_the_tables_of_claims_is_published(experiment, heading, num_rows, published):
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    text = text.partition(f"{heading}\n")[2].partition("\n## ")[0].partition("\n### ")[0]
    columns = columns_of(experiment, published)
    assert len(CLAIM_ROW.findall(text)) == num_rows
    assert wrong_cells(text, experiment, columns) == []
    assert wrong_cells(text, experiment, columns[::-1])  # columns that are exchanged
    assert wrong_cells(text.replace("supported", "refuted"), experiment, columns)


@pytest.mark.parametrize(
    "broken",
    [
        "It is so.\n",
        "It is so, 0.111 [0.1, 0.2], n = 9. <!-- exp16.posterior-is-near-the-truth -->\n",
        "It is so. <!-- exp16.plain-is-near-the-truth=SUPPORTED -->\n",
        "It is so. <!-- exp16.no-such-claim -->\n",
        "It is so. And so is that. <!-- exp16.plain-is-near-the-truth -->\n",
        "A perplexity 77 % higher. <!-- exp16.best-path-reads-as-well-as-greedy -->\n",
    ],
)
def test_a_sentence_that_follows_from_nothing_is_found(broken, published):
    assert untraced(broken, published)
