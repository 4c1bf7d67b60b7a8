"""Activation functions and their product with a gate, from the packed output of one projection."""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.ops.activation import Activation
from vllm.ops.launch import follow, launch


@triton.jit
def activation_function(x, NAME: tl.constexpr):
    if NAME == "silu":
        return x * tl.sigmoid(x)
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # tanh(z) = 2 sigmoid(2z) - 1, so 0.5 x (1 + tanh(z)) is x sigmoid(2z).
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        positive = tl.maximum(x, 0.0)
        return positive * positive


@triton.jit
def _activate_kernel(
    x_ptr,
    x_stride,
    out_ptr,
    SIZE: tl.constexpr,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    # Rounded between the two steps, as the two operations one after the other are.
    activated = activation_function(x, NAME).to(dtype).to(tl.float32)
    if GATED:
        activated *= tl.load(x_ptr + row * x_stride + SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * SIZE + columns, activated.to(dtype), mask=mask)


def activate(x: torch.Tensor, activation: Activation, gated: bool, out: torch.Tensor | None = None) -> torch.Tensor:
    """As `vllm.ops.activation.activate`: x [T, 2F] (or [T, F]), the last dimension contiguous → [T, F] in its dtype."""
    rows, size = x.shape[0], x.shape[1] // (2 if gated else 1)
    if out is None:
        out = x.new_empty(rows, size)
    if rows:
        block = min(1024, triton.next_power_of_2(size))
        options = {"SIZE": size, "NAME": activation, "GATED": gated, "BLOCK": block, "num_warps": 4}
        launch(_activate_kernel, (rows, triton.cdiv(size, block)), x, x.stride(0), out, **options)
    return out
