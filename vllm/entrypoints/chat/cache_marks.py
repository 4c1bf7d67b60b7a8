"""Where in a chat a client wants the KV to be kept: `cache_control` and `prompt_cache_breakpoint`.

The first is Anthropic's mark, of messages, content parts and tools; clients of the OpenAI API send it too. The second
is OpenAI's, of content parts.
"""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.chat.request import GenerationRequest, PromptCacheOptions
from vllm.inputs import Breakpoint, CacheMark
from vllm.transformers_utils.chat_template import RenderedChat

MAX_BREAKPOINTS = 4
_TTL_SECONDS = {"5m": 300.0, "30m": 1800.0, "1h": 3600.0, "12h": 43200.0}
_RETENTION_SECONDS = {"24h": 86400.0}
_OPENAI_TTL = "30m"


def take_breakpoints(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, options: PromptCacheOptions | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, list[Breakpoint]]:
    """Messages and tools without their marks, and the places where those were; of more than may be written, the last
    ones.

    Args:
        messages: What `check_messages` made, which knows both kinds of marks by one name.
        options: Tells how long what OpenAI's marks mark is kept; one of the breakpoints is the system part's unless
            they are explicit.
    """
    found: list[Breakpoint] = []
    default = (options.ttl if options is not None else None) or _OPENAI_TTL
    marked_tools = [tool for tool in tools or () if "cache_control" in tool]
    if tools and marked_tools:
        found.append(Breakpoint(None, None, _ttl(marked_tools[-1]["cache_control"], default)))
        tools = [_without(tool) for tool in tools]
    plain = []
    is_openai = False
    for i, message in enumerate(messages):
        content = message["content"]
        if isinstance(content, list) and any("cache_control" in part for part in content):
            marks = [(j + 1, part["cache_control"]) for j, part in enumerate(content) if "cache_control" in part]
            found += [Breakpoint(i, end, _ttl(mark, default)) for end, mark in marks]
            is_openai |= any(_is_openai(mark) for _, mark in marks)
            message = message | {"content": [_without(part) for part in content]}
        if "cache_control" in message:
            found.append(Breakpoint(i, None, _ttl(message["cache_control"], default)))
            message = _without(message)
        plain.append(message)
    keeps_system = is_openai and (options is None or options.mode != "explicit")
    return plain, tools, found[-(MAX_BREAKPOINTS - keeps_system) :]


def to_keep(rendered: RenderedChat, request: GenerationRequest) -> tuple[int | None, list[CacheMark]]:
    """The length of the system part that is to be kept by itself, and the marks of a chat; one is at the end of the
    system part if that is asked for."""
    options, retention = request.prompt_cache_options, request.prompt_cache_retention
    if options is not None and options.mode == "explicit":
        return None, [*rendered.marks]
    seconds = _RETENTION_SECONDS.get(retention) if isinstance(retention, str) else None
    if options is not None and (options.ttl is not None or options.prewarm):
        seconds = _TTL_SECONDS[options.ttl or _OPENAI_TTL]
    kept = [CacheMark(rendered.num_system_tokens, seconds)] if seconds and rendered.num_system_tokens else []
    return rendered.num_system_tokens, [*rendered.marks, *kept]


def _is_openai(mark: Any) -> bool:
    return isinstance(mark, dict) and mark.get("type") == "breakpoint"


def _ttl(mark: Any, default: str) -> float:
    ttl = mark.get("ttl") if isinstance(mark, dict) else None
    if not isinstance(ttl, str) or ttl not in _TTL_SECONDS:
        ttl = default if _is_openai(mark) else "5m"
    return _TTL_SECONDS[ttl]


def _without(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key != "cache_control"}
