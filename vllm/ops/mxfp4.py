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


ARRANGED = 128
"""Columns in which `arrange` orders a row; a row that is no multiple of it is filled up with zeros."""
_MAX_EXPONENT = 128


def arrange(blocks: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales of several matrices in the order in which the GPU's kernels unpack them.

    A number of 16 bits holds one number of each of four blocks, 32 columns apart, whose bits lie where one shift and
    one mask make them a sign and the low end of a bfloat16's exponent, 2¹²⁶ times too small:

        bit     15 14 13 12 11 10  9  8  7  6  5  4  3  2  1  0
        block   s0 s3 m3 s1 m3 m3 s2 m0 m0 m0 m1 m1 m1 m2 m2 m2

    Args:
        blocks, scales: uint8 [E, rows, n, 16] and [E, rows, n].

    Returns int16 [E, rows, 32 m], and the scales of four blocks in a number, the first one in its lowest bits, int32
    [E, m, rows]; m = ceil(n / 4).

    Raises:
        ValueError: a scale is larger than 2, beyond which the kernels' bfloat16 ends.
    """
    if int(scales.max()) > _MAX_EXPONENT:
        raise ValueError(f"a scale of MXFP4 weights is 2^{int(scales.max()) - 127}; the largest that is served is 2^1")
    count, rows, n = scales.shape
    groups = -(-n // (ARRANGED // BLOCK))
    spare = groups * (ARRANGED // BLOCK) - n
    words = torch.empty((count, rows, groups, BLOCK), dtype=torch.int16, device=blocks.device)
    for index in range(count):  # one expert at a time, for what lies between is eight times as large
        packed = torch.nn.functional.pad(blocks[index], (0, 0, 0, spare)).int()
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)  # [rows, 4 groups, 32]
        first, second, third, fourth = codes.unflatten(1, (groups, 4)).unbind(2)
        bits = ((first & 8) << 12) | ((first & 7) << 6)
        bits |= ((second & 8) << 9) | ((second & 7) << 3)
        bits |= ((third & 8) << 6) | (third & 7)
        bits |= ((fourth & 8) << 11) | ((fourth & 4) << 11) | ((fourth & 3) << 10)
        words[index] = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16)
    fours = torch.nn.functional.pad(scales, (0, spare)).contiguous().view(torch.int32)
    return words.flatten(-2), fours.transpose(1, 2).contiguous()
