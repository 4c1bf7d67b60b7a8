"""RMSNorm fused with the residual addition.

    residual ← residual + x  (rounded to its dtype),   out = round(residual / sqrt(mean(residual²) + eps)) · weight
with statistics in float32: what `RMSNorm.add` computes, reading and writing every element once.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.kernel_launch import follow, launch


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    x = tl.load(x_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row + columns, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    normed = (x * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row + columns, (normed * weight).to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
) -> torch.Tensor:
    if not x.is_contiguous() or (residual is not None and not residual.is_contiguous()):
        raise ValueError("the rows of a norm must be contiguous")
    rows, size = x.shape
    if out is None:
        out = torch.empty_like(x)
    if rows:
        block = triton.next_power_of_2(size)
        launch(
            _norm_kernel,
            (rows,),
            x,
            x if residual is None else residual,
            weight,
            out,
            eps,
            SIZE=size,
            BLOCK=block,
            ADD=residual is not None,
            num_warps=min(16, max(1, block // 512)),
        )
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, hidden_size], weight [hidden_size] → normalised rows in the dtype of `x`."""
    return _launch(x, None, weight, eps, out)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Adds `x` to the residual stream in place and returns the normalised sum; [T, hidden_size]. `out` may be `x`."""
    return _launch(x, residual, weight, eps, out)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` with statistics in float64."""
    wide = x.double()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight
