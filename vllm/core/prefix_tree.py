"""Prompts by their tokens: which of them does a token sequence start with, and where does it part from the others?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

from vllm.token_ids import ID_BYTES, TokenIds

T = TypeVar("T")


def common_prefix_len(a: TokenIds, b: TokenIds) -> int:
    """How many tokens `a` and `b` have in common at their heads."""
    return _common_bytes(a.tobytes(), 0, b.tobytes()) // ID_BYTES


def common_suffix_len(a: TokenIds, b: TokenIds) -> int:
    """How many tokens `a` and `b` have in common at their ends."""
    same, most = 0, min(len(a), len(b))
    differ = most + 1  # They agree in their last `same` tokens, and not in their last `differ`.
    while differ - same > 1:
        middle = (same + differ) // 2
        if a[len(a) - middle : len(a) - same] == b[len(b) - middle : len(b) - same]:
            same = middle
        else:
            differ = middle
    return same


def _common_bytes(a: bytes, start_a: int, b: bytes) -> int:
    """Length of the whole ids that `a` from `start_a` on and `b` have in common at their heads.

    Memory is compared with memory: the time is about that of copying what they have in common.
    """
    if a.startswith(b, start_a):
        return len(b)
    same, differ = 0, min(len(a) - start_a, len(b)) // ID_BYTES + 1  # In ids.
    while differ - same > 1:
        middle = (same + differ) // 2
        if a.startswith(b[same * ID_BYTES : middle * ID_BYTES], start_a + same * ID_BYTES):
            same = middle
        else:
            differ = middle
    return same * ID_BYTES


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
    """Edges are the memory of their tokens; a child is found by that of its first token."""

    __slots__ = ("children", "edge", "value")

    def __init__(self, edge: bytes) -> None:
        self.edge = edge
        self.children: dict[bytes, _Node[T]] = {}
        self.value: T | None = None


class PrefixTree(Generic[T]):
    """A radix tree over token ids. A look-up reads each token once, however many values there are."""

    def __init__(self) -> None:
        self._root: _Node[T] = _Node(b"")

    def insert(self, token_ids: TokenIds, value: T) -> None:
        """Files `value` under its tokens (at least one), in place of a former one."""
        tokens = token_ids.tobytes()
        node, done = self._root, 0
        while done < len(tokens):
            first = tokens[done : done + ID_BYTES]
            child = node.children.get(first)
            if child is None:
                child = node.children[first] = _Node(tokens[done:])
            same = _common_bytes(tokens, done, child.edge)
            if same < len(child.edge):
                child = self._split(node, child, same)
            node, done = child, done + same
        node.value = value

    def _split(self, parent: _Node[T], child: _Node[T], size: int) -> _Node[T]:
        middle: _Node[T] = _Node(child.edge[:size])
        child.edge = child.edge[size:]
        middle.children[child.edge[:ID_BYTES]] = child
        parent.children[middle.edge[:ID_BYTES]] = middle
        return middle

    def remove(self, token_ids: TokenIds) -> None:
        """Takes out the value under these tokens.

        Raises:
            KeyError: there is none.
        """
        tokens = token_ids.tobytes()
        path, done = [self._root], 0
        while done < len(tokens):
            child = path[-1].children.get(tokens[done : done + ID_BYTES])
            if child is None or not tokens.startswith(child.edge, done):
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
                parent.children[child.edge[:ID_BYTES]] = child
                return
            del parent.children[node.edge[:ID_BYTES]]

    def walk(self, token_ids: TokenIds) -> Walk[T]:
        """Follows `token_ids` as far as the tree does."""
        tokens = token_ids.tobytes()
        values: list[T] = []
        node, done = self._root, 0
        while True:
            if node.value is not None:
                values.append(node.value)
            child = node.children.get(tokens[done : done + ID_BYTES])
            if child is None:
                return Walk(values, done // ID_BYTES, self._any(node) if done else None)
            same = _common_bytes(tokens, done, child.edge)
            done += same
            if same < len(child.edge):
                return Walk(values, done // ID_BYTES, self._any(child))
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
