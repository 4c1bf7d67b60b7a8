"""The registry of system prompts: which are known, which are being computed, which are pinned, and who reads them.

State of a prompt:

    pending ──room found──▶ computing ──last chunk done──▶ pinned ──removed, nobody holds it──▶ (gone)
       │                       ▲ damaged                     ▲ ▲│
       ├──room found, kept in a tier──▶ loading ──copied─────┘ ││ room needed, nobody reads it, copy on the host
       ▲─────────────────────────asked for──────────── host ◀──┘
       └───no room──▶ (refused: its waiters run on what is left of its chain)

What requests bring is on probation at first: the first use of a prompt computes it, the second one pins it. Until then
it gives way to whatever needs its room; `pin_policy` says in which order, and what else may be displaced.

The pool decides; the scheduler moves blocks and runs the prefills. `_enter` is the one place where a state changes.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from itertools import accumulate
from typing import Any

from vllm.config import SystemPromptConfig
from vllm.core import pool_report
from vllm.core.pin_policy import (
    USES_OF_A_PIN,
    Claim,
    Sighting,
    Sightings,
    claim_of,
    giving_way,
    leaving_host,
    worth,
    worth_now,
)
from vllm.core.pinned_prompt import (
    MAX_CHAIN,
    MAX_DEPTH,
    Outcome,
    PinClass,
    PinnedPrompt,
    PromptState,
    SystemPromptRefusedError,
    prompt_id,
    prompt_read_by,
)
from vllm.core.pool_log import PoolLog
from vllm.core.prompt_index import EVERYBODY, PromptIndex, may_extend
from vllm.core.prompt_tiers import PromptTiers
from vllm.core.shared_heads import MIN_SHARED_TOKENS, SharedHeads
from vllm.core.wants import Decision, Want, longer, wants_of
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

    Attributes:
        pending: Prompts that wait for room.
        computing: Those that have a place and are being computed.
        loading: Those that have a place and come from a tier.
        pinned_tokens: Tokens in extents, on probation or not.
        probation_tokens: Those of them that are on probation.
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
    ) -> None:
        self.config = config
        self.tiers = tiers or PromptTiers()
        self.blocks = blocks
        self.block_size = block_size
        self.bytes_per_block = bytes_per_block
        self._on_release = on_release
        self._clock = clock
        self._prompts: dict[str, PinnedPrompt] = {}
        self.index = PromptIndex()
        self.log = PoolLog()
        self._promised_blocks = 0
        self._expiries: list[tuple[float, str]] = []
        self._heads = SharedHeads()
        self._sightings = Sightings()
        self._num_requests = 0
        self.pending: list[PinnedPrompt] = []
        self.computing: list[PinnedPrompt] = []
        self.loading: list[PinnedPrompt] = []
        self.outcomes: Counter[str] = Counter()
        self.num_prefills = 0
        self.num_displaced = 0
        self.tokens_reused = 0
        self.num_readers = 0
        self.pinned_tokens = 0
        self.probation_tokens = 0
        self.prefill_seconds: list[float] = []

    # Routing ---------------------------------------------------------------------------------------------------

    def route(self, seq: Sequence, num_system_tokens: int | None, marks: Several[CacheMark] = ()) -> Outcome | None:
        """Attaches `seq` to a system prompt, or says why it runs unpinned.

        Args:
            seq: A new sequence that holds no blocks.
            num_system_tokens: Length of the system prompt at its head, or None when its caller knows of none.
            marks: Further ends of prefixes that the client marked.

        Returns the outcome; None when no system prompt is in play. Whether the sequence must wait for a prefill is
        `is_waiting(seq)`.
        """
        outcome = self._route(seq, num_system_tokens, marks)
        if outcome is not None and not seq.goes_on:
            self.outcomes[outcome.value] += 1
        return outcome

    def _route(self, seq: Sequence, num_system_tokens: int | None, marks: Several[CacheMark]) -> Outcome | None:
        in_play = bool(num_system_tokens or marks)
        if self.config.mode == "off":
            return Outcome.DISABLED if in_play else None
        if seq.sampling_params.prompt_logprobs is not None:
            # Every position's logits are asked for, so every position is computed.
            return Outcome.PROMPT_LOGPROBS if in_play else None
        wants = wants_of(self.config, seq, num_system_tokens, marks) or self._shared_head(seq)
        if not seq.goes_on:
            self._num_requests += 1
        decision = self.decide(seq, wants)
        for want, refusal in decision.refused:
            self._note_refusal(seq.token_ids[: want.num_tokens], want, refusal, seq)
        lengths = {want.num_tokens: want for want in wants}
        for prompt in decision.known:
            if prompt.num_tokens in lengths:
                self._renew(prompt, lengths[prompt.num_tokens])
        leaf = decision.known[-1] if decision.known else None
        if leaf is not None and not seq.goes_on:
            leaf.hits += 1
            leaf.tokens_saved += leaf.num_tokens
            self.tokens_reused += leaf.num_tokens
            leaf.use(self._num_requests)
            # Whoever brought it was its first use.
            self._promote(leaf)
        for want in decision.creates:
            leaf = self._register(seq.token_ids[: want.num_tokens], want, is_use=not seq.goes_on)
            leaf.serve_by(seq.priority, seq.order)
            leaf.payer = seq
            seq.num_cache_write_tokens += leaf.num_own_tokens
        if leaf is None:
            return decision.refused[-1][1] if decision.refused else None
        self._attach(seq, leaf)
        leaf.touch(self._clock())
        if not decision.creates:
            return Outcome.HIT
        return Outcome.PROBATION if leaf.on_probation else Outcome.CREATED

    def decide(self, seq: Sequence, wants: list[Want]) -> Decision:
        """What would happen to a request that asks for `wants`; changes nothing."""
        path = [p for p in self.index.readable(seq) if p.num_tokens < seq.num_prompt_tokens]
        known = [p for p in path if not p.doomed]
        doomed = {p.num_tokens for p in path if p.doomed}
        longest = known[-1].num_tokens if known else 0
        chain = [(p.num_tokens, p.depth, p.scope) for p in known]
        creates: list[Want] = []
        refused: list[tuple[Want, Outcome]] = []
        num_blocks = 0
        for want in wants:
            n = want.num_tokens
            if n <= longest:
                continue
            start, depth = max(
                ((m, d) for m, d, scope in chain if m < n and d < MAX_DEPTH and may_extend(want.scope, scope)),
                default=(0, 0),
            )
            more = num_blocks + self._blocks_of(n - start)
            if n in doomed:
                refusal: Outcome | None = Outcome.BUSY
            elif self.config.mode == "declared" and want.pin != PinClass.HARD:
                refusal = Outcome.DISABLED
            else:
                refusal = self._refusal(seq.token_ids[:n], want, more, known)
            if refusal is not None:
                refused.append((want, refusal))
                continue
            num_blocks = more
            creates.append(want)
            chain.append((n, depth + 1, want.scope))
        return Decision(known, creates, refused)

    def is_waiting(self, seq: Sequence) -> bool:
        """Whether `seq` waits for its system prompt's prefill, or for its way back to the device."""
        prompt = prompt_read_by(seq)
        return prompt is not None and prompt.state != PromptState.PINNED

    def _attach(self, seq: Sequence, prompt: PinnedPrompt) -> None:
        self._recall(prompt)
        seq.system_prompt = prompt
        prompt.readers += 1
        self.num_readers += 1
        if self.is_waiting(seq):
            prompt.waiters.append(seq)
            prompt.serve_by(seq.priority, seq.order)

    def attach_sibling(self, seq: Sequence, sibling: Sequence) -> None:
        """Lets another output of one request read what the first one reads; its request was counted already."""
        prompt = prompt_read_by(sibling)
        if prompt is not None:
            self._attach(seq, prompt)

    def _shared_head(self, seq: Sequence) -> list[Want]:
        """The head that a long prompt without a system part has in common with an earlier one of its namespace."""
        if self.config.mode != "auto" or seq.num_prompt_tokens <= MIN_SHARED_TOKENS or seq.goes_on:
            return []
        size = self._heads.see(seq)
        if not size:
            return []
        pinned = self.index.readable(seq)
        if pinned and size - pinned[-1].num_tokens < MIN_SHARED_TOKENS:
            return []
        return [Want(size, PinClass.AUTOMATIC, self.config.ttl, "shared_prefix", seq.namespace, reused=True)]

    def _renew(self, prompt: PinnedPrompt, want: Want) -> None:
        """A request asks again for what is known already; it may only make the pin firmer and longer."""
        if prompt.source in ("declared", "preload"):
            return
        prompt.pin = max(prompt.pin, want.pin)
        if prompt.pin == PinClass.HARD:
            self._promote(prompt)
        ttl = longer(prompt.ttl, want.ttl)
        if ttl != prompt.ttl:
            prompt.ttl = ttl
            self._track_ttl(prompt)
        self.tiers.note_change(prompt)

    def _promote(self, prompt: PinnedPrompt) -> None:
        """Ends the probation of a prompt and of those that it continues."""
        above: PinnedPrompt | None = prompt
        while above is not None and above.on_probation:
            above.on_probation = False
            self.probation_tokens -= above.num_own_tokens if above.extents else 0
            logger.info("System prompt %s is used again: pinned.", above.id)
            self._save(above)
            above = above.parent

    def _note_refusal(self, token_ids: TokenIds, want: Want, outcome: Outcome, seq: Sequence) -> None:
        if seq.goes_on:
            return
        key = prompt_id(token_ids, want.scope)
        if outcome in (Outcome.OVER_BUDGET, Outcome.BUSY) and key not in self._prompts:
            self._sightings.note(key, self._num_requests)
        self.log.note_refusal(key, token_ids, want, outcome, seq, self._clock())

    # Registry --------------------------------------------------------------------------------------------------

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
        existing = self._prompts.get(prompt_id(token_ids))
        if existing is not None:
            if existing.doomed:
                raise SystemPromptRefusedError(
                    Outcome.BUSY, f"System prompt {existing.id} is being removed; its last readers still run."
                )
            existing.source, existing.pin, existing.ttl = source, pin, ttl
            existing.name = name or existing.name
            self._track_ttl(existing)
            self.tiers.note_change(existing)
            self._promote(existing)
            self._recall(existing)
            self._save(existing)
            return existing
        want = Want(len(token_ids), pin, ttl, source, EVERYBODY, reused=True)
        refusal = Outcome.DISABLED if self.config.mode == "off" else None
        if refusal is None:
            parent = self.index.parent_of(token_ids, EVERYBODY)
            own = len(token_ids) - (parent.num_tokens if parent is not None else 0)
            keep = [] if parent is None else [parent]
            refusal = self._refusal(token_ids, want, self._blocks_of(own), keep)
        if refusal is not None:
            raise SystemPromptRefusedError(refusal, pool_report.reason(self, refusal, len(token_ids)))
        return self._register(token_ids, want, name)

    def restore(self, record: SnapshotRecord) -> PinnedPrompt | None:
        """Pins again, with the next steps, what a snapshot is of. Returns None where it may not be pinned now."""
        pin, scope = PinClass[record.pin.upper()], bytes.fromhex(record.scope)
        key = prompt_id(record.token_ids, scope)
        if key != record.prompt_id or key in self._prompts or self.config.mode == "off":
            return None
        if pin != PinClass.HARD and self.config.mode == "declared":
            return None
        token_ids = token_array(record.token_ids)
        parent = self.index.parent_of(token_ids, scope)
        start = parent.num_tokens if parent is not None else 0
        # Of an operator's prompt the tokens are enough: what the snapshot cannot give is computed.
        if start != record.start and pin != PinClass.HARD:
            return None
        want = Want(len(token_ids), pin, record.ttl, record.source, scope, reused=True)
        keep = [] if parent is None else [parent]
        needed = self._blocks_of(len(token_ids) - start)
        refusal = self._refusal(token_ids, want, needed, keep)
        if pin != PinClass.HARD and not self.blocks.fits(self._promised_blocks + needed):
            refusal = Outcome.OVER_BUDGET  # Nobody has asked for it yet: it displaces nothing.
        if refusal is not None:
            logger.warning("System prompt %s is not brought back from its snapshot: %s.", key, refusal.value)
            return None
        return self._register(token_ids, want, record.name)

    def update(self, key: str, **changes: Any) -> PinnedPrompt:
        """Changes the `name` or `ttl` of a prompt; its ttl counts from now on.

        Raises:
            KeyError: no such prompt.
        """
        prompt = self._prompts[key]
        if "name" in changes:
            prompt.name = changes["name"]
        if "ttl" in changes:
            prompt.ttl = changes["ttl"]
            prompt.touch(self._clock())
            self._track_ttl(prompt)
        self.tiers.note_change(prompt)
        return prompt

    def remove(self, key: str) -> PinnedPrompt:
        """Ends a pin: at once if nobody holds it, else when its last reader has finished and its last child is gone.

        Raises:
            KeyError: no such prompt.
        """
        prompt = self._prompts[key]
        prompt.doomed = True
        self._release_if_done(prompt)
        return prompt

    def set_budget(self, num_tokens: int) -> None:
        """Changes how many tokens may be pinned; what must stay schedulable stays so.

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
        self.blocks.set_budget(num_blocks)

    @property
    def taken_blocks(self) -> int:
        """Blocks that are pinned or promised."""
        return self.blocks.pinned_blocks + self._promised_blocks

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

    def _let_go(self, prompt: PinnedPrompt) -> None:
        """A reader or a child no longer holds `prompt`."""
        if prompt.on_probation and prompt.state == PromptState.PENDING and not prompt.is_held:
            self._drop_pending(prompt)
        self._release_if_done(prompt)
        if prompt.next_expiry is None and not prompt.is_held and prompt.state != PromptState.REMOVED:
            self._track_ttl(prompt)

    def expire(self) -> None:
        """Ends pins whose ttl has run out."""
        if not self._expiries:
            return
        now = self._clock()
        while self._expiries and self._expiries[0][0] <= now:
            when, key = heapq.heappop(self._expiries)
            prompt = self._prompts.get(key)
            if prompt is None or prompt.next_expiry != when:
                continue
            prompt.next_expiry = None
            # One that is held is looked at again when it is let go.
            if prompt.expires is None or prompt.is_held or prompt.doomed:
                continue
            if prompt.expires > now:
                self._track_ttl(prompt)
                continue
            logger.info("System prompt %s ends: not used for %g s.", key, prompt.ttl)
            self.remove(key)

    def get(self, key: str) -> PinnedPrompt | None:
        return self._prompts.get(key)

    def prompts(self) -> list[PinnedPrompt]:
        return list(self._prompts.values())

    def describe(self, prompt: PinnedPrompt) -> SystemPromptInfo:
        return prompt.info(self.bytes_per_block)

    def info(self) -> SystemPromptPoolInfo:
        return pool_report.info(self)

    def explain(self, seq: Sequence, num_system_tokens: int | None, marks: Several[CacheMark] = ()) -> dict[str, Any]:
        """What would happen to a request, and why; see `pool_report.explain`."""
        return pool_report.explain(self, seq, num_system_tokens, marks)

    @property
    def num_prompts(self) -> int:
        return len(self._prompts)

    @property
    def budget_tokens(self) -> int:
        return self.blocks.budget_blocks * self.block_size

    def is_reused(self, token_ids: TokenIds, want: Want) -> bool:
        """Whether a prompt that is not in the pool would be pinned at once, not put on probation."""
        if want.reused or want.pin == PinClass.HARD:
            return True
        sighting = self._sightings.get(prompt_id(token_ids, want.scope))
        return sighting is not None and sighting.uses + 1 >= USES_OF_A_PIN

    def _refusal(
        self, token_ids: TokenIds, want: Want, num_blocks: int, keep: Several[PinnedPrompt] = ()
    ) -> Outcome | None:
        """Why a prompt that needs `num_blocks` cannot be pinned; None if it can.

        Args:
            keep: Prompts that must not give way to it.
        """
        if len(token_ids) < self.config.min_tokens:
            return Outcome.TOO_SHORT
        missing = self.taken_blocks + num_blocks - self.blocks.budget_blocks
        if missing <= 0:
            return None
        if num_blocks > self.blocks.budget_blocks:
            return Outcome.OVER_BUDGET
        claim, value = Claim.NEW, 0.0
        if want.pin == PinClass.HARD:
            claim = Claim.HARD
        elif self.is_reused(token_ids, want):
            claim = Claim.REUSED
            sighting = self._sightings.get(prompt_id(token_ids, want.scope))
            value = self._value_now(sighting)
        returns = self._has_host_room(num_blocks, claim != Claim.NEW, value)
        for prompt in self._giving_way(claim, want.pin, value, returns, keep):
            missing -= prompt.num_blocks
            if missing <= 0:
                return None
        return Outcome.OVER_BUDGET

    def _value_now(self, sighting: Sighting | None) -> float:
        """What a prompt is worth that the latest request asks for."""
        if sighting is None:
            return worth(1, self._num_requests, self._num_requests, self._num_requests)
        return worth(sighting.uses + 1, sighting.first_use, self._num_requests, self._num_requests)

    # Giving way ------------------------------------------------------------------------------------------------

    def _giving_way(
        self, claim: Claim, pin: PinClass, value: float, may_leave_again: bool, keep: Iterable[PinnedPrompt] = ()
    ) -> Iterable[PinnedPrompt]:
        prompts, now = self._prompts.values(), self._num_requests
        return giving_way(prompts, claim, pin, value, may_leave_again, now, self.tiers.is_on_host, keep)

    def _has_host_room(self, num_blocks: int, is_reused: bool, value: float) -> bool:
        """Whether the host has room for a prompt, or would make some."""
        if num_blocks > self.tiers.host.budget_blocks:
            return False
        if self.tiers.has_room(num_blocks):
            return True
        going = leaving_host(self.tiers.idle_owners(), is_reused, value, self._num_requests)
        return any(num_blocks <= total for total in accumulate(p.num_blocks for p in going))

    def give_way(self) -> bool:
        """The prompt on probation that is worth least makes room for whatever needs it. Returns whether there was one.

        Blocks that the cache of suffixes keeps go first: behind a system prompt they are of no use without it, and as
        pins, what is on probation never takes more than the budget.
        """
        going = next(iter(self._giving_way(Claim.NEW, PinClass.SOFT, 0.0, False)), None)
        if going is None:
            return False
        self._displace(going)
        return True

    def _make_room(self, prompt: PinnedPrompt, is_enough: Callable[[], bool]) -> None:
        """Displaces what gives way to `prompt` until there is enough, if there can be."""
        if is_enough():
            return
        value = worth_now(prompt, self._num_requests) if prompt.uses else 1.0
        returns = self.tiers.is_on_host(prompt) or self._has_host_room(
            prompt.num_blocks, not prompt.on_probation, value
        )
        parents, above = [], prompt.parent
        while above is not None:
            parents.append(above)
            above = above.parent
        for other in self._giving_way(claim_of(prompt), prompt.pin, value, returns, parents):
            self._displace(other)
            if is_enough():
                return

    def _displace(self, prompt: PinnedPrompt) -> None:
        """A prompt that nobody reads leaves the device, for the host if that has it."""
        if prompt.is_being_saved:
            self.tiers.cancel_save(prompt)
            prompt.is_being_saved = False
        if self.tiers.is_on_host(prompt):
            logger.debug("System prompt %s leaves the device for the host.", prompt.id)
            self._enter(prompt, PromptState.HOST)
            self._give_back_extents(prompt)
            return
        log = logger.debug if prompt.on_probation else logger.info
        log("System prompt %s gives way to another one.", prompt.id)
        self.num_displaced += not prompt.on_probation
        self._forget_all(prompt)

    def _forget_all(self, prompt: PinnedPrompt) -> None:
        """Ends a prompt that nobody reads, and those on the host that continue it."""
        for child in list(prompt.children):
            self._forget_all(child)
        self._forget(prompt)

    def _recall(self, prompt: PinnedPrompt) -> None:
        """A prompt that is on the host only is asked for: it waits for room on the device like a new one, behind those
        that it continues."""
        if prompt.state == PromptState.HOST:
            if prompt.parent is not None:
                self._recall(prompt.parent)
            self._enter(prompt, PromptState.PENDING)

    def _save(self, prompt: PinnedPrompt) -> None:
        """Begins to copy a prompt to the host, if it is to be kept there or on disk and is not yet."""
        if prompt.doomed or prompt.is_being_saved or prompt.is_being_written or prompt.state != PromptState.PINNED:
            return
        if self.tiers.wants_room(prompt):
            value = worth_now(prompt, self._num_requests)
            for other in leaving_host(self.tiers.idle_owners(), not prompt.on_probation, value, self._num_requests):
                self._leave_host(other)
                if self.tiers.has_room(prompt.num_blocks):
                    break
        prompt.is_being_saved = self.tiers.save(prompt)

    def _leave_host(self, prompt: PinnedPrompt) -> None:
        """The host tier needs the room of a prompt that is not just being copied."""
        self.tiers.drop(prompt)
        if prompt.state == PromptState.HOST:
            self._forget_all(prompt)

    # Registration and end --------------------------------------------------------------------------------------

    def _blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _register(self, token_ids: TokenIds, want: Want, name: str | None = None, is_use: bool = False) -> PinnedPrompt:
        parent = self.index.parent_of(token_ids, want.scope)
        if parent is not None:
            self._recall(parent)
        prompt = PinnedPrompt(
            token_ids,
            parent,
            self.block_size,
            name=name,
            source=want.source,
            pin=want.pin,
            ttl=want.ttl,
            scope=want.scope,
            on_probation=not self.is_reused(token_ids, want),
            now=self._clock(),
        )
        sighting = self._sightings.take(prompt.id)
        if sighting is not None:
            prompt.uses, prompt.first_use, prompt.last_use = sighting
        if is_use:
            prompt.uses, prompt.last_use = prompt.uses + 1, self._num_requests
            prompt.first_use = prompt.first_use or self._num_requests
        if not prompt.on_probation and parent is not None:
            self._promote(parent)
        # Room that others take is only worth having for what replaces them, so they go no sooner than now.
        self._make_room(prompt, lambda: self.blocks.fits(self._promised_blocks + prompt.num_blocks))
        self.log.note_prompt(prompt.id, token_ids, want)
        self._prompts[prompt.id] = prompt
        self.index.insert(prompt)
        self._enqueue(prompt)
        prompt.touch(prompt.created)
        self._track_ttl(prompt)
        # What comes once may come often.
        log, how = (logger.debug, "put on probation") if prompt.on_probation else (logger.info, "pinned")
        log("System prompt %s: %d tokens to be %s (%s).", prompt.id, prompt.num_tokens, how, prompt.source)
        return prompt

    def _track_ttl(self, prompt: PinnedPrompt) -> None:
        """Looks at the prompt again when its ttl would have run out; uses only move that moment later."""
        prompt.next_expiry = prompt.expires
        if prompt.next_expiry is not None:
            heapq.heappush(self._expiries, (prompt.next_expiry, prompt.id))

    def _release_if_done(self, prompt: PinnedPrompt) -> None:
        settled = prompt.state not in (PromptState.COMPUTING, PromptState.LOADING, PromptState.REMOVED)
        if prompt.doomed and settled and not prompt.is_held:
            self._forget(prompt)

    def _drop_pending(self, prompt: PinnedPrompt) -> None:
        """A prompt without a place is given up; what the host has of it stays there."""
        prompt.payer = None
        if prompt.pin != PinClass.HARD and self.tiers.is_on_host(prompt) and self._may_wait_on_host(prompt):
            self._enter(prompt, PromptState.HOST)
            self._release_if_done(prompt)
        else:
            self._forget_all(prompt)

    @staticmethod
    def _may_wait_on_host(prompt: PinnedPrompt) -> bool:
        return not prompt.readers and not prompt.num_children_on_device

    def _forget(self, prompt: PinnedPrompt) -> None:
        """Ends a prompt that nobody holds, and gives its room back."""
        self._enter(prompt, PromptState.REMOVED)
        del self._prompts[prompt.id]
        self.index.remove(prompt)
        if prompt.extents:
            self._give_back_extents(prompt)
        self.tiers.forget(prompt)
        if prompt.uses and not prompt.doomed:
            self._sightings.keep(prompt.id, Sighting(prompt.uses, prompt.first_use, prompt.last_use))
        if prompt.parent is not None:
            prompt.parent.children.discard(prompt)
            self._let_go(prompt.parent)

    def _give_back_extents(self, prompt: PinnedPrompt) -> None:
        for extent in self.blocks.unpin(prompt.id):
            self._on_release(extent)
        self._count_tokens(prompt, -prompt.num_own_tokens)
        prompt.leave()

    def _enter(self, prompt: PinnedPrompt, state: PromptState) -> None:
        if prompt.state == PromptState.PENDING:
            self.pending.remove(prompt)
            self._promised_blocks -= prompt.num_blocks
        if prompt.state == PromptState.COMPUTING:
            self.computing.remove(prompt)
        if prompt.state == PromptState.LOADING:
            self.loading.remove(prompt)
        prompt.state = state
        if state == PromptState.PENDING:
            self._enqueue(prompt)
        if state == PromptState.COMPUTING:
            self.computing.append(prompt)
        if state == PromptState.LOADING:
            self.loading.append(prompt)

    def _enqueue(self, prompt: PinnedPrompt) -> None:
        self.pending.append(prompt)
        self._promised_blocks += prompt.num_blocks

    # Prefill, driven by the scheduler ---------------------------------------------------------------------------

    @property
    def has_prefill(self) -> bool:
        return bool(self.pending or self.computing or self.loading)

    def find_room(self, prompt: PinnedPrompt) -> tuple[Extent, ...] | None:
        """The place for a pending prompt, in as few extents as there is room for; None when none can be had."""
        above = len(prompt.parent.prefix) if prompt.parent is not None else 0
        most = MAX_CHAIN - above - (MAX_DEPTH - prompt.depth)  # One is left for each that may continue it.
        found: tuple[Extent, ...] | None = None

        def is_enough() -> bool:
            nonlocal found
            found = self.blocks.find_room(prompt.num_blocks, most)
            return found is not None

        self._make_room(prompt, is_enough)
        return found

    def place(self, prompt: PinnedPrompt, extents: tuple[Extent, ...]) -> None:
        """A pending prompt gets these (emptied) blocks and is computed from now on, or loaded where a tier has it."""
        may_load = self.tiers.can_load(prompt)
        self._enter(prompt, PromptState.LOADING if may_load else PromptState.COMPUTING)
        self.blocks.pin(prompt.id, extents)
        prompt.place(extents)
        self._count_tokens(prompt, prompt.num_own_tokens)
        if may_load:
            self.tiers.begin_load(prompt)

    def _count_tokens(self, prompt: PinnedPrompt, num_tokens: int) -> None:
        self.pinned_tokens += num_tokens
        self.probation_tokens += num_tokens if prompt.on_probation else 0

    def begin_prefill(self, prompt: PinnedPrompt) -> None:
        """The first chunk of a prompt is planned."""
        prompt.prefill_started = time.perf_counter()
        self.num_prefills += 1

    def fail_load(self, prompt: PinnedPrompt) -> None:
        """What a tier had of a prompt was worth nothing; it is computed, in the place that it has."""
        self._enter(prompt, PromptState.COMPUTING)

    def end_load(self, prompt: PinnedPrompt) -> list[Sequence]:
        """A prompt is back on the device; returns the sequences that waited for it."""
        if prompt.payer is not None:
            prompt.payer.num_cache_write_tokens -= prompt.num_own_tokens
        prompt.sequence.num_computed_tokens = prompt.num_tokens
        waiters = self._end_wait(prompt)
        self._release_if_done(prompt)
        return waiters

    def end_save(self, prompt: PinnedPrompt) -> None:
        """The extents of a prompt have been copied to the host."""
        prompt.is_being_saved = False
        self._let_go(prompt)

    def end_prefill(self, prompt: PinnedPrompt) -> list[Sequence]:
        """The last chunk of a prompt is planned; returns the sequences that waited for it."""
        prompt.is_being_written = True
        return self._end_wait(prompt)

    def _end_wait(self, prompt: PinnedPrompt) -> list[Sequence]:
        self._enter(prompt, PromptState.PINNED)
        prompt.payer = None
        prompt.touch(self._clock())
        waiters, prompt.waiters = prompt.waiters, []
        return waiters

    def note_prefill(self, prompt: PinnedPrompt) -> None:
        """The last chunk of a prompt has run. Keeps how long its prefill took; a prompt that was removed meanwhile goes
        only now, since its blocks were being written."""
        prompt.is_being_written = False
        self._save(prompt)
        self._release_if_done(prompt)
        self.prefill_seconds.append(time.perf_counter() - prompt.prefill_started)

    def refuse(self, prompt: PinnedPrompt) -> list[Sequence]:
        """A pending prompt finds no room. Its children continue its parent instead, its waiters read its parent or
        nothing; returns those of them that need not wait any more."""
        parent = prompt.parent
        for child in list(prompt.children):
            if child.state == PromptState.PENDING:
                self._promised_blocks -= child.num_blocks
                self.tiers.drop(child)  # It has less of it than the child must hold now.
                child.follow(parent)
                self._promised_blocks += child.num_blocks
        waiters, prompt.waiters = prompt.waiters, []
        prompt.readers -= len(waiters)
        self.num_readers -= len(waiters)
        want = Want(prompt.num_tokens, prompt.pin, prompt.ttl, prompt.source, prompt.scope)
        for seq in waiters:
            seq.system_prompt = None
            seq.num_cache_write_tokens = max(0, seq.num_cache_write_tokens - prompt.num_own_tokens)
            self.outcomes[Outcome.BUSY.value] += not seq.goes_on
            self._note_refusal(prompt.token_ids, want, Outcome.BUSY, seq)
            if parent is not None:
                self._attach(seq, parent)
        self._drop_pending(prompt)
        return [seq for seq in waiters if not self.is_waiting(seq)]

    def check_integrity(self, readers: dict[str, int]) -> None:
        """Raises AssertionError when the books do not add up.

        Args:
            readers: Unfinished attached sequences by prompt id, counted by the caller.
        """
        self.blocks.check_integrity()
        prompts = list(self._prompts.values())
        extents = {p.id: p.extents for p in prompts if p.extents}
        assert extents == self.blocks.extents, (extents, self.blocks.extents)
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
            assert p.state != PromptState.HOST or (self.tiers.is_on_host(p) and self._may_wait_on_host(p)), p
            assert p.children == {c for c in prompts if c.parent is p}, (p, p.children)
            assert p.depth <= MAX_DEPTH and p.num_blocks == self._blocks_of(p.num_own_tokens), p
            assert not (p.on_probation and p.pin == PinClass.HARD), p
            if p.parent is not None:
                assert self._prompts.get(p.parent.id) is p.parent, (p, "its parent is gone")
                assert p.token_ids[: p.start] == p.parent.token_ids
                assert may_extend(p.scope, p.parent.scope)
                assert not p.extents or p.parent.extents, (p, p.parent)
                assert p.state != PromptState.PINNED or p.parent.state == PromptState.PINNED, (p, p.parent)
                assert p.last_used <= p.parent.last_used
                assert p.rank > p.parent.rank or not p.waiters, (p.rank, p.parent.rank)
                assert p.on_probation or not p.parent.on_probation
            if p.extents:
                assert sum(e.num_tokens for e in p.prefix) == p.num_tokens, p.prefix
                assert len(p.prefix) <= MAX_CHAIN
        self.tiers.check_integrity(self._prompts)
        assert {p.id for p in self.index} == set(self._prompts)
        assert self._promised_blocks == sum(p.num_blocks for p in self.pending)
        assert self.num_readers == sum(readers.values()), (self.num_readers, readers)
        assert self.pinned_tokens == sum(p.num_own_tokens for p in prompts if p.extents)
        assert self.probation_tokens == sum(p.num_own_tokens for p in prompts if p.extents and p.on_probation)
        assert set(readers) <= set(self._prompts), set(readers) - set(self._prompts)
