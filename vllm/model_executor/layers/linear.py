"""Linear layers split over tensor-parallel ranks.

A layer's `load_shard` takes a whole tensor of the checkpoint and keeps this rank's part of it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vllm.distributed.communication import all_reduce
from vllm.distributed.parallel_state import TensorParallelGroup
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


class LinearBase(nn.Module):
    """`x Wᵀ + b`; weight [out_features, in_features] of this rank."""

    def __init__(self, in_features: int, out_features: int, bias: bool, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.tp = tp
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None


class MergedColumnParallelLinear(LinearBase):
    """Several linear layers over one input, computed as one and split by output rows (heads, channels).

    Args:
        parts: Output features of each, before the split, by name.
    """

    def __init__(self, in_features: int, parts: dict[str, int], bias: bool, tp: TensorParallelGroup) -> None:
        self.part_sizes = {name: tp.divide(size, name) for name, size in parts.items()}
        super().__init__(in_features, sum(self.part_sizes.values()), bias, tp)

    def load_shard(self, part: str, kind: str, tensor: torch.Tensor) -> None:
        """Loads the `weight` or `bias` (`kind`) of one part."""
        size = self.part_sizes[part]
        offset = 0
        for name, other in self.part_sizes.items():
            if name == part:
                break
            offset += other
        source = shard(tensor, 0, size, self.tp, f"{part}.{kind}")
        copy_checked(getattr(self, kind)[offset : offset + size], source, f"{part}.{kind}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


class RowParallelLinear(LinearBase):
    """A linear layer split by input columns; the ranks' results are summed, and the residual stream with them."""

    def __init__(self, in_features: int, out_features: int, bias: bool, tp: TensorParallelGroup) -> None:
        super().__init__(tp.divide(in_features, "input features"), out_features, bias, tp)

    def load_shard(self, kind: str, tensor: torch.Tensor) -> None:
        """Loads the `weight` or `bias` (`kind`)."""
        if kind == "weight":
            tensor = shard(tensor, 1, self.weight.shape[1], self.tp, kind)
        copy_checked(getattr(self, kind), tensor, kind)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The residual stream [T, out_features] after this layer; the one before it may be overwritten."""
        # Only one rank adds bias and residual, or the sum would hold them world_size times.
        first = self.tp.rank == 0
        out = linear(x, self.weight, self.bias if first else None, residual if first else None)
        return all_reduce(out, self.tp)


def shard(tensor: torch.Tensor, dim: int, size: int, tp: TensorParallelGroup, name: str) -> torch.Tensor:
    """This rank's `size` rows (`dim` 0) or columns (1) of a checkpoint tensor.

    Raises:
        ValueError: the ranks' shares are not the whole tensor.
    """
    whole = size * tp.world_size
    if tensor.dim() <= dim or tensor.shape[dim] != whole:
        what = "rows" if dim == 0 else "columns"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {whole} {what}")
    return tensor.narrow(dim, tp.rank * size, size)


def copy_checked(target: torch.Tensor, source: torch.Tensor, name: str) -> None:
    """Copies a checkpoint tensor into a parameter.

    Raises:
        ValueError: the shapes differ.
    """
    if target.shape != source.shape:
        raise ValueError(f"{name} has shape {tuple(source.shape)}, expected {tuple(target.shape)}")
    target.copy_(source)
