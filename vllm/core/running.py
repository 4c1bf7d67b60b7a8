"""Which sequences run, and in which rows of the ranks' buffers."""

from __future__ import annotations

import bisect
from collections import Counter

from vllm.sequence import Sequence, SequenceStatus
from vllm.step import PROMPT_ROWS, FreedSequence


class RunningSequences:
    """Requests that run, in the order in which they are served, and rows of these and of system prompts.

    Args:
        max_num_seqs: Rows of requests; those of system prompts follow them.

    Attributes:
        sequences: The requests.
    """

    def __init__(self, max_num_seqs: int) -> None:
        self.sequences: list[Sequence] = []
        self._max_num_seqs = max_num_seqs
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._free_prompt_rows = list(range(max_num_seqs + PROMPT_ROWS - 1, max_num_seqs - 1, -1))
        self._freed: list[FreedSequence] = []
        self._num_of_request: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def has_row(self) -> bool:
        """Whether one more request may run."""
        return bool(self._free_rows)

    @property
    def has_prompt_row(self) -> bool:
        """Whether one more system prompt may be computed."""
        return bool(self._free_prompt_rows)

    @property
    def has_freed(self) -> bool:
        """Whether the ranks have not been told of all rows that are free again."""
        return bool(self._freed)

    def num_of(self, request_id: str) -> int:
        """Outputs of a request that run."""
        return self._num_of_request[request_id]

    def start(self, seq: Sequence) -> None:
        """Gives a request a row; there is one."""
        seq.row = self._free_rows.pop()
        seq.status = SequenceStatus.RUNNING
        self._num_of_request[seq.request_id] += 1
        bisect.insort(self.sequences, seq)

    def stop(self, seq: Sequence) -> None:
        """Takes a request out of its row."""
        self.sequences.remove(seq)
        self._num_of_request[seq.request_id] -= 1
        if not self._num_of_request[seq.request_id]:
            del self._num_of_request[seq.request_id]
        self._free_rows.append(self._leave(seq))

    def start_prompt(self, seq: Sequence) -> None:
        """Gives the prefill of a system prompt a row; there is one."""
        seq.row = self._free_prompt_rows.pop()

    def stop_prompt(self, seq: Sequence) -> None:
        """Takes the prefill of a system prompt out of its row."""
        self._free_prompt_rows.append(self._leave(seq))

    def _leave(self, seq: Sequence) -> int:
        row, seq.row = seq.row, -1
        self._freed.append(FreedSequence(row, seq.is_system_prompt))
        return row

    def take_freed(self) -> list[FreedSequence]:
        """Those that have left their rows since the last call."""
        freed, self._freed = self._freed, []
        return freed

    def check_integrity(self, prompts: list[Sequence]) -> None:
        """Raises AssertionError when rows or their order do not add up.

        Args:
            prompts: Prefills of system prompts that have a row.
        """
        assert self._num_of_request == Counter(s.request_id for s in self.sequences), self._num_of_request
        assert self.sequences == sorted(self.sequences)
        rows = [s.row for s in self.sequences] + self._free_rows
        assert sorted(rows) == list(range(self._max_num_seqs)), rows
        rows = [s.row for s in prompts] + self._free_prompt_rows
        assert sorted(rows) == list(range(self._max_num_seqs, self._max_num_seqs + PROMPT_ROWS)), rows
