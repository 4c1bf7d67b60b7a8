"""Notices an engine that has work and gets nothing done."""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm.exceptions import EngineStalledError
from vllm.logger import init_logger

logger = init_logger(__name__)


class Watchdog:
    """Knows how long the engine has had work without finishing a step. It is asked; nothing runs on its own.

    Args:
        timeout_s: More seconds than that are too many.
        clock: Seconds; replaced in tests.
    """

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._since = clock()
        self._is_stalled = False

    def note_progress(self) -> None:
        """A step has finished, or the engine got work after it had none: from now on it is waited for."""
        self._since = self._clock()
        if self._is_stalled:
            self._is_stalled = False
            logger.warning("The engine goes on.")

    def check(self, has_work: bool) -> None:
        """Raises `EngineStalledError` if the engine has had work for too long without finishing a step."""
        seconds = self._clock() - self._since
        if not has_work or seconds <= self._timeout_s:
            return
        error = EngineStalledError(seconds, self._timeout_s)
        if not self._is_stalled:
            self._is_stalled = True
            logger.error("%s", error)
        raise error
