"""RMSNorm: `round(x / sqrt(mean(x²) + eps)) · weight`, statistics in float32; reads and writes every element once.

The sum of the residual stream, which could be fused here, belongs to the product before it: see `layers.linear`.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.ops.launch import follow, launch


@triton.jit
def _norm_kernel(x_ptr, weight_ptr, out_ptr, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64) * SIZE
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    x = tl.load(x_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    normed = (x * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row + columns, (normed * weight).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, hidden_size], weight [hidden_size] → normalised rows in the dtype of `x`."""
    if not x.is_contiguous():
        raise ValueError("the rows of a norm must be contiguous")
    rows, size = x.shape
    out = torch.empty_like(x)
    if rows:
        block = triton.next_power_of_2(size)
        options = {"SIZE": size, "BLOCK": block, "num_warps": min(16, max(1, block // 512))}
        launch(_norm_kernel, (rows,), x, weight, out, eps, **options)
    return out


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` with statistics in float64."""
    wide = x.double()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight
