"""A run as a page and in a notebook: what it shows is what was recorded, and nothing in it runs."""

import base64
import hashlib
import json
import re
import sys
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
from typer.testing import CliRunner

import tempo
from tempo.claims import Claim, judge
from tempo.cli import app
from tempo.errors import ResultsError, SpecError, TempoError, TraceError
from tempo.records import Findings
from tempo.reporting import figures
from tempo.trace import load_trace
from tempo.viewing import bertviz_arguments, circuitsvis_arguments, data, runs
from tests.test_trace import make_trace
from tests.viewing import HOSTILE, PROMPT, hostile, two_modes

pytestmark = pytest.mark.usefixtures("one_thread")
ROUNDED = 0.004  # of an attention weight, as the page says


@pytest.fixture(scope="module")
def modes(tiny):
    return two_modes(tiny)


def held(html):
    """What the script of each lattice is given."""
    return [json.loads(found) for found in re.findall(r'application/json">(.*?)</script>', html)]


def text_only(html):
    """The page without its styles and scripts."""
    return re.sub(r"<(style|script)[^>]*>.*?</\1>", "", html, flags=re.DOTALL)


# --- what the page holds


def test_every_member_stands_in_the_page_with_its_probability(modes):
    isolated, _ = modes
    html = text_only(tempo.view(isolated).html)
    chips = re.findall(r'data-k="(\d+)" data-i="(\d+)"><bdi>(.*?)</bdi>.*?<b>(.*?)</b>', html)
    assert [(int(k), int(i)) for k, i, *_ in chips] == [
        (k, i) for k, step in enumerate(isolated.steps) for i in range(len(step.tokens))
    ]
    for k, i, _, shown in chips:
        assert float(shown) == pytest.approx(isolated.steps[int(k)].probabilities[int(i)], rel=0.06)
    assert html.count("tempo-best") == len(isolated.steps)


def test_the_attention_of_the_page_is_the_recorded_one_but_for_rounding(modes):
    for run, trace in enumerate(modes):
        kept = held(tempo.view(*modes).html)[0]["attention"][run]
        worst = 0.0
        for step, packed in zip(trace.steps, kept["steps"], strict=True):
            levels = np.frombuffer(base64.b64decode(packed), np.uint8).reshape(step.attention.shape)
            assert ((levels == 0) == (step.attention == 0)).all()
            worst = max(worst, float(np.abs((levels / 255) ** 2 - step.attention).max()))
        assert 0 < worst < ROUNDED
    # plain rounding to a byte would lose small weights
    assert np.rint(255 * np.float32(1e-5)) == 0 < data.quantised(np.array([1e-5]))[0]


def test_a_page_holds_links_and_what_each_member_predicts(modes):
    kept = held(tempo.view(*modes).html)[0]
    for run, trace in enumerate(modes):
        for k, step in enumerate(trace.steps[:-1]):
            assert kept["links"][run][k] == pytest.approx(step.links, abs=1e-3)
        step = trace.steps[3]
        for i, found in enumerate(kept["next"][3]):
            p = tempo.metrics.softmax(step.logits[i])
            assert max(values[run] for _, values in found["top"]) == pytest.approx(
                p.max(), rel=1e-3
            )
    one, other = (tempo.metrics.softmax(trace.steps[3].logits[0]) for trace in modes)
    expected = tempo.metrics.total_variation(one, other)
    assert kept["next"][3][0]["tv"] == pytest.approx(expected, rel=1e-3)
    assert expected > 0.01


def test_a_page_holds_what_each_layer_would_predict(tiny, modes):
    kept = held(tempo.view(*modes, lm=tiny).html)[0]["lens"]
    for run, trace in enumerate(modes):
        expected = tempo.lens(tiny, trace)
        for k, step in enumerate(expected.steps):
            for i in range(len(trace.steps[k].tokens)):
                texts, shares, kls = zip(*kept[run][k][i], strict=True)
                assert texts == tuple(data.shown(row[i]) for row in step.texts)
                assert shares == pytest.approx(step.probabilities[:, i], rel=1e-3)
                assert kls == pytest.approx(step.kl[:, i], rel=1e-3)
    assert kept[0] != kept[1]
    assert held(tempo.view(*modes).html)[0]["lens"] == [None, None]  # no model to unembed with


def test_a_model_that_cannot_be_unembedded_says_why(tiny, modes, monkeypatch):
    def refused(*_):
        raise tempo.ModelError("its output is \x1b[31mscaled")

    monkeypatch.setattr("tempo.interpret.lens", refused)
    kept = held(tempo.view(modes[0], lm=tiny).html)[0]["lens"]
    assert kept == ["its output is \\x1b[31mscaled"]


def test_a_prompt_is_viewed_with_residuals_if_the_model_has_them(monkeypatch):
    spec = tempo.RunSpec(prompt=PROMPT, threshold=0.05, max_steps=2)
    with tempo.load_model("tiny") as lm:
        page = runs.view_prompt(lm, spec, None, tempo.generate_batch)
    assert isinstance(held(page.html)[0]["lens"][0], list)

    def none(lm):
        raise tempo.ModelError("four streams")

    monkeypatch.setattr(tempo.LanguageModel, "residual_stream", property(none))
    with tempo.load_model("tiny") as lm:  # a model keeps what it found out
        page = runs.view_prompt(lm, spec, None, tempo.generate_batch)
    assert held(page.html)[0]["lens"] == [None, None]


def test_what_was_not_captured_is_said_with_how_to_get_it(tiny):
    trace = tempo.generate(tiny, PROMPT, threshold=0.05, max_steps=3)
    html = tempo.view(trace).html
    kept = held(html)[0]
    assert (kept["attention"], kept["next"]) == ([None], None)
    assert "one byte" not in text_only(html)
    script = files("tempo.viewing").joinpath("view.js").read_text()
    for name in ("attention", "logits"):
        assert f'Not captured. Generate with capture=\\"{name}\\".' in script


def test_runs_on_the_same_sets_share_a_lattice_and_others_do_not(tiny, modes):
    free = tempo.generate(tiny, PROMPT, threshold=0.03, max_steps=4)
    assert [len(kept["names"]) for kept in held(tempo.view(*modes).html)] == [2]
    assert [len(kept["names"]) for kept in held(tempo.view(*modes, free).html)] == [2, 1]
    assert data.names_of(modes) == ["isolated", "visible"]
    assert data.names_of([modes[0], modes[0]]) == ["isolated (1)", "isolated (2)"]
    assert data.names_of([modes[0], free])[1].startswith("isolated, threshold 0.03")


def test_differences_are_told_until_the_texts_differ(tiny, modes):
    isolated, visible = modes
    wide = next(k for k, width in enumerate(isolated.widths) if width > 1)
    found = data.differences(isolated, visible)
    assert max(distance.tv for distance in found[: wide + 1]) < 1e-5  # the same to rounding
    expected = tempo.metrics.total_variation(
        visible.steps[wide + 1].distribution, isolated.steps[wide + 1].distribution
    )
    assert found[wide + 1].tv == expected > 0.01
    other = tempo.generate(tiny, PROMPT, threshold=0.5, max_steps=3)
    assert data.differences(isolated, other)[1:] == [None, None]
    elsewhere = tempo.generate(tiny, "Another text", max_steps=2)
    assert data.differences(isolated, elsewhere) == [None, None]
    html = tempo.view(*modes).html
    assert "What differs, set by set" in html
    assert "What differs" not in text_only(tempo.view(isolated).html)


def test_attention_that_takes_too_much_space_is_averaged_and_that_is_said(modes, monkeypatch):
    isolated = modes[0]
    total = sum(step.attention.size for step in isolated.steps)
    said = []
    for most in (total, total - 1, total // 4 - 1, 1):
        monkeypatch.setattr(data, "MOST_ATTENTION", most)
        kept = held(tempo.view(isolated).html)[0]
        found = kept["attention"][0]
        said.append((kept["kept"][0][:8], found and (found["layers"], found["heads"])))
    assert said == [("", (3, 4)), ("the mean", (3, 1)), ("the mean", (1, 1)), ("left out", None)]


def test_tokens_in_no_set_show_their_text_only_with_the_model(tiny, modes):
    def unknown(html):
        return [
            text
            for found in held(html)[0]["next"]
            for member in found
            for text, _ in member["top"]
            if re.fullmatch(r"#\d+", text)
        ]

    assert unknown(tempo.view(*modes).html)
    assert not unknown(tempo.view(*modes, lm=tiny).html)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" cat", "·cat"),
        ("a  ", "a··"),
        ("  ", "··"),
        ("", "∅"),
        ("\n", r"\n"),
        ("\u202ea", r"\u202ea"),
    ],
)
def test_a_token_shows_its_spaces_and_what_has_no_shape(text, expected):
    assert data.shown(text) == expected


def test_a_long_token_is_cut():
    assert len(data.shown("x" * 10_000)) == data.LONGEST_TOKEN
    assert len(data.shown("\x00" * 10_000)) <= data.LONGEST_TOKEN


# --- the same bytes, and nothing that runs or is asked for


def test_a_page_is_the_same_to_the_byte_when_it_is_made_again(modes, tmp_path):
    isolated = modes[0]
    first = tempo.view(isolated).save(tmp_path / "run.html")
    before = first.read_bytes()
    loaded = load_trace(isolated.save(tmp_path / "trace"))
    assert tempo.view(loaded).save(first).read_bytes() == before
    assert loaded._repr_html_().encode() in before
    assert tempo.view(modes[1]).page().encode() != before


def test_the_policy_lets_the_pages_own_script_run_and_nothing_else(modes):
    html = tempo.view(*modes).page()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)[1]
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert not re.findall(r"(?:src|href|url)\s*[=(]", text_only(html))
    assert "http:" not in html.replace("http-equiv", "")
    assert "https:" not in html


def test_the_styles_hold_for_nothing_outside_the_view():
    style = files("tempo.viewing").joinpath("view.css").read_text()
    assert outside(style) == []
    assert outside("body { margin: 0 }\n.tempo-view p, p { margin: 0 }\n") == ["body", "p"]


def outside(style):
    """The selectors that may match something outside a view."""
    rules = re.sub(r"@[^{]+\{", "", style)
    found = []
    for group in re.findall(r"([^{}]+)\{", rules):
        parts = re.sub(r"\([^)]*\)", "", group).split(",")
        found += [part.strip() for part in parts if ".tempo-view" not in part]
    return found


def test_several_views_may_stand_in_one_document(modes):
    assert not re.findall(r'\sid="', tempo.view(*modes).html)


def test_hostile_texts_are_inert(tiny, modes):
    bad = hostile(modes[0])
    html = tempo.view(bad, hostile(modes[1]), names=[HOSTILE[0], HOSTILE[3]]).page()
    assert html.count("<script>") == 1
    assert html.count("<script ") == 1  # the data
    assert not re.findall(r"<(?:img|svg|base|a|form|iframe)\b", text_only(html))
    assert not {char for char in html if ord(char) < 32} - {"\n"}
    assert "\u202e" not in html
    assert "\u2066" not in html
    assert r"\x1b[31m" in html
    assert "x" * 400 not in html  # nobody reads ten thousand of them
    assert "&lt;script&gt;window.hacked=1&lt;/script&gt;" in html
    for kept in held(html):
        assert "<script>window.hacked=1</script>" in kept["slots"]  # whole, as text
    assert "mathjax_ignore" in html  # a notebook would read `$...$` as a formula
    step = bad.steps[0]._repr_html_()
    assert "<script" not in step
    assert "mathjax_ignore" in step


# --- saving


def test_a_page_replaces_only_a_page(modes, tmp_path):
    view = tempo.view(modes[0])
    other = tmp_path / "mine.html"
    other.write_text("<title>mine</title>")
    with pytest.raises(ResultsError, match=r"mine\.html is there, and is no page of a run"):
        view.save(other)
    assert other.read_text() == "<title>mine</title>"
    path = view.save(tmp_path / "new" / "run.html")
    assert tempo.view(modes[1]).save(path).read_text() == tempo.view(modes[1]).page()
    with pytest.raises(ResultsError):
        view.save(tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda trace: tempo.view("runs/cat"), "view takes traces, not 'runs/cat'"),
        (lambda trace: tempo.view(trace, trace, names=["a"]), "1 names for 2 runs"),
        (lambda trace: tempo.view(replace(trace, steps=[])), "without any set"),
        (lambda trace: trace.plot_attention(9), "step is 9; expected a whole number from 0 to 7"),
        (lambda trace: trace.plot_attention(1, layer=3), "layer is 3; expected"),
        (lambda trace: trace.plot_attention(1, head=-1), "head is -1; expected"),
        (lambda trace: circuitsvis_arguments(trace, 3), "layer is 3; expected"),
        (lambda trace: circuitsvis_arguments("trace", 0), "trace is 'trace'; expected"),
        (lambda trace: make_trace().plot_attention(0), "was not captured; generate it with"),
        (lambda trace: bertviz_arguments(make_trace()), "was not captured; generate it with"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(modes, call, message):
    with pytest.raises(TempoError, match=re.escape(message)) as told:
        call(modes[0])
    assert "\n" not in str(told.value)


# --- the command line


def run(*words):
    return CliRunner().invoke(app, list(words))


VIEWED = ("view", PROMPT, "--model", "tiny", "--threshold", "0.05", "--max-steps", "4", "--out")


def test_a_prompt_is_shown_in_both_modes_on_the_same_sets(tmp_path):
    out = tmp_path / "run.html"
    done = run(*VIEWED, str(out))
    assert (done.exit_code, done.stdout) == (0, f"written: {out}\n")
    kept = held(out.read_text())
    assert [found["names"] for found in kept] == [["isolated", "visible"]]
    assert kept[0]["next"] is not None
    assert None not in kept[0]["attention"]
    first = out.read_bytes()
    done = run(*VIEWED, str(out))
    assert out.read_bytes() == first
    done = run(
        "view",
        PROMPT,
        "--model",
        "tiny",
        "--visibility",
        "causal",
        "--max-steps",
        "2",
        "--out",
        str(out),
    )
    assert [found["names"] for found in held(out.read_text())] == [["causal"]]


def test_saved_traces_are_shown_side_by_side(modes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, trace in zip(("one", "two"), modes, strict=True):
        trace.save(tmp_path / "both" / name)
    done = run("view", "both/one", "both/two")
    assert (done.exit_code, done.stdout) == (0, "written: run.html\n")
    first = (tmp_path / "run.html").read_bytes()
    # a folder of traces, as `tempo compare --save` makes it, stands for all of them
    assert run("view", "both").exit_code == 0
    assert (tmp_path / "run.html").read_bytes() == first
    assert [found["names"] for found in held(first.decode())] == [["isolated", "visible"]]
    # `tiny` is a known model, which knows the text of every token
    assert not re.findall(r'\["#\d+",', first.decode())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing/here"], "there is no folder 'nothing/here'"),
        (["one", "two words"], "there is no folder 'one'"),
        (["here"], "no trace in here"),
        ([], "give a text to continue"),
        (["hi", "--out", "mine.html"], "mine.html is there, and is no page of a run"),
    ],
)
def test_a_wrong_line_is_refused_before_a_model_is_loaded(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempo.load_model", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "here").mkdir()
    (tmp_path / "mine.html").write_text("mine")
    done = run("view", *words)
    assert done.exit_code != 0
    assert message in done.stderr
    assert not (tmp_path / "run.html").exists()


def test_a_model_of_other_tokens_is_refused(tiny, modes, tmp_path):
    changed = replace(modes[0], steps=[replace(modes[0].steps[0], texts=["a", "b"])])
    with pytest.raises(SpecError, match="has other tokens than the trace of 'tiny'"):
        runs._check_model(tiny, [changed])
    runs._check_model(tiny, modes)


# --- objects in a notebook


def finding(**changes):
    claim = Claim("a.b", HOSTILE[0], "", float, "less", HOSTILE[7], float, "")
    return replace(judge(claim, [0.1, 0.2, 0.3], {"model": HOSTILE[1]}), **changes)


def test_steps_findings_and_figures_show_themselves(modes):
    step = modes[0].steps[0]
    shown = step._repr_html_()
    assert shown.count("<tr>") == 1 + len(step.tokens)
    assert "captured: logits, attention" in shown
    for html in (finding()._repr_html_(), Findings([finding()], [])._repr_html_()):
        assert "<script" not in html
        assert "<img" not in html
        assert "\x1b" not in html
        assert "&lt;script&gt;" in html
    assert "MISBEHAVES" in finding(control_holds=False)._repr_html_()
    assert "MISBEHAVES" not in finding(control_holds=True)._repr_html_()
    picture = figures.bars({"a": [1, 2]}, ["1", "2"], "width", "share", "Bars", "See.")
    assert picture._repr_html_() == figures.to_html(picture)


def test_a_step_of_many_members_is_cut():
    wide = make_trace(sets=(tuple("ab"),)).steps[0]
    many = replace(
        wide, texts=["x"] * 99, probabilities=[0.01] * 99, tokens=[1] * 99, slots=list(range(99))
    )
    assert "and 49 more" in many._repr_html_()


def test_a_frame_without_pandas_says_what_to_install(modes, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    for call in (modes[0].to_frame, Findings([finding()], []).to_frame):
        with pytest.raises(TempoError, match=r"pip install 'tempo-harness\[notebook\]'"):
            call()


# --- other libraries


def test_a_plot_shows_the_attention_of_the_chosen_layer_and_head(modes):
    attention = modes[1].steps[3].attention
    for layer, head, expected in (
        (2, 1, attention[2, 1]),
        (None, 1, attention[:, 1].mean(axis=0)),
        (0, None, attention[0].mean(axis=0)),
        (None, None, attention.mean(axis=(0, 1))),
    ):
        figure = modes[1].plot_attention(3, layer=layer, head=head)
        drawn = figure.axes[0].images[0].get_array()
        assert np.abs(np.square(np.asarray(drawn)) - expected).max() < 1e-6
    assert np.abs(attention[2, 1] - attention[0, 1]).max() > 0.01  # layers do differ


def test_a_plot_of_hostile_tokens_is_drawn_and_is_no_formula(modes):
    figure = replace(hostile(modes[0])).plot_attention(3)
    labels = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert all(len(text) <= 14 and text.isprintable() for text in labels)
    assert not any(tick.get_parse_math() for tick in figure.axes[0].get_xticklabels())


def test_circuitsvis_gets_one_square_for_each_head_of_a_layer(modes):
    """Its `attention_heads` wants [heads, destination, source] and as many tokens."""
    visible = modes[1]
    arguments = circuitsvis_arguments(visible, layer=1)
    num_slots, num_prompt = visible.num_slots, len(visible.prompt_tokens)
    attention = arguments["attention"]
    assert attention.shape == (4, num_slots, num_slots)
    assert len(arguments["tokens"]) == num_slots
    assert (attention[:, :num_prompt] == 0).all()
    assert attention[:, num_prompt:].sum(axis=-1) == pytest.approx(1.0, abs=1e-5)
    wide = next(step for step in visible.steps if len(step.tokens) > 1)
    first, *_, last = wide.slots
    assert attention[:, first, last].max() > 0  # later in the cache, and so not masked
    assert arguments["mask_upper_tri"] is False


def test_bertviz_gets_a_tensor_for_each_layer(modes):
    """`head_view` wants a list of tensors (1, heads, length, length), and as many tokens."""
    import torch

    arguments = bertviz_arguments(modes[0])
    num_slots = modes[0].num_slots
    assert len(arguments["attention"]) == 3
    for layer, tensor in enumerate(arguments["attention"]):
        assert isinstance(tensor, torch.FloatTensor)
        assert tensor.shape == (1, 4, num_slots, num_slots)
        same = circuitsvis_arguments(modes[0], layer)["attention"]
        assert (tensor[0].numpy() == same).all()
    assert len(arguments["tokens"]) == num_slots


def test_texts_of_the_prompt_are_kept_and_must_fit(modes, tmp_path):
    trace = modes[0]
    assert "".join(trace.prompt_texts) == PROMPT
    assert load_trace(trace.save(tmp_path / "a")).prompt_texts == trace.prompt_texts
    replace(trace, prompt_texts=["one"]).save(tmp_path / "b")
    with pytest.raises(TraceError, match="1 texts of 18 tokens"):
        load_trace(tmp_path / "b")
    # a trace of an earlier tempo has none, and shows ids
    html = tempo.view(replace(trace, prompt_texts=[])).html
    assert "#" + str(trace.prompt_tokens[0]) in held(html)[0]["slots"]
