"""Where system prompts lie in the KV cache, and which of them would give way to another one.

The room decides with numbers and changes no state of a prompt but its place. `PromptLife` carries out what it decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Several
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from vllm.core.demand import Demand
from vllm.core.pin_policy import Claim, claim_of, giving_way, leaving_host, worth_now
from vllm.core.pinned_prompt import (
    MAX_CHAIN,
    MAX_DEPTH,
    BlockCount,
    Outcome,
    PinClass,
    PinnedPrompt,
    PromptState,
    prompt_id,
)
from vllm.core.prompt_registry import PromptRegistry
from vllm.core.prompt_tiers import PromptTiers
from vllm.core.wants import Want
from vllm.kv_cache.extents import Extent, PinnedBlockPool
from vllm.kv_cache.windows import WindowLayout
from vllm.token_ids import TokenIds


@dataclass(frozen=True)
class WindowRoom:
    """The pinned part of the window group.

    Attributes:
        blocks: Where its extents lie.
        layout: What prompts keep there.
        on_release: Called with an extent whose pin has ended.
        bytes_per_block: Of K and V, over its layers and all ranks.
    """

    blocks: PinnedBlockPool
    layout: WindowLayout
    on_release: Callable[[Extent], None]
    bytes_per_block: int = 0


class WindowShortage(NamedTuple):
    """Why a prompt does not fit into the window group, in tokens: what it would keep there, and what of the budget is
    taken."""

    window: int
    kept: int
    taken: int
    budget: int


class PoolBytes(NamedTuple):
    """K and V of both groups, in bytes: what is pinned, and the budget."""

    pinned: int
    budget: int


class PromptRoom:
    """Owns the extents of prompts, and the blocks that are promised to prompts without a place.

    Args:
        blocks: The pinned part of the KV cache; its budget is the pool's.
        block_size: Tokens in a block.
        min_tokens: Shortest prompt that is pinned.
        on_release: Called with an extent whose pin has ended, so that its blocks become schedulable again.
        windows: The same of the window group, where there is one; a prompt needs room in both.

    Attributes:
        pinned_tokens: Tokens in extents, on probation or not.
        probation_tokens: Those of them that are on probation.
    """

    def __init__(
        self,
        blocks: PinnedBlockPool,
        block_size: int,
        min_tokens: int,
        on_release: Callable[[Extent], None],
        registry: PromptRegistry,
        demand: Demand,
        tiers: PromptTiers,
        windows: WindowRoom | None = None,
    ) -> None:
        self.blocks = blocks
        self.windows = windows
        self.block_size = block_size
        self.pinned_tokens = 0
        self.probation_tokens = 0
        self._min_tokens = min_tokens
        self._on_release = on_release
        self._registry = registry
        self._demand = demand
        self._tiers = tiers
        self._promised = BlockCount(0)

    # Budget ----------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> WindowLayout | None:
        """What prompts keep in the window group; None where there is none."""
        return self.windows.layout if self.windows is not None else None

    def blocks_of(self, num_own_tokens: int) -> BlockCount:
        """Blocks that a prompt of so many own tokens takes."""
        return BlockCount.of(num_own_tokens, self.block_size, self.layout)

    @property
    def taken_blocks(self) -> int:
        """Blocks of the full group that are pinned or promised."""
        return self.blocks.pinned_blocks + self._promised.full

    def set_budget(self, num_blocks: int) -> None:
        """Changes the budget of the full group, and that of the window group, where no prompt keeps more blocks."""
        self.blocks.set_budget(num_blocks)
        if self.windows is not None:
            self.windows.blocks.set_budget(num_blocks)

    def num_bytes(self, bytes_per_block: int) -> PoolBytes:
        """Given the bytes of a block of the full group, over all ranks."""
        pools = [(self.blocks, bytes_per_block)]
        if self.windows is not None:
            pools.append((self.windows.blocks, self.windows.bytes_per_block))
        return PoolBytes(
            sum(pool.pinned_blocks * size for pool, size in pools),
            sum(pool.budget_blocks * size for pool, size in pools),
        )

    def window_shortage(self, num_tokens: int) -> WindowShortage | None:
        """What a prompt of so many tokens lacks in the window group, where it finds room in the full one."""
        size = self.blocks_of(num_tokens)
        missing = self._missing(size)
        if self.windows is None or missing.full > 0 or missing.window <= 0:
            return None
        pool = self.windows.blocks
        blocks = size.window, pool.pinned_blocks + self._promised.window, pool.budget_blocks
        return WindowShortage(self.windows.layout.window, *(n * self.block_size for n in blocks))

    @property
    def is_filling(self) -> bool:
        """Whether more than half of the budget is taken, so that prompts may soon have to leave the device."""
        missing = self._missing(BlockCount(0))
        if self.windows is not None and 2 * -missing.window < self.windows.blocks.budget_blocks:
            return True
        return 2 * -missing.full < self.blocks.budget_blocks

    def fits(self, size: BlockCount) -> bool:
        """Whether a prompt of so many blocks finds room besides all that is promised, and displaces nothing."""
        return _is_none(self._missing(size))

    def _missing(self, size: BlockCount) -> BlockCount:
        """Blocks by which the budgets are too small for so many more; negative where some are left."""
        full = self.taken_blocks + size.full - self.blocks.budget_blocks
        if self.windows is None:
            return BlockCount(full)
        window = self.windows.blocks
        return BlockCount(full, window.pinned_blocks + self._promised.window + size.window - window.budget_blocks)

    def promise(self, size: BlockCount) -> None:
        """Counts blocks for a prompt that waits for its place; a negative number ends such a promise."""
        self._promised += size

    def refusal(
        self, token_ids: TokenIds, want: Want, size: BlockCount, keep: Several[PinnedPrompt] = ()
    ) -> Outcome | None:
        """Why a prompt that needs so many blocks cannot be pinned; None if it can.

        Args:
            keep: Prompts that must not give way to it.
        """
        if len(token_ids) < self._min_tokens:
            return Outcome.TOO_SHORT
        missing = self._missing(size)
        if _is_none(missing):
            return None
        if size.full > self.blocks.budget_blocks:
            return Outcome.OVER_BUDGET
        if self.windows is not None and size.window > self.windows.blocks.budget_blocks:
            return Outcome.OVER_BUDGET
        claim, value = Claim.NEW, 0.0
        if want.pin == PinClass.HARD:
            claim = Claim.HARD
        elif self._demand.is_reused(token_ids, want):
            claim = Claim.REUSED
            value = self._demand.worth_of_newcomer(prompt_id(token_ids, want.scope))
        returns = self._has_host_room(size, claim != Claim.NEW, value)
        for prompt in self._giving_way(claim, want.pin, value, returns, keep):
            missing += -prompt.size
            if _is_none(missing):
                return None
        return Outcome.OVER_BUDGET

    # Who gives way ---------------------------------------------------------------------------------------------

    def going_for(self, prompt: PinnedPrompt) -> Iterator[PinnedPrompt]:
        """Prompts that give way to `prompt`, in the order in which they leave the device. Its parents stay."""
        value = self._demand.worth_of(prompt)
        returns = self._tiers.is_on_host(prompt) or self._has_host_room(prompt.size, not prompt.on_probation, value)
        parents, above = [], prompt.parent
        while above is not None:
            parents.append(above)
            above = above.parent
        return self._giving_way(claim_of(prompt), prompt.pin, value, returns, parents)

    def least_on_probation(self) -> PinnedPrompt | None:
        """The prompt on probation that leaves the device first; None if none may leave."""
        return next(self._giving_way(Claim.NEW, PinClass.SOFT, 0.0, False), None)

    def leaving_host_for(self, prompt: PinnedPrompt) -> Iterator[PinnedPrompt]:
        """Prompts whose images leave the host tier for that of `prompt`, in the order in which they go."""
        return self._leaving_host(not prompt.on_probation, worth_now(prompt, self._demand.num_requests))

    def _giving_way(
        self, claim: Claim, pin: PinClass, value: float, may_leave_again: bool, keep: Iterable[PinnedPrompt] = ()
    ) -> Iterator[PinnedPrompt]:
        prompts, now = self._registry.prompts(), self._demand.num_requests
        return giving_way(prompts, claim, pin, value, may_leave_again, now, self._tiers.is_on_host, keep)

    def _leaving_host(self, is_reused: bool, value: float) -> Iterator[PinnedPrompt]:
        return leaving_host(self._tiers.idle_owners(), is_reused, value, self._demand.num_requests)

    def _has_host_room(self, size: BlockCount, is_reused: bool, value: float) -> bool:
        """Whether the host tier has room for a prompt, or would make some."""
        num_blocks = self._tiers.blocks_of(size)
        if num_blocks > self._tiers.host.budget_blocks:
            return False
        if self._tiers.has_room(num_blocks):
            return True
        going = self._leaving_host(is_reused, value)
        return any(num_blocks <= total for total in accumulate(self._tiers.blocks_of(p.size) for p in going))

    # Places ----------------------------------------------------------------------------------------------------

    def find(self, prompt: PinnedPrompt) -> tuple[Extent, ...] | None:
        """Free extents for a prompt, as few as possible; None when there is no room now."""
        above = len(prompt.parent.prefix) if prompt.parent is not None else 0
        # A chain of extents has a limit. One extent is left for each prompt that may continue this one.
        most = MAX_CHAIN - above - (MAX_DEPTH - prompt.depth)
        if self.windows is not None and self.find_window(prompt) is None:
            return None
        return self.blocks.find_room(prompt.num_blocks, most)

    def find_window(self, prompt: PinnedPrompt) -> tuple[Extent, ...] | None:
        """The same in the window group; empty where there is none."""
        if self.windows is None:
            return ()
        return self.windows.blocks.find_room(prompt.size.window, MAX_CHAIN // MAX_DEPTH)

    def give(self, prompt: PinnedPrompt, extents: tuple[Extent, ...], window_extents: tuple[Extent, ...] = ()) -> None:
        """Pins extents for a prompt."""
        self.blocks.pin(prompt.id, extents)
        if self.windows is not None:
            self.windows.blocks.pin(prompt.id, window_extents)
        prompt.place(extents, window_extents)
        self._count_tokens(prompt, prompt.num_own_tokens)

    def take_back(self, prompt: PinnedPrompt) -> None:
        """Releases the extents of a prompt, if it has any."""
        if not prompt.extents:
            return
        for extent in self.blocks.unpin(prompt.id):
            self._on_release(extent)
        if self.windows is not None:
            for extent in self.windows.blocks.unpin(prompt.id):
                self.windows.on_release(extent)
        self._count_tokens(prompt, -prompt.num_own_tokens)
        prompt.leave()

    def end_probation(self, prompt: PinnedPrompt) -> None:
        """Pins a prompt that was on probation."""
        prompt.on_probation = False
        self.probation_tokens -= prompt.num_own_tokens if prompt.extents else 0

    def _count_tokens(self, prompt: PinnedPrompt, num_tokens: int) -> None:
        self.pinned_tokens += num_tokens
        self.probation_tokens += num_tokens if prompt.on_probation else 0

    def check_integrity(self) -> None:
        """Raises AssertionError when extents, promises and counts do not fit the prompts."""
        self.blocks.check_integrity()
        prompts = self._registry.prompts()
        placed = [p for p in prompts if p.extents]
        extents = {p.id: p.extents for p in placed}
        assert extents == self.blocks.extents, (extents, self.blocks.extents)
        assert self._promised == sum((p.size for p in prompts if p.state == PromptState.PENDING), BlockCount(0))
        if self.windows is not None:
            self.windows.blocks.check_integrity()
            assert {p.id: p.window_extents for p in placed} == self.windows.blocks.extents
        assert self.pinned_tokens == sum(p.num_own_tokens for p in placed)
        assert self.probation_tokens == sum(p.num_own_tokens for p in placed if p.on_probation)
        for p in prompts:
            assert p.size == self.blocks_of(p.num_own_tokens), p
            assert not p.extents or p.parent is None or p.parent.extents, (p, p.parent)
        for p in placed:
            assert sum(e.num_tokens for e in p.prefix) == p.num_tokens, p.prefix
            assert len(p.prefix) <= MAX_CHAIN and len(p.window_prefix) <= MAX_CHAIN


def _is_none(missing: BlockCount) -> bool:
    return missing.full <= 0 and missing.window <= 0
