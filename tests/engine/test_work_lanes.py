"""Threads for long and for short work: neither long work nor a wait holds up what is short."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future

import pytest

from vllm.engine import work_lanes
from vllm.engine.work_lanes import LONG_BYTES, WorkLanes, is_long, request_bytes
from vllm.exceptions import ServerBusyError
from vllm.transformers_utils.system_parts import SystemPart, SystemPartCache, SystemPartPending


def test_short_work_is_done_while_all_long_work_waits() -> None:
    async def run() -> None:
        lanes, gate = WorkLanes(), threading.Event()
        try:
            long = [asyncio.ensure_future(lanes.run(gate.wait, size=LONG_BYTES + 1)) for _ in range(8)]
            assert await asyncio.wait_for(lanes.run(str.upper, "short"), 30) == "SHORT"
            assert not any(work.done() for work in long)
            gate.set()
            assert all(await asyncio.gather(*long))
        finally:
            gate.set()
            lanes.shutdown()

    asyncio.run(run())


def test_the_length_of_the_request_decides_for_all_that_is_done_for_it() -> None:
    async def name(size: int) -> tuple[str, bool]:
        request_bytes.set(size)
        return (await lanes.run(lambda: threading.current_thread().name)), is_long()

    async def run() -> None:
        names = await asyncio.gather(*(asyncio.create_task(name(size)) for size in (10, LONG_BYTES, LONG_BYTES + 1)))
        assert [(name[:5], long) for name, long in names] == [("short", False), ("short", False), ("long-", True)]

    lanes = WorkLanes()
    try:
        asyncio.run(run())
    finally:
        lanes.shutdown()


def test_more_long_work_than_may_wait_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        lanes, gate = WorkLanes(), threading.Event()
        try:
            alone = asyncio.ensure_future(lanes.run(gate.wait, size=2_000_000))
            await asyncio.sleep(0)
            with pytest.raises(ServerBusyError, match="try again in a moment"):
                await lanes.run(len, "x", size=LONG_BYTES + 1)
            assert await asyncio.wait_for(lanes.run(len, "x"), 30) == 1
            gate.set()
            await alone
            assert await lanes.run(len, "x", size=900_000) == 1
        finally:
            gate.set()
            lanes.shutdown()

    monkeypatch.setattr(work_lanes, "_MAX_WAITING_BYTES", 1_000_000)
    asyncio.run(run())


def test_who_waits_for_a_system_part_that_another_thread_computes_may_do_so_elsewhere() -> None:
    cache, begun, gate = SystemPartCache(), threading.Event(), threading.Event()

    def compute() -> SystemPart:
        begun.set()
        gate.wait(60)
        return SystemPart([1, 2, 3])

    own: Future[SystemPart] = Future()
    thread = threading.Thread(target=lambda: own.set_result(cache.get(("key",), compute)))
    thread.start()
    assert begun.wait(60)
    with pytest.raises(SystemPartPending) as pending:
        cache.get(("key",), compute, {})
    assert not pending.value.part.done()
    gate.set()
    part = pending.value.part.result(60)
    assert part is own.result(60) is cache.get(("key",), compute, {pending.value.key: part})
    thread.join()
