"""The attention layer of a network: writes K and V, then asks the backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm.attention.backends.base import AttentionBackend


@dataclass(frozen=True)
class ForwardContext:
    """What the attention layers of one forward pass share.

    Attributes:
        backend: Computes attention.
        prepared: The backend's own view of the batch.
        positions: Position of each token; int64 [T].
        slot_mapping: Slot of each token; int64 [T].
        k_caches, v_caches: Per layer [num_slots, num_kv_heads, head_dim].
        wanted: The tokens whose hidden states are wanted; int64 [R]. None: of all. The others only leave K and V, and
            the last layer does no more for them: 3 % of a prefill of 32 layers.
    """

    backend: AttentionBackend
    prepared: Any
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    k_caches: list[torch.Tensor]
    v_caches: list[torch.Tensor]
    wanted: torch.Tensor | None = None


class Attention(nn.Module):
    """Grouped-query attention of one layer over the KV cache.

    Args:
        layer_index: Which K/V tensors are its own.
        num_heads, num_kv_heads, head_dim: This rank's share.
    """

    def __init__(self, layer_index: int, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5

    def forward(self, qkv: torch.Tensor, cos_sin: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """[T, (num_heads + 2 num_kv_heads) * head_dim] → [T, num_heads * head_dim]; `cos_sin` is the rotary table."""
        k_cache, v_cache = context.k_caches[self.layer_index], context.v_caches[self.layer_index]
        q = self.write(qkv, cos_sin, context)
        return context.backend.forward(q, k_cache, v_cache, self.scale, context.prepared).flatten(1)

    def write(self, qkv: torch.Tensor, cos_sin: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Only writes K and V; returns the queries, turned by their positions, [T, num_heads, head_dim]."""
        k_cache, v_cache = context.k_caches[self.layer_index], context.v_caches[self.layer_index]
        return context.backend.rope_and_write(
            qkv, context.positions, cos_sin, context.slot_mapping, k_cache, v_cache, self.num_heads
        )
