"""Llama 3.1 to 3.3: the answer is `{"name": …, "parameters": {…}}`, several of them separated by semicolons."""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.chat.tool_parsers.base import ToolParser
from vllm.entrypoints.chat.tool_parsers.json_calls import CallReader

_TAG = "<|python_tag|>"


class Llama3JsonToolParser(ToolParser):
    """An object that has no name or no parameters is an answer in JSON: content.

    Text may stand before the object; behind text, only an object with the name of a function that is offered is a call.
    """

    needs_special_tokens = True

    def __init__(self, tools: list[dict[str, Any]], allowed: frozenset[str] | None = None) -> None:
        super().__init__(tools, allowed)
        self._call: CallReader | None = None
        self._follows_text = False
        # A mark before the object, or what separates it from the one before.
        self._skipped = ""

    def step(self) -> bool:
        if self._call is None:
            return self._read_text()
        self.take(self._call.read(self.buffer))
        if not self._call.broken and not self._call.done:
            return False
        if not self._call.opened:
            self._say_skipped(self._call.text)
        self._call, self._skipped = None, ""
        return True

    def _read_text(self) -> bool:
        if self.num_calls and not self._follows_text and self.buffer[:1] in (";", ",", " ", "\n"):
            self._skipped += self.take(1)
            return bool(self.buffer)
        if not self.buffer:
            return False
        if self.buffer.startswith("{"):
            names = self.parameters if self._follows_text else None
            self._call = CallReader(self.open_call, self.add_arguments, sure=True, names=names)
            return True
        if self.buffer.startswith(_TAG):
            self._skipped += self.take(len(_TAG))
            return True
        if self.may_grow_to(_TAG):
            return False
        ends = [at for mark in ("{", _TAG[0]) if (at := self.buffer.find(mark, 1)) > 0]
        text = self.take(min(ends, default=len(self.buffer)))
        if self.num_calls and not self._follows_text:
            self._skipped = ""
        self._say_skipped(text)
        return bool(self.buffer)

    def _say_skipped(self, text: str) -> None:
        self.say(self._skipped + text)
        self._skipped = ""
        self._follows_text |= bool(text.strip())

    def end(self) -> None:
        rest = "" if self._call is None else "" if self._call.opened else self._call.text
        if self._call is None or not self._call.opened:
            self.say(("" if self.num_calls and not rest else self._skipped) + rest + self.take(len(self.buffer)))
