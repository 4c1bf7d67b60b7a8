"""Items, which inputs of the Responses API are made of: as messages of a chat, and as they are shown again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from vllm.entrypoints.chat.messages import left_out
from vllm.entrypoints.http.api_model import random_id
from vllm.entrypoints.http.errors import ApiError
from vllm.entrypoints.http.json_body import snippet
from vllm.exceptions import VLLMValidationError

MAX_ITEMS = 100_000
_ID_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
_OPEN_STATUSES = ("in_progress", "incomplete")
_ROLES = ("user", "assistant", "system", "developer")
# Items of tools that a client runs beside functions: a call's name, and where its arguments are.
_OTHER_CALLS = {
    "custom_tool_call": ("custom", "input"),
    "local_shell_call": ("local_shell", "action"),
    "shell_call": ("shell", "action"),
    "apply_patch_call": ("apply_patch", "operation"),
    "computer_call": ("computer", "action"),
}
_OUTPUTS = ("function_call_output", *(f"{kind}_output" for kind in _OTHER_CALLS))
# Items of tools that another server ran, which no output follows: what tells of them.
_TOLD = {
    "web_search_call": ("action",),
    "file_search_call": ("queries", "results"),
    "code_interpreter_call": ("code", "outputs"),
    "image_generation_call": ("revised_prompt",),
    "mcp_call": ("server_label", "name", "arguments", "output", "error"),
    "tool_search_call": ("arguments",),
    "tool_search_output": ("tools",),
}
# Items that hold nothing that could be read.
_UNREADABLE = ("compaction", "compaction_summary", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response")


def references(given: str | list[Any] | None) -> set[str]:
    """The ids that references among a request's items name.

    Raises:
        VLLMValidationError: A reference has no id.
    """
    items = given if isinstance(given, list) else []
    return {string(f"input[{i}].id", item.get("id")) for i, item in enumerate(items) if _is_reference(item)}


def resolved(given: list[Any], kept: Mapping[str, dict[str, Any]]) -> list[Any]:
    """Items with those in place of references that `kept` has by their ids.

    Raises:
        ApiError: 404 for an id that it lacks.
    """
    for i, item in enumerate(given):
        if _is_reference(item) and item["id"] not in kept:
            raise ApiError(404, f"input[{i}] refers to {snippet(item['id'])}, which is no item kept here.", "input")
    return [kept[item["id"]] if _is_reference(item) else item for item in given]


def _is_reference(item: Any) -> bool:
    """Whether an item is a reference; the SDK lets its type be left out."""
    return isinstance(item, dict) and (item.get("type") == "item_reference" or item.keys() == {"id"})


def input_messages(given: str | list[Any]) -> list[dict[str, Any]]:
    """The messages that a request's input stands for.

    Raises:
        VLLMValidationError: An item is malformed or of a type that a chat cannot show.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not given:
        raise VLLMValidationError("input must not be empty.", "input")
    if len(given) > MAX_ITEMS:
        raise VLLMValidationError(f"input may hold at most {MAX_ITEMS} items, got {len(given)}.", "input")
    messages: list[dict[str, Any]] = []
    # Reasoning and calls are items of their own here, and parts of the assistant's message in a chat.
    reasoning = ""
    for i, item in enumerate(given):
        where = f"input[{i}]"
        if not isinstance(item, dict):
            raise VLLMValidationError(f"{where} must be an object, got {snippet(item)}.", "input")
        kind = item.get("type", "message")
        if not isinstance(kind, str):
            raise VLLMValidationError(f"{where}.type must be a string, got {snippet(kind)}.", "input")
        if kind == "reasoning":
            reasoning += _reasoning_text(where, item)
            continue
        if kind in _UNREADABLE:
            continue
        if kind == "function_call" or kind in _OTHER_CALLS:
            last = messages[-1] if messages and not reasoning else {}
            if last.get("role") != "assistant":
                messages.append({"role": "assistant", "content": ""})
            call = _function_call if kind == "function_call" else _other_call
            messages[-1].setdefault("tool_calls", []).append(call(where, item))
        elif kind in _OUTPUTS:
            messages.append(_call_output(where, item))
        elif kind in _TOLD:
            messages.append({"role": "assistant", "content": _told(where, item)})
        elif kind == "message":
            messages.append(_message(where, item))
        else:
            raise VLLMValidationError(
                f"{where} has type {snippet(kind)}; this server reads message, reasoning, item_reference, "
                f"function_call, {', '.join([*_OUTPUTS, *_OTHER_CALLS, *_TOLD])}.",
                "input",
            )
        if reasoning and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"] = reasoning
        reasoning = ""
    if not messages:
        raise VLLMValidationError("input must hold at least one message.", "input")
    return messages


def input_items(given: str | list[Any]) -> list[dict[str, Any]]:
    """A request's input as items that are shown again: each with an id, texts as lists of parts.

    Args:
        given: What `input_messages` has accepted.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return [_shown(item) for item in given]


def _shown(item: dict[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    given_id = item.get("id")
    shown = item | {"id": given_id if isinstance(given_id, str) else f"{_ID_PREFIXES.get(kind, 'item')}_{random_id()}"}
    given_status = item.get("status")
    shown |= {"type": kind, "status": given_status if given_status in _OPEN_STATUSES else "completed"}
    if kind == "message":
        part = {"type": "output_text", "annotations": []} if item["role"] == "assistant" else {"type": "input_text"}
        content = item.get("content") or []
        texts = [content] if isinstance(content, str) else content
        shown["content"] = [part | {"text": text} if isinstance(text, str) else text for text in texts]
    elif kind == "reasoning":
        shown.setdefault("summary", [])
    return shown


def _message(where: str, item: dict[str, Any]) -> dict[str, Any]:
    role = item.get("role")
    if role not in _ROLES:
        raise VLLMValidationError(f"{where}.role must be one of {', '.join(_ROLES)}, got {snippet(role)}.", "input")
    content = item.get("content")
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str | list):
        raise VLLMValidationError(
            f"{where}.content must be a string or a list of text parts, got {snippet(content)}.", "input"
        )
    return {"role": role, "content": content}


def _reasoning_text(where: str, item: dict[str, Any]) -> str:
    """The reasoning itself where the item has it, else its summary."""
    for name in ("content", "summary"):
        parts = item.get(name) or []
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise VLLMValidationError(f"{where}.{name} must be a list of parts, got {snippet(parts)}.", "input")
        if parts:
            return "".join(string(f"{where}.{name}[{j}].text", part.get("text")) for j, part in enumerate(parts))
    return ""


def _function_call(where: str, item: dict[str, Any]) -> dict[str, Any]:
    arguments = item.get("arguments")
    return {
        "id": string(f"{where}.call_id", item.get("call_id")),
        "type": "function",
        "function": {
            "name": string(f"{where}.name", item.get("name")),
            "arguments": arguments if isinstance(arguments, dict) else string(f"{where}.arguments", arguments),
        },
    }


def _other_call(where: str, item: dict[str, Any]) -> dict[str, Any]:
    """A call of a tool that is no function, as the call of a function by its name."""
    name, key = _OTHER_CALLS[item["type"]]
    if item["type"] == "custom_tool_call":
        name = string(f"{where}.name", item.get("name"))
    value = item.get(key)
    arguments = value if isinstance(value, dict) else {key: value}
    call_id = string(f"{where}.call_id", item.get("call_id") or item.get("id"))
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _call_output(where: str, item: dict[str, Any]) -> dict[str, Any]:
    output = item.get("output")
    if item["type"] != "function_call_output" and not isinstance(output, str):
        output = _output_text(where, output)
    if not isinstance(output, str | list):
        raise VLLMValidationError(
            f"{where}.output must be a string or a list of text parts, got {snippet(output)}.", "input"
        )
    call_id = string(f"{where}.call_id", item.get("call_id") or item.get("id"))
    return {"role": "tool", "tool_call_id": call_id, "content": output}


def _output_text(where: str, output: Any) -> str | list[Any]:
    """What a tool that is no function returned: text parts as they are, a picture as a line, all else as JSON."""
    if isinstance(output, dict) and output.get("type") == "computer_screenshot":
        return left_out("image")
    is_parts = isinstance(output, list) and all(isinstance(p, dict) and isinstance(p.get("type"), str) for p in output)
    return output if is_parts else _json_text(where, output)


def _told(where: str, item: dict[str, Any]) -> str:
    fields = {name: item[name] for name in _TOLD[item["type"]] if item.get(name) is not None}
    shown = next(iter(fields.values())) if len(fields) == 1 else fields
    return f"[{item['type']}] {_json_text(where, shown)}"


def _json_text(where: str, value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        raise VLLMValidationError(f"{where} is nested too deeply.", "input") from None


def continues(given: str | list[Any] | None) -> bool:
    """Whether the answer goes on with the last of a request's items: the assistant's, said to be only begun."""
    last = given[-1] if isinstance(given, list) and given else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or last.get("type", "message") != "message":
        return False
    return last.get("status") in _OPEN_STATUSES


def with_more(message: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """One message of the assistant's that says what `message`, of which it was only the beginning, and `answer` say."""
    content, more = message["content"], answer["content"]
    if isinstance(content, str):
        return message | answer | {"content": content + more}
    *before, last = content or [""]
    if isinstance(last, str):
        last += more
    else:
        key = "refusal" if last["type"] == "refusal" else "text"
        last = last | {key: last[key] + more}
    return message | answer | {"content": [*before, last]}


def string(where: str, value: Any) -> str:
    """The value at this place of a request; raises VLLMValidationError if it is no string."""
    if not isinstance(value, str):
        raise VLLMValidationError(f"{where} must be a string, got {snippet(value)}.", where.split("[")[0])
    return value
