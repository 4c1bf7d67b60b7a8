"""Which parts the answers to a request have, and how this server's model writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.chat.answer_parser import AnswerParser
from vllm.entrypoints.chat.messages import check_tools
from vllm.entrypoints.chat.reasoning_parsers import REASONING_PARSERS, ReasoningParser
from vllm.entrypoints.chat.request import ChatRequest
from vllm.entrypoints.chat.tool_parsers import TOOL_PARSERS, ToolParser
from vllm.entrypoints.chat.tool_parsers.forced import (
    NamedToolParser,
    RequiredToolParser,
    named_form,
    required_form,
)
from vllm.entrypoints.http.json_body import snippet
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams


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
        if self.reasoning is not None and self.reasoning.needs_special_tokens:
            return True
        return self.choice == "auto" and self.parser is not None and self.parser.needs_special_tokens

    @property
    def is_plain(self) -> bool:
        """All text is content."""
        return self.tools is None and self.reasoning is None

    def form(self) -> StructuredOutputsParams | None:
        """The form that calls must have, if there must be any."""
        if self.tools is None or self.choice == "auto":
            return None
        required = self.choice == "required"
        return required_form(self.tools, self.parallel) if required else named_form(self._named())

    def make_parser(self, reasoning_ended: bool) -> AnswerParser:
        """A parser for one output."""
        tools = self._make_tool_parser()
        if tools is not None and tools.reads_reasoning:
            tools.begin(reasoning_ended and self.reasoning is not None)
            return AnswerParser(None, tools)
        reasoning = None if self.reasoning is None else self.reasoning(reasoning_ended)
        return AnswerParser(reasoning, tools)

    def finish_reason(self, reason: str, num_calls: int) -> str:
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

    def format(self, request: ChatRequest) -> AnswerFormat:
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


def constrain(params: SamplingParams, format: AnswerFormat, reasoning_is_over: bool) -> None:
    """Gives the output the form of the calls that it must make; what a form asks for begins after the reasoning.

    Raises:
        VLLMValidationError: the request asks for another form, or `AnswerFormat.form` refuses the tools.
    """
    calls = format.form()
    asked = params.structured_outputs
    if calls is not None and asked is not None and asked.field != "response_format":
        raise VLLMValidationError(
            f"{asked.field} cannot be combined with a tool_choice that demands calls.", asked.field
        )
    params.structured_outputs = form = calls or asked
    if form is not None and format.reasoning is not None and not reasoning_is_over:
        form.after = format.reasoning.end


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
