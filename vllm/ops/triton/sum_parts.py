"""Partial sums of programs that share the features of a product, added up in a fixed order."""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.ops.launch import follow, launch

_BLOCK = 1024


@triton.jit
def _sum_kernel(
    parts_ptr, out_ptr, size, SPLIT: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Partial sums [SPLIT, size] → out [size], added to what is there if ADD."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    follow(PDL)
    total = tl.load(parts_ptr + at, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(1, SPLIT):
        total += tl.load(parts_ptr + i * size + at, mask=mask, other=0.0)
    if ADD:
        total += tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def sum_parts(parts: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    """[parts, …] → out […], contiguous; added to what is there if `add`."""
    grid = (triton.cdiv(out.numel(), _BLOCK),)
    launch(_sum_kernel, grid, parts, out, out.numel(), SPLIT=len(parts), ADD=add, BLOCK=_BLOCK, num_warps=4)
