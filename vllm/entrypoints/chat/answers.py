"""What an answer is made of: reasoning, content and calls, told apart while the text comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm.entrypoints.chat.messages import check_tools
from vllm.entrypoints.chat.reasoning_parsers import REASONING_PARSERS, ReasoningParser
from vllm.entrypoints.chat.tool_parsers import TOOL_PARSERS, CallDelta, ToolDelta, ToolParser
from vllm.entrypoints.chat.tool_parsers.forced import (
    NamedToolParser,
    RequiredToolParser,
    check_strict,
    named_form,
    required_form,
)
from vllm.entrypoints.http.json_body import snippet
from vllm.entrypoints.openai.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams


@dataclass
class AnswerDelta:
    """What is new in an answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.reasoning or self.content or self.calls)


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

    def feed(self, text: str, finished: bool) -> AnswerDelta:
        """Takes in text; with `finished` it is the last, and nothing is held back any more."""
        reasoning, content = ("", text) if self._reasoning is None else self._reasoning.feed(text)
        if finished and self._reasoning is not None:
            rest = self._reasoning.finish()
            reasoning, content = reasoning + rest[0], content + rest[1]
        if self._tools is None:
            return AnswerDelta(reasoning, content)
        parts: list[ToolDelta] = [self._tools.feed(content)] if content else []
        if finished:
            parts.append(self._tools.finish())
        calls = [call for part in parts for call in part.calls]
        return AnswerDelta(reasoning, "".join(part.content for part in parts), calls)


@dataclass(frozen=True)
class AnswerFormat:
    """How the answers to one request are read.

    Attributes:
        tools: The functions it offers; None where the answer has no calls.
        parser: Which parser finds calls where the model chooses.
        choice: `auto`, `required`, or the function that is to be called.
        reasoning: Which parser splits off reasoning, or None.
    """

    tools: list[dict[str, Any]] | None = None
    parser: type[ToolParser] | None = None
    choice: str | dict[str, Any] = "auto"
    parallel: bool = True
    reasoning: type[ReasoningParser] | None = None

    @property
    def needs_special_tokens(self) -> bool:
        return self.choice == "auto" and self.parser is not None and self.parser.needs_special_tokens

    @property
    def is_plain(self) -> bool:
        """All text is content."""
        return self.tools is None and self.reasoning is None

    def form(self) -> StructuredOutputsParams | None:
        """The form that calls must have, if there must be any.

        Raises:
            VLLMValidationError: a function is strict and its schema cannot be followed in every point.
        """
        if self.tools is None or self.choice == "auto":
            return None
        required = self.choice == "required"
        for tool in self.tools if required else [self._named()]:
            check_strict(tool)
        form = required_form(self.tools, self.parallel) if required else named_form(self._named())
        form.field, form.enforces_all = "tools", False
        return form

    def make_parser(self, reasoning_ended: bool) -> AnswerParser | None:
        """A parser for one output; None if there is nothing to tell apart."""
        if self.is_plain:
            return None
        reasoning = None if self.reasoning is None else self.reasoning(reasoning_ended)
        return AnswerParser(reasoning, self._make_tool_parser())

    def finish_reason(self, reason: str | None, num_calls: int) -> str | None:
        """`tool_calls` where the model chose to call; who names the function knows that it is called."""
        called = reason == "stop" and num_calls > 0 and not isinstance(self.choice, dict)
        return "tool_calls" if called else reason

    def _make_tool_parser(self) -> ToolParser | None:
        if self.tools is None:
            return None
        if isinstance(self.choice, dict):
            return NamedToolParser(self.tools, self._named()["function"]["name"])
        if self.choice == "required":
            return RequiredToolParser(self.tools)
        return self.parser(self.tools) if self.parser is not None else None

    def _named(self) -> dict[str, Any]:
        name = self.choice["function"]["name"] if isinstance(self.choice, dict) else None
        return next(tool for tool in self.tools or () if tool["function"]["name"] == name)


class AnswerReader:
    """Knows how this server's model writes calls and reasoning.

    Args:
        tool_parser, reasoning_parser: Names of parsers, or None.
        auto_tools: Models may call functions unasked.
    """

    def __init__(
        self, tool_parser: str | None = None, *, auto_tools: bool = False, reasoning_parser: str | None = None
    ) -> None:
        self._tool_parser = TOOL_PARSERS[tool_parser] if tool_parser and auto_tools else None
        self._reasoning = REASONING_PARSERS[reasoning_parser] if reasoning_parser else None

    def format(self, request: ChatCompletionRequest) -> AnswerFormat:
        """How answers to a request are read.

        Raises:
            VLLMValidationError: `tools` and `tool_choice` do not fit each other or this server.
        """
        tools = check_tools(request.tools)
        choice = request.tool_choice
        if choice is None:
            choice = "auto" if tools else "none"
        if choice == "none":
            return AnswerFormat(reasoning=self._reasoning)
        if tools is None:
            raise VLLMValidationError("tool_choice needs tools to be set.", "tool_choice")
        if choice == "auto" and self._tool_parser is None:
            raise VLLMValidationError(
                '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set; send '
                'tool_choice "none", "required" or a function by name, or start the server with them.',
                "tool_choice",
            )
        _check_choice(choice, tools)
        return AnswerFormat(
            tools=tools,
            parser=self._tool_parser,
            choice=choice,
            parallel=request.parallel_tool_calls is not False,
            reasoning=self._reasoning,
        )


def reasoning_ended(
    format: AnswerFormat, prompt: str, continued: str | None, template_kwargs: Mapping[str, Any]
) -> bool:
    """Whether an answer has no reasoning to come; see `ReasoningParser.ended_in`."""
    return format.reasoning is None or format.reasoning.ended_in(prompt, continued, template_kwargs)


def _check_choice(choice: str | dict[str, Any], tools: list[dict[str, Any]]) -> None:
    if choice in ("auto", "required"):
        return
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise VLLMValidationError(
            'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}, '
            f"got {snippet(choice)}.",
            "tool_choice",
        )
    names = [tool["function"]["name"] for tool in tools]
    if function["name"] not in names:
        raise VLLMValidationError(
            f"tool_choice names {snippet(function['name'])}, which is not among tools.", "tool_choice"
        )


def calls_json(calls: list[CallDelta]) -> list[dict[str, Any]]:
    """`delta.tool_calls` of a chunk."""
    made = []
    for call in calls:
        function: dict[str, Any] = {"arguments": call.arguments}
        entry: dict[str, Any] = {"index": call.index, "function": function}
        if call.name is not None:
            entry |= {"id": call.id, "type": "function", "function": {"name": call.name, **function}}
        made.append(entry)
    return made


def whole_calls_json(calls: list[CallDelta]) -> list[dict[str, Any]]:
    """`message.tool_calls` of an answer; `calls` are all deltas of it."""
    made: list[dict[str, Any]] = []
    for call in calls:
        if call.name is not None:
            made.append({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}})
        made[call.index]["function"]["arguments"] += call.arguments
    return made
