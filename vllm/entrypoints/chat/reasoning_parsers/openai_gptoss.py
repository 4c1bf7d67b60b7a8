"""gpt-oss: reasoning is what the channel `analysis` of the Harmony format says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.entrypoints.chat.events import PartEvent, Reasoning, Text
from vllm.entrypoints.chat.reasoning_parsers.tags import ReasoningParser
from vllm.entrypoints.chat.tool_parsers.openai import OpenAIToolParser


class GptOssReasoningParser(ReasoningParser):
    """Content is what the other channels say to the user; calls, which nobody has offered, are dropped."""

    needs_special_tokens = True
    # What a form asks for begins with the text for the user.
    end = "<|channel|>final<|message|>"

    def __init__(self, ended: bool | None) -> None:
        self._messages = OpenAIToolParser([])
        self._messages.begin(bool(ended))

    @classmethod
    def ended_in(cls, prompt: str, continued: str | None, kwargs: Mapping[str, Any]) -> bool:
        return continued is not None or prompt.rstrip().endswith(cls.end)

    def feed(self, text: str) -> tuple[str, str]:
        return _parts(self._messages.feed(text))

    def finish(self) -> tuple[str, str]:
        return _parts(self._messages.finish())


def _parts(events: list[PartEvent]) -> tuple[str, str]:
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    return reasoning, "".join(event.text for event in events if isinstance(event, Text))
