"""What a caller of the engine gets back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token (natural log), its 1-based rank in the vocabulary, and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""Token id → log-probability; holds the chosen token and the most likely ones."""


@dataclass
class RequestMetrics:
    """When things happened to a request, in seconds of `time.time()`."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One of the `n` outputs of a request.

    Attributes:
        index: 0 … n-1.
        text: Generated text (the news only, if the request asked for deltas).
        token_ids: Generated token ids, likewise.
        cumulative_logprob: Sum of the chosen tokens' log-probabilities, when logprobs were asked for.
        logprobs: One entry a token, when asked for.
        finish_reason: `stop`, `length` or `abort`; None while it runs.
        stop_reason: The stop string or stop token id that ended it; None for the end-of-sequence token.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: Sequence[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """State of a request.

    Attributes:
        num_cached_tokens: Prompt tokens whose KV this request did not have to compute.
        num_cache_write_tokens: Tokens of the system prompt that was computed and pinned for this request.
        num_discarded_tokens: Generated tokens of outputs that competed for a place among `outputs` and have none.
        prompt_logprobs: One entry a prompt token (None for the first), when asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    num_cache_write_tokens: int = 0
    num_discarded_tokens: int = 0
    lora_request: None = None
    encoder_prompt: None = None
    kv_transfer_params: None = field(default=None, repr=False)


@dataclass
class SystemPromptInfo:
    """A system prompt of the pool.

    Attributes:
        id: Same tokens, same id.
        state: `pending` (waits for room), `computing`, `loading` (comes from the host or disk), `probation` (was used
            once, gives way to whatever needs room), `pinned`, `host` (waits in host memory until it is asked for),
            `removing` (readers still run) or `removed`.
        num_tokens: S.
        num_blocks: KV blocks of its extents; of the layers that read all tokens, where others read a window.
        source: `auto` (a chat request), `marker` (one that marked it), `shared_prefix` (seen in several raw prompts),
            `declared` (an operator) or `preload` (a file at start-up).
        created / last_used / expires: seconds of `time.time()`; `expires` is None without a ttl.
        hits: Requests that reused it.
        uses: Requests that came with it or with a prompt that continues it, also before it was displaced.
        readers: Requests that hold it now.
        pin: `hard`, `automatic` or `soft`; see `PinClass`.
        num_bytes: K and V of its extents, over all layers and ranks.
        tokens_saved: Tokens that requests read from it instead of computing them.
        parent: Id of the prompt whose KV it continues; its extent holds only what follows.
        children: Prompts that continue it, which hold it as readers do.
        engines: Numbers of the engines that have it.
    """

    id: str
    name: str | None
    state: str
    num_tokens: int
    num_blocks: int
    source: str
    created: float
    last_used: float
    ttl: float | None
    expires: float | None
    hits: int
    readers: int
    pin: str = "automatic"
    num_bytes: int = 0
    tokens_saved: int = 0
    parent: str | None = None
    children: int = 0
    uses: int = 0
    engines: list[int] = field(default_factory=lambda: [0])


@dataclass
class VaryingSpanInfo:
    """A place where system prompts differ that are otherwise alike, so that each is pinned for itself.

    Attributes:
        position: First token that varies.
        before: Tokens that come before it.
        examples: Tokens that were seen there.
        num_prompts: Different prompts seen so far.
        num_shared: Tokens that all of them have in common, before and after the span.
    """

    position: int
    before: list[int]
    examples: list[list[int]]
    num_prompts: int
    num_shared: int


@dataclass
class RefusedPromptInfo:
    """A system prompt that requests came with and that is not pinned.

    Attributes:
        outcome: Why: `too_short`, `over_budget`, `busy` or `disabled`.
        requests: How many came with it.
        last_seen: Seconds of `time.time()`.
    """

    id: str
    num_tokens: int
    outcome: str
    requests: int
    last_seen: float


@dataclass
class SystemPromptPoolInfo:
    """State and totals of the pool.

    Attributes:
        readers: Requests that read pinned prompts now.
        tokens_reused: Tokens that requests read instead of computing them.
        prefills: System prompts computed.
        displaced: Soft pins that gave way to hard ones.
        outcomes: Requests by what the pool did for them.
        refused: System prompts that ran unpinned, the latest last.
        varying: Where system prompts differ that are otherwise alike.
        budget_tokens, pinned_tokens: Layers with a window keep the end of a prompt only.
        budget_bytes, pinned_bytes: K and V of them, over all layers and ranks.
    """

    mode: str
    budget_tokens: int
    pinned_tokens: int
    prompts: int
    readers: int
    tokens_reused: int
    prefills: int
    displaced: int
    outcomes: dict[str, int]
    refused: list[RefusedPromptInfo]
    varying: list[VaryingSpanInfo]
    pinned_bytes: int = 0
    budget_bytes: int = 0
