"""The registry of system prompts: which are known, which are being computed, which are pinned, and who reads them.

State of a prompt:

    pending ──room found──▶ computing ──last chunk done──▶ pinned ──removed, no reader left──▶ (gone)
       └───no contiguous room──▶ (refused: its waiters run unpinned)

The pool decides; the scheduler moves blocks and runs the prefill.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from enum import StrEnum

from vllm.config import SystemPromptConfig
from vllm.logger import init_logger
from vllm.outputs import SystemPromptInfo
from vllm.sequence import Sequence
from vllm.worker.cache_engine import Extent, PinnedBlockPool

logger = init_logger(__name__)

_LOGGED_REFUSALS = 4096


class Outcome(StrEnum):
    """What the pool did for a request."""

    HIT = "hit"
    CREATED = "created"
    TOO_SHORT = "too_short"
    OVER_BUDGET = "over_budget"
    BUSY = "busy"
    DISABLED = "disabled"
    PROMPT_LOGPROBS = "prompt_logprobs"


class PromptState(StrEnum):
    PENDING = "pending"
    COMPUTING = "computing"
    PINNED = "pinned"
    REMOVING = "removing"
    REMOVED = "removed"


class SystemPromptRefusedError(RuntimeError):
    """A system prompt could not be pinned; `outcome` says why."""

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


def prompt_id(token_ids: list[int]) -> str:
    """Identity of a system prompt: `sp-` and 128 bits of SHA-256 over its token ids as int64."""
    return "sp-" + hashlib.sha256(array("q", token_ids).tobytes()).hexdigest()[:32]


class PinnedPrompt:
    """One system prompt of the pool.

    Attributes:
        sequence: The prefill of the prompt itself (`is_system_prompt`); its block table is the extent.
        readers: Unfinished sequences attached to it, running or waiting.
        waiters: Those of them that wait for its prefill.
        order: Admission order of the request that brought it; decides who waits for whom when memory is short.
    """

    def __init__(
        self, token_ids: list[int], num_blocks: int, *, name: str | None, source: str, ttl: float | None, now: float
    ) -> None:
        self.id = prompt_id(token_ids)
        self.token_ids = token_ids
        self.num_tokens = len(token_ids)
        self.num_blocks = num_blocks
        self.name = name
        self.source = source
        self.ttl = ttl
        self.created = now
        self.last_used = now
        self.state = PromptState.PENDING
        self.doomed = False
        self.extent: Extent | None = None
        self.sequence = Sequence(self.id, token_ids, is_system_prompt=True)
        self.order = 0
        self.hits = 0
        self.readers = 0
        self.waiters: list[Sequence] = []
        self.prefill_started = 0.0

    @property
    def expires(self) -> float | None:
        """When the pin ends unless it is used before; seconds of the pool's clock."""
        return None if self.ttl is None else self.last_used + self.ttl

    def info(self) -> SystemPromptInfo:
        state = PromptState.REMOVING if self.doomed and self.state != PromptState.REMOVED else self.state
        return SystemPromptInfo(
            id=self.id,
            name=self.name,
            state=state.value,
            num_tokens=self.num_tokens,
            num_blocks=self.num_blocks,
            source=self.source,
            created=self.created,
            last_used=self.last_used,
            ttl=self.ttl,
            expires=self.expires,
            hits=self.hits,
            readers=self.readers,
        )


class SystemPromptPool:
    """Routes requests to pinned prompts and decides what is pinned.

    Args:
        config: Mode, limits, ttl.
        blocks: The pinned part of the KV cache; its budget is the pool's.
        block_size: Tokens in a block.
        on_release: Called with an extent whose pin has ended, so that its blocks become schedulable again.
        clock: Seconds since the epoch; replaced in tests.
    """

    def __init__(
        self,
        config: SystemPromptConfig,
        blocks: PinnedBlockPool,
        block_size: int,
        on_release: Callable[[Extent], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.block_size = block_size
        self._on_release = on_release
        self._clock = clock
        self._prompts: dict[str, PinnedPrompt] = {}
        self._ids_by_length: dict[int, set[str]] = {}
        self._pending: deque[PinnedPrompt] = deque()
        self._with_ttl: set[str] = set()
        self._no_expiry_before = 0.0
        self._logged: OrderedDict[str, None] = OrderedDict()
        self.computing: PinnedPrompt | None = None
        self.outcomes: Counter[str] = Counter()
        self.num_prefills = 0
        self.tokens_reused = 0
        self.num_readers = 0
        self.pinned_tokens = 0
        self.prefill_seconds: list[float] = []

    # Routing ---------------------------------------------------------------------------------------------------

    def route(self, seq: Sequence, num_system_tokens: int | None) -> Outcome | None:
        """Attaches `seq` to a system prompt, or says why it runs unpinned.

        Args:
            seq: A new sequence that holds no blocks.
            num_system_tokens: Length of the system prompt at its head, or None when its caller knows of none.

        Returns the outcome; None when no system prompt is in play. Whether the sequence must wait for a prefill is
        `is_waiting(seq)`.
        """
        outcome = self._route(seq, num_system_tokens)
        if outcome is not None:
            self.outcomes[outcome.value] += 1
        return outcome

    def _route(self, seq: Sequence, num_system_tokens: int | None) -> Outcome | None:
        if self.config.mode == "off":
            return Outcome.DISABLED if num_system_tokens else None
        if seq.sampling_params.prompt_logprobs is not None:
            # Every position's logits are asked for, so every position is computed.
            return Outcome.PROMPT_LOGPROBS if num_system_tokens else None
        if not num_system_tokens:
            return self._attach_longest(seq)
        prompt = self._prompts.get(prompt_id(seq.token_ids[:num_system_tokens]))
        if prompt is not None and seq.token_ids[:num_system_tokens] == prompt.token_ids:
            if prompt.doomed:
                return self._refused(seq, Outcome.BUSY, prompt.id)
            return self._attach(seq, prompt, Outcome.HIT)
        if self.config.mode == "declared":
            return self._attach_longest(seq) or Outcome.DISABLED
        token_ids = seq.token_ids[:num_system_tokens]
        refusal = self._refusal(token_ids)
        if refusal is not None:
            return self._attach_longest(seq) or self._refused(seq, refusal, prompt_id(token_ids))
        prompt = self._register(token_ids, name=None, source="auto", ttl=self.config.ttl)
        prompt.order = seq.order
        seq.paid_system_prompt = True
        return self._attach(seq, prompt, Outcome.CREATED)

    def is_waiting(self, seq: Sequence) -> bool:
        """Whether `seq` waits for its system prompt's prefill."""
        prompt = seq.system_prompt
        return prompt is not None and prompt.state in (PromptState.PENDING, PromptState.COMPUTING)

    def _attach(self, seq: Sequence, prompt: PinnedPrompt, outcome: Outcome) -> Outcome:
        seq.system_prompt = prompt
        prompt.readers += 1
        self.num_readers += 1
        prompt.last_used = self._clock()
        if outcome == Outcome.HIT:
            prompt.hits += 1
            self.tokens_reused += prompt.num_tokens
        if self.is_waiting(seq):
            prompt.waiters.append(seq)
        return outcome

    def attach_sibling(self, seq: Sequence, sibling: Sequence) -> None:
        """Lets another output of one request read what the first one reads; its request was counted already."""
        if sibling.system_prompt is not None:
            seq.system_prompt = sibling.system_prompt
            seq.system_prompt.readers += 1
            self.num_readers += 1
            if self.is_waiting(seq):
                seq.system_prompt.waiters.append(seq)

    def _attach_longest(self, seq: Sequence) -> Outcome | None:
        """Attaches to the longest known prompt that `seq` starts with and that leaves a token to compute."""
        lengths = [n for n in self._ids_by_length if n < seq.num_prompt_tokens]
        if not lengths:
            return None
        lengths.sort()
        digest = hashlib.sha256()
        start, found = 0, None
        for length in lengths:
            digest.update(array("q", seq.token_ids[start:length]).tobytes())
            start = length
            key = "sp-" + digest.hexdigest()[:32]
            if key in self._ids_by_length[length] and not self._prompts[key].doomed:
                found = self._prompts[key]
        if found is None or seq.token_ids[: found.num_tokens] != found.token_ids:
            return None
        return self._attach(seq, found, Outcome.HIT)

    def _refused(self, seq: Sequence, outcome: Outcome, key: str) -> Outcome:
        if key not in self._logged:
            self._logged[key] = None
            if len(self._logged) > _LOGGED_REFUSALS:
                self._logged.popitem(last=False)
            logger.info("System prompt %s runs unpinned: %s (request %s).", key, outcome.value, seq.request_id)
        return outcome

    # Registry --------------------------------------------------------------------------------------------------

    def add(self, token_ids: list[int], name: str | None = None, ttl: float | None = None) -> PinnedPrompt:
        """Declares a system prompt; the same tokens give the same prompt.

        Raises:
            SystemPromptRefusedError: it cannot be pinned.
        """
        existing = self._prompts.get(prompt_id(token_ids))
        if existing is not None:
            if existing.doomed:
                raise SystemPromptRefusedError(
                    Outcome.BUSY, f"System prompt {existing.id} is being removed; its last readers still run."
                )
            existing.source, existing.ttl = "declared", ttl
            existing.name = name or existing.name
            self._track_ttl(existing)
            return existing
        refusal = Outcome.DISABLED if self.config.mode == "off" else self._refusal(token_ids)
        if refusal is not None:
            raise SystemPromptRefusedError(refusal, self._explain(refusal, len(token_ids)))
        return self._register(token_ids, name=name, source="declared", ttl=ttl)

    def remove(self, key: str) -> PinnedPrompt:
        """Ends a pin: at once if nobody reads it, else when its last reader has finished.

        Raises:
            KeyError: no such prompt.
        """
        prompt = self._prompts[key]
        prompt.doomed = True
        self._release_if_done(prompt)
        return prompt

    def detach(self, seq: Sequence) -> None:
        """Ends the reading of a finished sequence."""
        prompt = seq.system_prompt
        if prompt is None:
            return
        seq.system_prompt = None
        prompt.readers -= 1
        self.num_readers -= 1
        if seq in prompt.waiters:
            prompt.waiters.remove(seq)
        self._release_if_done(prompt)

    def expire(self) -> None:
        """Ends pins whose ttl has run out."""
        now = self._clock()
        if not self._with_ttl or now < self._no_expiry_before:
            return
        for key in list(self._with_ttl):
            prompt = self._prompts[key]
            if prompt.expires is not None and now >= prompt.expires and not prompt.readers and not prompt.doomed:
                logger.info("System prompt %s ends: not used for %g s.", key, prompt.ttl)
                self.remove(key)
        # Uses only move an expiry later, so nothing can end before the earliest of today's expiries.
        self._no_expiry_before = min((self._prompts[k].expires or now for k in self._with_ttl), default=now)

    def get(self, key: str) -> PinnedPrompt | None:
        return self._prompts.get(key)

    def prompts(self) -> list[PinnedPrompt]:
        return list(self._prompts.values())

    @property
    def num_prompts(self) -> int:
        return len(self._prompts)

    @property
    def budget_tokens(self) -> int:
        return self.blocks.budget_blocks * self.block_size

    def _refusal(self, token_ids: list[int]) -> Outcome | None:
        if len(token_ids) < self.config.min_tokens:
            return Outcome.TOO_SHORT
        promised = sum(p.num_blocks for p in self._pending)
        if not self.blocks.fits(promised + self._blocks_of(len(token_ids))):
            return Outcome.OVER_BUDGET
        return None

    def _explain(self, refusal: Outcome, num_tokens: int) -> str:
        if refusal == Outcome.TOO_SHORT:
            return (
                f"The system prompt has {num_tokens} tokens; --system-prompt-min-tokens asks for at least "
                f"{self.config.min_tokens}."
            )
        if refusal == Outcome.OVER_BUDGET:
            used = self.blocks.pinned_blocks * self.block_size
            return (
                f"The system prompt has {num_tokens} tokens, but {used} of the pool's {self.budget_tokens} tokens are "
                "taken; remove a prompt or raise --system-prompt-cache-tokens."
            )
        return "The system-prompt pool is off (--system-prompt-cache off)."

    def _blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _register(self, token_ids: list[int], *, name: str | None, source: str, ttl: float | None) -> PinnedPrompt:
        prompt = PinnedPrompt(
            token_ids, self._blocks_of(len(token_ids)), name=name, source=source, ttl=ttl, now=self._clock()
        )
        self._prompts[prompt.id] = prompt
        self._ids_by_length.setdefault(prompt.num_tokens, set()).add(prompt.id)
        self._pending.append(prompt)
        self._track_ttl(prompt)
        return prompt

    def _track_ttl(self, prompt: PinnedPrompt) -> None:
        if prompt.ttl is None:
            self._with_ttl.discard(prompt.id)
        else:
            self._with_ttl.add(prompt.id)
            self._no_expiry_before = 0.0

    def _release_if_done(self, prompt: PinnedPrompt) -> None:
        if not prompt.doomed or prompt.readers or prompt.state in (PromptState.COMPUTING, PromptState.REMOVED):
            return
        self._forget(prompt)
        if prompt.extent is not None:
            self._on_release(self.blocks.unpin(prompt.id))
            self.pinned_tokens -= prompt.num_tokens
            prompt.extent = None

    def _forget(self, prompt: PinnedPrompt) -> None:
        if prompt.state == PromptState.PENDING:
            self._pending.remove(prompt)
        prompt.state = PromptState.REMOVED
        del self._prompts[prompt.id]
        self._with_ttl.discard(prompt.id)
        same_length = self._ids_by_length[prompt.num_tokens]
        same_length.discard(prompt.id)
        if not same_length:
            del self._ids_by_length[prompt.num_tokens]

    # Prefill, driven by the scheduler ---------------------------------------------------------------------------

    @property
    def has_prefill(self) -> bool:
        return self.computing is not None or bool(self._pending)

    @property
    def next_pending(self) -> PinnedPrompt | None:
        return self._pending[0] if self._pending else None

    def begin_prefill(self, start: int) -> PinnedPrompt:
        """The first pending prompt gets the (emptied) blocks from `start` on and is computed from now."""
        prompt = self._pending.popleft()
        prompt.extent = self.blocks.pin(prompt.id, start, prompt.num_blocks)
        self.pinned_tokens += prompt.num_tokens
        prompt.sequence.block_table = list(range(prompt.extent.start, prompt.extent.end))
        prompt.state = PromptState.COMPUTING
        prompt.prefill_started = time.perf_counter()
        self.computing = prompt
        self.num_prefills += 1
        return prompt

    def end_prefill(self) -> list[Sequence]:
        """The last chunk of the prompt under computation is planned; returns the sequences that waited for it."""
        prompt = self.computing
        if prompt is None:
            raise RuntimeError("no system prompt is being computed")
        self.computing = None
        prompt.state = PromptState.PINNED
        prompt.last_used = self._clock()
        waiters, prompt.waiters = prompt.waiters, []
        return waiters

    def note_prefill(self, prompt: PinnedPrompt) -> None:
        """The last chunk of a prompt has run. Keeps how long its prefill took; a prompt that was removed meanwhile goes
        only now, since its blocks were being written."""
        self._release_if_done(prompt)
        self.prefill_seconds.append(time.perf_counter() - prompt.prefill_started)

    def refuse_pending(self) -> list[Sequence]:
        """The first pending prompt finds no contiguous room; returns its waiters, which run unpinned."""
        prompt = self._pending[0]
        waiters, prompt.waiters = prompt.waiters, []
        for seq in waiters:
            seq.system_prompt = None
            seq.paid_system_prompt = False
            self.outcomes[Outcome.BUSY.value] += 1
            self._refused(seq, Outcome.BUSY, prompt.id)
        prompt.readers -= len(waiters)
        self.num_readers -= len(waiters)
        self._forget(prompt)
        return waiters

    def check_integrity(self, readers: dict[str, int]) -> None:
        """Raises AssertionError when the books do not add up.

        Args:
            readers: Unfinished attached sequences by prompt id, counted by the caller.
        """
        self.blocks.check_integrity()
        extents = {p.id: p.extent for p in self._prompts.values() if p.extent is not None}
        assert extents == self.blocks.extents, (extents, self.blocks.extents)
        for p in self._prompts.values():
            assert p.readers == readers.get(p.id, 0), (p.id, p.readers, readers.get(p.id, 0))
            assert len(p.waiters) <= p.readers
            assert (p.state == PromptState.PENDING) == (p in self._pending)
            assert (p.state == PromptState.COMPUTING) == (p is self.computing)
        assert self.num_readers == sum(readers.values()), (self.num_readers, readers)
        assert self.pinned_tokens == sum(p.num_tokens for p in self._prompts.values() if p.extent is not None)
        assert set(readers) <= set(self._prompts), set(readers) - set(self._prompts)
