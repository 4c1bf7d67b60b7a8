"""Mistral: `[TOOL_CALLS]` and either `[{"name": …, "arguments": {…}}, …]` or, from version 11 of its tokenizer on,
`name{…}`, with `[CALL_ID]…` and `[ARGS]` between in some versions."""

from __future__ import annotations

import random
import re
import string
from typing import Any

from vllm.entrypoints.chat.partial_text import find_first
from vllm.entrypoints.chat.tool_parsers.base import ToolParser
from vllm.entrypoints.chat.tool_parsers.json_calls import CallReader, ValueScanner

_START = "[TOOL_CALLS]"
_NO_NAME = re.compile(r"\s")
_AFTER_NAME = ("[CALL_ID]", "[ARGS]", "{")


class MistralToolParser(ToolParser):
    needs_special_tokens = True

    def __init__(self, tools: list[dict[str, Any]], allowed: frozenset[str] | None = None) -> None:
        super().__init__(tools, allowed)
        self._inside = False
        self._in_list = False
        # What was taken since the mark, until there is a call.
        self._raw = ""
        self._call: CallReader | None = None
        self._value: ValueScanner | None = None

    def make_id(self) -> str:
        # Mistral's templates take no other ids.
        return "".join(random.choices(string.ascii_letters + string.digits, k=9))

    def step(self) -> bool:
        if self._call is not None:
            return self._read_call(self._call)
        if self._value is not None:
            self.add_arguments(self.take(self._value.scan(self.buffer)))
            if self._value.done:
                self._value, self._inside = None, False
            return bool(self.buffer)
        if not self._inside:
            return self._read_text()
        return self._read_between() if self._in_list else self._read_name()

    def _read_text(self) -> bool:
        self._raw = self.say_until(_START)
        self._inside = bool(self._raw)
        return self._inside

    def _read_name(self) -> bool:
        """What follows the mark: a list, or a name and where its arguments begin."""
        self._drop(len(self.buffer) - len(self.buffer.lstrip()))
        if self.buffer.startswith("[") and not any(m.startswith(self.buffer[: len(m)]) for m in _AFTER_NAME[:2]):
            self._drop(1)
            self._in_list = True
            return True
        found = find_first(self.buffer, _AFTER_NAME)
        at = self.buffer.find("{")
        if found is None or at < 0:
            return False
        name = self.buffer[: found[0]].strip()
        if not name:
            self.take(at)
            self._call = CallReader(self.open_call, self.add_arguments)
        elif _NO_NAME.search(name):
            self._be_text()
        else:
            self.take(at)
            self._raw = ""
            self.open_call(name)
            self._value = ValueScanner()
        return True

    def _read_between(self) -> bool:
        """Before, between or after the objects of a list."""
        self._drop(len(self.buffer) - len(self.buffer.lstrip()))
        if not self.buffer:
            return False
        if self.buffer[0] == "{":
            self._call = CallReader(self.open_call, self.add_arguments)
        elif self.buffer[0] == "]":
            self._drop(1)
            self._be_text()
        elif self._raw:
            self._be_text()
        else:
            self.take(1)
        return True

    def _read_call(self, call: CallReader) -> bool:
        self.take(call.read(self.buffer))
        if call.opened:
            self._raw = ""
        if not call.done and not call.broken:
            return False
        self._call = None
        self._inside = self._in_list
        if not call.opened:
            self._be_text(call.text)
        return True

    def _drop(self, size: int) -> None:
        """Takes what is content only if no call comes."""
        dropped = self.take(size)
        if self._raw:
            self._raw += dropped

    def _be_text(self, text: str = "") -> None:
        self.say(self._raw + text)
        self._raw, self._inside, self._in_list = "", False, False

    def end(self) -> None:
        if self._call is not None and not self._call.opened:
            self._be_text(self._call.text)
        elif self._value is None and self._call is None:
            self.say(self._raw * self._inside + self.take(len(self.buffer)))
