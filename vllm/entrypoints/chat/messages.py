"""Messages of a chat request, checked and brought into the form that chat templates read."""

from __future__ import annotations

import re
from typing import Any

import orjson

from vllm.entrypoints.http.json_body import snippet
from vllm.exceptions import VLLMValidationError

MAX_MESSAGES = 100_000
MAX_TOOLS = 1024
MAX_TOOL_NAME_CHARS = 256
MAX_TEMPLATE_KWARGS = 64
MAX_TEMPLATE_KWARGS_BYTES = 64 * 1024

# `x-anthropic-billing-header: cc_version=…; cc_entrypoint=…; cch=…;`
_BILLING_LINE = re.compile(r"\Ax-anthropic-billing-header:(?: \w+=[^;\s]*;?){1,16} ?(?:\r?\n|\Z)")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_OTHER_PARTS = {
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("input_audio", "audio_url"), "audio"),
    **dict.fromkeys(("file", "input_file"), "file"),
    "video_url": "video",
}
_RESULT_ROLES = ("tool", "function")
# Roles whose message may say nothing: an assistant that only called tools, a tool that returned nothing.
_MAY_BE_EMPTY = ("assistant", "tool", "function")


def check_messages(messages: list[Any]) -> list[dict[str, Any]]:
    """Messages with `role`, `content` and what else templates read, where it is given; unknown keys are left out.

    Which roles exist, and what shape of content and tool calls the template reads, is the renderer's business.

    Raises:
        VLLMValidationError: names the message at fault, its value and what is allowed.
    """
    if not messages:
        raise VLLMValidationError("messages must hold at least one message.", "messages")
    if len(messages) > MAX_MESSAGES:
        raise VLLMValidationError(f"messages may hold at most {MAX_MESSAGES} entries, got {len(messages)}.", "messages")
    return [_check_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def without_billing_line(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checked messages without the line by which an agent client accounts for its requests.

    It is the first line of the first system message, holds a hash that differs between requests, and would so keep all
    system prompts of that client from being shared. It is no text for a model.
    """
    first = messages[0]
    if first["role"] not in ("system", "developer"):
        return messages
    content, rest = first["content"], messages[1:]
    if isinstance(content, str):
        text = _BILLING_LINE.sub("", content)
        if text == content:
            return messages
        return [first | {"content": text}, *rest] if text or not rest else rest
    text = _BILLING_LINE.sub("", content[0]["text"]) if content else ""
    if not content or text == content[0]["text"]:
        return messages
    parts = [content[0] | {"text": text}, *content[1:]] if text else content[1:]
    return [first | {"content": parts}, *rest] if parts or not rest else rest


def _check_message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise VLLMValidationError(
            f"{where} must be an object with role and content, got {snippet(message)}.", "messages"
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise VLLMValidationError(f"{where}.role must be a string, got {snippet(role)}.", "messages")
    content = message.get("content")
    if content is None and role in _MAY_BE_EMPTY:
        content = ""
    checked: dict[str, Any] = {"role": role, "content": _check_content(where, content, role)}
    checked |= _cache_control(message)
    names = ("reasoning", "reasoning_content")
    thought = next((message[name] for name in names if message.get(name) is not None), None)
    # Templates read one or the other name.
    message = message | dict.fromkeys(names, thought)
    for key in ("name", "tool_call_id", *names):
        value = message.get(key)
        if value is not None:
            if not isinstance(value, str):
                raise VLLMValidationError(f"{where}.{key} must be a string, got {snippet(value)}.", "messages")
            checked[key] = value
    calls = message.get("tool_calls")
    if calls:
        if not isinstance(calls, list):
            raise VLLMValidationError(f"{where}.tool_calls must be a list, got {snippet(calls)}.", "messages")
        checked["tool_calls"] = [_as_function(call) for call in calls]
    return checked


def _as_function(call: Any) -> Any:
    """A call of a custom tool, whose input is text, as the call of a function with that text."""
    custom = call.get("custom") if isinstance(call, dict) and call.get("function") is None else None
    if not isinstance(custom, dict):
        return call
    function = {"name": custom.get("name"), "arguments": {"input": custom.get("input")}}
    return {"id": call.get("id"), "type": "function", "function": function}


def _check_content(where: str, content: Any, role: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise VLLMValidationError(
            f"{where}.content must be a string or a list of text parts, got {snippet(content)}.", "messages"
        )
    return [
        {"type": "text", "text": _part_text(f"{where}.content[{i}]", part, role)}
        | _cache_control(part)
        | _breakpoint(f"{where}.content[{i}]", part)
        for i, part in enumerate(content)
    ]


def _cache_control(marked: Any) -> dict[str, Any]:
    """The mark of a message or part, if it has one; `cache_marks` reads it."""
    mark = marked.get("cache_control") if isinstance(marked, dict) else None
    return {} if mark is None else {"cache_control": mark}


def _breakpoint(where: str, part: Any) -> dict[str, Any]:
    """OpenAI's mark of a part, under the same name as the other one."""
    mark = part.get("prompt_cache_breakpoint") if isinstance(part, dict) else None
    if mark is None:
        return {}
    ttl = mark.get("ttl") if isinstance(mark, dict) else None
    if not isinstance(mark, dict) or mark.get("mode") != "explicit" or ttl not in (None, "30m", "12h"):
        raise VLLMValidationError(
            f'{where}.prompt_cache_breakpoint must be {{"mode": "explicit"}}, with or without a ttl of "30m" or '
            f'"12h", got {snippet(mark)}.',
            "messages",
        )
    return {"cache_control": {"type": "breakpoint", "ttl": ttl}}


def left_out(kind: str) -> str:
    """What stands in the place of something that a tool returned and that is no text.

    A user's picture is asked about, so that one is refused; an agent takes its tools' results as they come.
    """
    return f"[{kind} left out: this model reads text only]"


def _part_text(where: str, part: Any, role: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
    if role in _RESULT_ROLES and isinstance(kind, str) and kind in _OTHER_PARTS:
        return left_out(_OTHER_PARTS[kind])
    if isinstance(kind, str) and kind not in _TEXT_PARTS:
        raise VLLMValidationError(f"{where} has type {snippet(kind)}; this model reads only text parts.", "messages")
    if kind is None or not isinstance(text, str):
        raise VLLMValidationError(
            f'{where} must be a text part, {{"type": "text", "text": "..."}}, got {snippet(part)}.', "messages"
        )
    return text


def check_tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tool definitions as the template gets them; None when there are none.

    Tools of other types than functions (`custom`, …) are left out: the model has no words to call them.
    """
    if not tools:
        return None
    if len(tools) > MAX_TOOLS:
        raise VLLMValidationError(f"tools may hold at most {MAX_TOOLS} entries, got {len(tools)}.", "tools")
    functions = [tool for i, tool in enumerate(tools) if _is_function(f"tools[{i}]", tool)]
    return functions or None


def _is_function(where: str, tool: dict[str, Any]) -> bool:
    """Whether a tool is a function; raises VLLMValidationError for one that is malformed."""
    kind, function = tool.get("type", "function"), tool.get("function")
    if isinstance(kind, str) and kind != "function" and function is None:
        return False
    if kind != "function" or not isinstance(function, dict):
        raise VLLMValidationError(
            f'{where} must be {{"type": "function", "function": {{...}}}}, got {snippet(tool)}.', "tools"
        )
    name = function.get("name")
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_TOOL_NAME_CHARS:
        raise VLLMValidationError(
            f"{where}.function.name must be a string of 1 to {MAX_TOOL_NAME_CHARS} characters, got {snippet(name)}.",
            "tools",
        )
    return True


def check_template_kwargs(kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Extra variables of the chat template, bounded in number and size."""
    if not kwargs:
        return {}
    try:
        size = len(orjson.dumps(kwargs))
    except orjson.JSONEncodeError:
        raise VLLMValidationError("chat_template_kwargs are nested too deeply.", "chat_template_kwargs") from None
    if len(kwargs) > MAX_TEMPLATE_KWARGS or size > MAX_TEMPLATE_KWARGS_BYTES:
        raise VLLMValidationError(
            f"chat_template_kwargs may hold at most {MAX_TEMPLATE_KWARGS} values of "
            f"{MAX_TEMPLATE_KWARGS_BYTES // 1024} KiB together.",
            "chat_template_kwargs",
        )
    return kwargs


def count_chars(value: Any) -> int:
    """Characters of all strings in a JSON value, however deep."""
    total = 0
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    return total


def last_text(message: dict[str, Any]) -> str:
    """The text of a message that an answer goes on from."""
    content = check_messages([message])[0]["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
