"""Copies and block tables of the KV memory, and where pinned extents go."""

from __future__ import annotations

import random

import pytest
import torch

from vllm.kv_cache.spec import PagedKV, Row
from vllm.step import FreedSequence
from vllm.worker.cache_engine import CacheEngine, Extent, PinnedBlockPool

BLOCK = 4
ROW = Row(2, 3, torch.float32)
LAYERS = [PagedKV(ROW, ROW)] * 2


@pytest.fixture
def cache() -> CacheEngine:
    """Two layers; every slot of every tensor holds its own number."""
    cache = CacheEngine(
        layers=LAYERS,
        num_blocks=8,
        block_size=BLOCK,
        max_num_seqs=4,
        max_blocks_per_seq=6,
        device=torch.device("cpu"),
    )
    for i, tensor in enumerate((*cache.k_caches, *cache.v_caches)):
        tensor.copy_(1000 * i + torch.arange(tensor.numel()).view_as(tensor))
    return cache


def contents(cache: CacheEngine) -> list[torch.Tensor]:
    return [t.view(8, BLOCK, 2, 3).clone() for t in (*cache.k_caches, *cache.v_caches)]


@pytest.mark.parametrize(
    "pairs",
    [
        [(0, 5)],
        [(0, 1), (1, 2), (2, 3)],
        [(2, 3), (1, 2), (0, 1)],
        [(0, 1), (1, 0)],
        [(4, 5), (4, 6), (5, 7)],
    ],
)
def test_copy_reads_all_sources_first(cache: CacheEngine, pairs: list[tuple[int, int]]) -> None:
    before = contents(cache)
    cache.copy(pairs)
    source_of = {destination: source for source, destination in pairs}
    for old, new in zip(before, contents(cache), strict=True):
        for block in range(8):
            assert torch.equal(new[block], old[source_of.get(block, block)]), block


def test_copy_of_nothing(cache: CacheEngine) -> None:
    before = contents(cache)
    cache.copy([])
    assert all(map(torch.equal, before, contents(cache)))


def test_free_forgets_a_block_table(cache: CacheEngine) -> None:
    cache.set_blocks([(0, 0, [1, 2]), (1, 0, [3]), (1, 1, [4, 5]), (1, 0, [6])])
    assert cache.block_tables[0, :2].tolist() == [1, 2]
    assert cache.block_tables[1, :3].tolist() == [6, 4, 5], "of two updates of an entry the later one counts"
    cache.free(FreedSequence(row=0, is_system_prompt=False))
    with pytest.raises(RuntimeError, match="row 0 has 0 blocks, cannot add at 2"):
        cache.set_blocks([(0, 2, [7])])
    cache.set_blocks([(1, 3, [7]), (0, 0, [2])])
    assert cache.block_tables[1, :4].tolist() == [6, 4, 5, 7]


def test_free_of_a_system_prompt_leaves_its_blocks_as_they_are(cache: CacheEngine) -> None:
    cache.set_blocks([(3, 0, [6, 7]), (0, 0, [6, 7])])
    before = contents(cache)
    cache.free(FreedSequence(row=3, is_system_prompt=True))
    assert all(map(torch.equal, before, contents(cache)))
    cache.set_blocks([(0, 2, [5]), (3, 0, [1])])
    assert cache.block_tables[0, :3].tolist() == [6, 7, 5] and cache.block_tables[3, 0] == 1


def test_extent_is_a_slice(cache: CacheEngine) -> None:
    assert cache.extent_slots(5, 7) == slice(20, 27)


def test_bytes_per_block(cache: CacheEngine) -> None:
    tensors = (*cache.k_caches, *cache.v_caches)
    assert 8 * CacheEngine.bytes_per_block(LAYERS, BLOCK) == sum(t.nbytes for t in tensors)


# The pinned part ---------------------------------------------------------------------------------------------------


def pin(pool: PinnedBlockPool, owner: str, num_blocks: int) -> Extent:
    start = pool.find_window(num_blocks)
    assert start is not None
    extent = Extent(start, num_blocks)
    pool.pin(owner, (extent,))
    return extent


def test_nothing_is_held_back_at_first() -> None:
    pool = PinnedBlockPool(100, 50, 10)
    assert (pool.wall, pool.pinned_blocks, pool.extents) == (100, 0, {})


def test_wall_falls_and_rises() -> None:
    pool = PinnedBlockPool(100, 100, 10)
    assert pin(pool, "a", 10) == Extent(90, 10)
    assert pin(pool, "b", 5) == Extent(85, 5)
    assert pin(pool, "c", 20) == Extent(65, 20)
    assert pool.wall == 65
    assert pool.unpin("b") == (Extent(85, 5),)
    assert pool.wall == 65, "the lowest extent is where it was"
    pool.unpin("c")
    assert pool.wall == 90, "over the hole that b left, too"
    pool.unpin("a")
    assert (pool.wall, pool.pinned_blocks) == (100, 0)


def test_tightest_hole_first() -> None:
    pool = PinnedBlockPool(100, 100, 10)
    for owner, size in (("a", 10), ("x", 1), ("b", 4), ("y", 1), ("c", 6), ("z", 1)):
        pin(pool, owner, size)
    for owner in "abc":
        pool.unpin(owner)
    # Holes of 10 at the top end, 4 and 6 between the others.
    assert pin(pool, "five", 5) == Extent(79, 5), "the hole of 6, at its upper end"
    assert pin(pool, "four", 4) == Extent(85, 4), "the hole of 4"
    assert pin(pool, "ten", 10) == Extent(90, 10), "the hole of 10"
    assert pin(pool, "two", 2) == Extent(75, 2), "no hole fits: under the wall"
    assert pin(pool, "one", 1) == Extent(78, 1), "the block left of the hole of 6"
    pool.check_integrity()


def test_budget_and_floor() -> None:
    assert PinnedBlockPool(100, 50, 60).budget_blocks == 40, "the floor wins"
    assert PinnedBlockPool(100, 30, 60).budget_blocks == 30
    assert PinnedBlockPool(100, 50, 100).budget_blocks == 0
    pool = PinnedBlockPool(100, 30, 60)
    pin(pool, "a", 20)
    assert pool.fits(10) and not pool.fits(11)
    assert pool.find_window(11) is None
    with pytest.raises(ValueError, match="cannot be pinned"):
        pool.pin("b", (Extent(60, 11),))
    pin(pool, "b", 10)
    assert pool.find_window(1) is None
    pool.unpin("a")
    assert pool.fits(20)


def test_no_contiguous_room() -> None:
    pool = PinnedBlockPool(10, 8, 2)
    for owner, size in (("a", 3), ("b", 2), ("c", 3)):
        pin(pool, owner, size)
    pool.unpin("a")
    pool.unpin("c")
    assert pool.fits(6)
    assert pool.find_window(6) is None, "5 blocks lie under b and 3 over it"
    assert pool.find_window(5) == 0
    assert pool.find_room(6, 2) == (Extent(0, 5), Extent(9, 1)), "in pieces, the largest hole first"
    assert pool.find_room(6, 1) is None
    pool.pin("d", (Extent(0, 5), Extent(9, 1)))
    pool.check_integrity()
    assert (pool.wall, pool.pinned_blocks) == (0, 8)
    assert pool.unpin("d") == (Extent(0, 5), Extent(9, 1)) and pool.wall == 5


def test_wrong_use() -> None:
    pool = PinnedBlockPool(20, 20, 0)
    pool.pin("a", (Extent(5, 5),))
    for start, size in ((4, 2), (9, 1), (5, 5), (0, 20), (6, 2)):
        with pytest.raises(ValueError, match=r"overlap: one is a pinned extent|cannot be pinned"):
            pool.pin("b", (Extent(start, size),))
    for start, size in ((-1, 2), (19, 2), (0, 0)):
        with pytest.raises(ValueError, match="cannot be pinned"):
            pool.pin("b", (Extent(start, size),))
    with pytest.raises(ValueError, match="overlap"):
        pool.pin("b", (Extent(12, 2), Extent(13, 2)))
    with pytest.raises(ValueError, match="a is pinned already"):
        pool.pin("a", (Extent(15, 2),))
    with pytest.raises(KeyError):
        pool.unpin("b")
    assert pool.extents == {"a": (Extent(5, 5),)}


@pytest.mark.parametrize("seed", range(10))
def test_random_pins(seed: int) -> None:
    rng = random.Random(seed)
    pool = PinnedBlockPool(64, 48, 8)
    held: dict[str, set[int]] = {}
    for i in range(300):
        if held and rng.random() < 0.5:
            owner = rng.choice(sorted(held))
            extents = pool.unpin(owner)
            assert {b for e in extents for b in range(e.start, e.end)} == held.pop(owner)
        else:
            size = rng.randint(1, 12)
            start = pool.find_window(size)
            taken = set().union(*held.values())
            free = [s for s in range(64 - size + 1) if not taken & set(range(s, s + size))]
            assert (start is not None) == (bool(free) and len(taken) + size <= 48)
            extents = pool.find_room(size, 3)
            assert start is None or extents == (Extent(start, size),)
            if extents is not None:
                pool.pin(str(i), extents)
                held[str(i)] = {b for e in extents for b in range(e.start, e.end)}
                assert len(held[str(i)]) == size and not held[str(i)] & taken and len(extents) <= 3
        pool.check_integrity()
        assert pool.wall == min(set().union(*held.values()), default=64)
