"""The product of one row with 4-bit weights (`vllm.ops.packed4`), bound by the reading of W.

A program has four rows of W; a thread decodes words of eight codes and multiplies them in float32. The decoding must
cost less than the reading: an integer q becomes the float32 128 + q by one permutation of bytes, and what is too much
is taken off once a word, by the sum of its inputs. x and the scales come as integers of 64 bits, four
numbers each, in the order in which the words are read: so all loads of a thread have one layout, and nothing is moved
between threads before the sums.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM108 - branches on constexprs are settled when a kernel is compiled
from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.ops.launch import follow, launch
from vllm.ops.packed4 import Packed4
from vllm.platforms.devices import is_gpu

_ROWS = 4
_BLOCKS = 16


@triton.jit
def _permuted(ASM: tl.constexpr, codes, base):
    return tl.inline_asm_elementwise(ASM, "=r,r,r", [codes, base], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _number(codes, base, BYTE: tl.constexpr, CODE: tl.constexpr, ASM: tl.constexpr):
    """The code in a byte of an int32 as float32: 128 + q of an integer, the number itself of a float. `base` is the
    integer of 128."""
    if CODE == "e2m1":
        # Its exponent and mantissa as those of a float32 that is 2^126 times smaller.
        if BYTE == 3:
            bits = (codes >> 2) & 0x01C00000
        else:
            bits = (codes << (22 - 8 * BYTE)) & 0x01C00000
        bits |= (codes << (28 - 8 * BYTE)) & -0x80000000
        return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37
    elif ASM:
        # Its byte between 0x43 and zeros.
        if BYTE == 0:
            return _permuted("prmt.b32 $0, $1, $2, 0x7044;", codes, base)
        elif BYTE == 1:
            return _permuted("prmt.b32 $0, $1, $2, 0x7144;", codes, base)
        elif BYTE == 2:
            return _permuted("prmt.b32 $0, $1, $2, 0x7244;", codes, base)
        else:
            return _permuted("prmt.b32 $0, $1, $2, 0x7344;", codes, base)
    else:
        return 128.0 + ((codes >> (8 * BYTE)) & 15).to(tl.float32)


@triton.jit
def four_floats(bits, BF16: tl.constexpr):
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
def _add_four(total, codes, base, a, b, c, d, CODE: tl.constexpr, ASM: tl.constexpr):
    """Adds the products of four codes, each in a byte of an int32."""
    total += _number(codes, base, 0, CODE, ASM) * a
    total += _number(codes, base, 1, CODE, ASM) * b
    total += _number(codes, base, 2, CODE, ASM) * c
    total += _number(codes, base, 3, CODE, ASM) * d
    return total


@triton.jit
def _zero(zeros, ROW: tl.constexpr, CODE: tl.constexpr):
    """What is too much of each code of a row, whose zero is one of four bytes."""
    if CODE == "int4_zeros":
        return 128.0 + ((zeros >> (8 * ROW)) & 0xFF).to(tl.float32)
    else:
        return 136.0


@triton.jit
def _add_word(
    acc, word, base, x0, x1, x2, x3, x4, x5, x6, x7, low_sum, high_sum, low_scale, high_scale, low_zeros, high_zeros,
    ROW: tl.constexpr, CODE: tl.constexpr, ONE_SCALE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Adds what a word of row `ROW` makes to the row's result."""
    low, high = tl.zeros_like(low_sum), tl.zeros_like(high_sum)
    if ONE_SCALE:
        if CODE != "e2m1":
            low = -_zero(low_zeros, ROW, CODE) * (low_sum + high_sum)
        low = _add_four(low, word & 0x0F0F0F0F, base, x0, x1, x2, x3, CODE, ASM)
        low = _add_four(low, (word >> 4) & 0x0F0F0F0F, base, x4, x5, x6, x7, CODE, ASM)
        return acc + low * low_scale
    else:
        if CODE != "e2m1":
            low = -_zero(low_zeros, ROW, CODE) * low_sum
            high = -_zero(high_zeros, ROW, CODE) * high_sum
        low = _add_four(low, word & 0x0F0F0F0F, base, x0, x1, x2, x3, CODE, ASM)
        high = _add_four(high, (word >> 4) & 0x0F0F0F0F, base, x4, x5, x6, x7, CODE, ASM)
        return acc + low * low_scale + high * high_scale


@triton.jit
def _row4_kernel(
    x_ptr,
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
    BF16: tl.constexpr,
    BF16_SCALES: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    ADD: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """x as int64s of four features, data as int32s of eight codes (16 a block), scales [groups, STRIDE] as int64s of
    four rows, zeros as int32s of four rows."""
    first_row = tl.program_id(0) * 4
    blocks, words = tl.arange(0, BLOCK_B)[:, None], tl.arange(0, 16)[None, :]
    # The last program's rows may be fewer; the others stand for the last one.
    at = data_ptr + blocks * 16 + words
    at0 = at + first_row.to(tl.int64) * (BLOCKS * 16)
    at1 = at + tl.minimum(first_row + 1, N - 1).to(tl.int64) * (BLOCKS * 16)
    at2 = at + tl.minimum(first_row + 2, N - 1).to(tl.int64) * (BLOCKS * 16)
    at3 = at + tl.minimum(first_row + 3, N - 1).to(tl.int64) * (BLOCKS * 16)
    inside = blocks + words * 0 < BLOCKS
    word0, word1 = tl.load(at0, mask=inside, other=0), tl.load(at1, mask=inside, other=0)
    word2, word3 = tl.load(at2, mask=inside, other=0), tl.load(at3, mask=inside, other=0)
    follow(PDL)
    one: tl.constexpr = GROUP >= 128
    # N is above 0, which the compiler does not know: as a constant it would be moved to a register for every code.
    base = 0x43000000 + (N >> 31)
    acc0 = tl.zeros((BLOCK_B, 16), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for first in range(0, BLOCKS, BLOCK_B):
        block = first + blocks
        inside = block + words * 0 < BLOCKS
        # The words that come next are on their way while these are multiplied.
        there = block + BLOCK_B + words * 0 < BLOCKS
        next0 = tl.load(at0 + (first + BLOCK_B) * 16, mask=there, other=0)
        next1 = tl.load(at1 + (first + BLOCK_B) * 16, mask=there, other=0)
        next2 = tl.load(at2 + (first + BLOCK_B) * 16, mask=there, other=0)
        next3 = tl.load(at3 + (first + BLOCK_B) * 16, mask=there, other=0)
        feature = block * 128 + words * 4
        # Whole blocks need one mask only.
        fits = inside if K % 128 == 0 else feature < K
        fits2 = inside if K % 128 == 0 else feature + 64 < K
        x_at = x_ptr + block * 32 + words
        x0, x1, x2, x3 = four_floats(tl.load(x_at, mask=fits, other=0), BF16)
        x4, x5, x6, x7 = four_floats(tl.load(x_at + 16, mask=fits2, other=0), BF16)
        low_sum, high_sum = x0 + x1 + x2 + x3, x4 + x5 + x6 + x7
        group = (feature // GROUP * STRIDE + first_row) // 4
        s0, s1, s2, s3 = four_floats(tl.load(scales_ptr + group, mask=fits, other=0), BF16_SCALES)
        zeros = block
        if CODE == "int4_zeros":
            zeros = tl.load(zeros_ptr + group, mask=fits, other=0)
        t0, t1, t2, t3, zeros2 = s0, s1, s2, s3, zeros
        if GROUP < 128:
            group = ((feature + 64) // GROUP * STRIDE + first_row) // 4
            t0, t1, t2, t3 = four_floats(tl.load(scales_ptr + group, mask=fits2, other=0), BF16_SCALES)
            if CODE == "int4_zeros":
                zeros2 = tl.load(zeros_ptr + group, mask=fits2, other=0)
        acc0 = _add_word(
            acc0,
            word0,
            base,
            x0,
            x1,
            x2,
            x3,
            x4,
            x5,
            x6,
            x7,
            low_sum,
            high_sum,
            s0,
            t0,
            zeros,
            zeros2,
            0,
            CODE,
            one,
            ASM,
        )
        acc1 = _add_word(
            acc1,
            word1,
            base,
            x0,
            x1,
            x2,
            x3,
            x4,
            x5,
            x6,
            x7,
            low_sum,
            high_sum,
            s1,
            t1,
            zeros,
            zeros2,
            1,
            CODE,
            one,
            ASM,
        )
        acc2 = _add_word(
            acc2,
            word2,
            base,
            x0,
            x1,
            x2,
            x3,
            x4,
            x5,
            x6,
            x7,
            low_sum,
            high_sum,
            s2,
            t2,
            zeros,
            zeros2,
            2,
            CODE,
            one,
            ASM,
        )
        acc3 = _add_word(
            acc3,
            word3,
            base,
            x0,
            x1,
            x2,
            x3,
            x4,
            x5,
            x6,
            x7,
            low_sum,
            high_sum,
            s3,
            t3,
            zeros,
            zeros2,
            3,
            CODE,
            one,
            ASM,
        )
        word0, word1, word2, word3 = next0, next1, next2, next3
    every = tl.join(tl.join(acc0, acc2), tl.join(acc1, acc3))
    out = tl.sum(tl.reshape(every, (BLOCK_B * 16, 4)), 0)
    rows = first_row + tl.arange(0, 4)
    valid = rows < N
    if FACTORS:
        out *= tl.load(factors_ptr + rows, mask=valid, other=0.0)
    if ADD:
        out += tl.load(out_ptr + rows, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, out.to(out_ptr.dtype.element_ty), mask=valid)


def packed4_row(x: torch.Tensor, weight: Packed4, out: torch.Tensor, add: bool) -> None:
    """x [1, K] in bfloat16 or float16, times W: into out [1, N], or added to it. The scales are in 16 bits."""
    out_features = weight.out_features
    launch(
        _row4_kernel,
        (triton.cdiv(out_features, _ROWS),),
        x.contiguous().view(torch.int64),
        weight.data.view(torch.int32),
        weight.scales.flatten().view(torch.int64),
        weight.data if weight.zeros is None else weight.zeros.flatten().view(torch.int32),
        weight.data if weight.factors is None else weight.factors,
        out,
        out_features,
        weight.scales.shape[1],
        BF16=x.dtype == torch.bfloat16,
        BF16_SCALES=weight.scales.dtype == torch.bfloat16,
        BLOCK_B=min(_BLOCKS, triton.next_power_of_2(weight.num_blocks)),
        ADD=add,
        ASM=is_gpu(x.device),
        # The fewer threads sum up, the less is left to do when all is read.
        num_warps=2,
        **constants(weight),
    )


def constants(weight: Packed4) -> dict[str, int | str | bool]:
    """What kernels are compiled for."""
    return {
        "K": weight.in_features,
        "BLOCKS": weight.num_blocks,
        "GROUP": weight.group,
        "CODE": weight.code,
        "FACTORS": weight.factors is not None,
    }
