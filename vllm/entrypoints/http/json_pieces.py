"""Long JSON texts, read piece by piece.

The parser holds the interpreter's lock to its end, so what it is given at a time is what streams of others wait for, in
whichever thread it runs. Half a million numbers take it 45 to 60 ms (2 cores of an AMD EPYC, shared with other work;
CPython 3.11). Hence arrays and objects are cut at their commas to pieces of some milliseconds each. A single string is
not cut: 16 MiB of text take 25 to 35 ms.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson

# Half a million numbers of six digits are some fifteen pieces.
_PIECE_BYTES = 256 * 1024
_CHUNK_BYTES = 2**20
_MOST_DEPTH = 16
_QUOTE, _COMMA = b'",'
_OPENING, _CLOSING = b"[{", b"]}"
_KEY = re.compile(rb'\s*("(?:[^"\\]|\\.){0,4096}")\s*:', re.DOTALL)
_SPACE = b" \t\n\r"

_IS_MARK = np.zeros(256, bool)
_IS_MARK[list(b'",[]{}')] = True
_STEP = np.zeros(256, np.int8)
_STEP[list(_OPENING)] = 1
_STEP[list(_CLOSING)] = -1


class Marks(NamedTuple):
    """What the structure of a JSON text shows in.

    Attributes:
        places: Where `,`, `[`, `]`, `{` and `}` stand outside of strings, rising; int32.
        letters: Which of them stands there; uint8.
        num_strings: Strings in all.
    """

    places: np.ndarray
    letters: np.ndarray
    num_strings: int


def chunks_of_marks(text: bytes | bytearray) -> Iterator[Marks]:
    """The marks of a text, some 1 MiB of it at a time; of no use if it is not JSON."""
    start, in_string = 0, False
    while start < len(text):
        end = start + _CHUNK_BYTES
        chunk = bytes(text[start:end])
        # An escape that the end of the chunk would cut belongs to this one.
        if (len(chunk) - len(chunk.rstrip(b"\\"))) % 2:
            end += 1
            chunk = bytes(text[start:end])
        if b"\\" in chunk:
            chunk = chunk.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        letters = np.frombuffer(chunk, np.uint8)
        places = np.flatnonzero(_IS_MARK[letters])
        letters = letters[places]
        quotes = letters == _QUOTE
        # Quotes so far, those of earlier chunks included: odd inside a string.
        count = np.cumsum(quotes, dtype=np.int32) + in_string
        shown = np.flatnonzero(~quotes & (count % 2 == 0))
        num_quotes = int(np.count_nonzero(quotes))
        yield Marks((places[shown] + start).astype(np.int32), letters[shown], (num_quotes + in_string) // 2)
        in_string = bool((num_quotes + in_string) % 2)
        start = end


def loads(text: bytes | bytearray, marks: Sequence[Marks]) -> Any:
    """What `orjson.loads(text)` returns or raises.

    Args:
        marks: All that `chunks_of_marks(text)` gives.
    """
    try:
        return _Reader(text, marks).read()
    except _Uncut:
        # It is not JSON, or nothing that could be cut; the parser knows which, and where.
        return orjson.loads(text)


class _Uncut(Exception):
    """The text cannot be read in pieces."""


class _Reader:
    def __init__(self, text: bytes | bytearray, marks: Sequence[Marks]) -> None:
        self._text = memoryview(text)
        self._places = np.concatenate([part.places for part in marks]) if marks else np.empty(0, np.int32)
        letters = np.concatenate([part.letters for part in marks]) if marks else np.empty(0, np.uint8)
        # Before each mark, how many arrays and objects are open.
        step = _STEP[letters]
        self._depths = np.cumsum(step, dtype=np.int32) - step
        self._is_comma = letters == _COMMA

    def read(self) -> Any:
        return self._value(0, len(self._text), 0)

    def _value(self, start: int, end: int, depth: int) -> Any:
        """The value whose text lies in `start … end`, inside of `depth` arrays and objects."""
        if end - start <= _PIECE_BYTES or depth >= _MOST_DEPTH:
            return self._parsed(self._text[start:end])
        start, end = self._stripped(start, end)
        first, last = self._text[start], self._text[end - 1]
        if first not in _OPENING:
            return self._parsed(self._text[start:end])
        if last != _CLOSING[_OPENING.index(first)]:
            raise _Uncut
        cuts = np.concatenate(([start], self._commas(start, end, depth), [end - 1]))
        return self._members(cuts, depth) if first == _OPENING[1] else self._entries(cuts, depth)

    def _stripped(self, start: int, end: int) -> tuple[int, int]:
        while start < end and self._text[start] in _SPACE:
            start += 1
        while start < end and self._text[end - 1] in _SPACE:
            end -= 1
        if start == end:
            raise _Uncut
        return start, end

    def _commas(self, start: int, end: int, depth: int) -> np.ndarray:
        """Where the commas of the array or object are that takes all of `start … end`."""
        a, b = np.searchsorted(self._places, (start, end))
        depths = self._depths[a:b]
        # Its brackets are a pair if they are the first and last mark, and nothing between closes it.
        if b - a < 2 or self._places[a] != start or self._places[b - 1] != end - 1:
            raise _Uncut
        if depths[0] != depth or depths[-1] != depth + 1 or depths[1:].min() != depth + 1:
            raise _Uncut
        return self._places[a:b][self._is_comma[a:b] & (depths == depth + 1)]

    def _entries(self, cuts: np.ndarray, depth: int) -> list[Any]:
        entries: list[Any] = []
        for start, end, count in _grouped(cuts):
            if end - start > _PIECE_BYTES:
                entries.append(self._value(start, end, depth + 1))
                continue
            group = self._parsed(b"".join((b"[", self._text[start:end], b"]")))
            # Only nothing between two commas makes it fewer.
            if len(group) != count:
                raise _Uncut
            entries += group
        return entries

    def _members(self, cuts: np.ndarray, depth: int) -> dict[str, Any]:
        members: dict[str, Any] = {}
        for start, end, _ in _grouped(cuts):
            if end - start > _PIECE_BYTES:
                key = _KEY.match(self._text, start, end)
                if key is None:
                    raise _Uncut
                members[self._parsed(key[1])] = self._value(key.end(), end, depth + 1)
                continue
            self._stripped(start, end)
            members |= self._parsed(b"".join((b"{", self._text[start:end], b"}")))
        return members

    @staticmethod
    def _parsed(text: bytes | memoryview) -> Any:
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError:
            raise _Uncut from None


def _grouped(cuts: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """What lies between the cuts, in runs that are at most a piece together; what is more than a piece comes by itself.

    Each is (start, end, how many).
    """
    first = 0
    while first < len(cuts) - 1:
        start = int(cuts[first]) + 1
        last = max(first + 1, int(np.searchsorted(cuts, start + _PIECE_BYTES, side="right")) - 1)
        yield start, int(cuts[last]), last - first
        first = last
