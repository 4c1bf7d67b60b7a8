"""Attention in plain torch: correct everywhere, and the reference that other backends are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm.attention.backends.base import AttentionBackend
from vllm.attention.spec import AttentionSpec
from vllm.ops.attention.metadata import AttentionMetadata, PrefixGroup
from vllm.ops.attention.partial import attention_with_lse, merge


@dataclass(frozen=True)
class SuffixBucket:
    """Sequences with equally many query tokens and similar context, computed as one padded batch.

    Attributes:
        tokens: Query tokens; int64 [b * m].
        slots: K/V slots of the own tokens that are read, padded with slot 0; int64 [b, n].
        positions: Place of each query token among those; int64 [b, m].
        num_queries: m.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    num_queries: int


@dataclass(frozen=True)
class PrefixRead:
    """Query tokens that read consecutive slots.

    Attributes:
        tokens: int64 [t].
        first_slot, length: The slots.
        hidden: Which of them lie before a token's window; bool [t, length]. None: none does. Each token sees the last.
    """

    tokens: torch.Tensor
    first_slot: int
    length: int
    hidden: torch.Tensor | None = None


@dataclass(frozen=True)
class PreparedBatch:
    buckets: list[SuffixBucket]
    reads: list[PrefixRead]


class TorchAttentionBackend(AttentionBackend):
    """Prefix and suffix attention by library calls, merged by log-sum-exp; takes whatever a layer asks for.

    The query heads that share a KV head are rows of one matrix, so grouped-query attention needs no copy of K or V.
    """

    def misfit(self, spec: AttentionSpec) -> str | None:
        return None

    def prepare(self, metadata: AttentionMetadata, specs: Sequence[AttentionSpec]) -> list[PreparedBatch]:
        plans = {
            window: PreparedBatch(self._buckets(metadata, window), self._reads(metadata, window))
            for window in {spec.window for spec in specs}
        }
        return [plans[spec.window] for spec in specs]

    def _buckets(self, metadata: AttentionMetadata, window: int | None) -> list[SuffixBucket]:
        members: dict[tuple[int, int], list[int]] = {}
        # What lies behind the window of all query tokens is left out: it may be another sequence's by now.
        pairs = list(zip(metadata.query_lens, metadata.context_lens, strict=True))
        skipped = [0 if window is None else max(0, n - m - window + 1) for m, n in pairs]
        context_lens = [n - skip for (_, n), skip in zip(pairs, skipped, strict=True)]
        for i, (m, n) in enumerate(zip(metadata.query_lens, context_lens, strict=True)):
            # Context lengths within a factor of two share a bucket: padding costs at most that factor.
            members.setdefault((m, n.bit_length()), []).append(i)
        device = metadata.block_tables.device
        first_tokens = [0]
        for m in metadata.query_lens:
            first_tokens.append(first_tokens[-1] + m)
        buckets = []
        for (m, _), sequences in members.items():
            lens = torch.tensor([context_lens[i] for i in sequences], device=device)
            behind = torch.tensor([skipped[i] for i in sequences], device=device)[:, None]
            first = torch.tensor([first_tokens[i] for i in sequences], device=device)
            offsets = torch.arange(m, device=device)
            read = torch.arange(max(context_lens[i] for i in sequences), device=device)
            own = behind + torch.minimum(read, lens[:, None] - 1)
            table = metadata.block_tables[torch.tensor(sequences, device=device)]
            slots = table.gather(1, own // metadata.block_size) * metadata.block_size + own % metadata.block_size
            slots = torch.where(read < lens[:, None], slots, 0)
            buckets.append(
                SuffixBucket(
                    tokens=(first[:, None] + offsets).flatten(),
                    slots=slots,
                    positions=(lens - m)[:, None] + offsets,
                    num_queries=m,
                )
            )
        return buckets

    def _reads(self, metadata: AttentionMetadata, window: int | None) -> list[PrefixRead]:
        device = metadata.block_tables.device
        tokens = [torch.arange(g.first_token, g.first_token + g.num_tokens, device=device) for g in metadata.groups]
        if window is None:
            return [PrefixRead(t, g.first_slot, g.length) for t, g in zip(tokens, metadata.groups, strict=True)]
        # A token's own tokens begin where the last of its groups ends.
        starts = torch.zeros(sum(metadata.query_lens), dtype=torch.int64, device=device)
        for of_group, group in zip(tokens, metadata.groups, strict=True):
            starts[of_group] = starts[of_group].clamp(min=group.position + group.length)
        own = [torch.arange(n - m, n) for m, n in zip(metadata.query_lens, metadata.context_lens, strict=True)]
        positions = starts + torch.cat(own).to(device)
        return [
            read
            for of_group, group in zip(tokens, metadata.groups, strict=True)
            if (read := self._window_read(of_group, group, positions[of_group] - window + 1)) is not None
        ]

    @staticmethod
    def _window_read(tokens: torch.Tensor, group: PrefixGroup, first_seen: torch.Tensor) -> PrefixRead | None:
        """What tokens read of an extent, given the first position that each sees; None where that is nothing."""
        sees = first_seen < group.position + group.length
        if not bool(sees.any()):
            return None
        tokens, first_seen = tokens[sees], first_seen[sees]
        skipped = max(0, int(first_seen.min()) - group.position)
        keys = torch.arange(group.position + skipped, group.position + group.length, device=tokens.device)
        hidden = keys < first_seen[:, None]
        return PrefixRead(
            tokens, group.first_slot + skipped, group.length - skipped, hidden if bool(hidden.any()) else None
        )

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        spec: AttentionSpec,
        prepared: PreparedBatch,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out = torch.empty((*q.shape[:2], spec.v_dim), dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        for bucket in prepared.buckets:
            self._suffix(q, k_cache, v_cache, spec, bucket, out, lse)
        for read in prepared.reads:
            self._add_prefix(q, k_cache, v_cache, spec, read, out, lse)
        if sinks is not None:
            # One more key, whose value is 0: the others keep their share of the exponentials.
            out *= torch.sigmoid(lse - sinks.float()).unsqueeze(-1).to(out.dtype)
        return out

    @staticmethod
    def _suffix(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        spec: AttentionSpec,
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
        keys, last = torch.arange(n, device=q.device), bucket.positions[..., None]
        hidden = keys > last
        if spec.window is not None:
            hidden |= keys <= last - spec.window
        mask = torch.zeros(b, m, n, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
        mask = mask.repeat_interleave(g, dim=1).unsqueeze(1)
        part, part_lse = attention_with_lse(rows, k, v, spec.scale, mask, spec.softcap)
        out[bucket.tokens] = part.view(b, num_kv_heads, m, g, -1).transpose(1, 2).reshape(b * m, -1, spec.v_dim)
        lse[bucket.tokens] = part_lse.view(b, num_kv_heads, m, g).transpose(1, 2).reshape(b * m, -1)

    @staticmethod
    def _add_prefix(
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        spec: AttentionSpec,
        read: PrefixRead,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        if not read.length:
            return
        tokens, slots = read.tokens, slice(read.first_slot, read.first_slot + read.length)
        t, (num_kv_heads, d) = len(tokens), k_cache.shape[1:]
        g = q.shape[1] // num_kv_heads
        rows = q[tokens].unflatten(1, (num_kv_heads, g)).transpose(0, 1).reshape(1, num_kv_heads, t * g, d)
        k = k_cache[slots].transpose(0, 1).unsqueeze(0)
        v = v_cache[slots].transpose(0, 1).unsqueeze(0)
        mask = None
        if read.hidden is not None:
            mask = torch.zeros(read.hidden.shape, dtype=q.dtype, device=q.device)
            mask = mask.masked_fill_(read.hidden, float("-inf")).repeat_interleave(g, dim=0)
        part, part_lse = attention_with_lse(rows, k, v, spec.scale, mask, spec.softcap)
        part = part.view(num_kv_heads, t, g, -1).transpose(0, 1).reshape(t, -1, spec.v_dim)
        part_lse = part_lse.view(num_kv_heads, t, g).transpose(0, 1).reshape(t, -1)
        out[tokens], lse[tokens] = merge(part, part_lse, out[tokens], lse[tokens])
