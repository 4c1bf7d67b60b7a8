"""Rotary positions of queries and keys, and the write of K and V into the cache, in plain torch."""

from __future__ import annotations

import torch


def rope_and_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """Turns q and k by their positions, writes K and V into their slots, returns q.

    Args:
        qkv: [T, (num_heads + 2 KVH) * D].
        positions: int64 [T].
        cos_sin: float32 [max_positions, D]: D/2 cosines, then D/2 sines.
        slot_mapping: Slot of each token; int64 [T].
        k_cache, v_cache: [num_slots, KVH, D].

    Returns [T, num_heads, D].
    """
    num_kv_heads, head_dim = k_cache.shape[1:]
    num_turned = num_heads + num_kv_heads
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    first, second = heads[:, :num_turned].float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(qkv.dtype)
    k_cache[slot_mapping] = turned[:, num_heads:]
    v_cache[slot_mapping] = heads[:, num_turned:]
    return turned[:, :num_heads]
