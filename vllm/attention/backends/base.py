"""The contract of an attention backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from vllm.ops.attention.metadata import AttentionMetadata


class AttentionBackend(ABC):
    """Computes `softmax(scale · q Kᵀ) V` for a batch whose K and V lie in pinned extents and in own blocks.

    For every query token: all slots of the extents of its groups, and the own slots of its sequence up to and including
    itself. Softmax statistics are float32, log-sum-exps natural.
    """

    @property
    def kv_layout(self) -> str:
        """How K and V lie inside a block; snapshots are used only by backends of the same layout.

        `slots`: a slot after the other, each `[num_kv_heads, head_dim]`.
        """
        return "slots"

    @abstractmethod
    def prepare(self, metadata: AttentionMetadata) -> Any:
        """Derives, once a step, what `forward` needs for every layer."""

    @abstractmethod
    def rope_and_write(
        self,
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
            qkv: [T, (num_heads + 2 num_kv_heads) * head_dim].
            positions: int64 [T].
            cos_sin: float32 [max_positions, head_dim]: cosines of the half-rotated pairs, then their sines.
            slot_mapping: int64 [T].
            k_cache, v_cache: [num_slots, num_kv_heads, head_dim].

        Returns [T, num_heads, head_dim].
        """

    @abstractmethod
    def forward(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        prepared: Any,
    ) -> torch.Tensor:
        """Attention of one layer; K and V of the query tokens are in the cache already.

        Args:
            q: [T, num_heads, head_dim].
            k_cache, v_cache: [num_slots, num_kv_heads, head_dim].
            scale: Factor of the scores.
            prepared: What `prepare` returned.

        Returns [T, num_heads, head_dim] in the dtype of `q`.
        """
