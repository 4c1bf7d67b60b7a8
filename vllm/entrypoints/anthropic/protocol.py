"""Requests of the Anthropic API.

Fields of type Any are checked by `request`, by the chat path they are handed to, or are accepted without effect.
"""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.http.api_model import ApiModel


class CountTokensRequest(ApiModel):
    """`POST /v1/messages/count_tokens`."""

    model: str | None = None
    messages: list[Any]
    system: Any = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    cache_control: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest):
    """`POST /v1/messages`. The last fields are ones that chat completions have and Anthropic's API has not."""

    max_tokens: int
    stop_sequences: list[Any] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Any = None
    service_tier: Any = None
    container: Any = None
    inference_geo: Any = None
    context_management: Any = None

    cache_salt: Any = None
    ignore_eos: Any = None
    min_tokens: Any = None
    priority: Any = None
    seed: Any = None
