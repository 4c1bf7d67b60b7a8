"""Who holds which block of the window group; see `kv_cache.windows` for what is kept."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Several
from itertools import chain

from vllm.core.block_pool import BlockPool, Content
from vllm.kv_cache.extents import Extent
from vllm.kv_cache.windows import WindowLayout
from vllm.sequence import Sequence

HOLE = -1
"""Entry of a window table whose block has been given back."""


class WindowBlocks(BlockPool):
    """Blocks behind the window tables of sequences.

    A request has as many entries in its window table as in its block table; those before `seq.window_start` are holes.
    The window table of a system prompt that is being computed is settled when it begins: a ring, then its extent.
    """

    def __init__(self, layout: WindowLayout, num_blocks: int, enable_caching: bool = True) -> None:
        super().__init__(num_blocks, layout.block_size, enable_caching)
        self.layout = layout

    # Requests --------------------------------------------------------------------------------------------------

    def slide(self, seq: Sequence) -> None:
        """Gives back what lies behind the window of the next token of `seq`.

        The steps that read it have been planned before whatever takes it next.
        """
        first = min(self.layout.first_kept(seq.num_computed_tokens - seq.prefix_len), len(seq.window_table))
        for i in range(seq.window_start, first):
            self.release(seq.window_table[i])
            seq.window_table[i] = HOLE
        seq.window_start = max(seq.window_start, first)

    def grow(self, seq: Sequence, count: int) -> None:
        """Gives `seq` `count` blocks more; there are so many."""
        seq.window_table.extend(self.take() for _ in range(count))

    def longest_hit(self, contents: Iterable[Content]) -> int:
        """How many of the blocks with these contents, from the first one on, a sequence may reuse: the most behind
        which its window is complete."""
        behind = self.layout.blocks_behind
        longest = run = 0
        for i, content in enumerate(contents):
            run = 0 if self.find(content) is None else run + 1
            if run >= min(i + 1, behind):
                longest = i + 1
        return longest

    def window_behind(self, contents: Several[Content]) -> list[int]:
        """The blocks that `adopt` takes for a hit on these contents."""
        first = max(0, len(contents) - self.layout.blocks_behind)
        found = [self.find(content) for content in contents[first:]]
        return [block for block in found if block is not None]

    def adopt(self, seq: Sequence, num_blocks: int, last: Several[int]) -> None:
        """Lets `seq`, which holds no blocks yet, read `last` as the end of its first `num_blocks` blocks."""
        for block in last:
            self.acquire(block)
        seq.window_start = num_blocks - len(last)
        seq.window_table = [HOLE] * seq.window_start + list(last)

    def shared_with(self, parent: Sequence, num_tokens: int, full: int) -> list[int] | None:
        """Of the first `full` blocks of `parent` those that a sequence reads which goes on behind `num_tokens` own
        tokens; None where it has given some back."""
        first = self.layout.first_read(num_tokens)
        return None if first < parent.window_start else parent.window_table[first:full]

    def commit(self, seq: Sequence, index: int, content: Content) -> None:
        """Makes a full, computed block of `seq` findable, if it still has it."""
        if index >= seq.window_start:
            self.remember(seq.window_table[index], content)

    def free(self, seq: Sequence) -> None:
        """Ends the hold of a request on its blocks."""
        for block in reversed(seq.window_table[seq.window_start :]):
            self.release(block)
        seq.window_table, seq.window_start = [], 0

    # System prompts --------------------------------------------------------------------------------------------

    def begin_prompt(self, seq: Sequence, extents: Iterable[Extent]) -> bool:
        """Gives a system prompt that is to be computed its window table. Returns False (and changes nothing) where
        there is no ring to be had."""
        num_own = seq.num_tokens - seq.prefix_len
        first = self.layout.first_of_tail(num_own)
        size = self.layout.ring_blocks(num_own)
        if size > len(self._free):
            return False
        seq.window_ring = [self.take() for _ in range(size)]
        seq.window_start = first
        tail = chain.from_iterable(range(extent.start, extent.end) for extent in extents)
        seq.window_table = [*(seq.window_ring[i % size] for i in range(first)), *tail]
        return True

    def end_prompt(self, seq: Sequence) -> None:
        """Gives the ring back of a prompt whose last chunk is planned."""
        for block in seq.window_ring:
            self.release(block)
        seq.window_table, seq.window_ring, seq.window_start = [], [], 0

    # Pinning ---------------------------------------------------------------------------------------------------

    def vacate(self, extents: Several[Extent], holders: Iterable[Sequence]) -> list[tuple[int, int]]:
        """As `BlockManager.vacate`; there is room, and prompts that are being computed are among the holders."""
        moved = self.clear_out(extents)
        if moved:
            for seq in holders:
                seq.window_table = [moved.get(b, b) for b in seq.window_table]
                seq.window_ring = [moved.get(b, b) for b in seq.window_ring]
        return list(moved.items())

    def check_integrity(self, holders: Iterable[Sequence], pinned: set[int]) -> None:
        """Raises AssertionError with numbers when blocks are lost, shared wrongly or double-booked.

        Args:
            holders: Every sequence that holds blocks, prompts that are being computed included.
            pinned: Every block of a pinned extent.
        """
        holds: list[int] = []
        for seq in holders:
            held = seq.window_ring if seq.is_system_prompt else seq.window_table[seq.window_start :]
            assert len(set(held)) == len(held) and HOLE not in held, seq
            if not seq.is_system_prompt:
                assert len(seq.window_table) == len(seq.block_table), seq
                assert seq.window_table[: seq.window_start] == [HOLE] * seq.window_start, seq
                assert seq.window_start <= self.layout.first_read(seq.num_computed_tokens - seq.prefix_len), seq
            holds += held
        self.check_books(holds, pinned)
