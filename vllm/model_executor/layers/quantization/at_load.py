"""Whole weights that become 8-bit floats as they are loaded, with a factor an output feature."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm.model_executor.layers.quantization.base import LinearMethod
from vllm.model_executor.layers.quantization.fp8 import Fp8
from vllm.model_executor.layers.quantization.on_gpu import EightBits
from vllm.ops.quantization import quantise_rows_fp8
from vllm.transformers_utils.quantization_config import Fp8Format

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearBase


class Fp8AtLoad(EightBits):
    """Each tensor is quantised when it comes, so that the whole weights are never in the device's memory together."""

    def __init__(self, whole: LinearMethod) -> None:
        super().__init__(Fp8(Fp8Format("channel")), whole)

    def load(self, layer: LinearBase, kind: str, index: int, tensor: torch.Tensor, name: str) -> None:
        held, scales = (stored.place(getattr(layer, kind), layer.sizes, index) for kind, stored in self.stored.items())
        if tensor.shape != held.shape or not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} ({tensor.dtype}), expected {tuple(held.shape)}")
        codes, factors = quantise_rows_fp8(tensor.to(held.device))
        held.copy_(codes)
        scales.copy_(factors)
