"""DeepSeek V3 and R1, whose calls have a fence around their arguments, and V3.1, whose calls are shorter:

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>name⏎```json⏎{…}⏎```<｜tool▁call▁end｜>…<｜tool▁calls▁end｜>
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>name<｜tool▁sep｜>{…}<｜tool▁call▁end｜>…<｜tool▁calls▁end｜>
"""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.chat.partial_text import find_first, held_back
from vllm.entrypoints.chat.tool_parsers.base import ToolParser
from vllm.entrypoints.chat.tool_parsers.json_calls import ValueScanner

_BEGIN = "<｜tool▁calls▁begin｜>"
_END = "<｜tool▁calls▁end｜>"
_CALL_BEGIN = "<｜tool▁call▁begin｜>"
_CALL_END = "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"


class DeepSeekV3ToolParser(ToolParser):
    needs_special_tokens = True

    def __init__(self, tools: list[dict[str, Any]], allowed: frozenset[str] | None = None) -> None:
        super().__init__(tools, allowed)
        self._inside = False
        self._in_head = False
        self._value: ValueScanner | None = None

    def step(self) -> bool:
        if self._value is not None:
            if not self._value.done:
                self.add_arguments(self.take(self._value.scan(self.buffer)))
            return self._value.done and self._read_rest()
        if self._in_head:
            return self._read_head()
        return self._read_between() if self._inside else self._read_text()

    def _read_text(self) -> bool:
        self._inside = self.say_until(_BEGIN)
        return self._inside

    def _read_between(self) -> bool:
        """Before, between or after calls."""
        found = find_first(self.buffer, (_CALL_BEGIN, _END))
        if found is None:
            self.take(len(self.buffer) - held_back(self.buffer, (_CALL_BEGIN, _END)))
            return False
        at, mark = found
        self.take(at + len(mark))
        self._in_head, self._inside = mark == _CALL_BEGIN, mark == _CALL_BEGIN
        return True

    def _read_head(self) -> bool:
        """Up to the brace that begins the arguments."""
        brace = self.buffer.find("{")
        if brace < 0:
            return False
        head, _, rest = self.take(brace).partition(_SEPARATOR)
        line = rest.strip().partition("\n")[0].strip()
        self.open_call(line or head.strip())
        self._in_head, self._value = False, ValueScanner()
        return True

    def _read_rest(self) -> bool:
        """What stands between the arguments and the end of their call, which is nothing but the fence."""
        found = find_first(self.buffer, (_CALL_END, _CALL_BEGIN, _END))
        if found is None:
            self.take(len(self.buffer) - held_back(self.buffer, (_CALL_END, _CALL_BEGIN, _END)))
            return False
        at, mark = found
        self.take(at + (len(mark) if mark == _CALL_END else 0))
        self._value = None
        return True

    def end(self) -> None:
        if not self._inside:
            self.say(self.take(len(self.buffer)))
