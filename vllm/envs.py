"""Environment variables, read when they are asked for so that tests and launchers may set them late."""

import math
import os
from pathlib import Path

from vllm.exceptions import StartupError

_MAX_NUMBER = 10**9


def cache_root() -> Path:
    """Folder for downloaded models and compiled artefacts (`VLLM_CACHE_ROOT`, default `~/.cache/vllm`)."""
    root = os.environ.get("VLLM_CACHE_ROOT")
    if root:
        return Path(root).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg).expanduser() if xdg else Path.home() / ".cache") / "vllm"


def api_key() -> str | None:
    """Key that guards the HTTP API (`VLLM_API_KEY`), or None."""
    return os.environ.get("VLLM_API_KEY") or None


def admin_api_key() -> str | None:
    """Key of the routes that are the operator's (`VLLM_ADMIN_API_KEY`), or None."""
    return os.environ.get("VLLM_ADMIN_API_KEY") or None


def logging_level() -> str:
    """`VLLM_LOGGING_LEVEL`: DEBUG, INFO, WARNING or ERROR."""
    return os.environ.get("VLLM_LOGGING_LEVEL", "INFO").upper()


def engine_ready_timeout_s() -> int:
    """Seconds the API process waits for the engine process to load (`VLLM_ENGINE_READY_TIMEOUT_S`), at least 1."""
    return int(_number("VLLM_ENGINE_READY_TIMEOUT_S", "600", at_least=1))


def execute_model_timeout_s() -> int:
    """Seconds that the engine may have work and finish no step before `/health` says so
    (`VLLM_EXECUTE_MODEL_TIMEOUT_S`), at least 1."""
    return int(_number("VLLM_EXECUTE_MODEL_TIMEOUT_S", "300", at_least=1))


def cpu_kvcache_space_gib() -> float | None:
    """`VLLM_CPU_KVCACHE_SPACE` in GiB; None or 0 lets the engine choose."""
    return _number("VLLM_CPU_KVCACHE_SPACE", "0") or None


def cpu_omp_threads_bind() -> list[set[int]] | None:
    """`VLLM_CPU_OMP_THREADS_BIND`: processors of each rank, as in `0-3|4,5-7`; None (`auto`, `nobind`) binds none."""
    text = os.environ.get("VLLM_CPU_OMP_THREADS_BIND") or "auto"
    if text in ("auto", "nobind"):
        return None
    try:
        return [_processors(part) for part in text.split("|")]
    except ValueError:
        raise StartupError(
            f"VLLM_CPU_OMP_THREADS_BIND must be auto, nobind, or processors for each rank as in 0-3|4-7, got {text!r}."
        ) from None


def _processors(text: str) -> set[int]:
    """Raises ValueError for what is no list of numbers and ranges."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        run = range(int(first), int(last or first) + 1)
        if not run or run[-1] >= 2**16:
            raise ValueError(part)
        found.update(run)
    return found


def cpu_instructions() -> str | None:
    """`VLLM_CPU_INSTRUCTIONS`: instructions that the compiled CPU kernels may use at most; None: all there are."""
    return os.environ.get("VLLM_CPU_INSTRUCTIONS") or None


def allow_long_max_model_len() -> bool:
    """`VLLM_ALLOW_LONG_MAX_MODEL_LEN=1`: let --max-model-len exceed what the model declares."""
    return os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0") == "1"


def server_dev_mode() -> bool:
    """`VLLM_SERVER_DEV_MODE=1`: expose the development endpoints."""
    return os.environ.get("VLLM_SERVER_DEV_MODE", "0") == "1"


def _number(name: str, default: str, at_least: int = 0) -> float:
    """Raises StartupError unless it is a number from `at_least` to `_MAX_NUMBER`."""
    text = os.environ.get(name) or default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not at_least <= value <= _MAX_NUMBER:
        raise StartupError(f"{name} must be a number from {at_least} to {_MAX_NUMBER}, got {text!r}.")
    return value
