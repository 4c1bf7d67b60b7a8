"""Random batches over a cache of shuffled blocks, and what attention of them should be."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from vllm.attention.spec import AttentionSpec
from vllm.ops.attention.metadata import AttentionMetadata, PrefixGroup


@dataclass
class Member:
    """A sequence of the batch: the lengths of the extents it reads, own tokens, and how many of these are queries."""

    chain: tuple[int, ...]
    context: int
    queries: int


class Batch:
    """K and V in a cache of shuffled blocks, and what a backend is told of them.

    Neighbours with an extent of the same length share it; its group holds them all.
    """

    def __init__(
        self, members: list[Member], block_size: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int
    ) -> None:
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.members = members
        blocks = [-(-m.context // block_size) for m in members]
        lengths = sorted({length for m in members for length in m.chain})
        total = sum(blocks) + sum(-(-length // block_size) for length in lengths) + 3
        self.k, self.v = (
            torch.randn(total * block_size, kv_heads, dim, generator=generator).to(dtype) for _ in range(2)
        )
        self.q = torch.randn(sum(m.queries for m in members), heads, dim, generator=generator).to(dtype)
        self.first_slot = {}
        end = total
        for length in lengths:
            end -= -(-length // block_size)
            self.first_slot[length] = end * block_size
        free = list(range(end))
        rng.shuffle(free)
        self.tables = [[free.pop() for _ in range(n)] for n in blocks]
        self.block_size = block_size
        # Slots that nobody may read hold values that would show.
        read = torch.zeros(total * block_size, dtype=torch.bool)
        for i in range(len(members)):
            read[self.slots(i)] = True
        self.k[~read] = 1e4
        self.v[~read] = 1e4

    def slots(self, i: int) -> list[int]:
        """The context of sequence i: extents, then own tokens."""
        member, table, size = self.members[i], self.tables[i], self.block_size
        prefix = [self.first_slot[length] + j for length in member.chain for j in range(length)]
        return prefix + [table[j // size] * size + j % size for j in range(member.context)]

    def metadata(self, merged_groups: bool) -> AttentionMetadata:
        width = max(map(len, self.tables)) + 1
        groups: list[PrefixGroup] = []
        token = 0
        for m in self.members:
            for position, length in zip(accumulate(m.chain, initial=0), m.chain, strict=False):
                slot = self.first_slot[length]
                last = groups[-1] if groups else None
                if merged_groups and last and last.first_slot == slot and last.first_token + last.num_tokens == token:
                    groups[-1] = replace(last, num_tokens=last.num_tokens + m.queries)
                else:
                    groups.append(PrefixGroup(token, m.queries, slot, length, position))
            token += m.queries
        own = [self.slots(i)[-m.context :][-m.queries :] for i, m in enumerate(self.members)]
        return AttentionMetadata(
            slot_mapping=torch.tensor([slot for slots in own for slot in slots]),
            block_tables=torch.tensor([table + [0] * (width - len(table)) for table in self.tables]),
            query_lens=[m.queries for m in self.members],
            context_lens=[m.context for m in self.members],
            groups=groups,
            block_size=self.block_size,
        )

    def spec(self, **changes: Any) -> AttentionSpec:
        """Plain causal attention of these heads, but for the changes."""
        (_, heads, dim), kv_heads = self.q.shape, self.k.shape[1]
        return replace(AttentionSpec(heads, kv_heads, dim, dim, dim**-0.5, self.q.dtype), **changes)

    def reference(self, spec: AttentionSpec, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Dense attention of each sequence's queries over its own context; float64 [T, H, D]."""
        share = self.q.shape[1] // self.k.shape[1]
        out = []
        for i, (m, q) in enumerate(zip(self.members, self.q.split([m.queries for m in self.members]), strict=True)):
            slots = self.slots(i)
            k, v = (x[slots].double().repeat_interleave(share, dim=1) for x in (self.k, self.v))
            scores = torch.einsum("mhd,nhd->hmn", q.double(), k) * spec.scale
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            last = len(slots) - m.queries + torch.arange(m.queries)
            keys = torch.arange(len(slots))
            scores.masked_fill_(keys > last[:, None], float("-inf"))
            if spec.window is not None:
                scores.masked_fill_(keys <= last[:, None] - spec.window, float("-inf"))
            if sinks is not None:
                more = sinks.double()[:, None, None].expand(-1, m.queries, 1)
                scores = torch.cat((scores, more), dim=-1)
            weights = scores.softmax(dim=-1)[..., : len(slots)]
            out.append(torch.einsum("hmn,nhd->mhd", weights, v))
        return torch.cat(out)


MIXED = [
    Member((), 1, 1),
    Member((), 40, 40),
    Member((), 65, 7),
    Member((33,), 5, 1),
    Member((33,), 6, 6),
    Member((33,), 100, 1),
    Member((70,), 1, 1),
    Member((70,), 31, 12),
    Member((70,), 17, 1),
    Member((), 9, 1),
]
