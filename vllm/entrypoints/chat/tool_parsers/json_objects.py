"""Formats whose calls are JSON objects between marks: `MARK {"name": …, "arguments": {…}} MARK`, one or a list of them.

A format is a row of `Marks`; the machine is one for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vllm.entrypoints.chat.partial_text import find_first, held_back
from vllm.entrypoints.chat.tool_parsers.base import ToolParser
from vllm.entrypoints.chat.tool_parsers.json_calls import CallReader

_BETWEEN = "[],;"


@dataclass(frozen=True)
class Marks:
    """What stands around the objects.

    Attributes:
        begins: Any of them begins a section of calls.
        ends: Any of them ends it. Without one, whatever is no object ends it.
        fillers: What may stand between a mark and the objects.
        is_bare: An answer whose first letter is a bracket or a brace is a section, too.
    """

    begins: tuple[str, ...]
    ends: tuple[str, ...] = ()
    fillers: tuple[str, ...] = ()
    is_bare: bool = False


class JsonToolParser(ToolParser):
    """A section that does not begin with a call is text, all of it."""

    marks: ClassVar[Marks]

    def __init__(self, tools: list[dict[str, Any]], allowed: frozenset[str] | None = None) -> None:
        super().__init__(tools, allowed)
        self._call: CallReader | None = None
        self._inside = False
        # The section so far, until there is a call in it.
        self._raw: str | None = None
        self._begun = not self.marks.is_bare

    def step(self) -> bool:
        if self._call is not None:
            return self._read_call(self._call)
        return self._read_between() if self._inside else self._read_text()

    def _read_text(self) -> bool:
        if not self._begun:
            space = len(self.buffer) - len(self.buffer.lstrip())
            if space == len(self.buffer):
                return False
            self._begun = True
            if self.buffer[space] in "[{":
                self._inside, self._raw = True, self.take(space)
                return True
        mark = self.say_until(*self.marks.begins)
        if mark:
            self._inside, self._raw = True, mark
        return bool(mark)

    def _read_between(self) -> bool:
        """Before, between or after the objects of a section."""
        self._drop(len(self.buffer) - len(self.buffer.lstrip()))
        if not self.buffer:
            return False
        known = (*self.marks.ends, *self.marks.begins)
        if self.buffer[0] == "{":
            # Bare objects may be the answer itself.
            self._call = CallReader(self.open_call, self.add_arguments, sure=self.marks.is_bare)
            return True
        if self._raw is None and (found := find_first(self.buffer, known)) is not None and found[0] == 0:
            self.take(len(found[1]))
            self._inside = found[1] not in self.marks.ends
            self._raw = found[1] if self._inside else None
            return True
        if self.may_grow_to(*known, *self.marks.fillers):
            return False
        filler = next((f for f in self.marks.fillers if self.buffer.startswith(f)), "")
        if filler and self._raw is not None:
            self._drop(len(filler))
        elif self.buffer[0] in _BETWEEN:
            self._drop(1)
        elif self._raw is not None or not self.marks.ends or self.marks.is_bare:
            self._be_text()
        else:
            # What follows a call up to its end mark, which some outputs forget, belongs to nothing.
            found = find_first(self.buffer, known)
            self.take(len(self.buffer) - held_back(self.buffer, known) if found is None else found[0])
            return found is not None
        return True

    def _read_call(self, call: CallReader) -> bool:
        self.take(call.read(self.buffer))
        if call.opened:
            self._raw = None
        if not call.done and not call.broken:
            return False
        self._call = None
        if not call.opened:
            self._be_text(call.text)
        return True

    def _drop(self, size: int) -> None:
        """Takes what is content only if no call comes."""
        dropped = self.take(size)
        if self._raw is not None:
            self._raw += dropped

    def _be_text(self, text: str = "") -> None:
        self.say((self._raw or "") + text)
        self._inside, self._raw = False, None

    def end(self) -> None:
        if self._call is not None and not self._call.opened:
            self._be_text(self._call.text)
        if self._call is None or not self._call.opened:
            if self._raw is not None:
                self._be_text()
            self.say(self.take(len(self.buffer)) if not self._inside or self.marks.is_bare else "")


class HermesToolParser(JsonToolParser):
    """Hermes, Qwen 2.5 and 3, Granite 4, ERNIE 4.5: `<tool_call>{…}</tool_call>`."""

    marks = Marks(("<tool_call>",), ("</tool_call>",))


class LongCatToolParser(JsonToolParser):
    """LongCat: `<longcat_tool_call>{…}</longcat_tool_call>`."""

    marks = Marks(("<longcat_tool_call>",), ("</longcat_tool_call>",))


class GraniteToolParser(JsonToolParser):
    """Granite 3: `<|tool_call|>[{…}, …]`, with `<tool_call>` in some versions."""

    needs_special_tokens = True
    marks = Marks(("<|tool_call|>", "<tool_call>"))


class JambaToolParser(JsonToolParser):
    """Jamba and Hunyuan A13B: `<tool_calls>[{…}, …]</tool_calls>`."""

    marks = Marks(("<tool_calls>",), ("</tool_calls>",))


class Phi4MiniToolParser(JsonToolParser):
    """Phi 4 mini: `functools[{…}, …]`."""

    marks = Marks(("functools",))


class InternLMToolParser(JsonToolParser):
    """InternLM 2.5: `<|action_start|><|plugin|>{"name": …, "parameters": {…}}<|action_end|>`."""

    needs_special_tokens = True
    marks = Marks(("<|action_start|><|plugin|>", "<|action_start|> <|plugin|>"), ("<|action_end|>",))


class XLAMToolParser(JsonToolParser):
    """xLAM: a list of objects, bare or between marks that differ from version to version."""

    needs_special_tokens = True
    marks = Marks(("[TOOL_CALLS]", "<tool_call>", "```"), ("</tool_call>", "```"), ("json",), is_bare=True)
