"""A linear layer: the product with its weights, its bias, and the residual stream."""

from __future__ import annotations

import torch
from torch.nn import functional

from vllm.platforms.devices import on_gpu


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x Wᵀ + b (+ residual)`: x [T, in_features], weight [out_features, in_features].

    On a GPU the residual stream is added while the product is still in registers, rounded once. On an H100, bfloat16, a
    product to 4,096 features and the norm behind it (µs): 8,192 rows of 4,096 features 428, of 14,336 1,431; with the
    sum in the norm 460 and 1,457; 256 rows of 4,096 22.7 and 24.8; the same below 64 rows.

    Args:
        residual: [T, out_features], contiguous; is overwritten on a GPU.
        out: [T, out_features], contiguous; where the result goes, if there is neither a bias nor a residual.
    """
    if out is not None and (bias is not None or residual is not None):
        raise ValueError("a linear layer with a bias or a residual makes its own result")
    if not on_gpu(x):
        result = functional.linear(x, weight, bias)
        if out is not None:
            return out.copy_(result)
        return result if residual is None else residual + result
    if len(x) == 1 and weight.dtype.itemsize == 2:
        from vllm.ops.triton import linear as triton_linear

        if bias is not None:
            residual = bias.unsqueeze(0).clone() if residual is None else residual.add_(bias)
        return triton_linear.row_linear(x, weight, residual, out)
    if out is not None:
        return torch.mm(x, weight.t(), out=out)
    if residual is None:
        return functional.linear(x, weight, bias)
    if bias is not None:
        residual.add_(bias)
    return residual.addmm_(x, weight.t())
