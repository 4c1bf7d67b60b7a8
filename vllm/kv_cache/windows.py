"""Which blocks the window layers of a network keep of a sequence.

Layers of equal reach form a cache group. The *full* group has the layers that read all keys, the *window* group those
that read the last W. Each group has tensors, block numbers, block tables and pinned extents of its own. In both, own
block i of a sequence holds its own tokens `i * block_size …`, so that one index serves both tables; in the window group
blocks behind the window have been given back, and their entries are holes that nobody reads.

    full group     [0][1][2][3][4][5][6][7][8]
    window group    .  .  .  .  .  .  [6][7][8]      W - 1 keys behind the next token, and the rest of their block

A pinned prompt keeps its last min(S, W-1) tokens, in whole blocks, in an extent of the window group. While it is
computed, what comes before them goes round a ring of blocks that ends with its last chunk, so nothing has to be moved.
A prompt that continues another one reads the end of that one's extent as long as its window reaches there.

The widest window counts where layers have several. A network without windows has the full group alone.

Memory is split once, since it lies in tensors. Where all texts are shorter than a window, they need as many blocks of
either group, and the window group is full first; where all are long, the full group is. The split loses as much by one
as by the other, as compared with the split that would be best for it, if long means `_LONG_TEXT` windows. With f and w
bytes of a token over the layers of the groups, and a long text that keeps a share b of its blocks, short texts get
s (f+w) / (f + s w) of their best where the window group has a share s, long ones (f + b w) / (f + s w) of theirs; both
are the same for s = (f + b w) / (f + w). With Gemma 3 27B (52 of 62 layers read 1,024 tokens) that is 3 blocks for 8:
long texts get 2.1 times what they would without groups, short ones 0.79 times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm.kv_cache.spec import LayerCache

_LONG_TEXT = 4


@dataclass(frozen=True)
class WindowLayout:
    """Blocks of the window group, counted from a sequence's first own block; positions are own ones.

    Attributes:
        window: W; a token reads itself and the W - 1 before it.
        block_size: Slots in a block.
        max_step_tokens: Most tokens of one sequence in a step.
    """

    window: int
    block_size: int
    max_step_tokens: int

    def first_read(self, position: int) -> int:
        """The first block that the token at `position` reads."""
        return max(0, position - self.window + 1) // self.block_size

    def first_kept(self, position: int) -> int:
        """The first block that a sequence keeps whose next token is at `position`: one more than it reads, so that
        outputs of one prompt that begin some steps after the first can share its blocks."""
        return max(0, self.first_read(position) - 1)

    @property
    def blocks_behind(self) -> int:
        """Blocks behind a block boundary that the token there reads."""
        return -(-(self.window - 1) // self.block_size)

    def first_of_tail(self, num_tokens: int) -> int:
        """The first block that a pinned prompt of so many own tokens keeps; it keeps one at least."""
        return min(self.first_read(num_tokens), (num_tokens - 1) // self.block_size)

    def tail_blocks(self, num_tokens: int) -> int:
        """Blocks that it keeps."""
        return -(-num_tokens // self.block_size) - self.first_of_tail(num_tokens)

    def ring_blocks(self, num_tokens: int) -> int:
        """Blocks that what comes before its tail goes round: one step's tokens, and the window behind them."""
        step = -(-self.max_step_tokens // self.block_size)
        return min(self.first_of_tail(num_tokens), self.blocks_behind + step + 1)

    def most_blocks(self, max_tokens: int) -> int:
        """Blocks that must be schedulable, so that one sequence of `max_tokens` can run and one prompt be computed."""
        step = -(-self.max_step_tokens // self.block_size)
        return min(-(-max_tokens // self.block_size), self.blocks_behind + step + 2)

    def share(self, memory: KVMemory, max_tokens: int) -> float:
        """Blocks of the window group for each of the full group, where sequences have at most `max_tokens`."""
        full, within = memory.block_bytes, memory.window_block_bytes
        long = min(max_tokens, _LONG_TEXT * self.window)
        kept = min(1.0, (self.window + self.block_size) / long)
        return (full + kept * within) / (full + within)

    def blocks_beside(self, num_blocks: int, memory: KVMemory, max_tokens: int) -> int:
        """Blocks of the window group beside so many of the full group, for sequences of at most `max_tokens`."""
        return max(self.most_blocks(max_tokens), math.ceil(num_blocks * self.share(memory, max_tokens)))

    def split(self, num_bytes: int, memory: KVMemory, max_tokens: int) -> tuple[int, int]:
        """Blocks of the full and of the window group that share `num_bytes`; none of the full group where there is no
        room for what the window group must have."""
        share = self.share(memory, max_tokens)
        most = int(num_bytes / (memory.block_bytes + share * memory.window_block_bytes) * share)
        num_window_blocks = max(self.most_blocks(max_tokens), most)
        left = num_bytes - num_window_blocks * memory.window_block_bytes
        return max(0, left // memory.block_bytes), num_window_blocks


@dataclass(frozen=True)
class KVMemory:
    """What the ranks have for KV, of the rank with the least room.

    Attributes:
        available: Bytes.
        block_bytes: Bytes of one block over the layers of the full group; over all layers where there is no other.
        window: W of the window group; None: there is none.
        window_block_bytes: Bytes of one block over the layers of the window group.
    """

    available: int
    block_bytes: int
    window: int | None = None
    window_block_bytes: int = 0

    @classmethod
    def of(cls, available: int, layers: Sequence[LayerCache], block_size: int) -> KVMemory:
        """What a rank with these layers has."""

        def bytes_of(some: Iterable[LayerCache]) -> int:
            return block_size * sum(layer.slot_bytes for layer in some)

        window = window_of(layers)
        if window is None:
            return cls(available, bytes_of(layers))
        full = bytes_of(layer for layer in layers if layer.window is None)
        return cls(available, full, window, bytes_of(layers) - full)


def window_of(layers: Sequence[LayerCache]) -> int | None:
    """W of a network's window group; None where it has none, since its layers have one reach."""
    windows = [layer.window for layer in layers]
    sizes = [window for window in windows if window is not None]
    return max(sizes) if sizes and len(sizes) < len(windows) else None
