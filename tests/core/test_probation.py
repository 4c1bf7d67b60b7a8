"""Prompts that come once cost nobody anything, and those that come again are pinned."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from vllm.config import SchedulerConfig, SystemPromptConfig
from vllm.core.block_manager import BlockManager
from vllm.core.prompt_tiers import PromptTiers
from vllm.core.scheduler import Scheduler
from vllm.core.system_prompt_pool import Outcome, PinClass, SystemPromptPool, SystemPromptRefusedError
from vllm.kv_cache.extents import PinnedBlockPool
from vllm.sampling_params import SamplingParams
from vllm.sequence import Sequence
from vllm.step import StepPlan

BLOCK, MAX_LEN = 4, 64
SIZE = 12  # Tokens of a prompt: three blocks.


class Bench:
    """A scheduler and a pool that has room for so many prompts.

    Args:
        room: Prompts that the budget holds.
        more: Blocks of the cache beside these and one longest sequence.
        host: Prompts that the host tier holds.
    """

    def __init__(self, room: int, more: int = 40, host: int = 0, copied: int = 100, snapshots: bool = False) -> None:
        self.now = 0.0
        budget = room * SIZE // BLOCK
        num_blocks = budget + MAX_LEN // BLOCK + more
        self.blocks = BlockManager(num_blocks, BLOCK)
        self.tiers = PromptTiers(host * SIZE // BLOCK, snapshots, copy_blocks=copied)
        self.pool = SystemPromptPool(
            SystemPromptConfig(),
            PinnedBlockPool(num_blocks, budget, MAX_LEN // BLOCK),
            BLOCK,
            on_release=self.blocks.give_back,
            clock=lambda: self.now,
            tiers=self.tiers,
        )
        self.scheduler = Scheduler(SchedulerConfig(32, 256), self.blocks, self.pool, MAX_LEN)
        self.plans: list[StepPlan] = []
        self.num_requests = 0

    def add(self, prompt: list[int], max_tokens: int = 1) -> Sequence:
        seq = Sequence(f"r{self.num_requests}", [*prompt, 7], SamplingParams(max_tokens=max_tokens))
        self.num_requests += 1
        self.scheduler.add([seq], len(prompt))
        return seq

    def step(self) -> None:
        self.now += 1
        plan = self.scheduler.schedule()
        if not plan.is_empty:
            self.plans.append(plan)
            self.scheduler.postprocess([9 if s else -1 for s in plan.samples])

    def settle(self) -> None:
        while self.scheduler.has_work():
            self.step()
        if self.num_requests < 500 or self.num_requests % 500 == 0:
            self.scheduler.check_integrity()

    def ask(self, prompt: list[int]) -> Outcome | None:
        """A request with this prompt comes and goes; returns what the pool did for it."""
        before = self.pool.outcomes.copy()
        self.add(prompt)
        self.settle()
        (found,) = (self.pool.outcomes - before).elements() or (None,)
        return found

    def states(self, prompts: Iterable[list[int]]) -> list[str | None]:
        found = {tuple(p.token_ids): p.info().state for p in self.pool.prompts()}
        return [found.get(tuple(prompt)) for prompt in prompts]


def prompt(i: int) -> list[int]:
    return [1000 + i] * SIZE


@pytest.mark.parametrize("count", [1500, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_thousands_that_come_once_do_not_keep_those_that_come_again_from_being_pinned(count: int) -> None:
    bench = Bench(room=20)
    for i in range(count):
        assert bench.ask(prompt(i)) == Outcome.PROBATION
    assert bench.pool.num_prompts <= 20
    reused = [prompt(20_000 + i) for i in range(20)]
    for some in (reused, reused):
        for one in some:
            bench.ask(one)
    assert bench.states(reused) == ["pinned"] * 20
    assert all(p.info().uses == 2 for p in bench.pool.prompts())
    for i in range(200):
        assert bench.ask(prompt(30_000 + i)) == Outcome.OVER_BUDGET, "they displace no pin"
    assert bench.states(reused) == ["pinned"] * 20


@pytest.mark.parametrize("room", [1, 3])
def test_each_prompt_is_pinned_at_its_second_request_in_a_row_however_small_the_pool(room: int) -> None:
    bench = Bench(room)
    for i in range(20):
        assert bench.ask(prompt(i)) == (Outcome.PROBATION if i < room else Outcome.OVER_BUDGET)
        bench.ask(prompt(i))
        assert bench.states([prompt(i)]) == ["pinned"], i
    assert bench.pool.num_displaced == 20 - room


def test_what_is_asked_for_often_is_not_displaced_by_what_comes_twice() -> None:
    bench = Bench(room=2)
    often = prompt(0)
    for _ in range(5):
        bench.ask(often)
    for i in range(1, 30):
        bench.ask(prompt(i))
        bench.ask(prompt(i))
        bench.ask(often)
        assert bench.states([often, prompt(i)]) == ["pinned", "pinned"]
    assert bench.pool.get(bench.pool.prompts()[0].id).uses == 34


def test_prompts_that_come_in_turn_do_not_all_drive_each_other_out() -> None:
    bench = Bench(room=10)
    hits = 0
    for _ in range(6):
        hits = sum(bench.ask(prompt(i)) == Outcome.HIT for i in range(16))
    assert hits >= 9


def test_a_herd_for_one_new_prompt_is_one_prefill_and_a_pin() -> None:
    bench = Bench(room=4)
    for _ in range(25):
        bench.add(prompt(0))
    bench.settle()
    assert bench.pool.outcomes == {"probation": 1, "hit": 24} and bench.pool.num_prefills == 1
    assert bench.states([prompt(0)]) == ["pinned"]
    assert sum(plan.num_tokens for plan in bench.plans) == SIZE + 25


def test_siblings_of_one_request_are_one_use() -> None:
    bench = Bench(room=4)
    params = SamplingParams(max_tokens=2, n=3)
    bench.scheduler.add([Sequence("r", [*prompt(0), 7], params, index=i) for i in range(3)], SIZE)
    bench.settle()
    assert bench.states([prompt(0)]) == ["probation"]


def test_what_is_on_probation_vanishes_when_requests_need_blocks() -> None:
    bench = Bench(room=10, more=0)
    for i in range(10):
        bench.ask(prompt(i))
    pin = prompt(9)
    bench.ask(pin)
    assert bench.blocks.num_schedulable_blocks == MAX_LEN // BLOCK
    # Two sequences of 15 blocks: they run together, and nobody is preempted.
    for i in range(2):
        bench.scheduler.add([Sequence(f"long{i}", [i] * 40, SamplingParams(max_tokens=20, ignore_eos=True))])
    bench.step()
    assert len(bench.scheduler.running) == 2
    assert bench.states(prompt(i) for i in range(2)) == [None, None], "the oldest first"
    assert bench.states([prompt(8), pin]) == ["probation", "pinned"]
    bench.settle()
    assert bench.scheduler.num_preemptions == 0
    assert bench.states([pin]) == ["pinned"]
    assert bench.states(prompt(i) for i in range(5)) == [None] * 5


def test_a_prompt_that_had_to_leave_is_known_again() -> None:
    bench = Bench(room=2)
    for i in range(3):
        bench.ask(prompt(i))
    assert bench.states(prompt(i) for i in range(3)) == [None, "probation", "probation"]
    assert bench.ask(prompt(0)) == Outcome.CREATED
    assert bench.states([prompt(0)]) == ["pinned"]


def test_an_operator_finds_room_in_a_pool_full_of_automatic_pins() -> None:
    bench = Bench(room=8)
    for i in [*range(8), *range(8)]:
        bench.ask(prompt(i))
    for i in range(4):
        bench.ask(prompt(i))
    bench.scheduler.add_system_prompt([5] * 3 * SIZE)
    reader = bench.add(prompt(0), max_tokens=30)
    bench.step()
    assert reader.prefix_len == SIZE
    hard = bench.scheduler.add_system_prompt([6] * 4 * SIZE)
    assert bench.states([prompt(0)]) == ["pinned"], "it is being read"
    with pytest.raises(SystemPromptRefusedError):
        bench.scheduler.add_system_prompt([8] * SIZE)
    bench.settle()
    assert hard.state == "pinned" and len(bench.pool.prompts()) == 3
    assert bench.scheduler.add_system_prompt([8] * SIZE).pin == PinClass.HARD
    bench.settle()
    assert bench.states([[5] * 3 * SIZE, [6] * 4 * SIZE, [8] * SIZE]) == ["pinned"] * 3


def test_a_newcomer_that_nobody_waits_for_any_more_is_dropped() -> None:
    bench = Bench(room=2)
    bench.add(prompt(0))
    bench.scheduler.abort("r0")
    bench.settle()
    assert bench.pool.num_prompts == bench.pool.num_prefills == 0
    bench.pool.check_integrity({})


def test_the_head_of_a_prompt_on_probation_is_pinned_with_what_continues_it_twice() -> None:
    bench = Bench(room=6)
    head, longer = prompt(0), [*prompt(0), *[7] * SIZE]
    bench.ask(head)
    bench.ask(longer)
    assert bench.states([head, longer]) == ["pinned", "probation"]
    bench.ask(longer)
    assert bench.states([head, longer]) == ["pinned", "pinned"]


# Tiers --------------------------------------------------------------------------------------------------------------


def test_what_came_once_waits_on_the_host_and_is_loaded_when_it_comes_again() -> None:
    bench = Bench(room=4, host=20)
    for _ in range(3):
        for i in range(16):
            bench.ask(prompt(i))
    assert bench.pool.num_prefills == 16, "more than the device holds, and none is computed twice"
    assert bench.pool.outcomes == {"probation": 16, "hit": 32}
    assert sorted(set(bench.states(prompt(i) for i in range(16)))) == ["host", "pinned"]


def test_more_than_both_tiers_hold_are_still_found_for_the_most_part() -> None:
    bench = Bench(room=4, host=12)
    for i in range(20):
        bench.ask(prompt(i))
    hits = [bench.ask(prompt(i)) == Outcome.HIT for i in range(20)]
    assert sum(hits) >= 12, hits


def test_a_stream_of_newcomers_gets_the_room_on_the_host_that_nobody_has_asked_for() -> None:
    bench = Bench(room=3, host=4)
    reused = [prompt(i) for i in range(2)]
    for one in [*reused, *reused]:
        bench.ask(one)
    for i in range(100, 140):
        bench.ask(prompt(i))
        bench.ask(reused[i % 2])
    on_host = {tuple(p.token_ids) for p in bench.pool.prompts() if bench.tiers.is_on_host(p)}
    assert all(tuple(one) in on_host for one in reused), "what was reused stays"
    assert any(one[0] >= 1130 for one in on_host), "the others take turns"
    bench.pool.check_integrity({})


def test_a_newcomers_copy_is_given_up_when_requests_need_its_blocks() -> None:
    bench = Bench(room=4, more=0, host=4, copied=1)
    for i in range(4):
        bench.add(prompt(i))
    bench.step()
    assert all(p.is_being_saved for p in bench.pool.prompts())
    for i in range(2):
        bench.scheduler.add([Sequence(f"long{i}", [i] * 40, SamplingParams(max_tokens=3))])
    bench.step()
    assert len(bench.scheduler.running) == 2 and bench.pool.num_prompts < 4
    bench.settle()


def test_only_what_is_pinned_is_written_to_disk() -> None:
    bench = Bench(room=4, snapshots=True)
    bench.add(prompt(0))
    bench.step()
    bench.step()
    assert not any(plan.jobs or plan.transfers for plan in bench.plans)
    bench.add(prompt(0))
    for _ in range(3):
        bench.step()
    assert [job.op for plan in bench.plans for job in plan.jobs] == ["save"]


def test_several_prompts_are_loaded_and_computed_at_the_same_time() -> None:
    bench = Bench(room=6, host=20, copied=1)
    for i in range(10):
        bench.ask(prompt(i))
    bench.tiers.copy_blocks = 1
    bench.scheduler.add([Sequence("running", [3] * 8, SamplingParams(max_tokens=30))])
    bench.step()
    on_host = [p for p in bench.pool.prompts() if p.state == "host"][:2]
    waiting = [bench.add(p.token_ids.tolist()) for p in on_host]
    new = bench.add(prompt(100))
    bench.step()
    assert sum(p.state == "loading" for p in bench.pool.prompts()) == 2
    assert new.num_output_tokens == 1, "it was computed meanwhile"
    bench.settle()
    assert [seq.num_output_tokens for seq in waiting] == [1, 1] and bench.pool.num_prefills == 11


def test_random_traffic_keeps_every_rule() -> None:
    rng = random.Random(1)
    bench = Bench(room=6, more=4, host=9, copied=2)
    for _ in range(600):
        if rng.random() < 0.6:
            bench.add(prompt(min(rng.randrange(60), rng.randrange(60))), max_tokens=rng.randint(1, 12))
        bench.step()
        bench.scheduler.check_integrity()
    bench.settle()
    assert bench.pool.num_readers == 0 and bench.blocks.num_used_blocks == 0
