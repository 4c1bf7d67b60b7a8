"""Who holds which schedulable KV block, and which full blocks can be found again by what they contain."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from vllm.kv_cache.extents import Extent
from vllm.sequence import Sequence


class BlockManager:
    """Blocks of suffixes.

    A block is *free* (nobody reads it; it may still be cached), *used* (`ref_count > 0`) or *pinned* (taken out by
    `vacate`, returned by `give_back`). A cached block is one whose content is indexed by its key; blocks are evicted in
    least-recently-used order, those without cached content first.

    Args:
        num_blocks: Blocks in the KV cache.
        block_size: Tokens in a block.
        enable_caching: Keep full blocks for reuse.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_caching = enable_caching
        self._ref_count = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of_key: dict[bytes, int] = {}
        self._content: dict[int, tuple[bytes, bytes]] = {}
        self._num_cached_free = 0
        self._num_pinned = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out, cached ones included."""
        return len(self._free)

    @property
    def num_cached_blocks(self) -> int:
        """Free blocks whose content can still be found."""
        return self._num_cached_free

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - self._num_pinned - len(self._free)

    @property
    def num_schedulable_blocks(self) -> int:
        return self.num_blocks - self._num_pinned

    def blocks_for(self, seq: Sequence, num_tokens: int) -> int:
        """Own blocks that `seq` needs for its first `num_tokens` tokens."""
        return -(-(num_tokens - seq.prefix_len) // self.block_size)

    def grow(self, seq: Sequence, num_tokens: int) -> list[int] | None:
        """Gives `seq` the blocks that its first `num_tokens` tokens need.

        Returns the new blocks, or None (and changes nothing) when not enough are free.
        """
        missing = self.blocks_for(seq, num_tokens) - len(seq.block_table)
        if missing > len(self._free):
            return None
        new = [self._take_free() for _ in range(missing)]
        seq.block_table.extend(new)
        return new

    def find_cached(self, seq: Sequence) -> list[int]:
        """Cached blocks that hold the head of `seq`'s own tokens; at least one token is left to compute.

        A hit compares the token ids themselves, never only their digest.
        """
        if not self.enable_caching:
            return []
        most = (seq.num_tokens - 1 - seq.prefix_len) // self.block_size
        found = []
        start = seq.prefix_len
        for key in seq.keys_of_full_blocks(most, self.block_size):
            block = self._block_of_key.get(key)
            if block is None or self._content[block][1] != seq.token_ids[start : start + self.block_size].tobytes():
                break
            found.append(block)
            start += self.block_size
        return found

    def adopt(self, seq: Sequence, blocks: list[int]) -> None:
        """Lets `seq`, which holds no blocks yet, read `blocks` as the head of its own tokens."""
        for block in blocks:
            self._acquire(block)
        seq.block_table = list(blocks)
        seq.num_committed_blocks = len(blocks)
        seq.num_computed_tokens = seq.prefix_len + len(blocks) * self.block_size

    def num_free_after(self, blocks: list[int]) -> int:
        """Free blocks that would be left if `blocks` were adopted."""
        return len(self._free) - sum(self._ref_count[b] == 0 for b in blocks)

    def fork(self, parent: Sequence, child: Sequence) -> list[tuple[int, int]] | None:
        """Lets `child` share the blocks of `parent` that hold the child's tokens, all but its last one.

        Full blocks are shared. A block that those tokens fill in part is copied.

        Returns the block copies (source, destination) to make, or None when the parent does not hold the tokens or no
        block is free.
        """
        num_shared = len(child.token_ids) - 1
        full, rest = divmod(num_shared - child.prefix_len, self.block_size)
        held = -(-(num_shared - child.prefix_len) // self.block_size)
        if parent.system_prompt is not child.system_prompt or parent.num_computed_tokens < num_shared:
            return None
        if held > len(parent.block_table) or (rest and not self._free):
            return None
        self.adopt(child, parent.block_table[:full])
        copies = []
        if rest:
            block = self._take_free()
            child.block_table.append(block)
            copies.append((parent.block_table[full], block))
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
            if keys[i] not in self._block_of_key:
                start = seq.prefix_len + i * self.block_size
                block = seq.block_table[i]
                self._block_of_key[keys[i]] = block
                self._content[block] = (keys[i], seq.token_ids[start : start + self.block_size].tobytes())
        seq.num_committed_blocks = full

    def free(self, seq: Sequence) -> None:
        """Ends the hold of `seq` on its blocks. Does nothing for a system prompt, whose extent only `unpin` ends."""
        if seq.is_system_prompt:
            return
        # Tails first: when memory is short, the head of a conversation should outlive its end.
        for block in reversed(seq.block_table):
            self._release(block)
        seq.block_table = []
        seq.num_committed_blocks = 0
        seq.num_computed_tokens = 0

    def vacate(self, extents: Iterable[Extent], holders: Iterable[Sequence]) -> list[tuple[int, int]] | None:
        """Takes the blocks of `extents` out of the schedulable memory.

        Cached ones are dropped; used ones are relocated, and the block tables of `holders` (every sequence that holds
        blocks) are patched. Returns the copies (source, destination) that must run before the next forward pass, all
        at once, or None (and changes nothing) when the used ones find no room elsewhere.
        """
        window = [block for extent in extents for block in range(extent.start, extent.end)]
        used = [b for b in window if self._ref_count[b] > 0]
        if len(self._free) < len(window):
            return None
        ref_count, content_of, free = self._ref_count, self._content, self._free
        for block in window:
            if ref_count[block] == 0:
                if block in content_of:
                    self._drop_content(block)
                del free[block]
        moved: dict[int, int] = {}
        for block in used:
            target = self._take_free()
            moved[block] = target
            self._ref_count[target], self._ref_count[block] = self._ref_count[block], 0
            content = self._content.pop(block, None)
            if content is not None:
                self._content[target] = content
                self._block_of_key[content[0]] = target
        if moved:
            for seq in holders:
                seq.block_table = [moved.get(b, b) for b in seq.block_table]
        self._num_pinned += len(window)
        return list(moved.items())

    def give_back(self, extent: Extent) -> None:
        """Makes blocks that `vacate` took out schedulable again."""
        for block in range(extent.start, extent.end):
            self._free[block] = None
            self._free.move_to_end(block, last=False)
        self._num_pinned -= extent.num_blocks

    def reset_prefix_cache(self) -> None:
        """Forgets all cached content; used blocks stay used."""
        self._block_of_key.clear()
        self._content.clear()
        self._num_cached_free = 0

    def _take_free(self) -> int:
        block, _ = self._free.popitem(last=False)
        if block in self._content:
            self._num_cached_free -= 1
            key, _ = self._content.pop(block)
            del self._block_of_key[key]
        self._ref_count[block] = 1
        return block

    def _acquire(self, block: int) -> None:
        if self._ref_count[block] == 0:
            del self._free[block]
            self._num_cached_free -= block in self._content
        self._ref_count[block] += 1

    def _release(self, block: int) -> None:
        self._ref_count[block] -= 1
        if self._ref_count[block] == 0:
            self._free[block] = None
            if block in self._content:
                self._num_cached_free += 1
            else:
                self._free.move_to_end(block, last=False)

    def _drop_content(self, block: int) -> None:
        """Forgets what a free, cached block holds."""
        del self._block_of_key[self._content.pop(block)[0]]
        self._num_cached_free -= 1

    def check_integrity(self, holders: Iterable[Sequence], pinned: set[int]) -> None:
        """Raises AssertionError with numbers when blocks are lost, shared wrongly or double-booked.

        Args:
            holders: Every sequence that holds blocks.
            pinned: Every block of a pinned extent.
        """
        counts = [0] * self.num_blocks
        for seq in holders:
            assert len(set(seq.block_table)) == len(seq.block_table), seq
            for block in seq.block_table:
                counts[block] += 1
        assert counts == self._ref_count, [i for i in range(self.num_blocks) if counts[i] != self._ref_count[i]]
        used = {b for b, n in enumerate(counts) if n}
        free = set(self._free)
        assert not used & free and not used & pinned and not free & pinned, (used & free, used & pinned, free & pinned)
        assert len(used) + len(free) + len(pinned) == self.num_blocks, (len(used), len(free), len(pinned))
        assert self._num_pinned == len(pinned), (self._num_pinned, len(pinned))
        assert self._num_cached_free == sum(b in self._content for b in free)
        assert {key: b for b, (key, _) in self._content.items()} == self._block_of_key
        assert not pinned & set(self._content)
