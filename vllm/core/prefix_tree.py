"""Prompts by their tokens: which of them does a token sequence start with, and where does it part from the others?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


# Tokens compared at once: a slice of so many stays in the processor's cache.
_SLICE = 1024


def common_prefix_len(a: list[int], b: list[int], start_a: int = 0) -> int:
    """How many tokens `a` from `start_a` on and `b` have in common at their heads.

    Lists are compared slice by slice, in C: the time is that of reading once what they have in common.
    """
    most = min(len(a) - start_a, len(b))
    low = 0
    while low < most and a[start_a + low : start_a + min(low + _SLICE, most)] == b[low : min(low + _SLICE, most)]:
        low = min(low + _SLICE, most)
    high = min(low + _SLICE, most)  # They agree up to `low` and, unless it is `most`, not up to `high`.
    while high - low > 1:
        middle = (low + high) // 2
        if a[start_a + low : start_a + middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def common_suffix_len(a: list[int], b: list[int]) -> int:
    """How many tokens `a` and `b` have in common at their ends."""
    most = min(len(a), len(b))
    for low in range(0, most, _SLICE):
        size = min(_SLICE, most - low)
        tails = [tokens[len(tokens) - low - size : len(tokens) - low] for tokens in (a, b)]
        if tails[0] != tails[1]:
            return low + common_prefix_len(tails[0][::-1], tails[1][::-1])
    return most


class Walk(NamedTuple, Generic[T]):
    """What a token sequence met in the tree.

    Attributes:
        values: Values whose tokens it starts with, shortest first.
        num_matched: Tokens up to which it agrees with some value.
        nearest: A value that agrees with it up to `num_matched`; None in an empty tree or without agreement.
    """

    values: list[T]
    num_matched: int
    nearest: T | None


class _Node(Generic[T]):
    __slots__ = ("children", "edge", "value")

    def __init__(self, edge: list[int]) -> None:
        self.edge = edge
        self.children: dict[int, _Node[T]] = {}
        self.value: T | None = None


class PrefixTree(Generic[T]):
    """A radix tree over token ids. A look-up reads each token once, however many values there are."""

    def __init__(self) -> None:
        self._root: _Node[T] = _Node([])

    def insert(self, token_ids: list[int], value: T) -> None:
        """Files `value` under its tokens (at least one), in place of a former one."""
        node, done = self._root, 0
        while done < len(token_ids):
            child = node.children.get(token_ids[done])
            if child is None:
                child = node.children[token_ids[done]] = _Node(token_ids[done:])
            same = common_prefix_len(token_ids, child.edge, done)
            if same < len(child.edge):
                child = self._split(node, child, same)
            node, done = child, done + same
        node.value = value

    def _split(self, parent: _Node[T], child: _Node[T], size: int) -> _Node[T]:
        middle: _Node[T] = _Node(child.edge[:size])
        child.edge = child.edge[size:]
        middle.children[child.edge[0]] = child
        parent.children[middle.edge[0]] = middle
        return middle

    def remove(self, token_ids: list[int]) -> None:
        """Takes out the value under these tokens.

        Raises:
            KeyError: there is none.
        """
        path, done = [self._root], 0
        while done < len(token_ids):
            child = path[-1].children[token_ids[done]]
            if token_ids[done : done + len(child.edge)] != child.edge:
                raise KeyError("no value under these tokens")
            path.append(child)
            done += len(child.edge)
        if path[-1].value is None:
            raise KeyError("no value under these tokens")
        path[-1].value = None
        while len(path) > 1:
            node, parent = path.pop(), path[-1]
            if node.value is not None or len(node.children) > 1:
                return
            if node.children:
                (child,) = node.children.values()
                child.edge = node.edge + child.edge
                parent.children[child.edge[0]] = child
                return
            del parent.children[node.edge[0]]

    def walk(self, token_ids: list[int]) -> Walk[T]:
        """Follows `token_ids` as far as the tree does."""
        values: list[T] = []
        node, done = self._root, 0
        while True:
            if node.value is not None:
                values.append(node.value)
            child = node.children.get(token_ids[done]) if done < len(token_ids) else None
            if child is None:
                return Walk(values, done, self._any(node) if done else None)
            same = common_prefix_len(token_ids, child.edge, done)
            done += same
            if same < len(child.edge):
                return Walk(values, done, self._any(child))
            node = child

    @staticmethod
    def _any(node: _Node[T]) -> T | None:
        while node.value is None and node.children:
            node = next(iter(node.children.values()))
        return node.value

    def __iter__(self) -> Iterator[T]:
        pending = [self._root]
        while pending:
            node = pending.pop()
            pending.extend(node.children.values())
            if node.value is not None:
                yield node.value

    def __bool__(self) -> bool:
        return bool(self._root.children)
