"""Items, which inputs of the Responses API are made of: as messages of a chat, and as they are shown again."""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.http.api_model import random_id
from vllm.entrypoints.http.json_body import snippet
from vllm.exceptions import VLLMValidationError

MAX_ITEMS = 100_000
_ID_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
_OPEN_STATUSES = ("in_progress", "incomplete")
_ROLES = ("user", "assistant", "system", "developer")


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
        if kind == "reasoning":
            reasoning += _reasoning_text(where, item)
            continue
        if kind == "function_call":
            last = messages[-1] if messages and not reasoning else {}
            if last.get("role") != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(_function_call(where, item))
        elif kind == "function_call_output":
            messages.append(_function_call_output(where, item))
        elif kind == "message":
            messages.append(_message(where, item))
        else:
            raise VLLMValidationError(
                f"{where} has type {snippet(kind)}; this server reads message, function_call, function_call_output "
                "and reasoning.",
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
    shown = item | {"id": given_id if isinstance(given_id, str) else f"{_ID_PREFIXES[kind]}_{random_id()}"}
    given_status = item.get("status")
    shown |= {"type": kind, "status": given_status if given_status in _OPEN_STATUSES else "completed"}
    if kind == "message":
        part = {"type": "output_text", "annotations": []} if item["role"] == "assistant" else {"type": "input_text"}
        content = item["content"]
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
    return {
        "id": string(f"{where}.call_id", item.get("call_id")),
        "type": "function",
        "function": {name: string(f"{where}.{name}", item.get(name)) for name in ("name", "arguments")},
    }


def _function_call_output(where: str, item: dict[str, Any]) -> dict[str, Any]:
    output = item.get("output")
    if not isinstance(output, str | list):
        raise VLLMValidationError(
            f"{where}.output must be a string or a list of text parts, got {snippet(output)}.", "input"
        )
    return {"role": "tool", "tool_call_id": string(f"{where}.call_id", item.get("call_id")), "content": output}


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
