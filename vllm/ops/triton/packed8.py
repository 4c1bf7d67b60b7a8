"""Products with 8-bit weights (`vllm.ops.packed8`): out [M, N] = x [M, K] Wᵀ.

One row is bound by the reading of W: it stays in 16 bits, and is multiplied in float32. More rows are quantised as W
is, and multiplied by the tensor cores: with one factor a row by the library where it can, else by the kernel here, W
the left operand, so that few rows of x make narrow tiles. Where there are fewer tiles than multiprocessors, programs
share a tile's features.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.ops.launch import follow, launch
from vllm.ops.packed8 import BLOCK, Packed8, Rows8
from vllm.ops.triton.packed4_row import four_floats
from vllm.ops.triton.rows8 import quantise_rows
from vllm.ops.triton.sum_parts import sum_parts
from vllm.platforms.devices import gpu_generation, is_gpu, num_multiprocessors

_ROWS = 4


# Four codes in the bytes of a register → four float32.
_FLOATS = tl.constexpr(
    """{
    .reg .b16 low, high, a, b, c, d;
    .reg .b32 pair, pair2;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 pair, low;
    cvt.rn.f16x2.e4m3x2 pair2, high;
    mov.b32 {a, b}, pair;
    mov.b32 {c, d}, pair2;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.f32.f16 $2, c;
    cvt.f32.f16 $3, d;
}"""
)
# An integer plus 128 becomes the last bits of 2^23.
_INTS = tl.constexpr(
    """{
    .reg .b32 word, a, b, c, d;
    xor.b32 word, $4, 0x80808080;
    prmt.b32 a, word, 0x4B000000, 0x7440;
    prmt.b32 b, word, 0x4B000000, 0x7441;
    prmt.b32 c, word, 0x4B000000, 0x7442;
    prmt.b32 d, word, 0x4B000000, 0x7443;
    sub.f32 $0, a, 0f4B000080;
    sub.f32 $1, b, 0f4B000080;
    sub.f32 $2, c, 0f4B000080;
    sub.f32 $3, d, 0f4B000080;
}"""
)


@triton.jit
def _plain_number(word, BYTE: tl.constexpr, IS_INT: tl.constexpr):
    if IS_INT:
        return ((word << (24 - 8 * BYTE)) >> 24).to(tl.float32)
    else:
        # Its exponent and mantissa as those of a float32 that is 2^120 times smaller.
        code = word >> (8 * BYTE)
        bits = ((code & 0x7F) << 20) | ((code & 0x80) << 24)
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def _numbers(word, IS_INT: tl.constexpr, ASM: tl.constexpr):
    """The four codes of an int32 as float32."""
    if ASM:
        types: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32)
        if IS_INT:
            a, b, c, d = tl.inline_asm_elementwise(_INTS, "=f,=f,=f,=f,r", [word], dtype=types, is_pure=True, pack=1)
        else:
            a, b, c, d = tl.inline_asm_elementwise(_FLOATS, "=f,=f,=f,=f,r", [word], dtype=types, is_pure=True, pack=1)
    else:
        a, b = _plain_number(word, 0, IS_INT), _plain_number(word, 1, IS_INT)
        c, d = _plain_number(word, 2, IS_INT), _plain_number(word, 3, IS_INT)
    return a, b, c, d


@triton.jit
def _add_products(acc, word, x0, x1, x2, x3, IS_INT: tl.constexpr, ASM: tl.constexpr):
    a, b, c, d = _numbers(word, IS_INT, ASM)
    acc += a * x0
    acc += b * x1
    acc += c * x2
    acc += d * x3
    return acc


@triton.jit
def _row8_kernel(
    x_ptr,
    data_ptr,
    scales_ptr,
    out_ptr,
    N,
    K: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    BF16: tl.constexpr,
    IS_INT: tl.constexpr,
    WORDS: tl.constexpr,
    ADD: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Four rows of W times one row of x; data as int32s and x as int64s of four features, so that all loads have one
    layout."""
    first_row = tl.program_id(0) * 4
    row_words: tl.constexpr = K // 4
    blocks: tl.constexpr = (K + 127) // 128
    words = tl.arange(0, WORDS)
    at = data_ptr + first_row.to(tl.int64) * row_words + words
    inside = words < row_words
    w0, w1 = tl.load(at, mask=inside, other=0), tl.load(at + row_words, mask=inside, other=0)
    w2, w3 = tl.load(at + 2 * row_words, mask=inside, other=0), tl.load(at + 3 * row_words, mask=inside, other=0)
    follow(PDL)
    acc0 = tl.zeros((WORDS,), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for first in range(0, row_words, WORDS):
        # The weights that come next are on their way while these are multiplied.
        following = at + first + WORDS
        there = first + WORDS + words < row_words
        next0, next1 = tl.load(following, mask=there, other=0), tl.load(following + row_words, mask=there, other=0)
        next2 = tl.load(following + 2 * row_words, mask=there, other=0)
        next3 = tl.load(following + 3 * row_words, mask=there, other=0)
        inside = first + words < row_words
        x0, x1, x2, x3 = four_floats(tl.load(x_ptr + first + words, mask=inside, other=0), BF16)
        if BY_BLOCK:
            scale = tl.load(scales_ptr + first_row * blocks + (first + words) // 32, mask=inside, other=0.0)
            x0, x1, x2, x3 = x0 * scale, x1 * scale, x2 * scale, x3 * scale
        acc0 = _add_products(acc0, w0, x0, x1, x2, x3, IS_INT, ASM)
        acc1 = _add_products(acc1, w1, x0, x1, x2, x3, IS_INT, ASM)
        acc2 = _add_products(acc2, w2, x0, x1, x2, x3, IS_INT, ASM)
        acc3 = _add_products(acc3, w3, x0, x1, x2, x3, IS_INT, ASM)
        w0, w1, w2, w3 = next0, next1, next2, next3
    every = tl.join(tl.join(acc0, acc2), tl.join(acc1, acc3))
    out = tl.sum(tl.reshape(every, (WORDS, 4)), 0)
    rows = first_row + tl.arange(0, 4)
    if not BY_BLOCK:
        out *= tl.load(scales_ptr + rows)
    if ADD:
        out += tl.load(out_ptr + rows).to(tl.float32)
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["M"])
def _tile8_kernel(
    x_ptr,
    x_scales_ptr,
    data_ptr,
    scales_ptr,
    out_ptr,
    M,
    N,
    K: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of rows of W and rows of x; with SPLIT > 1 of a share of the features, into partial sums [SPLIT, M, N]."""
    follow(PDL)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows behind the last one stand for it, so that no load of the loop is masked; their results are not stored.
    row, token = tl.minimum(rows, N - 1), tl.minimum(tokens, M - 1)
    blocks: tl.constexpr = (K + 127) // 128
    share: tl.constexpr = (blocks + SPLIT - 1) // SPLIT
    first = tl.program_id(2) * share
    features = tl.arange(0, 128)
    w_at = data_ptr + row.to(tl.int64)[:, None] * K + features[None, :]
    x_at = x_ptr + token.to(tl.int64)[None, :] * K + features[:, None]
    is_int: tl.constexpr = data_ptr.dtype.element_ty == tl.int8
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if is_int else tl.float32)
    count: tl.constexpr = blocks if BY_BLOCK else 1
    w_scales_at, x_scales_at = scales_ptr + row * count, x_scales_ptr + token * count
    if BY_BLOCK:
        w_scale, x_scale = tl.load(w_scales_at + first), tl.load(x_scales_at + first)
    for block in range(first, min(first + share, blocks)):
        if K % 128 == 0:
            w = tl.load(w_at + block * 128)
            x = tl.load(x_at + block * 128)
        else:
            inside = block * 128 + features < K
            w = tl.load(w_at + block * 128, mask=inside[None, :], other=0.0)
            x = tl.load(x_at + block * 128, mask=inside[:, None], other=0.0)
        if BY_BLOCK:
            part = tl.dot(w, x)
            acc += part * w_scale[:, None] * x_scale[None, :]
            # A step ahead of their use: nothing else hides how long they take.
            following = tl.minimum(block + 1, blocks - 1)
            w_scale, x_scale = tl.load(w_scales_at + following), tl.load(x_scales_at + following)
        elif is_int:
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(w, x, acc)
    out = acc.to(tl.float32)
    if not BY_BLOCK:
        out = out * tl.load(w_scales_at)[:, None] * tl.load(x_scales_at)[None, :]
    place = tokens.to(tl.int64)[None, :] * N + rows[:, None]
    mask = (rows < N)[:, None] & (tokens < M)[None, :]
    if SPLIT > 1:
        place += tl.program_id(2).to(tl.int64) * M * N
    if ADD:
        out += tl.load(out_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mask)


def packed8_linear(
    x: torch.Tensor | Rows8,
    weight: Packed8,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """`x Wᵀ + b (+ residual)`.

    Args:
        x: [M, K] in bfloat16 or float16, rows contiguous; or quantised.
        residual: [M, N], contiguous; is overwritten.
        dtype: Of the result where x is quantised; else it is that of x.

    Returns [M, N].
    """
    if isinstance(x, torch.Tensor):
        dtype = x.dtype
        if len(x) == 1:
            out = _start(x, weight, bias, residual, dtype)
            _row(x, weight, out, bias is not None or residual is not None)
            return out
        x = quantise_rows(x, weight.data.dtype, weight.by_block)
    device = x.data.device
    if not weight.by_block and weight.data.dtype == torch.float8_e4m3fn and _library_has_it(device, dtype):
        out = torch._scaled_mm(
            x.data, weight.data.t(), x.scales, weight.scales.t(), bias=bias, out_dtype=dtype, use_fast_accum=True
        )
        if residual is not None:
            sum_parts(out.unsqueeze(0), residual, add=True)
            return residual
        return out
    out = _start(x.data, weight, bias, residual, dtype)
    _tile(x, weight, out, bias is not None or residual is not None)
    return out


def _start(
    x: torch.Tensor, weight: Packed8, bias: torch.Tensor | None, residual: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """What the product is added to, or memory for it."""
    if bias is not None:
        return bias.repeat(len(x), 1) if residual is None else residual.add_(bias)
    return torch.empty((len(x), len(weight.data)), dtype=dtype, device=x.device) if residual is None else residual


def _library_has_it(device: torch.device, dtype: torch.dtype) -> bool:
    """torch multiplies e4m3 with a factor a row, to results in a dtype."""
    return is_gpu(device) and gpu_generation(device) >= (9, 0) and dtype == torch.bfloat16


def _row(x: torch.Tensor, weight: Packed8, out: torch.Tensor, add: bool) -> None:
    out_features, size = weight.data.shape
    launch(
        _row8_kernel,
        (out_features // _ROWS,),
        x.contiguous().view(torch.int64),
        weight.data.view(torch.int32),
        weight.scales,
        out,
        out_features,
        K=size,
        BY_BLOCK=weight.by_block,
        BF16=x.dtype == torch.bfloat16,
        IS_INT=weight.data.dtype == torch.int8,
        WORDS=min(256, triton.next_power_of_2(size // 4)),
        ADD=add,
        ASM=is_gpu(x.device),
        # The fewer threads sum up, the less is left to do when all is read.
        num_warps=2,
    )


def tiles(num_rows: int, out_features: int, num_blocks: int, multiprocessors: int) -> tuple[int, int, int, int, int]:
    """(rows of x, rows of W, programs that share a tile's features, warps, stages)."""
    if num_rows <= 64:
        block_m, block_n, warps, stages = max(16, triton.next_power_of_2(num_rows)), 64, 4, 5
        programs = 4 * multiprocessors if num_rows <= 32 else 2 * multiprocessors
    else:
        block_m, block_n, warps, stages = 128, 128, 8, 4
        programs = multiprocessors
    count = triton.cdiv(out_features, block_n) * triton.cdiv(num_rows, block_m)
    split = max(1, min(8, programs // count, num_blocks // 4))
    return block_m, block_n, triton.cdiv(num_blocks, triton.cdiv(num_blocks, split)), warps, stages


def _tile(x: Rows8, weight: Packed8, out: torch.Tensor, add: bool) -> None:
    rows, out_features = out.shape
    if not rows:
        return
    size = weight.data.shape[1]
    blocks = triton.cdiv(size, BLOCK)
    block_m, block_n, split, warps, stages = tiles(rows, out_features, blocks, num_multiprocessors(out.device))
    parts = out if split == 1 else torch.empty((split, *out.shape), dtype=torch.float32, device=out.device)
    launch(
        _tile8_kernel,
        (triton.cdiv(out_features, block_n), triton.cdiv(rows, block_m), split),
        x.data,
        x.scales,
        weight.data,
        weight.scales,
        parts,
        rows,
        out_features,
        K=size,
        BY_BLOCK=weight.by_block,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SPLIT=split,
        ADD=add and split == 1,
        num_warps=warps,
        num_stages=stages,
    )
    if split > 1:
        sum_parts(parts, out, add)
