"""From a request of the Responses API to the chat request that says the same."""

from __future__ import annotations

from typing import Any

import orjson

from vllm.entrypoints.http.json_body import parse_model, snippet
from vllm.entrypoints.openai.protocol import ChatCompletionRequest, random_id
from vllm.entrypoints.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError

MAX_ITEMS = 100_000
MAX_METADATA_ENTRIES = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
_ID_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
_OPEN_STATUSES = ("in_progress", "incomplete")
_ROLES = ("user", "assistant", "system", "developer")
_LOGPROBS = "message.output_text.logprobs"
_SAME_NAME = (
    "model",
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "logit_bias",
    "skip_special_tokens",
    "chat_template_kwargs",
    "include_reasoning",
    "structured_outputs",
    "cache_salt",
    "priority",
)


def chat_request(request: ResponsesRequest, messages: list[dict[str, Any]]) -> ChatCompletionRequest:
    """The chat request for a response.

    Args:
        messages: The conversation so far, the request's input included.

    Raises:
        VLLMValidationError, ApiError: A field is wrong, or names what this server cannot do.
    """
    for name in ("prompt", "conversation"):
        if getattr(request, name) is not None:
            raise VLLMValidationError(f"{name} is not supported; send instructions and input.", name)
    _check_metadata(request.metadata)
    for name in ("input", "tools", "tool_choice", "text", "reasoning"):
        _check_depth(name, getattr(request, name))
    if request.truncation not in (None, "auto", "disabled"):
        raise VLLMValidationError(
            f"truncation must be 'auto' or 'disabled', got {snippet(request.truncation)}.", "truncation"
        )
    if request.instructions:
        messages = [{"role": "system", "content": request.instructions}, *messages]
    fields: dict[str, Any] = {name: value for name in _SAME_NAME if (value := getattr(request, name)) is not None}
    fields |= {
        "messages": messages,
        "tools": _tools(request.tools),
        "tool_choice": _tool_choice(request.tool_choice),
        "response_format": _response_format(request),
    }
    if request.max_output_tokens is not None:
        if request.max_output_tokens < 1:
            raise VLLMValidationError(
                f"max_output_tokens must be 1 or more, got {request.max_output_tokens}.", "max_output_tokens"
            )
        fields["max_completion_tokens"] = request.max_output_tokens
    effort = (request.reasoning or {}).get("effort")
    if effort is not None:
        fields["reasoning_effort"] = effort
    if continues(request.input):
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if wants_logprobs(request):
        fields |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    if request.stream or request.background:
        fields |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    return parse_model(ChatCompletionRequest, fields)


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


def wants_logprobs(request: ResponsesRequest) -> bool:
    return bool(request.top_logprobs) or _LOGPROBS in (request.include or ())


def _check_metadata(metadata: dict[str, Any] | None) -> None:
    if metadata is None:
        return
    if len(metadata) > MAX_METADATA_ENTRIES:
        raise VLLMValidationError(
            f"metadata may hold at most {MAX_METADATA_ENTRIES} entries, got {len(metadata)}.", "metadata"
        )
    for key, value in metadata.items():
        if len(key) > MAX_METADATA_KEY_CHARS or not isinstance(value, str) or len(value) > MAX_METADATA_VALUE_CHARS:
            raise VLLMValidationError(
                f"metadata may hold keys of at most {MAX_METADATA_KEY_CHARS} characters with strings of at most "
                f"{MAX_METADATA_VALUE_CHARS}, got {snippet(key)}: {snippet(value)}.",
                "metadata",
            )


def _check_depth(name: str, value: Any) -> None:
    """The answer repeats these fields, and JSON that can be read is not always JSON that can be written."""
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        raise VLLMValidationError(f"{name} is nested too deeply.", name) from None


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


def _string(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise VLLMValidationError(f"{where} must be a string, got {snippet(value)}.", where.split("[")[0])
    return value


def _reasoning_text(where: str, item: dict[str, Any]) -> str:
    """The reasoning itself where the item has it, else its summary."""
    for name in ("content", "summary"):
        parts = item.get(name) or []
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise VLLMValidationError(f"{where}.{name} must be a list of parts, got {snippet(parts)}.", "input")
        if parts:
            return "".join(_string(f"{where}.{name}[{j}].text", part.get("text")) for j, part in enumerate(parts))
    return ""


def _function_call(where: str, item: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": _string(f"{where}.call_id", item.get("call_id")),
        "type": "function",
        "function": {name: _string(f"{where}.{name}", item.get(name)) for name in ("name", "arguments")},
    }


def _function_call_output(where: str, item: dict[str, Any]) -> dict[str, Any]:
    output = item.get("output")
    if not isinstance(output, str | list):
        raise VLLMValidationError(
            f"{where}.output must be a string or a list of text parts, got {snippet(output)}.", "input"
        )
    return {"role": "tool", "tool_call_id": _string(f"{where}.call_id", item.get("call_id")), "content": output}


def _tools(tools: list[Any] | None) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    converted = []
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise VLLMValidationError(
                f"tools[{i}] must have type 'function', got {snippet(tool)}; this server has no tools of its own.",
                "tools",
            )
        names = ("name", "description", "parameters", "strict")
        function = {name: tool[name] for name in names if tool.get(name) is not None}
        converted.append({"type": "function", "function": function})
    return converted


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": _string("tool_choice.name", choice.get("name"))}}
    if isinstance(choice, dict) or choice not in (None, "none", "auto", "required"):
        raise VLLMValidationError(
            "tool_choice must be 'none', 'auto', 'required' or {'type': 'function', 'name': ...}, "
            f"got {snippet(choice)}.",
            "tool_choice",
        )
    return choice


def _response_format(request: ResponsesRequest) -> dict[str, Any] | None:
    wanted = (request.text or {}).get("format")
    if wanted is None:
        return None
    if not isinstance(wanted, dict):
        raise VLLMValidationError(f"text.format must be an object, got {snippet(wanted)}.", "text")
    if request.structured_outputs is not None and wanted.get("type") != "text":
        raise VLLMValidationError(
            "text.format and structured_outputs cannot both be set: the output can have one form only.",
            "structured_outputs",
        )
    if wanted.get("type") == "json_schema":
        if not isinstance(wanted.get("schema"), dict):
            raise VLLMValidationError(
                f'text.format of type "json_schema" must have a schema, an object, got {snippet(wanted)}.',
                "text.format",
            )
        names = ("name", "description", "schema", "strict")
        schema = {name: wanted[name] for name in names if wanted.get(name) is not None}
        return {"type": "json_schema", "json_schema": schema}
    return wanted
