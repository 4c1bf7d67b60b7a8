"""Who holds which schedulable KV block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vllm.core.block_pool import BlockPool, Content
from vllm.core.window_blocks import WindowBlocks
from vllm.kv_cache.extents import Extent
from vllm.sequence import Sequence


class Copies(NamedTuple):
    """Block copies (source, destination) to make, in each group."""

    full: list[tuple[int, int]]
    window: list[tuple[int, int]]


class BlockManager(BlockPool):
    """Blocks of suffixes, of the full group, and with them what the window group keeps.

    Args:
        num_blocks: Blocks in the full group.
        block_size: Tokens in a block.
        enable_caching: Keep full blocks for reuse.
        windows: Blocks of the window group, where the network has one.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_caching: bool = True, windows: WindowBlocks | None = None
    ) -> None:
        super().__init__(num_blocks, block_size, enable_caching)
        self.windows = windows

    @property
    def usage(self) -> float:
        """Share of the schedulable blocks that are used, in the group where it is higher: at 1 requests must wait."""
        used = super().usage
        return used if self.windows is None else max(used, self.windows.usage)

    def blocks_for(self, seq: Sequence, num_tokens: int) -> int:
        """Own blocks that `seq` needs for its first `num_tokens` tokens."""
        return -(-(num_tokens - seq.prefix_len) // self.block_size)

    def grow(self, seq: Sequence, num_tokens: int) -> list[int] | None:
        """Gives `seq` the blocks that its first `num_tokens` tokens need.

        In the window group it gives back what lies behind its window first, and gets as many blocks as in the full one.

        Returns the new blocks, or None (and takes nothing) when not enough are free.
        """
        missing = self.blocks_for(seq, num_tokens) - len(seq.block_table)
        if missing <= 0:
            return []
        windows = self.windows
        if windows is not None:
            windows.slide(seq)
        if missing > len(self._free) or (windows is not None and missing > windows.num_free_blocks):
            return None
        new = [self.take() for _ in range(missing)]
        seq.block_table.extend(new)
        if windows is not None:
            windows.grow(seq, missing)
        return new

    def find_cached(self, seq: Sequence) -> list[int]:
        """Cached blocks that hold the head of `seq`'s own tokens; at least one token is left to compute.

        A hit compares the token ids themselves, never only their digest.
        """
        if not self.enable_caching:
            return []
        most = (seq.num_tokens - 1 - seq.prefix_len) // self.block_size
        found = []
        for content in self._contents(seq, most):
            block = self.find(content)
            if block is None:
                break
            found.append(block)
        if self.windows is not None:
            del found[self.windows.longest_hit(self._contents(seq, len(found))) :]
        return found

    def _contents(self, seq: Sequence, count: int) -> Iterator[Content]:
        """Keys and token ids of the first `count` own blocks."""
        start = seq.prefix_len
        for key in seq.keys_of_full_blocks(count, self.block_size):
            yield key, seq.token_ids[start : start + self.block_size].tobytes()
            start += self.block_size

    def adopt(self, seq: Sequence, blocks: list[int]) -> None:
        """Lets `seq`, which holds no blocks yet, read `blocks`, which `find_cached` has found, as the head of its own
        tokens."""
        self._share(seq, blocks)
        if self.windows is not None:
            last = self.windows.window_behind(list(self._contents(seq, len(blocks))))
            self.windows.adopt(seq, len(blocks), last)

    def _share(self, seq: Sequence, blocks: list[int]) -> None:
        for block in blocks:
            self.acquire(block)
        seq.block_table = list(blocks)
        seq.num_committed_blocks = len(blocks)
        seq.num_computed_tokens = seq.prefix_len + len(blocks) * self.block_size

    def can_begin(self, seq: Sequence, found: list[int], num_tokens: int) -> bool:
        """Whether `seq` gets the blocks of its first `num_tokens` tokens if it adopts `found`."""
        missing = self.blocks_for(seq, num_tokens) - len(found)
        if missing > self.num_free_after(found):
            return False
        windows = self.windows
        if windows is None:
            return True
        return missing <= windows.num_free_after(windows.window_behind(list(self._contents(seq, len(found)))))

    def fork(self, parent: Sequence, child: Sequence) -> Copies | None:
        """Lets `child` share the blocks of `parent` that hold the child's tokens, all but its last one.

        Full blocks are shared. A block that those tokens fill in part is copied.

        Returns the block copies to make, or None when the parent does not hold the tokens, or no longer all that the
        child reads of them, or no block is free.
        """
        num_shared = len(child.token_ids) - 1
        own = num_shared - child.prefix_len
        full, rest = divmod(own, self.block_size)
        windows = self.windows
        if parent.system_prompt is not child.system_prompt or parent.num_computed_tokens < num_shared:
            return None
        if -(-own // self.block_size) > len(parent.block_table) or (rest and not self._free):
            return None
        if windows is not None:
            last = windows.shared_with(parent, own, full)
            if last is None or (rest and not windows.num_free_blocks):
                return None
            windows.adopt(child, full, last)
        self._share(child, parent.block_table[:full])
        copies = Copies([], [])
        if rest:
            child.block_table.append(self.take())
            copies.full.append((parent.block_table[full], child.block_table[full]))
            if windows is not None:
                windows.grow(child, 1)
                copies.window.append((parent.window_table[full], child.window_table[full]))
        child.num_computed_tokens = num_shared
        child.num_committed_blocks = min(full, parent.num_committed_blocks)
        return copies

    def commit(self, seq: Sequence) -> None:
        """Makes the full, computed blocks of `seq` findable, as far as their tokens are known."""
        if not self.enable_caching:
            return
        known = min(seq.num_computed_tokens, len(seq.token_ids))
        full = (known - seq.prefix_len) // self.block_size
        if full <= seq.num_committed_blocks:
            return
        keys = seq.keys_of_full_blocks(full, self.block_size)
        for i in range(seq.num_committed_blocks, full):
            start = seq.prefix_len + i * self.block_size
            tokens = seq.token_ids[start : start + self.block_size].tobytes()
            self.remember(seq.block_table[i], (keys[i], tokens))
            if self.windows is not None:
                self.windows.commit(seq, i, (keys[i], tokens))
        seq.num_committed_blocks = full

    def free(self, seq: Sequence) -> None:
        """Ends the hold of `seq` on its blocks. Does nothing for a system prompt, whose extent only `unpin` ends."""
        if seq.is_system_prompt:
            return
        # Tails first: when memory is short, the head of a conversation should outlive its end.
        for block in reversed(seq.block_table):
            self.release(block)
        if self.windows is not None:
            self.windows.free(seq)
        seq.block_table = []
        seq.num_committed_blocks = 0
        seq.num_computed_tokens = 0

    def vacate(self, extents: Iterable[Extent], holders: Iterable[Sequence]) -> list[tuple[int, int]] | None:
        """Takes the blocks of `extents` out of the schedulable memory.

        Cached ones are dropped; used ones are relocated, and the block tables of `holders` (every sequence that holds
        blocks) are patched. Returns the copies (source, destination) that must run before the next forward pass, all
        at once, or None (and changes nothing) when the used ones find no room elsewhere.
        """
        extents = list(extents)
        if not self.has_room_for(extents):
            return None
        moved = self.clear_out(extents)
        if moved:
            for seq in holders:
                seq.block_table = [moved.get(b, b) for b in seq.block_table]
        return list(moved.items())

    def reset_prefix_cache(self) -> None:
        super().reset_prefix_cache()
        if self.windows is not None:
            self.windows.reset_prefix_cache()

    def check_integrity(self, holders: Iterable[Sequence], pinned: set[int]) -> None:
        """Raises AssertionError with numbers when blocks are lost, shared wrongly or double-booked.

        Args:
            holders: Every sequence that holds blocks.
            pinned: Every block of a pinned extent.
        """
        holds: list[int] = []
        for seq in holders:
            assert len(set(seq.block_table)) == len(seq.block_table), seq
            holds += seq.block_table
        self.check_books(holds, pinned)
