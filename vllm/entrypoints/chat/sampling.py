"""From a request's fields to `SamplingParams`, and the refusal of what this server cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.entrypoints.chat.output_form import output_form
from vllm.entrypoints.chat.request import ChatRequest, GenerationRequest
from vllm.entrypoints.http.json_body import snippet
from vllm.entrypoints.http.middleware import MAX_REQUEST_ID_CHARS
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import MAX_LOGIT_BIAS, MAX_N, RequestOutputKind, SamplingParams, check_count, check_int

MAX_CACHE_SALT_CHARS = 1024

# Request fields that SamplingParams knows under the same name.
_SAME_NAME = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)


def sampling_params(
    request: GenerationRequest, defaults: Mapping[str, Any], *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Sampling parameters of a request.

    Args:
        defaults: What the checkpoint recommends, used where the request is silent.
        max_tokens: Most tokens to generate; None for all that the context leaves.
        logprobs: Most likely tokens to report at each position; None for no log-probabilities.

    Raises:
        VLLMValidationError: A value is out of range.
    """
    values: dict[str, Any] = {name: defaults[name] for name in _SAME_NAME if name in defaults}
    for name in _SAME_NAME:
        value = getattr(request, name)
        if value is not None:
            values[name] = value
    of_prompt = prompt_logprobs(request, logprobs)
    if request.best_of is not None:
        values["n"] = request.best_of
        if request.best_of > num_choices(request) and logprobs is None:
            logprobs = 0
    return SamplingParams(
        **values,
        logit_bias=_logit_bias(request.logit_bias),
        max_tokens=max_tokens,
        logprobs=logprobs,
        prompt_logprobs=of_prompt,
        truncate_prompt_tokens=request.truncate_prompt_tokens,
        truncation_side=request.truncation_side or "left",
        structured_outputs=output_form(request),
        output_kind=RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY,
    )


def prompt_logprobs(request: GenerationRequest, logprobs: int | None) -> int | None:
    """Most likely tokens to report at each position of the prompt; None where none are shown, since a request with any
    has its whole prompt computed. An echoed prompt has as many as the answer, which `logprobs` says."""
    asked = request.prompt_logprobs
    if asked is None and request.echo:
        asked = logprobs
    return asked if not request.stream or request.streams_prompt_logprobs(logprobs) else None


def num_choices(request: GenerationRequest) -> int:
    """Outputs that each prompt gets in the answer; with `best_of`, more compete for that."""
    return 1 if request.n is None else request.n


def _logit_bias(given: dict[str, Any] | None) -> dict[int, float] | None:
    """Biases by token id; JSON has only text as keys."""
    if given is None:
        return None
    check_count("logit_bias", given, MAX_LOGIT_BIAS)
    biases: dict[int, float] = {}
    for key, bias in given.items():
        if not key.isdecimal() or len(key) > 10:
            raise VLLMValidationError(f"logit_bias must have token ids as keys, got {snippet(key)}.", "logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise VLLMValidationError(f"logit_bias[{key}] must be a number, got {snippet(bias)}.", "logit_bias")
        biases[int(key)] = float(bias)
    return biases


def chat_max_tokens(request: ChatRequest, defaults: Mapping[str, Any]) -> int | None:
    """`max_completion_tokens`, else its older name `max_tokens`, else the checkpoint's default, else no limit."""
    if request.max_completion_tokens is not None:
        check_int("max_completion_tokens", request.max_completion_tokens, 1, 2**31 - 1)
        return request.max_completion_tokens
    if request.max_tokens is not None:
        return request.max_tokens
    return int(defaults["max_tokens"]) if "max_tokens" in defaults else None


def chat_logprobs(request: ChatRequest, vocab_size: int) -> int | None:
    """Number of most likely tokens to report; None for no log-probabilities. -1 asks for the whole vocabulary."""
    if request.top_logprobs is not None:
        check_int("top_logprobs", request.top_logprobs, -1, 2**31 - 1)
        if request.top_logprobs and not request.logprobs:
            raise VLLMValidationError("top_logprobs needs logprobs to be true.", "top_logprobs")
    if not request.logprobs:
        return None
    return vocab_size if request.top_logprobs == -1 else request.top_logprobs or 0


def check_generation(request: GenerationRequest) -> None:
    """Refuses what would change the answer if it were ignored, and fields of the wrong size.

    Raises:
        VLLMValidationError: naming the field.
    """
    if request.stream_options is not None and request.stream_options.model_fields_set and not request.stream:
        raise VLLMValidationError("stream_options may only be set when stream is true.", "stream_options")
    if request.stream and request.prompt_logprobs:  # 0 is what some clients always send; vLLM takes it too
        raise VLLMValidationError("prompt_logprobs are not available when stream is true.", "prompt_logprobs")
    if request.use_beam_search:
        _check_beam_search(request)
    if request.best_of is not None:
        n = num_choices(request)
        check_int("n", n, 1, MAX_N)
        check_int("best_of", request.best_of, n, MAX_N, note=" (n is the least)")
        if request.stream and request.best_of > n:
            raise VLLMValidationError("best_of above n cannot be streamed: the best are known at the end.", "best_of")
    if request.logits_processors:
        raise VLLMValidationError("logits_processors are not supported.", "logits_processors")
    if request.cache_salt is not None and not 1 <= len(request.cache_salt) <= MAX_CACHE_SALT_CHARS:
        raise VLLMValidationError(
            f"cache_salt must have 1 to {MAX_CACHE_SALT_CHARS} characters, got {len(request.cache_salt)}.", "cache_salt"
        )
    if request.request_id is not None and not 1 <= len(request.request_id) <= MAX_REQUEST_ID_CHARS:
        raise VLLMValidationError(
            f"request_id must have 1 to {MAX_REQUEST_ID_CHARS} characters, got {len(request.request_id)}.", "request_id"
        )
    if request.request_id is not None and not request.request_id.isprintable():
        raise VLLMValidationError(
            f"request_id must hold printable characters only, got {snippet(request.request_id)}.", "request_id"
        )
    if request.priority is not None:
        check_int("priority", request.priority, -(2**31), 2**31 - 1)


def _check_beam_search(request: GenerationRequest) -> None:
    """Refuses what has no meaning for the model's own log-probabilities, which a beam search compares."""
    if request.logit_bias or request.allowed_token_ids or request.bad_words:
        names = ("logit_bias", "allowed_token_ids", "bad_words")
        field = next(name for name in names if getattr(request, name))
        raise VLLMValidationError(f"{field} cannot be combined with use_beam_search.", field)
    for name, neutral in (("presence_penalty", 0.0), ("frequency_penalty", 0.0), ("repetition_penalty", 1.0)):
        if getattr(request, name) not in (None, neutral):
            raise VLLMValidationError(f"{name} cannot be combined with use_beam_search.", name)


def check_chat(request: ChatRequest) -> None:
    """Refuses chat fields whose feature does not exist here."""
    check_generation(request)
    if request.modalities is not None and request.modalities != ["text"]:
        raise VLLMValidationError(
            f'modalities supports only ["text"], got {snippet(request.modalities)}.', "modalities"
        )
    if request.continue_final_message and request.add_generation_prompt:
        raise VLLMValidationError(
            "continue_final_message and add_generation_prompt cannot both be true.", "continue_final_message"
        )
