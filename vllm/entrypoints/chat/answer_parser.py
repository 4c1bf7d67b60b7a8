"""Tells reasoning, text and tool calls of one output apart while it comes."""

from __future__ import annotations

from vllm.entrypoints.chat.events import PartEvent, Reasoning, Text
from vllm.entrypoints.chat.reasoning_parsers import ReasoningParser
from vllm.entrypoints.chat.tool_parsers import ToolParser


class AnswerParser:
    """Reads one output.

    Args:
        reasoning, tools: None where the answer has no such part.
    """

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    @property
    def num_calls(self) -> int:
        return self._tools.num_calls if self._tools is not None else 0

    def feed(self, text: str, finished: bool) -> list[PartEvent]:
        """Takes in text; with `finished` it is the last, and nothing is held back any more."""
        reasoning, content = ("", text) if self._reasoning is None else self._reasoning.feed(text)
        if finished and self._reasoning is not None:
            rest = self._reasoning.finish()
            reasoning, content = reasoning + rest[0], content + rest[1]
        events: list[PartEvent] = [Reasoning(reasoning)] if reasoning else []
        if self._tools is None:
            return [*events, Text(content)] if content else events
        if content:
            events += self._tools.feed(content)
        if finished:
            events += self._tools.finish()
        return events
