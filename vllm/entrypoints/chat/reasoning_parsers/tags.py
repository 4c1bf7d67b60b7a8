"""Reasoning between `<think>` and `</think>`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.entrypoints.chat.partial_text import held_back


class ReasoningParser:
    """Splits one output while it comes. What both methods return, joined, does not depend on how the text is split.

    Answers begin with the reasoning, whether or not the template or the model opens it; the end mark ends it.

    Args:
        ended: The prompt ended the reasoning already: all is content.

    Attributes:
        needs_special_tokens: Marks of the format are control tokens, so the text must show those.
    """

    needs_special_tokens = False
    start = "<think>"
    end = "</think>"

    def __init__(self, ended: bool) -> None:
        self._ended = ended
        self._opened = False
        self._buffer = ""

    @classmethod
    def ended_in(cls, prompt: str, continued: str | None, kwargs: Mapping[str, Any]) -> bool:
        """Whether an answer to `prompt` has its reasoning behind it.

        Args:
            prompt: What the chat template wrote.
            continued: The message that the answer continues; None if it opens a new one.
            kwargs: Variables of the chat template.
        """
        if continued is not None:
            return continued.rfind(cls.end) >= continued.rfind(cls.start)
        return prompt.rstrip().endswith(cls.end)

    def feed(self, text: str) -> tuple[str, str]:
        """Takes in text; returns the reasoning and the content that are certain and new."""
        if self._ended:
            return "", text
        self._buffer += text
        if not self._opened:
            begun = self._buffer.lstrip()
            if self.start.startswith(begun):
                if begun != self.start:
                    return "", ""
                self._buffer = ""
            elif begun.startswith(self.start):
                self._buffer = begun[len(self.start) :]
            self._opened = True
        before, mark, after = self._buffer.partition(self.end)
        if mark:
            self._ended, self._buffer = True, ""
            return before, after
        certain = len(self._buffer) - held_back(self._buffer, (self.end,))
        reasoning, self._buffer = self._buffer[:certain], self._buffer[certain:]
        return reasoning, ""

    def finish(self) -> tuple[str, str]:
        """The output has ended; returns what was held back."""
        rest, self._buffer = self._buffer, ""
        return rest, ""


class DeepSeekR1ReasoningParser(ReasoningParser):
    """DeepSeek R1 and its distillates, which always think."""


class Qwen3ReasoningParser(ReasoningParser):
    """Qwen 3, which thinks unless the template is told `enable_thinking=false`."""

    @classmethod
    def ended_in(cls, prompt: str, continued: str | None, kwargs: Mapping[str, Any]) -> bool:
        if continued is None and kwargs.get("enable_thinking", kwargs.get("thinking")) is False:
            return True
        return super().ended_in(prompt, continued, kwargs)
