"""Blocks for the sequences that run, and who gives them up for another one."""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm.core.block_manager import BlockManager, Copies
from vllm.core.system_prompt_pool import SystemPromptPool
from vllm.sequence import Sequence, SequenceStatus


class SequenceMemory:
    """Where blocks are short, prompts on probation give theirs up, then beams that are held between two steps of their
    search. Whoever runs is preempted by the scheduler alone.

    Args:
        blocks: Schedulable KV memory.
        pool: System prompts.
        clock: Seconds since the epoch.

    Attributes:
        held: Beams that have blocks, and no row.
        num_dropped: How often a held beam has lost its blocks.
        prefix_cache_queries, prefix_cache_hits: Prompt tokens of requests that began, and those that they found.
    """

    def __init__(self, blocks: BlockManager, pool: SystemPromptPool, clock: Callable[[], float] = time.time) -> None:
        self.held: list[Sequence] = []
        self.num_dropped = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self._blocks = blocks
        self._pool = pool
        self._clock = clock

    def grow(self, seq: Sequence, num_tokens: int) -> list[int] | None:
        """Blocks for the first `num_tokens` tokens of `seq`; see `reclaim` for what gives way to it. None if even then
        there are not enough."""
        new = self._blocks.grow(seq, num_tokens)
        while new is None and self.reclaim(seq):
            new = self._blocks.grow(seq, num_tokens)
        return new

    def reclaim(self, seq: Sequence, keep: Sequence | None = None) -> bool:
        """Frees some memory for `seq`: of a prompt on probation, else of a held beam that comes no earlier in the order
        (`keep` excepted). Returns whether there was any."""
        if self._pool.give_way():
            return True
        later = [held for held in self.held if held is not seq and held is not keep and not held < seq]
        if not later:
            return False
        self._drop(max(later))
        return True

    def hold(self, seq: Sequence) -> None:
        """Keeps the blocks of a beam that has left its row until its search goes on, as long as nobody needs them."""
        seq.status = SequenceStatus.HELD
        self.held.append(seq)

    def _drop(self, seq: Sequence) -> None:
        """Frees the blocks of a held beam; it computes what they held again when it goes on."""
        self.held.remove(seq)
        self._blocks.free(seq)
        seq.status = SequenceStatus.PREEMPTED
        self.num_dropped += 1

    def begin(self, seq: Sequence, budget: int) -> Copies | None:
        """Gives a waiting sequence what it can reuse and the blocks for its first step, of at most `budget` tokens.

        Returns the block copies to make, or None (and changes nothing) when memory is short.
        """
        copies = Copies([], [])
        if seq.status == SequenceStatus.HELD:
            if self.grow(seq, seq.num_tokens) is None:
                return None
            self.held.remove(seq)
            return copies
        seq.num_computed_tokens = seq.prefix_len
        forked = self._fork(seq)
        if forked is not None:
            copies = forked
        elif seq.sampling_params.prompt_logprobs is None:
            found = self._blocks.find_cached(seq)
            reused = seq.prefix_len + len(found) * self._blocks.block_size
            first_step = reused + min(seq.num_tokens - reused, budget)
            while not self._blocks.can_begin(seq, found, first_step):
                if not self.reclaim(seq):
                    return None
            self._blocks.adopt(seq, found)
        count = min(seq.num_tokens - seq.num_computed_tokens, budget)
        if self.grow(seq, seq.num_computed_tokens + count) is None:
            self._blocks.free(seq)
            return None
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_computed_tokens - seq.num_cache_write_tokens
            seq.first_scheduled_time = self._clock()
            if seq.index == 0:
                self.prefix_cache_queries += seq.num_prompt_tokens
                self.prefix_cache_hits += seq.num_cached_tokens
        return copies

    def _fork(self, seq: Sequence) -> Copies | None:
        """Lets `seq` share what its parent holds; see `BlockManager.fork`."""
        parent, seq.fork_parent = seq.fork_parent, None
        if parent is None or parent.is_finished:
            return None
        windows = self._blocks.windows
        while not (self._blocks.num_free_blocks and (windows is None or windows.num_free_blocks)):
            if not self.reclaim(seq, keep=parent):
                break
        return self._blocks.fork(parent, seq)
