"""Arrays of token ids: those of prefixes that prompts share are found again, and only for the same ids."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm.token_ids import KnownPrefixes, token_array

IDS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=30), st.integers(1, 4))
def test_what_is_found_is_the_array_of_the_same_ids(prompts: list[tuple[list[int], list[int]]], most: int) -> None:
    known = KnownPrefixes(most)
    for head, rest in prompts:
        found = known.find(head + rest, len(head))
        assert found is None or found == token_array(head)
        known.keep(head, token_array(head))
        assert known.find(head + rest, len(head)) == token_array(head)


def test_those_not_used_for_longest_are_forgotten() -> None:
    known = KnownPrefixes(2)
    heads = [[i, 7] for i in range(3)]
    for head in heads[:2]:
        known.keep(head, token_array(head))
    assert known.find(heads[0], 2) is not None
    known.keep(heads[2], token_array(heads[2]))
    assert [known.find(head, 2) is not None for head in heads] == [True, False, True]


def test_a_scope_does_not_notice_what_another_one_has_sent() -> None:
    known = KnownPrefixes()
    known.keep([1, 2], token_array([1, 2]), "a")
    assert known.find([1, 2, 3], 2, "a") == token_array([1, 2])
    assert known.find([1, 2, 3], 2, "b") is None and known.find([1, 2, 3], 2) is None
