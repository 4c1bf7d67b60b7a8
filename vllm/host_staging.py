"""How small arrays that the host works out for a step get to the device.

Page-locked memory costs hundreds of microseconds to come by, and from other memory a copy waits for the device. So one
piece of it is kept and used round and round.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

_HALF = 4 << 20
_ALIGNMENT = 64


class HostStaging:
    """Page-locked memory in two halves; one is written while copies from the other may still be under way.

    Args:
        device: Where the arrays go; a CUDA device.
        num_bytes: Of a half; larger arrays get page-locked memory of their own.
    """

    def __init__(self, device: torch.device, num_bytes: int = _HALF) -> None:
        self._device = device
        self._halves = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)]
        self._num_bytes = num_bytes
        self._turn = 0
        self._used = 0

    def send(self, values: np.ndarray) -> torch.Tensor:
        """Starts the copy of `values` to the device; they may be overwritten at once."""
        if values.nbytes > self._num_bytes:
            return torch.from_numpy(values).pin_memory().to(self._device, non_blocking=True)
        if self._used + values.nbytes > self._num_bytes:
            self._copied[self._turn].record()
            self._turn ^= 1
            self._used = 0
            self._copied[self._turn].synchronize()
        first, end = self._used, self._used + values.nbytes
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        half = self._halves[self._turn]
        half.numpy()[first:end].view(values.dtype).reshape(values.shape)[...] = values
        source = torch.from_numpy(values)
        staged = half[first:end].view(source.dtype).view(source.shape)
        return staged.to(self._device, non_blocking=True)


@cache
def _staging(device: torch.device) -> HostStaging:
    return HostStaging(device)


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor on a device, on the current stream; it shares the memory of `values` on a CPU."""
    if device.type == "cuda":
        return _staging(device).send(values)
    return torch.from_numpy(values).to(device)
