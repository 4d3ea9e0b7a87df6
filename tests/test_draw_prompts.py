"""The two fresh suites: what is committed is what was drawn, and the drawing keeps its rules."""

import gettext
import gzip
import hashlib
import struct
import zlib
from collections import Counter
from itertools import combinations

import pytest
import yaml

from benchmarks import draw_prompts
from benchmarks.draw_prompts import (
    FIXTURES,
    LENGTHS,
    PACKAGES,
    SEEDS,
    SLACK,
    Package,
    are_near,
    as_yaml,
    book,
    books_of,
    cut,
    draw,
    fetched,
    halves,
    header,
    is_in,
    kinds_of,
    prose,
    scenario,
    sections,
    shared_out,
)
from tempo.claims import moment
from tempo.harness.prompts import SuitePrompt, read_suite

# Of the files as they were drawn. Claims are confirmed on these very prompts: another hash is
# another suite, on which models may have been run.
FROZEN = {
    "confirmatory": "0635b7aec2031f68b82f8316b66746f3e4cb13a9cf5b8fde8af6af9608916f7a",
    "replication": "86c7eb2bd5a7e57bb9eefd5f3abddf74a7526034025da8ec52395a627f028247",
}
OWN = "own words"


def path_of(suite):
    return FIXTURES / f"{suite}.yaml"


def prompts_of(suite):
    return read_suite(str(path_of(suite))).prompts


# --- what is committed


def is_frozen(suite, content):
    return hashlib.sha256(content).hexdigest() == FROZEN[suite]


@pytest.mark.parametrize("suite", SEEDS)
def test_a_fresh_suite_is_the_one_that_was_drawn(suite):
    content = path_of(suite).read_bytes()
    assert is_frozen(suite, content)
    assert not is_frozen(suite, content.replace(b"the", b"teh", 1))
    assert len(content) < 250_000
    drawn = yaml.safe_load(content)["drawn"]
    assert drawn == draw_prompts.DRAWN
    assert moment(drawn) is not None and moment("yesterday") is None


def missing_of_header(suite, text):
    """What a suite's file does not say of its drawing and of its sources."""
    lines = [line.removeprefix("# ").strip() for line in text.splitlines() if line[:1] == "#"]
    wanted = [f"{SEEDS[suite]}; do not edit. The project had run no model on it when it was drawn."]
    for package in PACKAGES:
        wanted += [f"{package.name} {package.version}", f"sha256: {package.sha256}"]
    licences = Counter(f"licence: {package.license}" for package in PACKAGES)
    short = [line for line, number in licences.items() if lines.count(line) < number]
    return [line for line in wanted if line not in lines] + short


@pytest.mark.parametrize("suite", SEEDS)
def test_the_file_names_its_seed_and_the_licence_and_hash_of_every_source(suite):
    text = path_of(suite).read_text(encoding="utf-8")
    assert text.startswith(header(suite))
    assert missing_of_header(suite, text) == []
    for package in PACKAGES:
        for line in (f"#   licence: {package.license}\n", f"#   sha256: {package.sha256}\n"):
            assert missing_of_header(suite, text.replace(line, "", 1)) != []


def licence_texts(package):
    """The file with the licence of a package's texts; none is needed in the public domain."""
    name = package.license.partition(",")[0].removesuffix("+")
    return [] if name.startswith("public domain") else [FIXTURES / "licences" / f"{name}.txt"]


def test_the_text_of_every_licence_lies_beside_the_suites():
    files = {path for package in PACKAGES for path in licence_texts(package)}
    assert {path.name for path in files} == {"GPL-2.txt", "PSF-2.0.txt"}
    assert all(path.stat().st_size > 10_000 for path in files)
    other = Package("a", "1", "0", "MIT, (c) somebody")
    assert not any(path.exists() for path in licence_texts(other))


def near_pairs(prompts):
    return [pair for pair in combinations(prompts, 2) if are_near(*pair)]


def test_no_fresh_prompt_is_near_another_or_near_one_that_was_seen():
    fresh = [prompt.text for suite in SEEDS for prompt in prompts_of(suite)]
    seen = [prompt.text for prompt in read_suite(str(FIXTURES / "prompts.yaml")).prompts]
    assert len(set(fresh)) == len(fresh) == 360
    assert near_pairs(fresh) == []
    assert [pair for pair in ((a, b) for a in fresh for b in seen) if are_near(*pair)] == []
    # the same check on what it must find
    assert near_pairs([*fresh[:3], fresh[1] + " more"]) == [(fresh[1], fresh[1] + " more")]
    assert are_near("Yesterday the cat sat on the", "The cat sat on the")


def unlike_the_promise(prompts):
    """Categories with another number of prompts than the recipe says."""
    expected = {}
    for kind in ("prose", "technical"):
        for language in ("English", "German", "French", "Spanish"):
            for length, number in LENGTHS.items():
                expected[f"{language}, {kind}, {length} tokens"] = number
    expected |= {f"Python, code, {length} tokens": 2 * n for length, n in LENGTHS.items()}
    kinds = "narrative factual technical conversational simple complex question incomplete list"
    expected |= {f"English, {kind}, {OWN}": 8 for kind in [*kinds.split(), "code"]}
    found = Counter(prompt.category for prompt in prompts)
    return {name: found[name] for name in {*expected, *found} if found[name] != expected.get(name)}


@pytest.mark.parametrize("suite", SEEDS)
def test_languages_lengths_and_sources_are_as_many_as_promised(suite):
    prompts = prompts_of(suite)
    assert unlike_the_promise(prompts) == {}
    assert unlike_the_promise(prompts[1:]) == {prompts[0].category: 1}
    assert len(prompts) == 180
    not_own = [prompt for prompt in prompts if OWN not in prompt.category]
    assert len(not_own) == 100
    assert sum("400 tokens" in prompt.category for prompt in prompts) == 20


def of_another_length(prompts, tokenizer):
    """Prompts that are longer or shorter than their category says."""
    found = []
    for prompt in prompts:
        if OWN in prompt.category:
            continue
        length = int(prompt.category.split()[-2])
        size = len(tokenizer(prompt.text).input_ids)
        if not length - SLACK[length] <= size <= length:
            found.append(prompt)
    return found


@pytest.mark.parametrize("suite", SEEDS)
def test_lengths_are_those_of_the_categories(suite, real):
    prompts = prompts_of(suite)
    assert of_another_length(prompts, real.tokenizer) == []
    longer = SuitePrompt("word " * 70, "German, technical, 64 tokens")
    assert of_another_length([longer], real.tokenizer) == [longer]


def shares_off(suite, part):
    """Categories whose share of a part is off by a prompt and more."""
    whole, found = (Counter(prompt.category for prompt in each) for each in (suite.prompts, part))
    ratio = len(part) / len(suite.prompts)
    return [name for name in whole if abs(found[name] - ratio * whole[name]) >= 1]


@pytest.mark.parametrize("suite", SEEDS)
def test_a_part_has_every_language_and_length_in_proportion(suite):
    whole = read_suite(str(path_of(suite)))
    for number in (37, 60, 90, 180):
        part = whole.spread(number)
        assert len(set(part)) == number
        assert shares_off(whole, part) == []
    assert shares_off(whole, whole.prompts[:60]) != []


# --- how it was drawn: the same code on a small text


def words(text):
    return len(text.split())


def story(number, sentences=12):
    """A document of its own words."""
    lines = [
        " ".join([f"Begin{number}x{line}", *(f"word{number}x{line}x{i}" for i in range(11))]) + "."
        for line in range(sentences)
    ]
    return draw_prompts.Document(f"story {number}", " ".join(lines), _starts(lines))


def _starts(lines):
    return tuple(sum(len(line) + 1 for line in lines[:place]) for place in range(len(lines)))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(draw_prompts, "LENGTHS", {64: 1, 8: 3})
    return {"English, prose": [story(i) for i in range(10)]}


def test_the_same_seed_draws_the_same_and_another_seed_another(small):
    first, again, other = (draw(small, seed, words, []) for seed in (1, 1, 2))
    assert first == again != other
    assert {name: len(texts) for name, texts in first.items()} == {
        "English, prose, 64 tokens": 1,
        "English, prose, 8 tokens": 3,
    }
    texts = [text for each in first.values() for text in each]
    assert [words(text) for text in texts] == [64, 8, 8, 8]
    assert len({text.split("x")[0] for text in texts}) == 4  # no document gave two


def test_nothing_is_drawn_that_is_near_what_is_taken(small):
    taken = [document.text for document in small["English, prose"][:6]]
    near = {}
    for name, known in (("told", taken), ("not told", [])):
        texts = [text for each in draw(small, 1, words, list(known)).values() for text in each]
        near[name] = [text for text in texts if any(are_near(text, other) for other in taken)]
    assert near["told"] == []
    assert near["not told"] != []


def test_too_few_documents_are_said(small):
    few = {"English, prose": small["English, prose"][:2]}
    with pytest.raises(SystemExit, match="only 2 of 3 prompts of 8 tokens .* add a package"):
        draw(few, 1, words, [])


def test_a_prompt_ends_with_a_word_and_a_short_one_within_its_sentence():
    text = "One two three four five six seven eight nine ten. Then more of it."
    assert cut(text, 8, words) == "One two three four five six seven eight"
    # tokens of three characters: nowhere does a word end near the eighth
    assert cut("Donaudampfschifffahrtsgesellschaft und so weiter", 8, lambda t: len(t) // 3) is None
    for end in (". Then", "!\n\nThen", "… Then", " ! Then"):
        short = f"One two three four five six seven eight{end} more"
        assert cut(short, 8, lambda text: words(text.replace(" !", "!"))) is None
    assert cut("a b " * 40, 64, words) == ("a b " * 32).strip()


def test_halves_are_disjoint_and_whole():
    names = [f"n{i}" for i in range(11)]
    parts = halves([*names, *names])
    one, other = parts.values()
    assert one | other == set(names)
    assert not one & other
    assert abs(len(one) - len(other)) == 1


def test_the_pool_is_shared_out_and_must_be_new():
    pool = {"simple": ["A cow eats green", "Tom kicks his ball", "Ducks swim in our", "Rain is a"]}
    taken = []
    parts = shared_out(pool, taken)
    shared = [text for part in parts.values() for texts in part.values() for text in texts]
    assert sorted(shared) == sorted(pool["simple"]) == sorted(taken)
    assert [len(texts) for part in parts.values() for texts in part.values()] == [2, 2]
    with pytest.raises(SystemExit, match="too near 'Yesterday tom kicks his ball'; write another"):
        shared_out(pool, ["Yesterday tom kicks his ball"])


def test_the_committed_pool_is_what_stands_in_the_suites():
    pool = {prompt.text for prompt in read_suite(str(FIXTURES / "pool.yaml")).prompts}
    own = [p.text for suite in SEEDS for p in prompts_of(suite) if OWN in p.category]
    assert set(own) == pool and len(own) == len(pool) == 160


def test_what_is_written_is_read_as_it_was(tmp_path):
    texts = ["two\n\n  lines", "a: b # c", "- x", "yes", "„ä“ 'q' \"r\"", "ends with\n-"]
    path = tmp_path / "a.yaml"
    path.write_text(as_yaml("replication", {"German, prose": texts}), encoding="utf-8")
    assert [prompt.text for prompt in read_suite(str(path)).prompts] == texts


# --- the sources


def test_languages_are_told_apart():
    assert is_in("de", "Das ist nicht der Weg, den sie mit uns gehen.")
    assert is_in("fr", "Nous avons vaincu ces choses qui vivent dans les bois.")
    assert not is_in("fr", "Recent versions of the editor start in the normal mode.")
    assert not is_in("en", "Orks?")
    assert prose("a", "fr", ["See the manual of it.", "Le chat est sur la table."]).text == (
        "Le chat est sur la table."
    )


LONG = "The king of the western isles had sent no word to us since that spring."
CFG = f'''
name=_ "The Isle of the King and of the people who had sent for us in spring"
message=_ "{LONG}"
story= _ "He said ""{LONG}"""
message=_ "Not yet!"
female_message=_ "Queen: {LONG}"
message=_ "{LONG} $unit.name"
'''


def test_a_scenario_gives_what_is_said_without_names_and_variables():
    assert scenario(CFG, str) == [LONG, f'He said "{LONG}"']
    assert scenario(CFG, lambda string: "") == []


MANUAL = f"""\
1.1. A contents line of the manual ..... 3

    {LONG}

1.1.\N{NO-BREAK SPACE}First steps

    {LONG}^[1]
\N{NO-BREAK SPACE}   {LONG}

    # a command of some length that is no sentence but ends with a dot, as such.

    +-----+
    |a table|

      • {LONG}

    {LONG[:-1]} as follows:

1.2.3. More

    {LONG}
"""


def test_sections_are_paragraphs_without_tables_lists_and_commands():
    assert sections(MANUAL) == {"1.1": [LONG, f"{LONG} {LONG}"], "1.2": [LONG]}


OSIS = (
    '<div osisID="Jonah" type="book"/><title>Jonah</title><chapter n="1"/>'
    '<w lemma="x">The</w> king of the isles,<note>a note</note>who had sent no word'
    "<verse/> &amp; no bread, slept <l/>in the boat <w>.</w>"
    '<div sID="g" type="x-p"/>Short.'
)


def test_a_book_is_read_without_notes_headings_and_verse_marks():
    text = "The king of the isles, who had sent no word & no bread, slept in the boat."
    assert book(OSIS) == [text]


def test_code_begins_with_a_statement_and_with_what_decorates_it():
    source = '"""Doc."""\nX = 1\nimport os\n\n\n@cache\ndef f():\n    return X\n\n\nprint(f())\n'
    document = draw_prompts.code("a", source)
    assert [document.text[start:].split("\n")[0] for start in document.starts] == [
        "import os",
        "@cache",
    ]


def mo_file(path, pairs):
    """A catalogue of translations in gettext's format."""
    rows, texts = [], b""
    head = 28 + 16 * len(pairs)
    for column in (0, 1):
        for pair in sorted(pairs.items()):
            text = pair[column].encode()
            rows.append(struct.pack("<II", len(text), head + len(texts)))
            texts += text + b"\0"
    count = len(pairs)
    start = struct.pack("<7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(start + b"".join(rows) + texts)
    with path.open("rb") as stream:
        assert gettext.GNUTranslations(stream).gettext(LONG) == pairs[LONG]


TRANSLATED = {
    "de": "Der König der Inseln und das Volk, das nicht mehr zu uns kam, sind nun fort.",
    "fr": "Le roi des îles est parti et les gens que nous avons vus ne sont pas avec lui.",
    "es": "El rey de las islas se fue y los hombres que vimos no están con su señor hoy.",
}


@pytest.fixture
def unpacked(tmp_path):
    """The packages as dpkg unpacks them, with a small text each."""
    game = tmp_path / "wesnoth-a/usr/share/games/wesnoth/1.16"
    (game / "data/campaigns/A/scenarios").mkdir(parents=True)
    (game / "data/campaigns/A/scenarios/01.cfg").write_text(CFG, encoding="utf-8")
    for key, text in TRANSLATED.items():
        mo_file(
            game / f"locale/{key}/LC_MESSAGES/a.mo",
            {"": "Content-Type: text/plain; charset=utf-8\n", LONG: text},
        )
    for key in ("en", *TRANSLATED):
        folder = tmp_path / f"debian-reference-{key}/usr/share/debian-reference"
        folder.mkdir(parents=True)
        manual = MANUAL.replace(LONG, TRANSLATED.get(key, LONG))
        (folder / f"debian-reference.{key}.txt.gz").write_bytes(gzip.compress(manual.encode()))
    for name in ("web", "sparv"):
        folder = tmp_path / f"sword-text-{name}/usr/share/sword/modules/texts/ztext/a"
        folder.mkdir(parents=True)
        for testament in ("ot", "nt"):
            block = zlib.compress(OSIS.encode())
            (folder / f"{testament}.bzz").write_bytes(b"xx" + block)
            table = struct.pack("<III", 2, len(block), len(OSIS))
            (folder / f"{testament}.bzs").write_bytes(table)
        assert list(books_of(folder)) == [OSIS, OSIS]
    library = tmp_path / "libpython3.11-stdlib/usr/lib/python3.11"
    for name in ("json/tool.py", "test/test_json.py", "encodings/ascii.py", "_sysconfigdata_x.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text("import os\n", encoding="utf-8")
    return tmp_path


def test_every_kind_is_read_from_its_packages(unpacked):
    kinds = kinds_of(unpacked)
    names = {kind: [document.name for document in found] for kind, found in kinds.items()}
    assert names.pop("Python, code") == ["python/json/tool"]
    assert names.pop("English, prose") == ["wesnoth-a/01", "bible/Jonah", "bible/Jonah"]
    assert names.pop("German, prose") == ["wesnoth-a/01"]
    for language in ("English", "German", "French", "Spanish"):
        assert names[f"{language}, technical"] == [
            "debian-reference/1.1",
            "debian-reference/1.2",
        ]
    assert kinds["German, prose"][0].text == TRANSLATED["de"]
    assert kinds["Spanish, technical"][1].text == TRANSLATED["es"]
    # an English book under a Spanish name gives nothing to begin with
    assert kinds["Spanish, prose"][1].text == ""


def test_another_package_than_the_one_that_was_drawn_from_is_refused(tmp_path):
    (tmp_path / "a_1_all.deb").write_bytes(b"content")
    right = hashlib.sha256(b"content").hexdigest()
    fetched(tmp_path, [Package("a", "1", right, "MIT")])
    with pytest.raises(SystemExit, match=f"expected {'0' * 64} of a 1; put that version"):
        fetched(tmp_path, [Package("a", "1", "0" * 64, "MIT")])
