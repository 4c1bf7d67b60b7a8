"""Which part of the KV memory is pinned.

    [0 ....... schedulable blocks ....... | wall | ... pinned extents ... num_blocks)

Plain integers: the scheduler uses this without a device.
"""

from __future__ import annotations

from itertools import chain, pairwise
from typing import NamedTuple


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
