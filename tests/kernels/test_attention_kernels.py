"""Prefix, suffix and merge kernels and the planners of their work, each against its float64 reference."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.kernel_inputs import DEVICE, DTYPES, TOLERANCE, assert_near, poisoned, randn
from vllm.ops.attention.merge import merge_partials, merge_partials_reference
from vllm.ops.attention.metadata import PrefixGroup
from vllm.ops.attention.prefix import (
    PREFIX_FIELDS,
    group_array,
    plan_prefix,
    prefix_attention,
    prefix_attention_reference,
    prefix_tiles,
)
from vllm.ops.attention.suffix import (
    SUFFIX_FIELDS,
    keep_from_merge,
    plan_chunk,
    plan_suffix,
    suffix_attention,
    suffix_attention_reference,
    suffix_tiles,
)
from vllm.ops.attention.tiles import TileConfig

ON_GPU = DEVICE.type == "cuda"
# Long extents and many rows take the interpreter long; these sizes are the nightly run's, and a GPU's.
heavy = () if ON_GPU else pytest.mark.nightly

# (heads, KV heads, head_dim)
SHAPES = [(4, 1, 64), (9, 3, 64), (8, 1, 80), (4, 4, 96), (8, 2, 128), (4, 1, 256)]


def on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(DEVICE)


def check_prefix(
    groups: list[PrefixGroup],
    num_tokens: int,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    tiles: TileConfig,
    num_programs: int = 5,
    max_partials: int = 6,
    use_tma: bool = False,
) -> None:
    heads, kv_heads, dim = shape
    work, counts = plan_prefix(
        group_array(groups),
        num_tokens,
        group_size=heads // kv_heads,
        num_kv_heads=kv_heads,
        tiles=tiles,
        num_programs=num_programs,
        max_partials=max_partials,
        max_work=10**6,
    )
    num_slots = max((g.first_slot + g.length for g in groups), default=0) + 3
    q = randn(num_tokens, heads, dim, dtype=dtype)
    k, v = (randn(num_slots, kv_heads, dim, dtype=dtype, seed=i) for i in (1, 2))
    # Slots that no group may read hold values that would show, also with weight 0.
    foreign = torch.ones(num_slots, dtype=torch.bool)
    for g in groups:
        foreign[g.first_slot : g.first_slot + g.length] = False
    if not use_tma:
        k[foreign.to(DEVICE)] = v[foreign.to(DEVICE)] = float("nan")
    parts = max_partials
    out, lse = poisoned(parts, num_tokens, heads, dim), poisoned(parts, num_tokens, heads)
    want, want_lse = poisoned(parts, num_tokens, heads, dim), poisoned(parts, num_tokens, heads)
    prefix_attention_reference(q, k, v, dim**-0.5, on_device(work), want, want_lse)
    size = torch.tensor([len(work)], dtype=torch.int32, device=DEVICE)
    # Items behind the end of the list are of an earlier step.
    stale = np.concatenate((work, np.full((2, PREFIX_FIELDS), 1, np.int32)))
    prefix_attention(q, k, v, dim**-0.5, on_device(stale), size, out, lse, tiles, num_programs, use_tma)
    written = torch.arange(parts, device=DEVICE)[:, None] < on_device(counts)
    for result, expected in ((out, want), (lse, want_lse)):
        assert torch.equal(torch.isnan(result).flatten(2).any(-1), ~written)
        assert torch.equal(torch.isnan(expected).flatten(2).any(-1), ~written)
    if written.any():
        assert_near(out[written], want[written], TOLERANCE[dtype])
        assert_near(lse[written], want_lse[written], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefix_of_two_groups(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    groups = [PrefixGroup(0, 3, 5, 37), PrefixGroup(4, 2, 64, 16)]
    check_prefix(groups, 7, shape, dtype, prefix_tiles(16, shape[2], dtype))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, pytest.param(4097, marks=heavy)])
def test_prefix_lengths(length: int) -> None:
    check_prefix([PrefixGroup(1, 2, 7, length)], 4, (8, 2, 64), torch.float32, TileConfig(16, 32, 4, 2, 2))


@pytest.mark.parametrize("tokens", [1, 5, 33, pytest.param(300, marks=heavy)])
@pytest.mark.parametrize("block_m", [16, 64, 128])
def test_prefix_rows(tokens: int, block_m: int) -> None:
    tiles = TileConfig(block_m, 64, 4 if block_m < 128 else 8, 2, 1)
    check_prefix([PrefixGroup(0, tokens, 0, 70)], tokens, (6, 2, 64), torch.bfloat16, tiles)


def test_prefix_split_over_the_extent() -> None:
    groups = [PrefixGroup(0, 2, 0, 1000), PrefixGroup(2, 1, 1000, 530), PrefixGroup(3, 1, 1530, 40)]
    check_prefix(groups, 4, (4, 1, 64), torch.float32, TileConfig(16, 64, 4, 2, 2), num_programs=12)


def test_prefix_chains() -> None:
    # Tokens 0-1 read A, 2-3 A then B, 4 only B, 5-6 B then C: parts of one group start at different indexes.
    groups = [
        PrefixGroup(0, 4, 0, 300),
        PrefixGroup(2, 5, 320, 20),
        PrefixGroup(5, 2, 340, 600),
    ]
    check_prefix(groups, 7, (4, 2, 64), torch.float32, TileConfig(16, 64, 4, 2, 2), num_programs=16, max_partials=5)


def test_prefix_without_work() -> None:
    check_prefix([], 3, (4, 2, 64), torch.float32, TileConfig(16, 32, 4, 2, 2))
    check_prefix([PrefixGroup(0, 3, 0, 0)], 3, (4, 2, 64), torch.float32, TileConfig(16, 32, 4, 2, 2))


@pytest.mark.parametrize("dim", [64, 128])
def test_prefix_through_tensor_descriptors(dim: int) -> None:
    if ON_GPU and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need a Hopper GPU")
    groups = [PrefixGroup(0, 20, 5, 150), PrefixGroup(20, 3, 155, 64)]
    check_prefix(groups, 23, (8, 2, dim), torch.bfloat16, TileConfig(64, 64, 4, 2, 1), use_tma=True)


def suffix_case(
    sequences: list[tuple[int, int]], block_size: int, seed: int
) -> tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray, int]:
    """Block tables with shuffled blocks (rows in another order than the sequences), and the planner's arrays."""
    rng = random.Random(seed)
    queries, contexts = (np.array(x, np.int64) for x in zip(*sequences, strict=True))
    blocks = -(-contexts // block_size)
    free = list(range(int(blocks.sum()) + 3))
    rng.shuffle(free)
    rows = np.array(rng.sample(range(len(sequences) + 2), len(sequences)))
    tables = torch.full((len(sequences) + 2, int(blocks.max(initial=0)) + 1), 10**6, dtype=torch.int64)
    for row, n in zip(rows, blocks, strict=True):
        tables[row, :n] = torch.tensor([free.pop() for _ in range(n)])
    return tables.to(DEVICE), queries, contexts, rows, (int(blocks.sum()) + 3) * block_size


def check_suffix(
    sequences: list[tuple[int, int]],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    tiles: TileConfig,
    block_size: int = 16,
    num_programs: int = 5,
    max_partials: int = 4,
    base: int = 0,
) -> None:
    heads, kv_heads, dim = shape
    tables, queries, contexts, rows, num_slots = suffix_case(sequences, block_size, len(sequences))
    num_tokens = int(queries.sum())
    counts = np.full(num_tokens, base, np.int32)
    work = plan_suffix(
        queries.cumsum() - queries,
        queries,
        contexts,
        rows,
        counts,
        group_size=heads // kv_heads,
        num_kv_heads=kv_heads,
        tiles=tiles,
        num_programs=num_programs,
        max_partials=max_partials,
        max_work=10**6,
    )
    q = randn(num_tokens, heads, dim, dtype=dtype)
    k, v = (poisoned(num_slots, kv_heads, dim, dtype=dtype) for _ in range(2))
    for row, n in zip(rows.tolist(), contexts.tolist(), strict=True):
        own = torch.arange(n, device=DEVICE)
        slots = tables[row, own // block_size] * block_size + own % block_size
        k[slots], v[slots] = (randn(n, kv_heads, dim, dtype=dtype, seed=10 * row + i) for i in range(2))
    out, lse = poisoned(max_partials, num_tokens, heads, dim), poisoned(max_partials, num_tokens, heads)
    want, want_lse = out.clone(), lse.clone()
    suffix_attention_reference(q, k, v, dim**-0.5, tables, block_size, on_device(work), want, want_lse)
    size = torch.tensor([len(work)], dtype=torch.int32, device=DEVICE)
    stale = np.concatenate((work, np.full((2, SUFFIX_FIELDS), 1, np.int32)))
    suffix_attention(q, k, v, dim**-0.5, tables, block_size, on_device(stale), size, out, lse, tiles, num_programs)
    index = torch.arange(max_partials, device=DEVICE)[:, None]
    written = (index >= base) & (index < on_device(counts))
    for result, expected in ((out, want), (lse, want_lse)):
        assert torch.equal(torch.isnan(result).flatten(2).any(-1), ~written)
        assert torch.equal(torch.isnan(expected).flatten(2).any(-1), ~written)
    if not written.any():
        return
    assert_near(out[written], want[written], TOLERANCE[dtype])
    lse, want_lse = lse[written], want_lse[written]
    empty = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert_near(lse[~empty], want_lse[~empty], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_suffix_of_a_decode_step(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check_suffix([(1, 1), (1, 40), (1, 0), (1, 17)], shape, dtype, suffix_tiles(16, shape[2], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_suffix_of_a_mixed_batch(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    tiles = TileConfig(64, 32, 4, 2, 1) if shape[2] < 256 else suffix_tiles(64, shape[2], dtype)
    check_suffix([(20, 20), (1, 35), (7, 50), (2, 2)], shape, dtype, tiles)


@pytest.mark.parametrize("block_size", [1, 4, 16, 64, 128])
def test_suffix_block_sizes(block_size: int) -> None:
    check_suffix([(1, 70), (5, 40)], (4, 2, 64), torch.float32, TileConfig(16, 32, 4, 2, 2), block_size=block_size)


def test_suffix_split_over_the_keys() -> None:
    # Parts go behind those of the prefix; a tile of prefill is split as well, so some rows see nothing of a part.
    tiles = TileConfig(16, 32, 4, 2, 2)
    check_suffix([(1, 700), (1, 300), (6, 400), (1, 20)], (4, 2, 64), torch.float32, tiles, max_partials=5, base=1)
    rows_without_keys = TileConfig(128, 32, 4, 2, 2)
    check_suffix([(60, 260)], (4, 2, 64), torch.float32, rows_without_keys, num_programs=8)


def test_suffix_long_prefill() -> None:
    check_suffix([(150, 150), (1, 1100), (130, 420)], (4, 2, 128), torch.bfloat16, TileConfig(128, 64, 8, 3, 1))


def test_suffix_without_work() -> None:
    check_suffix([(1, 0), (1, 0)], (4, 2, 64), torch.float32, TileConfig(16, 32, 4, 2, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("parts", "heads", "dim"), [(1, 4, 64), (5, 9, 64), (40, 2, 80), (3, 8, 256)])
def test_merge(dtype: torch.dtype, parts: int, heads: int, dim: int) -> None:
    tokens = 6
    partial, lse = randn(parts, tokens, heads, dim), 20 * randn(parts, tokens, heads, seed=1)
    counts = torch.tensor([parts, 0, 1, parts // 2, parts, parts], dtype=torch.int32, device=DEVICE)
    lse[:, 4] = float("-inf")
    partial[:, 4] = 0.0
    lse[: parts - 1, 5] = float("-inf")
    for token, count in enumerate(counts.tolist()):
        partial[count:, token] = float("nan")
        lse[count:, token] = float("nan")
    out = poisoned(tokens, heads, dim, dtype=dtype)
    want = out.clone()
    merge_partials(partial, lse, counts, out)
    merge_partials_reference(partial, lse, counts, want)
    assert_near(out, want, TOLERANCE[dtype])
    assert not out[1].any() and not out[4].any()


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_merge_of_parts_of_very_different_weight(offset: float) -> None:
    # exp(300) overflows float32: only differences of log-sum-exps may be exponentiated.
    partial, lse = randn(2, 1, 2, 64), torch.tensor([[[offset] * 2], [[0.0] * 2]], device=DEVICE)
    out = poisoned(1, 2, 64)
    merge_partials(partial, lse, torch.tensor([2], dtype=torch.int32, device=DEVICE), out)
    assert torch.equal(out, partial[0 if offset > 0 else 1])


def random_groups(rng: random.Random) -> tuple[list[PrefixGroup], int]:
    groups, token = [], rng.randrange(3)
    for _ in range(rng.randrange(1, 12)):
        n = rng.choice([1, 1, 7, 40, 300])
        groups.append(PrefixGroup(token, n, rng.randrange(1000), rng.choice([1, 64, 65, 2000, 33000])))
        if rng.random() < 0.3:
            groups.append(PrefixGroup(token + n // 3, n - n // 3, rng.randrange(1000), rng.randrange(1, 5000)))
        token += n + rng.randrange(2)
    return groups, token + 1


@pytest.mark.parametrize("seed", range(40))
def test_prefix_plan_covers_every_key_once(seed: int) -> None:
    rng = random.Random(seed)
    groups, num_tokens = random_groups(rng)
    share, max_partials = rng.choice([1, 3, 4, 8]), rng.choice([2, 3, 12])
    tiles = TileConfig(rng.choice([16, 128]), 64, 4, 2, 1)
    work, counts = plan_prefix(
        group_array(groups),
        num_tokens,
        group_size=share,
        num_kv_heads=rng.choice([1, 8]),
        tiles=tiles,
        num_programs=132,
        max_partials=max_partials,
        max_work=10**6,
    )
    assert work.dtype == counts.dtype == np.int32 and counts.max() <= max_partials
    seen: dict[int, list[tuple[int, int, int, int]]] = {t: [] for t in range(num_tokens)}
    for first, n, slot, begin, end, _, split in work.tolist():
        assert 0 < n * share <= tiles.block_m and 0 <= begin < end and begin % tiles.block_n == 0
        for token in range(first, first + n):
            seen[token].append((split, slot, begin, end))
    for token, parts in seen.items():
        parts.sort()
        assert [p[0] for p in parts] == list(range(counts[token]))
        want = [(g.first_slot, 0, g.length) for g in groups if g.first_token <= token < g.first_token + g.num_tokens]
        got: list[tuple[int, int, int]] = []
        for _, slot, begin, end in parts:
            if begin and got[-1][0] == slot and got[-1][2] == begin:
                got[-1] = (slot, got[-1][1], end)
            else:
                got.append((slot, begin, end))
        assert got == want


def test_prefix_plan_fills_the_device() -> None:
    def items(tokens: int, length: int, tiles: TileConfig) -> int:
        programs = 132 * tiles.programs_per_sm
        work, _ = plan_prefix(
            np.array([[0, tokens, 0, length, 0]]),
            tokens,
            group_size=4,
            num_kv_heads=8,
            tiles=tiles,
            num_programs=programs,
            max_partials=48,
            max_work=10**5,
        )
        rounds = -(-len(work) * 8 // programs)
        longest = int((work[:, 4] - work[:, 3]).max())
        # Time of all rounds of the longest item, against the keys of all items spread evenly.
        assert rounds * longest <= 1.15 * length * 8 * -(-tokens * 4 // tiles.block_m) / programs + tiles.block_n
        return len(work)

    items(256, 32768, prefix_tiles(1024, 128, torch.bfloat16))
    items(64, 32768, prefix_tiles(256, 128, torch.bfloat16))
    items(256, 8192, prefix_tiles(1024, 128, torch.bfloat16))
    items(1, 32768, prefix_tiles(4, 128, torch.bfloat16))


def test_plans_are_refused_when_they_do_not_fit() -> None:
    tiles = TileConfig(16, 64, 4, 2, 2)
    common = {"group_size": 4, "num_kv_heads": 2, "tiles": tiles, "num_programs": 8}
    groups = np.array([[0, 4, 0, 64, 0], [0, 4, 64, 64, 64], [0, 4, 128, 64, 128]])
    with pytest.raises(ValueError, match="a chain of 3 extents; at most 2"):
        plan_prefix(groups, 4, max_partials=2, max_work=100, **common)
    with pytest.raises(ValueError, match="need 3 work items, not 2"):
        plan_prefix(groups, 4, max_partials=4, max_work=2, **common)
    one = np.ones(2, np.int64)
    with pytest.raises(ValueError, match="has 4 parts already; at most 4"):
        plan_suffix(np.arange(2), one, one, np.arange(2), np.full(2, 4), max_partials=4, max_work=9, **common)
    with pytest.raises(ValueError, match="2 sequences need 2 work items, not 1"):
        plan_suffix(np.arange(2), one, one, np.arange(2), np.zeros(2, int), max_partials=4, max_work=1, **common)


def test_plans_of_256_sequences_are_made_in_a_fraction_of_a_step() -> None:
    tiles = TileConfig(128, 128, 8, 2, 1)
    groups = np.stack((np.arange(8) * 32, np.full(8, 32), np.arange(8) * 8192, np.full(8, 8192), np.zeros(8, int)), 1)
    common = {"group_size": 4, "num_kv_heads": 8, "num_programs": 132, "max_work": 4000}
    contexts = np.random.default_rng(0).integers(1, 2000, 256)
    ones, index = np.ones(256, np.int64), np.arange(256)
    best = [1.0, 1.0]
    for _ in range(20):
        start = time.perf_counter()
        _, counts = plan_prefix(groups, 256, tiles=tiles, max_partials=9, **common)
        middle = time.perf_counter()
        plan_suffix(
            index, ones, contexts, index, counts, tiles=suffix_tiles(4, 128, torch.bfloat16), max_partials=12, **common
        )
        best = [min(best[0], middle - start), min(best[1], time.perf_counter() - middle)]
    # Around 0.1 ms each on an idle core; the bound leaves room for a busy one.
    assert max(best) < 1e-3, best


hopper_only = pytest.mark.skipif(
    not ON_GPU or torch.cuda.get_device_capability()[0] != 9, reason="the kernel uses instructions that only Hopper has"
)
HOPPER_SHAPES = [((32, 8, 128), torch.bfloat16), ((6, 2, 64), torch.float16)]


def only(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """Leaves NaN in all slots but these: they would show, also with weight 0."""
    foreign = torch.ones(len(k), dtype=torch.bool, device=DEVICE)
    foreign[slots] = False
    k[foreign] = v[foreign] = float("nan")


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129, 4097])
@pytest.mark.parametrize(("shape", "dtype"), HOPPER_SHAPES)
def test_hopper_kernel_over_extents(length: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    from vllm.ops.attention.hopper import TILES, hopper_attention

    heads, kv_heads, dim = shape
    for tokens in (1, 31, 100, 300):
        groups = [PrefixGroup(0, tokens, 5, length), PrefixGroup(tokens, 3, 5 + length, 200)]
        work, counts = plan_prefix(
            group_array(groups),
            tokens + 4,
            group_size=heads // kv_heads,
            num_kv_heads=kv_heads,
            tiles=TILES,
            num_programs=20,
            max_partials=6,
            max_work=10**6,
        )
        q = randn(tokens + 4, heads, dim, dtype=dtype)
        k, v = (randn(length + 400, kv_heads, dim, dtype=dtype, seed=i) for i in (1, 2))
        only(k, v, torch.arange(5, 205 + length, device=DEVICE))
        out, lse = poisoned(6, tokens + 4, heads, dim), poisoned(6, tokens + 4, heads)
        want, want_lse = out.clone(), lse.clone()
        prefix_attention_reference(q, k, v, dim**-0.5, on_device(work), want, want_lse)
        size = torch.tensor([len(work)], dtype=torch.int32, device=DEVICE)
        hopper_attention(q, k, v, dim**-0.5, on_device(work), size, out, lse, 7)
        written = torch.arange(6, device=DEVICE)[:, None] < on_device(counts)
        for result, expected in ((out, want), (lse, want_lse)):
            assert torch.equal(torch.isnan(result).flatten(2).any(-1), ~written)
            assert_near(result[written], expected[written], TOLERANCE[dtype])


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 128), (0, 1000), (5, 333), (4096, 129), (37, 4096)])
@pytest.mark.parametrize(("shape", "dtype"), HOPPER_SHAPES)
def test_hopper_kernel_over_chunks_of_a_prefill(
    start: int, count: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Consecutive slots are blocks in order, so the reference is that of the paged kernel."""
    from vllm.ops.attention.hopper import TILES, hopper_attention

    heads, kv_heads, dim = shape
    work = plan_chunk(16, start, count, TILES.tokens(heads // kv_heads))
    q = randn(count, heads, dim, dtype=dtype)
    k, v = (randn(16 + start + count + 200, kv_heads, dim, dtype=dtype, seed=i) for i in (1, 2))
    only(k, v, torch.arange(16, 16 + start + count, device=DEVICE))
    out = poisoned(1, count, heads, dim).to(dtype)
    want, lse = poisoned(1, count, heads, dim), poisoned(1, count, heads)
    tables = torch.arange(1, 2 + (start + count) // 16, device=DEVICE).unsqueeze(0)
    paged = work.copy()
    paged[:, 2] = 0
    suffix_attention_reference(q, k, v, dim**-0.5, tables, 16, on_device(paged), want, lse)
    size = torch.tensor([len(work)], dtype=torch.int32, device=DEVICE)
    hopper_attention(q, k, v, dim**-0.5, on_device(work), size, out, None, 9, causal=True)
    assert_near(out, want, TOLERANCE[dtype])


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("block_size", [8, 16, 32, 128])
@pytest.mark.parametrize(("shape", "dtype"), HOPPER_SHAPES)
@pytest.mark.parametrize("max_partials", [1, 5])
def test_hopper_kernel_over_blocks(
    block_size: int, shape: tuple[int, int, int], dtype: torch.dtype, max_partials: int
) -> None:
    from vllm.ops.attention.hopper import TILES, hopper_attention

    heads, kv_heads, dim = shape
    queries, contexts = np.array([1, 40, 300, 129, 7, 64, 20]), np.array([1, 40, 300, 4097, 700, 129, 0])
    counts = np.zeros(queries.sum(), np.int32)
    work = plan_suffix(
        queries.cumsum() - queries,
        queries,
        contexts,
        np.arange(len(queries)),
        counts,
        group_size=heads // kv_heads,
        num_kv_heads=kv_heads,
        tiles=TILES,
        num_programs=20,
        max_partials=max_partials,
        max_work=10**6,
    )
    width = -(-4097 // block_size)
    tables = torch.randperm(len(queries) * width, device=DEVICE).view(len(queries), width)
    q = randn(len(counts), heads, dim, dtype=dtype)
    k, v = (randn(len(queries) * width * block_size, kv_heads, dim, dtype=dtype, seed=i) for i in (1, 2))
    owned = [
        tables[i, own // block_size] * block_size + own % block_size
        for i, own in enumerate(torch.arange(n, device=DEVICE) for n in contexts.tolist())
    ]
    only(k, v, torch.cat(owned))
    out, lse = poisoned(max_partials, len(counts), heads, dim), poisoned(max_partials, len(counts), heads)
    want, want_lse = out.clone(), lse.clone()
    suffix_attention_reference(q, k, v, dim**-0.5, tables, block_size, on_device(work), want, want_lse)
    size = torch.tensor([len(work)], dtype=torch.int32, device=DEVICE)
    hopper_attention(
        q,
        k,
        v,
        dim**-0.5,
        on_device(work),
        size,
        out,
        lse,
        7,
        block_tables=tables,
        block_size=block_size,
        causal=True,
    )
    written = torch.arange(max_partials, device=DEVICE)[:, None] < on_device(counts)
    assert torch.equal(torch.isnan(out).flatten(2).any(-1), ~written)
    assert_near(out[written], want[written], TOLERANCE[dtype])
    empty = torch.isinf(want_lse[written])
    assert torch.equal(torch.isinf(lse[written]), empty)
    assert_near(lse[written][~empty], want_lse[written][~empty], TOLERANCE[dtype])


def _mixed_plan(tiles: TileConfig, group_size: int, kv_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Five sequences: the second reads an extent too, the third is split, the others have one part."""
    queries, contexts = np.array([3, 2, 1, 5, 1]), np.array([20, 30, 700, 5, 40])
    counts = np.zeros(12, np.int32)
    counts[3:5] = 1
    work = plan_suffix(
        queries.cumsum() - queries,
        queries,
        contexts,
        np.arange(5),
        counts,
        group_size=group_size,
        num_kv_heads=kv_heads,
        tiles=tiles,
        num_programs=64,
        max_partials=4,
        max_work=10**6,
    )
    return work, counts


def test_tokens_with_one_part_are_kept_from_the_merge() -> None:
    tiles, (heads, kv_heads, dim) = TileConfig(16, 32, 4, 2, 2), (4, 2, 32)
    work, counts = _mixed_plan(tiles, heads // kv_heads, kv_heads)
    q = randn(12, heads, dim)
    k, v = (randn(5 * 704, kv_heads, dim, seed=i) for i in (1, 2))
    tables = torch.randperm(5 * 44, device=DEVICE).view(5, 44)
    parts = int(counts.max())
    reference, reference_lse = (
        x.nan_to_num(0.5) for x in (poisoned(parts, 12, heads, dim), poisoned(parts, 12, heads))
    )
    partial, lse = reference.clone(), reference_lse.clone()
    suffix_attention_reference(q, k, v, dim**-0.5, tables, 16, on_device(work), reference, reference_lse)
    want, out = poisoned(12, heads, dim), poisoned(12, heads, dim)
    merge_partials_reference(reference, reference_lse, on_device(counts), want)

    keep_from_merge([work], counts)
    assert counts.tolist() == [-1] * 3 + [2] * 2 + [parts] + [-1] * 6 and parts > 2
    size = torch.tensor([len(work)], dtype=torch.int32, device=DEVICE)
    suffix_attention(q, k, v, dim**-0.5, tables, 16, on_device(work), size, partial, lse, tiles, 3, whole=out)
    assert torch.equal(out.isnan().flatten(1).any(-1), on_device(counts) > 0)
    done = out.clone()
    merge_partials(partial, lse, on_device(counts), out)
    assert_near(out, want, TOLERANCE[torch.float32])
    merge_partials(partial, lse, on_device(counts), done, on_device(np.flatnonzero(counts >= 0)))
    assert torch.equal(done, out)


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize(("shape", "dtype"), HOPPER_SHAPES)
def test_hopper_kernel_keeps_tokens_with_one_part_from_the_merge(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    from vllm.ops.attention.hopper import TILES, hopper_attention

    heads, kv_heads, dim = shape
    work, counts = _mixed_plan(TILES, heads // kv_heads, kv_heads)
    q = randn(12, heads, dim, dtype=dtype)
    k, v = (randn(5 * 704, kv_heads, dim, dtype=dtype, seed=i) for i in (1, 2))
    tables = torch.randperm(5 * 44, device=DEVICE).view(5, 44)
    partial, lse, out = poisoned(4, 12, heads, dim), poisoned(4, 12, heads), poisoned(12, heads, dim).to(dtype)
    want, want_lse = partial.clone(), lse.clone()
    suffix_attention_reference(q, k, v, dim**-0.5, tables, 16, on_device(work), want, want_lse)
    alone = on_device(counts) == 1
    keep_from_merge([work], counts)
    size = torch.tensor([len(work)], dtype=torch.int32, device=DEVICE)
    hopper_attention(
        q,
        k,
        v,
        dim**-0.5,
        on_device(work),
        size,
        partial,
        lse,
        7,
        whole=out,
        block_tables=tables,
        block_size=16,
        causal=True,
    )
    assert torch.equal(out.isnan().flatten(1).any(-1), ~alone)
    assert torch.isnan(partial[:, alone]).all()
    assert_near(out[alone], want[0, alone], TOLERANCE[dtype])


def test_chunks_are_cut_into_tiles_longest_first() -> None:
    work = plan_chunk(7, 100, 70, 32)
    assert work.tolist() == [[64, 6, 7, 0, 170, 164, 0], [32, 32, 7, 0, 164, 132, 0], [0, 32, 7, 0, 132, 100, 0]]
