"""Writes a message of the Anthropic API from the events of a chat's answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from vllm.entrypoints.chat.blocks import Block, BlockNews, BlockReader
from vllm.entrypoints.chat.events import AnswerEnd, AnswerEvent, Finished, PromptRead, Step, Usage

_DELTA_FIELDS = {"reasoning": "thinking", "text": "text", "tool_call": "partial_json"}
_DELTA_TYPES = {"reasoning": "thinking_delta", "text": "text_delta", "tool_call": "input_json_delta"}


class MessageWriter:
    """A message while it is made.

    Args:
        silent: `max_tokens` is 0: the prompt is computed, and nothing is answered.
    """

    def __init__(self, message_id: str, model: str, *, silent: bool) -> None:
        self._id = message_id
        self._model = model
        self._silent = silent
        self._reader = BlockReader()
        self._usage = Usage(0, 0, 0)
        self._finished: Finished | None = None

    def take(self, event: AnswerEvent) -> Iterator[dict[str, Any]]:
        """Takes in an event of the chat's answer; returns the events of a streamed message that tell of it: the empty
        message, its blocks as they grow, and why it ended."""
        match event:
            case PromptRead(_, usage):
                self._usage = usage
                yield {"type": "message_start", "message": self._message([])}
            case Step() if self._silent:
                return
            case Step():
                for part in event.events:
                    if isinstance(part, Finished):
                        self._finished = part
                yield from map(_block_event, self._reader.read(event.events))
            case AnswerEnd(usage):
                self._usage = usage
                yield from map(_block_event, self._reader.end())
                yield {"type": "message_delta", "delta": self._stop(), "usage": self._usage_json()}
                yield {"type": "message_stop"}

    def message(self) -> dict[str, Any]:
        """The whole message, once all events have been taken in."""
        return self._message([_content_block(block) for block in self._reader.blocks]) | self._stop()

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage_json(),
        }

    def _usage_json(self) -> dict[str, Any]:
        """`input_tokens` are those that were neither read from the cache nor pinned."""
        usage = self._usage
        return {
            "input_tokens": usage.prompt - usage.cached - usage.written,
            "cache_creation_input_tokens": usage.written,
            "cache_read_input_tokens": usage.cached,
            "output_tokens": 0 if self._silent else usage.completion,
        }

    def _stop(self) -> dict[str, Any]:
        if self._silent or self._finished is None or self._finished.reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if self._reader.calls_tools:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        # Of a token that ends answers, the reason is its id.
        if isinstance(self._finished.stop_reason, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": self._finished.stop_reason}
        return {"stop_reason": "end_turn", "stop_sequence": None}


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


def _block_event(news: BlockNews) -> dict[str, Any]:
    block = news.block
    event: dict[str, Any] = {"type": f"content_block_{news.what}", "index": block.index}
    if news.what == "start":
        event["content_block"] = _content_block(Block(block.index, block.kind, block.call_id, block.name))
    elif news.what == "delta":
        event["delta"] = {"type": _DELTA_TYPES[block.kind], _DELTA_FIELDS[block.kind]: news.text}
    return event
