"""Weights as they are, in the dtype of the activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm.model_executor.layers.quantization.base import LinearMethod
from vllm.ops.linear import linear

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearBase


class Unquantized(LinearMethod):
    """[out_features, in_features], multiplied by the device's library."""

    def parameters(self, in_features: int, out_features: int) -> dict[str, nn.Parameter]:
        return {"weight": nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)}

    def finish(self, layer: LinearBase) -> None:
        """They are in that form already."""

    def apply(
        self,
        layer: LinearBase,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return linear(x, layer.weight, layer.bias, residual)
