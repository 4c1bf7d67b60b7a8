"""Norms and rotary positions of queries and keys, and the write of K and V into the cache, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm.ops.norm import Norm, normalise


class Rope(NamedTuple):
    """How heads are turned (Su et al., 2021).

    Attributes:
        cos_sin: float32 [max_positions, R]: R/2 cosines, then R/2 sines. The first R dimensions of a head are turned,
            R ≤ D, the others stay.
        interleaved: Dimension 2i turns with 2i + 1; otherwise i with i + R/2.
    """

    cos_sin: torch.Tensor
    interleaved: bool = False


class QkNorm(NamedTuple):
    """How queries and keys are normalised before they are turned.

    Attributes:
        norm: Kind and numbers of the norm.
        q, k: Weights: [D] of each head, or [num_heads * D] and [KVH * D] of all heads as one row.
    """

    norm: Norm
    q: torch.Tensor
    k: torch.Tensor


def rope_and_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rope: Rope | None,
    qk_norm: QkNorm | None,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """Normalises q and k, turns them by their positions, writes K and V into their slots, returns q.

    Args:
        qkv: [T, num_heads * D + KVH * D + KVH * DV].
        positions: int64 [T].
        slot_mapping: Slot of each token; int64 [T].
        k_cache, v_cache: [num_slots, KVH, D] and [num_slots, KVH, DV].

    Returns [T, num_heads, D].
    """
    num_kv_heads, head_dim = k_cache.shape[1:]
    q_and_k = (num_heads + num_kv_heads) * head_dim
    heads = normalise_and_turn(qkv[:, :q_and_k], positions, rope, qk_norm, num_heads, head_dim)
    k_cache[slot_mapping] = heads[:, num_heads:]
    v_cache[slot_mapping] = qkv[:, q_and_k:].unflatten(1, v_cache.shape[1:])
    return heads[:, :num_heads]


def normalise_and_turn(
    q_and_k: torch.Tensor,
    positions: torch.Tensor,
    rope: Rope | None,
    qk_norm: QkNorm | None,
    num_heads: int,
    head_dim: int,
) -> torch.Tensor:
    """[T, (num_heads + KVH) * D], queries first → [T, num_heads + KVH, D], normalised and turned by `positions`."""
    if qk_norm is not None:
        q, k = q_and_k[:, : num_heads * head_dim], q_and_k[:, num_heads * head_dim :]
        q_and_k = torch.cat((_normalised(q, qk_norm.q, qk_norm.norm), _normalised(k, qk_norm.k, qk_norm.norm)), dim=1)
    heads = q_and_k.unflatten(1, (-1, head_dim))
    return heads if rope is None else turn(heads, rope.cos_sin[positions].unsqueeze(1), rope.interleaved)


def turn(heads: torch.Tensor, table: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """heads [T, H, D] turned by `table` [T, 1, R] of cosines and sines, in float32; in the dtype of `heads`."""
    turned_dim = table.shape[-1]
    cos, sin = table.chunk(2, dim=-1)
    turned = heads[..., :turned_dim].float()
    if interleaved:
        first, second = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(heads.dtype), heads[..., turned_dim:]), dim=-1)


def _normalised(x: torch.Tensor, weight: torch.Tensor, norm: Norm) -> torch.Tensor:
    """Rows of x [T, N], or each head of them where the weight is that of a head."""
    return normalise(x.unflatten(1, (-1, len(weight))), weight, None, norm).flatten(1)
