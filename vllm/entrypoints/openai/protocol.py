"""Requests of the OpenAI API, of vLLM's routes beside it, and of `/v1/system_prompts`."""

from __future__ import annotations

from typing import Any, Literal

from vllm.entrypoints.chat.request import ChatRequest, GenerationRequest, StreamOptions
from vllm.entrypoints.http.api_model import ApiModel, ListOf


class ChatCompletionRequest(ChatRequest):
    """`POST /v1/chat/completions`."""

    mm_processor_kwargs: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`. `prompt` is checked by `completion_request`."""

    prompt: Any = None
    prompt_embeds: Any = None
    suffix: str | None = None
    logprobs: int | None = None

    def streams_prompt_logprobs(self, logprobs: int | None) -> bool:
        return bool(self.echo) and logprobs is not None


class TokenizeRequest(ApiModel):
    """`POST /tokenize`: either `prompt`, or `messages` with what chat completions take."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    tools: ListOf[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(ApiModel):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: ListOf[int]


class SystemPromptRequest(ApiModel):
    """`POST /v1/system_prompts`: one of `messages` (with `tools`), `prompt` and `prompt_token_ids`."""

    messages: list[Any] | None = None
    tools: ListOf[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompt: str | None = None
    prompt_token_ids: ListOf[int] | None = None
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
    prompt: str | ListOf[int] | None = None
    cache_salt: str | None = None


def include_usage(request: GenerationRequest) -> None:
    """Makes a request ask for usage if it streams (`--enable-force-include-usage`)."""
    if request.stream:
        request.stream_options = request.stream_options or StreamOptions()
        request.stream_options.include_usage = True
