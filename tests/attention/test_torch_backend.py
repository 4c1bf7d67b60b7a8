"""The torch backend over random batches, against dense attention of each token over its own context in float64."""

from __future__ import annotations

import random

import pytest
import torch

from tests.attention.random_batch import AROUND, MIXED, Batch, Member, WindowPart
from vllm.attention.backends import get_backend
from vllm.attention.backends.torch import TorchAttentionBackend
from vllm.exceptions import StartupError

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-2}


def check(batch: Batch, dtype: torch.dtype, merged_groups: bool = True) -> None:
    backend = TorchAttentionBackend()
    spec = batch.spec()
    (prepared,) = backend.prepare(batch.metadata(merged_groups), [spec])
    out = backend.attend(batch.q, batch.k, batch.v, spec, prepared)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), batch.reference(spec), atol=TOLERANCE[dtype], rtol=0)


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


@pytest.mark.parametrize("window", [1, 39, 40, 41, 500])
def test_windows_in_blocks_of_their_own(window: int) -> None:
    batch = Batch(AROUND, 16, 6, 2, 64, torch.float32, seed=window)
    part, spec, backend = WindowPart(batch, window, seed=1), batch.spec(window=window), TorchAttentionBackend()
    (prepared,) = backend.prepare(part.metadata(), [spec])
    out = backend.attend(batch.q, part.k, part.v, spec, prepared)
    torch.testing.assert_close(out.double(), batch.reference(spec), atol=TOLERANCE[torch.float32], rtol=0)


def test_large_scores_do_not_overflow() -> None:
    batch = Batch(MIXED, 16, 6, 2, 64, torch.float32, seed=0)
    batch.q *= 100
    backend = TorchAttentionBackend()
    (prepared,) = backend.prepare(batch.metadata(True), [batch.spec()])
    out = backend.attend(batch.q, batch.k, batch.v, batch.spec(), prepared)
    torch.testing.assert_close(out.double(), batch.reference(batch.spec()), atol=2e-3, rtol=0)


@pytest.mark.parametrize("merged_groups", [False, True])
@pytest.mark.parametrize("window", [1, 5, 16, 33, 34, 70, 1000])
def test_windows(merged_groups: bool, window: int) -> None:
    members = [*MIXED, Member((33, 20), 5, 1), Member((33, 20), 40, 9), Member((33,), 8, 8)]
    batch = Batch(members, 16, 6, 2, 64, torch.float32, seed=window)
    backend = TorchAttentionBackend()
    # Layers with a window and without share a step.
    specs = [batch.spec(), batch.spec(window=window)]
    plans = backend.prepare(batch.metadata(merged_groups), specs)
    for spec, prepared in zip(specs, plans, strict=True):
        out = backend.attend(batch.q, batch.k, batch.v, spec, prepared)
        torch.testing.assert_close(out.double(), batch.reference(spec), atol=3e-6, rtol=0)


@pytest.mark.parametrize("window", [None, 20])
def test_capped_scores_and_sinks(window: int | None) -> None:
    batch = Batch(MIXED, 16, 6, 2, 64, torch.float32, seed=3)
    spec = batch.spec(window=window, softcap=0.7, sinks=True)
    sinks = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 5.0])
    backend = TorchAttentionBackend()
    (prepared,) = backend.prepare(batch.metadata(True), [spec])
    out = backend.attend(batch.q, batch.k, batch.v, spec, prepared, sinks)
    torch.testing.assert_close(out.double(), batch.reference(spec, sinks), atol=3e-6, rtol=0)


def test_unknown_backend() -> None:
    with pytest.raises(StartupError, match=r"--attention-backend NONE is not known; choose from .*TORCH"):
        get_backend("NONE", [], 16, torch.device("cpu"))
