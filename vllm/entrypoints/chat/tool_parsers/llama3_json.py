"""Llama 3.1 to 3.3: the answer is `{"name": …, "parameters": {…}}`, several of them separated by semicolons."""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.chat.tool_parsers.base import ToolParser
from vllm.entrypoints.chat.tool_parsers.json_calls import CallReader

_TAG = "<|python_tag|>"


class Llama3JsonToolParser(ToolParser):
    """An object that has no name or no parameters is an answer in JSON: content."""

    needs_special_tokens = True

    def __init__(self, tools: list[dict[str, Any]], allowed: frozenset[str] | None = None) -> None:
        super().__init__(tools, allowed)
        self._call: CallReader | None = None
        self._is_text = False
        self._skipped = ""

    def step(self) -> bool:
        if self._is_text:
            self.say(self.take(len(self.buffer)))
            return False
        if self._call is None:
            return self._read_start()
        self.take(self._call.read(self.buffer))
        if self._call.broken:
            self._be_text("" if self._call.opened else self._skipped + self._call.text)
        elif self._call.done:
            self._call, self._skipped = None, ""
        else:
            return False
        return True

    def _read_start(self) -> bool:
        """Takes what may stand before an object; behind a call it is nothing to keep."""
        self._skipped = "" if self.num_calls else self._skipped
        self._skipped += self.skip_space()
        if not self.buffer:
            return False
        if self.buffer.startswith("{"):
            self._call = CallReader(self.open_call, self.add_arguments, sure=True)
        elif self.num_calls and self.buffer[0] in ";,":
            self._skipped += self.take(1)
        elif self.buffer.startswith(_TAG):
            self._skipped += self.take(len(_TAG))
        elif _TAG.startswith(self.buffer):
            return False
        else:
            self._be_text("" if self.num_calls else self._skipped)
        return True

    def _be_text(self, text: str) -> None:
        self._is_text, self._call, self._skipped = True, None, ""
        self.buffer = text + self.buffer

    def end(self) -> None:
        if self._call is None:
            self.say(self._skipped + self.take(len(self.buffer)))
        elif not self._call.opened:
            self.say(self._skipped + self._call.text + self.take(len(self.buffer)))
