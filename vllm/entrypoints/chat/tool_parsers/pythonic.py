"""Calls in Python's words.

Llama 3.2, Llama 4 and ToolACE: the answer is a list of calls, `[look_up(city="Rome", days=2), …]`.
OLMo 3: a call a line, `<function_calls>look_up(city="Rome")⏎…</function_calls>`.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from vllm.entrypoints.chat.partial_text import find_first
from vllm.entrypoints.chat.tool_parsers.base import ToolParser

_TAGS = ("<|python_start|>", "<|python_end|>")
_BEGINS = re.compile(r"\[\s*[A-Za-z_][\w.-]*\s*\(")
_MAY_BEGIN = re.compile(r"\[\s*([A-Za-z_][\w.-]*\s*)?")
_LINES_BEGIN = "<function_calls>"
_LINES_END = "</function_calls>"
_JSON_NAMES = {"true": True, "false": False, "null": None}


class PythonicToolParser(ToolParser):
    """A call is handed on when it is whole, since its arguments have to be rewritten as JSON."""

    needs_special_tokens = True

    def __init__(self, tools: list[dict[str, Any]], allowed: frozenset[str] | None = None) -> None:
        super().__init__(tools, allowed)
        self._is_text = False
        self._inside = False
        self._ended = False
        # How much of the buffer was looked at, and where in the call that is.
        self._seen = 0
        self._depth = 0
        self._quote = ""
        self._skipped = ""

    def step(self) -> bool:
        if self._is_text:
            self.say(self.take(len(self.buffer)))
            return False
        if self._inside:
            return self._read_call()
        return self._read_start()

    def _read_start(self) -> bool:
        self._skip(len(self.buffer) - len(self.buffer.lstrip()))
        for tag in _TAGS:
            if self.buffer.startswith(tag):
                self._skip(len(tag))
                return True
        if any(tag.startswith(self.buffer) for tag in _TAGS):
            return False
        if not self._ended and _BEGINS.match(self.buffer):
            self._skipped += self.take(1)
            self._inside = True
        elif not self._ended and _MAY_BEGIN.fullmatch(self.buffer):
            return False
        else:
            self._be_text("" if self._ended else self._skipped)
        return True

    def _skip(self, size: int) -> None:
        """Takes what is content only if no call comes."""
        skipped = self.take(size)
        if not self._ended:
            self._skipped += skipped

    def _read_call(self) -> bool:
        """Looks for the comma or bracket that ends a call."""
        while self._seen < len(self.buffer):
            letter = self.buffer[self._seen]
            if self._quote:
                if letter == "\\":
                    if self._seen + 1 == len(self.buffer):
                        return False
                    self._seen += 1
                elif letter == self._quote:
                    self._quote = ""
            elif letter in "\"'":
                self._quote = letter
            elif letter in "([{":
                self._depth += 1
            elif self._depth and letter in ")]}":
                self._depth -= 1
            elif letter in ",]" and not self._depth:
                return self._end_call(letter)
            self._seen += 1
        return False

    def _end_call(self, mark: str) -> bool:
        source = self.take(self._seen + 1)[:-1]
        self._seen = 0
        call = _parse(source)
        if call is not None:
            self._skipped = ""
            self.open_call(call[0])
            self.add_arguments(call[1])
        elif not self.num_calls:
            self._be_text(self._skipped + source + mark)
            return True
        elif source.strip():
            self.say(source)
        if mark == "]":
            self._inside, self._ended = False, True
        return True

    def _be_text(self, text: str) -> None:
        self._is_text, self._skipped = True, ""
        self.buffer = text + self.buffer

    def end(self) -> None:
        if not self._inside or not self.num_calls:
            self.say(self._skipped + self.take(len(self.buffer)))


class Olmo3ToolParser(ToolParser):
    """A call is handed on when its line is whole."""

    needs_special_tokens = True

    def __init__(self, tools: list[dict[str, Any]], allowed: frozenset[str] | None = None) -> None:
        super().__init__(tools, allowed)
        self._inside = False
        # The mark before the first call of a section.
        self._raw = ""
        self._seen = 0

    def step(self) -> bool:
        if not self._inside:
            self._raw = self.say_until(_LINES_BEGIN)
            self._inside, self._seen = bool(self._raw), 0
            return self._inside
        found = find_first(self.buffer[self._seen :], ("\n", _LINES_END))
        if found is None:
            self._seen = max(self._seen, len(self.buffer) - len(_LINES_END))
            return False
        end = self._seen + found[0]
        self._seen = end + len(found[1])
        source, at_end = self.buffer[:end], found[1] == _LINES_END
        call = _parse(source)
        if call is not None:
            self._raw = ""
            self.open_call(call[0])
            self.add_arguments(call[1])
        elif at_end and (source.strip() or self._raw):
            self.say(self._raw + self.buffer[: self._seen])
        if call is not None or at_end or not source.strip():
            dropped = self.take(self._seen)
            self._raw += dropped if self._raw else ""
            self._seen = 0
        self._inside = not at_end
        return True

    def end(self) -> None:
        self.say(self._raw * self._inside + self.take(len(self.buffer)))


def _parse(source: str) -> tuple[str, str] | None:
    """Name and arguments, as JSON, of a call; None if it is none or its arguments are no literals."""
    try:
        tree = ast.parse(source.strip(), mode="eval").body
        if not isinstance(tree, ast.Call) or tree.args:
            return None
        values = {k.arg: _value(k.value) for k in tree.keywords if k.arg is not None}
        return ast.unparse(tree.func), json.dumps(values, ensure_ascii=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            str(ast.literal_eval(k)): _value(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None
        }
    return ast.literal_eval(node)
