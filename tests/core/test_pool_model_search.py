"""Every history of a small world up to some length: pins, removals, relocation, readers, plans in flight.

In each state that is reached: the books balance, nobody reads an extent that is not pinned for its prompt, and all that
was admitted still comes to an end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from vllm.config import SchedulerConfig, SystemPromptConfig
from vllm.core.block_manager import BlockManager
from vllm.core.scheduler import Scheduler
from vllm.core.system_prompt_pool import PinClass, SystemPromptPool, SystemPromptRefusedError
from vllm.kv_cache.extents import PinnedBlockPool
from vllm.sampling_params import SamplingParams
from vllm.sequence import Sequence
from vllm.step import StepPlan

BLOCK, NUM_BLOCKS, MAX_LEN, BUDGET, DEPTH = 2, 7, 8, 3, 2
PARENT, CHILD, OTHER = [1, 1, 1], [1, 1, 1, 2, 2], [5, 5, 5, 5]
REQUESTS = {"p": (PARENT, 3), "c": (CHILD, 5), "raw": ([7] * 6, None)}
Action = tuple[str, ...]


class World:
    def __init__(self) -> None:
        self.now = 0.0
        blocks = BlockManager(NUM_BLOCKS, BLOCK, enable_caching=False)
        self.pinned = PinnedBlockPool(NUM_BLOCKS, BUDGET, MAX_LEN // BLOCK)
        self.pool = SystemPromptPool(
            SystemPromptConfig(),
            self.pinned,
            BLOCK,
            on_release=blocks.give_back,
            clock=lambda: self.now,
        )
        config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=4)
        self.scheduler = Scheduler(config, blocks, self.pool, MAX_LEN)
        self.plans: list[StepPlan] = []

    def actions(self) -> Iterator[Action]:
        unfinished = {seq.request_id for seq in self.scheduler.unfinished()}
        for name in REQUESTS:
            yield ("abort", name) if name in unfinished else ("add", name)
        for prompt in self.pool.prompts():
            if not prompt.doomed:
                yield ("remove", prompt.id)
        yield ("declare", "soft")
        yield ("declare", "hard")
        if len(self.plans) < DEPTH:
            yield ("plan",)
        if self.plans:
            yield ("finish",)

    def do(self, action: Action) -> None:
        self.now += 1.0
        what, *arguments = action
        if what == "add":
            prompt, size = REQUESTS[arguments[0]]
            seq = Sequence(arguments[0], [*prompt, 9], SamplingParams(max_tokens=1))
            self.scheduler.add([seq], size)
        elif what == "abort":
            self.scheduler.abort(arguments[0])
        elif what == "remove":
            self.pool.remove(arguments[0])
        elif what == "declare":
            hard = arguments[0] == "hard"
            pin = PinClass.HARD if hard else PinClass.SOFT
            with contextlib.suppress(SystemPromptRefusedError):
                self.scheduler.add_system_prompt(list(OTHER if hard else CHILD), pin=pin)
        elif what == "plan":
            plan = self.scheduler.schedule()
            if not plan.is_empty:
                self.plans.append(plan)
        else:
            plan = self.plans.pop(0)
            self.scheduler.postprocess([9 if samples else -1 for samples in plan.samples])

    def check(self) -> None:
        self.scheduler.check_integrity()
        extents = self.pinned.extents
        for seq in self.scheduler.running:
            prompt, chain = seq.system_prompt, []
            while prompt is not None:
                assert self.pool.get(prompt.id) is prompt and extents[prompt.id] == prompt.extents
                chain = [e.start for e in prompt.extents] + chain
                prompt = prompt.parent
            if seq.system_prompt is not None:
                assert [e.start_block for e in seq.system_prompt.prefix] == chain

    def state(self) -> object:
        """What later steps depend on, but for the order of free blocks."""
        prompts = [
            (
                (p.id, p.state, p.doomed, p.pin, p.extents, p.readers, p.num_blocks),
                (p.on_probation, p.is_being_written, p.sequence.row, p.sequence.num_computed_tokens),
            )
            for p in self.pool.prompts()
        ]
        sequences = [
            (s.request_id, s.status, s.num_computed_tokens, s.num_tokens, tuple(s.block_table), s.prefix_len)
            for s in self.scheduler.unfinished()
        ]
        used = tuple(p.id for p in sorted(self.pool.prompts(), key=lambda p: p.last_used))
        return (tuple(prompts), tuple(sequences), used, len(self.plans), self.scheduler.has_work())

    def drain(self) -> None:
        for _ in range(60):
            if not self.scheduler.has_work():
                break
            if len(self.plans) < DEPTH:
                self.do(("plan",))
            if self.plans:
                self.do(("finish",))
            self.check()
        assert not self.scheduler.has_work(), (list(self.scheduler.unfinished()), self.pool.prompts())
        assert self.scheduler.blocks.num_used_blocks == 0 and self.pool.num_readers == 0


def replay(path: tuple[Action, ...]) -> World:
    world = World()
    for action in path:
        world.do(action)
    return world


def search(longest: int) -> int:
    """Visits every state that at most `longest` actions lead to; returns how many there are."""
    seen, frontier = {World().state()}, [()]
    for _ in range(longest):
        reached: list[tuple[Action, ...]] = []
        for path in frontier:
            for action in replay(path).actions():
                longer = (*path, action)
                try:
                    world = replay(longer)
                    world.check()
                    state = world.state()
                    if state in seen:
                        continue
                    seen.add(state)
                    reached.append(longer)
                    world.drain()
                except Exception as error:
                    raise AssertionError(f"after {longer}: {error}") from error
        frontier = reached
    return len(seen)


@pytest.mark.nightly
def test_no_history_of_six_actions_breaks_or_wedges_anything() -> None:
    assert search(6) > 1000


@pytest.mark.nightly
def test_no_history_of_ten_actions_breaks_or_wedges_anything() -> None:
    assert search(10) > 10_000
