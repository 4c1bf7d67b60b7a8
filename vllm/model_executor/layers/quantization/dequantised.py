"""Quantised weights that become whole when they are loaded, for devices and dtypes without kernels for them.

The compiled CPU kernels ask for blocks first, which some formats can be brought into."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm.model_executor.layers.quantization.base import LinearMethod, Scheme

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.ops.cpu.kernels import BlockRows


class Dequantised(LinearMethod):
    """No more than one matrix is in memory twice.

    Args:
        scheme: Of the checkpoint.
        whole: Holds what comes out.
    """

    def __init__(self, scheme: Scheme, whole: LinearMethod) -> None:
        self.scheme = scheme
        self.whole = whole
        self.stored = scheme.stored

    def finished_bytes(self, layer: LinearBase) -> int:
        return layer.in_features * layer.out_features * layer.dtype.itemsize

    def take(self, layer: LinearBase) -> torch.Tensor:
        tensors = layer.take_loaded()
        weight = self.scheme.dequantise(tensors, layer.sizes, layer.in_features).to(layer.dtype)
        layer.method = self.whole
        layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        return weight

    def take_blocks(self, layer: LinearBase) -> list[BlockRows] | None:
        blocks = self.scheme.blocks(layer.loaded(), layer.sizes, layer.in_features)
        if blocks is not None:
            layer.take_loaded()
        return blocks

    def finish(self, layer: LinearBase) -> None:
        layer.weight = nn.Parameter(self.take(layer), requires_grad=False)
        self.whole.finish(layer)

    def apply(self, layer: LinearBase, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        raise RuntimeError("a layer is asked to multiply before its weights are dequantised")
