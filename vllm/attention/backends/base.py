"""The contract of an attention backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from vllm.attention.spec import AttentionSpec
from vllm.ops.attention.metadata import AttentionMetadata
from vllm.ops.rope import QkNorm, Rope, rope_and_write


class AttentionBackend(ABC):
    """Computes `softmax(scale · q Kᵀ) V` for a batch whose K and V lie in pinned extents and in own blocks.

    For every query token: all slots of the extents of its groups, and the own slots of its sequence up to and including
    itself, as far as the layer's window reaches. Softmax statistics are float32, log-sum-exps natural.

    Layers with a window may keep it in blocks of their own (see `kv_cache.windows`): plans are then made for the layers
    of each group with that group's slots, block tables and extents. What a token reads before its own tokens ends where
    the last of its groups ends, but need not begin with the sequence. Entries of block tables that lie behind the
    window of all query tokens are not read.
    """

    @property
    def kv_layout(self) -> str:
        """How K and V lie inside a block; snapshots are used only by backends of the same layout.

        `slots`: a slot after the other, each `[num_kv_heads, head_dim]`.
        """
        return "slots"

    @abstractmethod
    def misfit(self, spec: AttentionSpec) -> str | None:
        """Why this backend cannot serve a layer that asks for `spec`, or None."""

    @abstractmethod
    def prepare(self, metadata: AttentionMetadata, specs: Sequence[AttentionSpec]) -> list[Any]:
        """Derives, once a step, what `attend` needs: a plan for each of the network's different specs, in order."""

    def rope_and_write(
        self,
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
            qkv: [T, num_heads * D + KVH * D + KVH * DV]; may be overwritten.
            positions: int64 [T].
            rope: How queries and keys are turned; None: not at all.
            qk_norm: How they are normalised before; None: not at all.
            slot_mapping: int64 [T].
            k_cache, v_cache: [num_slots, KVH, D] and [num_slots, KVH, DV].

        Returns [T, num_heads, D].
        """
        return rope_and_write(qkv, positions, rope, qk_norm, slot_mapping, k_cache, v_cache, num_heads)

    @abstractmethod
    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        spec: AttentionSpec,
        prepared: Any,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one layer; K and V of the query tokens are in the cache already.

        Args:
            q: [T, num_heads, head_dim].
            k_cache, v_cache: [num_slots, num_kv_heads, head_dim or v_dim].
            spec: What the layer asks for; `misfit` has nothing against it.
            prepared: What `prepare` returned for this spec.
            sinks: [num_heads], where the spec asks for them.

        Returns [T, num_heads, v_dim] in the dtype of `q`.
        """
