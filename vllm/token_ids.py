"""Token ids as machine integers: compared, sliced and sent as memory, with no Python object for each of them."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Hashable, Iterable
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


class KnownPrefixes:
    """Arrays of prefixes that prompts share, so that the ids of a system prompt are not converted for each request.

    Lists of the same objects are compared without looking at these, which takes a third of the time of a conversion.

    Args:
        most: Prefixes that are kept, those that were used last.
    """

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._kept: OrderedDict[tuple[Hashable, ...], tuple[list[int], TokenIds]] = OrderedDict()

    def find(self, token_ids: list[int], length: int, scope: Hashable = None) -> TokenIds | None:
        """The array of the first `length` ids if they are known.

        Args:
            scope: Who may notice, by the time it takes, that they are.
        """
        key = self._key(token_ids, length, scope)
        kept = self._kept.get(key)
        if kept is None or kept[0] != token_ids[:length]:
            return None
        self._kept.move_to_end(key)
        return kept[1]

    def keep(self, token_ids: list[int], array: TokenIds, scope: Hashable = None) -> None:
        """Remembers that this is the array of these ids."""
        self._kept[self._key(token_ids, len(token_ids), scope)] = (token_ids, array)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    @staticmethod
    def _key(token_ids: list[int], length: int, scope: Hashable) -> tuple[Hashable, ...]:
        """Some of the ids: prompts that differ mostly differ in these."""
        return (scope, length, *token_ids[: length : length // 16 + 1])
