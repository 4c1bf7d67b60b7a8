"""Formats that set each call into control tokens of its own, with its arguments as JSON.

DeepSeek V3 and R1, whose calls have a fence around their arguments, and V3.1, whose calls are shorter:

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>name⏎```json⏎{…}⏎```<｜tool▁call▁end｜>…<｜tool▁calls▁end｜>
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>name<｜tool▁sep｜>{…}<｜tool▁call▁end｜>…<｜tool▁calls▁end｜>

Kimi K2, whose calls are known by `functions.name:number`:

<|tool_calls_section_begin|><|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{…}<|tool_call_end|>…
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

from vllm.entrypoints.chat.partial_text import find_first, held_back
from vllm.entrypoints.chat.tool_parsers.base import ToolParser
from vllm.entrypoints.chat.tool_parsers.json_calls import ValueScanner


class Section(NamedTuple):
    """Control tokens around all calls, around each, and between its name and its arguments."""

    begin: str
    end: str
    call_begin: str
    call_end: str
    separator: str


class SectionToolParser(ToolParser):
    """A call begins with the brace of its arguments; until then it may turn out to be text."""

    needs_special_tokens = True
    section: ClassVar[Section]

    def __init__(self, tools: list[dict[str, Any]], allowed: frozenset[str] | None = None) -> None:
        super().__init__(tools, allowed)
        self._inside = False
        # The section so far, until there is a call in it.
        self._raw = ""
        self._in_head = False
        self._value: ValueScanner | None = None

    @abstractmethod
    def read_head(self, head: str) -> str:
        """The function's name, from what stands between the call's mark and its arguments."""

    def step(self) -> bool:
        if self._value is not None:
            if not self._value.done:
                self.add_arguments(self.take(self._value.scan(self.buffer)))
            return self._value.done and self._read_rest()
        if self._in_head:
            return self._read_head()
        return self._read_between() if self._inside else self._read_text()

    def _read_text(self) -> bool:
        self._raw = self.say_until(self.section.begin)
        self._inside = bool(self._raw)
        return self._inside

    def _read_between(self) -> bool:
        """Before, between or after calls."""
        marks = (self.section.call_begin, self.section.end)
        found = find_first(self.buffer, marks)
        if found is None:
            self._drop(len(self.buffer) - held_back(self.buffer, marks))
            return False
        at, mark = found
        self._drop(at + len(mark))
        self._in_head, self._inside = mark == self.section.call_begin, mark == self.section.call_begin
        if not self._inside:
            self._be_text()
        return True

    def _read_head(self) -> bool:
        """Up to the brace that begins the arguments."""
        ends = ("{", self.section.call_begin, self.section.call_end, self.section.end)
        found = find_first(self.buffer, ends)
        if found is None:
            return False
        at, mark = found
        name = self.read_head(self.buffer[:at])
        self._in_head = False
        if mark != "{" or not name:
            self._drop(at)
            if not self.num_calls:
                self._be_text()
            return True
        self.take(at)
        self._raw = ""
        self.open_call(name)
        self._value = ValueScanner()
        return True

    def _read_rest(self) -> bool:
        """What stands between the arguments and the end of their call, which is nothing but the fence."""
        marks = (self.section.call_end, self.section.call_begin, self.section.end)
        found = find_first(self.buffer, marks)
        if found is None:
            self.take(len(self.buffer) - held_back(self.buffer, marks))
            return False
        at, mark = found
        self.take(at + (len(mark) if mark == self.section.call_end else 0))
        self._value = None
        return True

    def _drop(self, size: int) -> None:
        """Takes what is content only if no call comes."""
        dropped = self.take(size)
        if self._raw:
            self._raw += dropped

    def _be_text(self) -> None:
        self.say(self._raw)
        self._raw, self._inside = "", False

    def end(self) -> None:
        if self._in_head:
            self._drop(len(self.buffer))
        self._be_text() if self._raw else None
        if not self._inside and self._value is None:
            self.say(self.take(len(self.buffer)))


class DeepSeekV3ToolParser(SectionToolParser):
    section = Section(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    )

    def read_head(self, head: str) -> str:
        before, _, after = head.partition(self.section.separator)
        return after.strip().partition("\n")[0].strip() or before.strip()


class KimiK2ToolParser(SectionToolParser):
    section = Section(
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        "<|tool_call_argument_begin|>",
    )

    def __init__(self, tools: list[dict[str, Any]], allowed: frozenset[str] | None = None) -> None:
        super().__init__(tools, allowed)
        self._id = ""

    def make_id(self) -> str:
        # The template shows it to the model again.
        return self._id or super().make_id()

    def read_head(self, head: str) -> str:
        self._id = head.partition(self.section.separator)[0].strip()
        return self._id.rpartition(":")[0].removeprefix("functions.") or self._id
