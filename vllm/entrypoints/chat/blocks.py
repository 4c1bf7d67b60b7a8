"""The answer of a chat as a row of blocks, which is how the Anthropic and the Responses API show answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple


@dataclass
class Block:
    """Reasoning, text, or one tool call.

    Attributes:
        index: Position in the answer.
        pieces: What has come of its text.
        call_id / name: Of a tool call.
        logprobs: Of text: one entry a token, as chat completions show them.
    """

    index: int
    kind: Literal["reasoning", "text", "tool_call"]
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Of a tool call, its arguments as JSON."""
        return "".join(self.pieces)


class BlockNews(NamedTuple):
    """A block begins, grows by `text`, or is complete."""

    what: Literal["start", "delta", "stop"]
    block: Block
    text: str = ""
    logprobs: tuple[dict[str, Any], ...] = ()


class BlockReader:
    """Reads the deltas of one choice, or its whole message as if it were a single one.

    Attributes:
        blocks: All blocks so far; none of them is without content but a tool call without arguments.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open: Block | None = None
        self._call_index: int | None = None
        self._logprobs: list[dict[str, Any]] = []

    @property
    def calls_tools(self) -> bool:
        return any(block.kind == "tool_call" for block in self.blocks)

    def read(self, choice: dict[str, Any]) -> Iterator[BlockNews]:
        """The news in a choice of a chat completion, or of a chunk of one."""
        message = choice.get("delta") or choice.get("message") or {}
        self._logprobs += (choice.get("logprobs") or {}).get("content") or ()
        reasoning = message.get("reasoning") or message.get("reasoning_content")
        if reasoning:
            yield from self._grow("reasoning", reasoning)
        if message.get("content"):
            logprobs, self._logprobs = tuple(self._logprobs), []
            yield from self._grow("text", message["content"], logprobs)
        for i, call in enumerate(message.get("tool_calls") or ()):
            yield from self._grow_call(call.get("index", i), call)

    def end(self) -> Iterator[BlockNews]:
        """The news when no more deltas come."""
        if self._open is not None:
            yield BlockNews("stop", self._open)
            self._open = None

    def _grow(
        self, kind: Literal["reasoning", "text"], text: str, logprobs: tuple[dict[str, Any], ...] = ()
    ) -> Iterator[BlockNews]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(Block(len(self.blocks), kind))
        yield from self._add(text, logprobs)

    def _grow_call(self, index: int, call: dict[str, Any]) -> Iterator[BlockNews]:
        function = call.get("function") or {}
        if self._open is None or self._open.kind != "tool_call" or self._call_index != index:
            self._call_index = index
            block = Block(len(self.blocks), "tool_call", call_id=call.get("id") or "", name=function.get("name") or "")
            yield from self._begin(block)
        yield from self._add(function.get("arguments") or "")

    def _begin(self, block: Block) -> Iterator[BlockNews]:
        yield from self.end()
        self.blocks.append(block)
        self._open = block
        yield BlockNews("start", block)

    def _add(self, text: str, logprobs: tuple[dict[str, Any], ...] = ()) -> Iterator[BlockNews]:
        block = self._open
        if block is not None and text:
            block.pieces.append(text)
            block.logprobs += logprobs
            yield BlockNews("delta", block, text, logprobs)
