"""Calls that the request demands: the output has a form of its own, whatever the model's usual format."""

from __future__ import annotations

import json
from typing import Any

from vllm.entrypoints.chat.tool_parsers.base import ToolParser
from vllm.entrypoints.chat.tool_parsers.json_calls import CallReader
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.structured_output.constraint import bounded_json
from vllm.structured_output.json_schema import unenforced


class NamedToolParser(ToolParser):
    """The output is the arguments of one function."""

    def __init__(self, tools: list[dict[str, Any]], name: str) -> None:
        super().__init__(tools)
        self._name = name

    def step(self) -> bool:
        if not self.num_calls:
            self.open_call(self._name)
        self.add_arguments(self.take(len(self.buffer)))
        return False

    def end(self) -> None:
        self.step()


class RequiredToolParser(ToolParser):
    """The output is a list of `{"name": …, "parameters": {…}}`."""

    def __init__(self, tools: list[dict[str, Any]]) -> None:
        super().__init__(tools)
        self._call: CallReader | None = None

    def step(self) -> bool:
        if self._call is None:
            at = self.buffer.find("{")
            if at < 0:
                self.buffer = ""
                return False
            self.take(at)
            self._call = CallReader(self.open_call, self.add_arguments)
        self.take(self._call.read(self.buffer))
        if not self._call.done and not self._call.broken:
            return False
        self._call = None
        return bool(self.buffer)

    def end(self) -> None:
        pass


def check_strict(tool: dict[str, Any]) -> None:
    """Raises `VLLMValidationError` for a function that is strict where its arguments cannot be held to its schema."""
    function = tool["function"]
    if not function.get("strict"):
        return
    bounded_json(function.get("parameters"), "parameters", "tools")
    keyword = unenforced(function.get("parameters"))
    if keyword is not None:
        raise VLLMValidationError(
            f"The function {function['name']} is strict and its parameters have {keyword}, which this server cannot "
            "enforce; leave that or strict out.",
            "tools",
        )


def named_form(tool: dict[str, Any]) -> StructuredOutputsParams:
    """The form of the arguments of one function."""
    return StructuredOutputsParams(json=_schema(tool))


def required_form(tools: list[dict[str, Any]], parallel: bool) -> StructuredOutputsParams:
    """The form of a list of calls; of one call unless `parallel`.

    Each function's schema is a grammar of its own, so that references within it keep their meaning.
    """
    tags = [
        {
            "type": "tag",
            "begin": f'{{"name": {json.dumps(tool["function"]["name"], ensure_ascii=False)}, "parameters": ',
            "content": {"type": "json_schema", "json_schema": _schema(tool)},
            "end": "}",
        }
        for tool in tools
    ]
    calls = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": ", ",
        "at_least_one": True,
        "stop_after_first": not parallel,
    }
    elements = [{"type": "const_string", "value": "["}, calls, {"type": "const_string", "value": "]"}]
    return StructuredOutputsParams(structural_tag={"format": {"type": "sequence", "elements": elements}})


def _schema(tool: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object even where it does not say so."""
    schema: dict[str, Any] = tool["function"].get("parameters") or {"properties": {}}
    return schema if schema.keys() & {"type", "anyOf", "oneOf", "allOf", "$ref"} else {"type": "object"} | schema
