"""Products of tokens with the MXFP4 matrices of their experts; `moe` says how the work is cut.

The matrix is the left operand, unpacked in registers, and the tokens are the right one: `outᵀ = W xᵀ`. So the tensor
cores take few tokens as well as many, and what is unpacked goes to them without a detour through shared memory.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.ops.launch import follow, launch
from vllm.ops.moe import Experts
from vllm.ops.triton.expert_tiles import ProductTiles, activation_options, gate_times_up
from vllm.ops.triton.routing import Routed


@triton.jit
def _unpacked(bits, scale):
    """16 bits of a number, as `mxfp4.arrange` placed them, times the scale of each row → bfloat16 [rows, columns]."""
    return bits.to(tl.bfloat16, bitcast=True) * scale[:, None]


@triton.jit
def _factor(scales, BLOCK: tl.constexpr):
    """2^(s - 127) of one of four blocks, times the 2^126 that unpacked numbers are too small by."""
    return ((((scales >> (8 * BLOCK)) & 255) + 126) << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _packed_kernel(
    x_ptr,
    words_ptr,
    scales_ptr,
    bias_ptr,
    order_ptr,
    tiles_ptr,
    out_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """FIRST: gate and up, of tokens in their own order; otherwise down, to rows in the order of tokens and places."""
    N_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    GROUPS: tl.constexpr = (K + 127) // 128
    tile, n = tl.program_id(0) // N_BLOCKS, tl.program_id(0) % N_BLOCKS
    follow(PDL)
    expert = tl.load(tiles_ptr + tile * 3)
    if expert < 0:
        return
    first, last = tl.load(tiles_ptr + tile * 3 + 1), tl.load(tiles_ptr + tile * 3 + 2)
    rows = first + tl.arange(0, BLOCK_M)
    valid = rows < last
    pairs = tl.load(order_ptr + rows, mask=valid, other=0)
    # Rows behind the tile's last repeat a token, and are not stored.
    sources = pairs // TOP_K if FIRST else tl.where(valid, rows, first)
    columns, k = n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, 32)
    inside = columns < N
    x_at = x_ptr + sources.to(tl.int64)[None, :] * K + k[:, None]
    row = expert.to(tl.int64) * N + tl.minimum(columns, N - 1)
    words_at = words_ptr + row[:, None] * (GROUPS * 32) + k[None, :]
    scales_at = scales_ptr + expert.to(tl.int64) * (GROUPS * N) + tl.minimum(columns, N - 1)
    out = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for group in range(GROUPS):
        words = tl.load(words_at + group * 32)
        scales = tl.load(scales_at + group * N)
        start = group * 128
        x0 = tl.load(x_at + start, mask=(k < K - start)[:, None], other=0.0)
        x1 = tl.load(x_at + start + 32, mask=(k < K - start - 32)[:, None], other=0.0)
        x2 = tl.load(x_at + start + 64, mask=(k < K - start - 64)[:, None], other=0.0)
        x3 = tl.load(x_at + start + 96, mask=(k < K - start - 96)[:, None], other=0.0)
        mask: tl.constexpr = -0x7E40  # 0x81C0
        w0 = _unpacked(words & mask, _factor(scales, 0))
        w1 = _unpacked((words << 3) & mask, _factor(scales, 1))
        w2 = _unpacked((words << 6) & mask, _factor(scales, 2))
        fourth = ((words << 1) & -0x8000) | ((words >> 5) & 0x100) | ((words >> 4) & 0xC0)
        w3 = _unpacked(fourth, _factor(scales, 3))
        out = tl.dot(w0, x0, out)
        out = tl.dot(w1, x1, out)
        out = tl.dot(w2, x2, out)
        out = tl.dot(w3, x3, out)
    if HAS_BIAS:
        out += tl.load(bias_ptr + expert * N + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    by_row = tl.trans(out.to(dtype))
    if FIRST:
        gate, up = tl.split(tl.reshape(by_row, [BLOCK_M, BLOCK_N // 2, 2]))
        middle = gate_times_up(gate, up, ACTIVATION, ALPHA, LIMIT, dtype).to(dtype)
        half = n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        out_at = out_ptr + rows.to(tl.int64)[:, None] * (N // 2) + half[None, :]
        tl.store(out_at, middle, mask=valid[:, None] & (half < N // 2)[None, :])
    else:
        out_at = out_ptr + pairs.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(out_at, by_row, mask=valid[:, None] & inside[None, :])


def packed_expert_rows(
    x: torch.Tensor,
    routed: Routed,
    experts: Experts,
    first: ProductTiles,
    second: ProductTiles,
    rows: torch.Tensor,
) -> torch.Tensor:
    """As `moe.expert_rows`, of matrices as `mxfp4.arrange` makes them; into `rows` [T, K, H]. x is bfloat16."""
    if x.dtype != torch.bfloat16:
        raise ValueError(f"MXFP4 experts take bfloat16 tokens, got {x.dtype}")
    hidden, top_k = x.shape[1], rows.shape[1]
    size = experts.gate_up.shape[1] // 2
    middle = x.new_empty(len(routed.order), size)
    options = {"TOP_K": top_k, **activation_options(experts)}
    for source, words, scales, bias, out, tiles, k, n, is_first in (
        (x, experts.gate_up, experts.gate_up_scales, experts.gate_up_bias, middle, first, hidden, 2 * size, True),
        (middle, experts.down, experts.down_scales, experts.down_bias, rows, second, size, hidden, False),
    ):
        launch(
            _packed_kernel,
            (len(routed.tiles) * triton.cdiv(n, tiles.block_n),),
            source,
            words,
            scales,
            words if bias is None else bias,
            routed.order,
            routed.tiles,
            out,
            K=k,
            N=n,
            FIRST=is_first,
            HAS_BIAS=bias is not None,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **options,
        )
    return rows
