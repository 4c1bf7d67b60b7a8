"""Shapes that answers to chat and text completions share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.chat.events import Usage
from vllm.entrypoints.chat.logprobs import clamp
from vllm.outputs import Logprob, TokenLogprobs


def usage_json(usage: Usage) -> dict[str, Any]:
    """The `usage` object."""
    details = {} if usage.reasoning is None else {"completion_tokens_details": {"reasoning_tokens": usage.reasoning}}
    return details | {
        "prompt_tokens": usage.prompt,
        "total_tokens": usage.prompt + usage.completion,
        "completion_tokens": usage.completion,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached,
            "cache_write_tokens": usage.written,
            "created_cache_tokens": usage.written,  # vLLM's name of it
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
