"""What tool parsers have in common: text comes in pieces, text and calls go out as events."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from typing import Any

from vllm.entrypoints.chat.events import CallArguments, CallBegun, CallEnded, PartEvent, Text
from vllm.entrypoints.chat.partial_text import find_first, held_back


class ToolParser(ABC):
    """Finds the calls in one output while it comes.

    All that `feed` and `finish` return, joined, does not depend on how the text was split: whatever could still turn
    out to be something else is held back. Arguments are handed on as the model wrote them where it writes JSON, valid
    or not. White space around calls is no content.

    Subclasses take from `self.buffer` in `step` and tell what they found with `say`, `open_call` and `add_arguments`.

    Args:
        tools: Functions that the request offers.
        allowed: Names of those that may be called; None for all. A call of another one is text.

    Attributes:
        needs_special_tokens: Marks of the format are control tokens, so the text must show those.
        reads_reasoning: It tells reasoning as well, and reads answers from their very beginning.
        num_calls: Calls found so far.
    """

    needs_special_tokens = False
    reads_reasoning = False

    def __init__(self, tools: list[dict[str, Any]], allowed: frozenset[str] | None = None) -> None:
        self.parameters = {t["function"]["name"]: t["function"].get("parameters") or {} for t in tools}
        self._allowed = allowed
        self.buffer = ""
        self.num_calls = 0
        self._events: list[PartEvent] = []
        # Of one event that grows: more of the open call's arguments, or else text.
        self._pieces: list[str] = []
        self._call_is_open = self._has_arguments = False
        self._space = ""

    def feed(self, text: str) -> list[PartEvent]:
        """Takes in text; returns what is certain and new."""
        self.buffer += text
        while self.step():
            pass
        return self._take()

    def finish(self) -> list[PartEvent]:
        """The output has ended; returns what was held back."""
        self.end()
        if not self.num_calls:
            self._pieces.append(self._space)
        self._close_call()
        return self._take()

    def begin(self, reasoning_ended: bool) -> None:  # noqa: B027 - most parsers have nothing to do
        """Comes first: whether the prompt has ended the reasoning, which matters to parsers that read it."""

    @abstractmethod
    def step(self) -> bool:
        """Takes what is certain from the buffer; returns whether there may be more to take."""

    @abstractmethod
    def end(self) -> None:
        """Takes what is left in the buffer."""

    def say_until(self, *marks: str) -> str:
        """Says what stands before the first of `marks` and drops both; returns which one it was. Without one, what may
        be its beginning stays, and the answer is an empty text."""
        found = find_first(self.buffer, marks)
        if found is None:
            self.say(self.take(len(self.buffer) - held_back(self.buffer, marks)))
            return ""
        at, mark = found
        self.say(self.take(at))
        self.take(len(mark))
        return mark

    def may_grow_to(self, *marks: str) -> bool:
        """Whether the buffer is the beginning of one of these marks."""
        return any(mark.startswith(self.buffer) and mark != self.buffer for mark in marks)

    def make_id(self) -> str:
        """The id of a new call."""
        return f"chatcmpl-tool-{uuid.uuid4().hex}"

    def say(self, text: str) -> None:
        """Content. White space at its end waits for what follows: before and between calls it is dropped."""
        shown = text.rstrip()
        if not shown:
            self._space += text
            return
        self._close_call()
        self._pieces.append(self._space + shown)
        self._space = text[len(shown) :]

    def open_call(self, name: str) -> None:
        """A call of a function begins; its arguments follow by `add_arguments`."""
        if self._allowed is not None and name not in self._allowed:
            self.say(name)
            return
        self._close_call()
        self._flush()
        self._space = ""
        self._call_is_open, self._has_arguments = True, False
        self._events.append(CallBegun(self.num_calls, self.make_id(), name))
        self.num_calls += 1

    def add_arguments(self, text: str) -> None:
        """More of the arguments of the call that was opened last."""
        self._pieces.append(text)

    def take(self, size: int) -> str:
        """The first `size` characters of the buffer, which are gone from it then."""
        taken, self.buffer = self.buffer[:size], self.buffer[size:]
        return taken

    def skip_space(self) -> str:
        """White space at the start of the buffer, which is gone from it then."""
        return self.take(len(self.buffer) - len(self.buffer.lstrip()))

    def _close_call(self) -> None:
        if self._call_is_open:
            if not self._pieces and not self._has_arguments:
                self._pieces.append("{}")
            self._flush()
            self._call_is_open = False
            self._events.append(CallEnded(self.num_calls - 1))

    def _flush(self) -> None:
        text = "".join(self._pieces)
        self._pieces.clear()
        if text:
            self._has_arguments = True
            self._events.append(CallArguments(self.num_calls - 1, text) if self._call_is_open else Text(text))

    def _take(self) -> list[PartEvent]:
        self._flush()
        events, self._events = self._events, []
        return events
