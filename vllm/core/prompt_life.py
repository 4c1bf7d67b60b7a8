"""The life of a system prompt: its states, who holds it, and when it ends.

    pending ──room found──▶ computing ──last chunk done──▶ pinned ──removed, nobody holds it──▶ (gone)
       │                       ▲ damaged                     ▲ ▲│
       ├──room found, kept in a tier──▶ loading ──copied─────┘ ││ room needed, nobody reads it, copy on the host
       ▲─────────────────────────asked for──────────── host ◀──┘
       └───no room──▶ (refused: its waiters run on what is left of its chain)

A prompt that requests bring is on probation: the first use computes it, the second use pins it. A prompt on probation
gives way to everything that needs its room.

`_enter` is the only place where a state changes.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable

from vllm.core.demand import Demand
from vllm.core.pinned_prompt import PinClass, PinnedPrompt, PromptState, prompt_read_by
from vllm.core.pool_log import PoolLog
from vllm.core.prompt_registry import PromptRegistry
from vllm.core.prompt_room import PromptRoom
from vllm.core.prompt_tiers import PromptTiers
from vllm.core.wants import Want
from vllm.kv_cache.extents import Extent
from vllm.logger import init_logger
from vllm.sequence import Sequence
from vllm.token_ids import TokenIds

logger = init_logger(__name__)


class PromptLife:
    """Owns the states of all prompts, their readers, and the times at which their pins end.

    Args:
        clock: Seconds since the epoch.

    Attributes:
        pending: Prompts that wait for room.
        computing: Prompts that have a place and are being computed.
        loading: Prompts that have a place and are copied from a tier.
        num_readers: Unfinished sequences attached to any prompt.
        num_displaced: Pinned prompts that have given way to others.
        num_prefills: Prefills of prompts that have begun.
        prefill_seconds: How long prefills took that have ended; whoever reports them empties it.
    """

    def __init__(
        self,
        registry: PromptRegistry,
        room: PromptRoom,
        demand: Demand,
        tiers: PromptTiers,
        log: PoolLog,
        clock: Callable[[], float],
    ) -> None:
        self.pending: list[PinnedPrompt] = []
        self.computing: list[PinnedPrompt] = []
        self.loading: list[PinnedPrompt] = []
        self.num_readers = 0
        self.num_displaced = 0
        self.num_prefills = 0
        self.prefill_seconds: list[float] = []
        self._registry = registry
        self._room = room
        self._demand = demand
        self._tiers = tiers
        self._log = log
        self._clock = clock
        # On probation and computed, but not copied to the host yet; the oldest first.
        self._unsaved: dict[str, PinnedPrompt] = {}
        self._expiries: list[tuple[float, str]] = []

    # Beginning -------------------------------------------------------------------------------------------------

    def register(self, token_ids: TokenIds, want: Want, name: str | None = None, is_use: bool = False) -> PinnedPrompt:
        """Takes in a new prompt that `PromptRoom.refusal` has let pass; it waits for its place from now on.

        Args:
            is_use: The latest request brings it and uses it.
        """
        parent = self._registry.index.parent_of(token_ids, want.scope)
        if parent is not None:
            self.recall(parent)
        prompt = PinnedPrompt(
            token_ids,
            parent,
            self._room.block_size,
            name=name,
            source=want.source,
            pin=want.pin,
            ttl=want.ttl,
            scope=want.scope,
            on_probation=not self._demand.is_reused(token_ids, want),
            now=self._clock(),
            windows=self._room.layout,
        )
        self._demand.hand_over(prompt, is_use)
        if not prompt.on_probation and parent is not None:
            self.promote(parent)
        # Evict only now, when the new prompt is sure to be registered.
        self.make_room(prompt, lambda: self._room.fits(prompt.size))
        self._log.note_prompt(prompt.id, token_ids, want)
        self._registry.add(prompt)
        self._enqueue(prompt)
        prompt.touch(prompt.created)
        self.track_ttl(prompt)
        # One line a prompt on probation would fill the log: there may be one a request.
        log, how = (logger.debug, "put on probation") if prompt.on_probation else (logger.info, "pinned")
        log("System prompt %s: %d tokens to be %s (%s).", prompt.id, prompt.num_tokens, how, prompt.source)
        return prompt

    def promote(self, prompt: PinnedPrompt) -> None:
        """Ends the probation of a prompt and of the prompts that it continues."""
        above: PinnedPrompt | None = prompt
        while above is not None and above.on_probation:
            self._room.end_probation(above)
            self._unsaved.pop(above.id, None)
            logger.info("System prompt %s is used again: pinned.", above.id)
            self.save(above)
            above = above.parent

    def recall(self, prompt: PinnedPrompt) -> None:
        """Asks for a prompt. If only the host has it, it waits for room on the device, behind those it continues."""
        if prompt.state == PromptState.HOST:
            if prompt.parent is not None:
                self.recall(prompt.parent)
            self._enter(prompt, PromptState.PENDING)

    def place(self, prompt: PinnedPrompt, extents: tuple[Extent, ...], window_extents: tuple[Extent, ...] = ()) -> None:
        """Gives a pending prompt its extents. It is computed from now on, or loaded where a tier has it."""
        may_load = self._tiers.can_load(prompt)
        self._enter(prompt, PromptState.LOADING if may_load else PromptState.COMPUTING)
        self._room.give(prompt, extents, window_extents)
        self._save_before_it_is_full()
        if may_load:
            self._tiers.begin_load(prompt)

    def begin_prefill(self, prompt: PinnedPrompt) -> None:
        """Records that the first chunk of a prompt is planned."""
        prompt.prefill_started = time.perf_counter()
        self.num_prefills += 1

    def fail_load(self, prompt: PinnedPrompt) -> None:
        """Computes a prompt in the place that it has, since what a tier had of it was worth nothing."""
        self._enter(prompt, PromptState.COMPUTING)

    def end_load(self, prompt: PinnedPrompt) -> list[Sequence]:
        """Ends a load; returns the sequences that waited for it."""
        if prompt.payer is not None:
            prompt.payer.num_cache_write_tokens -= prompt.num_own_tokens
        prompt.sequence.num_computed_tokens = prompt.num_tokens
        waiters = self._end_wait(prompt)
        self.release_if_done(prompt)
        return waiters

    def end_prefill(self, prompt: PinnedPrompt) -> list[Sequence]:
        """Records that the last chunk of a prompt is planned; returns the sequences that waited for it."""
        prompt.is_being_written = True
        return self._end_wait(prompt)

    def note_prefill(self, prompt: PinnedPrompt) -> None:
        """Records that the last chunk of a prompt has run, and how long its prefill took. A prompt removed meanwhile
        ends only now, since the ranks wrote into its blocks."""
        prompt.is_being_written = False
        if prompt.on_probation:
            self._unsaved[prompt.id] = prompt
            self._save_before_it_is_full()
        else:
            self.save(prompt)
        self.release_if_done(prompt)
        self.prefill_seconds.append(time.perf_counter() - prompt.prefill_started)

    def _end_wait(self, prompt: PinnedPrompt) -> list[Sequence]:
        self._enter(prompt, PromptState.PINNED)
        prompt.payer = None
        prompt.touch(self._clock())
        waiters, prompt.waiters = prompt.waiters, []
        return waiters

    # Readers ---------------------------------------------------------------------------------------------------

    def attach(self, seq: Sequence, prompt: PinnedPrompt) -> None:
        """Makes `seq` a reader of `prompt`."""
        self.recall(prompt)
        seq.system_prompt = prompt
        prompt.readers += 1
        self.num_readers += 1
        if prompt.state != PromptState.PINNED:
            prompt.waiters.append(seq)
            prompt.serve_by(seq.priority, seq.order)

    def detach(self, seq: Sequence) -> None:
        """Ends the reading of a finished sequence."""
        prompt = prompt_read_by(seq)
        if prompt is None:
            return
        seq.system_prompt = None
        prompt.readers -= 1
        self.num_readers -= 1
        if seq in prompt.waiters:
            prompt.waiters.remove(seq)
        self._let_go(prompt)

    def refuse(self, prompt: PinnedPrompt) -> list[Sequence]:
        """Gives up a pending prompt that finds no room; returns its waiters, which read its parent now or nothing.

        Its children continue its parent instead.
        """
        parent = prompt.parent
        for child in list(prompt.children):
            if child.state == PromptState.PENDING:
                self._room.promise(-child.size)
                # The child must hold more tokens now than its image has.
                self._tiers.drop(child)
                child.follow(parent)
                self._room.promise(child.size)
        waiters, prompt.waiters = prompt.waiters, []
        prompt.readers -= len(waiters)
        self.num_readers -= len(waiters)
        for seq in waiters:
            seq.system_prompt = None
            seq.num_cache_write_tokens = max(0, seq.num_cache_write_tokens - prompt.num_own_tokens)
            if parent is not None:
                self.attach(seq, parent)
        self._drop_pending(prompt)
        return waiters

    def _let_go(self, prompt: PinnedPrompt) -> None:
        """Records that a reader, a child or a copy no longer holds `prompt`."""
        if prompt.on_probation and prompt.state == PromptState.PENDING and not prompt.is_held:
            self._drop_pending(prompt)
        self.release_if_done(prompt)
        if prompt.next_expiry is None and not prompt.is_held and prompt.state != PromptState.REMOVED:
            self.track_ttl(prompt)

    # Making room -----------------------------------------------------------------------------------------------

    def make_room(self, prompt: PinnedPrompt, is_enough: Callable[[], bool]) -> None:
        """Displaces what gives way to `prompt`, one after the other, until `is_enough` or nothing more gives way."""
        if is_enough():
            return
        for other in self._room.going_for(prompt):
            self.displace(other)
            if is_enough():
                return

    def displace(self, prompt: PinnedPrompt) -> None:
        """Takes a prompt that nobody reads off the device. It stays on the host if that has it, and ends otherwise."""
        if prompt.is_being_saved:
            self._tiers.cancel_save(prompt)
            prompt.is_being_saved = False
        if self._tiers.is_on_host(prompt):
            logger.debug("System prompt %s leaves the device for the host.", prompt.id)
            self._enter(prompt, PromptState.HOST)
            self._room.take_back(prompt)
            return
        log = logger.debug if prompt.on_probation else logger.info
        log("System prompt %s gives way to another one.", prompt.id)
        self.num_displaced += not prompt.on_probation
        self._forget_all(prompt)

    def save(self, prompt: PinnedPrompt) -> None:
        """Begins to copy a prompt to the host, if the host or the disk is to keep it and does not yet."""
        if prompt.doomed or prompt.is_being_saved or prompt.is_being_written or prompt.state != PromptState.PINNED:
            return
        if self._tiers.wants_room(prompt):
            for other in self._room.leaving_host_for(prompt):
                self._leave_host(other)
                if self._tiers.has_room(self._tiers.blocks_of(prompt.size)):
                    break
        prompt.is_being_saved = self._tiers.save(prompt)

    def _save_before_it_is_full(self) -> None:
        """Has prompts on probation copied to the host, the oldest first, once they may soon have to leave the device.

        While there is room, most prompts that come once would be copied for nothing: the copies of 4 GB a second, and
        the host memory that is made ready for them, delay the steps.
        """
        if self._room.is_filling:
            waiting, self._unsaved = self._unsaved, {}
            for prompt in waiting.values():
                self.save(prompt)

    def end_save(self, prompt: PinnedPrompt) -> None:
        """Records that the extents of a prompt have been copied to the host."""
        prompt.is_being_saved = False
        self._let_go(prompt)

    def _leave_host(self, prompt: PinnedPrompt) -> None:
        """Takes a prompt that is not just being copied out of the host tier."""
        self._tiers.drop(prompt)
        if prompt.state == PromptState.HOST:
            self._forget_all(prompt)

    # End -------------------------------------------------------------------------------------------------------

    def remove(self, prompt: PinnedPrompt) -> None:
        """Ends a pin: at once if nobody holds it, else when its last reader has finished and its last child is gone."""
        prompt.doomed = True
        self.release_if_done(prompt)

    def track_ttl(self, prompt: PinnedPrompt) -> None:
        """Looks at the prompt again when its ttl would have run out; uses only move that moment later."""
        prompt.next_expiry = prompt.expires
        if prompt.next_expiry is not None:
            heapq.heappush(self._expiries, (prompt.next_expiry, prompt.id))

    def expire(self) -> None:
        """Ends pins whose ttl has run out."""
        if not self._expiries:
            return
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            when, key = heapq.heappop(self._expiries)
            prompt = self._registry.get(key)
            if prompt is None or prompt.next_expiry != when:
                continue
            prompt.next_expiry = None
            # `_let_go` looks again at a prompt that is held.
            if prompt.expires is None or prompt.is_held or prompt.doomed:
                continue
            if prompt.expires > now:
                self.track_ttl(prompt)
                continue
            logger.info("System prompt %s ends: not used for %g s.", key, prompt.ttl)
            self.remove(prompt)

    def release_if_done(self, prompt: PinnedPrompt) -> None:
        """Ends a removed prompt if nobody holds it and nothing is written into its blocks."""
        settled = prompt.state not in (PromptState.COMPUTING, PromptState.LOADING, PromptState.REMOVED)
        if prompt.doomed and settled and not prompt.is_held:
            self._forget(prompt)

    def _drop_pending(self, prompt: PinnedPrompt) -> None:
        """Gives up a prompt without a place; what the host has of it stays there."""
        prompt.payer = None
        if prompt.pin != PinClass.HARD and self._tiers.is_on_host(prompt) and _may_wait_on_host(prompt):
            self._enter(prompt, PromptState.HOST)
            self.release_if_done(prompt)
        else:
            self._forget_all(prompt)

    def _forget_all(self, prompt: PinnedPrompt) -> None:
        """Ends a prompt that nobody reads, and the prompts on the host that continue it."""
        for child in list(prompt.children):
            self._forget_all(child)
        self._forget(prompt)

    def _forget(self, prompt: PinnedPrompt) -> None:
        """Ends a prompt that nobody holds, and gives its room back."""
        self._enter(prompt, PromptState.REMOVED)
        self._registry.remove(prompt)
        self._room.take_back(prompt)
        self._tiers.forget(prompt)
        self._demand.take_back(prompt)
        if prompt.parent is not None:
            prompt.parent.children.discard(prompt)
            self._let_go(prompt.parent)

    # States ----------------------------------------------------------------------------------------------------

    def _enter(self, prompt: PinnedPrompt, state: PromptState) -> None:
        if prompt.state == PromptState.PENDING:
            self.pending.remove(prompt)
            self._room.promise(-prompt.size)
        if prompt.state == PromptState.COMPUTING:
            self.computing.remove(prompt)
        if prompt.state == PromptState.LOADING:
            self.loading.remove(prompt)
        prompt.state = state
        if state != PromptState.PINNED:
            self._unsaved.pop(prompt.id, None)
        if state == PromptState.PENDING:
            self._enqueue(prompt)
        if state == PromptState.COMPUTING:
            self.computing.append(prompt)
        if state == PromptState.LOADING:
            self.loading.append(prompt)

    def _enqueue(self, prompt: PinnedPrompt) -> None:
        self.pending.append(prompt)
        self._room.promise(prompt.size)

    def check_integrity(self, readers: dict[str, int]) -> None:
        """Raises AssertionError when states, queues and readers do not add up.

        Args:
            readers: Unfinished attached sequences by prompt id, counted by the caller.
        """
        prompts = self._registry.prompts()
        for p in prompts:
            assert p.readers == readers.get(p.id, 0), (p.id, p.readers, readers.get(p.id, 0))
            assert len(p.waiters) <= p.readers
            for state, those in (
                (PromptState.PENDING, self.pending),
                (PromptState.COMPUTING, self.computing),
                (PromptState.LOADING, self.loading),
            ):
                assert (p.state == state) == (p in those), (p, those)
            assert (p.state in (PromptState.PENDING, PromptState.HOST)) == (not p.extents)
            assert p.state != PromptState.HOST or (self._tiers.is_on_host(p) and _may_wait_on_host(p)), p
            assert not (p.on_probation and p.pin == PinClass.HARD), p
            assert p.id not in self._unsaved or (p.on_probation and p.state == PromptState.PINNED), p
            if p.parent is not None:
                assert p.state != PromptState.PINNED or p.parent.state == PromptState.PINNED, (p, p.parent)
                assert p.last_used <= p.parent.last_used
                assert p.rank > p.parent.rank or not p.waiters, (p.rank, p.parent.rank)
                assert p.on_probation or not p.parent.on_probation
        assert self.num_readers == sum(readers.values()), (self.num_readers, readers)
        known = {p.id for p in prompts}
        assert set(readers) <= known, set(readers) - known


def _may_wait_on_host(prompt: PinnedPrompt) -> bool:
    """Whether nothing needs the K/V of a prompt on the device."""
    return not prompt.readers and not prompt.num_children_on_device
