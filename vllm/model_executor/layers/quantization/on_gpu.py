"""Quantised weights that stay so on a GPU, where there are kernels for them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from vllm.model_executor.layers.quantization.base import LinearMethod, Scheme
from vllm.model_executor.layers.quantization.dequantised import Dequantised
from vllm.model_executor.layers.quantization.fp4 import Fp4
from vllm.model_executor.layers.quantization.fp8 import Fp8
from vllm.model_executor.layers.quantization.int4 import Int4
from vllm.model_executor.layers.quantization.int8 import Int8
from vllm.ops import packed4, packed8
from vllm.ops.activation import Activation
from vllm.ops.packed4 import Packed4
from vllm.ops.packed8 import Packed8, Rows8
from vllm.ops.quantization import unpack_nibbles

if TYPE_CHECKING:
    from vllm.model_executor.layers.layernorm import RowNorm
    from vllm.model_executor.layers.linear import LinearBase


class Packed(LinearMethod):
    """Weights in a form of the kernels; layers that these do not take are dequantised.

    Args:
        scheme: Of the checkpoint.
        whole: Holds what is dequantised.
    """

    def __init__(self, scheme: Scheme, whole: LinearMethod) -> None:
        self.scheme = scheme
        self.stored = scheme.stored
        self._dequantised = Dequantised(scheme, whole)

    def fits(self, layer: LinearBase) -> bool:
        """The kernels take the layer's sizes."""
        return True

    def finish(self, layer: LinearBase) -> None:
        if not self.fits(layer):
            self._dequantised.finish(layer)
            return
        self.pack(layer, layer.take_loaded())

    @abstractmethod
    def pack(self, layer: LinearBase, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keeps the matrix of some tensors."""


class FourBits(Packed):
    """int4, MXFP4 and NVFP4: weights only."""

    def fits(self, layer: LinearBase) -> bool:
        return packed4.fits(layer.in_features)

    def pack(self, layer: LinearBase, tensors: Mapping[str, torch.Tensor]) -> None:
        matrix, order = four_bits(self.scheme, tensors, layer.sizes, layer.in_features, layer.dtype)
        layer.matrix = matrix
        layer.order = order

    def apply(self, layer: LinearBase, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        from vllm.ops.triton.packed4 import packed4_linear

        if layer.order is not None:
            x = x.index_select(1, layer.order)
        assert isinstance(layer.matrix, Packed4)
        return packed4_linear(x, layer.matrix, layer.bias, residual)


def four_bits(
    scheme: Scheme,
    tensors: Mapping[str, torch.Tensor],
    parts: tuple[int, ...],
    in_features: int,
    dtype: torch.dtype,
) -> tuple[Packed4, torch.Tensor | None]:
    """A matrix for the kernels of 4-bit weights, and the order in which it wants the input features (None: theirs).

    Args:
        dtype: Of the network.
    """
    if isinstance(scheme, Int4):
        codes, scales, zeros, order = scheme.codes(tensors, in_features)
        return packed4.pack(codes, scales, scheme.group or in_features, zeros, dtype=dtype), order
    if not isinstance(scheme, Fp4):
        raise TypeError(f"{type(scheme).__name__} has no 4-bit codes")
    codes = unpack_nibbles(tensors[scheme.weight_name])
    scales, factors = scheme.scales_and_factors(tensors, parts)
    return packed4.pack(codes, scales, scheme.group, None, factors, "e2m1", dtype), None


class EightBits(Packed):
    """fp8 and int8; from two rows on the inputs are quantised too, each row (or block of it) for itself."""

    def fits(self, layer: LinearBase) -> bool:
        return packed8.fits(layer.sizes, layer.in_features)

    def pack(self, layer: LinearBase, tensors: Mapping[str, torch.Tensor]) -> None:
        assert isinstance(self.scheme, Fp8 | Int8)
        scales = self.scheme.row_scales(tensors, layer.sizes, layer.in_features)
        layer.matrix = Packed8(tensors["weight"], scales.float().contiguous())

    def normalised(self, layer: LinearBase, x: torch.Tensor, norm: RowNorm) -> torch.Tensor | Rows8:
        if len(x) == 1 or layer.matrix is None:
            return super().normalised(layer, x, norm)
        from vllm.ops.triton.rows8 import norm_rows

        weight = layer.matrix
        return norm_rows(x, norm.weight, norm.bias, norm.norm, weight.data.dtype, weight.by_block)

    def activated(
        self, layer: LinearBase, x: torch.Tensor, activation: Activation, gated: bool
    ) -> torch.Tensor | Rows8:
        if len(x) == 1 or layer.matrix is None:
            return super().activated(layer, x, activation, gated)
        from vllm.ops.triton.rows8 import activate_rows

        return activate_rows(x, activation, gated, layer.matrix.data.dtype, layer.matrix.by_block)

    def apply(self, layer: LinearBase, x: torch.Tensor | Rows8, residual: torch.Tensor | None = None) -> torch.Tensor:
        from vllm.ops.triton.packed8 import packed8_linear

        assert isinstance(layer.matrix, Packed8)
        return packed8_linear(x, layer.matrix, layer.bias, residual, layer.dtype)
