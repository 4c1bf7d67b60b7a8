"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vllm.platforms.devices import on_gpu


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) · weight`, statistics in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if on_gpu(x):
            from vllm.ops.triton import norm as triton_norm

            return triton_norm.rms_norm(x, self.weight, self.eps)
        wide = functional.rms_norm(x.float(), self.weight.shape, eps=self.eps)
        return wide.to(x.dtype) * self.weight
