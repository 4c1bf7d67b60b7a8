"""Gemma 4: `<|tool_call>call:name{key:<|"|>text<|"|>,other:[1,{deep:true}]}<tool_call|>`."""

from __future__ import annotations

import json
import re
from typing import Any

from vllm.entrypoints.chat.partial_text import find_first
from vllm.entrypoints.chat.tool_parsers.base import ToolParser

_BEGIN = "<|tool_call>"
_END = "<tool_call|>"
_QUOTE = '<|"|>'
_HEAD = re.compile(r"\s*call:\s*([^\s{}<>]+)\s*(?=\{)")
_KEY = re.compile(r"\s*([^\s:{}\[\],]+)\s*:")
_WORD = re.compile(r"[^,\]}\s]+")
_MAX_DEPTH = 64


class Gemma4ToolParser(ToolParser):
    """A call is handed on when it is whole, since its arguments have to be rewritten as JSON."""

    needs_special_tokens = True

    def __init__(self, tools: list[dict[str, Any]], allowed: frozenset[str] | None = None) -> None:
        super().__init__(tools, allowed)
        self._inside = False
        # How much of the call was looked at, and whether that ends within a text.
        self._seen = 0
        self._in_text = False

    def step(self) -> bool:
        if not self._inside:
            self._inside = bool(self.say_until(_BEGIN))
            self._seen, self._in_text = 0, False
            return self._inside
        # The end mark within a text is part of it.
        found = find_first(self.buffer[self._seen :], (_QUOTE,) if self._in_text else (_QUOTE, _END))
        if found is None:
            # What may be the beginning of a mark is looked at again.
            self._seen = max(self._seen, len(self.buffer) - len(_END))
            return False
        at, mark = found
        self._seen += at + len(mark)
        if mark == _QUOTE:
            self._in_text = not self._in_text
            return True
        source = self.take(self._seen)
        call = _parse(source[: -len(_END)])
        self._inside = False
        if call is None:
            self.say(_BEGIN + source)
        else:
            self.open_call(call[0])
            self.add_arguments(call[1])
        return True

    def end(self) -> None:
        self.say((_BEGIN if self._inside else "") + self.take(len(self.buffer)))


def _parse(source: str) -> tuple[str, str] | None:
    """Name and arguments, as JSON, of a call; None if it is none."""
    head = _HEAD.match(source)
    if head is None:
        return None
    try:
        value, end = _value(source, head.end(), 0)
    except ValueError:
        return None
    return None if source[end:].strip() else (head[1], json.dumps(value, ensure_ascii=False))


def _value(source: str, at: int, depth: int) -> tuple[Any, int]:
    """The value that begins there, and where it ends; raises ValueError if there is none."""
    at = _skip(source, at)
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if source.startswith(_QUOTE, at):
        end = source.index(_QUOTE, at + len(_QUOTE))
        return source[at + len(_QUOTE) : end], end + len(_QUOTE)
    if source.startswith("{", at):
        return _members(source, at + 1, depth)
    if source.startswith("[", at):
        return _elements(source, at + 1, depth)
    word = _WORD.match(source, at)
    if word is None:
        raise ValueError("no value")
    try:
        value = json.loads(word[0], parse_constant=str)
    except ValueError:
        value = word[0]
    return value, word.end()


def _members(source: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    made: dict[str, Any] = {}
    at = _skip(source, at)
    while not source.startswith("}", at):
        if source.startswith(_QUOTE, at):
            key, at = _value(source, at, depth + 1)
            at = source.index(":", at) + 1
        else:
            found = _KEY.match(source, at)
            if found is None:
                raise ValueError("no key")
            key, at = found[1], found.end()
        made[key], at = _value(source, at, depth + 1)
        at = _after(source, at, "}")
    return made, at + 1


def _elements(source: str, at: int, depth: int) -> tuple[list[Any], int]:
    made = []
    at = _skip(source, at)
    while not source.startswith("]", at):
        value, at = _value(source, at, depth + 1)
        made.append(value)
        at = _after(source, at, "]")
    return made, at + 1


def _after(source: str, at: int, end: str) -> int:
    """Where the next member or the end begins."""
    at = _skip(source, at)
    if source.startswith(",", at):
        return _skip(source, at + 1)
    if not source.startswith(end, at):
        raise ValueError("neither a comma nor the end")
    return at


def _skip(source: str, at: int) -> int:
    while source[at : at + 1].isspace():
        at += 1
    return at
