"""The torch backend over random batches, against dense attention of each token over its own context in float64."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch

from vllm.attention.backends import AttentionShape, get_backend
from vllm.attention.backends.torch import TorchAttentionBackend
from vllm.attention.metadata import AttentionMetadata, PrefixGroup
from vllm.exceptions import StartupError

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2}


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
            for length in m.chain:
                slot = self.first_slot[length]
                last = groups[-1] if groups else None
                if merged_groups and last and last.first_slot == slot and last.first_token + last.num_tokens == token:
                    groups[-1] = PrefixGroup(last.first_token, last.num_tokens + m.queries, slot, length)
                else:
                    groups.append(PrefixGroup(token, m.queries, slot, length))
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

    def reference(self, scale: float) -> torch.Tensor:
        share = self.q.shape[1] // self.k.shape[1]
        rows = []
        for i, m in enumerate(self.members):
            slots = self.slots(i)
            for j in range(m.queries):
                q = self.q[len(rows)].double()
                seen = slots[: len(slots) - m.queries + 1 + j]
                k, v = (x[seen].double().repeat_interleave(share, dim=1) for x in (self.k, self.v))
                scores = torch.einsum("hd,nhd->hn", q, k) * scale
                rows.append(torch.einsum("hn,nhd->hd", scores.softmax(dim=-1), v))
        return torch.stack(rows)


def check(batch: Batch, dtype: torch.dtype, merged_groups: bool = True) -> None:
    backend = TorchAttentionBackend()
    scale = batch.q.shape[2] ** -0.5
    prepared = backend.prepare(batch.metadata(merged_groups))
    out = backend.forward(batch.q, batch.k, batch.v, scale, prepared)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), batch.reference(scale), atol=TOLERANCE[dtype], rtol=0)


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


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (8, 1)])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_prefill_and_decode_in_several_groups(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    check(Batch(MIXED, 16, heads, kv_heads, dim, dtype, seed=dim + heads), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_size", [1, 3, 5, 16, 256])
def test_block_sizes(dtype: torch.dtype, block_size: int) -> None:
    check(Batch(MIXED, block_size, 6, 2, 64, dtype, seed=block_size), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("merged_groups", [False, True])
def test_chains_of_two_extents(dtype: torch.dtype, merged_groups: bool) -> None:
    members = [
        Member((33, 20), 5, 1),
        Member((33, 20), 40, 9),
        Member((33,), 3, 3),
        Member((20,), 8, 1),
        Member((), 4, 2),
        Member((47, 33), 1, 1),
    ]
    check(Batch(members, 16, 6, 2, 64, dtype, seed=1), dtype, merged_groups)


@pytest.mark.parametrize("seed", range(12))
def test_random_batches(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 150) for _ in range(3)]
    members = []
    for _ in range(rng.randint(1, 14)):
        context = rng.randint(1, 90)
        queries = 1 if rng.random() < 0.6 else rng.randint(1, context)
        chain = tuple(sorted(set(rng.sample(lengths, rng.choice([0, 1, 1, 2])))))
        members.append(Member(chain, context, queries))
    members.sort(key=lambda m: m.chain)
    heads, kv_heads = rng.choice([(1, 1), (3, 1), (8, 1), (4, 2), (9, 3)])
    batch = Batch(
        members, rng.choice([1, 2, 7, 16, 32]), heads, kv_heads, rng.choice([64, 80, 128]), torch.float32, seed
    )
    check(batch, torch.float32)


def test_large_scores_do_not_overflow() -> None:
    batch = Batch(MIXED, 16, 6, 2, 64, torch.float32, seed=0)
    batch.q *= 100
    backend = TorchAttentionBackend()
    out = backend.forward(batch.q, batch.k, batch.v, 0.125, backend.prepare(batch.metadata(True)))
    torch.testing.assert_close(out.double(), batch.reference(0.125), atol=2e-3, rtol=0)


def test_unknown_backend() -> None:
    with pytest.raises(StartupError, match=r"--attention-backend NONE is not known; choose from .*TORCH"):
        get_backend("NONE", AttentionShape(2, 1, 64, torch.float32, 16), torch.device("cpu"))
