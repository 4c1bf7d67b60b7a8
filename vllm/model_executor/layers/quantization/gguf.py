"""Weights in the blocks of a GGUF file, multiplied as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import gguf
import torch
from torch import nn

from vllm.model_executor.layers.quantization.base import LinearMethod
from vllm.model_executor.layers.quantization.cpu_packed import apply_packed, pack_blocks
from vllm.model_executor.layers.quantization.stored import IN, OUT, Axis, Stored
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.transformers_utils.quantization_config import GGUFFormat

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearBase


def block_sizes(name: str) -> tuple[int, int]:
    """Weights and bytes of a block of a GGUF type."""
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return int(weights), int(size)


class GGUF(LinearMethod):
    """A tensor of a file comes as uint8 [N, blocks, bytes of a block], and may lie in the file: nothing is copied
    before it is packed. Parts of a layer may differ in their types; ranks share whole blocks.

    Args:
        format: Types of the parts.
    """

    def __init__(self, format: GGUFFormat) -> None:
        self._types = dict(format.types)
        weights, _ = block_sizes(format.types[0][1])
        # A layer whose input features are shared among ranks has one part.
        self.stored = {"weight": Stored((OUT, Axis("in", weights), IN), torch.uint8)}

    def parameters(self, parts: Sequence[int], in_features: int) -> dict[str, nn.Parameter]:
        for name in self._types.values():
            weights, _ = block_sizes(name)
            if in_features % weights:
                raise ValueError(
                    f"{in_features} input features of a rank are no multiple of {weights}, the weights in a block of "
                    f"{name}; use fewer tensor-parallel ranks"
                )
        # The tensors themselves are views of the file, of different sizes.
        return {"weight": nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)}

    def load(self, layer: LinearBase, kind: str, index: int, tensor: torch.Tensor, name: str) -> None:
        type_name = self._types[layer.parts[index]]
        weights, size = block_sizes(type_name)
        wanted = (layer.sizes[index], layer.in_features // weights, size)
        if tensor.dtype != torch.uint8 or tensor.shape != wanted:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {wanted} bytes of {type_name}")
        layer.blocks[index] = cpu_kernels.BlockRows(tensor.flatten(1), layer.in_features, type_name)

    def finished_bytes(self, layer: LinearBase) -> int:
        total = 0
        for part, size in zip(layer.parts, layer.sizes, strict=True):
            weights, num_bytes = block_sizes(self._types[part])
            total += size * layer.in_features // weights * num_bytes
        return total

    def take_blocks(self, layer: LinearBase) -> list[cpu_kernels.BlockRows]:
        blocks = [layer.blocks[i] for i in range(len(layer.sizes))]
        layer.blocks.clear()
        return blocks

    def finish(self, layer: LinearBase) -> None:
        layer.packed = pack_blocks(layer, self.take_blocks(layer))

    def apply(self, layer: LinearBase, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return apply_packed(layer, x, residual)
