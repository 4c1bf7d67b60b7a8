"""Operations that layers call, each by the fastest kernel of the device that its input lies on."""

from __future__ import annotations

import torch

from vllm.ops import activation as plain_activation
from vllm.ops import moe as plain_moe
from vllm.ops import norm as plain_norm
from vllm.ops.activation import Activation
from vllm.ops.moe import Experts, Routing
from vllm.ops.norm import Norm
from vllm.platforms.devices import on_gpu


def row_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: Norm) -> torch.Tensor:
    """`ops.norm.normalise` of rows [T, N]."""
    if on_gpu(x):
        from vllm.ops.triton import norm as kernels

        return kernels.row_norm(x, weight, bias, norm)
    return plain_norm.normalise(x, weight, bias, norm)


def activate(x: torch.Tensor, activation: Activation, gated: bool) -> torch.Tensor:
    """`ops.activation.activate`."""
    if on_gpu(x):
        from vllm.ops.triton import activation as kernels

        return kernels.activate(x, activation, gated)
    return plain_activation.activate(x, activation, gated)


def mix_experts(
    x: torch.Tensor,
    logits: torch.Tensor,
    correction: torch.Tensor | None,
    expert_factors: torch.Tensor | None,
    routing: Routing,
    experts: Experts,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`ops.moe.mix_experts`."""
    if on_gpu(x):
        from vllm.ops.triton import moe as kernels

        return kernels.mix_experts(x, logits, correction, expert_factors, routing, experts, residual)
    return plain_moe.mix_experts(x, logits, correction, expert_factors, routing, experts, residual)
