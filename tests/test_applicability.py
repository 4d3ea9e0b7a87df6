"""Each model family is judged by what it is: supported, or not applicable with the reason."""

import json

import numpy as np
import pytest

import tempo
from benchmarks.architectures import build
from benchmarks.configs import silent, studies
from benchmarks.families import spread_out
from fixtures.floors import same_row
from tempo import rotation
from tempo.claims import Claim, correct, inapplicable, judge
from tempo.errors import ModelError
from tempo.harness.evidence import Evidence
from tempo.harness.plan import plans_of
from tempo.harness.prompts import Suite, SuitePrompt
from tempo.metrics import recover_positions
from tempo.records import append_jsonl, read_findings
from tempo.reporting.figures.forest import forest
from tempo.rotation import rotation_of
from tests.studies import CONFIG, PROMPTS, STUDY

TEXTS = ("The cat sat on the", "Numbers: 1, 2")
# Interleaved pairs and a layer without rotation; sinks, experts and an attention factor; latents;
# experts; rotation in complex numbers; one projection for queries, keys and values.
ODD = ("cohere2", "gpt_oss", "deepseek_v3", "qwen3_moe", "llama4_text", "gpt_neox")
INAPPLICABLE = {
    "gpt_oss": {"exp1.rows-sum-to-one": "attention sinks take a part of each row"},
    "deepseek_v3": {"exp4.siblings-share-a-position": "cache latents"},
}
BYTES = {"vocab_size": 258, "sliding_window": 100}
JUDGED = ("exp1", "exp4", "exp9")


def odd(name):
    """The architecture with the tokenizer of `tiny`, and logits that make wide sets."""
    model = build(name, **BYTES)
    spread_out(model)
    return tempo.wrap_model(model, tempo.load_model("tiny").tokenizer, name)


def findings_on(lm, names, results):
    suite = Suite(tuple(map(SuitePrompt, TEXTS)), "two prompts")
    known, plans = studies(), []
    for name in names:
        plans += plans_of(*known[name], (), suite, None)[:1]
    evidence = Evidence(lm, plans, results)
    evidence.gather(silent)
    assert evidence.failures == {} and evidence.unjudged == {}
    return evidence.findings


@pytest.mark.parametrize("name", ODD)
def test_an_odd_architecture_is_judged_or_said_to_be_no_case(name, tmp_path):
    with odd(name) as lm:
        invariants = [f for f in findings_on(lm, JUDGED, tmp_path) if f.kind == "invariant"]
    assert len(invariants) == 10
    assert [f.claim for f in invariants if f.verdict == "REFUTED" or not f.control_holds] == []
    assert "SUPPORTED" in {f.verdict for f in invariants}
    reasons = {f.claim: f.reason for f in invariants if f.verdict == "INAPPLICABLE"}
    for claim, why in INAPPLICABLE.get(name, {}).items():
        assert why in reasons[claim]
    assert bool(reasons) == (name in INAPPLICABLE)


def rotated(angle, interleaved, scale):
    """Raw keys [1, 12, 8], and the same rotated at positions 0 to 11."""
    raw = np.random.default_rng(3).normal(size=(1, 12, 8))
    first, second = (slice(0, 8, 2), slice(1, 8, 2))
    if not interleaved:
        first, second = slice(0, 4), slice(4, 8)
    turned = (raw[..., first] + 1j * raw[..., second]) * np.exp(1j * np.outer(np.arange(12), angle))
    cached = np.empty_like(raw)
    cached[..., first], cached[..., second] = scale * turned.real, scale * turned.imag
    return raw, cached


TABLE = np.array([1.0, 0.4, 0.1, 0.03])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_a_rotation_is_read_off_the_keys_and_tells_their_positions(interleaved, sign, scale):
    raw, cached = rotated(sign * TABLE, interleaved, scale)
    found = rotation_of(raw, cached, TABLE)
    assert found is not None
    assert (found.interleaved, found.scale) == (interleaved, pytest.approx(scale))
    assert np.array_equal(found.frequencies, sign * TABLE)
    arguments = (cached[None], raw[None], [found.frequencies], 14, [interleaved], [found.scale])
    told = recover_positions(*arguments)
    assert told.position.tolist() == list(range(12))
    assert told.residual.max() < 1e-6
    other = recover_positions(*arguments[:4], [not interleaved], [found.scale])
    assert other.residual.max() > 0.1  # the other convention fits nowhere


def test_a_layer_without_rotation_and_one_with_an_unknown_one():
    raw, cached = rotated(TABLE, False, 1.0)
    assert rotation_of(raw, raw, TABLE).frequencies.tolist() == [0.0]
    assert rotation_of(raw, np.roll(cached, 1, axis=1), TABLE) is None
    assert rotation_of(raw, cached, TABLE * 1.1) is None


def test_a_model_whose_keys_are_no_known_rotation_says_so(monkeypatch):
    with tempo.wrap_model(build("llama")) as lm:
        monkeypatch.setattr(rotation, "rotation_of", lambda *_: None)
        assert "no rotation of its keys that tempo knows" in lm.reason_against_kv
        with pytest.raises(ModelError, match="layer 0"):
            _ = lm.rotations


def test_rows_are_the_same_to_the_bit_but_on_a_mixture_of_experts():
    with tempo.wrap_model(build("llama")) as dense, tempo.wrap_model(build("mixtral")) as moe:
        assert (same_row(dense, "logit"), dense.has_experts) == (0.0, False)
        assert 0 < same_row(moe, "logit") < 0.01 and moe.has_experts


def test_a_finding_that_is_not_applicable_counts_for_nothing(tmp_path):
    claim = Claim("a.b", "It holds.", "", float, "greater", "less", float, "none", family="f")
    found = inapplicable(claim, "no sinks", {"experiment": "a", "config": "a", "model": "m"})
    judged = judge(claim, [0.1 * i for i in range(1, 13)])
    after = correct([found, judged], {"f": 2})
    assert (after[0].verdict, after[0].reason) == (found.verdict, found.reason)
    assert after[1].p_corrected == pytest.approx(2 * judged.p)  # it was declared, and counts
    path = tmp_path / "findings.jsonl"
    append_jsonl(path, [found.record()])
    kept = read_findings(path)
    assert kept.damaged == []
    (whole,) = kept.findings
    assert (whole.verdict, whole.reason) == ("INAPPLICABLE", "not applicable: no sinks")
    assert "inapplicable" not in forest([found, judged], "claims").alt


ARGUMENTS = ("--model", "tiny", "--suite", "prompts.txt", "-p", "no:cacheprovider")


@pytest.fixture
def folder(pytester, monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    pytester.path.joinpath("entropy.yaml").write_text(CONFIG, encoding="utf-8")
    pytester.path.joinpath("prompts.txt").write_text(PROMPTS, encoding="utf-8")

    def run(old, new, study=STUDY):
        assert old in study
        study = study.replace(old, new)
        pytester.path.joinpath("test_entropy.py").write_text(study, encoding="utf-8")
        return pytester.runpytest_inprocess(*ARGUMENTS)

    def update():
        return pytester.runpytest_inprocess(*ARGUMENTS, "--update-expectations")

    run.path, run.update = pytester.path, update
    return run


def test_a_study_that_a_model_cannot_have_measures_nothing_and_fails_nothing(folder):
    given = 'sobering?", needs=lambda lm: "it has no sinks")'
    result = folder('sobering?")', given)
    assert result.ret == 0
    result.assert_outcomes()  # the plain test is no skip: it counts with the claim
    out = result.stdout.str()
    assert "2 inapplicable" in out and "skipped" not in out
    assert "entropy: not applicable: it has no sinks" in out
    assert not (folder.path / "results/entropy/cases.jsonl").exists()
    page = (folder.path / "reports/findings.html").read_text(encoding="utf-8")
    assert "not applicable: it has no sinks" in page
    line = (folder.path / "results/findings.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert json.loads(line)["verdict"] == "INAPPLICABLE"


def test_a_claim_that_a_model_cannot_have_leaves_the_others(folder):
    more = STUDY.partition("@study.claim")[2].partition("def test_cases")[0]
    second = "@study.claim" + more.replace("test_visible", "test_other")
    second = second.replace("planned=EFFECT", "planned=EFFECT, needs=lambda lm: 'no window'")
    result = folder("def test_cases", second + "def test_cases")
    out = result.stdout.str()
    assert result.ret == 0 and "1 inapplicable" in out
    assert "entropy.other-is-less-sure: not applicable: no window" in out
    assert (folder.path / "results/entropy/cases.jsonl").exists()


SILENT = """def test_cases(store):
    assert store


def test_other"""


@pytest.mark.parametrize("ci", [False, True])
def test_an_own_prompt_without_a_case_is_a_skip_at_a_desk_and_an_error_in_ci(
    folder, monkeypatch, ci
):
    if ci:
        monkeypatch.setenv("CI", "true")
    first = "    source = yield"
    silent = STUDY.replace(first, f"    if prompt.category == 'own':\n        return None\n{first}")
    result = folder("def test_cases", SILENT, silent)
    assert result.ret == int(ci)
    said = "the own prompt of entropy has nothing to say; give its config another one"
    assert (said in result.stdout.str()) == ci
    result.assert_outcomes(passed=1, skipped=int(not ci), errors=int(ci))


def test_what_was_expected_and_is_no_longer_applicable_is_a_regression(folder):
    assert folder("def test_cases", "def test_cases").ret == 0
    assert folder.update().ret == 0
    result = folder('sobering?")', 'sobering?", needs=lambda lm: "it has no sinks")')
    assert result.ret == 1
    result.stdout.fnmatch_lines("*expected *, found INAPPLICABLE*it has no sinks*")
