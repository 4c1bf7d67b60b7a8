"""Marks in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Iterable


def held_back(text: str, marks: Iterable[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`."""
    longest = 0
    for mark in marks:
        for size in range(min(len(text), len(mark) - 1), longest, -1):
            if text.endswith(mark[:size]):
                longest = size
                break
    return longest


def find_first(text: str, marks: Iterable[str]) -> tuple[int, str] | None:
    """Where the first of `marks` stands in `text`, and which one it is; the longest of several at one place."""
    found: tuple[int, str] | None = None
    for mark in marks:
        at = text.find(mark)
        if at >= 0 and (found is None or (at, -len(mark)) < (found[0], -len(found[1]))):
            found = (at, mark)
    return found
