"""Writes a response from the events of a chat's answer: its items, and the events of its stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.entrypoints.chat.blocks import Block, BlockNews, BlockReader
from vllm.entrypoints.chat.events import AnswerEnd, AnswerEvent, Finished, PromptRead, Step, Tokens, Usage
from vllm.entrypoints.chat.logprobs import LogprobWriter
from vllm.entrypoints.http.api_model import now, random_id
from vllm.entrypoints.http.errors import describe
from vllm.entrypoints.http.streaming import typed_sse
from vllm.entrypoints.responses.items import with_more
from vllm.entrypoints.responses.store import StoredResponse

_ID_PREFIXES = {"reasoning": "rs", "text": "msg", "tool_call": "fc"}
_DELTA_EVENTS = {
    "reasoning": "response.reasoning_text",
    "text": "response.output_text",
    "tool_call": "response.function_call_arguments",
}


class ResponseWriter:
    """A response while it is made.

    Args:
        continues: The answer goes on with the last message of the conversation.
        logprobs: Writes those of its tokens; None where none are shown.

    Attributes:
        stored: The response and its conversation.
    """

    def __init__(self, stored: StoredResponse, continues: bool, logprobs: LogprobWriter | None) -> None:
        self.stored = stored
        self._continues = continues
        self._logprob_writer = logprobs
        self._reader = BlockReader()
        self._sequence_number = 0
        self._item_ids: list[str] = []
        # Of each item, as they are shown beside its text.
        self._logprobs: list[list[dict[str, Any]]] = []
        self._prompt: Usage | None = None
        self._cut_off = False

    @property
    def response(self) -> dict[str, Any]:
        return self.stored.response

    def take(self, event: AnswerEvent) -> Iterator[dict[str, Any]]:
        """Takes in an event of the chat's answer; returns what is new as events without numbers."""
        match event:
            case PromptRead(_, usage):
                self._prompt = usage
                self.response["usage"] = _usage_json(usage)
            case AnswerEnd(usage):
                self.response["usage"] = _usage_json(usage)
            case Step():
                if self._prompt is not None:
                    self.response["usage"] = _usage_json(self._prompt.with_completion(event.num_generated))
                self._cut_off = any(isinstance(e, Finished) and e.reason == "length" for e in event.events)
                for news in self._reader.read(event.events):
                    yield from self._block_events(news)

    def finish(self) -> Iterator[dict[str, Any]]:
        """The chat has ended: the last item is complete, and so is the response."""
        for news in self._reader.end():
            yield from self._block_events(news)
        self.response["status"] = "incomplete" if self._cut_off else "completed"
        if self._cut_off:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
            if self.response["output"]:
                self.response["output"][-1]["status"] = "incomplete"
        self.response["completed_at"] = now()
        self._add_message()
        yield {"type": f"response.{self.response['status']}", "response": self.response}

    def fail(self, exc: Exception) -> dict[str, Any]:
        """The event that ends the response with an error."""
        error = describe(exc)
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        self.response.update(status="failed", error={"code": code, "message": error.message})
        return {"type": "response.failed", "response": self.response}

    def cancel(self) -> None:
        self.response["status"] = "cancelled"

    def encode(self, event: dict[str, Any]) -> bytes:
        """The event as a server-sent one with the next number."""
        numbered = event | {"sequence_number": self._sequence_number}
        self._sequence_number += 1
        return typed_sse(numbered)

    def _add_message(self) -> None:
        """Adds the answer to the conversation, as the chat message that a next request goes on from."""
        message: dict[str, Any] = {"role": "assistant", "content": self._text("text")}
        reasoning = self._text("reasoning")
        if reasoning:
            message["reasoning_content"] = reasoning
        calls = [block for block in self._reader.blocks if block.kind == "tool_call"]
        if calls:
            message["tool_calls"] = [
                {"id": block.call_id, "type": "function", "function": {"name": block.name, "arguments": block.text}}
                for block in calls
            ]
        messages = self.stored.messages
        if self._continues:
            message = with_more(messages.pop(), message)
        messages.append(message)

    def _text(self, kind: str) -> str:
        return "".join(block.text for block in self._reader.blocks if block.kind == kind)

    def _block_events(self, news: BlockNews) -> Iterator[dict[str, Any]]:
        block = news.block
        if news.what == "start":
            self._item_ids.append(f"{_ID_PREFIXES[block.kind]}_{random_id()}")
            self._logprobs.append([])
            item = self._item(block, "in_progress")
            self.response["output"].append(item)
            yield {"type": "response.output_item.added", "output_index": block.index, "item": item}
            if block.kind != "tool_call":
                yield self._place(block) | {"type": "response.content_part.added", "part": self._part(block)}
        elif news.what == "delta":
            event = self._place(block) | {"type": f"{_DELTA_EVENTS[block.kind]}.delta", "delta": news.text}
            if block.kind == "text":
                event["logprobs"] = self._written(news.tokens)
                self._logprobs[block.index] += event["logprobs"]
            yield event
        else:
            yield from self._end_events(block)

    def _written(self, tokens: tuple[Tokens, ...]) -> list[dict[str, Any]]:
        writer = self._logprob_writer
        return [] if writer is None else [entry for some in tokens for entry in writer.write(some)]

    def _end_events(self, block: Block) -> Iterator[dict[str, Any]]:
        done = self._place(block) | {"type": f"{_DELTA_EVENTS[block.kind]}.done"}
        if block.kind == "tool_call":
            yield done | {"name": block.name, "arguments": block.text}
        else:
            logprobs = {"logprobs": self._logprobs[block.index]} if block.kind == "text" else {}
            yield done | {"text": block.text} | logprobs
            yield self._place(block) | {"type": "response.content_part.done", "part": self._part(block)}
        item = self._item(block, "completed")
        self.response["output"][block.index] = item
        yield {"type": "response.output_item.done", "output_index": block.index, "item": item}

    def _place(self, block: Block) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": self._item_ids[block.index], "output_index": block.index}
        return place if block.kind == "tool_call" else place | {"content_index": 0}

    def _part(self, block: Block) -> dict[str, Any]:
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": block.text}
        return {
            "type": "output_text",
            "text": block.text,
            "annotations": [],
            "logprobs": self._logprobs[block.index],
        }

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._item_ids[block.index], "status": status}
        content = [self._part(block)] if status == "completed" else []
        if block.kind == "tool_call":
            return item | {
                "type": "function_call",
                "call_id": block.call_id,
                "name": block.name,
                "arguments": block.text,
            }
        if block.kind == "reasoning":
            return item | {"type": "reasoning", "summary": [], "content": content, "encrypted_content": None}
        return item | {"type": "message", "role": "assistant", "content": content}


def _usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": usage.written},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning or 0},
        "total_tokens": usage.prompt + usage.completion,
    }
