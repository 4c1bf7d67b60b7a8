"""Formats whose calls are tags with a tag for each argument: `<function=NAME><parameter=KEY>VALUE</parameter>…`.

A format is a row of `Tags`; the machine is one for all. A call is only one if its name is followed by an argument or
by its end: else the model speaks of the format, and that is text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from vllm.entrypoints.chat.partial_text import find_first, held_back
from vllm.entrypoints.chat.tool_parsers.base import ToolParser

_NO_NAME = re.compile(r"""[\s<>]|.{257}""")


@dataclass(frozen=True)
class Tags:
    """How a call is written.

    Attributes:
        outer: Around calls, `(begin, end)`; some outputs leave it out. None where there is nothing.
        call: Before the name, and at the end of the call.
        names_end: Marks of which the first ends the name; those that begin something else stay.
        argument: Before the key, after the key, before the value (or an empty text), and after the value.
        fillers: What else may stand between outer mark and calls.
        is_padded: Values stand on lines of their own.
    """

    outer: tuple[str, str] | None
    call: tuple[str, str]
    names_end: tuple[str, ...]
    argument: tuple[str, str, str, str]
    fillers: tuple[str, ...] = ()
    is_padded: bool = False


class TaggedToolParser(ToolParser):
    """Values are read by the type that the schema gives them; strings are handed on while they come."""

    tags: ClassVar[Tags]

    def __init__(self, tools: list[dict[str, Any]], allowed: frozenset[str] | None = None) -> None:
        super().__init__(tools, allowed)
        outer, (call, call_end), argument = self.tags.outer, self.tags.call, self.tags.argument
        self._starts = (outer[0], call) if outer is not None else (call,)
        self._outer_end = outer[1] if outer is not None else ""
        self._members = tuple(mark for mark in (argument[0], call_end, self._outer_end) if mark)
        self._value_ends = (argument[3], argument[0], call_end)
        self._state = self._read_text
        # What was taken since the text ended, until it is certain that a call begins.
        self._raw = ""
        self._name = ""
        self._properties: dict[str, Any] = {}
        self._num_values = 0
        self._is_string = False
        self._may_be_null = False
        self._begun = False

    def step(self) -> bool:
        return self._state()

    def _read_text(self) -> bool:
        found = find_first(self.buffer, self._starts)
        if found is None:
            self.say(self.take(len(self.buffer) - held_back(self.buffer, self._starts)))
            return False
        at, mark = found
        self.say(self.take(at))
        self._raw = ""
        if self.tags.outer is not None and mark == self.tags.outer[0]:
            self._grab(len(mark))
        self._state = self._read_between
        return True

    def _read_between(self) -> bool:
        """Before, between or after the calls of a section."""
        self._grab(len(self.buffer) - len(self.buffer.lstrip()))
        known = (self.tags.call[0], *self.tags.fillers, *([self._outer_end] if self._outer_end else []))
        for mark in known:
            if self.buffer.startswith(mark):
                self._grab(len(mark))
                if mark == self.tags.call[0]:
                    self._state = self._read_name
                elif mark == self._outer_end:
                    self._raw = "" if self.num_calls else self._raw
                    self._be_text()
                return True
        if not self.buffer or self.may_grow_to(*known):
            return False
        self._be_text()
        return True

    def _read_name(self) -> bool:
        self._grab(len(self.buffer) - len(self.buffer.lstrip()))
        found = find_first(self.buffer, self.tags.names_end)
        head = self.buffer[: found[0] if found else len(self.buffer) - held_back(self.buffer, self.tags.names_end)]
        name, quote, rest = head.partition('"')
        name = name.strip(" ")
        if _NO_NAME.search(name) or (quote and rest.strip()) or (found and not name):
            self._be_text()
            return True
        if found is None:
            return False
        self._name = name
        kept = found[1] in self._members
        self._grab(found[0] + (0 if kept else len(found[1])))
        self._state = self._read_begin
        return True

    def _read_begin(self) -> bool:
        """What follows a name shows whether a call begins."""
        self._grab(len(self.buffer) - len(self.buffer.lstrip()))
        if any(self.buffer.startswith(mark) for mark in self._members):
            has_outer = self.tags.outer is None or self._raw.startswith(self.tags.outer[0]) or self.num_calls > 0
            if has_outer or self._name in self.parameters:
                self._open()
                return True
        elif not self.buffer or self.may_grow_to(*self._members):
            return False
        self._be_text()
        return True

    def _open(self) -> None:
        parameters = self.parameters.get(self._name)
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        self._properties = properties if isinstance(properties, dict) else {}
        self._num_values, self._raw = 0, ""
        self.open_call(self._name)
        self._state = self._read_member

    def _read_member(self) -> bool:
        self.skip_space()
        found = find_first(self.buffer, self._members)
        if found is None:
            self.take(len(self.buffer) - held_back(self.buffer, self._members))
            return False
        at, mark = found
        begin, key_end, value_begin, _ = self.tags.argument
        if mark != begin:
            self.take(at + (len(mark) if mark == self.tags.call[1] else 0))
            self.add_arguments("}" if self._num_values else "{}")
            self._state = self._read_between
            return True
        end = self.buffer.find(key_end, at + len(begin))
        if end < 0:
            return False
        after = self.buffer[end + len(key_end) :]
        if value_begin:
            after = after.lstrip()
            if len(after) < len(value_begin) and value_begin.startswith(after):
                return False
            after = after.removeprefix(value_begin)
        head = self.buffer[at + len(begin) : end]
        self.buffer = after
        self._begin_value(head)
        return True

    def _begin_value(self, head: str) -> None:
        key, _, attributes = head.partition('"')
        key = key.strip()
        types = _types(self._properties.get(key))
        self._is_string = self._may_be_null = types <= {"string"}
        if 'string="' in attributes:  # the model says itself whether it writes text or JSON
            self._is_string, self._may_be_null = 'string="true"' in attributes, False
        self.add_arguments(("{" if not self._num_values else ", ") + _json(key) + ": ")
        self._num_values += 1
        self._begun = False
        self._state = self._read_value

    def _read_value(self) -> bool:
        found = find_first(self.buffer, self._value_ends)
        if found is not None:
            at, mark = found
            self._end_value(self.take(at))
            if mark == self.tags.argument[3]:
                self.take(len(mark))
            self._state = self._read_member
            return True
        if self._is_string:
            self._stream_string()
        return False

    def _stream_string(self) -> None:
        """Hands on what is certain: not the line break before the end mark, and not what may be the word null."""
        certain = self.buffer[: len(self.buffer) - held_back(self.buffer, self._value_ends)]
        if self.tags.is_padded:
            certain = certain.removesuffix("\n")
        if not self._begun:
            if not certain or (self._may_be_null and "null".startswith(certain.strip().lower())):
                return
            self._begun = True
            self.add_arguments('"')
            if self.tags.is_padded and certain.startswith("\n"):
                self.take(1)
                certain = certain[1:]
        self.take(len(certain))
        self.add_arguments(_json(certain)[1:-1])

    def _end_value(self, text: str) -> None:
        if self.tags.is_padded:
            text = text.removesuffix("\n")
        if self._begun:
            self.add_arguments(_json(text)[1:-1] + '"')
            return
        if self.tags.is_padded:
            text = text.removeprefix("\n")
        is_null = self._may_be_null and text.strip().lower() == "null"
        self.add_arguments(_json(text) if self._is_string and not is_null else _literal(text))

    def _grab(self, size: int) -> None:
        self._raw += self.take(size)

    def _be_text(self) -> None:
        self.say(self._raw)
        self._raw, self._state = "", self._read_text

    def end(self) -> None:
        if self._state == self._read_value:
            # The output was cut off.
            if self._is_string and not self._begun:
                self.add_arguments('"')
            if self._is_string:
                self.add_arguments(_json(self.buffer)[1:-1])
        elif self._state != self._read_member:
            if self._state == self._read_between and self.num_calls:
                self._raw = self._raw.strip()
            self._be_text()
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


class Qwen3CoderToolParser(TaggedToolParser):
    """Qwen 3 Coder: `<tool_call><function=name><parameter=key>value</parameter>…</function></tool_call>`."""

    tags = Tags(
        outer=("<tool_call>", "</tool_call>"),
        call=("<function=", "</function>"),
        names_end=(">",),
        argument=("<parameter=", ">", "", "</parameter>"),
        is_padded=True,
    )


class SeedOssToolParser(TaggedToolParser):
    """Seed OSS: `<seed:tool_call><function=name><parameter=key>value</parameter>…</function></seed:tool_call>`."""

    tags = Tags(
        outer=("<seed:tool_call>", "</seed:tool_call>"),
        call=("<function=", "</function>"),
        names_end=(">",),
        argument=("<parameter=", ">", "", "</parameter>"),
    )


class MiniMaxM2ToolParser(TaggedToolParser):
    """MiniMax M2: `<minimax:tool_call><invoke name="name"><parameter name="key">value</parameter>…</invoke>…`."""

    tags = Tags(
        outer=("<minimax:tool_call>", "</minimax:tool_call>"),
        call=('<invoke name="', "</invoke>"),
        names_end=(">",),
        argument=('<parameter name="', ">", "", "</parameter>"),
    )


class DeepSeekV32ToolParser(TaggedToolParser):
    """DeepSeek V3.2: `<｜DSML｜invoke name="name"><｜DSML｜parameter name="key" string="true">value…`. A value with
    `string="false"` is JSON."""

    needs_special_tokens = True
    tags = Tags(
        outer=("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
        call=('<｜DSML｜invoke name="', "</｜DSML｜invoke>"),
        names_end=(">",),
        argument=('<｜DSML｜parameter name="', ">", "", "</｜DSML｜parameter>"),
    )


class Step3ToolParser(TaggedToolParser):
    """Step 3: `<steptml:invoke name="name"><steptml:parameter name="key">value</steptml:parameter>…` in a frame of
    control tokens."""

    needs_special_tokens = True
    tags = Tags(
        outer=("<｜tool_calls_begin｜>", "<｜tool_calls_end｜>"),
        call=('<steptml:invoke name="', "</steptml:invoke>"),
        names_end=(">",),
        argument=('<steptml:parameter name="', ">", "", "</steptml:parameter>"),
        fillers=("<｜tool_call_begin｜>", "function", "<｜tool_sep｜>", "<｜tool_call_end｜>"),
    )


class GlmToolParser(TaggedToolParser):
    """GLM 4.5 to 4.7: `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>…</tool_call>`, before 4.7 with
    line breaks between."""

    needs_special_tokens = True
    tags = Tags(
        outer=None,
        call=("<tool_call>", "</tool_call>"),
        names_end=("\n", "<arg_key>", "</tool_call>"),
        argument=("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    )
