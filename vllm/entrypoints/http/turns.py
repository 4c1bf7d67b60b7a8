"""How the event loop stays free for what the engine has to tell while many requests come in."""

from __future__ import annotations

import asyncio


class Turns:
    """Lets one request after the other begin its work, each in a turn of the event loop of its own.

    The loop hears of the engine once a turn. If fifty long requests that came together were read in one turn, the
    tokens of all streams would wait for the whole of it.
    """

    def __init__(self) -> None:
        self._last: asyncio.Future[None] | None = None

    async def take(self) -> None:
        """Returns at once, or when those that asked before have had their turns."""
        loop = asyncio.get_running_loop()
        before, mine = self._last, loop.create_future()
        self._last = mine
        try:
            if before is not None:
                await before
        finally:
            # Called in the next turn; who waits for it is woken in the one after that.
            loop.call_soon(_end, mine)


def _end(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)
