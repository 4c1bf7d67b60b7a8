"""The store of responses stays within its bounds, and streams in the background can be followed by many."""

from __future__ import annotations

import asyncio

from vllm.entrypoints.responses.store import BackgroundRun, ResponseStore, StoredResponse


def stored(name: str, text: str = "", run: BackgroundRun | None = None) -> StoredResponse:
    return StoredResponse({"id": name}, [{"role": "user", "content": text}], [], run)


def test_the_one_not_asked_for_the_longest_is_forgotten_first():
    store = ResponseStore(max_responses=3)
    for name in "abc":
        store.put(stored(name))
    assert store.get("a") is not None
    store.put(stored("d"))
    assert store.get("b") is None
    assert all(store.get(name) is not None for name in "acd")


def test_bytes_are_bounded_and_given_back():
    store = ResponseStore(max_bytes=10_000)
    for i in range(100):
        store.put(stored(str(i), "x" * 1000))
        assert store.num_bytes <= 10_000
    assert 5 < len(store) < 10
    grown = stored("99", "x" * 3000)
    store.put(grown)
    assert store.get("99") is grown
    store.put(stored("huge", "x" * 20_000))
    assert store.get("huge") is None
    for i in range(100):
        store.remove(str(i))
    assert (len(store), store.num_bytes) == (0, 0)


def test_running_responses_are_not_forgotten():
    store = ResponseStore(max_responses=1)
    run = BackgroundRun(keeps_events=False)
    store.put(stored("running", run=run))
    store.put(stored("done"))
    assert store.get("running") is not None
    assert store.get("done") is None
    assert store.num_running == 1
    run.end()
    store.put(stored("next"))
    assert store.get("running") is None
    assert store.num_running == 0


def test_events_can_be_followed_before_while_and_after_they_come():
    async def go() -> None:
        run = BackgroundRun(keeps_events=True)

        async def follow(start: int) -> list[bytes]:
            return [event async for event in run.follow(start)]

        early, late = asyncio.create_task(follow(0)), asyncio.create_task(follow(3))
        for i in range(5):
            run.add(str(i).encode())
            await asyncio.sleep(0)
        middle = asyncio.create_task(follow(1))
        await asyncio.sleep(0)
        run.add(b"5")
        run.end()
        assert await early == [b"0", b"1", b"2", b"3", b"4", b"5"]
        assert await middle == [b"1", b"2", b"3", b"4", b"5"]
        assert await late == [b"3", b"4", b"5"]
        assert await follow(4) == [b"4", b"5"]
        assert await follow(9) == []

    asyncio.run(asyncio.wait_for(go(), 10))
