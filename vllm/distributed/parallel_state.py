"""Which part of the model a rank holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class TensorParallelGroup:
    """The ranks over which linear layers and the vocabulary are split.

    Attributes:
        rank: This rank, 0 … world_size-1.
        process_group: Their communicator; None with a single rank.
    """

    rank: int = 0
    world_size: int = 1
    process_group: ProcessGroup | None = None

    def divide(self, size: int, what: str) -> int:
        """This rank's share of `size`.

        Raises:
            ValueError: `size` cannot be split evenly.
        """
        if size % self.world_size:
            raise ValueError(f"{what} ({size}) cannot be split over {self.world_size} tensor-parallel ranks")
        return size // self.world_size
