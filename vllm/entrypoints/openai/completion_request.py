"""What a text completion may ask for, and the prompts that it gives."""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.chat.sampling import check_generation
from vllm.entrypoints.http.json_body import snippet
from vllm.entrypoints.openai.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import check_int

MAX_PROMPTS = 1024
MAX_CHOICES = 4096
DEFAULT_COMPLETION_TOKENS = 16


def check_completion(request: CompletionRequest) -> None:
    """Refuses text-completion fields whose feature does not exist here."""
    check_generation(request)
    if request.stream and request.use_beam_search:
        raise VLLMValidationError("Streaming is not supported with use_beam_search.", "stream")
    if request.suffix:
        raise VLLMValidationError(
            "suffix is not supported: the model only goes on from the end of a prompt; leave it out.", "suffix"
        )
    if request.prompt_embeds is not None:
        raise VLLMValidationError("prompt_embeds is not supported; send prompt.", "prompt_embeds")
    if request.logprobs is not None:
        check_int("logprobs", request.logprobs, -1, 2**31 - 1)


def split_prompts(prompt: Any, n: int) -> list[str | list[int]]:
    """The prompts of a text completion: given as text, as token ids, or as a list of either or both.

    Raises:
        VLLMValidationError: anything else, or too many prompts or outputs.
    """
    prompts = _as_list(prompt)
    if len(prompts) > MAX_PROMPTS:
        raise VLLMValidationError(f"prompt may hold at most {MAX_PROMPTS} prompts, got {len(prompts)}.", "prompt")
    if len(prompts) * n > MAX_CHOICES:
        raise VLLMValidationError(
            f"A request may ask for at most {MAX_CHOICES} outputs, got {len(prompts)} prompts with n={n}.", "n"
        )
    if [] in prompts:
        raise VLLMValidationError("prompt must not be an empty list of token ids.", "prompt")
    return prompts


def _as_list(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, str) or _is_ids(item) for item in prompt):
            return prompt
        if _is_ids(prompt):
            return [prompt]
    raise VLLMValidationError(
        f"prompt must be a string, a list of token ids, or a list of strings and lists of token ids, "
        f"got {snippet(prompt)}.",
        "prompt",
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int for item in value)
