"""What the pool does for a request, when a prompt may be pinned, and when its pin ends."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from vllm.config import SystemPromptConfig
from vllm.core.pinned_prompt import prompt_id
from vllm.core.pool_log import PoolLog
from vllm.core.prompt_index import EVERYBODY
from vllm.core.prompt_tiers import PromptTiers
from vllm.core.system_prompt_pool import (
    Outcome,
    PinClass,
    PinnedPrompt,
    PromptState,
    SystemPromptPool,
    SystemPromptRefusedError,
)
from vllm.core.wants import Want
from vllm.inputs import CacheMark
from vllm.kv_cache.extents import Extent, PinnedBlockPool
from vllm.sampling_params import SamplingParams
from vllm.sequence import Sequence
from vllm.step import StepPlan
from vllm.system_prompt_store.manifest import SnapshotRecord
from vllm.token_ids import token_array

BLOCK = 4
A, B = [1] * 10, [2] * 7


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A pool of 20 blocks, 10 of which may be pinned and 10 must not be, and a clock that stands still."""

    def __init__(
        self, blocks: tuple[int, int, int] = (20, 10, 10), tiers: PromptTiers | None = None, **config: Any
    ) -> None:
        self.clock = Clock()
        self.released: list[Extent] = []
        self.blocks = PinnedBlockPool(*blocks)
        self.pool = SystemPromptPool(
            SystemPromptConfig(**config),
            self.blocks,
            BLOCK,
            on_release=self.released.append,
            clock=self.clock,
            tiers=tiers,
        )

    def request(self, token_ids: list[int], tenant: bytes = b"", namespace: bytes = b"", **params: Any) -> Sequence:
        return Sequence("r", list(token_ids), SamplingParams(**params), tenant=tenant, namespace=namespace)

    def begin(self) -> PinnedPrompt:
        """The first pending prompt gets its place."""
        prompt = self.pool.pending[0]
        extents = self.pool.find_room(prompt)
        assert extents is not None
        self.pool.place(prompt, extents)
        return prompt

    def prefill(self) -> list[Sequence]:
        """Computes the first pending prompt."""
        prompt = self.begin()
        self.pool.begin_prefill(prompt)
        waiters = self.pool.end_prefill(prompt)
        self.pool.note_prefill(prompt)
        return waiters

    def prefill_all(self) -> None:
        while self.pool.pending:
            self.prefill()

    def pinned(self, token_ids: list[int], **options: Any) -> PinnedPrompt:
        prompt = self.pool.add(list(token_ids), **options)
        self.prefill()
        return prompt


def test_first_request_creates_and_pays_the_others_hit() -> None:
    bench = Bench()
    first, second, third = (bench.request([*A, 50 + i]) for i in range(3))
    assert bench.pool.route(first, 10) == Outcome.PROBATION
    assert bench.pool.route(second, 10) == Outcome.HIT
    assert (first.num_cache_write_tokens, second.num_cache_write_tokens) == (10, 0)
    assert bench.pool.is_waiting(first) and bench.pool.is_waiting(second)
    assert bench.prefill() == [first, second]
    assert not bench.pool.is_waiting(first)
    assert bench.pool.route(third, 10) == Outcome.HIT
    prompt = third.system_prompt
    assert prompt is not None and first.system_prompt is prompt
    assert (prompt.readers, prompt.hits, bench.pool.tokens_reused, bench.pool.num_prefills) == (3, 2, 20, 1)
    assert bench.pool.outcomes == {"probation": 1, "hit": 2}
    assert (prompt.num_blocks, bench.pool.pinned_tokens) == (3, 10)
    bench.pool.check_integrity({prompt.id: 3})


def test_identity_is_the_tokens() -> None:
    assert prompt_id(A) == prompt_id(list(A)) != prompt_id(A[:-1])
    assert prompt_id(A).startswith("sp-") and len(prompt_id(A)) == 35


def test_a_request_that_names_no_system_prompt_reads_the_longest_known_one() -> None:
    bench = Bench()
    short, long = bench.pinned(A[:4]), bench.pinned(A)
    for token_ids, found in (([*A, 5], long), (A, short), (A[:9], short), ([*A[:4], 5], short), (A[:4], None)):
        seq = bench.request(token_ids)
        assert bench.pool.route(seq, None) == (Outcome.HIT if found else None)
        assert seq.system_prompt is found
    assert bench.pool.num_prompts == 2, "nothing is pinned for such a request"


def test_too_short() -> None:
    bench = Bench(min_tokens=8)
    assert bench.pool.route(bench.request([*B, 5]), 7) == Outcome.TOO_SHORT
    assert bench.pool.route(bench.request([*A[:8], 5]), 8) == Outcome.PROBATION
    with pytest.raises(SystemPromptRefusedError, match="has 7 tokens; --system-prompt-min-tokens asks for at least 8"):
        bench.pool.add(B)


def test_over_budget() -> None:
    bench = Bench()
    bench.pinned([3] * 29)
    seq = bench.request([*A, 5])
    assert bench.pool.route(seq, 10) == Outcome.OVER_BUDGET
    assert seq.system_prompt is None and not bench.pool.is_waiting(seq)
    with pytest.raises(SystemPromptRefusedError) as caught:
        bench.pool.add(A)
    assert caught.value.outcome == Outcome.OVER_BUDGET
    assert str(caught.value) == (
        "The system prompt has 10 tokens, but 32 of the pool's 40 tokens are taken; "
        "remove a prompt or raise --system-prompt-cache-tokens."
    )
    assert bench.pool.route(bench.request([*B, 5]), 7) == Outcome.PROBATION, "two blocks are left"


def test_what_waits_for_its_prefill_counts_against_the_budget() -> None:
    bench = Bench()
    bench.pool.add([3] * 29)
    assert bench.pool.route(bench.request([*A, 5]), 10) == Outcome.OVER_BUDGET


def test_a_refused_prompt_may_still_read_a_shorter_one() -> None:
    bench = Bench(min_tokens=8)
    short = bench.pinned(A)
    bench.pinned([3] * 20)
    seq = bench.request([*A, *[4] * 20, 5])
    assert bench.pool.route(seq, 30) == Outcome.HIT
    assert seq.system_prompt is short


def test_declared_mode_pins_only_what_was_added() -> None:
    bench = Bench(mode="declared")
    assert bench.pool.route(bench.request([*A, 5]), 10) == Outcome.DISABLED
    assert not bench.pool.has_prefill
    prompt = bench.pinned(A)
    assert bench.pool.route(bench.request([*A, 5]), 10) == Outcome.HIT
    assert prompt.source == "declared"


def test_off() -> None:
    bench = Bench(mode="off")
    assert bench.pool.route(bench.request([*A, 5]), 10) == Outcome.DISABLED
    assert bench.pool.route(bench.request([*A, 5]), None) is None
    with pytest.raises(SystemPromptRefusedError, match=r"The system-prompt pool is off \(--system-prompt-cache off\)"):
        bench.pool.add(A)


def test_prompt_logprobs_run_unpinned() -> None:
    bench = Bench()
    bench.pinned(A)
    seq = bench.request([*A, 5], prompt_logprobs=1)
    assert bench.pool.route(seq, 10) == Outcome.PROMPT_LOGPROBS
    assert bench.pool.route(bench.request([*A, 5], prompt_logprobs=1), None) is None
    assert seq.system_prompt is None


def test_adding_again_is_the_same_prompt() -> None:
    bench = Bench()
    seq = bench.request([*A, 5])
    bench.pool.route(seq, 10)
    prompt = seq.system_prompt
    assert prompt is not None and prompt.source == "auto"
    assert bench.pool.add(A, name="library", ttl=5.0) is prompt
    assert (prompt.source, prompt.name, prompt.ttl) == ("declared", "library", 5.0)
    bench.pool.add(A)
    assert (prompt.name, prompt.ttl) == ("library", None), "a name stays, a ttl is as given last"
    bench.prefill()
    assert (bench.pool.num_prefills, bench.pool.num_prompts) == (1, 1)


def test_removal_waits_for_readers() -> None:
    bench = Bench()
    prompt = bench.pinned(A)
    readers = [bench.request([*A, i]) for i in range(2)]
    for seq in readers:
        bench.pool.route(seq, 10)
    assert bench.pool.remove(prompt.id).info().state == "removing"
    assert bench.released == []
    late = bench.request([*A, 9])
    assert bench.pool.route(late, 10) == Outcome.BUSY
    assert late.system_prompt is None
    with pytest.raises(SystemPromptRefusedError, match="is being removed; its last readers still run"):
        bench.pool.add(A)
    bench.pool.detach(readers[0])
    assert bench.released == []
    bench.pool.detach(readers[1])
    assert bench.released == [Extent(17, 3)]
    assert prompt.info().state == "removed"
    assert bench.pool.num_prompts == bench.pool.pinned_tokens == bench.blocks.pinned_blocks == 0
    assert bench.pool.route(bench.request([*A, 5]), 10) == Outcome.PROBATION


def test_removal_of_what_nobody_reads_is_immediate() -> None:
    bench = Bench()
    prompt = bench.pinned(A)
    assert bench.pool.remove(prompt.id).info().state == "removed"
    assert bench.released == [Extent(17, 3)]
    with pytest.raises(KeyError):
        bench.pool.remove(prompt.id)


def test_removal_before_and_during_the_prefill() -> None:
    bench = Bench()
    pending = bench.pool.add(A)
    bench.pool.remove(pending.id)
    assert not bench.pool.has_prefill
    computing = bench.pool.add(A)
    assert bench.begin() is computing
    bench.pool.remove(computing.id)
    assert bench.pool.computing == [computing], "a rank is writing into its extent"
    bench.pool.end_prefill(computing)
    assert bench.released == [], "its last chunk is planned, but has not run"
    bench.pool.note_prefill(computing)
    assert bench.released == [Extent(17, 3)]
    bench.pool.check_integrity({})


def test_ttl_counts_from_the_last_use() -> None:
    bench = Bench()
    prompt = bench.pinned(A, ttl=60.0)
    forever = bench.pinned(B)
    bench.clock.now += 50
    seq = bench.request([*A, 5])
    bench.pool.route(seq, 10)
    bench.clock.now += 59.9
    bench.pool.expire()
    assert bench.pool.get(prompt.id) is prompt
    assert prompt.info().expires == pytest.approx(1110.0)
    bench.clock.now += 1000
    bench.pool.expire()
    assert bench.pool.get(prompt.id) is prompt, "it is being read"
    bench.pool.detach(seq)
    bench.pool.expire()
    assert bench.pool.get(prompt.id) is None
    assert bench.pool.prompts() == [forever]
    assert bench.released == [Extent(17, 3)]


def test_automatic_pins_take_the_configured_ttl() -> None:
    bench = Bench(ttl=60.0)
    seq = bench.request([*A, 5])
    bench.pool.route(seq, 10)
    bench.prefill()
    bench.pool.detach(seq)
    bench.clock.now += 59
    bench.pool.expire()
    assert bench.pool.num_prompts == 1
    bench.clock.now += 2
    bench.pool.expire()
    assert bench.pool.num_prompts == 0


def test_a_ttl_that_was_lifted_no_longer_counts() -> None:
    bench = Bench()
    bench.pinned(A, ttl=60.0)
    bench.pool.add(A)
    bench.clock.now += 1000
    bench.pool.expire()
    assert bench.pool.num_prompts == 1


def test_no_contiguous_room() -> None:
    bench = Bench()
    first, second = bench.request([*A, 5]), bench.request([*A, 6])
    bench.pool.route(first, 10)
    bench.pool.route(second, 10)
    prompt = first.system_prompt
    assert prompt is not None
    assert bench.pool.refuse(bench.pool.pending[0]) == [first, second]
    assert first.system_prompt is None and first.num_cache_write_tokens == 0
    assert bench.pool.outcomes == {"probation": 1, "hit": 1, "busy": 2}
    assert prompt.info().state == "removed"
    bench.pool.check_integrity({})


# Chains -----------------------------------------------------------------------------------------------------------


def test_a_prompt_that_starts_with_another_continues_its_extent() -> None:
    bench = Bench()
    parent = bench.pinned(A)
    child = bench.pinned([*A, *B])
    assert child.parent is parent and (child.num_own_tokens, child.num_blocks) == (7, 2)
    assert [e.num_tokens for e in child.prefix] == [10, 7]
    assert child.prefix[0] == parent.prefix[0] and child.sequence.num_computed_tokens == 10
    assert (bench.blocks.pinned_blocks, bench.pool.pinned_tokens) == (5, 17)
    seq = bench.request([*A, *B, 5])
    assert bench.pool.route(seq, 17) == Outcome.HIT
    assert seq.system_prompt is child and seq.prefix_len == 17
    assert bench.pool.tokens_reused == 17
    bench.pool.check_integrity({child.id: 1})


def test_a_parent_stays_while_a_child_does() -> None:
    bench = Bench()
    parent, child = bench.pinned(A, ttl=60.0), bench.pinned([*A, *B], ttl=600.0)
    bench.clock.now += 100
    bench.pool.expire()
    assert bench.pool.num_prompts == 2, "its child holds it"
    assert bench.pool.remove(parent.id).info().state == "removing"
    late = bench.request([*A, *B, 6])
    assert bench.pool.route(late, None) == Outcome.HIT and late.system_prompt is child
    bench.pool.detach(late)
    bench.pool.remove(child.id)
    assert bench.released == [Extent(15, 2), Extent(17, 3)]
    assert bench.pool.num_prompts == bench.blocks.pinned_blocks == 0


def test_marks_are_pinned_as_nested_prefixes() -> None:
    bench = Bench()
    token_ids = [*A, *B, 4, 4, 4, 5]
    marks = [CacheMark(17, 300.0), CacheMark(20, 3600.0)]
    first = bench.request(token_ids)
    assert bench.pool.route(first, 10, marks) == Outcome.PROBATION
    assert first.num_cache_write_tokens == 20 and bench.pool.is_waiting(first)
    chain = sorted(bench.pool.prompts(), key=lambda p: p.num_tokens)
    assert [(p.num_tokens, p.pin, p.source, p.ttl) for p in chain] == [
        (10, PinClass.AUTOMATIC, "auto", None),
        (17, PinClass.SOFT, "marker", 300.0),
        (20, PinClass.SOFT, "marker", 3600.0),
    ]
    bench.prefill_all()
    again, other = bench.request(token_ids), bench.request([*A, *B, 9, 9])
    assert bench.pool.route(again, 10, marks) == Outcome.HIT and again.system_prompt is chain[2]
    assert bench.pool.route(other, 10) == Outcome.HIT and other.system_prompt is chain[1]
    assert (again.num_cache_write_tokens, other.num_cache_write_tokens) == (0, 0)
    # The next turn of the chat marks its own end: only what is new is computed.
    turn = bench.request([*token_ids, 6, 6, 6, 7])
    assert bench.pool.route(turn, 10, [CacheMark(17, 300.0), CacheMark(24, 300.0)]) == Outcome.PROBATION
    assert turn.num_cache_write_tokens == 4 and turn.system_prompt is not None
    assert turn.system_prompt.parent is chain[2]


def test_chains_are_bounded() -> None:
    bench = Bench()
    ids = list(range(40))
    for n in (4, 8, 12, 16, 20, 24):
        bench.pinned(ids[:n])
    depths = {p.num_tokens: p.depth for p in bench.pool.prompts()}
    assert depths == {4: 1, 8: 2, 12: 3, 16: 4, 20: 4, 24: 4}
    bench.pool.check_integrity({})


def test_what_a_refused_prompt_leaves_is_read_from_its_parent() -> None:
    bench = Bench()
    parent = bench.pinned(A)
    seq, deeper = bench.request([*A, *B, 5]), bench.request([*A, *B, 6, 6, 7])
    bench.pool.route(seq, 17)
    bench.pool.route(deeper, 19)
    assert deeper.system_prompt is not None and deeper.system_prompt.parent is seq.system_prompt
    assert bench.pool.refuse(bench.pool.pending[0]) == [seq]
    assert seq.system_prompt is parent and seq.num_cache_write_tokens == 0 and parent.readers == 1
    assert deeper.system_prompt.parent is parent and deeper.system_prompt.num_blocks == 3
    bench.pool.check_integrity({parent.id: 1, deeper.system_prompt.id: 1})
    assert bench.prefill() == [deeper]


# Classes ----------------------------------------------------------------------------------------------------------


def used(bench: Bench, token_ids: list[int], times: int = 1) -> None:
    """So many requests with a system part come and go."""
    for _ in range(times):
        bench.clock.now += 1
        seq = bench.request([*token_ids, 5])
        bench.pool.route(seq, len(token_ids))
        bench.prefill_all()
        bench.pool.detach(seq)


def present(bench: Bench, *prompts: list[int]) -> list[bool]:
    return [bench.pool.get(prompt_id(p)) is not None for p in prompts]


def test_an_operators_pin_displaces_what_is_on_probation_then_soft_then_automatic_ones() -> None:
    bench = Bench()
    soft = [[20 + i] * 8 for i in range(2)]
    for prompt in soft:
        bench.pinned(prompt, pin=PinClass.SOFT)
    automatic = [[30 + i] * 8 for i in range(2)]
    for prompt in automatic:
        used(bench, prompt, 2)
    once = [40] * 8
    used(bench, once)
    used(bench, soft[1])
    used(bench, automatic[0])
    used(bench, automatic[1], 4)
    order = [once, *soft, *automatic]
    assert present(bench, *order) == [True] * 5
    for i in range(5):
        bench.pinned([50 + i] * 8)
        assert present(bench, *order) == [False] * (i + 1) + [True] * (4 - i)
    assert bench.pool.num_displaced == 4, "what was on probation is not counted"
    with pytest.raises(SystemPromptRefusedError):
        bench.pool.add([35] * 8)
    bench.pool.check_integrity({})


def test_what_a_restart_brings_back_displaces_nothing_but_for_an_operator() -> None:
    bench = Bench()
    for i in range(5):
        used(bench, [30 + i] * 8, 2)
    tokens = [60] * 8
    record = SnapshotRecord(prompt_id(tokens), tokens, 0, 2, "automatic")
    assert bench.pool.restore(record) is None and bench.pool.num_displaced == 0
    assert bench.pool.restore(msgspec.structs.replace(record, pin="hard")) is not None
    assert bench.pool.num_displaced == 1


def test_what_is_read_gives_way_to_nothing() -> None:
    bench = Bench()
    reader = bench.request([*[20] * 20, 5])
    bench.pool.route(reader, 20)
    bench.prefill()
    with pytest.raises(SystemPromptRefusedError):
        bench.pool.add([33] * 24)
    assert bench.pool.route(bench.request([*[34] * 24, 5]), 24) == Outcome.OVER_BUDGET
    bench.pool.detach(reader)
    bench.pool.add([33] * 24)
    assert present(bench, [20] * 20) == [False]


def test_pins_that_lie_in_the_way_go_when_even_pieces_find_no_room() -> None:
    bench = Bench((22, 20, 2))
    kept = [bench.pinned([20 + i] * 4, pin=PinClass.SOFT) for i in range(20)]
    for prompt in kept[0:16:2]:
        bench.pool.remove(prompt.id)
    big = bench.pool.add([40] * 32)
    assert bench.pool.num_displaced == 0, "the budget has room"
    bench.prefill()
    assert big.state == PromptState.PINNED and bench.pool.num_displaced > 0
    assert 1 < len(big.extents) <= 5


def test_a_prompt_lies_in_pieces_where_no_room_is_that_long() -> None:
    bench = Bench((12, 10, 2))
    kept = [bench.pinned([20 + i] * 4) for i in range(10)]
    for i in (0, 1, 4, 5):
        bench.pool.remove(kept[i].id)
    parent, child = bench.pinned([40] * 10), bench.pinned([*[40] * 10, 7])
    assert parent.extents == (Extent(6, 2), Extent(11, 1)) and child.extents == (Extent(10, 1),)
    assert [(e.start_block, e.num_tokens) for e in child.prefix] == [(6, 8), (11, 2), (10, 1)]
    assert child.sequence.num_computed_tokens == 10 and parent.sequence.block_table == [6, 7, 11]
    bench.pool.check_integrity({})
    bench.pool.remove(child.id)
    bench.pool.remove(parent.id)
    assert bench.released[-3:] == [Extent(10, 1), Extent(6, 2), Extent(11, 1)]


# Scopes -----------------------------------------------------------------------------------------------------------


def test_private_pins_are_a_tenants_own() -> None:
    bench = Bench(private=True)
    first = bench.request([*A, 5], tenant=b"a", namespace=b"a")
    assert bench.pool.route(first, 10) == Outcome.PROBATION
    bench.prefill()
    other = bench.request([*A, 5], tenant=b"b", namespace=b"b")
    assert bench.pool.route(other, 10) == Outcome.PROBATION, "as if nobody had sent it"
    assert first.system_prompt is not other.system_prompt
    bench.prefill()
    again = bench.request([*A, 6], tenant=b"a", namespace=b"a-salt")
    assert bench.pool.route(again, 10) == Outcome.HIT and again.system_prompt is first.system_prompt
    operators = bench.pinned(B)
    seq = bench.request([*B, 5], tenant=b"a", namespace=b"a")
    assert bench.pool.route(seq, 7) == Outcome.HIT and seq.system_prompt is operators, "an operator's are for all"


def test_what_is_marked_beyond_the_system_part_is_read_in_its_namespace_alone() -> None:
    bench = Bench()
    marks = [CacheMark(17, 300.0)]
    first = bench.request([*A, *B, 5], tenant=b"t", namespace=b"n")
    bench.pool.route(first, 10, marks)
    bench.prefill_all()
    other = bench.request([*A, *B, 5], tenant=b"t", namespace=b"m")
    assert bench.pool.route(other, 10) == Outcome.HIT
    assert other.prefix_len == 10 and first.prefix_len == 17
    # What all may read never hangs on what only some may.
    bench.pool.add([*A, *B, 3, 3])
    bench.prefill()
    shared = bench.pool.prompts()[-1]
    assert shared.parent is not None and shared.parent.num_tokens == 10


@pytest.mark.parametrize(("markers", "sizes"), [("off", [10]), ("soft", [10, 17]), ("hard", [10, 17])])
def test_markers_as_the_operator_allows_them(markers: str, sizes: list[int]) -> None:
    bench = Bench(markers=markers)
    bench.pool.route(bench.request([*A, *B, 5]), 10, [CacheMark(17, 300.0), CacheMark(10, 60.0)])
    assert [p.num_tokens for p in bench.pool.prompts()] == sizes
    pins = {p.pin for p in bench.pool.prompts()}
    assert (PinClass.HARD in pins) == (markers == "hard") and (PinClass.SOFT in pins) == (markers == "soft")


def test_a_mark_makes_a_system_prompt_last_longer_never_shorter() -> None:
    bench = Bench(ttl=60.0)
    for ttl, want in ((30.0, 60.0), (3600.0, 3600.0), (300.0, 3600.0)):
        bench.pool.route(bench.request([*A, 5]), 10, [CacheMark(10, ttl)])
        assert bench.pool.prompts()[0].ttl == want
    declared = bench.pinned(B, ttl=5.0)
    bench.pool.route(bench.request([*B, 5]), 7, [CacheMark(7, 3600.0)])
    assert declared.ttl == 5.0, "an operator's word stands"


# Heads of raw prompts ---------------------------------------------------------------------------------------------


def test_a_long_head_seen_twice_is_offered() -> None:
    bench = Bench((2000, 1000, 100))
    head = list(range(1500))

    def route(tail: list[int], **options: Any) -> Outcome | None:
        return bench.pool.route(bench.request([*head, *tail], **options), None)

    assert route([1, 2]) is None and route([1, 2]) is None, "the same prompt again"
    assert route([1, 2, 3, 4]) is None, "the next turn of a conversation"
    assert route([7, 8], namespace=b"n") is None, "another namespace has not seen it"
    assert route([7, 8]) == Outcome.CREATED, "two have shared it: pinned at once"
    (prompt,) = bench.pool.prompts()
    assert (prompt.num_tokens, prompt.source, prompt.pin) == (1472, "shared_prefix", PinClass.AUTOMATIC)
    assert route([9]) == Outcome.HIT
    assert bench.pool.num_prompts == 1
    assert bench.pool.route(bench.request(list(range(2000, 3020))), None) is None
    assert bench.pool.route(bench.request([*range(2000, 3010), 1]), None) is None, "too short to matter"


def test_explaining_changes_nothing_and_routing_agrees() -> None:
    bench = Bench(min_tokens=5)
    bench.pinned(A)
    for token_ids, size, marks in (
        ([*A, 5], 10, []),
        ([*A[:8], 6, 6, 5], 10, []),
        ([7, 7, 7, 5], 3, []),
        ([8] * 80, 79, []),
        ([*A, *B, 5], 10, [CacheMark(17, 60.0)]),
        ([*A, 5], None, []),
        ([9, 9], None, []),
    ):
        state = (bench.pool.info(), [p.info() for p in bench.pool.prompts()])
        found = bench.pool.explain(bench.request(token_ids), size, marks)
        assert state == (bench.pool.info(), [p.info() for p in bench.pool.prompts()])
        seq = bench.request(token_ids)
        outcome = bench.pool.route(seq, size, marks)
        assert found["outcome"] == (outcome.value if outcome else None)
        assert found["pinned_tokens"] == seq.prefix_len
        assert found["id"] == (seq.system_prompt.id if seq.system_prompt else None)
        bench.prefill_all()


def test_a_prompt_declared_anew_while_its_last_chunk_runs_stays_until_it_is_saved() -> None:
    bench = Bench(tiers=PromptTiers(host_blocks=20))
    prompt = bench.pool.add(list(A), pin=PinClass.HARD)
    bench.begin()
    bench.pool.end_prefill(prompt)
    bench.pool.add(list(A), pin=PinClass.SOFT)
    assert not prompt.is_being_saved, "its last blocks are being written"
    bench.pool.note_prefill(prompt)
    assert prompt.is_being_saved, "it may leave the device now"
    bench.pool.remove(prompt.id)
    assert not bench.released
    saved = [bench.pool.tiers.plan_rest(StepPlan(rows=[0], counts=[1])) for _ in range(prompt.num_blocks)]
    assert saved == [[]] * (prompt.num_blocks - 1) + [[prompt]], "a block a step"
    bench.pool.end_save(prompt)
    assert bench.released and bench.pool.get(prompt.id) is None


def test_refusals_are_logged_a_line_a_second(caplog: pytest.LogCaptureFixture) -> None:
    log = PoolLog()
    want = Want(3, PinClass.AUTOMATIC, None, "auto", EVERYBODY)
    with caplog.at_level("INFO", logger="vllm.core.pool_log"):
        for i, now in enumerate((10.0, 10.1, 10.9, 11.1, 11.2)):
            seq = Sequence(f"r{i}", [1, 2, 3, i], SamplingParams())
            log.note_refusal(f"sp-{i}", token_array([1, 2, i]), want, Outcome.OVER_BUDGET, seq, now)
    assert [record.getMessage()[:33] for record in caplog.records] == [
        "System prompt sp-0 runs unpinned:",
        "System prompt sp-3 runs unpinned:",
    ]
    assert "2 others before" in caplog.records[1].getMessage()
    assert len(log.refused) == 5
