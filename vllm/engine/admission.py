"""How many outputs may be on their way at once, and who is turned away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from vllm.exceptions import ServerBusyError, VLLMValidationError


class _Place:
    """A place that is kept for a request while it is prepared; `is_kept` until the request takes it or gives it up.

    Attributes:
        outlives: A task that was started within has it until its end.
    """

    is_kept = True
    outlives = False


_own_place: ContextVar[_Place | None] = ContextVar("place", default=None)


class Admission:
    """Counts outputs from the moment that their request is let in: those that wait or run, and those that are prepared.

    Args:
        limit: Most outputs at a time; None for no limit. A request with `n` outputs counts n times.
        num_in_flight: How many the engine has now.
        on_refusal: Called for each request that is turned away.
    """

    def __init__(self, limit: int | None, num_in_flight: Callable[[], int], on_refusal: Callable[[], None]) -> None:
        self._limit = limit
        self._num_in_flight = num_in_flight
        self._on_refusal = on_refusal
        self._num_prepared = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Keeps a place for the first request that enters within, here or in a task that was started here.

        Raises:
            ServerBusyError: there is none.
        """
        self._check(1)
        place = _Place()
        self._num_prepared += 1
        token = _own_place.set(place)
        try:
            yield
        finally:
            _own_place.reset(token)
            if not place.outlives:
                self._give_up(place)

    def hand_on(self, task: asyncio.Task[Any]) -> None:
        """Leaves the place to a task that was started here, for the first request that enters there."""
        place = _own_place.get()
        if place is not None:
            place.outlives = True
            task.add_done_callback(lambda _: self._give_up(place))

    @contextmanager
    def entry(self, num_outputs: int) -> Iterator[None]:
        """Lets a request in and counts its outputs until the block ends, when the engine must have them.

        Raises:
            ServerBusyError: there is no room for it now.
            VLLMValidationError: there never is.
        """
        place = _own_place.get()
        if place is not None:
            self._give_up(place)
        if self._limit is not None and num_outputs > self._limit:
            raise VLLMValidationError(
                f"n asks for {num_outputs} outputs; this server has at most {self._limit} at a time "
                "(--max-num-queued-reqs).",
                "n",
            )
        self._check(num_outputs)
        self._num_prepared += num_outputs
        try:
            yield
        finally:
            self._num_prepared -= num_outputs

    def _give_up(self, place: _Place) -> None:
        self._num_prepared -= place.is_kept
        place.is_kept = False

    def _check(self, num_outputs: int) -> None:
        if self._limit is None:
            return
        in_use = self._num_in_flight() + self._num_prepared
        if in_use + num_outputs > self._limit:
            self._on_refusal()
            raise ServerBusyError(
                f"The server has {in_use} outputs waiting or running and takes at most {self._limit} "
                "(--max-num-queued-reqs); try again in a moment."
            )
