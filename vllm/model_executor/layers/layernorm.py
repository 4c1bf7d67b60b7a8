"""Norms of rows, with their weights."""

from __future__ import annotations

import torch
from torch import nn

from vllm.model_executor.layers.linear import copy_checked
from vllm.ops.dispatch import row_norm
from vllm.ops.norm import Norm


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
