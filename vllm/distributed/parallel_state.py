"""Which part of the model a rank holds, and how it finds the others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from vllm import envs
from vllm.exceptions import StartupError
from vllm.logger import init_logger

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from vllm.distributed.symmetric_memory import SymmetricSums

logger = init_logger(__name__)


@dataclass(frozen=True)
class TensorParallelGroup:
    """The ranks over which linear layers and the vocabulary are split.

    Attributes:
        rank: This rank, 0 … world_size-1.
        process_group: Their communicator; None with a single rank.
        sums: Sums of small tensors, where the ranks' GPUs can read each other's memory.
    """

    rank: int = 0
    world_size: int = 1
    process_group: ProcessGroup | None = None
    sums: SymmetricSums | None = None

    def divide(self, size: int, what: str) -> int:
        """This rank's share of `size`.

        Raises:
            ValueError: `size` cannot be split evenly.
        """
        if size % self.world_size:
            raise ValueError(f"{what} ({size}) cannot be split over {self.world_size} tensor-parallel ranks")
        return size // self.world_size

    def share_kv_heads(self, num_kv_heads: int) -> tuple[int, int]:
        """KV heads of this rank, and how many ranks have the same ones: with more ranks than KV heads, each has one.

        Raises:
            ValueError: neither number divides the other.
        """
        if num_kv_heads < self.world_size and self.world_size % num_kv_heads == 0:
            return 1, self.world_size // num_kv_heads
        return self.divide(num_kv_heads, "KV heads"), 1


def join_ranks(device: str, rank: int, world_size: int, folder: Path) -> TensorParallelGroup:
    """Waits for the other ranks of this host.

    Args:
        device: `cpu` or `cuda`; each rank has the GPU of its number.
        folder: Where they find each other, by a file: nothing listens on a port for that.

    Raises:
        StartupError: there are fewer GPUs than ranks, or one does not come.
    """
    import torch
    from torch import distributed

    # All ranks are on this host; what they say to each other is nobody else's business.
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, "lo")
    own = None
    if device == "cuda":
        found = torch.cuda.device_count()
        if found < world_size:
            raise StartupError(f"--tensor-parallel-size {world_size} needs as many GPUs; there are {found}.")
        own = torch.device("cuda", rank)
        torch.cuda.set_device(own)
    try:
        distributed.init_process_group(
            "nccl" if own is not None else "gloo",
            store=distributed.FileStore(str(folder / "ranks"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=envs.execute_model_timeout_s()),
            device_id=own,
        )
    except (RuntimeError, ValueError) as error:
        raise StartupError(f"Rank {rank} of {world_size} does not find the others: {error}.") from None
    group = distributed.group.WORLD
    sums = None
    if own is not None and group is not None:
        from vllm.distributed.symmetric_memory import SymmetricSums

        try:
            sums = SymmetricSums(group, own)
        except RuntimeError as error:
            logger.warning("The GPUs cannot read each other's memory; NCCL adds small tensors too: %s", error)
    return TensorParallelGroup(rank, world_size, group, sums)


def leave_ranks() -> None:
    """Ends the communicator of `join_ranks`, if there is one."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()
