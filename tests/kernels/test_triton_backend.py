"""The Triton backend over whole batches, and the decode buffers that a graph replays, against dense attention."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.attention.test_torch_backend import MIXED, Batch, Member
from tests.kernels.kernel_inputs import DEVICE, TOLERANCE, assert_near
from vllm.attention.backends.triton import DecodeBuffers, PreparedBatch, TritonAttentionBackend
from vllm.attention.metadata import AttentionMetadata, PrefixGroup


def make(
    members: list[Member], heads: int, kv_heads: int, dim: int, dtype: torch.dtype, seed: int = 0, block_size: int = 16
) -> tuple[Batch, TritonAttentionBackend]:
    batch = Batch(members, block_size, heads, kv_heads, dim, dtype, seed)
    return batch, TritonAttentionBackend(heads, kv_heads, dim, dtype, DEVICE)


def forward(batch: Batch, backend: TritonAttentionBackend, prepared: PreparedBatch) -> torch.Tensor:
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
    assert_near(out, batch.reference(dim**-0.5), TOLERANCE[dtype])


@pytest.mark.parametrize("merged_groups", [False, True])
def test_chains(merged_groups: bool) -> None:
    members = [Member((33, 20), 5, 1), Member((33, 20), 12, 9), Member((33,), 3, 3), Member((), 4, 2)]
    members.append(Member((47, 33), 1, 1))
    batch, backend = make(members, 3, 1, 64, torch.float32)
    out = forward(batch, backend, backend.prepare(metadata(batch, merged_groups)))
    assert_near(out, batch.reference(0.125), TOLERANCE[torch.float32])


def test_batch_without_extents_needs_no_workspace() -> None:
    batch, backend = make([Member((), 20, 1), Member((), 30, 30), Member((), 1, 1)], 4, 2, 64, torch.float32)
    prepared = backend.prepare(metadata(batch))
    assert prepared.prefix is None and prepared.partial is None
    assert_near(forward(batch, backend, prepared), batch.reference(0.125), TOLERANCE[torch.float32])


def decode_groups(batch: Batch) -> list[PrefixGroup]:
    return batch.metadata(True).groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_buffers_are_replayed_over_changing_batches(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    steps = [
        [Member((33,), 5, 1), Member((33,), 70, 1), Member((600,), 1, 1), Member((), 9, 1)],
        [Member((), 300, 1)],
        [Member((20, 33), 8, 1), Member((33,), 2, 1), Member((), 40, 1)],
        [Member((), 3, 1), Member((), 4, 1), Member((), 2, 1), Member((), 4, 1), Member((), 5, 1)],
    ]
    size, num_rows = 5, 7
    batches = [make(members, 4, 2, 64, dtype, seed=i)[0] for i, members in enumerate(steps)]
    backend = TritonAttentionBackend(4, 2, 64, dtype, DEVICE)
    tables = torch.zeros(num_rows, 40, dtype=torch.int64, device=DEVICE)
    buffers = DecodeBuffers(backend, 8, tables, 16)
    replayed = {direct: buffers.prepared(size, direct=direct) for direct in (False, True)}
    for batch in batches:
        n = len(batch.members)
        rows = rng.sample(range(num_rows), n)
        for row, table in zip(rows, batch.tables, strict=True):
            tables[row, : len(table)] = torch.tensor(table, device=DEVICE)
        context_lens = np.array([m.context for m in batch.members])
        direct = buffers.fill(size, np.array(rows), context_lens, decode_groups(batch))
        want = batch.reference(0.125)
        padding = torch.zeros(size - n, *batch.q.shape[1:], dtype=dtype)
        batch.q = torch.cat((batch.q, padding))
        out = forward(batch, backend, replayed[False])
        assert_near(out[:n], want, TOLERANCE[dtype])
        assert not out[n:].any()
        if direct:
            assert_near(forward(batch, backend, replayed[True])[:n], want, TOLERANCE[dtype])


def test_direct_batches_are_those_of_many_like_sequences() -> None:
    backend = TritonAttentionBackend(4, 2, 64, torch.bfloat16, DEVICE)
    tables = torch.zeros(300, 40, dtype=torch.int64, device=DEVICE)
    buffers = DecodeBuffers(backend, 300, tables, 16)
    rows = np.arange(300)
    alike, odd = np.full(300, 300), np.full(300, 100)
    odd[7] = 600
    assert buffers.fill(300, rows, alike, [])
    assert not buffers.fill(300, rows, odd, [])
    assert not buffers.fill(300, rows[:1], alike[:1], [])
    assert not buffers.fill(300, rows, alike, [PrefixGroup(0, 3, 0, 16)])


def test_chain_longer_than_the_buffers_hold() -> None:
    backend = TritonAttentionBackend(4, 2, 64, torch.bfloat16, DEVICE)
    buffers = DecodeBuffers(backend, 4, torch.zeros(4, 4, dtype=torch.int64, device=DEVICE), 16)
    groups = [PrefixGroup(0, 1, 0, 16)] * 60
    with pytest.raises(ValueError, match="a chain of 60 extents"):
        buffers.fill(4, np.arange(1), np.ones(1, np.int64), groups)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 5, 64])
def test_captured_graph(size: int) -> None:
    """One capture serves batches with and without groups."""
    backend = TritonAttentionBackend(32, 8, 128, torch.bfloat16, DEVICE)
    rng = random.Random(size)
    tables = torch.zeros(64, 64, dtype=torch.int64, device=DEVICE)
    buffers = DecodeBuffers(backend, 64, tables, 16)
    num_slots = 40000
    k, v = (torch.zeros(num_slots, 8, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    q = torch.zeros(size, 32, 128, dtype=torch.bfloat16, device=DEVICE)
    prepared = buffers.prepared(size)
    buffers.fill(size, np.arange(0), np.zeros(0, np.int64), [])
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
        buffers.fill(size, np.arange(size), np.array([m.context for m in members]), decode_groups(batch))
        graph.replay()
        assert_near(out.cpu(), batch.reference(128**-0.5), TOLERANCE[torch.bfloat16])
