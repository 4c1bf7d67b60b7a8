"""What passes between the API process and the engine process: msgspec structs, encoded as MessagePack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from vllm.config import VllmConfig
from vllm.inputs import CacheMark
from vllm.outputs import VaryingSpanInfo
from vllm.sampling_params import SamplingParams
from vllm.step import PositionLogprobs
from vllm.structured_output.constraint import CompiledConstraint
from vllm.token_ids import TokenIds
from vllm.wire import received, sendable


class EngineRequest(msgspec.Struct, omit_defaults=True, tag="add"):
    """A request, tokenised.

    Attributes:
        num_system_tokens: Length of the system prompt at the head of `prompt_token_ids`; None if there is none to pin.
        cache_salt: Namespace of its suffix blocks.
        constraint: The form that its outputs must have.
        marks: Further prefixes that the client wants to be kept.
        tenant: Which of several API keys it came with; None where there are not several. Namespaces are the tenant's.
        is_search: It is a beam search: after each draw its sequences wait for `ForkSequences`.
    """

    request_id: str
    prompt_token_ids: TokenIds
    sampling_params: SamplingParams
    arrival_time: float
    num_system_tokens: int | None = None
    cache_salt: str | None = None
    priority: int = 0
    constraint: CompiledConstraint | None = None
    marks: list[CacheMark] = []
    tenant: str | None = None
    is_search: bool = False


class AbortRequests(msgspec.Struct, tag="abort"):
    """Ends requests, or single outputs of them: (request id, output index or None for all)."""

    targets: list[tuple[str, int | None]]


class ForkSequences(msgspec.Struct, tag="fork"):
    """Goes on with a beam search; see `Scheduler.fork`."""

    request_id: str
    beams: list[tuple[int, int]]


class UtilityCall(msgspec.Struct, tag="call"):
    """Calls a method of the engine core; answered by a `UtilityResult` with the same id."""

    call_id: int
    method: str
    args: list[Any] = []


EngineInput = EngineRequest | AbortRequests | ForkSequences | UtilityCall
"""All that the API process sends."""


class UtilityResult(msgspec.Struct, omit_defaults=True):
    call_id: int
    result: Any = None
    error: str | None = None
    param: str | None = None


class EngineOutput(msgspec.Struct, omit_defaults=True):
    """News of one output of one request from one step.

    Attributes:
        index: Which of the request's `n` outputs.
        num_cached_tokens: Set with the first token.
        num_cache_write_tokens: Likewise.
        first_scheduled_time: Set with the first token.
        error: The request failed in the engine; nothing more comes.
        param: The request field to blame for it; None where the request is not to blame.
    """

    request_id: str
    index: int
    new_token_ids: list[int]
    logprobs: PositionLogprobs | None = None
    prompt_logprobs: PositionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int | None = None
    num_cache_write_tokens: int = 0
    first_scheduled_time: float | None = None
    error: str | None = None
    param: str | None = None


class EngineStats(msgspec.Struct, omit_defaults=True):
    """State and totals after a step; totals only grow.

    Attributes:
        iteration_tokens: Tokens computed in the step.
        pinned_tokens, probation_tokens: Tokens in extents of prompts that are pinned, and of those on probation.
        pool_outcomes: Requests by what the pool did for them, an `Outcome` each.
        pool_prefill_seconds: Durations of system-prompt prefills that ended in this step.
        pool_host_tokens: Tokens, in whole blocks, that the host tier holds.
        pool_snapshots: Operations on snapshots by `operation/outcome`.
        varying_prompts: Places where system prompts differ that are otherwise alike, noticed in this step.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    iteration_tokens: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_used_blocks: int = 0
    pinned_tokens: int = 0
    probation_tokens: int = 0
    pinned_prompts: int = 0
    pool_budget_tokens: int = 0
    pool_readers: int = 0
    pool_prefills: int = 0
    pool_tokens_reused: int = 0
    pool_outcomes: dict[str, int] = {}
    pool_prefill_seconds: list[float] = []
    pool_host_tokens: int = 0
    pool_snapshots: dict[str, int] = {}
    varying_prompts: list[VaryingSpanInfo] = []


class StepOutputs(msgspec.Struct, omit_defaults=True):
    """All that the engine process tells the API process after a step or a call."""

    outputs: list[EngineOutput] = []
    stats: EngineStats | None = None
    results: list[UtilityResult] = []


class EngineReady(msgspec.Struct, omit_defaults=True):
    """First message of the engine process: it can serve, or why it cannot."""

    num_blocks: int = 0
    pool_budget_tokens: int = 0
    error: str | None = None


class CoreProcessArgs(msgspec.Struct):
    """What a new engine process is given, as one JSON line on its standard input.

    Attributes:
        config: Its `model.hf_config` as the fields of that configuration; see `read`.
        input_address / output_address: ZeroMQ endpoints, PULL and PUSH on the engine's side.
    """

    config: VllmConfig
    input_address: str
    output_address: str

    def to_line(self) -> bytes:
        """The line. The configuration of the model becomes the fields that its JSON has."""
        args = CoreProcessArgs(sendable(self.config), self.input_address, self.output_address)
        return msgspec.json.encode(args) + b"\n"

    @classmethod
    def read(cls, line: bytes, hf_config_of: Callable[[dict[str, Any]], Any]) -> CoreProcessArgs:
        """What `to_line` has written; `hf_config_of` makes the configuration of a model from its fields."""
        args = msgspec.json.decode(line, type=cls)
        return CoreProcessArgs(received(args.config, hf_config_of), args.input_address, args.output_address)
