"""Weights that stay in blocks of 32 columns with a scale, as GGUF files have them; the structs mirror
`csrc/cpu/api.h`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_int32, c_int64, c_void_p
from dataclasses import dataclass

import torch

from vllm.ops.cpu.library import address, kernels, threads
from vllm.ops.cpu.matrix import TILE, Matrix, MatrixStruct, in_tiles

BLOCK = 32
"""Columns of a block."""

GROUPS = "groups"
BLOCK_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", GROUPS)
"""In the order of the kernels' numbers: types of GGUF, then 4-bit numbers with a scale and a shift for a group."""

BLOCKS = 3
"""Number of the format, see `csrc/cpu/api.h`."""
_BLOCKS_AS_BFLOAT16 = 4
_SUPER_BLOCK = 256


class _Tile(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("type", c_int32),
        ("span", c_int32),
        ("together", c_int32),
        ("bytes", c_int32),
    ]


@dataclass(frozen=True)
class BlockRows:
    """A weight [N, K] in blocks, as a file has it.

    Attributes:
        data: uint8 [N, bytes of a row], contiguous.
        k: Columns.
        type: One of `BLOCK_TYPES`.
        group: Columns that share a scale and a shift, of `groups`: a multiple of 32 that divides K.
    """

    data: torch.Tensor
    k: int
    type: str
    group: int = BLOCK

    @property
    def span(self) -> int:
        """Blocks that share what stands once before them."""
        if self.type == GROUPS:
            return self.group // BLOCK
        return _SUPER_BLOCK // BLOCK if self.type.endswith("_K") else 1

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.data), self.k


def pack_int4_groups(q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> BlockRows:
    """4-bit numbers in groups of columns: `weight = scale · (q - zero)`.

    Args:
        q: 0 … 15; uint8 [N, K].
        scales, zeros: Of each group of K / G neighbouring columns, a multiple of 32; [N, G].

    Raises:
        ValueError: groups that are no multiples of 32.
    """
    (n, k), groups = q.shape, scales.shape[1]
    if k % (groups * BLOCK) or scales.shape != zeros.shape or len(scales) != n:
        raise ValueError(
            f"4-bit weights {n} x {k} with scales {tuple(scales.shape)} and zeros {tuple(zeros.shape)}: the CPU "
            f"kernels take a scale and a zero a row for groups of a multiple of {BLOCK} columns"
        )
    scale = scales.float()
    lines = torch.stack((scale, -scale * zeros.float()), dim=-1).view(torch.uint8)  # [N, G, 8]
    pairs = q.view(n, groups, -1, 2)
    numbers = pairs[..., 0] | (pairs[..., 1] << 4)
    data = torch.cat((lines, numbers), dim=-1).flatten(1).contiguous()
    return BlockRows(data, k, GROUPS, k // groups)


class BlockMatrix(Matrix):
    """Weights in blocks, over each other, each part of a type of its own.

    Args:
        parts: Rows of each are a multiple of 16, but of the last; all have the same K.
        bias: [N], or None.
        interleave: The parts are a gate and an up projection of N/2 rows each.
        narrow: Activations are bfloat16 where the processor multiplies these faster.
    """

    def __init__(
        self,
        parts: Sequence[BlockRows],
        bias: torch.Tensor | None = None,
        interleave: bool = False,
        narrow: bool = False,
    ) -> None:
        sizes, self.k = [len(part.data) for part in parts], parts[0].k
        whole = all(size % TILE == 0 for size in (sizes if interleave else sizes[:-1]))
        if (
            not whole
            or {part.k for part in parts} != {self.k}
            or (interleave and (len(sizes), len(set(sizes))) != (2, 1))
        ):
            raise ValueError(f"cannot pack parts of {sizes} rows: all but the last must be multiples of {TILE}")
        self.n, self.interleaved = sum(sizes), interleave
        tiles = [
            (part, first, min(TILE, size - first))
            for part, size in zip(parts, sizes, strict=True)
            for first in range(0, size, TILE)
        ]
        if interleave:
            half = len(tiles) // 2
            tiles = [tiles[i + h] for i in range(half) for h in (0, half)]
        count, ints, longs = len(tiles), c_int32 * len(tiles), c_int64 * len(tiles)
        sources = [part.data.contiguous() for part in parts]
        place = {id(part): source for part, source in zip(parts, sources, strict=True)}
        addresses = [place[id(part)].data_ptr() + first * part.data.shape[1] for part, first, _ in tiles]
        types = ints(*(BLOCK_TYPES.index(part.type) for part, _, _ in tiles))
        spans = ints(*(part.span for part, _, _ in tiles))
        lib, k = kernels(), c_int64(self.k)
        lib.vsp_block_bytes.restype = c_int64
        self.data = torch.empty(lib.vsp_block_bytes(c_int64(count), types, spans, k), dtype=torch.uint8)
        self.table = torch.empty(count * ctypes.sizeof(_Tile), dtype=torch.uint8)
        lib.vsp_pack_blocks(
            c_int64(count),
            (c_void_p * count)(*addresses),
            longs(*(rows for _, _, rows in tiles)),
            types,
            spans,
            k,
            address(self.table),
            address(self.data),
            threads(),
        )
        self.bias = None if bias is None else in_tiles(bias.float(), interleave)
        kind = _BLOCKS_AS_BFLOAT16 if narrow else BLOCKS
        self.struct = MatrixStruct(address(self.table), None, address(self.bias), self.n, self.k, kind)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows `ids` (int64 [T]), dequantised; float32 [T, K]. Not of an interleaved matrix."""
        out = torch.empty(len(ids), self.k)
        ids = ids.contiguous()
        kernels().vsp_block_rows(byref(self.struct), address(ids), c_int64(len(ids)), address(out), threads())
        return out
