"""A system prompt of the pool: what it is, who holds it, and why one may be refused."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import cast

import numpy as np

from vllm.kv_cache.extents import Extent
from vllm.kv_cache.windows import WindowLayout
from vllm.outputs import SystemPromptInfo
from vllm.sequence import Sequence
from vllm.step import PrefixExtent, WindowExtent
from vllm.token_ids import TokenIds

MAX_CHAIN = 8
"""Extents that a sequence may read one after the other; the work lists of attention are sized for so many."""

MAX_DEPTH = 4
"""Prompts that may continue one another."""

Rank = tuple[int, int, int]
UNORDERED = 2**63
"""Order of a prompt that nobody waits for yet."""


class Outcome(StrEnum):
    """What the pool did for a request: it read what is there, had its system part computed for the first time (on
    probation) or anew (pinned), or ran unpinned."""

    HIT = "hit"
    PROBATION = "probation"
    CREATED = "created"
    TOO_SHORT = "too_short"
    OVER_BUDGET = "over_budget"
    BUSY = "busy"
    DISABLED = "disabled"
    PROMPT_LOGPROBS = "prompt_logprobs"


class PromptState(StrEnum):
    """Where a prompt stands. `PROBATION` and `REMOVING` are only shown: a prompt on probation that is on the device,
    and one that its last readers hold."""

    PENDING = "pending"
    COMPUTING = "computing"
    LOADING = "loading"
    PINNED = "pinned"
    PROBATION = "probation"
    HOST = "host"
    REMOVING = "removing"
    REMOVED = "removed"


class PoolTokens(StrEnum):
    """What the tokens of the pool are: of pins or on probation (on the device), free budget, or kept on the host."""

    PINNED = "pinned"
    PROBATION = "probation"
    FREE = "free"
    HOST = "host"


class PinClass(IntEnum):
    """How firmly a prompt is pinned.

    `HARD` ones (an operator's) stay until they are removed or their ttl ends. `AUTOMATIC` (a chat's system part) and
    `SOFT` ones (what a client has marked) also give way, while nobody reads them, to hard ones that need their room,
    and to newcomers that are worth more; see `pin_policy`.
    """

    SOFT = 0
    AUTOMATIC = 1
    HARD = 2


class SystemPromptRefusedError(RuntimeError):
    """A system prompt could not be pinned; `outcome` says why."""

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


@dataclass(frozen=True)
class BlockCount:
    """Blocks of both cache groups."""

    full: int
    window: int = 0

    @classmethod
    def of(cls, num_own_tokens: int, block_size: int, windows: WindowLayout | None) -> BlockCount:
        """What a prompt keeps of its own tokens."""
        kept = windows.tail_blocks(num_own_tokens) if windows is not None else 0
        return cls(-(-num_own_tokens // block_size), kept)

    def __add__(self, other: BlockCount) -> BlockCount:
        return BlockCount(self.full + other.full, self.window + other.window)

    def __neg__(self) -> BlockCount:
        return BlockCount(-self.full, -self.window)


def prompt_id(token_ids: Iterable[int], scope: bytes = b"") -> str:
    """Identity of a system prompt: `sp-` and 128 bits of SHA-256 over its scope and its token ids as int64."""
    return "sp-" + hashlib.sha256(scope + np.array(token_ids, np.int64).tobytes()).hexdigest()[:32]


def prompt_read_by(seq: Sequence) -> PinnedPrompt | None:
    """The pinned prompt that a sequence is attached to; a sequence itself knows only what its steps need of it."""
    return cast("PinnedPrompt | None", seq.system_prompt)


class PinnedPrompt:
    """One system prompt of the pool.

    A prompt that starts with another one of the pool, its parent, shares that one's KV: its extents hold only what
    follows. Readers read the chain of extents, from the outermost parent on. As a rule a prompt has one extent; it lies
    in several pieces where no room is that long.

    Attributes:
        token_ids: All its tokens, the parent's included.
        scope: Who may read it: everybody (empty), or those whose requests carry the same bytes.
        on_probation: It was used once only, so it gives way to whatever needs its room.
        sequence: The prefill of the prompt itself (`is_system_prompt`), which reads its parent; its block table is the
            extents. Its priority and order are the best of those that brought it or wait for it.
        extents: Blocks of its own tokens; empty while it has no place.
        size: Blocks that it takes in each group.
        window_extents: Blocks of its last own tokens in the window group.
        window_prefix: What its readers may read of the chain in the window group.
        prefix: The chain of extents that its readers read; empty while it has no place.
        order_key: Brings the readers of one chain side by side when a batch is sorted by it.
        children: Prompts whose parent it is; they hold it as readers do.
        readers: Unfinished sequences attached to it, running or waiting.
        waiters: Those of them that wait for its prefill.
        payer: The one that brought it, whose usage says that it was computed; only until it is.
        is_being_saved: Its extents are being copied to the host.
        is_being_written: Its last chunk has been planned, and has not run as far as is known.
        first_use, last_use: Numbers of the requests that used it first and last; see `pin_policy`.
        uses: Requests that used it, or a prompt that continues it.
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
        on_probation: bool,
        now: float,
        windows: WindowLayout | None = None,
    ) -> None:
        self.id = prompt_id(token_ids, scope)
        self.token_ids = token_ids
        self.num_tokens = len(token_ids)
        self.name = name
        self.source = source
        self.pin = pin
        self.ttl = ttl
        self.scope = scope
        self.on_probation = on_probation
        self.created = now
        self.last_used = now
        self.state = PromptState.PENDING
        self.doomed = False
        self.extents: tuple[Extent, ...] = ()
        self.prefix: tuple[PrefixExtent, ...] = ()
        self.window_extents: tuple[Extent, ...] = ()
        self.window_prefix: tuple[WindowExtent, ...] = ()
        self.order_key: tuple[int, ...] = ()
        self.sequence = Sequence(self.id, token_ids, order=UNORDERED, priority=UNORDERED, is_system_prompt=True)
        self.hits = 0
        self.uses = self.first_use = self.last_use = 0
        self.tokens_saved = 0
        self.readers = 0
        self.children: set[PinnedPrompt] = set()
        self.waiters: list[Sequence] = []
        self.payer: Sequence | None = None
        self.is_being_saved = False
        self.is_being_written = False
        self.prefill_started = 0.0
        self.next_expiry: float | None = None
        self._block_size = block_size
        self._windows = windows
        self.parent: PinnedPrompt | None = None
        self.size = BlockCount(0)
        self.follow(parent)

    def __repr__(self) -> str:
        return f"PinnedPrompt({self.id}, {self.state.value}, {self.num_tokens} tokens)"

    def follow(self, parent: PinnedPrompt | None) -> None:
        """Makes `parent` the prompt whose KV it continues; it has no place yet."""
        if self.parent is not None:
            self.parent.children.discard(self)
        self.parent = self.sequence.system_prompt = parent
        if parent is not None:
            parent.children.add(self)
        self.size = BlockCount.of(self.num_own_tokens, self._block_size, self._windows)

    @property
    def num_blocks(self) -> int:
        """Blocks of its extents."""
        return self.size.full

    def place(self, extents: tuple[Extent, ...], window_extents: tuple[Extent, ...] = ()) -> None:
        """Gives it the blocks of its own tokens; its parent has its own already."""
        prefix = list(self.parent.prefix) if self.parent is not None else []
        left = self.num_own_tokens
        for extent in extents:
            prefix.append(PrefixExtent(extent.start, min(left, extent.num_blocks * self._block_size)))
            left -= prefix[-1].num_tokens
        self.extents, self.prefix = extents, tuple(prefix)
        self.order_key = tuple(e.start_block for e in self.prefix)
        self.sequence.block_table = [block for e in extents for block in range(e.start, e.end)]
        self.sequence.num_computed_tokens = self.start
        if self._windows is not None:
            self._place_window(self._windows, window_extents)

    def _place_window(self, windows: WindowLayout, extents: tuple[Extent, ...]) -> None:
        # What of the chain lies before the window of the first token behind this prompt is left out.
        seen_from = self.num_tokens - windows.window + 1
        above = self.parent.window_prefix if self.parent is not None else ()
        prefix = [e for e in above if e.position + e.num_tokens > seen_from]
        position = self.start + windows.first_of_tail(self.num_own_tokens) * self._block_size
        for extent in extents:
            count = min(self.num_tokens - position, extent.num_blocks * self._block_size)
            prefix.append(WindowExtent(extent.start, count, position))
            position += count
        self.window_extents, self.window_prefix = extents, tuple(prefix)

    def leave(self) -> None:
        """It has no place any more."""
        self.extents, self.prefix, self.order_key, self.sequence.block_table = (), (), (), []
        self.window_extents, self.window_prefix = (), ()

    @property
    def rank(self) -> Rank:
        """Its place in the order in which prompts and requests are served, before the request that brought it."""
        return self.sequence.priority, self.sequence.order, self.num_tokens

    def serve_by(self, priority: int, order: int) -> None:
        """It and what it continues are served no later than a request with this priority and order."""
        prompt: PinnedPrompt | None = self
        while prompt is not None and (priority, order) < (prompt.sequence.priority, prompt.sequence.order):
            prompt.sequence.priority, prompt.sequence.order = priority, order
            prompt = prompt.parent

    @property
    def start(self) -> int:
        """Position of its first own token."""
        return self.parent.num_tokens if self.parent is not None else 0

    @property
    def num_own_tokens(self) -> int:
        """Tokens that its extents hold."""
        return self.num_tokens - self.start

    @property
    def depth(self) -> int:
        """Prompts in its chain."""
        return 1 if self.parent is None else 1 + self.parent.depth

    @property
    def num_children_on_device(self) -> int:
        """Prompts that continue it and need its KV now, or will when they have got their place."""
        return sum(child.state != PromptState.HOST for child in self.children)

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

    def use(self, number: int) -> None:
        """The request `number` uses it, and its parents with it."""
        prompt: PinnedPrompt | None = self
        while prompt is not None:
            prompt.uses += 1
            prompt.last_use = number
            prompt.first_use = prompt.first_use or number
            prompt = prompt.parent

    def info(self, bytes_per_block: int = 0, window_bytes_per_block: int = 0) -> SystemPromptInfo:
        state = self.state
        if self.doomed and state != PromptState.REMOVED:
            state = PromptState.REMOVING
        elif self.on_probation and state == PromptState.PINNED:
            state = PromptState.PROBATION
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
            uses=self.uses,
            readers=self.readers,
            pin=self.pin.name.lower(),
            num_bytes=self.size.full * bytes_per_block + self.size.window * window_bytes_per_block,
            tokens_saved=self.tokens_saved,
            parent=self.parent.id if self.parent is not None else None,
            children=len(self.children),
        )
