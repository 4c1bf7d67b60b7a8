"""KV memory of one rank, and the bookkeeping of the part of it that is pinned.

    [0 ....... schedulable blocks ....... | wall | ... pinned extents ... num_blocks)

`PinnedBlockPool` says which blocks are pinned; it is plain integers, so that the scheduler uses the very same class
without a device. `CacheEngine` holds the tensors. All ranks hold the same block numbering.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


class Extent(NamedTuple):
    """A contiguous run of blocks."""

    start: int
    num_blocks: int

    @property
    def end(self) -> int:
        return self.start + self.num_blocks


class PinnedBlockPool:
    """Which blocks are pinned, and where the next extent goes.

    Nothing is pinned at start and nothing is held back. The wall is the lowest pinned block: it falls when an extent is
    placed under it and rises when its lowest extent is released. Holes between extents are schedulable like the
    blocks under the wall, so no memory is ever lost to them; a new extent first looks for a hole that fits. Where there
    is none, and no room under the wall either, its owner gets several.

    Args:
        num_blocks: Blocks in the KV cache.
        budget_blocks: Most blocks that may be pinned together.
        floor_blocks: Blocks that must stay schedulable, whatever is pinned (one sequence of the longest length).
    """

    def __init__(self, num_blocks: int, budget_blocks: int, floor_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._most_blocks = max(0, num_blocks - floor_blocks)
        self.budget_blocks = min(budget_blocks, self._most_blocks)
        self.pinned_blocks = 0
        self._extents: dict[str, tuple[Extent, ...]] = {}

    @property
    def wall(self) -> int:
        return min((e.start for e in chain.from_iterable(self._extents.values())), default=self.num_blocks)

    @property
    def extents(self) -> dict[str, tuple[Extent, ...]]:
        """Pinned extents by owner."""
        return dict(self._extents)

    def set_budget(self, num_blocks: int) -> None:
        """Changes the budget, as far as the floor allows; it is never below what is pinned."""
        self.budget_blocks = max(self.pinned_blocks, min(num_blocks, self._most_blocks))

    def fits(self, num_blocks: int) -> bool:
        """Whether the budget still has room for `num_blocks` more."""
        return self.pinned_blocks + num_blocks <= self.budget_blocks

    def find_window(self, num_blocks: int) -> int | None:
        """First block of the place for an extent of `num_blocks`: the tightest hole that fits, else under the wall.

        Returns None when the budget has no room, or no contiguous room is left.
        """
        found = self.find_room(num_blocks, 1)
        return None if found is None else found[0].start

    def find_room(self, num_blocks: int, max_extents: int) -> tuple[Extent, ...] | None:
        """The place for `num_blocks`: one extent if there is contiguous room, else the fewest that hold them.

        Returns None when the budget has no room, or when it would take more than `max_extents`.
        """
        if not self.fits(num_blocks) or max_extents < 1:
            return None
        holes = self._holes()
        under_wall = holes.pop(0)
        fitting = [hole for hole in holes if num_blocks <= hole.num_blocks]
        if fitting or num_blocks <= under_wall.num_blocks:
            best = min(fitting, key=lambda hole: hole.num_blocks, default=under_wall)
            return (Extent(best.end - num_blocks, num_blocks),)
        found: list[Extent] = []
        left = num_blocks
        for hole in sorted([*holes, under_wall], key=lambda hole: -hole.num_blocks):
            size = min(left, hole.num_blocks)
            if size and len(found) < max_extents:
                found.append(Extent(hole.end - size, size))
                left -= size
        return None if left else tuple(found)

    def _holes(self) -> list[Extent]:
        """What is not pinned: the room under the wall, perhaps empty, then the holes over it."""
        end, holes = 0, list[Extent]()
        for extent in [*sorted(chain.from_iterable(self._extents.values())), Extent(self.num_blocks, 0)]:
            if extent.start > end or not holes:
                holes.append(Extent(end, extent.start - end))
            end = extent.end
        return holes

    def pin(self, owner: str, extents: tuple[Extent, ...]) -> None:
        """Marks blocks as the extents of `owner`; the caller has emptied them.

        Raises:
            ValueError: over budget, out of range, overlapping another extent, or the owner has some already.
        """
        if owner in self._extents:
            raise ValueError(f"{owner} is pinned already")
        num_blocks = sum(e.num_blocks for e in extents)
        if not extents or not self.fits(num_blocks):
            raise ValueError(
                f"{num_blocks} blocks cannot be pinned: {self.budget_blocks - self.pinned_blocks} are left"
            )
        if any(e.num_blocks < 1 or e.start < 0 or e.end > self.num_blocks for e in extents):
            raise ValueError(f"{extents} cannot be pinned: there are {self.num_blocks} blocks")
        for a, b in pairwise(sorted([*chain.from_iterable(self._extents.values()), *extents])):
            if b.start < a.end:
                raise ValueError(f"{a} and {b} overlap: one is a pinned extent")
        self._extents[owner] = extents
        self.pinned_blocks += num_blocks

    def unpin(self, owner: str) -> tuple[Extent, ...]:
        """Ends the pin of `owner` and returns its extents, whose blocks are schedulable again.

        Raises:
            KeyError: the owner has no extent.
        """
        extents = self._extents.pop(owner)
        self.pinned_blocks -= sum(e.num_blocks for e in extents)
        return extents

    def check_integrity(self) -> None:
        """Raises AssertionError with numbers when the books do not add up."""
        ordered = sorted(chain.from_iterable(self._extents.values()))
        assert sum(e.num_blocks for e in ordered) == self.pinned_blocks, (ordered, self.pinned_blocks)
        assert self.pinned_blocks <= self.budget_blocks, (self.pinned_blocks, self.budget_blocks)
        for a, b in pairwise(ordered):
            assert a.end <= b.start, (a, b)
        assert all(e.start >= 0 and e.end <= self.num_blocks for e in ordered), ordered


class HasRow(Protocol):
    """What `CacheEngine.free` needs to know of a sequence."""

    @property
    def row(self) -> int: ...


class CacheEngine:
    """K and V tensors of a rank, and the block tables of the sequences that run on it.

    Per layer one K and one V tensor `[num_blocks * block_size, num_kv_heads, head_dim]`: a slot is a row, and an extent
    is a plain slice that any dense attention can read without a block table.

    Args:
        num_layers, num_blocks, block_size, num_kv_heads, head_dim: Shape.
        max_num_seqs: Rows of `block_tables`, those for system prompts included.
        max_blocks_per_seq: Columns of `block_tables`.
        dtype, device: Of the K/V tensors.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        import torch

        from vllm.ops.staging import to_device, write

        self._to_device, self._write = to_device, write
        self.block_size = block_size
        self.num_blocks = num_blocks
        shape = (num_blocks * block_size, num_kv_heads, head_dim)
        self.k_caches = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.v_caches = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.block_tables = torch.zeros((max_num_seqs, max_blocks_per_seq), dtype=torch.int64, device=device)
        self._num_blocks_of_row = [0] * max_num_seqs
        self._device = device
        self._copy = self._copier()

    def _copier(self) -> Callable[[list[tuple[int, int]]], None]:
        """What copies blocks fastest on this device."""
        from vllm.ops.cpu import kernels as cpu_kernels

        caches = [*self.k_caches, *self.v_caches]
        if self._device.type == "cuda":
            from vllm.ops.triton.copy import BlockCopier

            return BlockCopier(caches, self.block_size).copy
        if cpu_kernels.library() is not None:
            return cpu_kernels.BlockCopier(caches, self.block_size).copy
        return self._copy_by_index

    @staticmethod
    def bytes_per_block(block_size: int, num_layers: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Bytes of K and V of one block over all layers."""
        return 2 * block_size * num_layers * num_kv_heads * head_dim * itemsize

    def extent_slots(self, start_block: int, num_tokens: int) -> slice:
        """Rows of a K/V tensor that hold the first `num_tokens` tokens of an extent."""
        first = start_block * self.block_size
        return slice(first, first + num_tokens)

    def set_blocks(self, updates: list[tuple[int, int, list[int]]]) -> None:
        """Writes block ids into the block tables, all at once.

        Args:
            updates: (row, first column, block ids); of two that touch the same entry, the later one counts.

        Raises:
            RuntimeError: an update leaves a gap in a row's table; the plan is not one for this rank.
        """
        if not updates:
            return
        for row, first, blocks in updates:
            if first > self._num_blocks_of_row[row]:
                raise RuntimeError(f"row {row} has {self._num_blocks_of_row[row]} blocks, cannot add at {first}")
            self._num_blocks_of_row[row] = max(self._num_blocks_of_row[row], first + len(blocks))
        if len(updates) == 1:
            self._write(self.block_tables[row, first : first + len(blocks)], np.array(blocks, np.int64))
            return
        lengths = np.array([len(blocks) for _, _, blocks in updates])
        rows = np.repeat([row for row, _, _ in updates], lengths)
        starts = np.array([first for _, first, _ in updates]) - (lengths.cumsum() - lengths)
        columns = np.arange(len(rows)) + np.repeat(starts, lengths)
        values = np.fromiter(chain.from_iterable(blocks for _, _, blocks in updates), np.int64, len(rows))
        # Of two that touch the same entry the later one counts, so entries are looked for from the end.
        _, kept = np.unique((rows * self.block_tables.shape[1] + columns)[::-1], return_index=True)
        rows, columns, values = (x[::-1][kept] for x in (rows, columns, values))
        where_row, where_column, written = self._to_device(np.stack((rows, columns, values)), self._device)
        self.block_tables[where_row, where_column] = written

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copies whole blocks, all layers: `pairs` of (source, destination).

        All sources are read before any destination is written, so that a block may be both.
        """
        if pairs:
            self._copy(pairs)

    def _copy_by_index(self, pairs: list[tuple[int, int]]) -> None:
        import torch

        moves = torch.tensor(pairs, dtype=torch.int64, device=self._device)
        offsets = torch.arange(self.block_size, device=self._device)
        source = (moves[:, :1] * self.block_size + offsets).flatten()
        destination = (moves[:, 1:] * self.block_size + offsets).flatten()
        for cache in (*self.k_caches, *self.v_caches):
            cache[destination] = cache[source]

    def clear(self, blocks: list[int]) -> None:
        """Fills blocks with zeros, all layers."""
        for block in blocks:
            slots = self.extent_slots(block, self.block_size)
            for cache in (*self.k_caches, *self.v_caches):
                cache[slots].zero_()

    def free(self, seq: HasRow) -> None:
        """Forgets the block table of a sequence that no longer runs. Of a system prompt, too, that is all that ends:
        its KV lies in extents, read by others, which only their unpinning ends."""
        self._num_blocks_of_row[seq.row] = 0
