"""The contracts of forms in which linear layers hold their weights.

A `Scheme` knows a format: which tensors of a checkpoint make a matrix, and what matrix they make. It knows nothing of
layers, so that experts can use it for each matrix of a stack. A `LinearMethod` is how a layer holds its matrix and
multiplies by it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from vllm.model_executor.layers.quantization.stored import WHOLE, Stored, copy_stored
from vllm.ops.activation import Activation
from vllm.ops.dispatch import activate, row_norm
from vllm.ops.packed8 import Rows8

if TYPE_CHECKING:
    from vllm.model_executor.layers.layernorm import RowNorm
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.ops.cpu.kernels import BlockRows


class Scheme(ABC):
    """A format of matrices [N, K]; several over each other (q, k and v) are one matrix of several parts.

    Attributes:
        stored: The tensors of a matrix, by the end of their names: `weight`, `weight_scale`, `qweight`, …
    """

    stored: Mapping[str, Stored]

    @abstractmethod
    def dequantise(self, tensors: Mapping[str, torch.Tensor], parts: Sequence[int], in_features: int) -> torch.Tensor:
        """The matrix in float32, [N, K].

        Args:
            tensors: What was loaded, each of the shape `Stored.shape` says; optional ones may be missing.
            parts: Output features of each part; their sum is N.

        Raises:
            ValueError: values that are not understood.
        """

    def blocks(
        self, tensors: Mapping[str, torch.Tensor], parts: Sequence[int], in_features: int
    ) -> list[BlockRows] | None:
        """The matrix as parts in blocks that the compiled CPU kernels multiply by; None: it has no such form.

        Args, Raises: as of `dequantise`.
        """
        return None


class LinearMethod(ABC):
    """How linear layers hold and multiply; keeps nothing of a layer in itself.

    Attributes:
        stored: The tensors that a layer's matrix has in a checkpoint, by the end of their names.
    """

    stored: Mapping[str, Stored] = WHOLE

    def parameters(self, parts: Sequence[int], in_features: int) -> dict[str, nn.Parameter]:
        """What a layer holds while it is loaded, by the names of the checkpoint.

        Args:
            parts: Output features of each of its parts on this rank.

        Raises:
            ValueError: a group or a block does not divide the layer.
        """
        held = {}
        for name, stored in self.stored.items():
            if stored.read:
                shape = stored.shape(parts, in_features, name)
                held[name] = nn.Parameter(torch.empty(shape, dtype=stored.dtype), requires_grad=False)
        return held

    def load(self, layer: LinearBase, kind: str, index: int, tensor: torch.Tensor, name: str) -> None:
        """Takes this rank's share of a tensor of one part.

        Args:
            index: Of the part.
            name: For messages.

        Raises:
            ValueError: shape or dtype do not fit.
        """
        copy_stored(self.stored[kind].place(getattr(layer, kind), layer.sizes, index), tensor, name)

    def finished_bytes(self, layer: LinearBase) -> int:
        """Bytes of a layer's matrix after `finish`, of a layer that is not loaded yet."""
        return layer.loaded_bytes()

    @abstractmethod
    def finish(self, layer: LinearBase) -> None:
        """Brings what was loaded into the form in which the device multiplies by it; the loaded form may be freed.

        Raises:
            ValueError: values that are not understood.
        """

    def take(self, layer: LinearBase) -> torch.Tensor:
        """The matrix [N, K] in the dtype of the network, moved out of a layer that has been loaded and not finished."""
        raise NotImplementedError(f"{type(self).__name__} has no whole matrix")

    def take_blocks(self, layer: LinearBase) -> list[BlockRows] | None:
        """The matrix as parts in blocks that the compiled CPU kernels multiply by, moved out of a layer that has been
        loaded and not finished; None: it has no such form, and stays."""
        return None

    def normalised(self, layer: LinearBase, x: torch.Tensor, norm: RowNorm) -> torch.Tensor | Rows8:
        """A layer's input: x [T, in_features] normalised, in the form that `apply` likes best."""
        return row_norm(x, norm.weight, norm.bias, norm.norm)

    def activated(
        self, layer: LinearBase, x: torch.Tensor, activation: Activation, gated: bool
    ) -> torch.Tensor | Rows8:
        """A layer's input: the activation of x [T, in_features] or (with a gate) [T, 2 · in_features]."""
        return activate(x, activation, gated)

    @abstractmethod
    def apply(
        self,
        layer: LinearBase,
        x: torch.Tensor | Rows8,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`x Wᵀ + b + residual`.

        Args:
            x: [T, in_features]; quantised only where the method has done so itself.
            residual: [T, out_features], contiguous; may be overwritten.

        Returns [T, out_features] in the dtype of the network.
        """
