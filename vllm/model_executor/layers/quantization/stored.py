"""The tensors by which a checkpoint holds a matrix [N, K], and how parts and ranks are cut out of them.

N are output features (rows), K input features (columns). An entry along a dimension stands for one feature or for
several: 8 where that many 4-bit numbers share an integer, 128 where that many weights share a scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

ALL = 0
"""Features of an entry that stands for all of them."""

_EXACT = (torch.int32, torch.int64, torch.int8, torch.uint8, torch.float8_e4m3fn)


@dataclass(frozen=True)
class Axis:
    """What a dimension runs over.

    Attributes:
        of: `out` features (N), or `in` (K).
        step: Features of an entry; `ALL`: there is one entry.
        whole: The last entry may not stand for fewer.
    """

    of: Literal["out", "in"]
    step: int = 1
    whole: bool = True

    def entries(self, features: int, name: str) -> int:
        """Entries for so many features.

        Raises:
            ValueError: they do not come out even, and must.
        """
        if self.step == ALL:
            return 1
        if self.whole and features % self.step:
            raise ValueError(f"{name} has an entry for {self.step} features, which do not divide {features}")
        return -(-features // self.step)


OUT, IN = Axis("out"), Axis("in")


@dataclass(frozen=True)
class Stored:
    """One tensor of a matrix.

    A tensor without an `out` axis is one for each part of a merged layer (q, k, v), and held so: [parts, …].

    Attributes:
        axes: Its dimensions, outermost first; (): a number.
        dtype: None: that of the network.
        optional: A checkpoint may lack it.
        read: False: it is in checkpoints, but not needed.
    """

    axes: tuple[Axis, ...]
    dtype: torch.dtype | None = None
    optional: bool = False
    read: bool = True

    @property
    def out_dim(self) -> int | None:
        return next((i for i, axis in enumerate(self.axes) if axis.of == "out"), None)

    @property
    def in_dim(self) -> int | None:
        return next((i for i, axis in enumerate(self.axes) if axis.of == "in"), None)

    def shape(self, parts: Sequence[int], in_features: int, name: str = "it") -> tuple[int, ...]:
        """As a layer of such parts (output features of each) holds it."""
        sizes = [
            sum(axis.entries(part, name) for part in parts) if axis.of == "out" else axis.entries(in_features, name)
            for axis in self.axes
        ]
        return tuple(sizes) if self.out_dim is not None else (len(parts), *sizes)

    def split(self, tensor: torch.Tensor, parts: Sequence[int], name: str) -> list[torch.Tensor]:
        """The parts of a tensor that a checkpoint has in one."""
        dim = self.out_dim
        if dim is None or len(parts) == 1 or self.axes[dim].step == ALL:
            return [tensor] * len(parts)
        # Blocks run over the whole tensor: a part that does not begin with one cannot be cut out.
        axis = Axis("out", self.axes[dim].step)
        entries = [axis.entries(part, name) for part in parts[:-1]]
        entries.append(self.axes[dim].entries(parts[-1], name))
        if tensor.dim() <= dim or tensor.shape[dim] != sum(entries):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {sum(entries)} {_lines(dim)}")
        return list(tensor.split(entries, dim))

    def share(self, tensor: torch.Tensor, of: str, features: int, rank: int, ranks: int, name: str) -> torch.Tensor:
        """A rank's part of a tensor.

        Args:
            of: Which features the ranks divide.
            features: Of one rank.

        Raises:
            ValueError: the shares are not the whole tensor, or cut an entry in two.
        """
        dim = self.out_dim if of == "out" else self.in_dim
        if dim is None or self.axes[dim].step == ALL:
            return tensor
        axis = self.axes[dim]
        if ranks > 1 and features % axis.step:
            raise ValueError(
                f"{name} has an entry for {axis.step} features, which do not divide the {features} of a rank; use "
                "fewer tensor-parallel ranks"
            )
        whole = axis.entries(features * ranks, name)
        if tensor.dim() <= dim or tensor.shape[dim] != whole:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {whole} {_lines(dim)}")
        size = axis.entries(features, name)
        return tensor.narrow(dim, rank * size, size)

    def place(self, held: torch.Tensor, parts: Sequence[int], index: int) -> torch.Tensor:
        """Where part `index` lies in the tensor that a layer holds."""
        dim = self.out_dim
        if dim is None:
            return held[index]
        if self.axes[dim].step == ALL:
            return held
        axis = self.axes[dim]
        sizes = [axis.entries(part, "it") for part in parts]
        return held.narrow(dim, sum(sizes[:index]), sizes[index])


def _lines(dim: int) -> str:
    return "rows" if dim == 0 else "columns"


WHOLE: Mapping[str, Stored] = {"weight": Stored((OUT, IN))}
"""A matrix that is not quantised."""


def copy_stored(target: torch.Tensor, source: torch.Tensor, name: str) -> None:
    """Copies a checkpoint tensor to its place. Numbers for a scale may come as [] or [1] or [1, 1].

    Raises:
        ValueError: shape or dtype differ.
    """
    if target.numel() == 1 and source.numel() == 1:
        source = source.reshape(target.shape)
    elif target.dim() == 2 and target.shape[1] == 1 and source.shape == target.shape[:1]:
        source = source.unsqueeze(1)
    if target.shape != source.shape:
        raise ValueError(f"{name} has shape {tuple(source.shape)}, expected {tuple(target.shape)}")
    if source.dtype == torch.float8_e8m0fnu:
        source = source.view(torch.uint8)
    if source.dtype != target.dtype and (source.dtype in _EXACT or target.dtype in _EXACT):
        found, wanted = (str(t.dtype).removeprefix("torch.") for t in (source, target))
        raise ValueError(f"{name} has dtype {found}, expected {wanted}")
    target.copy_(source)
