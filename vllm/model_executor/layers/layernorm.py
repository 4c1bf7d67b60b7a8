"""Norms of rows, with their weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

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
    """A norm of each of several heads, with weights of its own (`[num_heads, head_dim]`) or with none."""

    def __init__(self, num_heads: int, head_dim: int, norm: Norm, has_weights: bool = True) -> None:
        super().__init__()
        self.heads = num_heads, head_dim
        self.norm = norm
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim), requires_grad=False) if has_weights else None

    def load(self, parts: tuple[str, ...], kind: str, tensor: torch.Tensor) -> None:
        """Loads the `weight` (`kind`); it has no parts."""
        copy_checked(getattr(self, kind), tensor, kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, num_heads * head_dim] → the same shape."""
        wide = x.unflatten(1, self.heads).float()
        wide = normalise(wide, wide.new_ones(self.heads[1]), None, replace(self.norm, offset=0.0))
        if self.weight is not None:
            wide = wide * (self.weight.float() + self.norm.offset)
        return wide.to(x.dtype).flatten(1)
