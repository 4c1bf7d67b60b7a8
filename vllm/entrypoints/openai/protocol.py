"""Requests of the HTTP API, and the small shapes that several responses share.

Fields carry the names of the OpenAI API and vLLM's additions. None means that the request is silent about it. Fields of
type Any are checked elsewhere, or accepted without effect. The ranges of sampling values are checked by
`SamplingParams`, so that the Python API and the HTTP API agree on them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast

from vllm.outputs import Logprob, TokenLogprobs


class _FirstErrorOnly(FailFast):
    """Judges a list by its first wrong entry: a million of them must not make a million errors."""

    # As part of a union it must have a hash, which pydantic's own has not.
    __hash__ = object.__hash__


_T = TypeVar("_T")
_List = Annotated[list[_T], _FirstErrorOnly()]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ApiModel(BaseModel):
    """A request body; unknown fields are accepted."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class StreamOptions(ApiModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


def include_usage(request: GenerationRequest) -> None:
    """Makes a request ask for usage if it streams (`--enable-force-include-usage`)."""
    if request.stream:
        request.stream_options = request.stream_options or StreamOptions()
        request.stream_options.include_usage = True


class GenerationRequest(ApiModel):
    """What chat and text completions have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Any = None
    request_id: str | None = None
    priority: int | None = None
    cache_salt: str | None = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    length_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | _List[str] | None = None
    stop_token_ids: _List[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, Any] | None = None
    allowed_token_ids: _List[int] | None = None
    bad_words: _List[str] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    echo: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None

    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_decoding_backend: Any = None
    guided_whitespace_pattern: Any = None
    logits_processors: Any = None
    vllm_xargs: Any = None
    kv_transfer_params: Any = None


class ChatCompletionRequest(GenerationRequest):
    """`POST /v1/chat/completions`. `messages` is checked by `chat.messages`."""

    messages: list[Any]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: _List[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: Any = None
    modalities: _List[str] | None = None
    reasoning_effort: ReasoningEffort | None = None
    include_reasoning: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: _List[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`. `prompt` is checked by `chat.prompts`."""

    prompt: Any = None
    prompt_embeds: Any = None
    suffix: str | None = None
    logprobs: int | None = None


class TokenizeRequest(ApiModel):
    """`POST /tokenize`: either `prompt`, or `messages` with what chat completions take."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    tools: _List[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(ApiModel):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: _List[int]


class SystemPromptRequest(ApiModel):
    """`POST /v1/system_prompts`: one of `messages` (with `tools`), `prompt` and `prompt_token_ids`."""

    messages: list[Any] | None = None
    tools: _List[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompt: str | None = None
    prompt_token_ids: _List[int] | None = None
    name: str | None = None
    ttl: float | None = None
    pin: Literal["hard", "soft"] = "hard"


class SystemPromptChange(ApiModel):
    """`PATCH /v1/system_prompts/{id}`: what is given changes; a `ttl` of null keeps the prompt for good."""

    name: str | None = None
    ttl: float | None = None


class SystemPromptPoolChange(ApiModel):
    """`PATCH /v1/system_prompts`."""

    budget_tokens: int


class ExplainRequest(ApiModel):
    """`POST /v1/system_prompts?explain=1`: the body of a chat, response, message (of the Anthropic API) or text
    completion. What is not named here is read as the route of that body reads it."""

    messages: list[Any] | None = None
    input: str | list[Any] | None = None
    add_special_tokens: bool | None = None
    truncation: str | None = None
    truncate_prompt_tokens: int | None = None
    prompt: str | _List[int] | None = None
    cache_salt: str | None = None


def now() -> int:
    """Seconds since 1970, as `created` fields hold them."""
    return int(time.time())


def random_id() -> str:
    return uuid.uuid4().hex


def usage(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int, cache_write_tokens: int = 0
) -> dict[str, Any]:
    """The `usage` object.

    Args:
        cached_tokens: Prompt tokens whose KV was not computed for this request.
        cache_write_tokens: Prompt tokens whose KV was computed for this request and is pinned from now on.
    """
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": cached_tokens,
            "cache_write_tokens": cache_write_tokens,
            "created_cache_tokens": cache_write_tokens,  # vLLM's name of it
        },
    }


def prompt_logprobs_json(
    prompt_logprobs: Sequence[TokenLogprobs | None] | None,
) -> list[dict[str, dict[str, Any]] | None] | None:
    """`prompt_logprobs` as responses show it: one entry a prompt token, token id → log-probability, rank, text."""
    if prompt_logprobs is None:
        return None
    return [
        None if entry is None else {str(token_id): _logprob_json(lp) for token_id, lp in entry.items()}
        for entry in prompt_logprobs
    ]


def _logprob_json(lp: Logprob) -> dict[str, Any]:
    return {"logprob": clamp(lp.logprob), "rank": lp.rank, "decoded_token": lp.decoded_token}


def clamp(logprob: float) -> float:
    """JSON has no -Infinity; -9999 stands for it, as in vLLM."""
    return max(logprob, -9999.0)
