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


def all_gather_last_dim(x: torch.Tensor, group: TensorParallelGroup) -> torch.Tensor:
    """Concatenation of the ranks' `x` along the last dimension."""
    if group.world_size == 1:
        return x
    parts = x.new_empty((group.world_size, *x.shape))
    _gather(parts.flatten(0, 1), x.contiguous(), group=group.process_group)
    return torch.cat(parts.unbind(), dim=-1)
