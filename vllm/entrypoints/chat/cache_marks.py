"""`cache_control` of messages, content parts and tools: where in a chat a client wants the KV to be kept.

Anthropic's API has these marks, and clients of the OpenAI API send them too.
"""

from __future__ import annotations

from typing import Any

from vllm.inputs import Breakpoint, CacheMark
from vllm.transformers_utils.chat_template import RenderedChat

MAX_BREAKPOINTS = 4
_TTL_SECONDS = {"5m": 300.0, "1h": 3600.0}
_RETENTION_SECONDS = {"24h": 86400.0}


def take_breakpoints(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, list[Breakpoint]]:
    """Messages and tools without their marks, and the places where those were; of more than `MAX_BREAKPOINTS`, the
    last ones."""
    found: list[Breakpoint] = []
    marked_tools = [tool for tool in tools or () if "cache_control" in tool]
    if tools and marked_tools:
        found.append(Breakpoint(None, None, _ttl(marked_tools[-1]["cache_control"])))
        tools = [_without(tool) for tool in tools]
    plain = []
    for i, message in enumerate(messages):
        content = message["content"]
        if isinstance(content, list) and any("cache_control" in part for part in content):
            found += [
                Breakpoint(i, j + 1, _ttl(part["cache_control"]))
                for j, part in enumerate(content)
                if "cache_control" in part
            ]
            message = message | {"content": [_without(part) for part in content]}
        if "cache_control" in message:
            found.append(Breakpoint(i, None, _ttl(message["cache_control"])))
            message = _without(message)
        plain.append(message)
    return plain, tools, found[-MAX_BREAKPOINTS:]


def cache_marks(rendered: RenderedChat, retention: Any) -> list[CacheMark]:
    """The marks of a chat, and one at the end of its system part if `prompt_cache_retention` asks for it to be kept."""
    seconds = _RETENTION_SECONDS.get(retention) if isinstance(retention, str) else None
    kept = [CacheMark(rendered.num_system_tokens, seconds)] if seconds and rendered.num_system_tokens else []
    return [*rendered.marks, *kept]


def _ttl(mark: Any) -> float:
    ttl = mark.get("ttl") if isinstance(mark, dict) else None
    return _TTL_SECONDS.get(ttl, _TTL_SECONDS["5m"]) if isinstance(ttl, str) else _TTL_SECONDS["5m"]


def _without(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key != "cache_control"}
