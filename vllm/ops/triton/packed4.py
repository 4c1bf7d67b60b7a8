"""Products with 4-bit weights (`vllm.ops.packed4`): out [M, N] = x [M, K] Wᵀ, W decoded in registers.

One row is bound by the reading of W: each thread decodes words of eight codes and multiplies them in float32. From two
rows on the tensor cores multiply, W the left operand: its codes become numbers of the dtype of x in registers, rounded
once as a dequantised matrix is. Where there are fewer tiles than multiprocessors, programs share a tile's features and
a second kernel sums in a fixed order. From some hundred rows on the decoding costs less than what the library's product
is faster by: the matrix is dequantised into a workspace.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM108 - branches on constexprs are settled when a kernel is compiled
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm.ops.launch import follow, launch
from vllm.ops.packed4 import Packed4
from vllm.platforms.devices import is_gpu, num_multiprocessors

# From so many rows on the matrix is dequantised ahead of the product.
DEQUANTISE_FROM = 1025


@triton.jit
def _number(word, BIT: tl.constexpr, CODE: tl.constexpr):
    """The code at a bit of an int32 as float32: 128 + q of an integer, the number itself of a float."""
    if CODE == "e2m1":
        # Its exponent and mantissa as those of a float32 that is 2^126 times smaller.
        if BIT >= 22:
            bits = (word >> (BIT - 22)) & 0x01C00000
        else:
            bits = (word << (22 - BIT)) & 0x01C00000
        bits |= (word << (28 - BIT)) & -0x80000000
        return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    else:
        if BIT >= 16:
            bits = word >> (BIT - 16)
        else:
            bits = word << (16 - BIT)
        return ((bits & 0x000F0000) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit
def _four(bits, BF16: tl.constexpr):
    """Four 16-bit floats in an int64 → float32, the first in the lowest bits."""
    low, high = bits.to(tl.int32), (bits >> 32).to(tl.int32)
    if BF16:
        a, b = (low << 16).to(tl.float32, bitcast=True), (low & -0x10000).to(tl.float32, bitcast=True)
        c, d = (high << 16).to(tl.float32, bitcast=True), (high & -0x10000).to(tl.float32, bitcast=True)
    else:
        a = low.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        b = (low >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        c = high.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        d = (high >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return a, b, c, d


@triton.jit
def _half_product(word, x, FIRST: tl.constexpr, CODE: tl.constexpr, BF16: tl.constexpr):
    """Products of four codes of a word, `FIRST` the bit of the first one, and the sum of their inputs."""
    a, b, c, d = _four(x, BF16)
    total = _number(word, FIRST, CODE) * a[None]
    total += _number(word, FIRST + 8, CODE) * b[None]
    total += _number(word, FIRST + 16, CODE) * c[None]
    total += _number(word, FIRST + 24, CODE) * d[None]
    return total, (a + b + c + d)[None]


@triton.jit
def _zero(zeros_ptr, at, mask, CODE: tl.constexpr):
    if CODE == "int4_zeros":
        return 128.0 + tl.load(zeros_ptr + at, mask=mask, other=0).to(tl.float32)
    else:
        return 136.0


@triton.jit
def _row4_kernel(
    x_ptr,
    data_ptr,
    scales_ptr,
    zeros_ptr,
    factors_ptr,
    out_ptr,
    N,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    CODE: tl.constexpr,
    BF16: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row of x, as int64s of four features; data as int32s of eight codes, 16 a block."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = rows < N
    blocks, words = tl.arange(0, BLOCK_B), tl.arange(0, 16)
    inner = blocks[:, None] * 16 + words[None, :]
    at = data_ptr + rows.to(tl.int64)[:, None, None] * (BLOCKS * 16) + inner[None]
    valid3 = valid[:, None, None]
    word = tl.load(at, mask=valid3 & (blocks < BLOCKS)[None, :, None], other=0)
    follow(PDL)
    acc = tl.zeros((BLOCK_N, BLOCK_B, 16), tl.float32)
    for first in range(0, BLOCKS, BLOCK_B):
        block = first + blocks
        inside = block < BLOCKS
        if first > 0:
            word = tl.load(at + first * 16, mask=valid3 & inside[None, :, None], other=0)
        feature = block[:, None] * 128 + words[None, :] * 4
        x_at = x_ptr + block[:, None] * 32 + words[None, :]
        low, low_sum = _half_product(word, tl.load(x_at, mask=feature < K, other=0), 0, CODE, BF16)
        high, high_sum = _half_product(word, tl.load(x_at + 16, mask=feature + 64 < K, other=0), 4, CODE, BF16)
        if GROUP >= 64:
            # Of a block, or of its half.
            first_feature = block[:, None] * 128
        else:
            first_feature = feature
        # What is behind the last feature has no scales.
        mask = valid3 & (first_feature < K)[None]
        group = (first_feature // GROUP)[None] * N + rows[:, None, None]
        low_scale = tl.load(scales_ptr + group, mask=mask, other=0.0).to(tl.float32)
        if CODE != "e2m1":
            low -= _zero(zeros_ptr, group, mask, CODE) * low_sum
        if GROUP >= 128:
            if CODE != "e2m1":
                high -= _zero(zeros_ptr, group, mask, CODE) * high_sum
            acc += low_scale * (low + high)
        else:
            group = ((first_feature + 64) // GROUP)[None] * N + rows[:, None, None]
            mask = valid3 & (first_feature + 64 < K)[None]
            high_scale = tl.load(scales_ptr + group, mask=mask, other=0.0).to(tl.float32)
            if CODE != "e2m1":
                high -= _zero(zeros_ptr, group, mask, CODE) * high_sum
            acc += low_scale * low + high_scale * high
    out = tl.sum(tl.sum(acc, 2), 1)
    if FACTORS:
        out *= tl.load(factors_ptr + rows, mask=valid, other=0.0)
    if ADD:
        out += tl.load(out_ptr + rows, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=valid)


# Four codes in the bytes of a register → the low halves' numbers and the high halves', two registers each: code bits
# below a fixed exponent, less that exponent's number and the zero, times the scale.
_DECODE_INT = """{{
    .reg .b32 a, b, c, d;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    shr.b32 c, a, 4;
    shr.b32 d, b, 4;
    lop3.b32 a, a, 0x000F000F, {base}, 0xEA;
    lop3.b32 b, b, 0x000F000F, {base}, 0xEA;
    lop3.b32 c, c, 0x000F000F, {base}, 0xEA;
    lop3.b32 d, d, 0x000F000F, {base}, 0xEA;
    fma.rn.{type} a, a, {one}, $7;
    fma.rn.{type} b, b, {one}, $8;
    fma.rn.{type} c, c, {one}, $7;
    fma.rn.{type} d, d, {one}, $8;
    fma.rn.{type} $0, a, $5, 0x80008000;
    fma.rn.{type} $1, b, $6, 0x80008000;
    fma.rn.{type} $2, c, $5, 0x80008000;
    fma.rn.{type} $3, d, $6, 0x80008000;
}}"""
_DECODE_FLOAT = """{{
    .reg .b32 a, b, c, d, s, t, u, v;
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
    fma.rn.{type} a, a, {growth}, 0x80008000;
    fma.rn.{type} b, b, {growth}, 0x80008000;
    fma.rn.{type} c, c, {growth}, 0x80008000;
    fma.rn.{type} d, d, {growth}, 0x80008000;
    fma.rn.{type} $0, a, $5, 0x80008000;
    fma.rn.{type} $1, b, $6, 0x80008000;
    fma.rn.{type} $2, c, $5, 0x80008000;
    fma.rn.{type} $3, d, $6, 0x80008000;
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
        if CODE == "e2m1":
            asm: tl.constexpr = _BF16_FLOAT if dtype == tl.bfloat16 else _F16_FLOAT
            low, high = tl.inline_asm_elementwise(
                asm, _IN_FLOAT, [byte, scale.to(dtype)], dtype=(dtype, dtype), is_pure=True, pack=4
            )
        else:
            asm: tl.constexpr = _BF16_INT if dtype == tl.bfloat16 else _F16_INT
            base: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
            less = (-base - zero).to(dtype)
            low, high = tl.inline_asm_elementwise(
                asm, _IN_INT, [byte, scale.to(dtype), less], dtype=(dtype, dtype), is_pure=True, pack=4
            )
    else:
        low = ((_plain_number(byte & 15, CODE) - zero) * scale).to(dtype)
        high = ((_plain_number(byte >> 4, CODE) - zero) * scale).to(dtype)
    return low, high


@triton.jit
def _scales(ptr, block, rows, valid, half: tl.constexpr, N, K: tl.constexpr, GROUP: tl.constexpr):
    """Values of the groups of half a block's features for each row: float32 [rows, 64], or [rows, 1]."""
    if GROUP >= 64:
        group = (block * 128 + half * 64) // GROUP
        mask = valid & (rows * 0 + (block * 128 + half * 64) < K)
        return tl.load(ptr + group * N + rows, mask=mask, other=0.0).to(tl.float32)[:, None]
    else:
        feature = block * 128 + half * 64 + tl.arange(0, 64)
        mask = valid[:, None] & (feature < K)[None, :]
        return tl.load(ptr + (feature // GROUP)[None, :] * N + rows[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _decoded_block(
    data_ptr,
    scales_ptr,
    zeros_ptr,
    block,
    rows,
    valid,
    N,
    dtype: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,
    CODE: tl.constexpr,
    ASM: tl.constexpr,
):
    """A block of some rows of W: its first 64 features and its last."""
    at = data_ptr + rows.to(tl.int64)[:, None] * (BLOCKS * 64) + block * 64 + tl.arange(0, 64)[None, :]
    byte = tl.load(at, mask=valid[:, None], other=0)
    low_scale = _scales(scales_ptr, block, rows, valid, 0, N, K, GROUP)
    if CODE == "int4_zeros":
        low_zero = _scales(zeros_ptr, block, rows, valid, 0, N, K, GROUP)
    elif CODE == "int4":
        low_zero = low_scale * 0.0 + 8.0
    else:
        low_zero = low_scale * 0.0
    if GROUP >= 128:
        low, high = _decode(byte, low_scale + tl.zeros((1, 64), tl.float32), low_zero, dtype, CODE, ASM)
    else:
        high_scale = _scales(scales_ptr, block, rows, valid, 1, N, K, GROUP)
        high_zero = low_zero
        if CODE == "int4_zeros":
            high_zero = _scales(zeros_ptr, block, rows, valid, 1, N, K, GROUP)
        low, _ = _decode(byte, low_scale + tl.zeros((1, 64), tl.float32), low_zero, dtype, CODE, ASM)
        _, high = _decode(byte, high_scale + tl.zeros((1, 64), tl.float32), high_zero, dtype, CODE, ASM)
    return low, high


@triton.jit
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
    x_at = x_ptr + tokens.to(tl.int64)[None, :] * x_stride + features[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(first, min(first + share, BLOCKS)):
        low, high = _decoded_block(
            data_ptr, scales_ptr, zeros_ptr, block, rows, valid, N, dtype, K, BLOCKS, GROUP, CODE, ASM
        )
        if K % 128 == 0:
            x_low = tl.load(x_at + block * 128, mask=wanted[None, :], other=0.0)
            x_high = tl.load(x_at + block * 128 + 64, mask=wanted[None, :], other=0.0)
        else:
            inside = (block * 128 + features < K)[:, None] & wanted[None, :]
            x_low = tl.load(x_at + block * 128, mask=inside, other=0.0)
            inside = (block * 128 + 64 + features < K)[:, None] & wanted[None, :]
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
def _sum_kernel(
    parts_ptr, out_ptr, size, SPLIT: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Partial sums [SPLIT, size] → out [size], added to what is there if ADD."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    follow(PDL)
    total = tl.load(parts_ptr + at, mask=mask, other=0.0)
    for i in tl.static_range(1, SPLIT):
        total += tl.load(parts_ptr + i * size + at, mask=mask, other=0.0)
    if ADD:
        total += tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _unpack_kernel(
    data_ptr,
    scales_ptr,
    zeros_ptr,
    factors_ptr,
    out_ptr,
    N,
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
    low, high = _decoded_block(
        data_ptr, scales_ptr, zeros_ptr, block, rows, valid, N, dtype, K, BLOCKS, GROUP, CODE, ASM
    )
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
    else:
        block_m, block_n, warps, stages = 128, 128, 8, 4
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
        residual = bias.expand(rows, -1).contiguous() if residual is None else residual.add_(bias)
    if rows >= DEQUANTISE_FROM:
        whole = unpack(weight, x.dtype)
        return torch.nn.functional.linear(x, whole) if residual is None else residual.addmm_(x, whole.t())
    out = x.new_empty(rows, out_features) if residual is None else residual
    if rows == 1:
        _row(x, weight, out, residual is not None)
    elif rows:
        how = tiles(rows, out_features, weight.num_blocks, num_multiprocessors(x.device))
        _tile(x, weight, out, residual is not None, how)
    return out


def _row(x: torch.Tensor, weight: Packed4, out: torch.Tensor, add: bool) -> None:
    out_features, num_blocks = weight.out_features, weight.num_blocks
    block_n = 8
    options = _options(weight)
    launch(
        _row4_kernel,
        (triton.cdiv(out_features, block_n),),
        x.contiguous().view(torch.int64),
        weight.data.view(torch.int32),
        weight.scales,
        weight.scales if weight.zeros is None else weight.zeros,
        weight.scales if weight.factors is None else weight.factors,
        out,
        out_features,
        BF16=x.dtype == torch.bfloat16,
        BLOCK_N=block_n,
        BLOCK_B=min(16, triton.next_power_of_2(num_blocks)),
        ADD=add,
        num_warps=4,
        **options,
    )


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
        BLOCK_M=how.block_m,
        BLOCK_N=how.block_n,
        SPLIT=how.split,
        ADD=add and how.split == 1,
        ASM=is_gpu(x.device),
        num_warps=how.num_warps,
        num_stages=how.num_stages,
        **_options(weight),
    )
    if how.split > 1:
        grid = (triton.cdiv(out.numel(), 1024),)
        launch(_sum_kernel, grid, parts, out, out.numel(), SPLIT=how.split, ADD=add, BLOCK=1024, num_warps=4)


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
        BLOCK_N=32,
        ASM=is_gpu(out.device),
        num_warps=4,
        **_options(weight),
    )
    return out


def _options(weight: Packed4) -> dict[str, int | str | bool]:
    return {
        "K": weight.in_features,
        "BLOCKS": weight.num_blocks,
        "GROUP": weight.group,
        "CODE": weight.code,
        "FACTORS": weight.factors is not None,
    }
