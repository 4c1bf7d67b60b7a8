"""Chunks of a streamed chat completion."""

from __future__ import annotations

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

    def write(self, event: AnswerEvent) -> list[dict[str, Any]]:
        """The chunks that tell of an event."""
        match event:
            case Step():
                choice = self._step(event)
                return [] if choice is None else [self._chunk(choice, event.num_generated)]
            case PromptRead():
                self._prompt = event.usage
                first = {"role": self._answer.role, "content": ""}
                extra = {"prompt_token_ids": event.token_ids} if self._returns_token_ids else {}
                return [self._chunk(_choice(i, first), 0) | extra for i in range(self._answer.num_choices)]
            case AnswerEnd() if self._tells_usage:
                usage = {"usage": usage_json(event.usage), "system_fingerprint": self._fingerprint}
                return [self._head | {"choices": []} | usage]
        return []

    def _chunk(self, choice: dict[str, Any], completion_tokens: int) -> dict[str, Any]:
        made = self._head | {"choices": [choice]}
        if self._every_usage and self._prompt is not None:
            made["usage"] = usage_json(self._prompt.with_completion(completion_tokens))
        if choice["finish_reason"] is not None and not self._tells_usage:
            made["system_fingerprint"] = self._fingerprint
        return made

    def _step(self, step: Step) -> dict[str, Any] | None:
        """The choice of a chunk; None while there is nothing to tell, as when a character is not complete yet."""
        delta: dict[str, Any] = {}
        choice = _choice(step.choice, delta)
        for event in step.events:
            match event:
                case Tokens():
                    if self._answer.logprobs is not None and event.ids:
                        choice["logprobs"] = {"content": self._answer.logprobs.write(event), "refusal": None}
                    if self._returns_token_ids:
                        choice["token_ids"] = list(event.ids)
                case Text():
                    delta["content"] = delta.get("content", "") + event.text
                case Reasoning():
                    delta["reasoning"] = delta["reasoning_content"] = delta.get("reasoning", "") + event.text
                case CallBegun() | CallArguments():
                    _add_to_calls(delta.setdefault("tool_calls", []), event)
                case Finished():
                    choice["finish_reason"] = event.reason
                    choice["stop_reason"] = event.stop_reason
        tells = delta or choice["finish_reason"] is not None or choice["logprobs"] is not None or "token_ids" in choice
        if not delta and self._answer.is_plain:
            delta["content"] = ""
        return choice if tells else None


def _choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _add_to_calls(calls: list[dict[str, Any]], event: CallBegun | CallArguments) -> None:
    """Adds to `delta.tool_calls`, which has one entry for each call that a step tells of."""
    if isinstance(event, CallBegun):
        function = {"name": event.name, "arguments": ""}
        calls.append({"index": event.index, "function": function, "id": event.id, "type": "function"})
        return
    if not calls or calls[-1]["index"] != event.index:
        calls.append({"index": event.index, "function": {"arguments": ""}})
    calls[-1]["function"]["arguments"] += event.text
