"""A response as it begins: what the request asked for, and nothing of the answer yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.entrypoints.http.api_model import now, random_id
from vllm.entrypoints.responses.protocol import ResponsesRequest


def new_response(request: ResponsesRequest, model: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The `response` object, in progress.

    Args:
        model: The name to report back.
        defaults: Sampling values that the checkpoint recommends, used where the request is silent.
    """
    return {
        "id": f"resp_{random_id()}",
        "object": "response",
        "created_at": now(),
        "completed_at": None,
        "status": "in_progress",
        "background": bool(request.background),
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": request.max_tool_calls,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "prompt_cache_retention": request.prompt_cache_retention,
        "prompt_cache_options": _cache_options(request),
        "prompt_cache_diagnostics": None,
        "reasoning": {"effort": None, "summary": None} | (request.reasoning or {}),
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": request.store is not False,
        "temperature": defaults.get("temperature", 1.0) if request.temperature is None else request.temperature,
        "text": {"format": {"type": "text"}} | (request.text or {}),
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": defaults.get("top_p", 1.0) if request.top_p is None else request.top_p,
        "truncation": request.truncation or "disabled",
        "usage": None,
        "user": request.user,
    }


def _cache_options(request: ResponsesRequest) -> dict[str, Any] | None:
    options = request.prompt_cache_options
    if options is None:
        return None
    shown = {"mode": options.mode or "implicit", "ttl": options.ttl or "30m"}
    return shown | {"comparison_response_id": options.comparison_response_id}
