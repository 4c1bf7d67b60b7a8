"""Who goes first when memory is short."""

from __future__ import annotations

from typing import Any

from vllm.config import SchedulerConfig, SystemPromptConfig
from vllm.core.block_manager import BlockManager
from vllm.core.scheduler import Scheduler
from vllm.core.system_prompt_pool import SystemPromptPool
from vllm.sampling_params import SamplingParams
from vllm.sequence import Sequence
from vllm.worker.cache_engine import PinnedBlockPool

BLOCK, NUM_BLOCKS, MAX_LEN = 4, 24, 40


def make_scheduler() -> Scheduler:
    blocks = BlockManager(NUM_BLOCKS, BLOCK)
    pool = SystemPromptPool(
        SystemPromptConfig(chunk_tokens=8),
        PinnedBlockPool(NUM_BLOCKS, 12, MAX_LEN // BLOCK),
        BLOCK,
        on_release=lambda e: blocks.give_back(e.start, e.num_blocks),
    )
    return Scheduler(SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64), blocks, pool, MAX_LEN)


def add(
    scheduler: Scheduler,
    name: str,
    prompt: list[int],
    max_tokens: int,
    num_system_tokens: int | None = None,
    **options: Any,
) -> None:
    scheduler.add([Sequence(name, prompt, SamplingParams(max_tokens=max_tokens), **options)], num_system_tokens)


def step(scheduler: Scheduler) -> set[str]:
    """Runs one step; returns the requests that ran in it."""
    plan = scheduler.schedule()
    ran = {s.request_id for s in scheduler.oldest_batch.sequences} if scheduler.num_in_flight else set()
    if scheduler.num_in_flight:
        scheduler.postprocess([7 if s else -1 for s in plan.samples])
    scheduler.check_integrity()
    return ran


def test_nobody_overtakes_a_request_whose_system_prompt_waits_for_room() -> None:
    scheduler = make_scheduler()
    for i in range(2):
        add(scheduler, f"long{i}", [i] * 36, max_tokens=3)
    assert step(scheduler) == {"long0", "long1"}
    # 18 of 24 blocks are in use; 10 for the new prompt find no room until one of them ends.
    add(scheduler, "pins", [5] * 39, max_tokens=1, num_system_tokens=38)
    add(scheduler, "late", [9] * 4, max_tokens=1)
    assert step(scheduler) == {"long0", "long1"}, "a later request would take the room that is being waited for"
    order: list[str] = []
    for _ in range(20):
        order += sorted(step(scheduler) - set(order))
        if not scheduler.has_work():
            break
    assert {"pins", "late"} <= set(order)
    assert scheduler.pool.num_prefills == 1


def test_a_prefill_in_progress_holds_nobody_up() -> None:
    scheduler = make_scheduler()
    add(scheduler, "pins", [5] * 39, max_tokens=1, num_system_tokens=38)
    add(scheduler, "late", [9] * 4, max_tokens=1)
    assert step(scheduler) == {"late"}, "38 tokens take five chunks of 8; others run meanwhile"
    assert scheduler.pool.computing is not None


def test_decode_goes_on_while_a_long_prompt_is_prefilled() -> None:
    scheduler = make_scheduler()
    add(scheduler, "short", [1] * 4, max_tokens=20)
    step(scheduler)
    add(scheduler, "pins", [5] * 39, max_tokens=1, num_system_tokens=38)
    for _ in range(4):
        assert "short" in step(scheduler)


def test_later_steps_of_a_search_come_before_requests_that_came_after_it() -> None:
    scheduler = make_scheduler()
    add(scheduler, "first step", [1] * 4, max_tokens=1, arrival_time=1000.0)
    for i in range(12):
        add(scheduler, f"newer{i}", [i] * 4, max_tokens=3, arrival_time=1000.1)
    assert "first step" in step(scheduler), "one row of eight is free again"
    for i in range(2):
        add(scheduler, f"beam{i}", [1] * 5, max_tokens=1, arrival_time=1000.0, goes_on=True)
    ran = step(scheduler)
    assert "beam0" in ran and "newer7" not in ran, "the search goes on before those that wait"
    assert "beam1" in step(scheduler)
    add(scheduler, "newest", [9] * 4, max_tokens=1, arrival_time=999.0)
    order: list[str] = []
    while scheduler.has_work():
        order += sorted(step(scheduler) - set(order))
    assert order.index("newest") > order.index("newer11"), "a clock that was set back puts nobody in front"
