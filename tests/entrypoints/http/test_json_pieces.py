"""Long JSON texts: read in pieces, they are what they are read whole."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm.entrypoints.http import json_pieces


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of what the parser was given; small chunks and pieces, so that short texts have many."""
    sizes: list[int] = []

    class Parser:
        JSONDecodeError = orjson.JSONDecodeError

        @staticmethod
        def loads(text: Any) -> Any:
            sizes.append(len(text))
            return orjson.loads(text)

    monkeypatch.setattr(json_pieces, "_CHUNK_BYTES", 7)
    monkeypatch.setattr(json_pieces, "_PIECE_BYTES", 16)
    monkeypatch.setattr(json_pieces, "orjson", Parser)
    return sizes


def read(text: bytes) -> Any:
    return json_pieces.loads(text, list(json_pieces.chunks_of_marks(text)))


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.text(st.sampled_from('a"\\,[]{}: \té😀'), max_size=12),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.sampled_from(["a", '"', "b,", "\\", "{"]), inner),
    max_leaves=40,
)


@given(values, st.booleans(), st.sampled_from([None, 1]))
def test_any_value_is_the_same(value: Any, ascii_only: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    assert read(text) == orjson.loads(text) == value


@given(values, st.data())
def test_what_is_no_json_is_told_as_the_parser_tells_it(value: Any, data: st.DataObject) -> None:
    text = bytearray(json.dumps(value).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place : place + data.draw(st.integers(0, 1))] = data.draw(
            st.sampled_from([b"", *(b"%c" % c for c in b'",[]{}:0\\ ')])
        )
        if not text:
            return
    try:
        want: Any = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        with pytest.raises(orjson.JSONDecodeError) as raised:
            read(bytes(text))
        assert str(raised.value) == str(error)
    else:
        assert read(bytes(text)) == want


def test_no_piece_is_much_longer_than_it_may_be(pieces: list[int]) -> None:
    numbers = list(range(1000))
    value = {"prompt": numbers, "more": {f"key{i}": [i] for i in numbers}, "deep": [[{"a": numbers}]], "short": 1}
    assert read(json.dumps(value).encode()) == value
    assert max(pieces) <= 16 + 2


def test_the_last_of_equal_keys_counts(pieces: list[int]) -> None:
    text = b'{"a": 1, "a": "0123456789012345", "b": 2, "b": [3, 4, 5, 6, 7, 8, 9, 10], "a": 5}'
    assert read(text) == {"a": 5, "b": [3, 4, 5, 6, 7, 8, 9, 10]}
    assert max(pieces) < len(text)
