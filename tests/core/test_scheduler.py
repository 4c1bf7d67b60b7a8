"""Who goes first when memory is short."""

from __future__ import annotations

from typing import Any

from vllm.config import SchedulerConfig, SystemPromptConfig
from vllm.core.block_manager import BlockManager
from vllm.core.scheduler import Scheduler
from vllm.core.system_prompt_pool import SystemPromptPool
from vllm.kv_cache.extents import PinnedBlockPool
from vllm.sampling_params import SamplingParams
from vllm.sequence import Sequence
from vllm.step import PROMPT_ROWS, StepPlan

BLOCK, NUM_BLOCKS, MAX_LEN = 4, 24, 40


def make_scheduler(
    max_num_batched_tokens: int = 64,
    max_num_seqs: int = 8,
    num_blocks: int = NUM_BLOCKS,
    budget: int = 12,
    **limits: int,
) -> Scheduler:
    blocks = BlockManager(num_blocks, BLOCK)
    pool = SystemPromptPool(
        SystemPromptConfig(),
        PinnedBlockPool(num_blocks, budget, MAX_LEN // BLOCK),
        BLOCK,
        on_release=blocks.give_back,
    )
    return Scheduler(SchedulerConfig(max_num_seqs, max_num_batched_tokens, **limits), blocks, pool, MAX_LEN)


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
    batch = scheduler.oldest_batch.sequences if scheduler.num_in_flight else []
    ran = {s.request_id for s in batch if not s.is_system_prompt}
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


def entries(plan: StepPlan) -> list[tuple[int, int, int]]:
    """(row, start, count) of what a plan computes, in order of rows."""
    return sorted(zip(plan.rows, plan.starts, plan.counts, strict=True))


def test_new_prompts_and_requests_share_a_step_in_the_order_in_which_they_came() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=26)
    for i in range(3):
        add(scheduler, f"new{i}", [i] * 11, max_tokens=1, num_system_tokens=10)
    add(scheduler, "plain", [9] * 4, max_tokens=1)
    plan = scheduler.schedule()
    # Two prompts whole and their requests, which read them in the very step; of the third a block, and no more fits.
    assert entries(plan) == [(0, 10, 1), (1, 10, 1), (8, 0, 10), (9, 0, 10), (10, 0, 4)]
    assert [s.is_system_prompt for s in plan.started].count(True) == 3
    plan = scheduler.schedule()
    assert entries(plan) == [(2, 10, 1), (3, 0, 4), (10, 4, 6)]
    assert [(f.row, f.is_system_prompt) for f in plan.freed] == [(8, True), (9, True)]


def test_a_prefill_in_progress_holds_nobody_up() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=16)
    add(scheduler, "early", [8] * 4, max_tokens=9)
    step(scheduler)
    add(scheduler, "pins", [5] * 39, max_tokens=1, num_system_tokens=38)
    add(scheduler, "late", [9] * 4, max_tokens=1)
    assert step(scheduler) == {"early", "late"}, "12 tokens of the prompt, and what is left of the budget"
    assert [p.sequence.num_computed_tokens for p in scheduler.pool.computing] == [12]


def test_a_prompt_and_what_continues_it_are_computed_in_one_step() -> None:
    scheduler = make_scheduler()
    add(scheduler, "short", [5] * 9, max_tokens=1, num_system_tokens=8)
    add(scheduler, "long", [5] * 16, max_tokens=1, num_system_tokens=15)
    plan = scheduler.schedule()
    assert entries(plan) == [(0, 8, 1), (1, 15, 1), (8, 0, 8), (9, 8, 7)]
    (child,) = [s for s in plan.started if s.row == 9]
    assert [e.num_tokens for e in child.prefix] == [8] and child.num_skipped == 8 and len(child.token_ids) == 7


def test_more_new_prompts_than_rows_take_turns() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=10_000, max_num_seqs=200, num_blocks=400, budget=300)
    for i in range(100):
        add(scheduler, f"new{i}", [i] * 5, max_tokens=1, num_system_tokens=4)
    assert [len(step(scheduler)) for _ in range(2)] == [PROMPT_ROWS, 100 - PROMPT_ROWS]
    assert scheduler.pool.num_prefills == 100


def test_blocks_that_make_room_twice_in_a_step_are_moved_once() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=200)
    scheduler.blocks.enable_caching = False
    for name, size, max_tokens in (("a", 33, 5), ("b", 33, 5), ("c", 6, 1), ("d", 6, 2), ("e", 5, 5)):
        add(scheduler, name, [9] * size, max_tokens)
    step(scheduler)
    step(scheduler)
    (stays,) = [seq for seq in scheduler.running if seq.request_id == "e"]
    assert stays.block_table == [22, 23] and scheduler.blocks.num_free_blocks == 4
    for i in range(2):
        add(scheduler, f"new{i}", [i] * 8, max_tokens=1, num_system_tokens=7)
    plan = scheduler.schedule()
    # The first prompt sends them to 20 and 21, where the second one goes.
    assert plan.moves == [(22, 18), (23, 19)] and stays.block_table == [18, 19]
    assert [s.block_table for s in plan.started if s.is_system_prompt] == [[22, 23], [20, 21]]


def test_a_step_smaller_than_a_block_computes_a_block_of_a_prompt() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=1, max_num_seqs=1)
    add(scheduler, "new", [5] * 7, max_tokens=1, num_system_tokens=6)
    counts = []
    while scheduler.has_work():
        plan = scheduler.schedule()
        counts += plan.counts
        scheduler.postprocess([7 if s else -1 for s in plan.samples])
    assert counts == [4, 2, 1]


def test_decode_goes_on_while_a_long_prompt_is_prefilled() -> None:
    scheduler = make_scheduler()
    add(scheduler, "short", [1] * 4, max_tokens=20)
    step(scheduler)
    add(scheduler, "pins", [5] * 39, max_tokens=1, num_system_tokens=38)
    for _ in range(4):
        assert "short" in step(scheduler)


def add_search(scheduler: Scheduler, name: str, prompt: list[int], **options: Any) -> None:
    scheduler.add([Sequence(name, prompt, SamplingParams(max_tokens=20), is_beam=True, **options)])


def test_later_steps_of_a_search_come_before_requests_that_came_after_it() -> None:
    scheduler = make_scheduler()
    add_search(scheduler, "search", [1] * 4)
    for i in range(12):
        add(scheduler, f"newer{i}", [i] * 4, max_tokens=3)
    ran = step(scheduler)
    assert "search" in ran and "newer7" not in ran
    scheduler.fork("search", [(0, 5), (0, 6)])
    ran = step(scheduler)
    assert "search" in ran and "newer7" not in ran, "the row that is free again is for the search"
    assert [seq.index for seq in scheduler.unfinished() if seq.awaits_search] == [0]
    assert "search" in step(scheduler), "its other beam gets the next row"
    assert [seq.index for seq in scheduler.unfinished() if seq.awaits_search] == [0, 1]


def test_a_clock_that_was_set_back_puts_nobody_in_front() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    add(scheduler, "older", [1] * 4, max_tokens=1, arrival_time=1000.0)
    add(scheduler, "newest", [9] * 4, max_tokens=1, arrival_time=999.0)
    assert [step(scheduler) for _ in range(2)] == [{"older"}, {"newest"}]


def test_beams_share_the_blocks_of_what_they_have_in_common() -> None:
    scheduler = make_scheduler()
    add_search(scheduler, "search", [1] * 10)
    step(scheduler)
    assert scheduler.num_running == 1 and scheduler.blocks.num_used_blocks == 3
    step(scheduler)
    assert not scheduler.has_work(), "there is nothing to do until the search goes on"
    scheduler.fork("search", [(0, 5), (0, 6), (0, 7)])
    plan = scheduler.schedule()
    assert plan.counts == [1, 1, 1] and len(plan.copies) == 2, "two copies of the block that is filled in part"
    assert scheduler.blocks.num_used_blocks == 5
    scheduler.postprocess([7, 7, 7])
    scheduler.fork("search", [(1, 5), (2, 6)])
    scheduler.check_integrity()
    assert scheduler.blocks.num_used_blocks == 4, "what no beam continues has ended"
    scheduler.abort("search")
    assert scheduler.blocks.num_used_blocks == 0


def test_beams_that_wait_for_their_search_give_way_to_older_requests_alone() -> None:
    scheduler = make_scheduler(num_blocks=12)
    add(scheduler, "older", [1] * 22, max_tokens=9)
    add_search(scheduler, "search", [2] * 20)
    step(scheduler)
    add(scheduler, "newer", [3] * 9, max_tokens=1)
    (beam,) = (seq for seq in scheduler.unfinished() if seq.is_beam)
    for _ in range(4):
        assert step(scheduler) == {"older"}
    assert len(beam.block_table) == 5, "a newer request waits"
    while beam.block_table:
        assert "older" in step(scheduler)
    scheduler.fork("search", [(0, 5), (0, 6)])
    ran = set()
    while any(seq.is_beam and not seq.awaits_search for seq in scheduler.unfinished()):
        ran |= step(scheduler)
    assert "search" in ran, "it computes again what it lost"
    scheduler.abort("search")
    while scheduler.has_work():
        step(scheduler)
    assert not scheduler.blocks.num_used_blocks


def test_a_long_prompt_is_computed_in_small_parts_beside_streams() -> None:
    scheduler = make_scheduler(long_prefill_token_threshold=8)

    def counts() -> list[int]:
        plan = scheduler.schedule()
        scheduler.postprocess([7 if s else -1 for s in plan.samples])
        scheduler.check_integrity()
        return sorted(plan.counts)

    add(scheduler, "first", [1] * 20, max_tokens=6)
    assert counts() == [20], "alone it is computed at once"
    add(scheduler, "long", [2] * 20, max_tokens=1)
    add(scheduler, "other", [3] * 9, max_tokens=1)
    add(scheduler, "system", [4] * 13, max_tokens=1, num_system_tokens=12)
    # Each request has its own share; the last part of a system prompt and its reader come in one step.
    assert counts() == [1, 8, 8, 8]
    assert counts() == [1, 1, 1, 4, 8]
    assert counts() == [1, 4]
    add(scheduler, "alone again", [5] * 20, max_tokens=2)
    while scheduler.running:
        counts()


def test_many_outputs_of_a_request_leave_others_their_pace() -> None:
    scheduler = make_scheduler(max_outputs_beside_others=2)
    sequences = [Sequence("many", [1] * 4, SamplingParams(max_tokens=4, n=6), index=i) for i in range(6)]
    scheduler.add(sequences)
    assert step(scheduler) == {"many"}
    step(scheduler)
    assert len(scheduler.running) == 6, "alone, all of them run"
    add(scheduler, "stream", [2] * 4, max_tokens=20)
    while len(scheduler.running) > 1:
        step(scheduler)
    scheduler.add([Sequence("more", [3] * 4, SamplingParams(max_tokens=4, n=6), index=i) for i in range(6)])
    most, finished = 0, set()
    while any(seq.request_id == "more" for seq in scheduler.unfinished()):
        step(scheduler)
        running = [seq for seq in scheduler.running if seq.request_id == "more"]
        if any(seq.request_id == "stream" for seq in scheduler.running):
            most = max(most, len(running))
        finished.update(seq.index for seq in running)
    assert most == 2
    assert finished == set(range(6)), "the others come when these have ended"
