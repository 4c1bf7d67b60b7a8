"""Calls as JSON objects, `{"name": …, "arguments": {…}}`, that are read while they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Container
from enum import Enum, auto

_ARGUMENTS = ("arguments", "parameters")
_SPACE = " \t\r\n"


class ValueScanner:
    """Finds the end of a JSON value: by its brackets and quotes, so that what is wrong inside does no harm."""

    def __init__(self) -> None:
        self.done = False
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._scalar = False

    def scan(self, text: str) -> int:
        """How many characters of `text` belong to the value, which begins or goes on with them."""
        for i, letter in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif letter == "\\":
                    self._escaped = True
                elif letter == '"':
                    self._in_string = False
                    if not self._depth:
                        self.done = True
                        return i + 1
            elif letter == '"':
                self._in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                if not self._depth:  # the end of what holds a number or a word
                    self.done = True
                    return i
                self._depth -= 1
                if not self._depth:
                    self.done = True
                    return i + 1
            elif not self._depth and (letter == "," or letter in _SPACE):
                self.done = True
                return i
        return len(text)


class _State(Enum):
    START = auto()  # before the brace
    MEMBER = auto()  # before a key, a comma or the end
    KEY = auto()
    COLON = auto()
    VALUE_START = auto()
    VALUE = auto()


class CallReader:
    """Reads one object that stands for a call.

    Args:
        open_call: Called with the name once the arguments begin, or at the end of an object that has none.
        add_arguments: Called with their text, piece by piece.
        sure: Only an object with a name and arguments is a call.
        names: Only one with such a name is; None for any.

    Attributes:
        done: The object has ended.
        broken: It is no call: not an object, or one without such a name.
        opened: `open_call` was called.
        text: What was read, until `open_call` was called.
    """

    def __init__(
        self,
        open_call: Callable[[str], None],
        add_arguments: Callable[[str], None],
        *,
        sure: bool = False,
        names: Container[str] | None = None,
    ) -> None:
        self._open_call = open_call
        self._add_arguments = add_arguments
        self._sure = sure
        self._names = names
        self._state = _State.START
        self._scanner = ValueScanner()
        self._value = ""
        self._key = ""
        self._name: str | None = None
        self._arguments: str | None = None
        self._streams = False
        self.done = False
        self.broken = False
        self.opened = False
        self.text = ""

    def read(self, text: str) -> int:
        """How many characters of `text` were taken; all of them unless the object ended or is broken."""
        at = 0
        while at < len(text) and not self.done and not self.broken:
            if self._state in (_State.KEY, _State.VALUE):
                at += self._read_value(text[at:])
            elif self._read_mark(text[at]):
                at += 1
        if not self.opened:
            self.text += text[:at]
        return at

    def _read_mark(self, letter: str) -> bool:
        """Takes what is not part of a key or value; returns whether it was taken."""
        if letter in _SPACE:
            return True
        match self._state, letter:
            case _State.START, "{":
                self._state = _State.MEMBER
            case _State.MEMBER, ",":
                pass
            case _State.MEMBER, "}":
                self._close()
            case _State.MEMBER, '"':
                self._begin(_State.KEY)
                return False
            case _State.COLON, ":":
                self._state = _State.VALUE_START
            case _State.VALUE_START, _:
                self._begin(_State.VALUE)
                if self._key in _ARGUMENTS and self._arguments is None and self._name is not None:
                    self._open()
                    # Arguments as the text of a JSON string can be handed on only when it is whole.
                    self._streams = letter != '"'
                return False
            case _:
                self.broken = True
                return False
        return True

    def _begin(self, state: _State) -> None:
        self._state, self._scanner, self._value, self._streams = state, ValueScanner(), "", False

    def _read_value(self, text: str) -> int:
        size = self._scanner.scan(text)
        if self._streams:
            self._add_arguments(text[:size])
        self._value += text[:size]
        if self._scanner.done:
            self._end_value()
        return size

    def _end_value(self) -> None:
        if self._state == _State.KEY:
            self._key, self._state = _string(self._value) or "", _State.COLON
            return
        self._state = _State.MEMBER
        if self._key == "name" and self._name is None:
            self._name = _string(self._value)
            if self._name is None:
                self.broken = True
            elif self._arguments is not None:
                self._open()
        elif self._key in _ARGUMENTS and self._arguments is None:
            unquoted = _string(self._value)
            self._arguments = self._value if unquoted is None else unquoted
            if self.opened and not self._streams:
                self._add_arguments(self._arguments)

    def _open(self) -> None:
        if self.opened or self._name is None:
            return
        if self._names is not None and self._name not in self._names:
            self.broken = True
            return
        self.opened = True
        self._open_call(self._name)
        if self._arguments is not None:
            self._add_arguments(self._arguments)

    def _close(self) -> None:
        if not self._sure:
            self._open()
        self.done, self.broken = self.opened, not self.opened
        if self.opened and self._arguments is None:
            self._add_arguments("{}")


def _string(text: str) -> str | None:
    """The string that a JSON text stands for; None if it stands for something else."""
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None
