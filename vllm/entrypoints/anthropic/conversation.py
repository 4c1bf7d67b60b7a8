"""Messages, system prompt and tools of the Anthropic API, as the chat that says the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.anthropic.cache_control import check_cache_control
from vllm.entrypoints.anthropic.content import (
    blocks_of,
    json_text,
    mark_of,
    server_tool_text,
    string,
    text_part,
)
from vllm.entrypoints.anthropic.protocol import CountTokensRequest
from vllm.entrypoints.http.json_body import snippet
from vllm.exceptions import VLLMValidationError

MAX_MESSAGES = 100_000
# What agents put between a user's words without a role of its own; the answer to all of it is one.
_CONTEXT_ROLES = ("ctx", "msg")


@dataclass(frozen=True)
class Conversation:
    """What of a request the chat template renders.

    Attributes:
        continues: The last message is the assistant's, and the answer goes on where it ends.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any]
    continues: bool


def read_conversation(request: CountTokensRequest) -> Conversation:
    """Messages and tools in the chat path's form. A block's place in the request stays in error messages.

    Raises:
        VLLMValidationError: A block is malformed, or is not text.
    """
    check_cache_control(request)
    messages: list[dict[str, Any]] = []
    system = blocks_of("system", request.system)
    if system:
        messages.append({"role": "system", "content": [text_part(where, block) for where, block in system]})
    if not request.messages:
        raise VLLMValidationError("messages must hold at least one message.", "messages")
    if len(request.messages) > MAX_MESSAGES:
        raise VLLMValidationError(
            f"messages may hold at most {MAX_MESSAGES} messages, got {len(request.messages)}.", "messages"
        )
    for i, message in enumerate(request.messages):
        for converted in _message(f"messages[{i}]", message):
            _append(messages, converted)
    for message in messages:
        parts = message["content"]
        if isinstance(parts, list) and len(parts) < 2:
            message["content"] = parts[0]["text"] if parts else ""
            message |= mark_of(*parts)
    last = messages[-1]
    last |= mark_of({"cache_control": request.cache_control})
    return Conversation(
        messages=messages,
        tools=_tools(request.tools),
        template_kwargs=_thinking(request.thinking) | (request.chat_template_kwargs or {}),
        continues=last["role"] == "assistant" and not last.get("tool_calls"),
    )


def _append(messages: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """Adds a message; turns of the same side that follow each other are one turn."""
    last = messages[-1] if messages else None
    if last is None or last["role"] != message["role"] or message["role"] not in ("user", "assistant"):
        messages.append(message)
        return
    # Grown in place: a conversation may be one turn in very many pieces.
    last["content"] += message["content"]
    last |= mark_of(message)
    for key in ("tool_calls", "reasoning_content"):
        if key in message:
            last[key] = last[key] + message[key] if key in last else message[key]


def _message(where: str, message: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(message, dict):
        raise VLLMValidationError(
            f"{where} must be an object with role and content, got {snippet(message)}.", "messages"
        )
    role = message.get("role")
    blocks = blocks_of(f"{where}.content", message.get("content"))
    if role == "user" or role in _CONTEXT_ROLES:
        yield from _user_messages(blocks)
    elif role == "assistant":
        yield _assistant_message(blocks)
    elif role == "system":
        yield {"role": "system", "content": [text_part(at, block) for at, block in blocks]}
    else:
        raise VLLMValidationError(
            f"{where}.role must be 'user', 'assistant' or 'system', got {snippet(role)}.", "messages"
        )


def _user_messages(blocks: list[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Results of tools are messages of their own in a chat, in the order in which they come."""
    parts: list[dict[str, Any]] = []
    for where, block in blocks:
        if block["type"] != "tool_result":
            parts.append(text_part(where, block))
            continue
        if parts:
            yield {"role": "user", "content": parts}
            parts = []
        call_id = block.get("tool_use_id")
        if not isinstance(call_id, str) or not call_id:
            raise VLLMValidationError(f"{where}.tool_use_id must be a string, got {snippet(call_id)}.", "messages")
        content = blocks_of(f"{where}.content", block.get("content") or [])
        yield {
            "role": "tool",
            "tool_call_id": call_id,
            "content": "\n".join(text_part(at, part, in_result=True)["text"] for at, part in content),
        } | mark_of(*(part for _, part in content), block)
    if parts:
        yield {"role": "user", "content": parts}


def _assistant_message(blocks: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    reasoning = ""
    for where, block in blocks:
        if block["type"] == "tool_use":
            calls.append(_tool_call(where, block))
        elif block["type"] == "thinking":
            reasoning += string(f"{where}.thinking", block.get("thinking"))
        elif (told := server_tool_text(where, block)) is not None:
            parts.append({"type": "text", "text": told} | mark_of(block))
        elif block["type"] != "redacted_thinking":
            parts.append(text_part(where, block))
    message: dict[str, Any] = {"role": "assistant", "content": parts}
    if calls:
        message |= {"tool_calls": calls} | mark_of(*(block for _, block in blocks if block["type"] == "tool_use"))
    if reasoning:
        message["reasoning_content"] = reasoning
    return message


def _tool_call(where: str, block: dict[str, Any]) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict | str):
        raise VLLMValidationError(f"{where}.input must be an object, got {snippet(arguments)}.", "messages")
    # A call that was cut has come as the text that there was of it.
    text = arguments if isinstance(arguments, str) else json_text(f"{where}.input", arguments)
    return {
        "id": string(f"{where}.id", block.get("id")),
        "type": "function",
        "function": {"name": string(f"{where}.name", block.get("name")), "arguments": text},
    }


def _tools(tools: list[Any] | None) -> list[dict[str, Any]] | None:
    """The tools with schemas. Those of other types than "custom" are Anthropic's own: its servers run them, or its
    models know them without a schema. They are left out."""
    converted = []
    for i, tool in enumerate(tools or ()):
        where = f"tools[{i}]"
        if not isinstance(tool, dict):
            raise VLLMValidationError(f"{where} must be an object, got {snippet(tool)}.", "tools")
        if isinstance(tool.get("type"), str) and tool["type"] != "custom" and tool.get("input_schema") is None:
            continue
        if not isinstance(tool.get("input_schema"), dict):
            raise VLLMValidationError(
                f"{where}.input_schema must be a JSON schema, got {snippet(tool.get('input_schema'))}.", "tools"
            )
        function = {"name": string(f"{where}.name", tool.get("name")), "parameters": tool["input_schema"]}
        if tool.get("description") is not None:
            function["description"] = string(f"{where}.description", tool["description"])
        if tool.get("strict") is not None:
            function["strict"] = tool["strict"]
        converted.append({"type": "function", "function": function} | mark_of(tool))
    return converted or None


def _thinking(thinking: dict[str, Any] | None) -> dict[str, Any]:
    """Variables of the chat templates that can turn reasoning on and off."""
    if thinking is None:
        return {}
    kind, budget = thinking.get("type"), thinking.get("budget_tokens")
    if kind not in ("enabled", "adaptive", "disabled"):
        raise VLLMValidationError(
            f"thinking.type must be 'enabled', 'adaptive' or 'disabled', got {snippet(kind)}.", "thinking"
        )
    if budget is not None and (type(budget) is not int or budget < 1):
        raise VLLMValidationError(f"thinking.budget_tokens must be 1 or more, got {snippet(budget)}.", "thinking")
    return {"enable_thinking": kind != "disabled"}
