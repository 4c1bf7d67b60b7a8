"""Qwen 3 Coder: `<tool_call><function=name><parameter=key>value</parameter>…</function></tool_call>`."""

from __future__ import annotations

import json
from typing import Any

from vllm.entrypoints.chat.partial_text import find_first, held_back
from vllm.entrypoints.chat.tool_parsers.base import ToolParser

_START = "<tool_call>"
_END = "</tool_call>"
_FUNCTION = "<function="
_FUNCTION_END = "</function>"
_PARAMETER = "<parameter="
_PARAMETER_END = "</parameter>"
_VALUE_ENDS = (_PARAMETER_END, _PARAMETER, _FUNCTION_END)


class Qwen3CoderToolParser(ToolParser):
    """Values are read by the type that the schema gives them; strings are handed on while they come."""

    def __init__(self, tools: list[dict[str, Any]], allowed: frozenset[str] | None = None) -> None:
        super().__init__(tools, allowed)
        self._properties: dict[str, Any] = {}
        self._in_call = False
        self._in_function = False
        self._in_value = False
        self._is_string = False
        self._begun = False
        self._num_values = 0

    def step(self) -> bool:
        if self._in_value:
            return self._read_value()
        if self._in_function:
            return self._read_member()
        if self._in_call:
            return self._read_function()
        return self._read_text()

    def _read_text(self) -> bool:
        # Some outputs leave the outer mark out.
        found = find_first(self.buffer, (_START, _FUNCTION))
        if found is None:
            self.say(self.take(len(self.buffer) - held_back(self.buffer, (_START, _FUNCTION, _END))))
            return False
        at, mark = found
        self.say(self.take(at))
        if mark == _START:
            self.take(len(mark))
        self._in_call = True
        return True

    def _read_function(self) -> bool:
        self.skip_space()
        if self.buffer.startswith(_END):
            self.take(len(_END))
            self._in_call = False
            return True
        if _END.startswith(self.buffer) or _FUNCTION.startswith(self.buffer):
            return False
        if not self.buffer.startswith(_FUNCTION):
            self._in_call = False
            if not self.num_calls:
                self.say(_START)
            return True
        end = self.buffer.find(">")
        if end < 0:
            return False
        name = self.take(end + 1)[len(_FUNCTION) : -1].strip()
        parameters = self.parameters.get(name)
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        self._properties = properties if isinstance(properties, dict) else {}
        self._in_function, self._num_values = True, 0
        self.open_call(name)
        return True

    def _read_member(self) -> bool:
        self.skip_space()
        found = find_first(self.buffer, (_PARAMETER, _FUNCTION_END, _END))
        if found is None:
            self.take(len(self.buffer) - held_back(self.buffer, (_PARAMETER, _FUNCTION_END, _END)))
            return False
        at, mark = found
        if mark != _PARAMETER:
            self.take(at + (len(mark) if mark == _FUNCTION_END else 0))
            self._in_function = False
            self.add_arguments("}" if self._num_values else "{}")
            return True
        end = self.buffer.find(">", at)
        if end < 0:
            return False
        key = self.take(end + 1)[at + len(_PARAMETER) : -1].strip()
        self.add_arguments(("{" if not self._num_values else ", ") + _json(key) + ": ")
        self._num_values += 1
        self._in_value, self._begun = True, False
        self._is_string = _types(self._properties.get(key)) <= {"string"}
        return True

    def _read_value(self) -> bool:
        found = find_first(self.buffer, _VALUE_ENDS)
        if found is not None:
            at, mark = found
            self._end_value(self.take(at))
            if mark == _PARAMETER_END:
                self.take(len(mark))
            return True
        if self._is_string:
            self._stream_string()
        return False

    def _stream_string(self) -> None:
        """Hands on what is certain: not the line break before the end mark, and not what may be the word null."""
        certain = self.buffer[: len(self.buffer) - held_back(self.buffer, _VALUE_ENDS)].removesuffix("\n")
        if not self._begun:
            if "null".startswith(certain.strip().lower()):
                return
            self._begun = True
            self.add_arguments('"')
            if certain.startswith("\n"):
                self.take(1)
                certain = certain[1:]
        self.take(len(certain))
        self.add_arguments(_json(certain)[1:-1])

    def _end_value(self, text: str) -> None:
        self._in_value = False
        text = text.removesuffix("\n")
        if self._begun:
            self.add_arguments(_json(text)[1:-1] + '"')
            return
        text = text.removeprefix("\n")
        self.add_arguments(_json(text) if self._is_string and text.strip().lower() != "null" else _literal(text))

    def end(self) -> None:
        if self._in_value:
            # The output was cut off.
            if self._is_string and not self._begun:
                self.add_arguments('"')
            if self._is_string:
                self.add_arguments(_json(self.buffer)[1:-1])
        elif not self._in_function and not self._in_call:
            self.say(self.take(len(self.buffer)))


def _types(schema: Any) -> set[str]:
    """The JSON types that a schema allows; a schema that does not say is one of strings."""
    if not isinstance(schema, dict):
        return {"string"}
    if isinstance(schema.get("type"), str):
        return {schema["type"]}
    if isinstance(schema.get("type"), list):
        return {t for t in schema["type"] if isinstance(t, str)} - {"null"}
    options = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(options, list):
        return set().union(*(_types(option) for option in options)) - {"null"}
    if isinstance(schema.get("enum"), list):
        return {"string" if isinstance(value, str) else "other" for value in schema["enum"]}
    return {"other"} if "$ref" in schema else {"string"}


def _literal(text: str) -> str:
    """The text of a value that is no string, as JSON; what cannot be read becomes a string."""
    word = text.strip()
    if word.lower() in ("true", "false", "null", "none"):
        return word.lower().replace("none", "null")
    try:
        return _json(json.loads(word))
    except (ValueError, RecursionError):
        return _json(text)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
