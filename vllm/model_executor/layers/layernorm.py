"""Norms of rows, with their weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from vllm.distributed.communication import all_reduce
from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.model_executor.layers.linear import copy_checked
from vllm.ops.dispatch import row_norm
from vllm.ops.norm import Norm, normalise


class RowNorm(nn.Module):
    """A norm of rows of `size` numbers; see `vllm.ops.norm`."""

    def __init__(self, size: int, norm: Norm, has_bias: bool = False) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(size), requires_grad=False) if has_bias else None

    def load(self, parts: tuple[str, ...], kind: str, tensor: torch.Tensor) -> None:
        """Loads the `weight` or `bias` (`kind`); it has no parts."""
        copy_checked(getattr(self, kind), tensor, kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, size] → [T, size]."""
        return row_norm(x, self.weight, self.bias, self.norm)


class HeadNorms(nn.Module):
    """A norm of each of several heads, with weights of its own (`[num_heads, head_dim]`) or with none.

    Args:
        first: The first of these heads among those that the checkpoint has weights for.
    """

    def __init__(self, num_heads: int, head_dim: int, norm: Norm, has_weights: bool = True, first: int = 0) -> None:
        super().__init__()
        self._first = first
        self.heads = num_heads, head_dim
        self.norm = norm
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim), requires_grad=False) if has_weights else None

    def load(self, parts: tuple[str, ...], kind: str, tensor: torch.Tensor) -> None:
        """Loads the `weight` (`kind`); it has no parts."""
        copy_checked(getattr(self, kind), tensor[self._first : self._first + self.heads[0]], kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, num_heads * head_dim] → the same shape."""
        wide = x.unflatten(1, self.heads).float()
        wide = normalise(wide, wide.new_ones(self.heads[1]), None, replace(self.norm, offset=0.0))
        if self.weight is not None:
            wide = wide * (self.weight.float() + self.norm.offset)
        return wide.to(x.dtype).flatten(1)


class SplitRowNorm(nn.Module):
    """The root-mean-square norm of rows that lie on several ranks: each has `size` neighbouring numbers of them.

    Args:
        size: Of this rank's part.
        copies: How many neighbouring ranks have the same part.
    """

    def __init__(self, size: int, norm: Norm, tp: TensorParallelGroup, copies: int = 1) -> None:
        super().__init__()
        if norm.kind != "rms":
            raise ValueError(f"a {norm.kind} norm of rows cannot be split over tensor-parallel ranks")
        self.norm = norm
        self.tp = tp
        self._copies = copies
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def load(self, parts: tuple[str, ...], kind: str, tensor: torch.Tensor) -> None:
        """Loads this rank's part of the `weight` (`kind`); it has no parts."""
        size = len(self.weight)
        first = self.tp.rank // self._copies * size
        copy_checked(self.weight, tensor[first : first + size], kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, size] → [T, size]."""
        wide = x.float()
        squares = all_reduce(wide.square().sum(-1, keepdim=True), self.tp)
        mean = squares / (x.shape[-1] * self.tp.world_size)
        wide = wide * torch.rsqrt(mean + self.norm.eps)
        factor = self.weight.float() + self.norm.offset
        if self.norm.rounds_first:
            wide, factor = wide.to(x.dtype), factor.to(x.dtype)
        return (wide * factor).to(x.dtype)
