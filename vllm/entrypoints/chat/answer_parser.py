"""Tells reasoning, text and tool calls of one output apart while it comes."""

from __future__ import annotations

import json
from collections.abc import Iterable

from vllm.entrypoints.chat.events import CallArguments, CallBegun, PartEvent, Reasoning, Text
from vllm.entrypoints.chat.reasoning_parsers import ReasoningParser
from vllm.entrypoints.chat.tool_parsers import ToolParser


class AnswerParser:
    """Reads one output.

    Args:
        reasoning, tools: None where the answer has no such part.
        is_whole: The answer is told at once, so that calls may still turn out to be broken. If the arguments of one are
            no JSON object, what was said is text, all of it. Of a stream, the calls before it have been told already.

    Attributes:
        thoughts: Pieces of the reasoning so far.
    """

    def __init__(self, reasoning: ReasoningParser | None, tools: ToolParser | None, is_whole: bool = False) -> None:
        self._reasoning = reasoning
        self._tools = tools
        self._is_whole = is_whole
        self.thoughts: list[str] = []
        self._content = ""
        self._are_broken = False

    @property
    def num_calls(self) -> int:
        return self._tools.num_calls if self._tools is not None and not self._are_broken else 0

    def feed(self, text: str, finished: bool) -> list[PartEvent]:
        """Takes in text; with `finished` it is the last, and nothing is held back any more."""
        reasoning, content = ("", text) if self._reasoning is None else self._reasoning.feed(text)
        if finished and self._reasoning is not None:
            rest = self._reasoning.finish()
            reasoning, content = reasoning + rest[0], content + rest[1]
        events: list[PartEvent] = [Reasoning(reasoning)] if reasoning else []
        if reasoning:
            self.thoughts.append(reasoning)
        if self._tools is None:
            return [*events, Text(content)] if content else events
        if self._is_whole:
            self._content += content
            if not finished:
                return events
            content = self._content
        said = self._tools.feed(content) if content else []
        if finished:
            said += self._tools.finish()
        # Of a format whose parser of calls reads the reasoning, too.
        self.thoughts += [event.text for event in said if isinstance(event, Reasoning)]
        if self._is_whole and not _are_calls(said):
            self._are_broken = True
            said = [Text(content)]
        return events + said


def _are_calls(events: Iterable[PartEvent]) -> bool:
    """Whether the arguments of all calls are JSON objects."""
    arguments: dict[int, str] = {}
    for event in events:
        if isinstance(event, CallBegun):
            arguments[event.index] = ""
        elif isinstance(event, CallArguments):
            arguments[event.index] += event.text
    return all(_is_object(text) for text in arguments.values())


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text, strict=False), dict)
    except (ValueError, RecursionError):
        return False
