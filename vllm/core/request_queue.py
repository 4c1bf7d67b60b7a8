"""Requests that may begin, first come first served."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from vllm.core.pinned_prompt import Rank
from vllm.core.running import RunningSequences
from vllm.sequence import Sequence


class RequestQueue:
    """A heap of requests; those that have ended leave it when their turn comes.

    Args:
        running: What runs already.
        max_outputs_beside_others: See `SchedulerConfig`.

    Attributes:
        short_of_blocks: Who was refused blocks last; nobody that comes later is to take them.
    """

    def __init__(self, running: RunningSequences, max_outputs_beside_others: int | None) -> None:
        self.short_of_blocks: Sequence | None = None
        self._running = running
        self._max_outputs = max_outputs_beside_others
        self._heap: list[Sequence] = []

    def push(self, seq: Sequence) -> None:
        heapq.heappush(self._heap, seq)

    def wake(self, sequences: Iterable[Sequence]) -> None:
        """Takes in sequences that need not wait for anything else any more."""
        for seq in sequences:
            self.push(seq)

    def pop(self) -> Sequence:
        return heapq.heappop(self._heap)

    def first(self, held_up_from: Rank | None, put_off: list[Sequence]) -> Sequence | None:
        """The first request, unless it may not begin. Outputs of a request that has its share of the rows are taken out
        of the queue, into `put_off`.

        Args:
            held_up_from: Whoever ranks behind it may not begin.
        """
        while self._heap and (self._heap[0].is_finished or self._has_its_share(self._heap[0])):
            seq = self.pop()
            if not seq.is_finished:
                put_off.append(seq)
        if not self._heap or (held_up_from is not None and rank_of(self._heap[0]) > held_up_from):
            return None
        return self._heap[0]

    def _has_its_share(self, seq: Sequence) -> bool:
        """Whether no more outputs of its request may run beside others."""
        most, running = self._max_outputs, self._running.num_of(seq.request_id)
        return most is not None and running >= most and len(self._running) > running


def rank_of(seq: Sequence) -> Rank:
    """The place of a request in the order in which requests and system prompts are served."""
    return seq.priority, seq.order, seq.num_tokens
