"""From a request of the Anthropic API to the chat request that says the same."""

from __future__ import annotations

from typing import Any, get_args

from vllm.entrypoints.anthropic.content import string
from vllm.entrypoints.anthropic.conversation import read_conversation
from vllm.entrypoints.anthropic.protocol import MessagesRequest
from vllm.entrypoints.chat.request import ChatRequest, ReasoningEffort
from vllm.entrypoints.http.json_body import parse_model, snippet
from vllm.exceptions import VLLMValidationError

MAX_STOP_SEQUENCES = 1024
_OWN_FIELDS = ("system", "cache_control", "stop_sequences", "thinking", "output_config")
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


def chat_request(request: MessagesRequest) -> ChatRequest:
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
        fields["stream"] = True
    return parse_model(ChatRequest, fields)


def explained_chat(fields: dict[str, Any]) -> ChatRequest | None:
    """The chat that a message with these fields, of which `max_tokens` may be missing, is the answer of.

    None if there are no fields that only this API has: a body that OpenAI's could read too is one of OpenAI's.

    Raises:
        VLLMValidationError, ApiError: A field is wrong.
    """
    tools = fields.get("tools")
    has_schemas = isinstance(tools, list) and any(isinstance(tool, dict) and "input_schema" in tool for tool in tools)
    if not has_schemas and all(fields.get(name) is None for name in _OWN_FIELDS):
        return None
    if fields.get("messages") is None:
        return None
    return chat_request(parse_model(MessagesRequest, {"max_tokens": 1} | fields))


def _tool_choice(choice: dict[str, Any]) -> dict[str, Any]:
    kind = choice.get("type")
    if kind == "tool":
        name = string("tool_choice.name", choice.get("name"))
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
        if not string(f"stop_sequences[{i}]", stop):
            raise VLLMValidationError(f"stop_sequences[{i}] must not be empty.", "stop_sequences")
    return stops


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
