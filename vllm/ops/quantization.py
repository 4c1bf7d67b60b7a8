"""Codes of quantised weights, in plain torch: how they are packed in checkpoints, and which numbers they stand for.

Names of number formats as in the Open Compute Project's MX specification (2023): e4m3, e2m1, e8m0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

FP8_MAX = 448.0
"""The largest e4m3."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpack_int4(words: torch.Tensor, dim: int, order: Sequence[int] = range(8)) -> torch.Tensor:
    """4-bit codes, eight in each int32, → uint8, eight times as long along `dim`.

    Args:
        order: Code j of a word lies in bits 4 · order[j] and up.
    """
    dim %= words.dim()
    codes = [(words >> 4 * place & 0xF).to(torch.uint8) for place in order]
    return torch.stack(codes, dim + 1).flatten(dim, dim + 1)


def pack_int4(codes: torch.Tensor, dim: int, order: Sequence[int] = range(8)) -> torch.Tensor:
    """The other way round."""
    dim %= codes.dim()
    parts = codes.unflatten(dim, (-1, 8)).unbind(dim + 1)
    words = torch.zeros_like(parts[0], dtype=torch.int64)
    for part, place in zip(parts, order, strict=True):
        words |= part.to(torch.int64) << 4 * place
    return (words - (words >> 31 << 32)).to(torch.int32)


def unpack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K/2], the earlier code in the low half → uint8 [..., K]."""
    return torch.stack((codes & 0xF, codes >> 4), -1).flatten(-2)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes (sign, two bits of exponent, one of mantissa) as uint8 → float32."""
    table = torch.tensor(_E2M1 + tuple(-x for x in _E2M1), device=codes.device)
    return table[codes.int()]


def e8m0_values(codes: torch.Tensor) -> torch.Tensor:
    """8-bit exponents as uint8 → float32: `2^(code - 127)`; 255, not a number, becomes infinity."""
    # The exponent of a float32, whose least one is that of numbers below 2^-126.
    bits = codes.int() << 23
    return bits.masked_fill(codes == 0, 1 << 22).view(torch.float32)


def spread(scales: torch.Tensor, group: int, features: int) -> torch.Tensor:
    """A factor a group along the last dimension → a factor a feature: [..., groups] → [..., features]."""
    if scales.shape[-1] == 1:
        return scales.expand(*scales.shape[:-1], features)
    return scales.repeat_interleave(group, -1)[..., :features]


def quantise_rows_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [T, K] → (e4m3 [T, K], float32 factor of each row [T, 1]): its largest magnitude becomes 448."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale
