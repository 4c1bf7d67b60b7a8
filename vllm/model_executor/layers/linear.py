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
from vllm.model_executor.layers.quantization.stored import OUT, Stored
from vllm.ops.cpu.kernels import BlockRows, Matrix
from vllm.ops.packed4 import Packed4
from vllm.ops.packed8 import Packed8, Rows8


class LinearBase(nn.Module):
    """`x Wᵀ + b`; this rank's share of the weights.

    Args:
        sizes: Output features of each part, of this rank, by name; the parts lie over each other.
        in_features: Of this rank.
        has_bias: There is a bias; features that have none of their own have 0.
        method: Holds and multiplies.

    Attributes:
        sizes: Output features of each part.
        packed: The weights for the compiled CPU kernels, where they have been packed.
        blocks: Parts in blocks, by their index, from load to `finish`.
        matrix: The weights for the kernels of quantised ones, where they stay so.
        order: The order in which `matrix` wants the input features; None: theirs.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, sizes: Mapping[str, int], in_features: int, has_bias: bool, tp: TensorParallelGroup, method: LinearMethod
    ) -> None:
        super().__init__()
        self.tp = tp
        self.method = method
        self.parts, self.sizes = tuple(sizes), tuple(sizes.values())
        self.in_features, self.out_features = in_features, sum(self.sizes)
        self.dtype = torch.get_default_dtype()
        for name, parameter in method.parameters(self.sizes, in_features).items():
            self.register_parameter(name, parameter)
        bias = nn.Parameter(torch.zeros(self.out_features), requires_grad=False) if has_bias else None
        self.register_parameter("bias", bias)
        self.packed: Matrix | None = None
        self.blocks: dict[int, BlockRows] = {}
        self.matrix: Packed4 | Packed8 | None = None
        self.order: torch.Tensor | None = None
        self._loaded: set[str] = set()

    def _load(self, kind: str, index: int, tensor: torch.Tensor, name: str) -> None:
        """Takes this rank's share of a tensor of one part."""
        self.method.load(self, kind, index, tensor, name)
        self._loaded.add(kind)

    def loaded_bytes(self) -> int:
        """Bytes of the matrix's tensors as they are loaded."""
        return sum(getattr(self, name).nbytes for name, stored in self.method.stored.items() if stored.read)

    def loaded(self) -> dict[str, torch.Tensor]:
        """The matrix's tensors, by the names of the checkpoint; optional ones that it lacked are left out."""
        return {
            name: getattr(self, name).data
            for name, stored in self.method.stored.items()
            if stored.read and (name in self._loaded or not stored.optional)
        }

    def take_loaded(self) -> dict[str, torch.Tensor]:
        """`loaded`, moved out of the layer."""
        tensors = self.loaded()
        for name, stored in self.method.stored.items():
            if stored.read:
                delattr(self, name)
        return tensors

    def finish(self) -> None:
        """Brings the loaded weights into the form in which the device multiplies by them."""
        self.method.finish(self)


class MergedColumnParallelLinear(LinearBase):
    """Several linear layers over one input, computed as one and split by output rows (heads, channels).

    Args:
        parts: Output features of each, over all ranks, by name.
        biased: Those with a bias.
        copies: How many neighbouring ranks hold the same rows of a part, by name; 1 where it is not given.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        biased: frozenset[str],
        tp: TensorParallelGroup,
        method: LinearMethod,
        copies: Mapping[str, int] | None = None,
    ) -> None:
        self.whole_sizes = dict(parts)
        self._copies = {name: (copies or {}).get(name, 1) for name in parts}
        self.part_sizes = {name: tp.divide(size * self._copies[name], name) for name, size in parts.items()}
        super().__init__(self.part_sizes, in_features, not biased.isdisjoint(parts), tp, method)

    def load(self, parts: tuple[str, ...], kind: str, tensor: torch.Tensor) -> None:
        """Loads a tensor (`kind`: `weight`, `bias`, …) of one part, or of several that the checkpoint has in one."""
        stored = _BIAS if kind == "bias" else self.method.stored[kind]
        if not stored.read:
            return
        pieces = stored.split(tensor, [self.whole_sizes[part] for part in parts], kind)
        for part, piece in zip(parts, pieces, strict=True):
            name, index = f"{part}.{kind}", self.parts.index(part)
            rank, ranks = self.tp.rank // self._copies[part], self.tp.world_size // self._copies[part]
            source = stored.share(piece, "out", self.part_sizes[part], rank, ranks, name)
            if kind == "bias":
                copy_checked(stored.place(self.bias, self.sizes, index), source, name)  # type: ignore[arg-type]
            else:
                self._load(kind, index, source, name)

    def forward(self, x: torch.Tensor | Rows8) -> torch.Tensor:
        """[T, in_features] → [T, features of all parts]."""
        return self.method.apply(self, x)


class RowParallelLinear(LinearBase):
    """A linear layer split by input columns; the ranks' results are summed, and the residual stream with them."""

    def __init__(
        self, in_features: int, out_features: int, has_bias: bool, tp: TensorParallelGroup, method: LinearMethod
    ) -> None:
        super().__init__({"": out_features}, tp.divide(in_features, "input features"), has_bias, tp, method)

    def load(self, parts: tuple[str, ...], kind: str, tensor: torch.Tensor) -> None:
        """Loads a tensor (`kind`: `weight`, `bias`, …); the layer has no parts."""
        if kind == "bias":
            # The ranks' results are summed: only one of them adds the bias.
            copy_checked(self.bias, torch.zeros_like(tensor) if self.tp.rank else tensor, kind)  # type: ignore[arg-type]
            return
        stored = self.method.stored[kind]
        if stored.read:
            source = stored.share(tensor, "in", self.in_features, self.tp.rank, self.tp.world_size, kind)
            self._load(kind, 0, source, kind)

    def forward(self, x: torch.Tensor | Rows8, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The residual stream [T, out_features] after this layer, or the layer's result alone; the stream before it may
        be overwritten."""
        # Only one rank adds the residual, or the sum would hold it world_size times.
        out = self.method.apply(self, x, residual if self.tp.rank == 0 else None)
        return all_reduce(out, self.tp)


_BIAS = Stored((OUT,))


def shard(tensor: torch.Tensor, dim: int, size: int, tp: TensorParallelGroup, name: str) -> torch.Tensor:
    """This rank's `size` entries along dimension `dim` of a whole tensor.

    Raises:
        ValueError: the ranks' shares are not the whole tensor.
    """
    whole = size * tp.world_size
    if tensor.dim() <= dim or tensor.shape[dim] != whole:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {whole} in dimension {dim}")
    return tensor.narrow(dim, tp.rank * size, size)


def copy_checked(target: torch.Tensor, source: torch.Tensor, name: str) -> None:
    """Copies a checkpoint tensor into a parameter.

    Raises:
        ValueError: the shapes differ.
    """
    if target.shape != source.shape:
        raise ValueError(f"{name} has shape {tuple(source.shape)}, expected {tuple(target.shape)}")
    target.copy_(source)
