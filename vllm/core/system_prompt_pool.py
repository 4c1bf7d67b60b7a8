"""The pool of pinned system prompts, as the scheduler and the engine see it.

The pool decides; the scheduler moves blocks and runs the prefills. What it is made of, each part the owner of its
state, in the order in which they use one another:

    PromptRouter    what happens to a request: it reads a prompt, brings one, or runs unpinned
    PromptLife      states of prompts, their readers, probation, ttl, end
    PromptRoom      extents, budget, which prompt gives way to which
    PromptTiers     copies on the host and on disk
    Demand          how often prompts are asked for, those that are gone included
    PromptRegistry  which prompts there are
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from typing import Any

from vllm.config import SystemPromptConfig
from vllm.core import pool_report
from vllm.core.demand import Demand
from vllm.core.pinned_prompt import (
    BlockCount,
    Outcome,
    PinClass,
    PinnedPrompt,
    PromptState,
    SystemPromptRefusedError,
    prompt_id,
    prompt_read_by,
)
from vllm.core.pool_log import PoolLog
from vllm.core.prefix_tree import Walk
from vllm.core.prompt_index import EVERYBODY
from vllm.core.prompt_life import PromptLife
from vllm.core.prompt_registry import PromptRegistry
from vllm.core.prompt_room import PoolBytes, PromptRoom, WindowRoom, WindowShortage
from vllm.core.prompt_router import PromptRouter
from vllm.core.prompt_tiers import PromptTiers
from vllm.core.wants import Decision, Want
from vllm.inputs import CacheMark
from vllm.kv_cache.extents import Extent, PinnedBlockPool
from vllm.logger import init_logger
from vllm.outputs import SystemPromptInfo, SystemPromptPoolInfo
from vllm.sequence import Sequence
from vllm.system_prompt_store.manifest import SnapshotRecord
from vllm.token_ids import TokenIds, token_array

__all__ = ["Outcome", "PinClass", "PinnedPrompt", "PromptState", "SystemPromptPool", "SystemPromptRefusedError"]

logger = init_logger(__name__)


class SystemPromptPool:
    """Routes requests to pinned prompts and decides what is pinned.

    Args:
        config: Mode, limits, ttl.
        blocks: The pinned part of the KV cache; its budget is the pool's.
        block_size: Tokens in a block.
        on_release: Called with an extent whose pin has ended, so that its blocks become schedulable again.
        clock: Seconds since the epoch; replaced in tests.
        bytes_per_block: Of K and V, over all layers and ranks; shown in listings.
        tiers: Where prompts are kept besides the device; by default nowhere.
        windows: The pinned part of the window group, where there is one.

    Attributes:
        log: What the operator is told of prompts that ran unpinned or vary.
    """

    def __init__(
        self,
        config: SystemPromptConfig,
        blocks: PinnedBlockPool,
        block_size: int,
        on_release: Callable[[Extent], None],
        clock: Callable[[], float] = time.time,
        bytes_per_block: int = 0,
        tiers: PromptTiers | None = None,
        windows: WindowRoom | None = None,
    ) -> None:
        self.config = config
        self.tiers = tiers or PromptTiers()
        self.blocks = blocks
        self.block_size = block_size
        self.bytes_per_block = bytes_per_block
        self.log = PoolLog()
        self._clock = clock
        self._registry = PromptRegistry()
        self._demand = Demand()
        self._room = PromptRoom(
            blocks, block_size, config.min_tokens, on_release, self._registry, self._demand, self.tiers, windows
        )
        self._life = PromptLife(self._registry, self._room, self._demand, self.tiers, self.log, clock)
        self._router = PromptRouter(
            config, self._registry, self._room, self._life, self._demand, self.tiers, self.log, clock
        )

    # Requests --------------------------------------------------------------------------------------------------

    def route(self, seq: Sequence, num_system_tokens: int | None, marks: Several[CacheMark] = ()) -> Outcome | None:
        """Attaches `seq` to a system prompt, or says why it runs unpinned.

        Args:
            seq: A new sequence that holds no blocks.
            num_system_tokens: Length of the system prompt at its head, or None when its caller knows of none.
            marks: Further ends of prefixes that the client marked.

        Returns the outcome; None when no system prompt is in play. Whether the sequence must wait for a prefill is
        `is_waiting(seq)`.
        """
        return self._router.route(seq, num_system_tokens, marks)

    def attach_sibling(self, seq: Sequence, sibling: Sequence) -> None:
        """Lets another output of one request read what the first one reads; its request was counted already."""
        prompt = prompt_read_by(sibling)
        if prompt is not None:
            self._life.attach(seq, prompt)

    def detach(self, seq: Sequence) -> None:
        """Ends the reading of a finished sequence."""
        self._life.detach(seq)

    def is_waiting(self, seq: Sequence) -> bool:
        """Whether `seq` waits for its system prompt's prefill, or for its way back to the device."""
        prompt = prompt_read_by(seq)
        return prompt is not None and prompt.state != PromptState.PINNED

    # Prompts of an operator ------------------------------------------------------------------------------------

    def add(
        self,
        token_ids: Iterable[int],
        name: str | None = None,
        ttl: float | None = None,
        pin: PinClass = PinClass.HARD,
        source: str = "declared",
    ) -> PinnedPrompt:
        """Declares a system prompt; the same tokens give the same prompt.

        Raises:
            SystemPromptRefusedError: it cannot be pinned.
        """
        token_ids = token_array(token_ids)
        existing = self._registry.get(prompt_id(token_ids))
        if existing is not None:
            if existing.doomed:
                raise SystemPromptRefusedError(
                    Outcome.BUSY, f"System prompt {existing.id} is being removed; its last readers still run."
                )
            existing.source, existing.pin, existing.ttl = source, pin, ttl
            existing.name = name or existing.name
            self._life.track_ttl(existing)
            self.tiers.note_change(existing)
            self._life.promote(existing)
            self._life.recall(existing)
            self._life.save(existing)
            return existing
        want = Want(len(token_ids), pin, ttl, source, EVERYBODY, reused=True)
        refusal: Outcome | None = Outcome.DISABLED
        if self.config.mode != "off":
            _, size, parents = self._extension(token_ids, EVERYBODY)
            refusal = self._room.refusal(token_ids, want, size, parents)
        if refusal is not None:
            raise SystemPromptRefusedError(refusal, pool_report.reason(self, refusal, len(token_ids)))
        return self._life.register(token_ids, want, name)

    def restore(self, record: SnapshotRecord) -> PinnedPrompt | None:
        """Pins again, with the next steps, what a snapshot is of. Returns None where it may not be pinned now."""
        pin, scope = PinClass[record.pin.upper()], bytes.fromhex(record.scope)
        key = prompt_id(record.token_ids, scope)
        if key != record.prompt_id or key in self._registry or self.config.mode == "off":
            return None
        if pin != PinClass.HARD and self.config.mode == "declared":
            return None
        token_ids = token_array(record.token_ids)
        start, size, parents = self._extension(token_ids, scope)
        # An operator's prompt is pinned anyway: what the snapshot cannot give is computed from its tokens.
        if start != record.start and pin != PinClass.HARD:
            return None
        want = Want(len(token_ids), pin, record.ttl, record.source, scope, reused=True)
        refusal = self._room.refusal(token_ids, want, size, parents)
        if pin != PinClass.HARD and not self._room.fits(size):
            # No request has asked for it yet, so it displaces nothing.
            refusal = Outcome.OVER_BUDGET
        if refusal is not None:
            logger.warning("System prompt %s is not brought back from its snapshot: %s.", key, refusal.value)
            return None
        return self._life.register(token_ids, want, record.name)

    def _extension(self, token_ids: TokenIds, scope: bytes) -> tuple[int, BlockCount, list[PinnedPrompt]]:
        """What a new prompt would add to the pool: the position of its first own token, the blocks of its own tokens,
        and the prompt that it would continue, if any."""
        parent = self._registry.index.parent_of(token_ids, scope)
        start = parent.num_tokens if parent is not None else 0
        return start, self._room.blocks_of(len(token_ids) - start), [] if parent is None else [parent]

    def update(self, key: str, **changes: Any) -> PinnedPrompt:
        """Changes the `name` or `ttl` of a prompt; its ttl counts from now on.

        Raises:
            KeyError: no such prompt.
        """
        prompt = self._registry[key]
        if "name" in changes:
            prompt.name = changes["name"]
        if "ttl" in changes:
            prompt.ttl = changes["ttl"]
            prompt.touch(self._clock())
            self._life.track_ttl(prompt)
        self.tiers.note_change(prompt)
        return prompt

    def remove(self, key: str) -> PinnedPrompt:
        """Ends a pin: at once if nobody holds it, else when its last reader has finished and its last child is gone.

        Raises:
            KeyError: no such prompt.
        """
        prompt = self._registry[key]
        self._life.remove(prompt)
        return prompt

    def set_budget(self, num_tokens: int) -> None:
        """Changes how many tokens may be pinned; what must stay schedulable stays so, in each cache group.

        Raises:
            ValueError: more than that is pinned or promised already.
        """
        num_blocks = num_tokens // self.block_size
        while self.taken_blocks > num_blocks and self.give_way():
            pass
        if num_blocks < self.taken_blocks:
            raise ValueError(
                f"{self.taken_blocks * self.block_size} tokens are pinned already, more than {num_tokens}; "
                "remove prompts first."
            )
        self._room.set_budget(num_blocks)

    # Steps, driven by the scheduler ----------------------------------------------------------------------------

    @property
    def pending(self) -> list[PinnedPrompt]:
        """Prompts that wait for room."""
        return self._life.pending

    @property
    def computing(self) -> list[PinnedPrompt]:
        """Prompts that have a place and are being computed."""
        return self._life.computing

    @property
    def has_prefill(self) -> bool:
        """Whether a prompt is on its way to being pinned."""
        return bool(self._life.pending or self._life.computing or self._life.loading)

    def expire(self) -> None:
        """Ends pins whose ttl has run out."""
        self._life.expire()

    def give_way(self) -> bool:
        """Displaces the prompt on probation that is worth least; returns whether there was one.

        The cache of suffixes gives its blocks first: a prompt on probation never takes more than the budget, and the
        suffixes behind it are of no use without it.
        """
        going = self._room.least_on_probation()
        if going is None:
            return False
        self._life.displace(going)
        return True

    def find_room(self, prompt: PinnedPrompt) -> tuple[Extent, ...] | None:
        """The place for a pending prompt, in as few extents as there is room for; None when none can be had."""
        found: tuple[Extent, ...] | None = None

        def is_enough() -> bool:
            nonlocal found
            found = self._room.find(prompt)
            return found is not None

        self._life.make_room(prompt, is_enough)
        return found

    def find_window_room(self, prompt: PinnedPrompt) -> tuple[Extent, ...]:
        """Its place in the window group; there is one if `find_room` has just found one."""
        return self._room.find_window(prompt) or ()

    def refuse(self, prompt: PinnedPrompt) -> list[Sequence]:
        """Gives up a pending prompt that finds no room: its children continue its parent instead, and its waiters read
        its parent or nothing. Returns those of the waiters that need not wait any more."""
        self._router.note_refused(prompt)
        return [seq for seq in self._life.refuse(prompt) if not self.is_waiting(seq)]

    def place(self, prompt: PinnedPrompt, extents: tuple[Extent, ...], window_extents: tuple[Extent, ...] = ()) -> None:
        """Gives a pending prompt these (emptied) blocks; it is computed from now on, or loaded where a tier has it."""
        self._life.place(prompt, extents, window_extents)

    def begin_prefill(self, prompt: PinnedPrompt) -> None:
        """Records that the first chunk of a prompt is planned."""
        self._life.begin_prefill(prompt)

    def end_prefill(self, prompt: PinnedPrompt) -> list[Sequence]:
        """Records that the last chunk of a prompt is planned; returns the sequences that waited for it."""
        return self._life.end_prefill(prompt)

    def note_prefill(self, prompt: PinnedPrompt) -> None:
        """Records that the last chunk of a prompt has run."""
        self._life.note_prefill(prompt)

    def fail_load(self, prompt: PinnedPrompt) -> None:
        """Computes a prompt in the place that it has, since what a tier had of it was worth nothing."""
        self._life.fail_load(prompt)

    def end_load(self, prompt: PinnedPrompt) -> list[Sequence]:
        """Records that a prompt is back on the device; returns the sequences that waited for it."""
        return self._life.end_load(prompt)

    def end_save(self, prompt: PinnedPrompt) -> None:
        """Records that the extents of a prompt have been copied to the host."""
        self._life.end_save(prompt)

    # Looking at it ---------------------------------------------------------------------------------------------

    def get(self, key: str) -> PinnedPrompt | None:
        return self._registry.get(key)

    def prompts(self) -> list[PinnedPrompt]:
        return self._registry.prompts()

    def describe(self, prompt: PinnedPrompt) -> SystemPromptInfo:
        windows = self._room.windows
        return prompt.info(self.bytes_per_block, 0 if windows is None else windows.bytes_per_block)

    def info(self) -> SystemPromptPoolInfo:
        return pool_report.info(self)

    def explain(self, seq: Sequence, num_system_tokens: int | None, marks: Several[CacheMark] = ()) -> dict[str, Any]:
        """What would happen to a request, and why; see `pool_report.explain`."""
        return pool_report.explain(self, seq, num_system_tokens, marks)

    def decide(self, seq: Sequence, wants: list[Want]) -> Decision:
        """What would happen to a request that asks for `wants`; changes nothing."""
        return self._router.decide(seq, wants)

    def is_reused(self, token_ids: TokenIds, want: Want) -> bool:
        """Whether a prompt that is not in the pool would be pinned at once, not put on probation."""
        return self._demand.is_reused(token_ids, want)

    def nearest(self, seq: Sequence) -> Walk[PinnedPrompt] | None:
        """What a request meets among the prompts that it may read; see `PromptIndex.nearest`."""
        return self._registry.index.nearest(seq)

    @property
    def taken_blocks(self) -> int:
        """Blocks that are pinned or promised."""
        return self._room.taken_blocks

    @property
    def budget_tokens(self) -> int:
        return self.blocks.budget_blocks * self.block_size

    @property
    def num_bytes(self) -> PoolBytes:
        """Bytes of K and V that are pinned, and that may be, over all layers and ranks."""
        return self._room.num_bytes(self.bytes_per_block)

    def window_shortage(self, num_tokens: int) -> WindowShortage | None:
        """What a prompt of so many tokens lacks where that is room for what layers with a window keep, nothing else."""
        return self._room.window_shortage(num_tokens)

    @property
    def pinned_tokens(self) -> int:
        """Tokens in extents, on probation or not."""
        return self._room.pinned_tokens

    @property
    def probation_tokens(self) -> int:
        """Tokens in extents of prompts on probation."""
        return self._room.probation_tokens

    @property
    def num_prompts(self) -> int:
        return len(self._registry)

    @property
    def num_readers(self) -> int:
        """Unfinished sequences attached to a prompt."""
        return self._life.num_readers

    @property
    def num_prefills(self) -> int:
        """Prefills of prompts that have begun."""
        return self._life.num_prefills

    @property
    def num_displaced(self) -> int:
        """Pinned prompts that have given way to others."""
        return self._life.num_displaced

    @property
    def outcomes(self) -> Counter[str]:
        """Requests by `Outcome`."""
        return self._router.outcomes

    @property
    def tokens_reused(self) -> int:
        """Tokens that requests read from pinned prompts instead of computing them."""
        return self._router.tokens_reused

    def take_prefill_seconds(self) -> list[float]:
        """How long the prefills took that have ended since the last call."""
        seconds, self._life.prefill_seconds = self._life.prefill_seconds, []
        return seconds

    def check_integrity(self, readers: dict[str, int]) -> None:
        """Raises AssertionError when the books do not add up.

        Args:
            readers: Unfinished attached sequences by prompt id, counted by the caller.
        """
        self._registry.check_integrity()
        self._room.check_integrity()
        self._life.check_integrity(readers)
        self._demand.check_integrity()
        self.tiers.check_integrity({p.id: p for p in self._registry.prompts()})
