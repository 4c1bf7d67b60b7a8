"""Inputs of products with 8-bit weights: rows, or what a norm or an activation makes of them, quantised as they are
made, each by its largest magnitude (of all its numbers, or of each 128)."""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.ops.activation import Activation
from vllm.ops.launch import follow, launch
from vllm.ops.norm import Norm
from vllm.ops.packed8 import BLOCK, INT8_MAX, Rows8
from vllm.ops.quantization import FP8_MAX
from vllm.ops.triton.activation import activation_function


@triton.jit
def store_codes(values, mask, data_ptr, scales_ptr, row, SIZE: tl.constexpr, MOST: tl.constexpr):
    """Quantises a row, float32 [blocks, columns], a factor for each of its blocks, and stores it."""
    dtype: tl.constexpr = data_ptr.dtype.element_ty
    blocks: tl.constexpr = values.shape[0]
    columns: tl.constexpr = values.shape[1]
    scale = tl.maximum(tl.max(tl.abs(tl.where(mask, values, 0.0)), 1), 1e-10) / MOST
    codes = tl.minimum(tl.maximum(values / scale[:, None], -MOST), MOST)
    if dtype == tl.int8:
        # To the nearest: 1.5 · 2^23 leaves no bits behind the point.
        codes = (codes + 12582912.0) - 12582912.0
    at = tl.arange(0, blocks)[:, None] * columns + tl.arange(0, columns)[None, :]
    tl.store(data_ptr + row * SIZE + at, codes.to(dtype), mask=mask)
    count: tl.constexpr = 1 if blocks == 1 else (SIZE + columns - 1) // columns
    block = tl.arange(0, blocks)
    tl.store(scales_ptr + row * count + block, scale, mask=block < count)


@triton.jit
def _quantise_kernel(
    x_ptr,
    x_stride,
    data_ptr,
    scales_ptr,
    SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MOST: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCKS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = at < SIZE
    x = tl.load(x_ptr + row * x_stride + at, mask=mask, other=0.0).to(tl.float32)
    store_codes(x, mask, data_ptr, scales_ptr, row, SIZE, MOST)


def row_blocks(size: int, by_block: bool) -> tuple[int, int]:
    """(blocks, columns) of a row of `size` numbers as one tile."""
    if by_block:
        return triton.next_power_of_2(triton.cdiv(size, BLOCK)), BLOCK
    return 1, triton.next_power_of_2(size)


def empty_rows(rows: int, size: int, dtype: torch.dtype, by_block: bool, device: torch.device) -> Rows8:
    """Memory for quantised rows."""
    data = torch.empty((rows, size), dtype=dtype, device=device)
    count = triton.cdiv(size, BLOCK) if by_block else 1
    return Rows8(data, torch.empty((rows, count), dtype=torch.float32, device=device))


def most(dtype: torch.dtype) -> float:
    """The largest magnitude of a kind of codes."""
    return FP8_MAX if dtype == torch.float8_e4m3fn else INT8_MAX


def _options(size: int, dtype: torch.dtype, by_block: bool) -> dict[str, int | float]:
    blocks, columns = row_blocks(size, by_block)
    warps = min(16, max(1, blocks * columns // 512))
    return {"SIZE": size, "BLOCKS": blocks, "COLUMNS": columns, "MOST": most(dtype), "num_warps": warps}


def quantise_rows(x: torch.Tensor, dtype: torch.dtype, by_block: bool) -> Rows8:
    """`vllm.ops.packed8.quantise_rows`, the rows contiguous."""
    rows, size = x.shape
    out = empty_rows(rows, size, dtype, by_block, x.device)
    if rows:
        launch(_quantise_kernel, (rows,), x, x.stride(0), *out, **_options(size, dtype, by_block))
    return out


@triton.jit
def _norm_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    bias_ptr,
    data_ptr,
    scales_ptr,
    eps,
    SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MOST: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """As the kernel of `vllm.ops.triton.norm`, its result quantised."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCKS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = at < SIZE
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + at, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32) + OFFSET
    if CENTRED:
        x = tl.where(mask, x - tl.sum(tl.sum(x, 1), 0) / SIZE, 0.0)
    normed = x * tl.rsqrt(tl.sum(tl.sum(x * x, 1), 0) / SIZE + eps)
    if ROUNDS_FIRST:
        normed = normed.to(dtype).to(tl.float32)
        weight = weight.to(dtype).to(tl.float32)
    out = normed * weight
    if HAS_BIAS:
        out += tl.load(bias_ptr + at, mask=mask, other=0.0).to(tl.float32)
    # Rounded as the norm by itself rounds.
    store_codes(out.to(dtype).to(tl.float32), mask, data_ptr, scales_ptr, row, SIZE, MOST)


def norm_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm, dtype: torch.dtype, by_block: bool
) -> Rows8:
    """`quantise_rows` of normalised rows: x [M, K], rows contiguous; see `vllm.ops.norm`."""
    rows, size = x.shape
    out = empty_rows(rows, size, dtype, by_block, x.device)
    if rows:
        launch(
            _norm_kernel,
            (rows,),
            x,
            x.stride(0),
            weight,
            weight if bias is None else bias,
            *out,
            norm.eps,
            CENTRED=norm.kind == "layer",
            OFFSET=norm.offset,
            ROUNDS_FIRST=norm.rounds_first,
            HAS_BIAS=bias is not None,
            **_options(size, dtype, by_block),
        )
    return out


@triton.jit
def _activate_kernel(
    x_ptr,
    x_stride,
    data_ptr,
    scales_ptr,
    SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MOST: tl.constexpr,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """As the kernel of `vllm.ops.triton.activation`, its result quantised."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCKS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = at < SIZE
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + at, mask=mask, other=0.0).to(tl.float32)
    activated = activation_function(x, NAME).to(dtype).to(tl.float32)
    if GATED:
        activated *= tl.load(x_ptr + row * x_stride + SIZE + at, mask=mask, other=0.0).to(tl.float32)
    store_codes(activated.to(dtype).to(tl.float32), mask, data_ptr, scales_ptr, row, SIZE, MOST)


def activate_rows(x: torch.Tensor, activation: Activation, gated: bool, dtype: torch.dtype, by_block: bool) -> Rows8:
    """`quantise_rows` of `vllm.ops.activation.activate`: x [M, 2F] (or [M, F]), rows contiguous."""
    rows, size = x.shape[0], x.shape[1] // (2 if gated else 1)
    out = empty_rows(rows, size, dtype, by_block, x.device)
    if rows:
        options = _options(size, dtype, by_block)
        launch(_activate_kernel, (rows,), x, x.stride(0), *out, NAME=activation, GATED=gated, **options)
    return out
