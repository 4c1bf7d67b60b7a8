"""Norms of rows, statistics in float32; reads and writes every element once. `vllm.ops.norm` states the formulas.

The sum of the residual stream, which could be fused here, belongs to the product before it: see `vllm.ops.linear`.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.ops.launch import follow, launch
from vllm.ops.norm import Norm


@triton.jit
def _norm_kernel(
    x_ptr,
    x_stride,
    weight_ptr,
    bias_ptr,
    out_ptr,
    out_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32) + OFFSET
    if CENTRED:
        x = tl.where(mask, x - tl.sum(x, 0) / SIZE, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    normed = x * scale
    if ROUNDS_FIRST:
        normed = normed.to(dtype).to(tl.float32)
        weight = weight.to(dtype).to(tl.float32)
    out = normed * weight
    if HAS_BIAS:
        out += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + columns, out.to(dtype), mask=mask)


def row_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: Norm,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, N], rows contiguous, weight and bias [N] → normalised rows in the dtype of `x`; into `out`, which may be
    `x`, if it is given."""
    if x.stride(1) != 1:
        raise ValueError("the rows of a norm must be contiguous")
    rows, size = x.shape
    if out is None:
        out = torch.empty((rows, size), dtype=x.dtype, device=x.device)
    if rows:
        block = triton.next_power_of_2(size)
        launch(
            _norm_kernel,
            (rows,),
            x,
            x.stride(0),
            weight,
            weight if bias is None else bias,
            out,
            out.stride(0),
            norm.eps,
            SIZE=size,
            BLOCK=block,
            CENTRED=norm.kind == "layer",
            OFFSET=norm.offset,
            ROUNDS_FIRST=norm.rounds_first,
            HAS_BIAS=bias is not None,
            num_warps=min(16, max(1, block // 512)),
        )
    return out


def row_norm_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm) -> torch.Tensor:
    """`row_norm` with statistics in float64."""
    wide = x.double()
    if norm.kind == "layer":
        wide = wide - wide.mean(dim=-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + norm.eps)
    factor = weight.double() + norm.offset
    wide = (wide.to(x.dtype) * factor.to(x.dtype)).double() if norm.rounds_first else wide * factor
    return (wide if bias is None else wide + bias.double()).to(x.dtype)
