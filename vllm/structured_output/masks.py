"""Fills the token masks of a batch, side by side in threads while the device computes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from vllm.structured_output.matcher import TokenMatcher

_MOST_THREADS = 8
# A mask takes 10 to 20 µs as a rule, so few rows are done sooner than a thread is woken for them.
_ROWS_OF_A_THREAD = 8


class MaskFiller:
    """Threads that fill masks; the engines let go of the interpreter's lock while they compute one."""

    def __init__(self) -> None:
        self._num_threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // 2))
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="masks")

    def fill(self, matchers: list[TokenMatcher], vocab_size: int) -> np.ndarray:
        """The tokens that may come next of each output; int32 [len(matchers), ceil(vocab_size / 32)]."""
        masks = np.empty((len(matchers), -(-vocab_size // 32)), np.int32)

        def fill_rows(first: int) -> None:
            for row in range(first, len(matchers), num_parts):
                matchers[row].fill(masks, row)

        num_parts = max(1, min(self._num_threads, len(matchers) // _ROWS_OF_A_THREAD))
        if num_parts == 1:
            fill_rows(0)
        else:
            list(self._pool.map(fill_rows, range(num_parts)))
        return masks

    def shutdown(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
