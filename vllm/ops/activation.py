"""Activation functions, and their product with a gate (GLU variants: Shazeer, 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional

Activation = Literal["silu", "gelu", "gelu_tanh", "relu2"]

FUNCTIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu2": lambda x: functional.relu(x).square(),
}


def activate(x: torch.Tensor, activation: Activation, gated: bool) -> torch.Tensor:
    """`f(gate) · up` of x [T, 2F], gate first, or `f(x)` of x [T, F] → [T, F], in plain torch."""
    if not gated:
        return FUNCTIONS[activation](x)
    gate, up = x.chunk(2, dim=-1)
    return FUNCTIONS[activation](gate) * up
