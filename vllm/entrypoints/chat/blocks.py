"""The answer of a chat as a row of blocks, which is how the Anthropic and the Responses API show answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from vllm.entrypoints.chat.events import CallArguments, CallBegun, CallEnded, Reasoning, StepEvent, Text, Tokens


@dataclass
class Block:
    """Reasoning, text, or one tool call.

    Attributes:
        index: Position in the answer.
        pieces: What has come of its text.
        call_id / name: Of a tool call.
    """

    index: int
    kind: Literal["reasoning", "text", "tool_call"]
    call_id: str = ""
    name: str = ""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Of a tool call, its arguments as JSON."""
        return "".join(self.pieces)


class BlockNews(NamedTuple):
    """A block begins, grows by `text`, or is complete.

    Attributes:
        tokens: Where text grows: those that have come since the last text.
    """

    what: Literal["start", "delta", "stop"]
    block: Block
    text: str = ""
    tokens: tuple[Tokens, ...] = ()


class BlockReader:
    """Reads the steps of one choice.

    Attributes:
        blocks: All blocks so far; none of them is without content but a tool call without arguments.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open: Block | None = None
        self._tokens: list[Tokens] = []

    @property
    def calls_tools(self) -> bool:
        return any(block.kind == "tool_call" for block in self.blocks)

    def read(self, events: Iterable[StepEvent]) -> Iterator[BlockNews]:
        """The news in the events of a step."""
        for event in events:
            match event:
                case Tokens():
                    self._tokens.append(event)
                case Reasoning(text):
                    yield from self._grow("reasoning", text)
                case Text(text):
                    tokens, self._tokens = tuple(self._tokens), []
                    yield from self._grow("text", text, tokens)
                case CallBegun(_, call_id, name):
                    yield from self._begin(Block(len(self.blocks), "tool_call", call_id, name))
                case CallArguments(_, text):
                    yield from self._grow("tool_call", text)
                case CallEnded():
                    yield from self.end()

    def end(self) -> Iterator[BlockNews]:
        """The news when the open block gets no more."""
        if self._open is not None:
            yield BlockNews("stop", self._open)
            self._open = None

    def _grow(
        self, kind: Literal["reasoning", "text", "tool_call"], text: str, tokens: tuple[Tokens, ...] = ()
    ) -> Iterator[BlockNews]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(Block(len(self.blocks), kind))
        if self._open is not None:
            self._open.pieces.append(text)
            yield BlockNews("delta", self._open, text, tokens)

    def _begin(self, block: Block) -> Iterator[BlockNews]:
        yield from self.end()
        self.blocks.append(block)
        self._open = block
        yield BlockNews("start", block)
