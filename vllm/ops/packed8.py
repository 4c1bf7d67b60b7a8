"""8-bit weights as the kernels here read them: e4m3 floats or int8, a float32 factor a row, or 128 features of one.

Where tensor cores multiply, the inputs are quantised to the same kind, each row by its largest magnitude (of all its
features, or of each 128): `out = Σ over features of (x / sx) · w, times sx · sw`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm.ops.quantization import FP8_MAX, spread

BLOCK = 128
INT8_MAX = 127.0


class Packed8(NamedTuple):
    """A matrix [N, K].

    Attributes:
        data: e4m3 or int8 [N, K]; N and K are multiples of 16.
        scales: float32 [N, 1]; or [N, K / 128 rounded up], where each four rows from a multiple of four on have the
            same.
    """

    data: torch.Tensor
    scales: torch.Tensor

    @property
    def by_block(self) -> bool:
        """There is a factor for each 128 features."""
        return self.data.shape[1] > BLOCK and self.scales.shape[1] > 1


class Rows8(NamedTuple):
    """Quantised inputs [M, K]: 8-bit `data`, and float32 `scales` [M, 1] or [M, K / 128 rounded up]."""

    data: torch.Tensor
    scales: torch.Tensor


def fits(parts: Sequence[int], in_features: int) -> bool:
    """The kernels take a matrix whose parts have so many output features."""
    return all(part % 16 == 0 for part in parts) and in_features % 16 == 0


def quantise_rows(x: torch.Tensor, dtype: torch.dtype, by_block: bool) -> Rows8:
    """Rows [M, K] in plain torch.

    Args:
        dtype: float8_e4m3fn or int8.
        by_block: A factor for each 128 features.
    """
    most = FP8_MAX if dtype == torch.float8_e4m3fn else INT8_MAX
    wide = x.float()
    if by_block:
        blocks = torch.nn.functional.pad(wide, (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
        scales = blocks.abs().amax(2)
    else:
        scales = wide.abs().amax(1, keepdim=True)
    scales = scales.clamp(min=1e-10) / most
    codes = wide / spread(scales, BLOCK, x.shape[1])
    codes = codes.clamp(-most, most)
    return Rows8((codes if dtype == torch.float8_e4m3fn else codes.round()).to(dtype), scales)


def dequantise(data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Codes [R, K] and their factors → float32."""
    return data.float() * spread(scales, BLOCK, data.shape[1])
