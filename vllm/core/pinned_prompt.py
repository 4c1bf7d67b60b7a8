"""A system prompt of the pool: what it is, who holds it, and why one may be refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import IntEnum, StrEnum

import numpy as np

from vllm.outputs import SystemPromptInfo
from vllm.sequence import Sequence
from vllm.step import PrefixExtent
from vllm.token_ids import TokenIds
from vllm.worker.cache_engine import Extent

MAX_CHAIN = 4
"""Extents that a sequence may read one after the other; the work lists of attention are sized for so many."""


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
    LOADING = "loading"
    PINNED = "pinned"
    HOST = "host"
    REMOVING = "removing"
    REMOVED = "removed"


class PinClass(IntEnum):
    """How firmly a prompt is pinned.

    `HARD` (an operator) and `AUTOMATIC` (a chat's system part) stay until they are removed or their ttl ends. `SOFT`
    ones also give way to hard ones that need their room.
    """

    SOFT = 0
    AUTOMATIC = 1
    HARD = 2


class SystemPromptRefusedError(RuntimeError):
    """A system prompt could not be pinned; `outcome` says why."""

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


def prompt_id(token_ids: Iterable[int], scope: bytes = b"") -> str:
    """Identity of a system prompt: `sp-` and 128 bits of SHA-256 over its scope and its token ids as int64."""
    return "sp-" + hashlib.sha256(scope + np.array(token_ids, np.int64).tobytes()).hexdigest()[:32]


class PinnedPrompt:
    """One system prompt of the pool.

    A prompt that starts with another one of the pool, its parent, shares that one's KV: its extent holds only what
    follows. Readers read the chain of extents, from the outermost parent on.

    Attributes:
        token_ids: All its tokens, the parent's included.
        scope: Who may read it: everybody (empty), or those whose requests carry the same bytes.
        sequence: The prefill of the prompt itself (`is_system_prompt`); its block table is the extent.
        extent: Blocks of its own tokens; None while it has no place.
        prefix: The chain of extents that its readers read; empty while it has no place.
        order_key: Brings the readers of one chain side by side when a batch is sorted by it.
        children: Prompts whose parent it is; they hold it as readers do.
        readers: Unfinished sequences attached to it, running or waiting.
        waiters: Those of them that wait for its prefill.
        payer: The one that brought it, whose usage says that it was computed; only until it is.
        is_being_saved: Its extent is being copied to the host.
        order: Admission order of the request that brought it; decides who waits for whom when memory is short.
        next_expiry: When its ttl is looked at next; None while nothing is due.
        tokens_saved: Tokens that requests read from it and its parents instead of computing them.
    """

    def __init__(
        self,
        token_ids: TokenIds,
        parent: PinnedPrompt | None,
        block_size: int,
        *,
        name: str | None,
        source: str,
        pin: PinClass,
        ttl: float | None,
        scope: bytes,
        now: float,
    ) -> None:
        self.id = prompt_id(token_ids, scope)
        self.token_ids = token_ids
        self.num_tokens = len(token_ids)
        self.name = name
        self.source = source
        self.pin = pin
        self.ttl = ttl
        self.scope = scope
        self.created = now
        self.last_used = now
        self.state = PromptState.PENDING
        self.doomed = False
        self.extent: Extent | None = None
        self.prefix: tuple[PrefixExtent, ...] = ()
        self.order_key: tuple[int, ...] = ()
        self.sequence = Sequence(self.id, token_ids, is_system_prompt=True)
        self.order = 0
        self.hits = 0
        self.tokens_saved = 0
        self.readers = 0
        self.children: set[PinnedPrompt] = set()
        self.waiters: list[Sequence] = []
        self.payer: Sequence | None = None
        self.is_being_saved = False
        self.prefill_started = 0.0
        self.next_expiry: float | None = None
        self._block_size = block_size
        self.parent: PinnedPrompt | None = None
        self.num_blocks = 0
        self.follow(parent)

    def __repr__(self) -> str:
        return f"PinnedPrompt({self.id}, {self.state.value}, {self.num_tokens} tokens)"

    def follow(self, parent: PinnedPrompt | None) -> None:
        """Makes `parent` the prompt whose KV it continues; it has no extent yet."""
        if self.parent is not None:
            self.parent.children.discard(self)
        self.parent = parent
        if parent is not None:
            parent.children.add(self)
        self.num_blocks = -(-self.num_own_tokens // self._block_size)

    def place(self, extent: Extent) -> None:
        """Gives it the blocks of its own tokens; its parent has its own already."""
        above = self.parent.prefix if self.parent is not None else ()
        self.extent = extent
        self.prefix = (*above, PrefixExtent(extent.start, self.num_own_tokens))
        self.order_key = tuple(e.start_block for e in self.prefix)
        self.sequence.block_table = list(range(extent.start, extent.end))
        self.sequence.num_computed_tokens = self.start

    @property
    def start(self) -> int:
        """Position of its first own token."""
        return self.parent.num_tokens if self.parent is not None else 0

    @property
    def num_own_tokens(self) -> int:
        """Tokens that its extent holds."""
        return self.num_tokens - self.start

    @property
    def depth(self) -> int:
        """Extents in its chain."""
        return 1 if self.parent is None else 1 + self.parent.depth

    @property
    def is_held(self) -> bool:
        """Whether a reader, a child or a copy on its way to the host needs its KV."""
        return self.readers > 0 or bool(self.children) or self.is_being_saved

    @property
    def expires(self) -> float | None:
        """When the pin ends unless it is used before; seconds of the pool's clock."""
        return None if self.ttl is None else self.last_used + self.ttl

    def touch(self, now: float) -> None:
        """It is being used, and its parents with it."""
        prompt: PinnedPrompt | None = self
        while prompt is not None:
            prompt.last_used = now
            prompt = prompt.parent

    def info(self, bytes_per_block: int = 0) -> SystemPromptInfo:
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
            pin=self.pin.name.lower(),
            num_bytes=self.num_blocks * bytes_per_block,
            tokens_saved=self.tokens_saved,
            parent=self.parent.id if self.parent is not None else None,
            children=len(self.children),
        )
