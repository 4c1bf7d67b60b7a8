"""The Triton backend over whole batches, and the decode buffers that a graph replays, against dense attention."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.attention.test_torch_backend import MIXED, Batch, Member
from tests.kernels.kernel_inputs import DEVICE, TOLERANCE, assert_near
from vllm.attention.backends.triton import PreparedBatch, TritonAttention
from vllm.attention.replay import ReplayBuffers
from vllm.core.pinned_prompt import MAX_CHAIN
from vllm.ops.attention.metadata import AttentionMetadata, PrefixGroup


def make(
    members: list[Member], heads: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int = 0, block_size: int = 16
) -> tuple[Batch, TritonAttention]:
    batch = Batch(members, block_size, heads, kv_heads, dim, dtype, seed)
    return batch, TritonAttention(heads, kv_heads, dim, dtype, DEVICE)


def forward(batch: Batch, backend: TritonAttention, prepared: PreparedBatch) -> torch.Tensor:
    q, k, v = (x.to(DEVICE) for x in (batch.q, batch.k, batch.v))
    return backend.forward(q, k, v, q.shape[2] ** -0.5, prepared).cpu()


def metadata(batch: Batch, merged_groups: bool = True) -> AttentionMetadata:
    host = batch.metadata(merged_groups)
    return AttentionMetadata(
        host.slot_mapping.to(DEVICE),
        host.block_tables.to(DEVICE),
        host.query_lens,
        host.context_lens,
        host.groups,
        host.block_size,
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype"),
    [(6, 2, 64, torch.float32), (8, 1, 80, torch.bfloat16), (2, 2, 128, torch.float16)],
)
def test_mixed_batch(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    batch, backend = make(MIXED, heads, kv_heads, dim, dtype)
    out = forward(batch, backend, backend.prepare(metadata(batch)))
    assert_near(out, batch.reference(batch.spec()), TOLERANCE[dtype])


@pytest.mark.parametrize("merged_groups", [False, True])
def test_chains(merged_groups: bool) -> None:
    members = [Member((33, 20), 5, 1), Member((33, 20), 12, 9), Member((33,), 3, 3), Member((), 4, 2)]
    members.append(Member((47, 33), 1, 1))
    batch, backend = make(members, 3, 1, 64, torch.float32)
    out = forward(batch, backend, backend.prepare(metadata(batch, merged_groups)))
    assert_near(out, batch.reference(batch.spec()), TOLERANCE[torch.float32])


def test_batch_without_extents_needs_no_workspace() -> None:
    batch, backend = make([Member((), 20, 1), Member((), 30, 30), Member((), 1, 1)], 4, 2, 64, torch.float32)
    prepared = backend.prepare(metadata(batch))
    assert prepared.prefix is None and prepared.partial is None
    assert_near(forward(batch, backend, prepared), batch.reference(batch.spec()), TOLERANCE[torch.float32])


def decode_groups(batch: Batch) -> list[PrefixGroup]:
    return batch.metadata(True).groups


def sequences_of(batch: Batch, rows: list[int]) -> np.ndarray:
    """What `ReplayBuffers.fill` takes, for sequences that lie in these rows of the block tables."""
    queries = np.array([m.queries for m in batch.members])
    contexts = [m.context for m in batch.members]
    return np.stack((queries.cumsum() - queries, queries, contexts, rows), axis=1)


def decodes(context_lens: np.ndarray) -> np.ndarray:
    index = np.arange(len(context_lens))
    return np.stack((index, np.ones_like(index), context_lens, index), axis=1)


def inputs(size: int) -> np.ndarray:
    """Numbers that a step of this size carries for its tokens."""
    return np.arange(3 * size).reshape(3, size) + 2**40


def place(batch: Batch, tables: torch.Tensor, size: int, rng: random.Random) -> list[int]:
    """Puts the batch's block tables into random rows, which it returns, and pads its queries to `size` tokens."""
    rows = rng.sample(range(len(tables)), len(batch.members))
    for row, table in zip(rows, batch.tables, strict=True):
        tables[row, : len(table)] = torch.tensor(table, device=DEVICE)
    padding = torch.zeros(size - len(batch.q), *batch.q.shape[1:], dtype=batch.q.dtype)
    batch.q = torch.cat((batch.q, padding))
    return rows


STEPS = [
    [Member((33,), 5, 1), Member((33,), 70, 1), Member((600,), 1, 1), Member((), 9, 1)],
    [Member((), 300, 1)],
    [Member((20, 33), 8, 1), Member((33,), 2, 1), Member((), 40, 1)],
    [Member((), 3, 1), Member((), 4, 1), Member((), 2, 1), Member((), 4, 1), Member((), 5, 1)],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_buffers_are_replayed_over_changing_batches(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    size = 5
    backend = TritonAttention(4, 2, 64, dtype, DEVICE)
    tables = torch.zeros(7, 40, dtype=torch.int64, device=DEVICE)
    buffers = ReplayBuffers(backend, 8, tables, 16)
    replayed = {plain: buffers.prepared(size, decode=True, plain=plain) for plain in (False, True)}
    for i, members in enumerate(STEPS):
        batch, n = make(members, 4, 2, 64, dtype, seed=i)[0], len(members)
        want = batch.reference(batch.spec())
        rows = place(batch, tables, size, rng)
        plain = buffers.fill(inputs(size), sequences_of(batch, rows), decode_groups(batch), decode=True)
        assert not (plain and decode_groups(batch))
        assert buffers.inputs[:, :size].tolist() == inputs(size).tolist()
        out = forward(batch, backend, replayed[False])
        assert_near(out[:n], want, TOLERANCE[dtype])
        assert not out[n:].any()
        if plain:
            assert_near(forward(batch, backend, replayed[True])[:n], want, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_steps_are_replayed_over_changing_batches(dtype: torch.dtype) -> None:
    """Sequences that decode and others that bring many tokens, in one step, with and without extents."""
    rng = random.Random(1)
    size = 64
    steps = [
        [Member((33,), 5, 1), Member((33,), 70, 30), Member((600,), 1, 1), Member((), 20, 20)],
        [Member((), 60, 50)],
        STEPS[0],
        [Member((20, 33), 40, 17), Member((33,), 2, 2), Member((), 40, 9), Member((), 3, 1)],
    ]
    backend = TritonAttention(4, 2, 64, dtype, DEVICE)
    tables = torch.zeros(7, 40, dtype=torch.int64, device=DEVICE)
    buffers = ReplayBuffers(backend, size, tables, 16)
    replayed = buffers.prepared(size, decode=False, plain=False)
    for i, members in enumerate(steps):
        batch = make(members, 4, 2, 64, dtype, seed=i)[0]
        n, want = len(batch.q), batch.reference(batch.spec())
        rows = place(batch, tables, size, rng)
        assert not buffers.fill(inputs(size), sequences_of(batch, rows), decode_groups(batch), decode=False)
        out = forward(batch, backend, replayed)
        assert_near(out[:n], want, TOLERANCE[dtype])
        assert not out[n:].any()


def test_plain_batches_are_split_where_they_are_few_and_unsplit_where_many_are_alike() -> None:
    backend = TritonAttention(4, 2, 64, torch.bfloat16, DEVICE)
    tables = torch.zeros(300, 40, dtype=torch.int64, device=DEVICE)
    buffers = ReplayBuffers(backend, 300, tables, 16)
    alike, odd = np.full(300, 300), np.full(300, 100)
    odd[7] = 600
    assert buffers.splits_alike(1) and not buffers.splits_alike(300)
    assert buffers.fill(inputs(300), decodes(alike), [], decode=True)
    assert not buffers.fill(inputs(300), decodes(odd), [], decode=True)
    assert not buffers.fill(inputs(300), decodes(alike[:1]), [], decode=True)
    assert buffers.fill(inputs(1), decodes(alike[:1]), [], decode=True)
    assert not buffers.fill(inputs(300), decodes(alike), [PrefixGroup(0, 3, 0, 16)], decode=True)
    assert not buffers.fill(inputs(1), decodes(alike[:1]), [PrefixGroup(0, 1, 0, 16)], decode=True)


def test_chain_longer_than_the_buffers_hold() -> None:
    backend = TritonAttention(4, 2, 64, torch.bfloat16, DEVICE)
    buffers = ReplayBuffers(backend, 4, torch.zeros(4, 4, dtype=torch.int64, device=DEVICE), 16)
    groups = [PrefixGroup(0, 1, 0, 16)] * 60
    with pytest.raises(ValueError, match="a chain of 60 extents"):
        buffers.fill(inputs(4), decodes(np.ones(1, np.int64)), groups, decode=True)
    assert buffers.max_chain == MAX_CHAIN


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 5, 64])
def test_captured_graph(size: int) -> None:
    """One capture serves batches with and without groups."""
    backend = TritonAttention(32, 8, 128, torch.bfloat16, DEVICE)
    rng = random.Random(size)
    tables = torch.zeros(64, 64, dtype=torch.int64, device=DEVICE)
    buffers = ReplayBuffers(backend, 64, tables, 16)
    num_slots = 40000
    k, v = (torch.zeros(num_slots, 8, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    q = torch.zeros(size, 32, 128, dtype=torch.bfloat16, device=DEVICE)
    prepared = buffers.prepared(size, decode=True, plain=False)
    buffers.fill(inputs(size), np.zeros((0, 4), np.int64), [], decode=True)
    backend.forward(q, k, v, 128**-0.5, prepared)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend.forward(q, k, v, 128**-0.5, prepared)
    for chain in ((), (4097,), (17, 300)):
        members = [Member(chain if rng.random() < 0.8 else (), rng.randint(1, 200), 1) for _ in range(size)]
        members.sort(key=lambda m: m.chain)
        batch = Batch(members, 16, 32, 8, 128, torch.bfloat16, seed=len(chain))
        for row, table in enumerate(batch.tables):
            tables[row, : len(table)] = torch.tensor(table, device=DEVICE)
        k[: len(batch.k)], v[: len(batch.v)], q[:] = batch.k, batch.v, batch.q
        buffers.fill(inputs(size), decodes(np.array([m.context for m in members])), decode_groups(batch), decode=True)
        graph.replay()
        assert_near(out.cpu(), batch.reference(batch.spec()), TOLERANCE[torch.bfloat16])
