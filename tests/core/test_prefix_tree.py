"""The tree of prompts against a plain list of them."""

from __future__ import annotations

import random

import pytest

from vllm.core.prefix_tree import PrefixTree, common_prefix_len, common_suffix_len
from vllm.token_ids import TokenIds, token_array


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [([], [], 0), ([1], [], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([2, 1], [1, 1], 0),
     # Ids that agree in some of their bytes only.
     ([5, 0x10000], [5, 0x20000], 1), ([5, 0x100], [5, 0x101], 1), ([0x7F000000], [0x7E000000], 0),
     (list(range(5000)), [*range(4321), 0], 4321)],
)  # fmt: skip
def test_common_prefix_and_suffix(a, b, want):
    assert common_prefix_len(token_array(a), token_array(b)) == want
    assert common_suffix_len(token_array(a[::-1]), token_array(b[::-1])) == want


@pytest.mark.parametrize("seed", range(20))
def test_walks_find_what_a_search_finds(seed):
    rng = random.Random(seed)
    tree: PrefixTree[tuple[int, ...]] = PrefixTree()
    known: set[tuple[int, ...]] = set()

    def tokens() -> TokenIds:
        return token_array(rng.choice((1, 1, 1, 0x10001)) for _ in range(rng.randint(1, 9)))

    for _ in range(300):
        new = tokens()
        if rng.random() < 0.6:
            tree.insert(new, tuple(new))
            known.add(tuple(new))
        elif tuple(new) in known:
            tree.remove(new)
            known.discard(tuple(new))
        else:
            with pytest.raises(KeyError):
                tree.remove(new)
        assert set(tree) == known and bool(tree) == bool(known)
        asked = tokens()
        walk = tree.walk(asked)
        assert walk.values == sorted((k for k in known if tuple(asked[: len(k)]) == k), key=len)
        agreement = max((common_prefix_len(asked, token_array(k)) for k in known), default=0)
        assert walk.num_matched == agreement
        if agreement:
            assert walk.nearest in known and common_prefix_len(asked, token_array(walk.nearest)) == agreement
