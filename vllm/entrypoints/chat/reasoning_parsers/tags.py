"""Reasoning between two marks, `<think>` and `</think>` in most families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from vllm.entrypoints.chat.partial_text import find_first, held_back


class ReasoningParser:
    """Splits one output while it comes. What both methods return, joined, does not depend on how the text is split.

    Answers begin with the reasoning, whether or not the template or the model opens it; the end mark ends it.

    Args:
        ended: The prompt ended the reasoning already: all is content. None if it neither did nor began it: then the
            output is content unless it begins with the start mark.

    Attributes:
        start, end: The marks; `starts` and `ends` have all spellings of them.
        closers: Marks that end the reasoning and belong to the content.
        frame: Marks around the content, which are left out.
        is_certain: All answers think unless the prompt says otherwise.
        needs_special_tokens: The marks are control tokens, so the text must show those.
    """

    start: ClassVar[str] = "<think>"
    end: ClassVar[str] = "</think>"
    more_starts: ClassVar[tuple[str, ...]] = ()
    more_ends: ClassVar[tuple[str, ...]] = ()
    closers: ClassVar[tuple[str, ...]] = ()
    frame: ClassVar[tuple[str, str] | None] = None
    is_certain: ClassVar[bool] = True
    needs_special_tokens: ClassVar[bool] = False

    def __init__(self, ended: bool | None) -> None:
        self._ended = bool(ended)
        self._is_open = ended is False
        self._begun = False
        self._buffer = ""
        self._content = _Frame(*self.frame) if self.frame is not None else None

    @classmethod
    def ended_in(cls, prompt: str, continued: str | None, kwargs: Mapping[str, Any]) -> bool | None:
        """Whether an answer to `prompt` has its reasoning behind it; None if only the answer will show whether it has
        any.

        Args:
            prompt: What the chat template wrote.
            continued: The message that the answer continues; None if it opens a new one.
            kwargs: Variables of the chat template.
        """
        if continued is not None:
            return _last(continued, (cls.end, *cls.more_ends)) >= _last(continued, (cls.start, *cls.more_starts))
        written = prompt.rstrip()
        if written.endswith((cls.end, *cls.more_ends)):
            return True
        is_open = written.endswith(tuple(mark.rstrip() for mark in (cls.start, *cls.more_starts)))
        return False if cls.is_certain or is_open else None

    def feed(self, text: str) -> tuple[str, str]:
        """Takes in text; returns the reasoning and the content that are certain and new."""
        reasoning, content = self._split(text)
        return reasoning, content if self._content is None else self._content.feed(content)

    def finish(self) -> tuple[str, str]:
        """The output has ended; returns what was held back."""
        rest, self._buffer = self._buffer, ""
        # Of an answer that only may have begun its reasoning, all is content.
        reasoning, content = (rest, "") if self._begun or self._is_open else ("", rest)
        return reasoning, content if self._content is None else self._content.feed(content) + self._content.finish()

    def _split(self, text: str) -> tuple[str, str]:
        if self._ended:
            return "", text
        self._buffer += text
        if not self._begun:
            thinks = self._begin()
            if thinks is None:
                return "", ""
            self._begun, self._ended = True, not thinks
            if not thinks:
                rest, self._buffer = self._buffer, ""
                return "", rest
        marks = (self.end, *self.more_ends, *self.closers)
        found = find_first(self._buffer, marks)
        if found is not None:
            at, mark = found
            before = self._buffer[:at]
            after = self._buffer[at + (0 if mark in self.closers else len(mark)) :]
            self._ended, self._buffer = True, ""
            return before, after
        certain = len(self._buffer) - held_back(self._buffer, marks)
        reasoning, self._buffer = self._buffer[:certain], self._buffer[certain:]
        return reasoning, ""

    def _begin(self) -> bool | None:
        """Takes the start mark; returns whether there is reasoning, or None while that is not known."""
        starts = (self.start, *self.more_starts)
        begun = self._buffer.lstrip()
        mark = next((mark for mark in starts if begun.startswith(mark)), None)
        if mark is not None:
            self._buffer = begun[len(mark) :]
        elif any(start.startswith(begun) for start in starts):
            return None
        return mark is not None or self._is_open


class _Frame:
    """Takes the marks around a content off, and the white space beside them. Content without the first is left as it
    is."""

    def __init__(self, begin: str, end: str) -> None:
        self._begin = begin
        self._end = end
        self._feed = self._feed_start
        self._buffer = ""

    def feed(self, text: str) -> str:
        self._buffer += text
        return self._feed()

    def finish(self) -> str:
        rest, self._buffer = self._buffer, ""
        return "" if self._feed == self._feed_rest else rest

    def _feed_start(self) -> str:
        head = self._buffer.lstrip()
        if self._begin.startswith(head) and head != self._begin:
            return ""
        if not head.startswith(self._begin):
            self._feed = self._take
            return self._take()
        self._buffer, self._feed = head[len(self._begin) :], self._feed_inner_start
        return self._feed()

    def _feed_inner_start(self) -> str:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return ""
        self._feed = self._feed_inner
        return self._feed()

    def _feed_inner(self) -> str:
        at = self._buffer.find(self._end)
        if at >= 0:
            shown, self._buffer = self._buffer[:at].rstrip(), self._buffer[at + len(self._end) :]
            self._feed = self._feed_rest
            return shown + self._feed()
        # White space may be what stands before the end mark.
        certain = len(self._buffer) - held_back(self._buffer, (self._end,))
        certain = len(self._buffer[:certain].rstrip())
        shown, self._buffer = self._buffer[:certain], self._buffer[certain:]
        return shown

    def _feed_rest(self) -> str:
        """What follows the end mark, such as calls of tools; white space alone is nothing."""
        return self._take() if self._buffer.strip() else ""

    def _take(self) -> str:
        taken, self._buffer = self._buffer, ""
        return taken


def _last(text: str, marks: tuple[str, ...]) -> int:
    return max(text.rfind(mark) for mark in marks)
