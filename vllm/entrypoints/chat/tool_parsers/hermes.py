"""Hermes and Qwen 2.5 / 3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.chat.partial_text import find_first, held_back
from vllm.entrypoints.chat.tool_parsers.base import ToolParser
from vllm.entrypoints.chat.tool_parsers.json_calls import CallReader

_START = "<tool_call>"
_END = "</tool_call>"


class HermesToolParser(ToolParser):
    def __init__(self, tools: list[dict[str, Any]], allowed: frozenset[str] | None = None) -> None:
        super().__init__(tools, allowed)
        self._call: CallReader | None = None

    def step(self) -> bool:
        if self._call is None:
            return self._read_text()
        if not self._call.done and not self._call.broken:
            self.take(self._call.read(self.buffer))
            if not self._call.done and not self._call.broken:
                return False
        return self._read_rest(self._call)

    def _read_text(self) -> bool:
        if not self.say_until(_START):
            return False
        self._call = CallReader(self.open_call, self.add_arguments)
        return True

    def _read_rest(self, call: CallReader) -> bool:
        """What comes before the end mark, which some outputs forget. It belongs to nothing, unless there is no call."""
        found = find_first(self.buffer, (_START, _END))
        if found is None:
            if call.opened:
                self.take(len(self.buffer) - held_back(self.buffer, (_START, _END)))
            return False
        at, mark = found
        if not call.opened:
            self.say(_START + call.text + self.buffer[:at] + (_END if mark == _END else ""))
        self.buffer = self.buffer[at + (len(_END) if mark == _END else 0) :]
        self._call = None
        return True

    def end(self) -> None:
        if self._call is None:
            self.say(self.take(len(self.buffer)))
        elif not self._call.opened:
            self.say(_START + self._call.text + self.take(len(self.buffer)))
