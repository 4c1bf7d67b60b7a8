"""gpt-oss: messages of the Harmony format, each with a channel, and some with a recipient.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
    <|message|>{…}<|call|>

What the channel `analysis` says is reasoning. A message to `functions.<name>` is a call, whatever its channel. Other
messages to tools are reasoning as well, for nobody here runs those tools. The rest, of the channels `final` and
`commentary`, is for the user.
"""

from __future__ import annotations

import re
from typing import Any

from vllm.entrypoints.chat.events import Reasoning
from vllm.entrypoints.chat.partial_text import find_first, held_back
from vllm.entrypoints.chat.tool_parsers.base import ToolParser

CHANNEL, MESSAGE, START = "<|channel|>", "<|message|>", "<|start|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", START, CHANNEL)
_MARKS = (MESSAGE, *_ENDS)
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_FUNCTIONS = "functions."


class OpenAIToolParser(ToolParser):
    """Reads an answer from its beginning, behind `<|start|>assistant`: reasoning, text and calls.

    Text ahead of all marks, from a model that leaves the format, is for the user.
    """

    needs_special_tokens = True
    reads_reasoning = True

    def __init__(self, tools: list[dict[str, Any]], allowed: frozenset[str] | None = None) -> None:
        super().__init__(tools, allowed)
        self._header: str | None = ""
        self._kind = "text"
        self._seen_mark = False

    def begin(self, reasoning_ended: bool) -> None:
        """The answer continues a message to the user, if `reasoning_ended`."""
        if reasoning_ended:
            self._header = None

    def step(self) -> bool:
        return self._read_header(self._header) if self._header is not None else self._read_body()

    def end(self) -> None:
        if self._header is None:
            self._give(self.take(len(self.buffer)))
        elif not self._seen_mark:
            self.say(self._header + self.take(len(self.buffer)))

    def _read_header(self, header: str) -> bool:
        found = find_first(self.buffer, _MARKS)
        if found is None:
            self._header = header + self.take(len(self.buffer) - held_back(self.buffer, _MARKS))
            return False
        at, mark = found
        before = self.take(at)
        if mark == START and not self._seen_mark and (header + before).strip():
            self.say(header + before)
        self._seen_mark = True
        self.take(len(mark))
        if mark == MESSAGE:
            self._open(header + before)
            self._header = None
        else:
            # A mark that ends a message without a body ends the header as well.
            self._header = header + before + mark if mark == CHANNEL else ""
        return True

    def _open(self, header: str) -> None:
        recipient = _RECIPIENT.search(header)
        words = header.partition(CHANNEL)[2].split()
        channel = words[0] if words else "final"
        if recipient is not None and recipient[1].startswith(_FUNCTIONS):
            self._kind = "call"
            self.open_call(recipient[1].removeprefix(_FUNCTIONS))
        elif channel == "analysis" or recipient is not None:
            self._kind = "reasoning"
        else:
            self._kind = "text"

    def _read_body(self) -> bool:
        found = find_first(self.buffer, _ENDS)
        if found is None:
            self._give(self.take(len(self.buffer) - held_back(self.buffer, _ENDS)))
            return False
        at, mark = found
        self._give(self.take(at))
        self.take(len(mark))
        self._seen_mark = True
        self._header = CHANNEL if mark == CHANNEL else ""
        self._close_call()
        return True

    def _give(self, text: str) -> None:
        if self._kind == "call":
            self.add_arguments(text)
        elif self._kind == "text":
            self.say(text)
        elif text:
            self._flush()
            self._events.append(Reasoning(text))
