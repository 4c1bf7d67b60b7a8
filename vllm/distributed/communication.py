"""Collectives that layers use; with one rank they do nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist

from vllm.distributed.parallel_state import TensorParallelGroup


def all_reduce(x: torch.Tensor, group: TensorParallelGroup) -> torch.Tensor:
    """Sum of `x` over the ranks, in place."""
    if group.world_size > 1:
        dist.all_reduce(x, group=group.process_group)
    return x


def all_gather_last_dim(x: torch.Tensor, group: TensorParallelGroup) -> torch.Tensor:
    """Concatenation of the ranks' `x` along the last dimension."""
    if group.world_size == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(group.world_size)]
    dist.all_gather(parts, x.contiguous(), group=group.process_group)
    return torch.cat(parts, dim=-1)
