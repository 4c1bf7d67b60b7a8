"""Attention backends; `get_backend` hands out the one that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vllm.attention.backends.base import AttentionBackend
from vllm.attention.backends.torch import TorchAttentionBackend
from vllm.exceptions import StartupError

if TYPE_CHECKING:  # at run time, torch is the name of a module of this package here
    import torch

BACKENDS = ("TORCH", "TRITON")


class AttentionShape(NamedTuple):
    """One rank's share of the attention heads, and the dtype of q, K and V."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


def get_backend(name: str, shape: AttentionShape, device: torch.device) -> AttentionBackend:
    """Returns a backend by its `--attention-backend` name.

    Raises:
        StartupError: there is no such backend, or it does not run on this device.
    """
    if name.upper() == "TORCH":
        return TorchAttentionBackend()
    if name.upper() == "TRITON":
        if device.type != "cuda":
            raise StartupError("--attention-backend TRITON needs a GPU; leave it out, or choose TORCH.")
        # Triton comes with CUDA builds of torch only.
        from vllm.attention.backends.triton import TritonAttentionBackend

        return TritonAttentionBackend(*shape, device)
    raise StartupError(f"--attention-backend {name} is not known; choose from {', '.join(BACKENDS)}.")
