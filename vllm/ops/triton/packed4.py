"""Products with 4-bit weights (`vllm.ops.packed4`): out [M, N] = x [M, K] Wᵀ, W decoded in registers.

One row has a kernel of its own (`packed4_row`). From two rows on the tensor cores multiply, W the left operand: its
codes become numbers of the dtype of x in registers, rounded once as those of a dequantised matrix are. Where there are
fewer tiles than multiprocessors, programs share a tile's features and a second kernel sums in a fixed order. From some
hundred rows on the matrix is dequantised into a workspace: that costs less than the library's product is faster by.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm.ops.launch import follow, launch
from vllm.ops.packed4 import Packed4
from vllm.ops.triton.packed4_row import constants, packed4_row
from vllm.ops.triton.sum_parts import sum_parts
from vllm.platforms.devices import is_gpu, num_multiprocessors

# From so many rows on the matrix is dequantised ahead of the product.
DEQUANTISE_FROM = 1025


# Four codes in the bytes of a register → the low halves' numbers and the high halves', two registers each: code bits
# below a fixed exponent, less that exponent's number and the zero, times the scale.
_DECODE_INT = """{{
    .reg .b32 a, b, c, d, one, nothing;
    mov.b32 one, {one};
    mov.b32 nothing, 0x80008000;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    shr.b32 c, a, 4;
    shr.b32 d, b, 4;
    lop3.b32 a, a, 0x000F000F, {base}, 0xEA;
    lop3.b32 b, b, 0x000F000F, {base}, 0xEA;
    lop3.b32 c, c, 0x000F000F, {base}, 0xEA;
    lop3.b32 d, d, 0x000F000F, {base}, 0xEA;
    fma.rn.{type} a, a, one, $7;
    fma.rn.{type} b, b, one, $8;
    fma.rn.{type} c, c, one, $7;
    fma.rn.{type} d, d, one, $8;
    fma.rn.{type} $0, a, $5, nothing;
    fma.rn.{type} $1, b, $6, nothing;
    fma.rn.{type} $2, c, $5, nothing;
    fma.rn.{type} $3, d, $6, nothing;
}}"""
_DECODE_FLOAT = """{{
    .reg .b32 a, b, c, d, s, t, u, v, growth, nothing;
    mov.b32 growth, {growth};
    mov.b32 nothing, 0x80008000;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    shl.b32 s, a, 12;
    shl.b32 t, b, 12;
    shl.b32 u, a, 8;
    shl.b32 v, b, 8;
    shl.b32 c, a, {high};
    shl.b32 d, b, {high};
    shl.b32 a, a, {low};
    shl.b32 b, b, {low};
    and.b32 a, a, {mask};
    and.b32 b, b, {mask};
    and.b32 c, c, {mask};
    and.b32 d, d, {mask};
    lop3.b32 a, s, 0x80008000, a, 0xEA;
    lop3.b32 b, t, 0x80008000, b, 0xEA;
    lop3.b32 c, u, 0x80008000, c, 0xEA;
    lop3.b32 d, v, 0x80008000, d, 0xEA;
    fma.rn.{type} a, a, growth, nothing;
    fma.rn.{type} b, b, growth, nothing;
    fma.rn.{type} c, c, growth, nothing;
    fma.rn.{type} d, d, growth, nothing;
    fma.rn.{type} $0, a, $5, nothing;
    fma.rn.{type} $1, b, $6, nothing;
    fma.rn.{type} $2, c, $5, nothing;
    fma.rn.{type} $3, d, $6, nothing;
}}"""
_BF16_INT = tl.constexpr(_DECODE_INT.format(type="bf16x2", base="0x43004300", one="0x3F803F80"))
_F16_INT = tl.constexpr(_DECODE_INT.format(type="f16x2", base="0x64006400", one="0x3C003C00"))
_BF16_FLOAT = tl.constexpr(_DECODE_FLOAT.format(type="bf16x2", low=6, high=2, mask="0x01C001C0", growth="0x7E807E80"))
_F16_FLOAT = tl.constexpr(_DECODE_FLOAT.format(type="f16x2", low=9, high=5, mask="0x0E000E00", growth="0x74007400"))
_IN_INT = tl.constexpr("=r,=r,=r,=r,r,r,r,r,r")
_IN_FLOAT = tl.constexpr("=r,=r,=r,=r,r,r,r")


@triton.jit
def _plain_number(code, CODE: tl.constexpr):
    """Codes as float32; of integers without their zero."""
    if CODE == "e2m1":
        bits = ((code & 7).to(tl.int32) << 22) | ((code & 8).to(tl.int32) << 28)
        return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    else:
        return code.to(tl.float32)


@triton.jit
def _decode(byte, scale, zero, dtype: tl.constexpr, CODE: tl.constexpr, ASM: tl.constexpr):
    """Bytes [N, 64] and scales and zeros that fit them (float32) → numbers of the low codes and of the high ones."""
    if ASM:
        scale = scale.to(dtype)
        if CODE == "e2m1":
            if dtype == tl.bfloat16:
                low, high = tl.inline_asm_elementwise(
                    _BF16_FLOAT, _IN_FLOAT, [byte, scale], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
                )
            else:
                low, high = tl.inline_asm_elementwise(
                    _F16_FLOAT, _IN_FLOAT, [byte, scale], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
                )
        elif dtype == tl.bfloat16:
            args = [byte, scale, (-128.0 - zero).to(dtype)]
            low, high = tl.inline_asm_elementwise(
                _BF16_INT, _IN_INT, args, dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            args = [byte, scale, (-1024.0 - zero).to(dtype)]
            low, high = tl.inline_asm_elementwise(
                _F16_INT, _IN_INT, args, dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
    else:
        low = ((_plain_number(byte & 15, CODE) - zero) * scale).to(dtype)
        high = ((_plain_number(byte >> 4, CODE) - zero) * scale).to(dtype)
    return low, high


@triton.jit
def _scales(ptr, block, rows, valid, half: tl.constexpr, STRIDE, K: tl.constexpr, GROUP: tl.constexpr):
    """Values of the groups of half a block's features for each row: float32 [rows, 64], or [rows, 1]."""
    if GROUP >= 64:
        group = (block * 128 + half * 64) // GROUP
        mask = valid & (rows * 0 + (block * 128 + half * 64) < K)
        return tl.load(ptr + group * STRIDE + rows, mask=mask, other=0.0).to(tl.float32)[:, None]
    else:
        feature = block * 128 + half * 64 + tl.arange(0, 64)
        mask = valid[:, None] & (feature < K)[None, :]
        return tl.load(ptr + (feature // GROUP)[None, :] * STRIDE + rows[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _block_scales(
    scales_ptr,
    zeros_ptr,
    block,
    rows,
    valid,
    N,
    STRIDE,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    CODE: tl.constexpr,
):
    """Scales and zeros of a block: of its first 64 features and of its last."""
    low = _scales(scales_ptr, block, rows, valid, 0, STRIDE, K, GROUP)
    high = low
    if GROUP < 128:
        high = _scales(scales_ptr, block, rows, valid, 1, STRIDE, K, GROUP)
    if CODE == "int4_zeros":
        low_zero = _scales(zeros_ptr, block, rows, valid, 0, STRIDE, K, GROUP)
        high_zero = low_zero
        if GROUP < 128:
            high_zero = _scales(zeros_ptr, block, rows, valid, 1, STRIDE, K, GROUP)
    else:
        low_zero = tl.full((1, 1), 8.0 if CODE == "int4" else 0.0, tl.float32)
        high_zero = low_zero
    return low, high, low_zero, high_zero


@triton.jit
def _decode_block(
    byte, low_scale, high_scale, low_zero, high_zero, dtype: tl.constexpr, GROUP: tl.constexpr, CODE, ASM
):
    """Bytes [rows, 64] of a block → numbers of its first 64 features and of its last."""
    # What is one number a row becomes one a code.
    wide = tl.zeros((1, 64), tl.float32)
    low, high = _decode(byte, low_scale + wide, low_zero, dtype, CODE, ASM)
    if GROUP < 128:
        _, high = _decode(byte, high_scale + wide, high_zero, dtype, CODE, ASM)
    return low, high


@triton.jit(do_not_specialize=["M"])
def _tile4_kernel(
    x_ptr,
    x_stride,
    data_ptr,
    scales_ptr,
    zeros_ptr,
    factors_ptr,
    out_ptr,
    M,
    N,
    STRIDE,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    CODE: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    ADD: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of rows of W and rows of x; with SPLIT > 1 of a share of the features, into partial sums [SPLIT, M, N]."""
    follow(PDL)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid, wanted = rows < N, tokens < M
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    share: tl.constexpr = (BLOCKS + SPLIT - 1) // SPLIT
    first = tl.program_id(2) * share
    features = tl.arange(0, 64)
    x_at = x_ptr + tl.minimum(tokens, M - 1).to(tl.int64)[None, :] * x_stride + features[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # Rows behind the last one stand for it, so that no load of the loop is masked; their results are not stored.
    data_at = data_ptr + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * (BLOCKS * 64) + features[None, :]
    # A step ahead of their use: nothing else hides how long they take.
    scale, scale2, zero, zero2 = _block_scales(scales_ptr, zeros_ptr, first, rows, valid, N, STRIDE, K, GROUP, CODE)
    for block in range(first, min(first + share, BLOCKS)):
        byte = tl.load(data_at + block * 64)
        low, high = _decode_block(byte, scale, scale2, zero, zero2, dtype, GROUP, CODE, ASM)
        scale, scale2, zero, zero2 = _block_scales(
            scales_ptr, zeros_ptr, block + 1, rows, valid, N, STRIDE, K, GROUP, CODE
        )
        if K % 128 == 0:
            x_low = tl.load(x_at + block * 128)
            x_high = tl.load(x_at + block * 128 + 64)
        else:
            inside = (block * 128 + features < K)[:, None]
            x_low = tl.load(x_at + block * 128, mask=inside, other=0.0)
            inside = (block * 128 + 64 + features < K)[:, None]
            x_high = tl.load(x_at + block * 128 + 64, mask=inside, other=0.0)
        acc = tl.dot(low, x_low, acc)
        acc = tl.dot(high, x_high, acc)
    if FACTORS:
        acc *= tl.load(factors_ptr + rows, mask=valid, other=0.0)[:, None]
    place = tokens.to(tl.int64)[None, :] * N + rows[:, None]
    mask = valid[:, None] & wanted[None, :]
    if SPLIT > 1:
        place += tl.program_id(2).to(tl.int64) * M * N
    if ADD:
        acc += tl.load(out_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _unpack_kernel(
    data_ptr,
    scales_ptr,
    zeros_ptr,
    factors_ptr,
    out_ptr,
    N,
    STRIDE,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    CODE: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Blocks of W as numbers: out [N, K]."""
    follow(PDL)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid, block = rows < N, tl.program_id(1)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    at = data_ptr + rows.to(tl.int64)[:, None] * (BLOCKS * 64) + block * 64 + tl.arange(0, 64)[None, :]
    byte = tl.load(at, mask=valid[:, None], other=0)
    scale, scale2, zero, zero2 = _block_scales(scales_ptr, zeros_ptr, block, rows, valid, N, STRIDE, K, GROUP, CODE)
    low, high = _decode_block(byte, scale, scale2, zero, zero2, dtype, GROUP, CODE, ASM)
    if FACTORS:
        factors = tl.load(factors_ptr + rows, mask=valid, other=0.0)[:, None]
        low, high = (low.to(tl.float32) * factors).to(dtype), (high.to(tl.float32) * factors).to(dtype)
    features = block * 128 + tl.arange(0, 64)
    at = out_ptr + rows.to(tl.int64)[:, None] * K + features[None, :]
    tl.store(at, low, mask=valid[:, None] & (features < K)[None, :])
    tl.store(at + 64, high, mask=valid[:, None] & (features + 64 < K)[None, :])


class Tiles(NamedTuple):
    """How a product is divided: rows of x and of W in a tile, programs that share a tile's features."""

    block_m: int
    block_n: int
    split: int
    num_warps: int
    num_stages: int


def tiles(num_rows: int, out_features: int, num_blocks: int, multiprocessors: int) -> Tiles:
    """Tiles for x of so many rows, W of `out_features` rows and `num_blocks` blocks of features."""
    if num_rows <= 64:
        block_m, block_n, warps, stages = max(16, triton.next_power_of_2(num_rows)), 64, 4, 5
        # Bound by the reading of W: several programs on each multiprocessor keep the memory busy.
        programs = 4 * multiprocessors if num_rows <= 32 else 2 * multiprocessors
    elif num_rows <= 128:
        block_m, block_n, warps, stages = 128, 128, 8, 4
        programs = multiprocessors
    else:
        # Bound by the reading of x from the cache, which the rows of W in a tile share.
        block_m, block_n, warps, stages = 128, 256, 16, 3
        programs = multiprocessors
    count = triton.cdiv(out_features, block_n) * triton.cdiv(num_rows, block_m)
    # A share of fewer than four blocks is over before its pipeline is full.
    split = max(1, min(8, programs // count, num_blocks // 4))
    # As many shares as the blocks really make.
    split = triton.cdiv(num_blocks, triton.cdiv(num_blocks, split))
    return Tiles(block_m, block_n, split, warps, stages)


def packed4_linear(
    x: torch.Tensor, weight: Packed4, bias: torch.Tensor | None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`x Wᵀ + b (+ residual)`.

    Args:
        x: [M, K] in bfloat16 or float16, rows contiguous.
        residual: [M, N], contiguous; is overwritten.

    Returns [M, N] in the dtype of `x`.
    """
    rows, out_features = len(x), weight.out_features
    if x.shape[1] != weight.in_features or x.stride(1) != 1 or x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x {tuple(x.shape)} in {x.dtype} does not fit weights of {weight.in_features} features")
    if bias is not None:
        residual = bias.repeat(rows, 1) if residual is None else residual.add_(bias)
    if rows >= DEQUANTISE_FROM:
        whole = unpack(weight, x.dtype)
        return torch.nn.functional.linear(x, whole) if residual is None else residual.addmm_(x, whole.t())
    out = x.new_empty(rows, out_features) if residual is None else residual
    if rows == 1:
        packed4_row(x, weight, out, residual is not None)
    elif rows:
        how = tiles(rows, out_features, weight.num_blocks, num_multiprocessors(x.device))
        _tile(x, weight, out, residual is not None, how)
    return out


def _tile(x: torch.Tensor, weight: Packed4, out: torch.Tensor, add: bool, how: Tiles) -> None:
    rows, out_features = out.shape
    parts = out
    if how.split > 1:
        parts = x.new_empty((how.split, rows, out_features), dtype=torch.float32)
    launch(
        _tile4_kernel,
        (triton.cdiv(out_features, how.block_n), triton.cdiv(rows, how.block_m), how.split),
        x,
        x.stride(0),
        weight.data,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        weight.scales if weight.factors is None else weight.factors,
        parts,
        rows,
        out_features,
        weight.scales.shape[1],
        BLOCK_M=how.block_m,
        BLOCK_N=how.block_n,
        SPLIT=how.split,
        ADD=add and how.split == 1,
        ASM=is_gpu(x.device),
        num_warps=how.num_warps,
        num_stages=how.num_stages,
        **constants(weight),
    )
    if how.split > 1:
        sum_parts(parts, out, add)


def unpack(weight: Packed4, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [N, K] in bfloat16 or float16."""
    out = torch.empty((weight.out_features, weight.in_features), dtype=dtype, device=weight.data.device)
    launch(
        _unpack_kernel,
        (triton.cdiv(weight.out_features, 32), weight.num_blocks),
        weight.data,
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        weight.scales if weight.factors is None else weight.factors,
        out,
        weight.out_features,
        weight.scales.shape[1],
        BLOCK_N=32,
        ASM=is_gpu(out.device),
        num_warps=4,
        **constants(weight),
    )
    return out
