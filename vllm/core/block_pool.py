"""The blocks of one cache group: which are free, used or pinned, and which can be found again by what they contain."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Several

from vllm.kv_cache.extents import Extent

Content = tuple[bytes, bytes]
"""What a full block holds: its prefix-cache key, and the token ids."""


class BlockPool:
    """Blocks, each of them *free* (nobody reads it; it may still be cached), *used* (`ref_count > 0`) or *pinned*
    (taken out by `vacate`, returned by `give_back`).

    A cached block is one whose content is indexed by its key; blocks are evicted in least-recently-used order, those
    without cached content first.

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
        self._content: dict[int, Content] = {}
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

    @property
    def usage(self) -> float:
        """Share of the schedulable blocks that are used."""
        return self.num_used_blocks / max(1, self.num_schedulable_blocks)

    def num_free_after(self, blocks: Iterable[int]) -> int:
        """Free blocks that would be left if `blocks` were acquired."""
        return len(self._free) - sum(self._ref_count[b] == 0 for b in blocks)

    # Holding blocks --------------------------------------------------------------------------------------------

    def take(self) -> int:
        """A free block, held once from now on; what it has cached is forgotten."""
        block, _ = self._free.popitem(last=False)
        if block in self._content:
            self._num_cached_free -= 1
            key, _ = self._content.pop(block)
            del self._block_of_key[key]
        self._ref_count[block] = 1
        return block

    def acquire(self, block: int) -> None:
        """Holds a used or cached block once more."""
        if self._ref_count[block] == 0:
            del self._free[block]
            self._num_cached_free -= block in self._content
        self._ref_count[block] += 1

    def release(self, block: int) -> None:
        """Ends one hold of a block."""
        self._ref_count[block] -= 1
        if self._ref_count[block] == 0:
            self._free[block] = None
            if block in self._content:
                self._num_cached_free += 1
            else:
                self._free.move_to_end(block, last=False)

    # Content ---------------------------------------------------------------------------------------------------

    def find(self, content: Content) -> int | None:
        """The block with this content, used or free. The token ids themselves are compared, never only their digest."""
        block = self._block_of_key.get(content[0])
        return block if block is not None and self._content[block][1] == content[1] else None

    def remember(self, block: int, content: Content) -> None:
        """Makes a used block findable, unless another one with this key is."""
        if content[0] not in self._block_of_key:
            self._block_of_key[content[0]] = block
            self._content[block] = content

    def reset_prefix_cache(self) -> None:
        """Forgets all cached content; used blocks stay used."""
        self._block_of_key.clear()
        self._content.clear()
        self._num_cached_free = 0

    def _drop_content(self, block: int) -> None:
        """Forgets what a free, cached block holds."""
        del self._block_of_key[self._content.pop(block)[0]]
        self._num_cached_free -= 1

    # Pinning ---------------------------------------------------------------------------------------------------

    def has_room_for(self, extents: Iterable[Extent]) -> bool:
        """Whether the used blocks of `extents` find room elsewhere."""
        return sum(extent.num_blocks for extent in extents) <= len(self._free)

    def clear_out(self, extents: Several[Extent]) -> dict[int, int]:
        """Takes the blocks of `extents`, for which there is room, out of the schedulable memory: cached ones are
        dropped, used ones relocated. Returns where the used ones go, by where they were."""
        inside = [block for extent in extents for block in range(extent.start, extent.end)]
        used = [b for b in inside if self._ref_count[b] > 0]
        ref_count, content_of, free = self._ref_count, self._content, self._free
        for block in inside:
            if ref_count[block] == 0:
                if block in content_of:
                    self._drop_content(block)
                del free[block]
        moved: dict[int, int] = {}
        for block in used:
            target = self.take()
            moved[block] = target
            ref_count[target], ref_count[block] = ref_count[block], 0
            content = content_of.pop(block, None)
            if content is not None:
                content_of[target] = content
                self._block_of_key[content[0]] = target
        self._num_pinned += len(inside)
        return moved

    def give_back(self, extent: Extent) -> None:
        """Makes blocks that `clear_out` took out schedulable again."""
        for block in range(extent.start, extent.end):
            self._free[block] = None
            self._free.move_to_end(block, last=False)
        self._num_pinned -= extent.num_blocks

    def check_books(self, holds: Iterable[int], pinned: set[int]) -> None:
        """Raises AssertionError with numbers when blocks are lost or double-booked.

        Args:
            holds: A block for each hold on one.
            pinned: Every block of a pinned extent.
        """
        counts = [0] * self.num_blocks
        for block in holds:
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
