"""What is asked for: the fields that all dialects' requests are turned into.

Fields carry the names of the OpenAI API and vLLM's additions. None means that the request is silent about it. Fields of
type Any are checked elsewhere, or accepted without effect. The ranges of sampling values are checked by
`SamplingParams`, so that the Python API and the HTTP API agree on them.
"""

from __future__ import annotations

from typing import Any, Literal

from vllm.entrypoints.http.api_model import ApiModel, ListOf

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class StreamOptions(ApiModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class PromptCacheOptions(ApiModel):
    """What becomes of the prompt in the cache, as OpenAI asks for it.

    Attributes:
        mode: `implicit` keeps the system part besides what is marked, `explicit` only what is marked.
        ttl: How long what is kept may go unused.
        prewarm: Compute and keep the prompt, and answer nothing.
        comparison_response_id: A response whose prompt should have been read; the answer says why it was not.
    """

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m", "12h"] | None = None
    prewarm: bool | None = None
    comparison_response_id: str | None = None


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
    prompt_cache_options: PromptCacheOptions | None = None

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
    stop: str | ListOf[str] | None = None
    stop_token_ids: ListOf[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, Any] | None = None
    allowed_token_ids: ListOf[int] | None = None
    bad_words: ListOf[str] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
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

    @property
    def is_prewarming(self) -> bool:
        """Whether the prompt alone is asked for."""
        return bool(self.prompt_cache_options and self.prompt_cache_options.prewarm)

    def streams_prompt_logprobs(self, logprobs: int | None) -> bool:
        """Whether a stream shows log-probabilities of the prompt too, given how many the answer shows."""
        return False


class ChatRequest(GenerationRequest):
    """A chat to answer: what the requests of every dialect become. `messages` is checked by `chat.messages`."""

    messages: list[Any]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: ListOf[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: Any = None
    modalities: ListOf[str] | None = None
    reasoning_effort: ReasoningEffort | None = None
    include_reasoning: Any = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: ListOf[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
