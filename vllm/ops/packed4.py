"""4-bit weights as the kernels here read them: one form for int4 with scales and zeros, and for the floats of MXFP4 and
NVFP4.

A row of K features is padded to blocks of 128, 64 bytes each: byte b of a block has feature b in its low half and
feature 64 + b in its high half. So a tile of bytes is two tiles of codes, of neighbouring features each, without any
shuffle.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from vllm.ops.quantization import e2m1_values

BLOCK = 128
"""Features of a block."""

Code = Literal["int4", "int4_zeros", "e2m1"]
"""What a code q stands for: `q - 8`, `q - zero` of its group, or an e2m1 float."""


class Packed4(NamedTuple):
    """A matrix [N, K]: `value(code) · scale of the group · factor of the row`.

    Attributes:
        data: uint8 [N, blocks * 64].
        scales: [groups, N rounded up to 4], in bfloat16 or the dtype of the network.
        zeros: uint8, as the scales; None unless `code` is `int4_zeros`.
        factors: float32 [N], or None.
        in_features: K, a multiple of 4.
        group: Features of a group: 16, 32, 64 or a multiple of 128.
    """

    data: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    factors: torch.Tensor | None
    in_features: int
    group: int
    code: Code

    @property
    def out_features(self) -> int:
        return len(self.data)

    @property
    def num_blocks(self) -> int:
        return self.data.shape[1] * 2 // BLOCK


def fits(in_features: int) -> bool:
    """The kernels take rows of so many features."""
    return in_features % 4 == 0


def pack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    group: int,
    zeros: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
    code: Code = "int4",
    dtype: torch.dtype = torch.float32,
) -> Packed4:
    """Packs a matrix.

    Args:
        codes: uint8 [N, K], 0 … 15.
        scales: float32 [N, groups].
        group: Features of a group; all of them if there is one.
        zeros: [N, groups], whole numbers from 0 to 16; 8 everywhere is left out.
        factors: float32 [N].
        dtype: Of the network; scales that bfloat16 does not hold exactly are rounded to it.

    Raises:
        ValueError: the kernels do not take such groups.
    """
    features, groups = codes.shape[1], scales.shape[1]
    num_blocks = -(-features // BLOCK)
    if groups == 1:
        group = num_blocks * BLOCK
    if features % 4 or (group not in (16, 32, 64) and group % BLOCK):
        raise ValueError(f"groups of {group} of {features} input features cannot be packed")
    padded = torch.nn.functional.pad(codes, (0, num_blocks * BLOCK - features)).unflatten(
        1, (num_blocks, 2, BLOCK // 2)
    )
    data = (padded[:, :, 0] | padded[:, :, 1] << 4).flatten(1).contiguous()
    if zeros is not None and code == "int4":
        if bool((zeros == 8).all()):
            zeros = None
        else:
            code, zeros = "int4_zeros", _by_group(zeros.to(torch.uint8))
    return Packed4(data, _by_group(_narrow(scales, dtype)), zeros, factors, features, group, code)


def _by_group(values: torch.Tensor) -> torch.Tensor:
    """[N, groups] → [groups, N rounded up to 4]."""
    return torch.nn.functional.pad(values.T, (0, -len(values) % 4)).contiguous()


def _narrow(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    narrow = scales.bfloat16()
    return narrow if torch.equal(narrow.float(), scales) else scales.to(dtype)


def unpack(matrix: Packed4, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [N, K] in a dtype, in plain torch: each weight is rounded once, and once more by its row's factor."""
    parts = matrix.data.unflatten(1, (matrix.num_blocks, BLOCK // 2))
    codes = torch.stack((parts & 0xF, parts >> 4), 2).flatten(1)

    def spread(x: torch.Tensor) -> torch.Tensor:
        return x[:, : matrix.out_features].T.float().repeat_interleave(matrix.group, 1)[:, : matrix.in_features]

    codes = codes[:, : matrix.in_features]
    if matrix.code == "e2m1":
        values = e2m1_values(codes)
    else:
        values = codes.float() - (8.0 if matrix.zeros is None else spread(matrix.zeros))
    weights = (values * spread(matrix.scales)).to(dtype)
    return weights if matrix.factors is None else (weights.float() * matrix.factors.unsqueeze(1)).to(dtype)
