"""MXFP4: numbers of four bits in blocks of 32 that share a power of two (OCP Microscaling Formats, version 1.0).

A matrix [rows, columns] is stored as its checkpoints have it:

    blocks   uint8 [rows, columns / 32, 16], two numbers a byte, the first one in the lower four bits
    scales   uint8 [rows, columns / 32], the exponent of the factor of a block, plus 127

A number is a sign, two bits of exponent and one of mantissa (E2M1).
"""

from __future__ import annotations

import torch

BLOCK = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of the lower three bits; the fourth is the sign."""


def shapes(rows: int, columns: int) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """Shapes of blocks and scales of a matrix.

    Raises:
        ValueError: its rows are no whole blocks.
    """
    if columns % BLOCK:
        raise ValueError(f"rows of {columns} weights are no whole blocks of {BLOCK}, as MXFP4 needs them")
    return (rows, columns // BLOCK, BLOCK // 2), (rows, columns // BLOCK)


def dequantise(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [..., n, 16] and [..., n] → [..., 32 n]."""
    table = torch.tensor([*VALUES, *(-v for v in VALUES)], device=blocks.device)
    whole = torch.empty((*scales.shape, BLOCK), dtype=dtype, device=blocks.device)
    for index in range(len(blocks)):  # one expert at a time, for what lies between is eight times as large
        packed = blocks[index].int()
        numbers = torch.stack((table[packed & 15], table[packed >> 4]), dim=-1).flatten(-2)
        whole[index] = torch.ldexp(numbers, scales[index].int().unsqueeze(-1) - 127).to(dtype)
    return whole.flatten(-2)


def quantise(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float [..., columns] → blocks and scales, each number to its nearest: the largest of a block becomes 4 to 6."""
    groups = weights.float().unflatten(-1, (-1, BLOCK))
    largest = groups.abs().amax(dim=-1).clamp(min=2.0**-100)
    exponents = torch.floor(torch.log2(largest)).int() - 2
    scaled = torch.ldexp(groups, -exponents.unsqueeze(-1))
    table = torch.tensor(VALUES, device=weights.device)
    codes = (scaled.abs().clamp(max=6.0).unsqueeze(-1) - table).abs().argmin(dim=-1) + 8 * (scaled < 0)
    pairs = codes.unflatten(-1, (-1, 2)).to(torch.uint8)
    return pairs[..., 0] | (pairs[..., 1] << 4), (exponents + 127).to(torch.uint8)
