"""Weights in the order in which the compiled CPU kernels multiply by them, as they are or as int8."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm.model_executor.layers.quantization.unquantized import Unquantized
from vllm.ops.cpu import kernels as cpu_kernels

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearBase


class CpuPacked(Unquantized):
    """Packed when they are loaded; no more than one matrix is in memory twice.

    Args:
        int8: Quantise every matrix: symmetric, one factor a row.
    """

    def __init__(self, int8: bool) -> None:
        self.int8 = int8

    def pack(self, layer: LinearBase, interleave: bool = False) -> cpu_kernels.PackedMatrix:
        """Moves a layer's weights and bias into packed form.

        Args:
            interleave: The rows are a gate and an up projection, for the kernels that multiply the two.
        """
        return cpu_kernels.PackedMatrix(layer.method.take(layer), layer.bias, interleave, self.int8)

    def finish(self, layer: LinearBase) -> None:
        layer.packed = self.pack(layer)

    def apply(self, layer: LinearBase, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if layer.packed is None:
            raise RuntimeError("a layer is asked to multiply before its weights are packed")
        out = cpu_kernels.linear(x.float().contiguous(), layer.packed, cpu_kernels.arithmetic()).to(x.dtype)
        return out if residual is None else residual + out
