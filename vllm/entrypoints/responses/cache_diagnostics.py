"""Why a response could not read its prompt from the cache, compared with an earlier one."""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.responses.store import StoredResponse

# What of a request stands ahead of its input in the prompt, and the name of a change of it.
_AHEAD = (("tools", "tools_changed"), ("reasoning", "reasoning_effort_changed"), ("instructions", "input_changed"))


def cache_diagnostics(current: StoredResponse, earlier: StoredResponse | None) -> dict[str, Any]:
    """`prompt_cache_diagnostics` of a response.

    What does not change the prompt here, such as the form of the output or the key of the cache, is no reason.

    Args:
        current: With its usage, and without its answer among its messages yet.
        earlier: The response to compare with, whose answer is its last message; None if it is not kept.
    """
    if earlier is None:
        return {"type": "comparison_response_not_found"}
    usage = current.response["usage"]
    if usage is None:
        return {"type": "unavailable"}
    cached = usage["input_tokens_details"]["cached_tokens"]
    reason = next((name for key, name in _AHEAD if _said(current, key) != _said(earlier, key)), None)
    before = _unmarked(earlier.messages[:-1])
    if reason is None and _unmarked(current.messages[: len(before)]) != before:
        reason = "input_changed"
    if reason is not None:
        return {
            "type": "cache_miss",
            "reason": reason,
            "cache_missed_tokens": usage["input_tokens"] - cached,
            "comparison_reusable_tokens": None,
        }
    return {"type": "cache_hit" if cached else "unavailable"}


def _unmarked(value: Any) -> Any:
    """Messages without marks of the cache, which are no part of the prompt."""
    if isinstance(value, list):
        return [_unmarked(item) for item in value]
    if isinstance(value, dict):
        return {key: _unmarked(item) for key, item in value.items() if key != "prompt_cache_breakpoint"}
    return value


def _said(stored: StoredResponse, key: str) -> Any:
    value = stored.response[key]
    return value.get("effort") if key == "reasoning" else value
