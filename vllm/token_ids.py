"""Token ids as machine integers: compared, sliced and sent as memory, with no Python object for each of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    TokenIds: TypeAlias = array[int]
else:
    TokenIds = array
"""Unsigned integers of 32 bits. A slice is a copy; a list with the same ids is not equal."""

# The one type of array that is filled from a list of ints without parsing each of them: a third faster than any other.
_TYPECODE = "I"
ID_BYTES = array(_TYPECODE).itemsize


def token_array(token_ids: Iterable[int]) -> TokenIds:
    """A new array of these ids.

    Raises:
        TypeError: one of them is no integer.
        OverflowError: one of them is negative or has more than 32 bits.
    """
    return array(_TYPECODE, token_ids)


def from_bytes(data: bytes) -> TokenIds:
    """The array whose memory is `data`.

    Raises:
        ValueError: it does not hold whole ids.
    """
    return array(_TYPECODE, data)
