"""Attention in plain torch: correct everywhere, and the reference that other backends are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm.attention.backends.base import AttentionBackend
from vllm.ops.attention.metadata import AttentionMetadata, PrefixGroup
from vllm.ops.attention.partial import attention_with_lse, merge
from vllm.ops.rope import rope_and_write


@dataclass(frozen=True)
class SuffixBucket:
    """Sequences with equally many query tokens and similar context, computed as one padded batch.

    Attributes:
        tokens: Query tokens; int64 [b * m].
        slots: K/V slots of the own tokens, padded with slot 0; int64 [b, n].
        positions: Own position of each query token; int64 [b, m].
        num_queries: m.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    num_queries: int


@dataclass(frozen=True)
class PreparedBatch:
    buckets: list[SuffixBucket]
    groups: list[PrefixGroup]


class TorchAttentionBackend(AttentionBackend):
    """Prefix and suffix attention by library calls, merged by log-sum-exp.

    The query heads that share a KV head are rows of one matrix, so grouped-query attention needs no copy of K or V.
    """

    def prepare(self, metadata: AttentionMetadata) -> PreparedBatch:
        return PreparedBatch(self._buckets(metadata), metadata.groups)

    def _buckets(self, metadata: AttentionMetadata) -> list[SuffixBucket]:
        members: dict[tuple[int, int], list[int]] = {}
        for i, (m, n) in enumerate(zip(metadata.query_lens, metadata.context_lens, strict=True)):
            # Context lengths within a factor of two share a bucket: padding costs at most that factor.
            members.setdefault((m, n.bit_length()), []).append(i)
        device = metadata.block_tables.device
        first_tokens = [0]
        for m in metadata.query_lens:
            first_tokens.append(first_tokens[-1] + m)
        buckets = []
        for (m, _), sequences in members.items():
            lens = torch.tensor([metadata.context_lens[i] for i in sequences], device=device)
            first = torch.tensor([first_tokens[i] for i in sequences], device=device)
            offsets = torch.arange(m, device=device)
            own = torch.arange(max(metadata.context_lens[i] for i in sequences), device=device)
            table = metadata.block_tables[torch.tensor(sequences, device=device)]
            slots = table[:, own // metadata.block_size] * metadata.block_size + own % metadata.block_size
            slots = torch.where(own < lens[:, None], slots, 0)
            buckets.append(
                SuffixBucket(
                    tokens=(first[:, None] + offsets).flatten(),
                    slots=slots,
                    positions=(lens - m)[:, None] + offsets,
                    num_queries=m,
                )
            )
        return buckets

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
        return rope_and_write(qkv, positions, cos_sin, slot_mapping, k_cache, v_cache, num_heads)

    def forward(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        prepared: PreparedBatch,
    ) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        for bucket in prepared.buckets:
            self._suffix(q, k_cache, v_cache, scale, bucket, out, lse)
        for group in prepared.groups:
            self._add_prefix(q, k_cache, v_cache, scale, group, out, lse)
        return out

    @staticmethod
    def _suffix(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        bucket: SuffixBucket,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        b, n = bucket.slots.shape
        m, (num_kv_heads, d) = bucket.num_queries, k_cache.shape[1:]
        g = q.shape[1] // num_kv_heads
        rows = q[bucket.tokens].view(b, m, num_kv_heads, g, d).transpose(1, 2).reshape(b, num_kv_heads, m * g, d)
        k = k_cache[bucket.slots].transpose(1, 2)
        v = v_cache[bucket.slots].transpose(1, 2)
        hidden = torch.arange(n, device=q.device) > bucket.positions[..., None]
        mask = torch.zeros(b, m, n, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
        mask = mask.repeat_interleave(g, dim=1).unsqueeze(1)
        part, part_lse = attention_with_lse(rows, k, v, scale, mask)
        out[bucket.tokens] = part.view(b, num_kv_heads, m, g, d).transpose(1, 2).reshape(b * m, -1, d)
        lse[bucket.tokens] = part_lse.view(b, num_kv_heads, m, g).transpose(1, 2).reshape(b * m, -1)

    @staticmethod
    def _add_prefix(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        group: PrefixGroup,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        tokens = slice(group.first_token, group.first_token + group.num_tokens)
        slots = slice(group.first_slot, group.first_slot + group.length)
        t, (num_kv_heads, d) = group.num_tokens, k_cache.shape[1:]
        g = q.shape[1] // num_kv_heads
        rows = q[tokens].unflatten(1, (num_kv_heads, g)).transpose(0, 1).reshape(1, num_kv_heads, t * g, d)
        k = k_cache[slots].transpose(0, 1).unsqueeze(0)
        v = v_cache[slots].transpose(0, 1).unsqueeze(0)
        part, part_lse = attention_with_lse(rows, k, v, scale)
        part = part.view(num_kv_heads, t, g, d).transpose(0, 1).reshape(t, -1, d)
        part_lse = part_lse.view(num_kv_heads, t, g).transpose(0, 1).reshape(t, -1)
        out[tokens], lse[tokens] = merge(part, part_lse, out[tokens], lse[tokens])
