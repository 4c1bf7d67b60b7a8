"""Attention backends; `get_backend` hands out the one that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.attention.backends.base import AttentionBackend
from vllm.attention.backends.torch import TorchAttentionBackend
from vllm.exceptions import StartupError
from vllm.logger import init_logger
from vllm.platforms.devices import is_gpu

if TYPE_CHECKING:  # at run time, torch is the name of a module of this package here
    import torch

    from vllm.attention.spec import AttentionSpec

logger = init_logger(__name__)

BACKENDS = ("TORCH", "CPU", "TRITON", "XFORMERS")


def get_backend(name: str, specs: Sequence[AttentionSpec], block_size: int, device: torch.device) -> AttentionBackend:
    """Returns a backend by its `--attention-backend` name; TORCH, with a warning, where CPU or TRITON cannot serve one
    of the layers.

    Raises:
        StartupError: there is no such backend, or it does not run on this device, or XFORMERS cannot serve a layer.
    """
    name = name.upper()
    if name not in BACKENDS:
        raise StartupError(f"--attention-backend {name} is not known; choose from {', '.join(BACKENDS)}.")
    if name == "TORCH":
        return TorchAttentionBackend()
    if name == "CPU" and is_gpu(device):
        raise StartupError("--attention-backend CPU computes on --device cpu; leave it out, or choose TORCH.")
    if name != "CPU" and not is_gpu(device):
        raise StartupError(f"--attention-backend {name} needs a GPU; leave it out, or choose TORCH.")
    if name == "XFORMERS":
        return _xformers(specs, device)
    backend = _triton(block_size, device) if name == "TRITON" else _cpu(block_size)
    if backend is None:
        return TorchAttentionBackend()
    for spec in specs:
        misfit = backend.misfit(spec)
        if misfit is not None:
            what = "Triton kernels" if name == "TRITON" else "compiled CPU kernels"
            logger.warning("The %s do not serve this model (%s); torch computes its attention.", what, misfit)
            return TorchAttentionBackend()
    return backend


def _cpu(block_size: int) -> AttentionBackend | None:
    from vllm.attention.backends.cpu import CpuAttentionBackend
    from vllm.ops.cpu import kernels as cpu_kernels

    return None if cpu_kernels.library() is None else CpuAttentionBackend(block_size)


def _triton(block_size: int, device: torch.device) -> AttentionBackend:
    # Triton comes with CUDA builds of torch only.
    from vllm.attention.backends.triton import TritonAttentionBackend

    return TritonAttentionBackend(device, block_size)


def _xformers(specs: Sequence[AttentionSpec], device: torch.device) -> AttentionBackend:
    for dtype in {spec.dtype for spec in specs}:
        if dtype.itemsize != 2:
            raise StartupError(
                f"--attention-backend XFORMERS computes in float16 or bfloat16, not "
                f"{str(dtype).removeprefix('torch.')}; choose another --dtype, or leave the flag out."
            )
    try:
        from vllm.attention.backends.xformers import XFormersAttentionBackend
    except ImportError as error:
        raise StartupError(
            f"--attention-backend XFORMERS needs the package xformers ({error}): pip install xformers, or leave the "
            "flag out."
        ) from None
    backend = XFormersAttentionBackend(device)
    for spec in specs:
        misfit = backend.misfit(spec)
        if misfit is not None:
            raise StartupError(f"--attention-backend XFORMERS cannot serve this model: {misfit}; leave the flag out.")
    return backend
