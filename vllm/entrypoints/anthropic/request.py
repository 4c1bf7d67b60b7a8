"""From a request of the Anthropic API to the chat request that says the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

import orjson

from vllm.entrypoints.anthropic.protocol import CountTokensRequest, MessagesRequest
from vllm.entrypoints.http.json_body import parse_model, snippet
from vllm.entrypoints.openai.protocol import ChatCompletionRequest, ReasoningEffort
from vllm.exceptions import VLLMValidationError

MAX_MESSAGES = 100_000
MAX_STOP_SEQUENCES = 1024
MAX_CACHE_BREAKPOINTS = 4
_CACHE_TTLS = ("5m", "1h")
_EFFORTS: tuple[str, ...] = get_args(ReasoningEffort)
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_SAME_NAME = (
    "model",
    "temperature",
    "top_p",
    "top_k",
    "chat_template_kwargs",
    "cache_salt",
    "ignore_eos",
    "min_tokens",
    "priority",
    "seed",
)


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


def chat_request(request: MessagesRequest) -> ChatCompletionRequest:
    """The chat request for a message.

    Raises:
        VLLMValidationError, ApiError: A field is wrong, or names what this server cannot do.
    """
    conversation = read_conversation(request)
    fields: dict[str, Any] = {name: value for name in _SAME_NAME if (value := getattr(request, name)) is not None}
    fields |= {
        "messages": conversation.messages,
        "tools": conversation.tools,
        "max_tokens": max(1, request.max_tokens),
        "stop": _stop_sequences(request.stop_sequences),
        "chat_template_kwargs": conversation.template_kwargs or None,
    }
    if conversation.continues:
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if request.max_tokens < 0:
        raise VLLMValidationError(f"max_tokens must be 0 or more, got {request.max_tokens}.", "max_tokens")
    if request.tool_choice is not None:
        fields |= _tool_choice(request.tool_choice)
    if request.output_config is not None:
        fields |= _output_config(request.output_config)
    if request.stream:
        # The first event tells the prompt's tokens, so the first chunk must.
        fields |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    return parse_model(ChatCompletionRequest, fields)


def read_conversation(request: CountTokensRequest) -> Conversation:
    """Messages and tools in the chat path's form. A block's place in the request stays in error messages.

    Raises:
        VLLMValidationError: A block is malformed, or is not text.
    """
    check_cache_control(request)
    messages: list[dict[str, Any]] = []
    system = _blocks("system", request.system)
    if system:
        messages.append({"role": "system", "content": [_text_part(where, block) for where, block in system]})
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
            message |= _cache_control(*parts)
    last = messages[-1]
    last |= _cache_control({"cache_control": request.cache_control})
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
    last |= _cache_control(message)
    for key in ("tool_calls", "reasoning_content"):
        if key in message:
            last[key] = last[key] + message[key] if key in last else message[key]


def _message(where: str, message: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(message, dict):
        raise VLLMValidationError(
            f"{where} must be an object with role and content, got {snippet(message)}.", "messages"
        )
    role = message.get("role")
    blocks = _blocks(f"{where}.content", message.get("content"))
    if role == "user":
        yield from _user_messages(blocks)
    elif role == "assistant":
        yield _assistant_message(blocks)
    elif role == "system":
        yield {"role": "system", "content": [_text_part(at, block) for at, block in blocks]}
    else:
        raise VLLMValidationError(
            f"{where}.role must be 'user', 'assistant' or 'system', got {snippet(role)}.", "messages"
        )


def _user_messages(blocks: list[tuple[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Results of tools are messages of their own in a chat, in the order in which they come."""
    parts: list[dict[str, Any]] = []
    for where, block in blocks:
        if block["type"] != "tool_result":
            parts.append(_text_part(where, block))
            continue
        if parts:
            yield {"role": "user", "content": parts}
            parts = []
        call_id = block.get("tool_use_id")
        if not isinstance(call_id, str) or not call_id:
            raise VLLMValidationError(f"{where}.tool_use_id must be a string, got {snippet(call_id)}.", "messages")
        content = _blocks(f"{where}.content", block.get("content") or [])
        yield {
            "role": "tool",
            "tool_call_id": call_id,
            "content": "\n".join(_text_part(at, part)["text"] for at, part in content),
        } | _cache_control(*(part for _, part in content), block)
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
            reasoning += _string(f"{where}.thinking", block.get("thinking"))
        elif block["type"] != "redacted_thinking":
            parts.append(_text_part(where, block))
    message: dict[str, Any] = {"role": "assistant", "content": parts}
    if calls:
        message |= {"tool_calls": calls} | _cache_control(
            *(block for _, block in blocks if block["type"] == "tool_use")
        )
    if reasoning:
        message["reasoning_content"] = reasoning
    return message


def _tool_call(where: str, block: dict[str, Any]) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise VLLMValidationError(f"{where}.input must be an object, got {snippet(arguments)}.", "messages")
    return {
        "id": _string(f"{where}.id", block.get("id")),
        "type": "function",
        "function": {
            "name": _string(f"{where}.name", block.get("name")),
            "arguments": _json_text(f"{where}.input", arguments),
        },
    }


def _json_text(where: str, value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        raise VLLMValidationError(f"{where} is nested too deeply.", "messages") from None


def _blocks(where: str, content: Any) -> list[tuple[str, dict[str, Any]]]:
    """The blocks of a content, each with its place in the request; a string is one text block."""
    if content is None and where == "system":
        return []
    if isinstance(content, str):
        return [(where, {"type": "text", "text": content})]
    if not isinstance(content, list):
        raise VLLMValidationError(
            f"{where} must be a string or a list of content blocks, got {snippet(content)}.", _param(where)
        )
    for i, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise VLLMValidationError(
                f"{where}[{i}] must be a content block with a type, got {snippet(block)}.", _param(where)
            )
    return [(f"{where}[{i}]", block) for i, block in enumerate(content)]


def _text_part(where: str, block: dict[str, Any]) -> dict[str, Any]:
    text = block.get("text")
    if block["type"] != "text":
        raise VLLMValidationError(
            f"{where} has type {snippet(block['type'])}, which cannot be used there; this model reads only text.",
            _param(where),
        )
    if not isinstance(text, str):
        raise VLLMValidationError(f"{where}.text must be a string, got {snippet(text)}.", _param(where))
    part = {"type": "text", "text": text}
    return part | _cache_control(block) if "cache_control" in block else part


def _cache_control(*blocks: dict[str, Any]) -> dict[str, Any]:
    """The mark of the last of these blocks that has one; the chat path knows it by the same name."""
    marks = [block["cache_control"] for block in blocks if block.get("cache_control") is not None]
    return {"cache_control": marks[-1]} if marks else {}


def _string(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise VLLMValidationError(f"{where} must be a string, got {snippet(value)}.", _param(where))
    return value


def _param(where: str) -> str:
    return where.split("[")[0].split(".")[0]


def _tools(tools: list[Any] | None) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    converted = []
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if not isinstance(tool, dict):
            raise VLLMValidationError(f"{where} must be an object, got {snippet(tool)}.", "tools")
        if tool.get("type") not in (None, "custom"):
            raise VLLMValidationError(
                f"{where} has type {snippet(tool['type'])}; this server has no tools of its own, only those that the "
                'client runs, with an input_schema and no type or "custom".',
                "tools",
            )
        if not isinstance(tool.get("input_schema"), dict):
            raise VLLMValidationError(
                f"{where}.input_schema must be a JSON schema, got {snippet(tool.get('input_schema'))}.", "tools"
            )
        function = {"name": _string(f"{where}.name", tool.get("name")), "parameters": tool["input_schema"]}
        if tool.get("description") is not None:
            function["description"] = _string(f"{where}.description", tool["description"])
        if tool.get("strict") is not None:
            function["strict"] = tool["strict"]
        converted.append({"type": "function", "function": function} | _cache_control(tool))
    return converted


def _tool_choice(choice: dict[str, Any]) -> dict[str, Any]:
    kind = choice.get("type")
    if kind == "tool":
        name = _string("tool_choice.name", choice.get("name"))
        fields: dict[str, Any] = {"tool_choice": {"type": "function", "function": {"name": name}}}
    elif isinstance(kind, str) and kind in _TOOL_CHOICES:
        fields = {"tool_choice": _TOOL_CHOICES[kind]}
    else:
        raise VLLMValidationError(
            f"tool_choice.type must be 'auto', 'any', 'tool' or 'none', got {snippet(kind)}.", "tool_choice"
        )
    if choice.get("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    return fields


def _stop_sequences(stops: list[Any] | None) -> list[str] | None:
    if not stops:
        return None
    if len(stops) > MAX_STOP_SEQUENCES:
        raise VLLMValidationError(
            f"stop_sequences may hold at most {MAX_STOP_SEQUENCES} strings, got {len(stops)}.", "stop_sequences"
        )
    for i, stop in enumerate(stops):
        if not _string(f"stop_sequences[{i}]", stop):
            raise VLLMValidationError(f"stop_sequences[{i}] must not be empty.", "stop_sequences")
    return stops


def _thinking(thinking: dict[str, Any] | None) -> dict[str, Any]:
    """Variables of the chat templates that can turn reasoning on and off."""
    if thinking is None:
        return {}
    kind = thinking.get("type")
    if not isinstance(kind, str):
        raise VLLMValidationError(
            f"thinking.type must be a string such as 'enabled', 'adaptive' or 'disabled', got {snippet(kind)}.",
            "thinking",
        )
    return {"enable_thinking": kind != "disabled"}


def reasoning_effort(config: dict[str, Any] | None) -> str | None:
    """The effort that `output_config` asks for; None if it asks for none.

    Raises:
        VLLMValidationError: It is none of those that chats know, two more than Anthropic's.
    """
    effort = (config or {}).get("effort")
    if effort is not None and effort not in _EFFORTS:
        raise VLLMValidationError(
            f"output_config.effort must be one of {', '.join(_EFFORTS)}, got {snippet(effort)}.", "output_config"
        )
    return effort


def _output_config(config: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if config.get("effort") is not None:
        fields["reasoning_effort"] = reasoning_effort(config)
    output_format = config.get("format")
    if output_format is not None:
        if not isinstance(output_format, dict) or output_format.get("type") != "json_schema":
            raise VLLMValidationError(
                f"output_config.format must have type 'json_schema', got {snippet(output_format)}.", "output_config"
            )
        if not isinstance(output_format.get("schema"), dict):
            raise VLLMValidationError(
                f"output_config.format must have a schema, an object, got {snippet(output_format)}.", "output_config"
            )
        schema = {"name": "output", "schema": output_format["schema"]}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields


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
                f"{where} must be {{'type': 'ephemeral'}}, with or without a ttl, got {snippet(marker)}.", _param(where)
            )
        ttl = marker.get("ttl") or _CACHE_TTLS[0]
        if ttl not in _CACHE_TTLS:
            raise VLLMValidationError(f"{where}.ttl must be '5m' or '1h', got {snippet(ttl)}.", _param(where))
        if ttl == "1h" and "5m" in ttls:
            raise VLLMValidationError(
                f"{where}.ttl must not be '1h' after a breakpoint of '5m'; the order is tools, system, messages.",
                _param(where),
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
