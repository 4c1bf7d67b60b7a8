"""A whole chat completion, written once all events of its answer are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
)
from vllm.entrypoints.chat.service import ChatAnswer
from vllm.entrypoints.openai.answer_json import prompt_logprobs_json, usage_json
from vllm.entrypoints.openai.protocol import ChatCompletionRequest


def chat_completion(
    head: dict[str, Any],
    request: ChatCompletionRequest,
    answer: ChatAnswer,
    events: Sequence[AnswerEvent],
    fingerprint: str | None,
) -> dict[str, Any]:
    """The `chat.completion` object.

    Args:
        head: Its `id`, `object`, `created` and `model`.
        events: All of the answer's.
        fingerprint: `system_fingerprint`.
    """
    made = head | {
        "choices": [],
        "service_tier": None,
        "system_fingerprint": fingerprint,
        "usage": None,
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "kv_transfer_params": None,
    }
    choices: dict[int, _Choice] = {}
    for event in events:
        match event:
            case PromptRead(token_ids):
                if request.return_token_ids:
                    made["prompt_token_ids"] = token_ids
            case Step(index):
                choices.setdefault(index, _Choice(answer)).add(event.events)
            case AnswerEnd(usage, prompt_logprobs):
                made |= {"usage": usage_json(usage), "prompt_logprobs": prompt_logprobs_json(prompt_logprobs)}
    made["choices"] = [choices[index].json(index, bool(request.return_token_ids)) for index in sorted(choices)]
    return made


@dataclass
class _Choice:
    """What the steps of one choice add up to.

    Attributes:
        token_ids: None where tokens are not told one by one.
    """

    answer: ChatAnswer
    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] | None = None
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    end: Finished | None = None

    def add(self, events: Sequence[StepEvent]) -> None:
        for event in events:
            match event:
                case Tokens(ids):
                    self.token_ids = [*(self.token_ids or ()), *ids]
                    if self.answer.logprobs is not None:
                        self.logprobs += self.answer.logprobs.write(event)
                case Reasoning(text):
                    self.reasoning += text
                case Text(text):
                    self.content += text
                case CallBegun(_, call_id, name):
                    self.calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}})
                case CallArguments(index, text):
                    self.calls[index]["function"]["arguments"] += text
                case Finished():
                    self.end = event

    def json(self, index: int, returns_token_ids: bool) -> dict[str, Any]:
        shows_logprobs = self.answer.logprobs is not None and self.token_ids
        return {
            "index": index,
            "message": self._message(),
            "logprobs": {"content": self.logprobs, "refusal": None} if shows_logprobs else None,
            "finish_reason": self.end.reason if self.end else None,
            "stop_reason": self.end.stop_reason if self.end else None,
            "token_ids": self.token_ids if returns_token_ids else None,
        }

    def _message(self) -> dict[str, Any]:
        content = self.content if self.content or self.answer.is_plain else None
        reasoning = self.reasoning or None
        message: dict[str, Any] = {
            "role": self.answer.role,
            "content": content,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": reasoning,
            "reasoning_content": reasoning,
        }
        return message | {"tool_calls": self.calls} if self.calls else message
