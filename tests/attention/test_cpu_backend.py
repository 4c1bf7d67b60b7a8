"""The compiled CPU kernels' attention over random batches, against dense attention in float64."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterator
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm
from tests.attention.random_batch import AROUND, MIXED, Batch, Member, WindowPart
from vllm.attention.backends import get_backend
from vllm.attention.backends.cpu import CpuAttentionBackend
from vllm.attention.backends.torch import TorchAttentionBackend
from vllm.attention.spec import AttentionSpec
from vllm.exceptions import StartupError
from vllm.ops import rope as rotary
from vllm.ops.attention.metadata import AttentionMetadata, PrefixGroup
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.ops.cpu import library as cpu_library
from vllm.ops.cpu.kernels import TILES, WIDEN
from vllm.ops.norm import Norm
from vllm.ops.rope import QkNorm, Rope

every_instructions = pytest.mark.parametrize("cpu_instructions", cpu_kernels.INSTRUCTIONS, indirect=True)
# Dtype of K and V, how bfloat16 multiplies (in tiles or dot products where there are instructions for them), largest
# difference of a result.
KINDS = [
    pytest.param(torch.float32, WIDEN, 4e-6, id="float32"),
    pytest.param(torch.bfloat16, WIDEN, 4e-6, id="bfloat16-widened"),
    pytest.param(torch.bfloat16, TILES, 3e-2, id="bfloat16-narrow"),
]
CPU = torch.device("cpu")


def written(batch: Batch | WindowPart) -> tuple[torch.Tensor, torch.Tensor]:
    """Caches that hold the batch's K and V, in the kernels' own order."""
    num_slots, kv_heads, dim = batch.k.shape
    k_cache, v_cache = torch.zeros_like(batch.k), torch.zeros_like(batch.v)
    unturned = torch.cat((torch.ones(1, dim // 2), torch.zeros(1, dim // 2)), dim=1)
    qkv = torch.cat((torch.zeros(num_slots, kv_heads, dim), batch.k.float(), batch.v.float()), dim=1).flatten(1)
    positions = torch.zeros(num_slots, dtype=torch.int64)
    cpu_kernels.rope_and_write(qkv, positions, unturned, torch.arange(num_slots), k_cache, v_cache, kv_heads)
    return k_cache, v_cache


def attend(batch: Batch, arithmetic: int, merged_groups: bool = True, threads: int = 2) -> torch.Tensor:
    k_cache, v_cache = written(batch)
    torch.set_num_threads(threads)
    prepared = cpu_kernels.prepare(batch.metadata(merged_groups))
    return cpu_kernels.attention(batch.q.float(), k_cache, v_cache, batch.q.shape[2] ** -0.5, prepared, arithmetic)


def check(batch: Batch, arithmetic: int, tolerance: float, merged_groups: bool = True, threads: int = 2) -> None:
    out = attend(batch, arithmetic, merged_groups, threads)
    torch.testing.assert_close(out.double(), batch.reference(batch.spec()), atol=tolerance, rtol=0)


@every_instructions
@pytest.mark.parametrize(("dtype", "arithmetic", "tolerance"), KINDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(2, 2, 16), (9, 3, 64), (8, 1, 80), (3, 1, 96), (8, 8, 128), (4, 4, 256), (128, 1, 16), (1, 1, 512)],
)
def test_prefill_and_decode_in_several_groups(
    cpu_instructions: str, dtype: torch.dtype, arithmetic: int, tolerance: float, heads: int, kv_heads: int, dim: int
) -> None:
    check(Batch(MIXED, 16, heads, kv_heads, dim, dtype, seed=dim), arithmetic, tolerance)


@every_instructions
@pytest.mark.parametrize(("dtype", "arithmetic", "tolerance"), KINDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_extents_and_rows_of_every_size(
    cpu_instructions: str, dtype: torch.dtype, arithmetic: int, tolerance: float, threads: int
) -> None:
    # Runs of 512 keys end within an extent and at its end; 300 tokens are more than are split into runs.
    members = [Member((length,), 1, 1) for length in (1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1024, 4097)]
    members += [Member((4097,), 1, 1), Member((4097,), 9, 9), Member((), 1, 1), Member((), 513, 1), Member((65,), 3, 3)]
    check(Batch(members, 16, 3, 1, 64, dtype, seed=3), arithmetic, tolerance, threads=threads)
    members = [Member((600,), 300, 300), Member((600,), 1, 1), Member((600,), 700, 100)]
    check(Batch(members, 32, 3, 1, 64, dtype, seed=4), arithmetic, tolerance, threads=threads)


@every_instructions
@pytest.mark.parametrize(("dtype", "arithmetic", "tolerance"), KINDS)
@pytest.mark.parametrize("kv_heads", [1, 3, 4, 8])
def test_chunks_of_a_prefill_see_their_context(
    cpu_instructions: str, dtype: torch.dtype, arithmetic: int, tolerance: float, kv_heads: int
) -> None:
    members = [Member((), 600, 37), Member((), 530, 17), Member((), 64, 64), Member((), 33, 1), Member((), 257, 256)]
    check(Batch(members, 16, 2 * kv_heads, kv_heads, 64, dtype, seed=kv_heads), arithmetic, tolerance)


@every_instructions
@pytest.mark.parametrize("merged_groups", [False, True])
def test_chains_of_extents(cpu_instructions: str, merged_groups: bool) -> None:
    members = [
        Member((33, 20), 5, 1),
        Member((33, 20, 600), 40, 9),
        Member((33,), 3, 3),
        Member((20,), 8, 1),
        Member((), 4, 2),
        Member((47, 33), 1, 1),
    ]
    check(Batch(members, 16, 6, 2, 64, torch.float32, seed=1), WIDEN, 4e-6, merged_groups)


@every_instructions
@pytest.mark.parametrize("window", [1, 39, 40, 41, 500])
def test_windows_in_blocks_of_their_own(cpu_instructions: str, window: int) -> None:
    batch = Batch(AROUND, 16, 6, 2, 64, torch.float32, seed=window)
    part, spec, backend = WindowPart(batch, window, seed=1), batch.spec(window=window), CpuAttentionBackend(16)
    (prepared,) = backend.prepare(part.metadata(), [spec])
    out = backend.attend(batch.q, *written(part), spec, prepared)
    torch.testing.assert_close(out.double(), batch.reference(spec), atol=4e-6, rtol=0)


@every_instructions
def test_empty_groups_change_nothing(cpu_instructions: str) -> None:
    batch = Batch(MIXED, 16, 6, 2, 64, torch.float32, seed=2)
    k_cache, v_cache = written(batch)
    metadata = batch.metadata(True)
    with_empty = dataclasses.replace(
        metadata, groups=[PrefixGroup(0, 0, 0, 16), *metadata.groups, PrefixGroup(0, len(batch.q), 0, 0)]
    )
    plain, other = (
        cpu_kernels.attention(batch.q, k_cache, v_cache, 0.125, cpu_kernels.prepare(m), WIDEN)
        for m in (metadata, with_empty)
    )
    assert torch.equal(plain, other)


@every_instructions
@pytest.mark.parametrize("seed", range(6))
def test_random_batches(cpu_instructions: str, seed: int) -> None:
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
    dim, dtype = rng.choice([16, 48, 64, 80, 128]), rng.choice([torch.float32, torch.bfloat16])
    check(Batch(members, rng.choice([16, 32, 64]), heads, kv_heads, dim, dtype, seed), WIDEN, 4e-6)


@every_instructions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow(cpu_instructions: str, dtype: torch.dtype) -> None:
    batch = Batch(MIXED, 16, 6, 2, 64, dtype, seed=0)
    batch.q *= 100
    check(batch, WIDEN, 2e-3)


@every_instructions
@pytest.mark.parametrize(
    ("dtype", "arithmetic"), [(torch.float32, WIDEN), (torch.bfloat16, WIDEN), (torch.bfloat16, TILES)]
)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_what_a_former_owner_left_in_a_block_does_not_show(
    cpu_instructions: str, dtype: torch.dtype, arithmetic: int, garbage: float
) -> None:
    # Slots are multiplied by the tile, those after the last key too.
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(33, 5 * 64, generator=generator)
    unturned = torch.cat((torch.ones(1, 32), torch.zeros(1, 32)), dim=1)
    table = torch.tensor([[2, 0, 1]])
    results = []
    for stale in (0.0, garbage):
        k_cache, v_cache = (torch.full((48, 1, 64), stale, dtype=dtype) for _ in range(2))
        outs = []
        # Two chunks of a prefill, then decode, the last of it into a new block.
        for first, end in ((0, 13), (13, 31), (31, 32), (32, 33)):
            positions = torch.arange(first, end)
            slots = table[0][positions // 16] * 16 + positions % 16
            zeros = torch.zeros(end - first, dtype=torch.int64)
            q = cpu_kernels.rope_and_write(qkv[first:end], zeros, unturned, slots, k_cache, v_cache, 3)
            metadata = AttentionMetadata(slots, table, [end - first], [end], [], 16)
            outs.append(cpu_kernels.attention(q, k_cache, v_cache, 0.125, cpu_kernels.prepare(metadata), arithmetic))
        # Another token that reads 13 slots, an extent's, and itself.
        zeros, slots = torch.zeros(1, dtype=torch.int64), torch.tensor([16])
        q = cpu_kernels.rope_and_write(qkv[:1], zeros, unturned, slots, k_cache, v_cache, 3)
        metadata = AttentionMetadata(slots, torch.tensor([[1]]), [1], [1], [PrefixGroup(0, 1, 32, 16)], 16)
        outs.append(cpu_kernels.attention(q, k_cache, v_cache, 0.125, cpu_kernels.prepare(metadata), arithmetic))
        results.append(torch.cat(outs))
    assert torch.equal(results[1], results[0])
    assert bool(results[0].isfinite().all())


@every_instructions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 64), (4, 4, 80), (6, 2, 16)])
def test_rope_and_write(cpu_instructions: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    tokens, num_slots = 37, 96
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=torch.Generator().manual_seed(dim))
    positions = torch.arange(tokens) * 3 % 50
    angles = torch.arange(50)[:, None] * 0.7 ** torch.arange(dim // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    slots = torch.tensor([*range(67, 80), *range(16, 32), 33, *range(0, 7)])
    k_cache, v_cache, want_k, want_v = (torch.zeros(num_slots, kv_heads, dim) for _ in range(4))
    k_cache, v_cache = k_cache.to(dtype), v_cache.to(dtype)
    q = cpu_kernels.rope_and_write(qkv, positions, cos_sin, slots, k_cache, v_cache, heads)
    want_q = rotary.rope_and_write(qkv, positions, Rope(cos_sin), None, slots, want_k, want_v, heads)
    torch.testing.assert_close(q, want_q, atol=1e-6, rtol=1e-6)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(keys_of(k_cache), want_k.to(dtype), atol=1e-6, rtol=tolerance)
    assert torch.equal(values_of(v_cache), want_v.to(dtype))


def keys_of(cache: torch.Tensor) -> torch.Tensor:
    """The order of `csrc/cpu/api.h` → [slots, KVH, D]."""
    num_slots, kv_heads, dim = cache.shape
    pair = 1 if cache.dtype == torch.float32 else 2
    tiles = cache.view(num_slots // 16, kv_heads, dim // pair, 16, pair)
    return tiles.permute(0, 3, 1, 2, 4).reshape(cache.shape)


def values_of(cache: torch.Tensor) -> torch.Tensor:
    """The order of `csrc/cpu/api.h` → [slots, KVH, D]."""
    num_slots, kv_heads, dim = cache.shape
    pair = 1 if cache.dtype == torch.float32 else 2
    tiles = cache.view(num_slots // 16, kv_heads, dim // 16, 16 // pair, 16, pair)
    return tiles.permute(0, 3, 5, 1, 2, 4).reshape(cache.shape)


@every_instructions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backend_gives_the_dtype_of_the_queries(cpu_instructions: str, dtype: torch.dtype) -> None:
    backend = CpuAttentionBackend(16)
    batch = Batch(MIXED, 16, 6, 2, 64, dtype, seed=5)
    k_cache, v_cache = written(batch)
    (prepared,) = backend.prepare(batch.metadata(True), [batch.spec()])
    out = backend.attend(batch.q, k_cache, v_cache, batch.spec(), prepared)
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), batch.reference(batch.spec()), atol=3e-2 if dtype == torch.bfloat16 else 4e-6, rtol=0
    )


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_library_is_looked_for_where_it_is_built() -> None:
    assert Path(vllm.__file__).parent / "cpu_kernels.so" == cpu_library._LIBRARY


SPEC = AttentionSpec(num_heads=6, num_kv_heads=2, head_dim=64, v_dim=64, scale=0.125, dtype=torch.float32)


@every_instructions
@pytest.mark.parametrize("turned", [0, 32, 64])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_backend_turns_part_of_normalised_heads(
    cpu_instructions: str, turned: int, interleaved: bool, norms: bool
) -> None:
    heads, kv_heads, dim, num_slots = 6, 2, 64, 32
    qkv = randn(5, (heads + 2 * kv_heads) * dim)
    positions, slots = torch.tensor([3, 4, 5, 0, 9]), torch.tensor([3, 4, 5, 16, 17])
    rope = Rope(randn(10, turned, seed=1), interleaved) if turned else None
    qk_norm = QkNorm(Norm(1e-5), randn(dim, seed=2), randn(dim, seed=3)) if norms else None
    k_cache, v_cache, want_k, want_v = (torch.zeros(num_slots, kv_heads, dim) for _ in range(4))
    backend = CpuAttentionBackend(16)
    q = backend.rope_and_write(qkv, positions, rope, qk_norm, slots, k_cache, v_cache, heads)
    want_q = rotary.rope_and_write(qkv, positions, rope, qk_norm, slots, want_k, want_v, heads)
    torch.testing.assert_close(q, want_q)
    torch.testing.assert_close(keys_of(k_cache)[slots], want_k[slots])
    torch.testing.assert_close(values_of(v_cache)[slots], want_v[slots])


@every_instructions
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 4e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(
    "changes",
    [{"window": w, "scale": 0.3} for w in (1, 16, 33, 34, 64, 200)] + [{"softcap": 2.0}, {"sinks": True}],
    ids=str,
)
def test_backend_has_windows_caps_and_sinks(
    cpu_instructions: str, dtype: torch.dtype, tolerance: float, changes: dict[str, Any]
) -> None:
    # Extents of 33 and 70 keys, shorter and longer than the windows, beside prompts without one.
    batch = Batch(MIXED, 16, 6, 2, 64, dtype, seed=9)
    spec, plain = batch.spec(**changes), batch.spec()
    sinks = randn(6, seed=4).to(dtype) if spec.sinks else None
    backend = CpuAttentionBackend(16)
    assert backend.misfit(spec) is None
    prepared = backend.prepare(batch.metadata(True), [plain, spec])
    k_cache, v_cache = written(batch)
    out = backend.attend(batch.q, k_cache, v_cache, spec, prepared[1], sinks)
    torch.testing.assert_close(out.double(), batch.reference(spec, sinks), atol=tolerance, rtol=0)
    assert (out.double() - batch.reference(plain)).abs().max() > 0.05


@every_instructions
def test_backend_normalises_all_heads_as_one_row(cpu_instructions: str) -> None:
    heads, kv_heads, dim = 4, 2, 32
    qkv, positions, slots = randn(5, 8 * dim), torch.tensor([3, 4, 5, 0, 9]), torch.tensor([3, 4, 5, 16, 17])
    norm = QkNorm(Norm(1e-5, kind="layer", offset=1.0), randn(heads * dim, seed=2), randn(kv_heads * dim, seed=3))
    k_cache, v_cache, want_k, want_v = (torch.zeros(32, kv_heads, dim) for _ in range(4))
    q = CpuAttentionBackend(16).rope_and_write(qkv, positions, None, norm, slots, k_cache, v_cache, heads)
    want_q = rotary.rope_and_write(qkv, positions, None, norm, slots, want_k, want_v, heads)
    torch.testing.assert_close(q, want_q)
    torch.testing.assert_close(keys_of(k_cache)[slots], want_k[slots])


def test_what_the_kernels_do_not_take_is_left_to_torch(caplog: pytest.LogCaptureFixture) -> None:
    misfits: list[tuple[dict[str, Any], str]] = [
        ({"head_dim": 20, "v_dim": 20}, "head_dim 20 is no multiple of 16 up to 512"),
        ({"head_dim": 528, "v_dim": 528}, "head_dim 528 is no multiple of 16 up to 512"),
        ({"num_heads": 258}, "129 query heads share a KV head, more than 128"),
        ({"dtype": torch.float16}, "dtype float16 is neither float32 nor bfloat16"),
        ({"v_dim": 32}, "values of 32 beside keys of 64"),
        ({}, "--block-size 8 is no multiple of 16"),
    ]
    for changes, why in misfits:
        caplog.clear()
        backend = get_backend("cpu", [SPEC, replaced(SPEC, **changes)], 16 if changes else 8, CPU)
        assert isinstance(backend, TorchAttentionBackend)
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert f"do not serve this model ({why}); torch computes its attention" in caplog.text


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library is looked for again, and again after the test."""
    cpu_kernels.library.cache_clear()
    yield
    monkeypatch.undo()
    cpu_kernels.library.cache_clear()


@pytest.mark.parametrize(
    ("content", "why"), [(None, "are not built .* is missing"), (b"no library", "cannot be loaded")]
)
def test_without_the_library_torch_computes_and_says_so_once(
    unloaded: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    content: bytes | None,
    why: str,
) -> None:
    path = tmp_path / "cpu_kernels.so"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(cpu_library, "_LIBRARY", path)
    for _ in range(2):
        assert isinstance(get_backend("CPU", [SPEC], 16, CPU), TorchAttentionBackend)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert re.search(f"{why}.*torch computes instead", caplog.text)


def test_unknown_instructions(unloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu_library._LIBRARY.exists():
        pytest.skip("the compiled CPU kernels are not built")
    monkeypatch.setenv("VLLM_CPU_INSTRUCTIONS", "sse2")
    with pytest.raises(
        StartupError, match=r"VLLM_CPU_INSTRUCTIONS is 'sse2'; it takes avx2, avx512, avx512_bf16, amx\."
    ):
        get_backend("CPU", [SPEC], 16, CPU)


def test_the_backend_is_for_the_cpu() -> None:
    with pytest.raises(StartupError, match="--attention-backend CPU computes on --device cpu"):
        get_backend("CPU", [SPEC], 16, torch.device("cuda"))
