"""Collectives that layers use; with one rank they do nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist

from vllm.distributed.parallel_state import TensorParallelGroup

# What torch 2.13 calls otherwise than 2.11.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_reduce(x: torch.Tensor, group: TensorParallelGroup) -> torch.Tensor:
    """Sum of `x` over the ranks, the same bits on each; `x` may be overwritten."""
    if group.world_size == 1:
        return x
    if group.sums is not None and group.sums.takes(x):
        return group.sums.all_reduce(x)
    dist.all_reduce(x, group=group.process_group)
    return x


def all_gather_last_dim(
    x: torch.Tensor, group: TensorParallelGroup, size: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The first `size` columns of all ranks' `x` beside each other.

    Args:
        x: [T, n] on each rank.
        out: [T, size], which the result is written into.
    """
    if group.world_size == 1:
        return x[:, :size] if out is None else out.copy_(x[:, :size])
    parts = x.new_empty((group.world_size, *x.shape))
    _gather(parts.flatten(0, 1), x.contiguous(), group=group.process_group)
    if out is None:
        out = x.new_empty((len(x), size))
    for rank, part in enumerate(parts):
        columns = out[:, rank * x.shape[1] : (rank + 1) * x.shape[1]]
        columns.copy_(part[:, : columns.shape[1]])
    return out
