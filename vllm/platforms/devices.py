"""Which kind of device a tensor lies on, and what a GPU has; here, so that nobody else need ask torch."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def is_gpu(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU."""
    return device.type == "cuda"


def on_gpu(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies on an NVIDIA GPU."""
    return tensor.is_cuda


@cache
def gpu_generation(device: torch.device | None = None) -> tuple[int, int]:
    """CUDA compute capability of a device, of the current one by default; (0, 0) where it is no GPU: (9, 0) is
    Hopper."""
    import torch

    if not torch.cuda.is_available() or (device is not None and not is_gpu(device)):
        return (0, 0)
    return torch.cuda.get_device_capability(device)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 8 for other devices, where kernels run in Triton's interpreter and are planned for as
    many."""
    import torch

    return int(torch.cuda.get_device_properties(device).multi_processor_count) if is_gpu(device) else 8
