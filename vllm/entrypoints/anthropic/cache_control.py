"""Cache breakpoints: how many there may be, of which form and order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.entrypoints.anthropic.content import field_of
from vllm.entrypoints.anthropic.protocol import CountTokensRequest
from vllm.entrypoints.http.json_body import snippet
from vllm.exceptions import VLLMValidationError

MAX_CACHE_BREAKPOINTS = 4
_CACHE_TTLS = ("5m", "1h")


def check_cache_control(request: CountTokensRequest) -> None:
    """Checks the cache breakpoints of a request.

    What they mark is pinned as the operator allows (--system-prompt-markers); the system part of a chat, tools
    included, is pinned anyway.

    Raises:
        VLLMValidationError: There are too many of them, or one is malformed.
    """
    ttls: list[str] = []
    for where, marker in _cache_markers(request):
        if not isinstance(marker, dict) or marker.get("type") != "ephemeral":
            raise VLLMValidationError(
                f"{where} must be {{'type': 'ephemeral'}}, with or without a ttl, got {snippet(marker)}.",
                field_of(where),
            )
        ttl = marker.get("ttl") or _CACHE_TTLS[0]
        if ttl not in _CACHE_TTLS:
            raise VLLMValidationError(f"{where}.ttl must be '5m' or '1h', got {snippet(ttl)}.", field_of(where))
        if ttl == "1h" and "5m" in ttls:
            raise VLLMValidationError(
                f"{where}.ttl must not be '1h' after a breakpoint of '5m'; the order is tools, system, messages.",
                field_of(where),
            )
        ttls.append(ttl)
    if len(ttls) > MAX_CACHE_BREAKPOINTS:
        raise VLLMValidationError(
            f"A request may have at most {MAX_CACHE_BREAKPOINTS} blocks with cache_control, got {len(ttls)}.",
            "cache_control",
        )


def _cache_markers(request: CountTokensRequest) -> Iterator[tuple[str, Any]]:
    """All `cache_control` values with their places, in the order in which the prompt shows their blocks."""
    yield from _markers_of("tools", request.tools)
    yield from _markers_of("system", request.system)
    for i, message in enumerate(request.messages):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            yield from _markers_of(f"messages[{i}].content", content)
    if request.cache_control is not None:
        yield "cache_control", request.cache_control


def _markers_of(where: str, blocks: Any) -> Iterator[tuple[str, Any]]:
    for i, block in enumerate(blocks if isinstance(blocks, list) else ()):
        if not isinstance(block, dict):
            continue
        if block.get("type") == "tool_result":
            yield from _markers_of(f"{where}[{i}].content", block.get("content"))
        if block.get("cache_control") is not None:
            yield f"{where}[{i}].cache_control", block["cache_control"]
