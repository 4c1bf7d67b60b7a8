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


class WindowPart:
    """What the window group has of a batch: of own blocks and of each extent only what the window reaches, elsewhere
    than the full group has it. Block tables have holes, which stand for a block of values that would show.

    Attributes:
        k, v, tables: As of `Batch`.
        hole: The block that the holes name.
    """

    def __init__(self, batch: Batch, window: int, seed: int) -> None:
        self.batch, self.window = batch, window
        size, rng = batch.block_size, random.Random(seed)
        first_own = [max(0, m.context - m.queries - window + 1) // size for m in batch.members]
        # Of an extent the tokens that the one behind it sees, in whole blocks; one block at least.
        self.first_pinned = {
            length: min(max(0, length - window + 1), length - 1) // size for length in batch.first_slot
        }
        num_own = sum(len(table) - first for table, first in zip(batch.tables, first_own, strict=True))
        total = num_own + sum(-(-n // size) - first for n, first in self.first_pinned.items()) + 2
        shape = (total * size, *batch.k.shape[1:])
        self.k, self.v = (torch.full(shape, 1e4, dtype=batch.k.dtype) for _ in range(2))
        self.first_slot, end = {}, total
        for length, first in self.first_pinned.items():
            end -= -(-length // size) - first
            self.first_slot[length] = end * size
            self._copy(batch.first_slot[length] + first * size, end * size, (-(-length // size) - first) * size)
        free = list(range(end))
        rng.shuffle(free)
        self.hole = free.pop()
        self.tables = []
        for table, first in zip(batch.tables, first_own, strict=True):
            kept = [free.pop() for _ in table[first:]]
            for block, to in zip(table[first:], kept, strict=True):
                self._copy(block * size, to * size, size)
            self.tables.append([self.hole] * first + kept)

    def _copy(self, source: int, target: int, count: int) -> None:
        for of_batch, of_part in ((self.batch.k, self.k), (self.batch.v, self.v)):
            of_part[target : target + count] = of_batch[source : source + count]

    def metadata(self) -> AttentionMetadata:
        size, whole = self.batch.block_size, self.batch.metadata(True)
        groups: list[PrefixGroup] = []
        token = 0
        for member in self.batch.members:
            seen_from = sum(member.chain) - self.window + 1
            for start, length in zip(accumulate(member.chain, initial=0), member.chain, strict=False):
                skipped = self.first_pinned[length] * size
                if start + length > seen_from:
                    slot = self.first_slot[length]
                    groups.append(PrefixGroup(token, member.queries, slot, length - skipped, start + skipped))
            token += member.queries
        width = max(map(len, self.tables)) + 1
        tables = [table + [self.hole] * (width - len(table)) for table in self.tables]
        return replace(whole, block_tables=torch.tensor(tables), groups=groups)


AROUND = [
    Member((), 39, 1),
    Member((), 40, 1),
    Member((), 41, 1),
    Member((), 130, 1),
    Member((), 90, 49),
    Member((39,), 1, 1),
    Member((40,), 1, 1),
    Member((41,), 7, 7),
    Member((41,), 60, 33),
    Member((41,), 130, 1),
    Member((10, 200), 3, 2),
    Member((25, 10), 9, 9),
    Member((70, 25), 20, 1),
]
"""Sequences whose extents, own tokens and chunks end at, before and behind the edge of a window of 40."""


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
