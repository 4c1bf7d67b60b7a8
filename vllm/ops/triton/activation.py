"""`silu(gate) · up` from the packed output of the gate and up projections (SwiGLU; Shazeer, 2020)."""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional

from vllm.ops.launch import follow, launch


@triton.jit
def _silu_and_mul_kernel(x_ptr, x_stride, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    gate = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    # Rounded between the two steps, as the two operations one after the other are.
    activated = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * SIZE + columns, (activated * up).to(dtype), mask=mask)


def silu_and_mul(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """gate_up [T, 2F], the last dimension contiguous → [T, F] in its dtype."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = gate_up.new_empty(rows, size)
    if rows:
        block = min(1024, triton.next_power_of_2(size))
        grid = (rows, triton.cdiv(size, block))
        launch(_silu_and_mul_kernel, grid, gate_up, gate_up.stride(0), out, SIZE=size, BLOCK=block, num_warps=4)
    return out


def silu_and_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu_and_mul` in plain torch."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
