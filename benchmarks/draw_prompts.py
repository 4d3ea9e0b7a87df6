"""Draws the two fresh suites of prompts: fixtures/confirmatory.yaml and fixtures/replication.yaml.

Most prompts are pieces of texts that this project did not write. They come from Debian packages of
a free licence, whose versions and hashes stand below. The others come from fixtures/pool.yaml.
No model is run: only a tokenizer reads the texts, to measure their lengths.

    python -m benchmarks.draw_prompts                   # downloads the packages with apt-get
    python -m benchmarks.draw_prompts --packages DIR    # takes them from a folder

What keeps the suites apart: each document (a scenario, a section, a book, a module) belongs to one
suite in all its languages, and no two prompts share five words in a row.
"""

from __future__ import annotations

import argparse
import ast
import gettext
import gzip
import hashlib
import html
import random
import re
import struct
import subprocess
import tempfile
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from tempo.harness.prompts import read_suite
from tempo.wheels import KNOWN_MODELS, ensure

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
TOKENIZER = "smollm2-135m"
# When, in UTC. A claim that is registered later needs prompts of its own: change this and SEEDS,
# draw, and put the hashes that are printed into tests/test_draw_prompts.py.
DRAWN = "2026-11-28T12:36Z"
# One seed a suite, chosen before the draw. Those of two draws were given up unread, as claims were
# registered after it.
SEEDS = {"confirmatory": 20261132, "replication": 20261133}
# Halves the documents and the pool between the suites.
SPLIT_SEED = 20261127

# Tokens of a prompt: how many prompts of each kind have that length. Long ones are few because
# they are dear: 20 of 180 hold two thirds of a suite's tokens.
LENGTHS = {400: 2, 64: 3, 8: 5}
# Code has one kind where a language has two.
CODE_FACTOR = 2
# How many tokens a prompt may be short of its length: a word may be several tokens long.
SLACK = {400: 25, 64: 4, 8: 1}
# Two prompts that share so many words in a row count as near-duplicates.
SHARED_WORDS = 5
FEWEST_WORDS = 3
# Characters that surely hold a prompt: a token of these texts is rarely longer.
CHARACTERS_PER_TOKEN = 12
# A paragraph below this is a heading, a shout or the caption of a command.
FEWEST_CHARACTERS = 60


@dataclass(frozen=True)
class Package:
    """A Debian package that texts are drawn from.

    Attributes:
        name: What apt-get calls it.
        version: The one whose hash is known.
        sha256: Of the .deb file.
        license: Of the texts, with whom they belong to.
    """

    name: str
    version: str
    sha256: str
    license: str


OF_WESNOTH = "GPL-2+, (c) David White and the Battle for Wesnoth team and translators"
OF_REFERENCE = "GPL-2+, (c) Osamu Aoki and the translators of the Debian Reference"
PACKAGES = (
    Package(
        "wesnoth-1.16-dm",
        "1:1.16.9-1",
        "1997ad4d91e8de36415db2a3445904288f588a76d75111222d2aace409ace5c6",
        OF_WESNOTH,
    ),
    Package(
        "wesnoth-1.16-httt",
        "1:1.16.9-1",
        "05b16a3f8f8204278794aae14d8e6a7c95d2b2faef7337c4997c827a146d1bbd",
        OF_WESNOTH,
    ),
    Package(
        "wesnoth-1.16-trow",
        "1:1.16.9-1",
        "b5009e964ac7157a46d50de911e4f56f5bb4389d60b82a513b5f382671d180d7",
        OF_WESNOTH,
    ),
    Package(
        "wesnoth-1.16-utbs",
        "1:1.16.9-1",
        "81e05717bebbfb6348c0bed2cd6ce2560c4fd9205ed419c2e7bc039b4a70e228",
        OF_WESNOTH,
    ),
    Package(
        "sword-text-web",
        "426.0-1",
        "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1",
        "public domain (World English Bible)",
    ),
    Package(
        "sword-text-sparv",
        "2.60-1",
        "5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf",
        "public domain (Reina-Valera Bible of 1909)",
    ),
    Package(
        "debian-reference-en",
        "2.100",
        "9f31d3a17df505de09689ca255512ea58c1fc47c59bb1b0c7bf1c23362e9743f",
        OF_REFERENCE,
    ),
    Package(
        "debian-reference-de",
        "2.100",
        "3b0ce65fd63e75ddf8eb07ca36293425135080e690a07e06a6ac8bc8040ef0aa",
        OF_REFERENCE,
    ),
    Package(
        "debian-reference-fr",
        "2.100",
        "01424cba9bfa2e13166da22d3d692d33a22ec7d8ef935ec81fd8802746087f65",
        OF_REFERENCE,
    ),
    Package(
        "debian-reference-es",
        "2.100",
        "a59b68c96f83d3cf29a476c847aee38364764603ea62eee592791e0a843a269e",
        OF_REFERENCE,
    ),
    Package(
        "libpython3.11-stdlib",
        "3.11.2-6+deb12u9",
        "10f13e000ee757f5f2d2d3569f9e30546214a0c850acd78695feae373bfa3e53",
        "PSF-2.0, (c) Python Software Foundation and the authors that the modules name",
    ),
)

LANGUAGES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish"}
# Frequent words that tell the four languages apart: some pages are translated in part.
FREQUENT = {
    "en": "the of and to is you that for with this are not have be it",
    "de": "der die das und ist nicht sie ein eine mit zu den von für werden",
    "fr": "le les des et est vous une que pour dans du pas sur ce avec",
    "es": "el los las y es que una por para con del se no como su",
}


@dataclass(frozen=True)
class Document:
    """A text that belongs to one suite as a whole, with the places where a prompt may begin."""

    name: str
    text: str
    starts: tuple[int, ...]


# After a full stop that ends a word of four letters and more: no abbreviation is that long. French
# has a space before the sign.
SENTENCE = re.compile(r"(?:(?<=\w{4}[.!?…])|(?<=\w{4} [.!?…]))[\"”»’)]*\s+(?=[A-ZÀ-Þ„“«\"¿¡])")


def prose(name: str, language: str, paragraphs: Iterable[str]) -> Document:
    """A document of the paragraphs in a language; a prompt may begin with any sentence.

    >>> prose("a", "en", ["One of the sentences. And more.", "Ein Satz.", "The end."]).starts
    (0, 22, 33)
    """
    text = "\n\n".join(text for text in paragraphs if is_in(language, text))
    starts = {0, *(match.end() for match in SENTENCE.finditer(text))}
    return Document(name, text, tuple(sorted(starts)))


def code(name: str, source: str) -> Document:
    """A module; a prompt may begin with any statement at its margin that is no bare value.

    >>> code("a", "X = 1\\nimport os\\n\\ndef f():\\n    return X\\n").starts
    (6, 17)
    """
    lines = source.splitlines(keepends=True)
    left_out = (ast.Assign, ast.AnnAssign, ast.Expr)
    body = [node for node in ast.parse(source).body if not isinstance(node, left_out)]
    # a decorator stands above the line of what it decorates
    firsts = [
        min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
        for node in body
    ]
    return Document(name, source, tuple(len("".join(lines[: first - 1])) for first in firsts))


def is_in(language: str, text: str) -> bool:
    """Whether a text is in this language rather than in another of the four."""
    words = words_of(text)
    counts = {key: sum(word in FREQUENT[key].split() for word in words) for key in FREQUENT}
    return counts[language] > max(counts[key] for key in FREQUENT if key != language)


def scenario(source: str, translate: Callable[[str], str]) -> list[str]:
    """What is said and told in a scenario of the game, in this order, translated.

    Strings with variables or markup are left out, and so are those without a translation.
    """
    found = re.findall(r'\b(?:message|story)\s*=\s*_\s*"((?:[^"]|"")*)"', source)
    passages = []
    for string in found:
        translated = translate(string.replace('""', '"'))
        if translated and not re.search(r"[$<|{^]", translated):
            passages.append(" ".join(translated.split()))
    return [text for text in passages if len(text) >= FEWEST_CHARACTERS]


def sections(manual: str) -> dict[str, list[str]]:
    """The paragraphs of each section of the Debian Reference, without tables and lists."""
    found: dict[str, list[str]] = {}
    section = ""
    # the manual's layout uses spaces that do not break
    for block in re.split(r"\n\s*\n", manual.replace("\N{NO-BREAK SPACE}", " ")):
        if heading := re.match(r"(\d+\.\d+)\.\S* ", block):
            section = heading[1]
        lines = block.strip("\n").split("\n")
        if not section or not all(re.match(r" {4}\S", line) for line in lines):
            continue
        text = re.sub(r"\^\[\d+\]", "", " ".join(line.strip() for line in lines))
        is_sentence = text[0].isupper() and text[-1] in ".!?" and "|" not in text
        if is_sentence and len(text) >= FEWEST_CHARACTERS:
            found.setdefault(section, []).append(text)
    return found


def book(osis: str) -> list[str]:
    """The paragraphs of a book of the Bible, without headings, notes and verse numbers."""
    osis = re.sub(r"<note\b.*?</note>|<title\b.*?</title>", " ", osis, flags=re.DOTALL)
    paragraphs = []
    for part in re.split(r'<div [^>]*type="x-p"[^>]*>|<chapter[^>]*>', osis):
        text = html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"</?w\b[^>]*>", "", part)))
        text = re.sub(r"\s+([,.;:!?”)])", r"\1", " ".join(text.split()))
        if len(text) >= FEWEST_CHARACTERS:
            paragraphs.append(text)
    return paragraphs


def books_of(folder: Path) -> Iterator[str]:
    """The books in a SWORD module: zlib blocks, whose places stand in a file beside them."""
    for testament in ("ot", "nt"):
        blocks = (folder / f"{testament}.bzz").read_bytes()
        table = (folder / f"{testament}.bzs").read_bytes()
        for start, size, _ in struct.iter_unpack("<III", table):
            yield zlib.decompress(blocks[start : start + size]).decode()


def kinds_of(root: Path) -> dict[str, list[Document]]:
    """The documents of every kind, such as "German, prose", from the unpacked packages."""
    kinds: dict[str, list[Document]] = {}
    bibles = {"en": "sword-text-web", "es": "sword-text-sparv"}
    for key, language in LANGUAGES.items():
        stories = list(_scenarios(root, key))
        if key in bibles:
            stories += _books(root / bibles[key], key)
        kinds[f"{language}, prose"] = stories
        kinds[f"{language}, technical"] = _sections(root, key)
    kinds["Python, code"] = _modules(root / "libpython3.11-stdlib/usr/lib/python3.11")
    return kinds


def _scenarios(root: Path, key: str) -> Iterator[Document]:
    for package in sorted(root.glob("wesnoth-*")):
        game = package / "usr/share/games/wesnoth/1.16"
        translate = _translation(game / f"locale/{key}/LC_MESSAGES", key)
        for path in sorted(game.glob("data/campaigns/*/scenarios/*.cfg")):
            passages = scenario(path.read_text(encoding="utf-8"), translate)
            yield prose(f"{package.name}/{path.stem}", key, passages)


def _translation(folder: Path, key: str) -> Callable[[str], str]:
    """From the English string to the one in a language, or to "" if there is none."""
    if key == "en":
        return str
    (path,) = folder.glob("*.mo")
    with path.open("rb") as stream:
        catalog = gettext.GNUTranslations(stream)

    def translate(string: str) -> str:
        translated = catalog.gettext(string)
        return "" if translated == string else translated

    return translate


def _sections(root: Path, key: str) -> list[Document]:
    name = f"usr/share/debian-reference/debian-reference.{key}.txt.gz"
    path = root / f"debian-reference-{key}" / name
    found = sections(gzip.decompress(path.read_bytes()).decode())
    return [prose(f"debian-reference/{number}", key, texts) for number, texts in found.items()]


def _books(package: Path, key: str) -> Iterator[Document]:
    (folder,) = package.glob("usr/share/sword/modules/texts/ztext/*")
    for osis in books_of(folder):
        if name := re.search(r'osisID="(\w+)"', osis):
            yield prose(f"bible/{name[1]}", key, book(osis))


def _modules(library: Path) -> list[Document]:
    """The modules of Python's library, without those that hold data or test others."""
    left_out = re.compile(r"(test|tests|idlelib|pydoc_data|encodings|lib2to3|_sysconfigdata.*)$")
    found = []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).with_suffix("")
        if not any(left_out.match(part) for part in name.parts):
            found.append(code(f"python/{name}", path.read_text(encoding="utf-8")))
    return found


def cut(text: str, target: int, count: Callable[[str], int]) -> str | None:
    """The beginning of a text, of at most `target` tokens, that ends where a word ends.

    None if no such beginning comes near enough, or if one of 8 tokens goes beyond its sentence.

    >>> cut("one two three four five six seven eight nine", 8, lambda text: len(text.split()))
    'one two three four five six seven eight'
    """
    text = text[: target * CHARACTERS_PER_TOKEN]
    ends = [match.start() for match in re.finditer(r"\s+", text)]
    place = bisect_right(ends, target, key=lambda end: count(text[:end]))
    if place == 0:
        return None
    end = ends[place - 1]
    # the white space behind it may end the sentence, which then is no beginning of one
    goes_on = not SENTENCE.search(text[: end + 2]) and "\n\n" not in text[: end + 2]
    is_near = target - SLACK[target] <= count(text[:end]) <= target
    return text[:end] if is_near and (goes_on or target > min(LENGTHS)) else None


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text, in small letters."""
    return tuple(re.findall(r"\w+", text.lower()))


@cache
def _runs(text: str, size: int) -> frozenset[tuple[str, ...]]:
    words = words_of(text)
    return frozenset(words[i : i + size] for i in range(len(words) - size + 1))


def are_near(one: str, other: str) -> bool:
    """Whether two prompts share five words in a row, or all the words of one that has fewer.

    >>> are_near("the cat sat on the mat", "a cat sat on the mat"), are_near("a b c", "b c a b")
    (True, False)
    """
    size = min(SHARED_WORDS, len(words_of(one)), len(words_of(other)))
    return not _runs(one, size).isdisjoint(_runs(other, size))


def halves(names: Iterable[str]) -> dict[str, set[str]]:
    """Half of the names for each suite, at random."""
    mixed = sorted(set(names))
    random.Random(SPLIT_SEED).shuffle(mixed)
    return {suite: set(mixed[place::2]) for place, suite in enumerate(SEEDS)}


def draw(
    kinds: dict[str, list[Document]],
    seed: int,
    count: Callable[[str], int],
    taken: list[str],
) -> dict[str, list[str]]:
    """The prompts of one suite by category; each is added to `taken`, and near none of these.

    Documents that gave no prompt yet come first, so that few give two, and none gives two of one
    kind and length. The longest prompts are drawn first, as few documents can give one.

    Raises:
        SystemExit: if the documents do not suffice.
    """
    chance = random.Random(seed)
    uses: Counter[str] = Counter()
    drawn: dict[str, list[str]] = {}
    for length, number in LENGTHS.items():
        for kind, documents in kinds.items():
            mixed = chance.sample(documents, len(documents))
            mixed.sort(key=lambda document: uses[document.name])
            wanted = number * (CODE_FACTOR if kind.endswith("code") else 1)
            found: list[str] = []
            for document in mixed:
                if len(found) == wanted:
                    break
                prompt = _one(document, length, chance, count, taken)
                if prompt is not None:
                    uses[document.name] += 1
                    found.append(prompt)
                    taken.append(prompt)
            if len(found) < wanted:
                raise SystemExit(
                    f"only {len(found)} of {wanted} prompts of {length} tokens for {kind}, from "
                    f"{len(mixed)} documents; add a package, or lower LENGTHS"
                )
            drawn[f"{kind}, {length} tokens"] = found
    return drawn


def _one(
    document: Document,
    length: int,
    chance: random.Random,
    count: Callable[[str], int],
    taken: Sequence[str],
) -> str | None:
    """A prompt from a document, from the first of its places in random order that gives one."""
    for start in chance.sample(document.starts, len(document.starts)):
        prompt = cut(document.text[start:], length, count)
        if prompt is None or len(words_of(prompt)) < FEWEST_WORDS:
            continue
        if not any(are_near(prompt, other) for other in taken):
            return prompt
    return None


def shared_out(pool: dict[str, list[str]], taken: list[str]) -> dict[str, dict[str, list[str]]]:
    """The pool's prompts by suite and category: half of each category for each suite.

    Raises:
        SystemExit: if a prompt is near one that is taken, or near another of the pool.
    """
    found: dict[str, dict[str, list[str]]] = {suite: {} for suite in SEEDS}
    for category, prompts in pool.items():
        for prompt in prompts:
            if near := next((other for other in taken if are_near(prompt, other)), None):
                raise SystemExit(f"{prompt!r} of the pool is too near {near!r}; write another")
            taken.append(prompt)
        for suite, part in halves(prompts).items():
            found[suite][f"English, {category}, own words"] = sorted(part)
    return found


def fetched(folder: Path, packages: Sequence[Package] = PACKAGES) -> None:
    """Download what is missing in a folder, and check every package by its hash.

    Raises:
        SystemExit: if a package is another one, or is not there.
    """
    for package in packages:
        if not list(folder.glob(f"{package.name}_*.deb")):
            command = ["apt-get", "download", f"{package.name}={package.version}"]
            subprocess.run(command, cwd=folder, check=True)
        for path in folder.glob(f"{package.name}_*.deb"):
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != package.sha256:
                raise SystemExit(
                    f"{path.name} has the sha256 {found}, expected {package.sha256} of "
                    f"{package.name} {package.version}; put that version into the folder"
                )


def header(suite: str) -> str:
    """What stands above the prompts of a suite: how they were drawn, from what, by whose leave."""
    lines = [
        f"The {suite} suite. Drawn by benchmarks/draw_prompts.py at {DRAWN} with the seed",
        f"{SEEDS[suite]}; do not edit. The project had run no model on it when it was drawn.",
        "",
        f"Lengths are tokens of {TOKENIZER}. A prompt begins with a sentence (code: a statement)",
        "and ends where a word ends; one of 8 tokens ends within its first sentence.",
        "Categories with 'own words' are of this project, under its licence. All others are",
        "excerpts. They stay under the licences named here, whose texts are in fixtures/licences/.",
        "",
    ]
    for package in PACKAGES:
        lines += [f"{package.name} {package.version}", f"  licence: {package.license}"]
        lines += [f"  sha256: {package.sha256}"]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, to be read as they are."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def as_yaml(suite: str, prompts: dict[str, list[str]]) -> str:
    """The file of a suite."""
    languages = [*LANGUAGES.values(), "Python"]
    content = {"language": ", ".join(languages), "drawn": DRAWN, "prompts": prompts}
    body = yaml.dump(content, Dumper=_Dumper, allow_unicode=True, sort_keys=False, width=90)
    return header(suite) + body


def main() -> None:
    """Fetch, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--packages", type=Path, help="a folder with the .deb files")
    parser.add_argument("--out", type=Path, default=FIXTURES, help="where the suites are written")
    arguments = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ensure(KNOWN_MODELS[TOKENIZER], None))

    @cache
    def count(text: str) -> int:
        return len(tokenizer(text).input_ids)

    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.packages or Path(scratch)
        fetched(folder)
        root = Path(scratch) / "unpacked"
        root.mkdir()
        for package in PACKAGES:
            (path,) = folder.glob(f"{package.name}_*.deb")
            subprocess.run(["dpkg", "-x", path, root / package.name], check=True)
        kinds = kinds_of(root)

    taken = [prompt.text for prompt in read_suite(str(FIXTURES / "prompts.yaml")).prompts]
    pool = yaml.safe_load((FIXTURES / "pool.yaml").read_text(encoding="utf-8"))["prompts"]
    own = shared_out(pool, taken)
    parts = halves(document.name for documents in kinds.values() for document in documents)
    for suite, seed in SEEDS.items():
        part = {
            kind: [document for document in documents if document.name in parts[suite]]
            for kind, documents in kinds.items()
        }
        prompts = draw(part, seed, count, taken) | own[suite]
        path = arguments.out / f"{suite}.yaml"
        text = as_yaml(suite, prompts)
        path.write_text(text, encoding="utf-8")
        sizes = [count(text) for texts in prompts.values() for text in texts]
        print(f"written: {path}, {len(sizes)} prompts, {sum(sizes)} tokens")
        print(f"  sha256: {hashlib.sha256(text.encode()).hexdigest()}")


if __name__ == "__main__":
    main()
