"""In which order host memory is made ready."""

from __future__ import annotations

import threading

import pytest
import torch

from vllm.worker import host_arena
from vllm.worker.host_arena import HostArena

SLABS = 40


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Slabs in the order in which they are locked, one at a time, and none before `go` is set."""
    order: list[int] = []

    def lock(self: HostArena, slab: int) -> bool:
        go.wait(10)
        order.append(slab)
        return False

    go.clear()
    monkeypatch.setattr(host_arena, "_SLAB", 1 << 12)
    monkeypatch.setattr(host_arena, "_THREADS", 1)
    monkeypatch.setattr(host_arena.HostArena, "_lock", lock)
    return order


go = threading.Event()


def test_what_is_needed_comes_before_what_lies_ahead(locked: list[int]) -> None:
    """A long prompt begins far below the end of the tier, of which much waits to be locked."""
    arena = HostArena(SLABS << 12, torch.device("cuda"))
    arena.lock_first()
    wait = arena.prepare(20 << 12, 10 << 12)
    go.set()
    wait()
    # One had been begun.
    needed = [slab for slab in locked if slab in range(20, 30)]
    assert needed == list(range(20, 30))
    assert locked.index(29) <= 10
    # What lay ahead of the end is locked when it is needed.
    arena.prepare(35 << 12, 2 << 12)()
    assert {35, 36} <= set(locked) and len(set(locked)) == len(locked)
    arena.close()


def test_memory_that_is_ready_is_not_made_ready_again(locked: list[int]) -> None:
    go.set()
    arena = HostArena(SLABS << 12, torch.device("cuda"))
    for _ in range(2):
        for first in (36, 30, 8):
            assert list(arena.parts_of(first << 12, 100, 1 << 12, 3)) == [
                (0, 1, slice(0, 100)), (1, 1, slice(0, 100)), (2, 1, slice(0, 100))
            ]  # fmt: skip
            arena.prepare(first << 12, 3 << 12)()
    arena.close()
    assert len(set(locked)) == len(locked)
