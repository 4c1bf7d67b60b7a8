"""Calls that the request demands: the output has a form of its own, whatever the model's usual format."""

from __future__ import annotations

import json
from typing import Any

from vllm.entrypoints.chat.tool_parsers.base import ToolParser
from vllm.entrypoints.chat.tool_parsers.json_calls import CallReader
from vllm.sampling_params import StructuredOutputsParams


class NamedToolParser(ToolParser):
    """The output is the arguments of one function."""

    def __init__(self, tools: list[dict[str, Any]], name: str) -> None:
        super().__init__(tools)
        self._name = name

    def step(self) -> bool:
        if not self.buffer:  # cut off before it began, such as while the model was thinking
            return False
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


def named_form(tool: dict[str, Any]) -> StructuredOutputsParams:
    """The form of the arguments of one function."""
    return StructuredOutputsParams(json=_schema(tool), field="tools", enforces_all=_is_strict(tool))


def required_form(tools: list[dict[str, Any]], parallel: bool) -> StructuredOutputsParams:
    """The form of a list of calls; of one call unless `parallel`.

    Each function's schema is a grammar of its own, so that references within it keep their meaning.
    """
    tags = [
        {
            "type": "tag",
            "begin": f'{{"name": {json.dumps(tool["function"]["name"], ensure_ascii=False)}, "parameters": ',
            "content": {"type": "json_schema", "json_schema": _schema(tool), "strict": _is_strict(tool)},
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
    tag = {"format": {"type": "sequence", "elements": elements}}
    return StructuredOutputsParams(structural_tag=tag, field="tools", enforces_all=False)


def _is_strict(tool: dict[str, Any]) -> bool:
    """Whether a schema with a keyword that cannot be enforced is refused, not followed as far as possible."""
    return bool(tool["function"].get("strict"))


def _schema(tool: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object even where it does not say so."""
    schema: dict[str, Any] = tool["function"].get("parameters") or {"properties": {}}
    return schema if schema.keys() & {"type", "anyOf", "oneOf", "allOf", "$ref"} else {"type": "object"} | schema
