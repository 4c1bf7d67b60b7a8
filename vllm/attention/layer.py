"""The attention layer of a network: writes K and V, then asks the backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm.attention.backends.base import AttentionBackend
from vllm.attention.spec import AttentionSpec
from vllm.kv_cache.spec import PagedKV, Row
from vllm.ops.rope import QkNorm, Rope


@dataclass(frozen=True)
class ForwardContext:
    """What the attention layers of one forward pass share.

    Attributes:
        backend: Computes attention.
        prepared: The backend's own view of the batch, for each of the network's different specs.
        positions: Position of each token; int64 [T].
        slot_mapping: Slot of each token; int64 [T].
        window_slots: The same in the window group; None where there is none.
        k_caches, v_caches: Per layer [num_slots, num_kv_heads, head_dim].
        wanted: The tokens whose hidden states are wanted; int64 [R]. None: of all. The others only leave K and V, and
            the last layer does no more for them: 3 % of a prefill of 32 layers.
    """

    backend: AttentionBackend
    prepared: list[Any]
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    k_caches: list[torch.Tensor]
    v_caches: list[torch.Tensor]
    wanted: torch.Tensor | None = None
    window_slots: torch.Tensor | None = None

    def slots(self, spec: AttentionSpec) -> torch.Tensor:
        """Slot of each token in a layer that asks for `spec`."""
        return self.slot_mapping if spec.window is None or self.window_slots is None else self.window_slots


class Attention(nn.Module):
    """Grouped-query attention of one layer over the KV cache.

    Args:
        layer_index: Which K/V tensors are its own.
        spec: What it asks of the backend.
        plan: Place of this spec among the network's different ones.
    """

    def __init__(self, layer_index: int, spec: AttentionSpec, plan: int = 0) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.spec = spec
        self.plan = plan
        self.sinks = nn.Parameter(torch.zeros(spec.num_heads), requires_grad=False) if spec.sinks else None

    @property
    def cache(self) -> PagedKV:
        """What the layer keeps."""
        spec = self.spec
        return PagedKV(
            Row(spec.num_kv_heads, spec.head_dim, spec.dtype),
            Row(spec.num_kv_heads, spec.v_dim, spec.dtype),
            spec.window,
        )

    def forward(
        self,
        qkv: torch.Tensor,
        rope: Rope | None,
        qk_norm: QkNorm | None,
        context: ForwardContext,
        q_factors: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[T, num_heads * D + KVH * D + KVH * DV] → [T, num_heads * DV]. `q_factors`: of the queries of each position,
        float32 [max_positions]."""
        k_cache, v_cache = context.k_caches[self.layer_index], context.v_caches[self.layer_index]
        q = self.write(qkv, rope, qk_norm, context)
        if q_factors is not None:
            q = q * q_factors[context.positions].to(q.dtype)[:, None, None]
        prepared = context.prepared[self.plan]
        return context.backend.attend(q, k_cache, v_cache, self.spec, prepared, self.sinks).flatten(1)

    def write(
        self, qkv: torch.Tensor, rope: Rope | None, qk_norm: QkNorm | None, context: ForwardContext
    ) -> torch.Tensor:
        """Only writes K and V; returns the queries, normalised and turned, [T, num_heads, D]."""
        k_cache, v_cache = context.k_caches[self.layer_index], context.v_caches[self.layer_index]
        return context.backend.rope_and_write(
            qkv, context.positions, rope, qk_norm, context.slots(self.spec), k_cache, v_cache, self.spec.num_heads
        )
