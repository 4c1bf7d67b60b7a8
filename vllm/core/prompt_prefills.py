"""Prefills of system prompts: where prompts are placed, and which of their tokens a step computes.

The prefill of a system prompt is a sequence with a row, too. It writes into the extents of the prompt instead of
schedulable blocks, and it is never preempted.
"""

from __future__ import annotations

from vllm.config import SchedulerConfig
from vllm.core.block_manager import BlockManager
from vllm.core.pinned_prompt import Rank
from vllm.core.request_queue import RequestQueue, rank_of
from vllm.core.running import RunningSequences
from vllm.core.sequence_memory import SequenceMemory
from vllm.core.step_draft import StepDraft, window_blocks
from vllm.core.system_prompt_pool import PinnedPrompt, PromptState, SystemPromptPool
from vllm.kv_cache.extents import Extent
from vllm.step import StepPlan


class PromptPrefills:
    """Carries prompts from `pending` over `computing` or `loading` to `pinned`.

    Args:
        config: Limits of a step.
        blocks: Schedulable KV memory, out of which extents are cut.
        pool: System prompts.
        running, memory, queue: Of the requests, whose blocks are moved, who give way, and who wait.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        pool: SystemPromptPool,
        running: RunningSequences,
        memory: SequenceMemory,
        queue: RequestQueue,
    ) -> None:
        self._config = config
        self._blocks = blocks
        self._pool = pool
        self._running = running
        self._memory = memory
        self._queue = queue

    # Places ----------------------------------------------------------------------------------------------------

    def admit(self, draft: StepDraft) -> Rank | None:
        """Makes room for new prompts, as many as the step may compute and whatever is to be loaded.

        All this comes before anything else is planned, since blocks in use are moved for it. Returns the rank of a
        prompt that no later request may overtake, because it waits for blocks that others use.
        """
        plan, held_up_from = draft.plan, None
        left = self._config.max_num_batched_tokens - sum(
            p.num_tokens - p.sequence.num_computed_tokens for p in self._pool.computing
        )
        short = self._queue.short_of_blocks
        for prompt in sorted(self._pool.pending, key=_rank_of_prompt):
            if prompt.state != PromptState.PENDING:
                continue
            if short is not None and not short.is_finished and rank_of(short) < prompt.rank:
                break  # A request that came before it waits for blocks, too.
            must_compute = not self._pool.tiers.can_load(prompt)
            if must_compute and left <= 0:
                continue
            if prompt.parent is not None and not prompt.parent.extents:
                continue
            extents = self._pool.find_room(prompt)
            if extents is None:
                self._queue.wake(self._pool.refuse(prompt))
                continue
            window_extents = self._pool.find_window_room(prompt)
            is_vacated = self._vacate(plan, extents, window_extents)
            while not is_vacated and self._memory.reclaim(prompt.sequence):
                extents = self._pool.find_room(prompt) or extents
                window_extents = self._pool.find_window_room(prompt) or window_extents
                is_vacated = self._vacate(plan, extents, window_extents)
            if not is_vacated:
                held_up_from = prompt.rank
                break
            self._place(plan, prompt, extents, window_extents)
            left -= prompt.num_own_tokens if must_compute else 0
        if plan.moves:
            plan.new_blocks.extend((s.row, 0, list(s.block_table)) for s in self._running.sequences)
        if plan.window.moves:
            begun = [p.sequence for p in self._pool.computing if p.sequence.row >= 0]
            plan.window.new_blocks.extend((s.row, 0, window_blocks(s)) for s in (*self._running.sequences, *begun))
        return held_up_from

    def _vacate(self, plan: StepPlan, extents: tuple[Extent, ...], window_extents: tuple[Extent, ...]) -> bool:
        """Takes extents of both groups out of the schedulable memory, and plans the moves for that. Returns False (and
        changes nothing) where what is used in them finds no room elsewhere."""
        windows, holders = self._blocks.windows, [*self._running.sequences, *self._memory.held]
        if windows is not None and not windows.has_room_for(window_extents):
            return False
        moves = self._blocks.vacate(extents, holders)
        if moves is None:
            return False
        _add_moves(plan.moves, moves)
        if windows is not None:
            prompts = [p.sequence for p in self._pool.computing]
            _add_moves(plan.window.moves, windows.vacate(window_extents, [*holders, *prompts]))
        return True

    def _place(
        self,
        plan: StepPlan,
        prompt: PinnedPrompt,
        extents: tuple[Extent, ...],
        window_extents: tuple[Extent, ...],
    ) -> None:
        self._pool.place(prompt, extents, window_extents)
        if self._pool.tiers.keeps_snapshots and prompt.num_own_tokens % self._blocks.block_size:
            # Slots that the prompt leaves unused would take what a request has left there to disk.
            plan.cleared.append(extents[-1].end - 1)
            plan.window.cleared.extend(extent.end - 1 for extent in window_extents[-1:])

    def plan_loads(self, plan: StepPlan) -> None:
        """Plans copies of prompts that come back from other tiers, and takes in those that have come."""
        is_idle = not (self._running.sequences or self._pool.computing)
        ended = self._pool.tiers.plan_loads(plan, is_idle)
        for prompt in ended.failed:
            self._pool.fail_load(prompt)
        for prompt in ended.done:
            self._queue.wake(self._pool.end_load(prompt))

    # Chunks ----------------------------------------------------------------------------------------------------

    def begun(self) -> list[PinnedPrompt]:
        """Prompts that have a row, the last in the order first."""
        return self._computing(has_row=True)

    def not_begun(self) -> list[PinnedPrompt]:
        """Prompts that have their place and no row yet, the last in the order first."""
        return self._computing(has_row=False)

    def _computing(self, has_row: bool) -> list[PinnedPrompt]:
        found = (p for p in self._pool.computing if (p.sequence.row >= 0) == has_row)
        return sorted(found, key=_rank_of_prompt, reverse=True)

    def begin(self, draft: StepDraft, prompt: PinnedPrompt, budget: int) -> int:
        """Plans the first tokens of a prompt, unless it must wait for its parent, a row or blocks; returns how many."""
        if self._blocks.windows is not None and self._queue.short_of_blocks is not None:
            return 0  # Who waits for blocks comes before it.
        if not self._running.has_prompt_row:
            return 0
        if prompt.parent is not None and prompt.parent.state != PromptState.PINNED:
            return 0
        return self.plan_chunk(draft, prompt, budget)

    def plan_chunk(self, draft: StepDraft, prompt: PinnedPrompt, budget: int) -> int:
        """Plans the next tokens of a system prompt, whole blocks of them until its end; returns how many."""
        seq = prompt.sequence
        count = prompt.num_tokens - seq.num_computed_tokens
        budget = min(budget, draft.share)
        if count > budget:
            count = budget // self._blocks.block_size * self._blocks.block_size
        if not count:
            return 0
        if seq.row < 0:
            if not self._begin_windows(prompt):
                self._queue.short_of_blocks = seq
                return 0
            self._running.start_prompt(seq)
            self._pool.begin_prefill(prompt)
            draft.start(seq, skipped=prompt.start)
        draft.compute(seq, count)
        if seq.num_computed_tokens + count == prompt.num_tokens:
            draft.prefilled.append(prompt)
            # Keys and values of all tokens of a step are written before any of them are read, so the waiters may run
            # in this very step.
            self._queue.wake(self._pool.end_prefill(prompt))
        return count

    def _begin_windows(self, prompt: PinnedPrompt) -> bool:
        """Gives a prompt the blocks of the window group in which it is computed; returns whether there are so many."""
        windows, seq = self._blocks.windows, prompt.sequence
        if windows is None:
            return True
        while not windows.begin_prompt(seq, prompt.window_extents):
            if not self._memory.reclaim(seq):
                return False
        return True

    def end(self, draft: StepDraft) -> None:
        """Ends the prefills whose last chunks are planned: their rows and rings are free from the next plan on."""
        for prompt in draft.prefilled:
            if self._blocks.windows is not None:
                self._blocks.windows.end_prompt(prompt.sequence)
            self._running.stop_prompt(prompt.sequence)


def _rank_of_prompt(prompt: PinnedPrompt) -> Rank:
    return prompt.rank


def _add_moves(moves: list[tuple[int, int]], more: list[tuple[int, int]]) -> None:
    """Adds block moves that follow on others of the same plan; a plan's moves run all at once."""
    source_of = {target: source for source, target in moves}
    for source, target in more:
        source_of[target] = source_of.pop(source, source)
    moves[:] = [(source, target) for target, source in source_of.items()]
