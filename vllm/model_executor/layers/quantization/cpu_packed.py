"""Weights in the order in which the compiled CPU kernels multiply by them: as they are, as int8, or in blocks."""

from __future__ import annotations

from collections.abc import Sequence
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

    def pack(self, layer: LinearBase, interleave: bool = False) -> cpu_kernels.Matrix:
        """Moves a layer's weights and bias into packed form.

        Args:
            interleave: The rows are a gate and an up projection, for the kernels that multiply the two.
        """
        blocks = layer.method.take_blocks(layer)
        if blocks is not None:
            return pack_blocks(layer, blocks, interleave)
        return cpu_kernels.PackedMatrix(layer.method.take(layer), layer.bias, interleave, self.int8)

    def finish(self, layer: LinearBase) -> None:
        layer.packed = self.pack(layer)

    def apply(self, layer: LinearBase, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return apply_packed(layer, x, residual)


def pack_blocks(
    layer: LinearBase, blocks: Sequence[cpu_kernels.BlockRows], interleave: bool = False
) -> cpu_kernels.BlockMatrix:
    """The layer's matrix of parts in blocks, and its bias."""
    return cpu_kernels.BlockMatrix(blocks, layer.bias, interleave, narrow=layer.dtype == torch.bfloat16)


def apply_packed(layer: LinearBase, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """`LinearMethod.apply` of a layer that is packed."""
    if layer.packed is None:
        raise RuntimeError("a layer is asked to multiply before its weights are packed")
    out = cpu_kernels.linear(x.float().contiguous(), layer.packed, cpu_kernels.arithmetic()).to(x.dtype)
    return out if residual is None else residual + out
