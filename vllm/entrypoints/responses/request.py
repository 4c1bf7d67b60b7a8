"""From a request of the Responses API to the chat request that says the same."""

from __future__ import annotations

from typing import Any

import orjson

from vllm.entrypoints.chat.request import ChatRequest
from vllm.entrypoints.http.json_body import parse_model, snippet
from vllm.entrypoints.responses.items import continues, string
from vllm.entrypoints.responses.protocol import ResponsesRequest
from vllm.exceptions import VLLMValidationError

MAX_METADATA_ENTRIES = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
_LOGPROBS = "message.output_text.logprobs"
_SAME_NAME = (
    "model",
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prompt_cache_options",
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


def chat_request(request: ResponsesRequest, messages: list[dict[str, Any]]) -> ChatRequest:
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
        fields["stream"] = True
    return parse_model(ChatRequest, fields)


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


def _tools(tools: list[Any] | None) -> list[dict[str, Any]] | None:
    """The functions among the tools; those of other types are for servers that run them, and are left out."""
    converted = []
    for i, tool in enumerate(tools or ()):
        kind = tool.get("type") if isinstance(tool, dict) else None
        if not isinstance(kind, str):
            raise VLLMValidationError(f"tools[{i}] must be an object with a type, got {snippet(tool)}.", "tools")
        if kind == "function":
            names = ("name", "description", "parameters", "strict")
            function = {name: tool[name] for name in names if tool.get(name) is not None}
            converted.append({"type": "function", "function": function})
    return converted or None


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if choice is None or choice in ("none", "auto", "required"):
        return choice
    kind = choice.get("type") if isinstance(choice, dict) else None
    if isinstance(choice, dict) and kind == "function":
        return _named(choice)
    if isinstance(choice, dict) and kind == "allowed_tools" and isinstance(choice.get("tools"), list):
        # Those of others cannot be called, so they need not be allowed.
        tools = [tool for tool in choice["tools"] if not isinstance(tool, dict) or tool.get("type") == "function"]
        allowed = {"mode": choice.get("mode", "auto"), "tools": [_named(tool) for tool in tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    raise VLLMValidationError(
        "tool_choice must be 'none', 'auto', 'required', {'type': 'function', 'name': ...} or {'type': "
        f"'allowed_tools', 'mode': 'auto' or 'required', 'tools': [...]}}, got {snippet(choice)}.",
        "tool_choice",
    )


def _named(tool: Any) -> dict[str, Any]:
    name = tool.get("name") if isinstance(tool, dict) else None
    return {"type": "function", "function": {"name": string("tool_choice.name", name)}}


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
