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
from vllm.ops.triton.rows8 import quantise_rows
from vllm.ops.triton.sum_parts import sum_parts
from vllm.platforms.devices import gpu_generation, is_gpu, num_multiprocessors

_ROWS = 4


@triton.jit
def _row8_kernel(
    x_ptr,
    data_ptr,
    scales_ptr,
    out_ptr,
    N,
    K: tl.constexpr,
    BY_BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    """Four rows of W times one row of x."""
    first_row = tl.program_id(0) * 4
    blocks: tl.constexpr = (K + 127) // 128
    columns = tl.arange(0, BLOCK_K)
    at = data_ptr + first_row.to(tl.int64) * K + columns
    inside = columns < K
    w0, w1 = tl.load(at, mask=inside, other=0.0), tl.load(at + K, mask=inside, other=0.0)
    w2, w3 = tl.load(at + 2 * K, mask=inside, other=0.0), tl.load(at + 3 * K, mask=inside, other=0.0)
    follow(PDL)
    acc0 = tl.zeros((BLOCK_K,), tl.float32)
    acc1, acc2, acc3 = acc0, acc0, acc0
    for k in range(0, K, BLOCK_K):
        inside = k + columns < K
        # The weights that come next are on their way while these are multiplied.
        following = at + k + BLOCK_K
        there = k + BLOCK_K + columns < K
        next0, next1 = tl.load(following, mask=there, other=0.0), tl.load(following + K, mask=there, other=0.0)
        next2 = tl.load(following + 2 * K, mask=there, other=0.0)
        next3 = tl.load(following + 3 * K, mask=there, other=0.0)
        x = tl.load(x_ptr + k + columns, mask=inside, other=0.0).to(tl.float32)
        if BY_BLOCK:
            x *= tl.load(scales_ptr + first_row * blocks + (k + columns) // 128, mask=inside, other=0.0)
        acc0 += w0.to(tl.float32) * x
        acc1 += w1.to(tl.float32) * x
        acc2 += w2.to(tl.float32) * x
        acc3 += w3.to(tl.float32) * x
        w0, w1, w2, w3 = next0, next1, next2, next3
    every = tl.join(tl.join(acc0, acc2), tl.join(acc1, acc3))
    out = tl.sum(tl.reshape(every, (BLOCK_K, 4)), 0)
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
        return out if residual is None else residual.add_(out)
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
        x.contiguous(),
        weight.data,
        weight.scales,
        out,
        out_features,
        K=size,
        BY_BLOCK=weight.by_block,
        # Eight weights a thread and row: with more, registers leave room for too few programs.
        BLOCK_K=min(1024, triton.next_power_of_2(size)),
        ADD=add,
        num_warps=4,
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
