"""Attention backends; `get_backend` hands out the one that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vllm.attention.backends.base import AttentionBackend
from vllm.attention.backends.torch import TorchAttentionBackend
from vllm.exceptions import StartupError
from vllm.logger import init_logger
from vllm.platforms.devices import is_gpu

if TYPE_CHECKING:  # at run time, torch is the name of a module of this package here
    import torch

logger = init_logger(__name__)

BACKENDS = ("TORCH", "CPU", "TRITON", "XFORMERS")


class AttentionShape(NamedTuple):
    """One rank's share of the attention heads, the dtype of q, K and V, and the slots of a block."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int


def get_backend(name: str, shape: AttentionShape, device: torch.device) -> AttentionBackend:
    """Returns a backend by its `--attention-backend` name.

    Raises:
        StartupError: there is no such backend, or it does not run on this device.
    """
    if name.upper() == "TORCH":
        return TorchAttentionBackend()
    if name.upper() == "CPU":
        if is_gpu(device):
            raise StartupError("--attention-backend CPU computes on --device cpu; leave it out, or choose TORCH.")
        from vllm.attention.backends.cpu import CpuAttentionBackend
        from vllm.ops.cpu import kernels as cpu_kernels

        misfit = cpu_kernels.misfit_of_attention(
            shape.num_heads // shape.num_kv_heads, shape.head_dim, shape.block_size, shape.dtype
        )
        if misfit is not None:
            logger.warning("The compiled CPU kernels do not serve this model (%s); torch computes instead.", misfit)
        if misfit is not None or cpu_kernels.library() is None:
            return TorchAttentionBackend()
        return CpuAttentionBackend()
    if name.upper() == "TRITON":
        if not is_gpu(device):
            raise StartupError("--attention-backend TRITON needs a GPU; leave it out, or choose TORCH.")
        # Triton comes with CUDA builds of torch only.
        from vllm.attention.backends.triton import TritonAttentionBackend

        return TritonAttentionBackend(*shape[:4], device, shape.block_size)
    if name.upper() == "XFORMERS":
        return _xformers(shape, device)
    raise StartupError(f"--attention-backend {name} is not known; choose from {', '.join(BACKENDS)}.")


def _xformers(shape: AttentionShape, device: torch.device) -> AttentionBackend:
    if not is_gpu(device):
        raise StartupError("--attention-backend XFORMERS needs a GPU; leave it out, or choose TORCH.")
    dtype = str(shape.dtype).removeprefix("torch.")
    if shape.dtype.itemsize != 2:
        raise StartupError(
            f"--attention-backend XFORMERS computes in float16 or bfloat16, not {dtype}; choose another --dtype, or "
            "leave the flag out."
        )
    try:
        from vllm.attention.backends.xformers import XFormersAttentionBackend
    except ImportError as error:
        raise StartupError(
            f"--attention-backend XFORMERS needs the package xformers ({error}): pip install xformers, or leave the "
            "flag out."
        ) from None
    return XFormersAttentionBackend(*shape[:4], device)
