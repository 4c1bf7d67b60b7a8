"""Linear layers split over tensor-parallel ranks.

How a layer holds its weights and multiplies by them is its `LinearMethod`'s business. `load` takes a whole tensor of
the checkpoint and keeps this rank's part of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from vllm.distributed.communication import all_reduce
from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.model_executor.layers.quantization.base import LinearMethod
from vllm.ops.cpu.kernels import PackedMatrix


class LinearBase(nn.Module):
    """`x Wᵀ + b`; this rank's share of the weights.

    Args:
        in_features, out_features: Of this rank.
        has_bias: There is a bias; features that have none of their own have 0.
        method: Holds and multiplies.

    Attributes:
        packed: The weights for the compiled CPU kernels, where they have been packed.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, has_bias: bool, tp: TensorParallelGroup, method: LinearMethod
    ) -> None:
        super().__init__()
        self.tp = tp
        self.method = method
        self.in_features, self.out_features = in_features, out_features
        for name, parameter in method.parameters(in_features, out_features).items():
            self.register_parameter(name, parameter)
        bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if has_bias else None
        self.register_parameter("bias", bias)
        self.packed: PackedMatrix | None = None

    def finish(self) -> None:
        """Brings the loaded weights into the form in which the device multiplies by them."""
        self.method.finish(self)


class MergedColumnParallelLinear(LinearBase):
    """Several linear layers over one input, computed as one and split by output rows (heads, channels).

    Args:
        parts: Output features of each, over all ranks, by name.
        biased: Those with a bias.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        biased: frozenset[str],
        tp: TensorParallelGroup,
        method: LinearMethod,
    ) -> None:
        self.whole_sizes = dict(parts)
        self.part_sizes = {name: tp.divide(size, name) for name, size in parts.items()}
        has_bias = not biased.isdisjoint(parts)
        super().__init__(in_features, sum(self.part_sizes.values()), has_bias, tp, method)

    def load(self, parts: tuple[str, ...], kind: str, tensor: torch.Tensor) -> None:
        """Loads the `weight` or `bias` (`kind`) of one part, or of several that the checkpoint has in one tensor."""
        if len(parts) > 1:
            whole = sum(self.whole_sizes[part] for part in parts)
            if tensor.shape[0] != whole:
                raise ValueError(f"{kind} has shape {tuple(tensor.shape)}, expected {whole} rows")
            pieces = tensor.split([self.whole_sizes[part] for part in parts])
        else:
            pieces = (tensor,)
        for part, piece in zip(parts, pieces, strict=True):
            self._load_part(part, kind, piece)

    def _load_part(self, part: str, kind: str, tensor: torch.Tensor) -> None:
        size = self.part_sizes[part]
        offset = 0
        for name, other in self.part_sizes.items():
            if name == part:
                break
            offset += other
        source = shard(tensor, 0, size, self.tp, f"{part}.{kind}")
        copy_checked(getattr(self, kind)[offset : offset + size], source, f"{part}.{kind}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in_features] → [T, features of all parts]."""
        return self.method.apply(self, x)


class RowParallelLinear(LinearBase):
    """A linear layer split by input columns; the ranks' results are summed, and the residual stream with them."""

    def __init__(
        self, in_features: int, out_features: int, has_bias: bool, tp: TensorParallelGroup, method: LinearMethod
    ) -> None:
        super().__init__(tp.divide(in_features, "input features"), out_features, has_bias, tp, method)

    def load(self, parts: tuple[str, ...], kind: str, tensor: torch.Tensor) -> None:
        """Loads the `weight` or `bias` (`kind`); it has no parts."""
        if kind == "weight":
            tensor = shard(tensor, 1, self.in_features, self.tp, kind)
        elif self.tp.rank:
            # The ranks' results are summed: only one of them adds the bias.
            tensor = torch.zeros_like(tensor)
        copy_checked(getattr(self, kind), tensor, kind)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The residual stream [T, out_features] after this layer, or the layer's result alone; the stream before it may
        be overwritten."""
        # Only one rank adds the residual, or the sum would hold it world_size times.
        out = self.method.apply(self, x, residual if self.tp.rank == 0 else None)
        return all_reduce(out, self.tp)


def shard(tensor: torch.Tensor, dim: int, size: int, tp: TensorParallelGroup, name: str) -> torch.Tensor:
    """This rank's `size` rows (`dim` 0) or columns (1) of a checkpoint tensor.

    Raises:
        ValueError: the ranks' shares are not the whole tensor.
    """
    whole = size * tp.world_size
    if tensor.dim() <= dim or tensor.shape[dim] != whole:
        what = "rows" if dim == 0 else "columns"
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {whole} {what}")
    return tensor.narrow(dim, tp.rank * size, size)


def copy_checked(target: torch.Tensor, source: torch.Tensor, name: str) -> None:
    """Copies a checkpoint tensor into a parameter.

    Raises:
        ValueError: the shapes differ.
    """
    if target.shape != source.shape:
        raise ValueError(f"{name} has shape {tuple(source.shape)}, expected {tuple(target.shape)}")
    target.copy_(source)
