"""Requests that come together begin one after the other, and whatever else waits on the event loop goes between."""

from __future__ import annotations

import asyncio

from vllm.entrypoints.http.turns import Turns


def test_the_loop_turns_between_two_that_begin() -> None:
    async def run() -> None:
        turns, begun, seen = Turns(), [], []

        async def request(number: int) -> None:
            await turns.take()
            begun.append(number)

        async def other() -> None:
            while len(begun) < 50:
                seen.append(len(begun))
                await asyncio.sleep(0)

        await asyncio.gather(*(request(i) for i in range(50)), other())
        assert begun == list(range(50))
        assert set(range(1, 50)) <= set(seen)

    asyncio.run(run())


def test_who_is_alone_does_not_wait() -> None:
    async def run() -> None:
        turns, ran = Turns(), []
        for _ in range(3):
            asyncio.get_running_loop().call_soon(ran.append, 1)
            await turns.take()
            assert not ran
            # The loop turns twice before the next one comes.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            ran.clear()

    asyncio.run(run())


def test_those_that_give_up_hold_nobody_up() -> None:
    async def run() -> None:
        turns, begun = Turns(), []

        async def request(number: int) -> None:
            await turns.take()
            begun.append(number)

        tasks = [asyncio.create_task(request(i)) for i in range(20)]
        await asyncio.sleep(0)
        for task in tasks[3:17:2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert sorted(begun) == [0, 1, 2, *range(4, 17, 2), 17, 18, 19]
        await asyncio.wait_for(request(99), 5)
        assert begun[-1] == 99

    asyncio.run(run())
