"""Activation functions."""

from __future__ import annotations

import torch
from torch.nn import functional

from vllm.platforms.devices import on_gpu


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` of [T, 2F], gate first → [T, F] (SwiGLU: Shazeer, 2020)."""
    if on_gpu(gate_up):
        from vllm.ops.triton import activation as triton_activation

        return triton_activation.silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
