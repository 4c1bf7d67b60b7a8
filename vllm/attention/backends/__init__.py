"""Attention backends; `get_backend` hands out the one that was asked for."""

from vllm.attention.backends.base import AttentionBackend
from vllm.attention.backends.torch import TorchAttentionBackend
from vllm.exceptions import StartupError

BACKENDS: dict[str, type[AttentionBackend]] = {"TORCH": TorchAttentionBackend}


def get_backend(name: str) -> AttentionBackend:
    """Returns a backend by its `--attention-backend` name.

    Raises:
        StartupError: there is no such backend.
    """
    backend = BACKENDS.get(name.upper())
    if backend is None:
        raise StartupError(f"--attention-backend {name} is not available here; choose from {', '.join(BACKENDS)}.")
    return backend()
