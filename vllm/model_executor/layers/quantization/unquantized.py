"""Weights as they are, in the dtype of the activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm.model_executor.layers.quantization.base import LinearMethod
from vllm.ops.linear import linear

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearBase


class Unquantized(LinearMethod):
    """[out_features, in_features], multiplied by the device's library."""

    def finish(self, layer: LinearBase) -> None:
        """They are in that form already."""

    def take(self, layer: LinearBase) -> torch.Tensor:
        weight = layer.weight.data
        layer.weight.data = weight.new_empty(0)
        return weight

    def apply(
        self,
        layer: LinearBase,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return linear(x, layer.weight, layer.bias, residual)
