"""Wrong command lines of every kind, for `tempo` and for pytest's options of tempo."""

from __future__ import annotations

from pathlib import Path

GENERATE = ("generate", "hi", "--model", "tiny")
NUMBERS = ("", "abc", "nan", "inf", "-1", "1e", "0x1", "1,5", "--", "½", "1 2")
WORDS = ("", "isolatd", "ISOLATED", "0", "a b", "\x1b[31m", "<b>", "visible ")


def wrong_lines(folder: Path) -> list[tuple[str, ...]]:
    """Command lines of `tempo` that are wrong usage: exit code 2."""
    (folder / "bad.yaml").write_text("prompt: [")
    (folder / "typo.yaml").write_text("prompt: hi\ntreshold: 1\n")
    (folder / "replay.yaml").write_text("prompt: hi\nreplay: [[1]]\n")
    lines: list[tuple[str, ...]] = [
        ("generat",),
        ("--nothing",),
        ("generate",),
        ("generate", "--model", "tiny"),
        (*GENERATE, "two", "prompts"),
        (*GENERATE, "--treshold", "1"),
        (*GENERATE, "--config", str(folder / "none.yaml")),
        (*GENERATE, "--config", str(folder)),
        (*GENERATE, "--config", str(folder / "bad.yaml")),
        (*GENERATE, "--config", str(folder / "typo.yaml")),
        (*GENERATE, "--max-steps", "100000"),
        ("generate", "x" * 5000, "--model", "tiny"),
        ("generate", "", "--model", "tiny"),
        ("compare", "hi", "--free", "--model", "tiny", "--config", str(folder / "replay.yaml")),
        ("generate", "hi", "--model", "smollm2"),
        ("generate", "hi", "--model", str(folder / "none")),
        ("generate", "hi", "--model", str(folder / "bad.yaml")),
        ("generate", "hi", "--model", ""),
        ("generate", "hi", "--model", "x" * 5000),
        ("report", "--format", "gif"),
        ("report", "--results", "a", "--results", "b", "--against", "c"),
        ("view",),
        ("view", "hi", "--model", "tiny", "--visibility", "all"),
        ("models", "more"),
        ("new",),
    ]
    for option in ("--threshold", "--max-steps", "--max-width"):
        lines += [(*GENERATE, option, value) for value in NUMBERS if value != "--"]
    for option in ("--visibility", "--positions", "--readout", "--weighting", "--dtype"):
        lines += [(*GENERATE, option, value) for value in WORDS]
    lines += [(*GENERATE, "--device", value) for value in ("", "tpu", "cuda:99", "cpu:x", "9" * 40)]
    return lines


def wrong_options(folder: Path) -> list[tuple[str, ...]]:
    """Options of pytest that are wrong usage: exit code 4."""
    return [
        ("--prompts", "many"),
        ("--prompts", "0"),
        ("--prompts", "-3"),
        ("--model", "smollm2"),
        ("--model", str(folder / "none")),
        ("--model", ""),
        ("--dtype", "float"),
        ("--device", "tpu"),
        ("--device", "cuda:99"),
        ("--suite", str(folder / "none.txt")),
        ("--suite", str(folder)),
        ("--config", str(folder / "none.yaml")),
        ("--config", str(folder)),
        ("--config", str(folder / "bad.yaml")),
        ("--results", str(folder / "bad.yaml")),
        ("--findings", str(folder / "bad.yaml" / "findings.html")),
        ("--findings", str(folder)),
        ("--summary", str(folder)),
        ("--nothing-of-the-kind",),
    ]
