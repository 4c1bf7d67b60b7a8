"""One token sequence on its way through the engine: an output of a request, or a system prompt's own prefill."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

from vllm.sampling_params import SamplingParams
from vllm.step import PrefixExtent, WindowExtent
from vllm.token_ids import token_array

if TYPE_CHECKING:
    from vllm.structured_output.matcher import TokenMatcher


class SequenceStatus(IntEnum):
    """States; everything from `FINISHED_STOPPED` on is final. `HELD`: a beam that has blocks, and no row."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    HELD = 3
    FINISHED_STOPPED = 4
    FINISHED_LENGTH = 5
    FINISHED_ABORTED = 6


FINISH_REASONS = {
    SequenceStatus.FINISHED_STOPPED: "stop",
    SequenceStatus.FINISHED_LENGTH: "length",
    SequenceStatus.FINISHED_ABORTED: "abort",
}


class PinnedPrefix(Protocol):
    """What a sequence and the planning of its steps need to know of the pinned prompt that it reads.

    Attributes:
        id: Says which tokens, and who may read them.
        prefix: The chain of extents that hold its tokens, from the outermost prompt on; empty while it has no place.
        window_prefix: What of it may be read in the window group, where the network has one.
        order_key: Brings the readers of one chain side by side when a batch is sorted by it.
    """

    id: str
    prefix: tuple[PrefixExtent, ...]
    window_prefix: tuple[WindowExtent, ...]

    @property
    def num_tokens(self) -> int: ...

    @property
    def order_key(self) -> tuple[int, ...]: ...


class Sequence:
    """Tokens, KV blocks and progress of one sequence.

    Positions are absolute: with a system prompt of S tokens attached, tokens 0 … S-1 live in its pinned extent and
    the sequence's own blocks start at token S, at offset 0 of `block_table[0]`.

    Attributes:
        token_ids: All that are known, of the prompt and of the output.
        order: Admission order; smaller runs first. Kept over preemptions.
        is_system_prompt: The sequence is the prefill of a system prompt itself. Its blocks are a pinned extent, which
            `free()` never releases.
        system_prompt: The pinned prompt this sequence reads, or None.
        num_computed_tokens: Tokens from 0 whose KV exists once the steps planned so far have run, the system prompt's
            included.
        num_in_flight: Tokens that planned steps will draw and whose values are not known yet.
        row: Slot of the running sequence in the ranks' buffers, or -1.
        num_cached_tokens: Prompt tokens this sequence did not have to compute; None until it is first scheduled.
        num_cache_write_tokens: Tokens of system prompts that were pinned for this sequence's request: computed on its
            account.
        tenant: Whose request it is, where several API keys tell; empty otherwise.
        namespace: Who may share what is the client's own; empty where there are no namespaces.
        block_keys: Prefix-cache keys of its full blocks, extended as they are needed.
        window_table, window_start, window_ring: Its blocks in the window group, and of them the first one that it still
            has; where a system prompt writes what is not kept. See `WindowBlocks`.
        matcher: Follows the output of a sequence whose form is constrained; its next token can only be drawn when all
            before it are known.
        fork_parent: Sibling whose prompt blocks this one may share.
        is_beam: It belongs to a beam search. The tokens that are drawn for it are the search's to choose from, not its
            own: `Scheduler.fork` gives it one of them.
        awaits_search: Its next token has been drawn, or is being drawn, and the search has not yet chosen.
    """

    __slots__ = (
        "arrival_time",
        "awaits_search",
        "block_keys",
        "block_table",
        "cache_seed",
        "first_scheduled_time",
        "fork_children",
        "fork_parent",
        "index",
        "is_beam",
        "is_system_prompt",
        "matcher",
        "namespace",
        "num_cache_write_tokens",
        "num_cached_tokens",
        "num_committed_blocks",
        "num_computed_tokens",
        "num_in_flight",
        "num_prompt_tokens",
        "order",
        "priority",
        "request_id",
        "row",
        "sampling_params",
        "seed",
        "status",
        "system_prompt",
        "tenant",
        "token_ids",
        "window_ring",
        "window_start",
        "window_table",
    )

    def __init__(
        self,
        request_id: str,
        token_ids: Iterable[int],
        sampling_params: SamplingParams | None = None,
        *,
        index: int = 0,
        order: int = 0,
        priority: int = 0,
        seed: int = 0,
        arrival_time: float = 0.0,
        cache_seed: bytes = b"",
        tenant: bytes = b"",
        namespace: bytes = b"",
        is_system_prompt: bool = False,
        is_beam: bool = False,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.token_ids = token_array(token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.sampling_params = sampling_params or SamplingParams()
        self.order = order
        self.priority = priority
        self.seed = seed
        self.arrival_time = arrival_time
        self.cache_seed = cache_seed
        self.tenant = tenant
        self.namespace = namespace
        self.is_system_prompt = is_system_prompt
        self.is_beam = is_beam
        self.awaits_search = False
        self.status = SequenceStatus.WAITING
        self.system_prompt: PinnedPrefix | None = None
        self.block_table: list[int] = []
        self.window_table: list[int] = []
        self.window_ring: list[int] = []
        self.window_start = 0
        self.block_keys: list[bytes] = []
        self.num_committed_blocks = 0
        self.num_computed_tokens = 0
        self.num_in_flight = 0
        self.num_cached_tokens: int | None = None
        self.num_cache_write_tokens = 0
        self.first_scheduled_time: float | None = None
        self.row = -1
        self.matcher: TokenMatcher | None = None
        self.fork_parent: Sequence | None = None
        self.fork_children: list[Sequence] = []

    def fork(self, index: int) -> Sequence:
        """Another beam with the same tokens, which may share the blocks of this one."""
        twin = Sequence(
            self.request_id,
            self.token_ids,
            self.sampling_params,
            index=index,
            order=self.order,
            priority=self.priority,
            seed=self.seed,
            arrival_time=self.arrival_time,
            cache_seed=self.cache_seed,
            tenant=self.tenant,
            namespace=self.namespace,
            is_beam=True,
        )
        twin.num_prompt_tokens = self.num_prompt_tokens
        twin.num_cached_tokens = self.num_cached_tokens
        twin.first_scheduled_time = self.first_scheduled_time
        twin.block_keys = list(self.block_keys)
        twin.fork_parent = self
        return twin

    def __lt__(self, other: Sequence) -> bool:
        return (self.priority, self.order) < (other.priority, other.order)

    def __repr__(self) -> str:
        return f"Sequence({self.request_id}[{self.index}], {self.status.name}, {self.num_tokens} tokens)"

    @property
    def num_tokens(self) -> int:
        """Tokens there are, those in flight included."""
        return len(self.token_ids) + self.num_in_flight

    @property
    def num_output_tokens(self) -> int:
        """Output tokens there are, those in flight included."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def prefix_len(self) -> int:
        """S, the tokens read from the pinned extent."""
        return self.system_prompt.num_tokens if self.system_prompt is not None else 0

    @property
    def is_finished(self) -> bool:
        return self.status >= SequenceStatus.FINISHED_STOPPED

    @property
    def finish_reason(self) -> str | None:
        return FINISH_REASONS.get(self.status)

    def keys_of_full_blocks(self, count: int, block_size: int) -> list[bytes]:
        """Prefix-cache keys of the first `count` own blocks.

        A key is SHA-256 over (previous key, the block's token ids as uint32), the chain starting at the digest of
        (`cache_seed`, id of the system prompt), so that equal keys mean equal context, namespace and model.
        """
        keys = self.block_keys
        while len(keys) < count:
            if keys:
                previous = keys[-1]
            else:
                prompt_id = self.system_prompt.id if self.system_prompt is not None else ""
                previous = hashlib.sha256(self.cache_seed + prompt_id.encode()).digest()
            start = self.prefix_len + len(keys) * block_size
            tokens = self.token_ids[start : start + block_size].tobytes()
            keys.append(hashlib.sha256(previous + tokens).digest())
        return keys[:count]
