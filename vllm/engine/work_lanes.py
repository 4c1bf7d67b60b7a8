"""Threads for what would hold up an event loop: rendering, tokenising, checking and shaping of what is long."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TypeVar

from vllm.exceptions import ServerBusyError

# A first sight of a chat is tokenised four times, at about a microsecond a character. So the work of a short request
# takes some 60 ms at most.
LONG_BYTES = 16 * 1024
_SHORT_THREADS = 2
_MOST_LONG_THREADS = 2
_MAX_WAITING_BYTES = 512 * 2**20

request_bytes: ContextVar[int] = ContextVar("request_bytes", default=0)
"""How long the request is that is being worked for, in bytes of its body; 0 if that is not known."""

_T = TypeVar("_T")


class WorkLanes:
    """Runs functions in threads, those of short requests apart from those of long ones.

    One queue for all would let two new prompts of a million characters hold up every request behind them for seconds.
    An order by length would not help, since work that has begun goes on. Hence the long ones have a lane of their own,
    with few threads: what they tokenise is taken from the engine's cores, and a wait is what long requests can bear.

    Work of one lane starts in the order in which it came.
    """

    def __init__(self) -> None:
        long_threads = max(1, min(_MOST_LONG_THREADS, (os.cpu_count() or 1) // 4))
        self._short = ThreadPoolExecutor(_SHORT_THREADS, thread_name_prefix="short-work")
        self._long = ThreadPoolExecutor(long_threads, thread_name_prefix="long-work")
        self._waiting_bytes = 0

    async def run(self, function: Callable[..., _T], *args: object, size: int = 0) -> _T:
        """What `function(*args)` returns or raises.

        Args:
            size: Characters or bytes that it works on, if that may be more than the request's body has.

        Raises:
            ServerBusyError: too much work of long requests waits already.
        """
        size = max(size, request_bytes.get())
        loop = asyncio.get_running_loop()
        if size <= LONG_BYTES:
            return await loop.run_in_executor(self._short, function, *args)
        if self._waiting_bytes and self._waiting_bytes + size > _MAX_WAITING_BYTES:
            raise ServerBusyError(
                f"The server has {self._waiting_bytes // 2**20} MiB of long requests to read, and takes "
                f"{_MAX_WAITING_BYTES // 2**20} at a time; try again in a moment."
            )
        self._waiting_bytes += size
        try:
            return await loop.run_in_executor(self._long, function, *args)
        finally:
            self._waiting_bytes -= size

    def shutdown(self) -> None:
        """Starts nothing more; what runs ends by itself."""
        for lane in (self._short, self._long):
            lane.shutdown(wait=False, cancel_futures=True)


def is_long(size: int = 0) -> bool:
    """Whether the request that is being worked for, or `size` characters of it, are too long for the event loop."""
    return max(size, request_bytes.get()) > LONG_BYTES
