"""Schedulable blocks: who holds them, what is found again in them, and making room for an extent."""

from __future__ import annotations

import pytest

from vllm.core.block_manager import BlockManager
from vllm.kv_cache.extents import Extent
from vllm.sequence import Sequence

BLOCK = 4


def make_seq(token_ids: list[int], namespace: bytes = b"") -> Sequence:
    return Sequence("r", token_ids, cache_seed=namespace)


def compute(blocks: BlockManager, seq: Sequence) -> Sequence:
    """As if `seq` had run over all its tokens."""
    assert blocks.grow(seq, seq.num_tokens) is not None
    seq.num_computed_tokens = seq.num_tokens
    blocks.commit(seq)
    return seq


def test_grow_takes_what_is_missing_or_nothing() -> None:
    blocks = BlockManager(4, BLOCK)
    seq = make_seq(list(range(9)))
    assert len(blocks.grow(seq, 9) or []) == 3
    assert blocks.grow(seq, 12) == []
    assert blocks.grow(seq, 17) is None
    assert (len(seq.block_table), blocks.num_free_blocks, blocks.num_used_blocks) == (3, 1, 3)
    blocks.check_integrity([seq], set())


def test_head_is_found_again() -> None:
    blocks = BlockManager(16, BLOCK)
    first = compute(blocks, make_seq(list(range(10))))
    table = list(first.block_table)
    assert blocks.find_cached(make_seq(list(range(10)))) == table[:2], "full blocks only"
    blocks.free(first)
    assert (blocks.num_cached_blocks, blocks.num_used_blocks) == (2, 0)
    assert blocks.find_cached(make_seq([0, 1, 2, 3, 99, 5, 6, 7, 8])) == table[:1]
    assert blocks.find_cached(make_seq([99, 1, 2, 3, 4, 5, 6, 7, 8])) == []
    assert blocks.find_cached(make_seq([4, 5, 6, 7, 8])) == [], "the same tokens after another context"


@pytest.mark.parametrize(("length", "found"), [(4, 0), (5, 1), (8, 1), (9, 2)])
def test_one_token_is_left_to_compute(length: int, found: int) -> None:
    blocks = BlockManager(16, BLOCK)
    compute(blocks, make_seq(list(range(12))))
    assert len(blocks.find_cached(make_seq(list(range(length))))) == found


def test_namespaces_do_not_share() -> None:
    blocks = BlockManager(16, BLOCK)
    compute(blocks, make_seq(list(range(10)), b"a"))
    assert blocks.find_cached(make_seq(list(range(10)), b"b")) == []
    assert len(blocks.find_cached(make_seq(list(range(10)), b"a"))) == 2


def test_a_hit_compares_tokens_not_digests() -> None:
    blocks = BlockManager(16, BLOCK)
    compute(blocks, make_seq(list(range(10))))
    other = make_seq([7] * 10)
    other.block_keys = make_seq(list(range(10))).keys_of_full_blocks(2, BLOCK)
    assert blocks.find_cached(other) == []


def test_adopted_blocks_are_shared() -> None:
    blocks = BlockManager(16, BLOCK)
    first = compute(blocks, make_seq(list(range(10))))
    second = make_seq(list(range(10)))
    found = blocks.find_cached(second)
    free = blocks.num_free_blocks
    assert blocks.num_free_after(found) == free
    blocks.adopt(second, found)
    assert (second.num_computed_tokens, blocks.num_free_blocks) == (8, free)
    blocks.check_integrity([first, second], set())
    blocks.free(first)
    blocks.check_integrity([second], set())
    assert blocks.num_used_blocks == 2
    blocks.free(second)
    assert blocks.num_free_after(found) == blocks.num_free_blocks - 2
    blocks.check_integrity([], set())


def test_eviction_takes_blocks_without_content_then_the_least_recently_used() -> None:
    blocks = BlockManager(6, BLOCK)
    old, new = make_seq([1] * 8), make_seq([2] * 8)
    for seq in (old, new):
        compute(blocks, seq)
        blocks.free(seq)
    more = make_seq([3] * 8)
    blocks.grow(more, 8)
    assert len(blocks.find_cached(make_seq([1] * 9))) == len(blocks.find_cached(make_seq([2] * 9))) == 2
    blocks.grow(more, 12)
    assert len(blocks.find_cached(make_seq([1] * 9))) == 1, "its end goes first"
    assert len(blocks.find_cached(make_seq([2] * 9))) == 2
    blocks.grow(more, 16)
    assert blocks.find_cached(make_seq([1] * 9)) == []
    blocks.check_integrity([more], set())


def test_caching_can_be_turned_off() -> None:
    blocks = BlockManager(8, BLOCK, enable_caching=False)
    blocks.free(compute(blocks, make_seq(list(range(10)))))
    assert blocks.find_cached(make_seq(list(range(10)))) == []
    assert blocks.num_cached_blocks == 0


def test_reset_forgets_content_and_keeps_holders() -> None:
    blocks = BlockManager(8, BLOCK)
    seq = compute(blocks, make_seq(list(range(10))))
    blocks.reset_prefix_cache()
    assert blocks.find_cached(make_seq(list(range(10)))) == []
    blocks.check_integrity([seq], set())
    blocks.free(seq)
    assert blocks.num_free_blocks == 8


def test_free_does_nothing_for_a_system_prompt() -> None:
    blocks = BlockManager(8, BLOCK)
    prompt = Sequence("sp", list(range(8)), is_system_prompt=True)
    prompt.block_table, prompt.num_computed_tokens = [6, 7], 8
    blocks.vacate([Extent(6, 2)], [])
    blocks.free(prompt)
    assert (prompt.block_table, prompt.num_computed_tokens) == ([6, 7], 8)
    blocks.check_integrity([], {6, 7})


@pytest.mark.parametrize(("prompt_len", "shared", "copied"), [(9, 2, 0), (10, 2, 1), (4, 0, 1), (1, 0, 0)])
def test_fork_shares_full_blocks_and_copies_the_rest(prompt_len: int, shared: int, copied: int) -> None:
    blocks = BlockManager(16, BLOCK)
    parent = compute(blocks, make_seq(list(range(prompt_len))))
    parent.token_ids = [*parent.token_ids, 77]
    child = make_seq(list(range(prompt_len)))
    copies = blocks.fork(parent, child)
    assert copies is not None and len(copies.full) == copied and not copies.window
    assert child.block_table[:shared] == parent.block_table[:shared]
    assert len(child.block_table) == shared + copied
    assert copies.full == list(zip(parent.block_table[shared:], child.block_table[shared:], strict=False))[:copied]
    assert child.num_computed_tokens == prompt_len - 1, "the last prompt token is computed again, for its logits"
    blocks.check_integrity([parent, child], set())


def test_fork_without_a_free_block() -> None:
    blocks = BlockManager(3, BLOCK)
    parent = compute(blocks, make_seq(list(range(10))))
    child = make_seq(list(range(10)))
    assert blocks.fork(parent, child) is None
    assert child.block_table == []
    blocks.check_integrity([parent], set())


def test_fork_from_a_parent_that_lost_its_blocks() -> None:
    blocks = BlockManager(8, BLOCK)
    parent = compute(blocks, make_seq(list(range(10))))
    blocks.free(parent)
    assert blocks.fork(parent, make_seq(list(range(10)))) is None


def test_vacate_moves_used_blocks_and_drops_cached_ones() -> None:
    blocks = BlockManager(8, BLOCK)
    cached = compute(blocks, make_seq([1] * 8))
    used = compute(blocks, make_seq([2] * 8))
    sharer = make_seq([2] * 9)
    blocks.adopt(sharer, blocks.find_cached(sharer))
    blocks.free(cached)
    before = list(used.block_table)
    assert before == [2, 3]
    moves = blocks.vacate([Extent(0, 4)], [used, sharer])
    assert moves is not None
    assert [source for source, _ in moves] == [2, 3]
    assert all(destination in range(4, 8) for _, destination in moves)
    assert used.block_table == sharer.block_table == [destination for _, destination in moves]
    assert blocks.find_cached(make_seq([1] * 9)) == []
    assert blocks.find_cached(make_seq([2] * 9)) == used.block_table, "found at its new place"
    blocks.check_integrity([used, sharer], {0, 1, 2, 3})
    assert blocks.num_schedulable_blocks == 4
    blocks.give_back(Extent(0, 4))
    blocks.check_integrity([used, sharer], set())


def test_vacate_without_room_changes_nothing() -> None:
    blocks = BlockManager(8, BLOCK)
    seq = compute(blocks, make_seq(list(range(20))))
    table = list(seq.block_table)
    assert blocks.vacate([Extent(0, 4)], [seq]) is None
    assert seq.block_table == table
    blocks.check_integrity([seq], set())
    assert blocks.vacate([Extent(5, 1), Extent(6, 2)], [seq]) == []
    blocks.check_integrity([seq], {5, 6, 7})
