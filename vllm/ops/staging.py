"""How small arrays that the host works out for a step get to the device.

Page-locked memory costs hundreds of microseconds to come by, and from other memory a copy waits for the device. So one
piece of it is kept and used round and round.
"""

from __future__ import annotations

import threading

import numpy as np
import torch

from vllm.platforms.devices import is_gpu, on_gpu

_HALF = 4 << 20
_ALIGNMENT = 64


class HostStaging:
    """Page-locked memory in two halves; one is written while copies from the other may still be under way.

    For one thread and one stream: that a half is free again is known from where the stream has got to.

    Args:
        num_bytes: Of a half; larger arrays get page-locked memory of their own.
    """

    def __init__(self, num_bytes: int = _HALF) -> None:
        self._halves = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        # By type of number, what each half is to numpy and to torch; made once, since each view costs a microsecond.
        self._views: list[dict[np.dtype, tuple[np.ndarray, torch.Tensor]]] = [{}, {}]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._num_bytes = num_bytes
        self._turn = 0
        self._used = 0

    def reserve(self, size: int, dtype: np.dtype) -> tuple[np.ndarray, torch.Tensor]:
        """Page-locked memory for so many numbers, to numpy and to torch: to be written, and copied from on the current
        stream, before any other is reserved. What it holds is undefined; it begins at a multiple of 64 bytes."""
        num_bytes = size * dtype.itemsize
        if num_bytes > self._num_bytes:
            tensor = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            return _as_numbers(tensor, dtype)
        if self._used + num_bytes > self._num_bytes:
            self._copied[self._turn].record()
            self._turn ^= 1
            self._used = 0
            self._copied[self._turn].synchronize()
        views = self._views[self._turn]
        if dtype not in views:
            views[dtype] = _as_numbers(self._halves[self._turn], dtype)
        array, tensor = views[dtype]
        first = self._used // dtype.itemsize
        end = first + size
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return array[first:end], tensor[first:end]

    def stage(self, values: np.ndarray) -> torch.Tensor:
        """The array in page-locked memory, to be copied from as `reserve` says."""
        array, tensor = self.reserve(values.size, values.dtype)
        if values.ndim == 1:
            array[:] = values
            return tensor
        array.reshape(values.shape)[...] = values
        return tensor.view(values.shape)


def _as_numbers(memory: torch.Tensor, dtype: np.dtype) -> tuple[np.ndarray, torch.Tensor]:
    """The same bytes as numbers, to numpy and to torch."""
    return memory.numpy().view(dtype), memory.view(torch.from_numpy(np.empty(0, dtype)).dtype)


class _OfThread(threading.local):
    """Engines in several threads do not write over each other's arrays."""

    staging: HostStaging | None = None


_own = _OfThread()


def _staging() -> HostStaging:
    if _own.staging is None:
        _own.staging = HostStaging()
    return _own.staging


def reserve(size: int, dtype: type[np.generic], device: torch.device) -> tuple[np.ndarray, torch.Tensor]:
    """Memory that copies to a device do not wait for; see `HostStaging.reserve`."""
    if is_gpu(device):
        return _staging().reserve(size, np.dtype(dtype))
    array = np.empty(size, dtype)
    return array, torch.from_numpy(array)


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on a device, on the current stream; it shares the memory of `values` on a CPU."""
    if is_gpu(device):
        return _staging().stage(values).to(device, non_blocking=True)
    return torch.from_numpy(values).to(device)


def write(target: torch.Tensor, values: np.ndarray) -> None:
    """Copies an array into a tensor of its shape, on the current stream; cheapest where that is contiguous."""
    staged = _staging().stage(values) if on_gpu(target) else torch.from_numpy(values)
    target.copy_(staged, non_blocking=True)
