"""What is installed: by hash, in versions that resolve together, under known licences."""

import re
import tomllib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import tempo
from tempo import models
from tempo.errors import ModelError

ROOT = Path(__file__).parent.parent
LOCKS = ("requirements.txt", "requirements-torch-cpu.txt", "requirements-torch-cuda.txt")
SHA256 = re.compile(r"--hash=sha256:[0-9a-f]{64}$")


def entries(text):
    """The entries of a lock, each with its continued lines."""
    return re.findall(r"^[a-zA-Z0-9].*\n(?:    .*\n)*", text, flags=re.MULTILINE)


def faults(text):
    """The entries that are not one pinned version with hashes."""
    wrong = []
    for entry in entries(text):
        first, *hashes = entry.rstrip().split("\n")
        lines = [line.strip().removesuffix(" \\") for line in hashes]
        if "==" not in first or not lines or not all(map(SHA256.match, lines)):
            wrong.append(first)
    return wrong


def pins(name):
    """{package: version} of a file of pins."""
    text = (ROOT / name).read_text()
    found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;+\\]+)", text, flags=re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_of_the_set_up_is_pinned_by_hash(name):
    text = (ROOT / name).read_text()
    assert entries(text)
    assert faults(text) == []
    assert "index-url" not in text, "a lock names no index"


def test_an_entry_without_a_hash_would_be_seen():
    good = "numpy==2.4.6 \\\n    --hash=sha256:" + "0" * 64 + "\n"
    assert faults(good) == []
    assert faults("numpy==2.4.6\n" + good) == ["numpy==2.4.6"]
    assert faults(good.replace("==", ">=")) == ["numpy>=2.4.6 \\"]
    assert faults(good.replace("sha256", "md5")) == ["numpy==2.4.6 \\"]


def test_the_lock_holds_what_pyproject_asks_for_in_the_versions_of_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["test"], *extras["dev"]]
    locked = {name: version for lock in LOCKS for name, version in pins(lock).items()}
    for requirement in map(Requirement, asked):
        version = locked[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(version), requirement
    pinned = pins("constraints.txt")
    assert {name: locked[name] for name in pinned.keys() & locked.keys()} == {
        name: version for name, version in pinned.items() if name in locked
    }
    assert len(pinned.keys() & locked.keys()) > 15


def test_both_commands_of_the_readme_set_up_by_hash():
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile[makefile.index("$(READY): ") :].partition("\n\n")[0]
    installs = [line for line in recipe.splitlines() if "-r requirements" in line]
    assert len(installs) == 3
    assert all("--require-hashes" in line for line in installs)
    for target in ("experiments", "test"):
        assert re.search(rf"^{target}: setup", makefile, flags=re.MULTILINE)


def test_the_page_of_licences_lists_every_package_of_the_lock():
    spec = spec_from_file_location("licences", ROOT / "docs" / "licences.py")
    licences = module_from_spec(spec)
    spec.loader.exec_module(licences)
    page = (ROOT / "docs" / "licences.md").read_text()
    rows = re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", page, flags=re.MULTILINE)
    assert dict(row[:2] for row in rows if row[0] != "package") == licences.pins()
    assert not [row for row in rows if row[2] == "not stated"]


@pytest.mark.parametrize(
    ("name", "settings", "revision"),
    [
        ("some/model", {}, None),
        ("some/model", {"revision": "abc123"}, "abc123"),
        ("some/model@v1.0", {}, "v1.0"),
    ],
)
def test_a_hub_id_is_loaded_at_the_revision_that_was_asked_for(
    monkeypatch, name, settings, revision
):
    asked = []

    def from_pretrained(source, dtype, *, local, revision=None):
        asked.append((source, local, revision))
        raise ModelError("no hub here")

    monkeypatch.setattr(models, "_from_pretrained", from_pretrained)
    with pytest.raises(ModelError, match="no hub here"):
        tempo.load_model(name, **settings)
    assert asked == [("some/model", False, revision)]


def test_a_revision_reaches_model_and_tokenizer_and_the_attention_is_named(monkeypatch):
    import transformers

    seen = []

    class Loader:
        @staticmethod
        def from_pretrained(source, **settings):
            seen.append(settings)
            info = ("missing_keys", "mismatched_keys", "unexpected_keys")
            return object(), {name: [] for name in info}

    monkeypatch.setattr(transformers, "AutoModelForCausalLM", Loader)
    monkeypatch.setattr(transformers, "AutoTokenizer", Loader)
    models._from_pretrained("some/model", "float32", local=False, revision="abc")
    assert [settings["revision"] for settings in seen] == ["abc", "abc"]
    assert seen[0]["attn_implementation"] == models.PLAIN_ATTENTION
    assert not any(settings["trust_remote_code"] for settings in seen)


@pytest.mark.parametrize("name", ["tiny", "smollm2-135m"])
def test_a_revision_of_what_is_not_on_the_hub_is_refused(name):
    with pytest.raises(tempo.ChoiceError, match="hub id"):
        tempo.load_model(name, revision="abc")
