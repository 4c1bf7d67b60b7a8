"""The contract of a form in which linear layers hold their weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from vllm.model_executor.layers.linear import LinearBase


class LinearMethod(ABC):
    """One for a network; keeps nothing of a layer in itself."""

    @abstractmethod
    def parameters(self, in_features: int, out_features: int) -> dict[str, nn.Parameter]:
        """What a layer holds while it is loaded, by the names of the checkpoint: `weight`, and what belongs to it."""

    @abstractmethod
    def finish(self, layer: LinearBase) -> None:
        """Brings what was loaded into the form in which the device multiplies by it; the loaded form may be freed."""

    @abstractmethod
    def apply(
        self,
        layer: LinearBase,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`x Wᵀ + b + residual`.

        Args:
            x: [T, in_features].
            residual: [T, out_features], contiguous; may be overwritten.

        Returns [T, out_features] in the dtype of `x`.
        """
