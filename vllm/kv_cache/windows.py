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

Memory is split once, since it lies in tensors. Texts that are shorter than a window need as many blocks of either
group, and fill the window group first; of long ones, and of pinned prompts, far more fit than without groups. The
window group is made no larger than short texts need it: those of `_SHORT_TEXT` tokens get all but `_MOST_LOST` of what
they would have without groups. With f and w bytes of a token over the layers of the groups, a share a of its blocks
that such a text keeps in the window group, and s blocks of the window group for each of the full one, that is

    s/a (f + w) / (f + s w) = 1 - _MOST_LOST

With Gemma 3 27B (52 of 62 layers read 1,024 tokens) s is 0.59: 1.5 times the tokens of long texts fit, and of short
ones 0.9 times; behind a prompt of 8,192 tokens that is pinned in a cache of 30,000, 1.2 times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm.kv_cache.spec import LayerCache

_SHORT_TEXT = 512
_MOST_LOST = 0.1


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
        return min(self._blocks(max_tokens), self.blocks_behind + step + 2)

    def share(self, memory: KVMemory, max_tokens: int) -> float:
        """Blocks of the window group for each of the full group, where sequences have at most `max_tokens`."""
        full, within = memory.block_bytes, memory.window_block_bytes
        kept = (self.blocks_behind + 2) * self.block_size
        of_short = (1 - _MOST_LOST) * min(1.0, kept / _SHORT_TEXT)
        share = of_short * full / (full + within - of_short * within)
        # The longest texts need no fewer.
        return min(1.0, max(share, kept / max_tokens))

    def blocks_beside(self, num_blocks: int, memory: KVMemory, max_tokens: int) -> int:
        """Blocks of the window group beside so many of the full group, for sequences of at most `max_tokens`."""
        share, most, longest = self.share(memory, max_tokens), self.most_blocks(max_tokens), self._blocks(max_tokens)
        # What is left beside the longest sequence, to be pinned for instance, has its share of the window group as
        # well; where that is little, it is not all in the window group.
        left = max(0, num_blocks - longest)
        wanted = max(math.ceil(num_blocks * share), most + math.ceil(left * share))
        return wanted if left >= longest else min(wanted, most + left)

    def split(self, num_bytes: int, memory: KVMemory, max_tokens: int) -> tuple[int, int]:
        """Blocks of the full and of the window group that share `num_bytes`, as of `blocks_beside`; none of the full
        group where there is no room for what the window group must have."""
        share, most, longest = self.share(memory, max_tokens), self.most_blocks(max_tokens), self._blocks(max_tokens)
        full, within = memory.block_bytes, memory.window_block_bytes
        left = num_bytes - longest * full - most * within
        wanted = max(num_bytes / (full + share * within) * share, most + left / (full + share * within) * share)
        at_most = (num_bytes - full * (longest + min(longest, left / (full + within)))) / within
        num_window_blocks = max(most, int(min(wanted, at_most)))
        return max(0, (num_bytes - num_window_blocks * within) // full), num_window_blocks

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


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
