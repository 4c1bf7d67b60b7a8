"""What the pool does for a request, when a prompt may be pinned, and when its pin ends."""

from __future__ import annotations

from typing import Any

import pytest

from vllm.config import SystemPromptConfig
from vllm.core.pinned_prompt import prompt_id
from vllm.core.system_prompt_pool import Outcome, PinnedPrompt, SystemPromptPool, SystemPromptRefusedError
from vllm.sampling_params import SamplingParams
from vllm.sequence import Sequence
from vllm.worker.cache_engine import Extent, PinnedBlockPool

BLOCK = 4
A, B = [1] * 10, [2] * 7


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A pool of 20 blocks, 10 of which may be pinned, and a clock that stands still."""

    def __init__(self, **config: Any) -> None:
        self.clock = Clock()
        self.released: list[Extent] = []
        self.blocks = PinnedBlockPool(20, 10, 10)
        self.pool = SystemPromptPool(
            SystemPromptConfig(**config), self.blocks, BLOCK, on_release=self.released.append, clock=self.clock
        )

    def request(self, token_ids: list[int], **params: Any) -> Sequence:
        return Sequence("r", list(token_ids), SamplingParams(**params))

    def prefill(self) -> list[Sequence]:
        """Computes the next pending prompt."""
        pending = self.pool.next_pending
        assert pending is not None
        start = self.blocks.find_window(pending.num_blocks)
        assert start is not None
        self.pool.begin_prefill(start)
        return self.pool.end_prefill()

    def pinned(self, token_ids: list[int], **options: Any) -> PinnedPrompt:
        prompt = self.pool.add(list(token_ids), **options)
        self.prefill()
        return prompt


def test_first_request_creates_and_pays_the_others_hit() -> None:
    bench = Bench()
    first, second, third = (bench.request([*A, 50 + i]) for i in range(3))
    assert bench.pool.route(first, 10) == Outcome.CREATED
    assert bench.pool.route(second, 10) == Outcome.HIT
    assert (first.num_cache_write_tokens, second.num_cache_write_tokens) == (10, 0)
    assert bench.pool.is_waiting(first) and bench.pool.is_waiting(second)
    assert bench.prefill() == [first, second]
    assert not bench.pool.is_waiting(first)
    assert bench.pool.route(third, 10) == Outcome.HIT
    prompt = third.system_prompt
    assert prompt is not None and first.system_prompt is prompt
    assert (prompt.readers, prompt.hits, bench.pool.tokens_reused, bench.pool.num_prefills) == (3, 2, 20, 1)
    assert bench.pool.outcomes == {"created": 1, "hit": 2}
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
    assert bench.pool.route(bench.request([*A[:8], 5]), 8) == Outcome.CREATED
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
    assert bench.pool.route(bench.request([*B, 5]), 7) == Outcome.CREATED, "two blocks are left"


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
    assert bench.pool.route(bench.request([*A, 5]), 10) == Outcome.CREATED


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
    bench.pool.begin_prefill(17)
    bench.pool.remove(computing.id)
    assert bench.pool.computing is computing, "a rank is writing into its extent"
    bench.pool.end_prefill()
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
    assert bench.pool.refuse_pending() == [first, second]
    assert first.system_prompt is None and first.num_cache_write_tokens == 0
    assert bench.pool.outcomes == {"created": 1, "hit": 1, "busy": 2}
    assert prompt.info().state == "removed"
    bench.pool.check_integrity({})
