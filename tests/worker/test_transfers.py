"""Extents to the host and back, and snapshots beside the steps, as plans say."""

from __future__ import annotations

import mmap
from pathlib import Path

import msgspec
import psutil
import pytest
import torch

from tests.system_prompt_store.test_store import IDENTITY
from vllm.kv_cache.spec import PagedKV, Row
from vllm.step import EndedJob, ExtentCopy, HostImage, SnapshotJob, StepPlan
from vllm.system_prompt_store import SnapshotRecord, SnapshotStore
from vllm.worker import host_arena
from vllm.worker.cache_engine import CacheEngine
from vllm.worker.transfers import ExtentTransfers

BLOCK, BLOCKS, LAYERS = 4, 12, 3
SHAPE = (2, 5)
BLOCK_BYTES = BLOCK * 2 * 5 * 2


ROW = Row(*SHAPE, torch.bfloat16)


def make_cache(device: str = "cpu", layers: tuple[PagedKV, ...] = (PagedKV(ROW, ROW),) * LAYERS) -> CacheEngine:
    """bfloat16, every slot of every tensor filled at random."""
    cache = CacheEngine(
        layers=layers,
        num_blocks=BLOCKS,
        block_size=BLOCK,
        max_num_seqs=4,
        max_blocks_per_seq=6,
        device=torch.device(device),
    )
    for tensor in (*cache.k_caches, *cache.v_caches):
        tensor.copy_(torch.randn(tensor.shape))
    return cache


def make_store(folder: Path) -> SnapshotStore:
    identity = msgspec.structs.replace(IDENTITY, block_bytes=(BLOCK_BYTES,) * 2 * LAYERS)
    return SnapshotStore(folder / "snapshots", identity, 1 << 20)


def blocks(cache: CacheEngine, start: int, count: int) -> list[torch.Tensor]:
    slots = slice(start * BLOCK, (start + count) * BLOCK)
    return [tensor[slots].clone() for tensor in (*cache.k_caches, *cache.v_caches)]


def copies(
    image: HostImage, where: int | tuple[tuple[int, int], ...], to_host: bool, sizes: tuple[int, ...] = (2, 1)
) -> list[StepPlan]:
    """A step a slice. `where` is the first of three blocks, or several extents."""
    extents = ((where, 3),) if isinstance(where, int) else where
    plans, first = [], 0
    for size in sizes:
        plans.append(StepPlan(transfers=[ExtentCopy(image, extents, first, size, to_host)]))
        first += size
    return plans


def run(transfers: ExtentTransfers, *plans: StepPlan) -> None:
    for plan in plans:
        transfers.join()
        transfers.begin(plan)
    transfers.join()  # Steps after the last copy see what it wrote.


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("start", [None, 0, 4])
def test_an_extent_goes_to_the_host_and_comes_back_elsewhere(device: str, start: int | None) -> None:
    cache = make_cache(device)
    transfers = ExtentTransfers(cache, 8, None)
    other = HostImage("sp-b", 3, None if start is None else 0 if start else 5)
    before = blocks(cache, 0, BLOCKS)
    run(transfers, *copies(other, 6, True), *copies(HostImage("sp-a", 3, start), 1, True))
    run(transfers, *copies(HostImage("sp-a", 3, start), 8, False, (1, 2)))
    after = blocks(cache, 0, BLOCKS)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[8 * BLOCK : 11 * BLOCK], old[BLOCK : 4 * BLOCK])
        assert torch.equal(new[: 8 * BLOCK], old[: 8 * BLOCK]) and torch.equal(new[11 * BLOCK :], old[11 * BLOCK :])
    run(transfers, *copies(other, 0, False))
    assert all(map(torch.equal, blocks(cache, 0, 3), [old[6 * BLOCK : 9 * BLOCK] for old in before]))
    transfers.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("start", [None, 0])
@pytest.mark.parametrize("sizes", [(4,), (1, 2, 1), (3, 1)])
def test_a_prompt_in_pieces_is_one_image(device: str, start: int | None, sizes: tuple[int, ...]) -> None:
    cache = make_cache(device)
    transfers = ExtentTransfers(cache, 8, None)
    image = HostImage("sp-a", 4, start)
    before = blocks(cache, 0, BLOCKS)
    run(transfers, *copies(image, ((9, 1), (1, 3)), True, sizes))
    run(transfers, *copies(image, ((4, 2), (11, 1), (7, 1)), False, sizes[::-1]))
    for old, new in zip(before, blocks(cache, 0, BLOCKS), strict=True):
        old, new = old.view(BLOCKS, -1), new.view(BLOCKS, -1)
        assert torch.equal(new[[4, 5, 11, 7]], old[[9, 1, 2, 3]])
        assert torch.equal(new[[0, 1, 2, 3, 6, 8, 9, 10]], old[[0, 1, 2, 3, 6, 8, 9, 10]])
    transfers.close()


@pytest.mark.parametrize("device", DEVICES)
def test_images_lie_across_slabs_of_the_host(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_arena, "_SLAB", mmap.PAGESIZE)
    cache = make_cache(device)
    transfers = ExtentTransfers(cache, 64, None)
    before = blocks(cache, 0, BLOCKS)
    for start in range(0, 63, 3):
        run(transfers, *copies(HostImage(f"sp-{start}", 3, start), start % 9, True))
    for start in range(0, 60, 9):
        run(transfers, *copies(HostImage(f"sp-{start}", 3, start), 9, False))
        assert all(map(torch.equal, blocks(cache, 9, 3), [old[: 3 * BLOCK] for old in before]))
    transfers.close()


def test_host_memory_is_taken_as_it_is_used() -> None:
    def resident() -> int:
        return psutil.Process().memory_info().rss

    before = resident()
    arena = host_arena.HostArena(1 << 32, torch.device("cpu"))
    arena.tensor[-(1 << 20) :] = 1
    assert resident() - before < 64 << 20


@pytest.mark.parametrize(
    ("first", "width", "pitch", "height"), [(0, 8, 8, 9), (5, 40, 40, 3), (3, 6, 7, 20), (1, 1, 1, 1)]
)
def test_a_rectangle_of_the_host_is_cut_at_slabs(
    first: int, width: int, pitch: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_arena, "_SLAB", 16)
    arena = host_arena.HostArena(1 << 12, torch.device("cpu"))
    found: list[int] = []
    parts = list(arena.parts_of(first, width, pitch, height))
    for row, rows, columns in parts:
        starts = [first + (row + i) * pitch for i in range(rows)]
        part = [at for start in starts for at in range(start + columns.start, start + columns.stop)]
        assert part[0] // 16 == part[-1] // 16
        found += part
    assert found == [first + row * pitch + column for row in range(height) for column in range(width)]
    # Whole rows of a slab are one part, a row across two slabs is two.
    assert len(parts) <= 3 * (found[-1] // 16 - found[0] // 16) + 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("start", [None, 2])
def test_a_snapshot_is_saved_and_loaded_beside_the_steps(device: str, start: int | None, tmp_path: Path) -> None:
    cache = make_cache(device)
    record = SnapshotRecord("sp-a", list(range(10)), 0, 3, "hard")
    image = HostImage("sp-a", 3, start)
    transfers = ExtentTransfers(cache, 8, make_store(tmp_path))
    *slices, last = copies(image, 1, True)
    last.jobs = [SnapshotJob("save", record, image)]
    run(transfers, *slices, last, StepPlan(dropped=[image] if start is None else []))
    assert transfers.ended_jobs(30.0) == [EndedJob("save", "sp-a", "ok")]
    transfers.close()

    fresh = make_cache(device)
    transfers = ExtentTransfers(fresh, 8, make_store(tmp_path))
    changed = msgspec.structs.replace(record, pin="soft")
    run(transfers, StepPlan(jobs=[SnapshotJob("load", record, image), SnapshotJob("update", changed)]))
    assert transfers.ended_jobs(30.0)[0] == EndedJob("load", "sp-a", "ok")
    run(transfers, *copies(image, 7, False))
    assert all(map(torch.equal, blocks(fresh, 7, 3), blocks(cache, 1, 3)))
    run(transfers, StepPlan(jobs=[SnapshotJob("delete", record), SnapshotJob("load", record, image)]))
    transfers.close()
    assert [(e.op, e.outcome) for e in transfers.ended_jobs()] == [
        ("update", "ok"),
        ("delete", "ok"),
        ("load", "missing"),
    ]


def test_ends_are_told_in_order_and_only_once(tmp_path: Path) -> None:
    transfers = ExtentTransfers(make_cache(), 0, make_store(tmp_path))
    records = [SnapshotRecord(f"sp-{i}", [i], 0, 1, "soft") for i in range(5)]
    transfers.begin(StepPlan(jobs=[SnapshotJob("delete", record) for record in records]))
    ended: list[EndedJob] = []
    while len(ended) < 5:
        ended += transfers.ended_jobs(1.0)
    assert [e.prompt_id for e in ended] == [r.prompt_id for r in records]
    assert transfers.ended_jobs(0.0) == []
    transfers.close()


def test_a_job_that_breaks_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: object) -> str:
        raise MemoryError("no memory for it")

    store = make_store(tmp_path)
    monkeypatch.setattr(store, "read", read)
    transfers = ExtentTransfers(make_cache(), 0, store)
    record = SnapshotRecord("sp-a", [1], 0, 1, "soft")
    transfers.begin(StepPlan(jobs=[SnapshotJob("load", record, HostImage("sp-a", 1))]))
    assert transfers.ended_jobs(30.0) == [EndedJob("load", "sp-a", "error")]
    transfers.close()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(3,), (1, 1, 1), (2, 1)])
def test_layers_of_different_heads(device: str, sizes: tuple[int, ...]) -> None:
    # The second layer's blocks are smaller, the last one's values are larger than its keys.
    small, wide = Row(1, 3, torch.bfloat16), Row(2, 9, torch.bfloat16)
    cache = make_cache(device, (PagedKV(ROW, ROW), PagedKV(small, small), PagedKV(ROW, ROW), PagedKV(ROW, wide)))
    before = blocks(cache, 2, 3)
    transfers = ExtentTransfers(cache, 8, None)
    image = HostImage("sp-a", 3, 1)
    run(transfers, *copies(image, 2, True, sizes))
    cache.clear([2, 3, 4])
    run(transfers, *copies(image, 7, False, sizes))
    transfers.close()
    for found, wanted in zip(blocks(cache, 7, 3), before, strict=True):
        assert torch.equal(found, wanted)
