"""Prompts of the pool by their tokens and by who may read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm.core.pinned_prompt import MAX_DEPTH, PinnedPrompt
from vllm.core.prefix_tree import PrefixTree, Walk
from vllm.sequence import Sequence
from vllm.token_ids import TokenIds

EVERYBODY = b""


def may_extend(scope: bytes, parent: bytes) -> bool:
    """Whether a prompt of `scope` may continue one of the scope `parent`, that can be read by whoever reads it."""
    return parent in (EVERYBODY, scope)


class PromptIndex:
    """A tree of prompts for each scope."""

    def __init__(self) -> None:
        self._trees: dict[bytes, PrefixTree[PinnedPrompt]] = {}

    def __iter__(self) -> Iterator[PinnedPrompt]:
        for tree in self._trees.values():
            yield from tree

    def insert(self, prompt: PinnedPrompt) -> None:
        self._trees.setdefault(prompt.scope, PrefixTree()).insert(prompt.token_ids, prompt)

    def remove(self, prompt: PinnedPrompt) -> None:
        tree = self._trees[prompt.scope]
        tree.remove(prompt.token_ids)
        if not tree:
            del self._trees[prompt.scope]

    def readable(self, seq: Sequence) -> list[PinnedPrompt]:
        """Prompts that a request starts with and may read, shortest first."""
        return self._path(seq.token_ids, _scopes(seq))

    def nearest(self, seq: Sequence) -> Walk[PinnedPrompt] | None:
        """What a request meets in the tree in which it agrees with some prompt furthest."""
        walks = [self._trees[scope].walk(seq.token_ids) for scope in _scopes(seq) if scope in self._trees]
        return max(walks, key=lambda walk: walk.num_matched, default=None)

    def parent_of(self, token_ids: TokenIds, scope: bytes) -> PinnedPrompt | None:
        """The longest prompt that one with these tokens may continue."""
        fitting = [
            p
            for p in self._path(token_ids, [EVERYBODY] if scope == EVERYBODY else [EVERYBODY, scope])
            if p.num_tokens < len(token_ids) and p.depth < MAX_DEPTH and not p.doomed
        ]
        return fitting[-1] if fitting else None

    def _path(self, token_ids: TokenIds, scopes: Iterable[bytes]) -> list[PinnedPrompt]:
        found: list[PinnedPrompt] = []
        for scope in scopes:
            tree = self._trees.get(scope)
            if tree is not None:
                found += tree.walk(token_ids).values
        found.sort(key=lambda p: p.num_tokens)
        return found


def _scopes(seq: Sequence) -> list[bytes]:
    """Scopes whose prompts a request may read."""
    scopes = [EVERYBODY]
    for scope in (seq.tenant, seq.namespace):
        if scope and scope not in scopes:
            scopes.append(scope)
    return scopes
