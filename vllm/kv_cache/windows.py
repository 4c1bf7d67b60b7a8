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

Memory is split once, since it lies in tensors: for sequences of `_TYPICAL_WINDOWS` windows. Where all are shorter the
window group is full first, where all are longer the full group. With the shape of Gemma 3 4B (29 layers of 34 have a
window) as many bytes hold 2.7 times the tokens that they would without groups, a quarter of them within windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vllm.kv_cache.spec import LayerCache

_TYPICAL_WINDOWS = 4


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

    def blocks_beside(self, num_blocks: int, max_tokens: int) -> int:
        """Blocks of the window group beside so many of the full group, for sequences of at most `max_tokens`."""
        return max(self.most_blocks(max_tokens), math.ceil(num_blocks * self._share(max_tokens)))

    def split(self, num_bytes: int, block_bytes: int, window_block_bytes: int, max_tokens: int) -> tuple[int, int]:
        """Blocks of the full and of the window group that share `num_bytes`."""
        each = block_bytes + self._share(max_tokens) * window_block_bytes
        num_window_blocks = max(self.most_blocks(max_tokens), int(num_bytes / each * self._share(max_tokens)))
        return (num_bytes - num_window_blocks * window_block_bytes) // block_bytes, num_window_blocks

    def _share(self, max_tokens: int) -> float:
        """Blocks that a typical sequence has in the window group, for each that it has in the full group."""
        typical = min(max_tokens, _TYPICAL_WINDOWS * self.window)
        return min(1.0, (self.window + self.block_size) / typical)


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


def window_of(layers: Sequence[LayerCache]) -> int | None:
    """W of a network's window group; None where it has none, since its layers have one reach."""
    windows = [layer.window for layer in layers]
    sizes = [window for window in windows if window is not None]
    return max(sizes) if sizes and len(sizes) < len(windows) else None
