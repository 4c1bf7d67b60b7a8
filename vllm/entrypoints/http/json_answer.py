"""Answers as JSON. The encoder holds the interpreter's lock to its end, so long answers are encoded in pieces."""

from __future__ import annotations

from typing import Any

import orjson

# Entries of a list that are encoded at a time: some milliseconds where each has twenty log-probabilities.
_PIECE = 256
_MAX_DEPTH = 6
# What an entry costs that is an object or array itself, as one with log-probabilities, counted in numbers.
_COST_OF_OBJECT = 32


def cost(value: Any, depth: int = 0) -> int:
    """How long the lists in an answer are to encode, counted in numbers, which take some ten nanoseconds each."""
    if depth > _MAX_DEPTH or not isinstance(value, dict | list):
        return 1
    if isinstance(value, dict):
        return sum(cost(item, depth + 1) for item in value.values())
    if len(value) <= _PIECE:
        return sum(cost(item, depth + 1) for item in value)
    return len(value) * (_COST_OF_OBJECT if isinstance(value[-1], dict | list) else 1)


def encode_in_pieces(value: Any) -> bytes:
    """The JSON text; meant for a thread, whose work lets others run in between."""
    return orjson.dumps(_in_pieces(value, 0))


def _in_pieces(value: Any, depth: int) -> Any:
    if depth > _MAX_DEPTH or not isinstance(value, dict | list):
        return value
    if isinstance(value, dict):
        return {key: _in_pieces(item, depth + 1) for key, item in value.items()}
    if len(value) <= _PIECE:
        return [_in_pieces(item, depth + 1) for item in value]
    parts = (orjson.dumps(value[i : i + _PIECE])[1:-1] for i in range(0, len(value), _PIECE))
    return orjson.Fragment(b"[" + b",".join(parts) + b"]")
