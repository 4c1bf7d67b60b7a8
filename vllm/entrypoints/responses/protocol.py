"""Requests of the Responses API.

Fields of type Any are checked by `request`, by the chat path they are handed to, or are accepted without
effect.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from vllm.entrypoints.chat.request import PromptCacheOptions
from vllm.entrypoints.http.api_model import ApiModel


class ResponsesRequest(ApiModel):
    """`POST /v1/responses`. The last fields are ones that chat completions have and OpenAI's Responses API has not."""

    model: str | None = None
    input: str | list[Any]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    stream: bool | None = None
    background: bool | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include: list[Any] | None = None
    metadata: dict[str, Any] | None = None
    truncation: str | None = None
    prompt: Any = None
    conversation: Any = None
    user: Any = None
    max_tool_calls: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: PromptCacheOptions | None = None
    safety_identifier: Any = None
    service_tier: Any = None
    stream_options: Any = None
    context_management: Any = None

    top_k: Any = None
    min_p: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    seed: Any = None
    stop: Any = None
    stop_token_ids: Any = None
    include_stop_str_in_output: Any = None
    ignore_eos: Any = None
    min_tokens: Any = None
    logit_bias: Any = None
    skip_special_tokens: Any = None
    chat_template_kwargs: Any = None
    include_reasoning: Any = None
    structured_outputs: Any = None
    cache_salt: Any = None
    priority: Any = None
    request_id: Any = None


class InputTokensRequest(ResponsesRequest):
    """`POST /v1/responses/input_tokens`: what a response would be created with, of which `input` may be missing."""

    input: str | list[Any] | None = None  # type: ignore[assignment]


class PageRequest(ApiModel):
    """Query of `GET /v1/responses/{id}/input_items`."""

    order: Literal["asc", "desc"] = "desc"
    limit: int = Field(20, ge=1, le=100)
    after: str | None = None
