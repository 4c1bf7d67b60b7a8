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
        allowed: Names of the functions that may be called; None for all.
        reasoning: Which parser splits off reasoning, or None.
    """

    tools: list[dict[str, Any]] | None = None
    parser: type[ToolParser] | None = None
    choice: str | dict[str, Any] = "auto"
    parallel: bool = True
    allowed: frozenset[str] | None = None
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
        if self.choice != "required":
            return named_form(self._named())
        allowed = [t for t in self.tools if self.allowed is None or t["function"]["name"] in self.allowed]
        return required_form(allowed, self.parallel)

    def make_parser(self, reasoning_ended: bool | None, is_whole: bool = False) -> AnswerParser:
        """A parser for one output; `is_whole` as of `AnswerParser`."""
        tools = self._make_tool_parser()
        if tools is not None and tools.reads_reasoning:
            tools.begin(bool(reasoning_ended) and self.reasoning is not None)
            return AnswerParser(None, tools)
        reasoning = None if self.reasoning is None else self.reasoning(reasoning_ended)
        return AnswerParser(reasoning, tools, is_whole and self.choice == "auto")

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
        return self.parser(self.tools, self.allowed) if self.parser is not None else None

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
        choice, allowed = _read_choice(request.tool_choice)
        if choice is None:
            choice = "auto"
        if choice == "none" or (choice == "auto" and tools is None):
            return AnswerFormat(reasoning=self._reasoning)
        if tools is None:
            raise VLLMValidationError("tool_choice needs tools to be set, with functions among them.", "tool_choice")
        if choice == "auto" and self._tool_parser is None:
            raise VLLMValidationError(
                '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set; send '
                'tool_choice "none", "required" or a function by name, or start the server with them.',
                "tool_choice",
            )
        _check_names(choice, allowed, tools)
        return AnswerFormat(
            tools=tools,
            parser=self._tool_parser,
            choice=choice,
            parallel=request.parallel_tool_calls is not False,
            allowed=allowed,
            reasoning=self._reasoning,
        )


def reasoning_ended(
    format: AnswerFormat, prompt: str, continued: str | None, template_kwargs: Mapping[str, Any]
) -> bool | None:
    """Whether an answer has no reasoning to come, or None if that is open; see `ReasoningParser.ended_in`."""
    return format.reasoning is None or format.reasoning.ended_in(prompt, continued, template_kwargs)


def constrain(params: SamplingParams, format: AnswerFormat, reasoning_is_over: bool | None) -> None:
    """Gives the output the form of the calls that it must make; what a form asks for begins after the reasoning, or at
    once if there may be none.

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
    if form is not None and format.reasoning is not None and reasoning_is_over is False:
        form.after = format.reasoning.end


def _read_choice(given: str | dict[str, Any] | None) -> tuple[str | dict[str, Any] | None, frozenset[str] | None]:
    """What `tool_choice` demands, and the names of the functions that it allows; None for all."""
    if given is None or given in ("none", "auto", "required"):
        return given, None
    kind = given.get("type", "function") if isinstance(given, dict) else None
    if isinstance(given, dict) and kind == "function" and _name_of(given) is not None:
        return given, None
    allowed = given.get("allowed_tools") if isinstance(given, dict) and kind == "allowed_tools" else None
    tools = allowed.get("tools") if isinstance(allowed, dict) else None
    if isinstance(allowed, dict) and isinstance(tools, list) and allowed.get("mode", "auto") in ("auto", "required"):
        names = [_name_of(tool) for tool in tools]
        if names and None not in names:
            return allowed.get("mode", "auto"), frozenset(name for name in names if name is not None)
    raise VLLMValidationError(
        'tool_choice must be "none", "auto", "required", {"type": "function", "function": {"name": ...}} or '
        '{"type": "allowed_tools", "allowed_tools": {"mode": "auto" or "required", "tools": [...]}}, '
        f"got {snippet(given)}.",
        "tool_choice",
    )


def _name_of(tool: Any) -> str | None:
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _check_names(choice: str | dict[str, Any], allowed: frozenset[str] | None, tools: list[dict[str, Any]]) -> None:
    named = allowed or ({_name_of(choice)} if isinstance(choice, dict) else set())
    unknown = named - {tool["function"]["name"] for tool in tools}
    if unknown:
        raise VLLMValidationError(
            f"tool_choice names {snippet(min(map(str, unknown)))}, which is not among tools.", "tool_choice"
        )
