"""`POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson

from vllm.entrypoints.anthropic.protocol import CountTokensRequest, MessagesRequest
from vllm.entrypoints.anthropic.request import chat_request, read_conversation, reasoning_effort
from vllm.entrypoints.chat.blocks import Block, BlockNews, BlockReader
from vllm.entrypoints.chat.prompts import ChatOptions, PromptReader
from vllm.entrypoints.http.errors import anthropic_error_body, describe, naming_fields
from vllm.entrypoints.http.streaming import EventStream, typed_sse
from vllm.entrypoints.openai.chat_completions import ServingChat
from vllm.entrypoints.openai.models import ServingModels
from vllm.entrypoints.openai.protocol import random_id

_NAMES = {"response_format": "output_config.format", "stop": "stop_sequences"}
_DELTA_FIELDS = {"reasoning": "thinking", "text": "text", "tool_call": "partial_json"}
_DELTA_TYPES = {"reasoning": "thinking_delta", "text": "text_delta", "tool_call": "input_json_delta"}


class MessageStream(EventStream):
    """A streamed message; an error ends it with an event of type `error`."""

    def error_event(self, exc: Exception) -> bytes:
        error = describe(exc)
        return typed_sse(anthropic_error_body(error.status, error.message))


@dataclass(frozen=True)
class _Call:
    """One request on its way.

    Attributes:
        silent: `max_tokens` is 0: the prompt is computed, and nothing is answered.
    """

    id: str
    model: str
    silent: bool

    def message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self.usage(usage),
        }

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """From a chat's usage; `input_tokens` are those that were neither read from the cache nor pinned."""
        details = usage["prompt_tokens_details"]
        cached, written = details["cached_tokens"], details["cache_write_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached - written,
            "cache_creation_input_tokens": written,
            "cache_read_input_tokens": cached,
            "output_tokens": 0 if self.silent else usage["completion_tokens"],
        }

    def stop(self, choice: dict[str, Any], calls_tools: bool) -> dict[str, Any]:
        """`stop_reason` and `stop_sequence` of a finished choice."""
        if self.silent:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if choice["finish_reason"] == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if calls_tools:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        # Of a token that ends answers, the reason is its id.
        if isinstance(choice.get("stop_reason"), str):
            return {"stop_reason": "stop_sequence", "stop_sequence": choice["stop_reason"]}
        return {"stop_reason": "end_turn", "stop_sequence": None}


class ServingMessages:
    """Answers requests of the Anthropic API by the chat path."""

    def __init__(self, chat: ServingChat, models: ServingModels, prompts: PromptReader) -> None:
        self._chat = chat
        self._models = models
        self._prompts = prompts

    async def create(self, request: MessagesRequest, request_id: str | None) -> dict[str, Any] | MessageStream:
        """The message, or the stream of it once its first token is there.

        Args:
            request_id: What the client calls the request (`X-Request-Id`), or None.

        Raises:
            VLLMValidationError, ApiError, EngineDeadError: nothing has been sent yet.
        """
        with naming_fields(_NAMES):
            return await self._create(request, request_id)

    async def _create(self, request: MessagesRequest, request_id: str | None) -> dict[str, Any] | MessageStream:
        chat = await self._prompts.prepared(chat_request, request)
        message_id = f"msg_{request_id or random_id()}"
        call = _Call(message_id, self._models.resolve(request.model), silent=request.max_tokens == 0)
        if request.stream:
            return await MessageStream.start(self._events(call, await self._chat.chunks(chat, message_id)))
        answer = await self._chat.create(chat, message_id)
        if isinstance(answer, EventStream):
            raise RuntimeError(f"the chat answered {call.id} with a stream")
        return self._message(call, answer)

    async def count_tokens(self, request: CountTokensRequest) -> dict[str, Any]:
        """How many input tokens a message with these fields has.

        Raises:
            VLLMValidationError, ApiError: A field is wrong.
        """
        self._models.resolve(request.model)
        conversation = await self._prompts.prepared(read_conversation, request)
        options = ChatOptions(
            tools=conversation.tools,
            add_generation_prompt=not conversation.continues,
            continue_final_message=conversation.continues,
            chat_template_kwargs=conversation.template_kwargs,
            reasoning_effort=reasoning_effort(request.output_config),
        )
        rendered = await self._prompts.chat(conversation.messages, options, must_fit=False)
        return {"input_tokens": len(rendered.prompt_token_ids)}

    def _message(self, call: _Call, answer: dict[str, Any]) -> dict[str, Any]:
        (choice,) = answer["choices"]
        reader = BlockReader()
        if not call.silent:
            list(reader.read(choice))
        content = [_content_block(block) for block in reader.blocks]
        return call.message(content, answer["usage"]) | call.stop(choice, reader.calls_tools)

    async def _events(self, call: _Call, chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
        """Server-sent events: the empty message, its blocks as they grow, and why it ended."""
        reader = BlockReader()
        usage: dict[str, Any] | None = None
        last: dict[str, Any] = {}
        async with aclosing(chunks):
            async for chunk in chunks:
                if usage is None:
                    yield typed_sse({"type": "message_start", "message": call.message([], chunk["usage"])})
                usage = chunk["usage"]
                for choice in chunk["choices"]:
                    last = choice
                    for news in () if call.silent else reader.read(choice):
                        yield _block_event(news)
        if usage is None:
            raise RuntimeError(f"the chat gave no chunk for {call.id}")
        for news in reader.end():
            yield _block_event(news)
        delta = call.stop(last, reader.calls_tools)
        yield typed_sse({"type": "message_delta", "delta": delta, "usage": call.usage(usage)})
        yield typed_sse({"type": "message_stop"})


def _content_block(block: Block) -> dict[str, Any]:
    if block.kind == "tool_call":
        return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _arguments(block.text)}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "text", "text": block.text, "citations": None}


def _arguments(text: str) -> dict[str, Any]:
    """The input of a tool call. An answer that `max_tokens` cut off in the middle of one has no input to show."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _block_event(news: BlockNews) -> bytes:
    block = news.block
    event: dict[str, Any] = {"type": f"content_block_{news.what}", "index": block.index}
    if news.what == "start":
        event["content_block"] = _content_block(Block(block.index, block.kind, block.call_id, block.name))
    elif news.what == "delta":
        event["delta"] = {"type": _DELTA_TYPES[block.kind], _DELTA_FIELDS[block.kind]: news.text}
    return typed_sse(event)
