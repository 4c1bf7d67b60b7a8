"""Chunks of a streamed chat completion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from vllm.entrypoints.chat.events import (
    AnswerEnd,
    AnswerEvent,
    CallArguments,
    CallBegun,
    Finished,
    PromptRead,
    Reasoning,
    Step,
    StepEvent,
    Text,
    Tokens,
    Usage,
)
from vllm.entrypoints.chat.service import ChatAnswer
from vllm.entrypoints.openai.answer_json import usage_json
from vllm.entrypoints.openai.protocol import ChatCompletionRequest


class ChunkWriter:
    """Writes a chunk with the role for each choice, the deltas, and usage if it was asked for.

    Args:
        head: `id`, `object`, `created` and `model` of all chunks.
        fingerprint: `system_fingerprint` of the last chunk of each choice, or of the one with the usage.
    """

    def __init__(
        self, head: dict[str, Any], request: ChatCompletionRequest, answer: ChatAnswer, fingerprint: str | None
    ) -> None:
        options = request.stream_options
        self._head = head
        self._answer = answer
        self._fingerprint = fingerprint
        self._tells_usage = bool(options and options.include_usage)
        self._every_usage = bool(self._tells_usage and options and options.continuous_usage_stats)
        self._returns_token_ids = bool(request.return_token_ids)
        self._prompt: Usage | None = None

    def write(self, event: AnswerEvent) -> Iterator[dict[str, Any]]:
        """The chunks that tell of an event."""
        match event:
            case PromptRead(token_ids, usage):
                self._prompt = usage
                for index in range(self._answer.num_choices):
                    first = self._chunk(_choice(index, {"role": self._answer.role, "content": ""}), 0)
                    yield first | {"prompt_token_ids": token_ids} if self._returns_token_ids else first
            case Step():
                choice = self._step(event)
                if choice is not None:
                    yield self._chunk(choice, event.num_generated)
            case AnswerEnd(usage):
                if self._tells_usage:
                    yield self._head | {
                        "choices": [],
                        "usage": usage_json(usage),
                        "system_fingerprint": self._fingerprint,
                    }

    def _chunk(self, choice: dict[str, Any], completion_tokens: int) -> dict[str, Any]:
        made = self._head | {"choices": [choice]}
        if self._every_usage and self._prompt is not None:
            made["usage"] = usage_json(self._prompt.with_completion(completion_tokens))
        if choice["finish_reason"] is not None and not self._tells_usage:
            made["system_fingerprint"] = self._fingerprint
        return made

    def _step(self, step: Step) -> dict[str, Any] | None:
        """The choice of a chunk; None while there is nothing to tell, as when a character is not complete yet."""
        choice = _choice(step.choice, _delta(step.events))
        says_nothing = not choice["delta"]
        if says_nothing and self._answer.is_plain:
            choice["delta"]["content"] = ""
        for event in step.events:
            match event:
                case Tokens(ids):
                    if self._answer.logprobs is not None and ids:
                        choice["logprobs"] = {"content": self._answer.logprobs.write(event), "refusal": None}
                        says_nothing = False
                    if self._returns_token_ids:
                        choice["token_ids"] = list(ids)
                        says_nothing = False
                case Finished(reason, stop_reason):
                    choice |= {"finish_reason": reason, "stop_reason": stop_reason}
                    says_nothing = False
        return None if says_nothing else choice


def _choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _delta(events: Iterable[StepEvent]) -> dict[str, Any]:
    """The `delta` of a step: what it adds to each field of the message."""
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        match event:
            case Reasoning(text):
                delta["reasoning"] = delta["reasoning_content"] = delta.get("reasoning", "") + text
            case Text(text):
                delta["content"] = delta.get("content", "") + text
            case CallBegun(index, call_id, name):
                function = {"name": name, "arguments": ""}
                calls[index] = {"index": index, "function": function, "id": call_id, "type": "function"}
            case CallArguments(index, text):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
    if calls:
        delta["tool_calls"] = list(calls.values())
    return delta
