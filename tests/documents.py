"""The code blocks of Markdown pages: found, and run one after another in a folder.

`python -m tests.documents PAGE LANGUAGES` runs a page in the current folder and prints what went
wrong as a JSON list. Everything runs in that one process, since importing torch takes seconds.

What a page says about its blocks, in the paragraph before one:

- "Save this as `name`" makes a file of it.
- `<!-- not run by the tests -->` leaves it out.

A `text` block after a command or a program is what that prints. `...` stands for anything.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SAVED = re.compile(r"[Ss]ave\s+this\s+as\s+`([^`]+)`")
NOT_RUN = "<!-- not run by the tests -->"
PRINTED = re.compile(r"^\s*print\(.*\)  # (.*)$", re.MULTILINE)
DECIMAL = r"-?\d+\.\d+"
UNITS_OF_LAST_PLACE = 1.5  # by which a printed decimal may differ on another machine
OK, FAILED, USAGE_ERROR = 0, 1, 4


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the paragraph before it and the line it begins in."""

    language: str
    text: str
    before: str
    line: int

    @property
    def file(self) -> str:
        """The name of the file that the block is, empty if it is none."""
        found = SAVED.search(self.before)
        return found[1] if found else ""

    @property
    def is_run(self) -> bool:
        return NOT_RUN not in self.before


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a Markdown page, in order."""
    found: list[Block] = []
    before: list[str] = []
    inside: list[str] | None = None
    language, begins, ended = "", 0, False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if inside is None and line.startswith("```"):
            inside, language, begins = [], line.removeprefix("```").strip(), number
        elif line == "```" and inside is not None:
            text = "".join(f"{each}\n" for each in inside)
            found.append(Block(language, text, "\n".join(before), begins))
            before, inside = [], None
        elif inside is not None:
            inside.append(line)
        elif line.strip():
            before = [line] if ended else [*before, line]
        ended = not line.strip()
    return found


def missing_lines(expected: str, found: str) -> list[str]:
    """The expected lines that are not among those found, which must come in the same order."""
    rest, missing = found.splitlines(), []
    for wanted in filter(lambda line: line.strip(" ."), expected.splitlines()):
        places = [i for i, line in enumerate(rest) if _is_like(wanted, line)]
        if places:
            rest = rest[places[0] + 1 :]
        else:
            missing.append(wanted)
    return missing


def _is_like(expected: str, found: str) -> bool:
    """Whether a line is the expected one, with other spaces and the last place of decimals."""
    pattern = ""
    for part in re.split(rf"({DECIMAL}|\s*\.\.\.|\s+)", expected.strip()):
        if re.fullmatch(DECIMAL, part):
            pattern += f"({DECIMAL})"
        elif part.endswith("..."):
            pattern += ".*"
        else:
            pattern += r"\s+" if part.isspace() else re.escape(part)
    match = re.fullmatch(pattern, found.strip())
    decimals = re.findall(DECIMAL, expected)
    return match is not None and all(map(_is_near, decimals, match.groups()))


def _is_near(expected: str, found: str) -> bool:
    last_place = 10.0 ** -len(expected.partition(".")[2])
    return abs(float(expected) - float(found)) <= UNITS_OF_LAST_PLACE * last_place


def problems_of(page: Path, languages: list[str]) -> Iterator[str]:
    """Run a page in the current folder; what is not as the page says, in lines."""
    names: dict[str, object] = {}
    printed = None  # by the block before
    for block in blocks_of(page):
        where = f"{page.name}, line {block.line}"
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
            printed = None
        elif block.language == "text" and printed is not None:
            for line in missing_lines(block.text, printed):
                yield f"{where}: not printed: {line!r}. Printed was:\n{printed}"
            printed = None
        elif block.language in languages and block.is_run:
            following = _text_after(page, block)
            if block.language == "python":
                printed = _python(block, names)
            elif block.language == "console":
                printed = yield from _console(block, where)
            else:
                printed = yield from _shell(block, where, following)
            for line in missing_lines("\n".join(PRINTED.findall(block.text)), printed):
                yield f"{where}: not printed: {line!r}. Printed was:\n{printed}"


def _text_after(page: Path, block: Block) -> str:
    """The text block that follows a block, which says what it prints; empty if there is none."""
    later = [each for each in blocks_of(page) if each.line > block.line][:1]
    return "".join(each.text for each in later if each.language == "text" and not each.file)


def _python(block: Block, names: dict[str, object]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block.text, f"line {block.line}", "exec"), names)
    return printed.getvalue()


def _shell(block: Block, where: str, following: str) -> Iterator[str]:
    """Run the commands of a block; returns what the last one printed."""
    expected = USAGE_ERROR if "ERROR: " in following else FAILED if "FAILED " in following else OK
    printed = ""
    for command in filter(None, (_command(line) for line in block.text.splitlines())):
        code, printed = run(command)
        if code != expected:
            yield f"{where}: {shlex.join(command)} ends with {code}, not {expected}:\n{printed}"
    return printed


def _console(block: Block, where: str) -> Iterator[str]:
    """Run the commands after `$`, and compare what they print with the lines that follow each."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, _, expected = part.partition("\n")
        code, printed = run(_command(line))
        if code != OK:
            yield f"{where}: {line} ends with {code}:\n{printed}"
        for missing in missing_lines(expected, printed):
            yield f"{where}: not printed: {missing!r}. Printed was:\n{printed}"
    return ""


def _command(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def run(command: list[str]) -> tuple[int, str]:
    """(exit code, output) of a command; pytest and tempo run in this process."""
    program, *arguments = command
    if program not in ("pytest", "tempo"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = _pytest(arguments) if program == "pytest" else _tempo(arguments)
    return code, out.getvalue()


def _pytest(arguments: list[str]) -> int:
    import pytest

    for name, module in list(sys.modules.items()):  # or a changed file would not be read again
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(Path.cwd()):
            del sys.modules[name]
    importlib.invalidate_caches()
    return int(pytest.main([*arguments, "-p", "no:cacheprovider"]))


def _tempo(arguments: list[str]) -> int:
    from tempo.cli import main

    sys.argv = ["tempo", *arguments]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return OK


if __name__ == "__main__":
    found = list(problems_of(Path(sys.argv[1]), sys.argv[2].split(",")))
    print(json.dumps(found))
