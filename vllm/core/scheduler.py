"""Decides what each step computes: decode and prefill in one batch, within a token budget, first come first served."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from typing import Any

from vllm.config import SchedulerConfig
from vllm.core.block_manager import BlockManager
from vllm.core.pinned_prompt import UNORDERED, Rank
from vllm.core.prompt_prefills import PromptPrefills
from vllm.core.request_queue import RequestQueue, rank_of
from vllm.core.running import RunningSequences
from vllm.core.sequence_memory import SequenceMemory
from vllm.core.step_draft import PlannedBatch as PlannedBatch
from vllm.core.step_draft import StepDraft
from vllm.core.stops import StopRules
from vllm.core.system_prompt_pool import PinnedPrompt, SystemPromptPool
from vllm.inputs import CacheMark
from vllm.sequence import Sequence, SequenceStatus
from vllm.step import StepPlan
from vllm.system_prompt_store.manifest import SnapshotRecord


class Scheduler:
    """Runs sequences and system-prompt prefills over one KV cache, in one batch, first come first served.

    A sequence waits, runs (it has a row in the ranks' buffers and blocks), may be preempted (its blocks are freed, its
    suffix is computed again later; its system prompt stays pinned and is not), and finishes.

    Its parts, each the owner of its state: `RunningSequences` (rows), `RequestQueue` (who may begin), `SequenceMemory`
    (blocks, and who gives them up), `PromptPrefills` (system prompts), `StopRules`.

    Args:
        config: Limits of a step.
        blocks: Schedulable KV memory.
        pool: System prompts.
        max_model_len: Longest sequence; `blocks` always has room for one.
        eos_token_ids: Tokens that end an answer.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        pool: SystemPromptPool,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.blocks = blocks
        self.pool = pool
        self._stops = StopRules(max_model_len, eos_token_ids)
        self._running = RunningSequences(config.max_num_seqs)
        self._queue = RequestQueue(self._running, config.max_outputs_beside_others)
        self._memory = SequenceMemory(blocks, pool, clock)
        self._prefills = PromptPrefills(config, blocks, pool, self._running, self._memory, self._queue)
        self._num_unfinished = 0
        self._num_awaiting = 0
        self._num_preempted = 0
        self._requests: dict[str, list[Sequence]] = {}
        self._in_flight: deque[PlannedBatch] = deque()
        self._next_order = 1

    # Requests --------------------------------------------------------------------------------------------------

    def add(
        self, sequences: list[Sequence], num_system_tokens: int | None = None, marks: Several[CacheMark] = ()
    ) -> None:
        """Takes in a request: one sequence an output; the first one computes the prompt, the others fork from it.

        Args:
            num_system_tokens, marks: See `SystemPromptPool.route`.

        Raises:
            ValueError: a request with this id is running.
        """
        first, *others = sequences
        if first.request_id in self._requests:
            raise ValueError(f"request id {first.request_id!r} is in use")
        for seq in sequences:
            self._give_order(seq)
        first.fork_children = others
        self._requests[first.request_id] = list(sequences)
        self._num_unfinished += len(sequences)
        self.pool.route(first, num_system_tokens, marks)
        if not self.pool.is_waiting(first):
            self._queue.push(first)

    def _give_order(self, seq: Sequence) -> None:
        """Gives a new sequence its place in the order, behind all that have come."""
        seq.order = max(int(seq.arrival_time * 1e6), self._next_order)
        self._next_order = seq.order + 1

    def add_system_prompt(self, token_ids: Iterable[int], **options: Any) -> PinnedPrompt:
        """Declares a system prompt; its prefill takes its turn among the requests. `options` as of `pool.add`.

        Raises:
            SystemPromptRefusedError: it cannot be pinned.
        """
        prompt = self.pool.add(token_ids, **options)
        self._give_order_to_prompt(prompt)
        return prompt

    def restore(self, record: SnapshotRecord) -> bool:
        """Brings back what a snapshot is of, in its turn; see `pool.restore`."""
        prompt = self.pool.restore(record)
        if prompt is not None:
            self._give_order_to_prompt(prompt)
        return prompt is not None

    def _give_order_to_prompt(self, prompt: PinnedPrompt) -> None:
        """Gives a prompt that no request brought its place in the order."""
        if prompt.sequence.order == UNORDERED:
            prompt.serve_by(0, self._next_order)
            self._next_order += 1

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one output of it; unknown ids are ignored (it may have finished just now)."""
        for seq in list(self._requests.get(request_id, ())):
            if index is None or seq.index == index:
                self._finish(seq, SequenceStatus.FINISHED_ABORTED)

    def has_work(self) -> bool:
        """Whether a step has something to do. A search has nothing for it until it has chosen its next beams."""
        pool = self.pool.has_prefill or self.pool.tiers.has_work
        requests = self._num_unfinished > self._num_awaiting
        return requests or pool or self._running.has_freed or bool(self._in_flight)

    @property
    def running(self) -> list[Sequence]:
        """Sequences that have a row, in the order in which they are served."""
        return self._running.sequences

    @property
    def num_running(self) -> int:
        """Sequences that have blocks, beams between two steps of their search among them."""
        return len(self._running) + len(self._memory.held)

    @property
    def num_waiting(self) -> int:
        return self._num_unfinished - self.num_running

    @property
    def num_preemptions(self) -> int:
        """How often blocks of a sequence were freed before its end."""
        return self._num_preempted + self._memory.num_dropped

    @property
    def prefix_cache_queries(self) -> int:
        """Prompt tokens of requests that began."""
        return self._memory.prefix_cache_queries

    @property
    def prefix_cache_hits(self) -> int:
        """Those of them that were in the cache, pinned or not."""
        return self._memory.prefix_cache_hits

    def unfinished(self) -> Iterable[Sequence]:
        """Every sequence that has not finished."""
        for sequences in self._requests.values():
            yield from sequences

    # A step ----------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plans the next step.

        The plan counts as carried out from now on: steps run in the order of their plans, so the next one may be
        planned before the tokens of this one are known. `postprocess` takes them in later, in the same order.
        """
        draft = StepDraft(self._stops, self._share_of_a_prompt())
        plan = draft.plan
        self.pool.expire()
        held_up_from = None
        if self.pool.has_prefill:
            held_up_from = self._prefills.admit(draft)
            self._prefills.plan_loads(plan)
        budget, preempted = self._plan_running(draft)
        if not preempted:
            self._plan_waiting(draft, budget, held_up_from)
        plan.freed = self._running.take_freed()
        self._num_awaiting += draft.fill_batch()
        self._prefills.end(draft)
        for prompt in self.pool.tiers.plan_rest(plan):
            self.pool.end_save(prompt)
        if not plan.is_empty:
            self._in_flight.append(draft.batch)
        return plan

    def _share_of_a_prompt(self) -> int:
        """Most tokens of one prompt in this step: few where streams wait for their next tokens."""
        most = self.config.long_prefill_token_threshold
        if most is None or not any(seq.num_tokens - seq.num_computed_tokens == 1 for seq in self.running):
            most = self.config.max_num_batched_tokens
        # Less than a block is never computed of a system prompt.
        return max(most, self.blocks.block_size)

    def _plan_running(self, draft: StepDraft) -> tuple[int, bool]:
        """Plans what already runs, in order. A decode token is never held back by the budget, only prefill is.

        Returns the budget that is left and whether a sequence had to be preempted.
        """
        plan, running = draft.plan, self.running
        budget = self.config.max_num_batched_tokens - len(running)
        if self.pool.computing:
            # Less than a block is never computed of a prompt, and no prompt waits until others have ended.
            budget = max(budget, self.blocks.block_size)
        prompts = self._prefills.begun()
        preempted = False
        i = 0
        while i < len(running):
            seq = running[i]
            while prompts and prompts[-1].rank <= rank_of(seq):
                budget -= self._prefills.plan_chunk(draft, prompts.pop(), budget)
            missing = seq.num_tokens - seq.num_computed_tokens
            budget += 1  # What was set aside for its next token.
            if not missing or (missing > 1 and budget <= 0) or self._stops.ends_by_length(seq):
                i += 1
                continue
            count = min(missing, max(min(budget, draft.share), 1))
            new = self._memory.grow(seq, seq.num_computed_tokens + count)
            while new is None and running[-1] is not seq:
                self._preempt(running[-1])
                budget += 1
                preempted = True
                new = self._memory.grow(seq, seq.num_computed_tokens + count)
            if new is None:
                self._preempt(seq)
                preempted = True
                break
            if new:
                first = len(seq.block_table) - len(new)
                plan.new_blocks.append((seq.row, first, new))
                if self.blocks.windows is not None:
                    plan.window.new_blocks.append((seq.row, first, seq.window_table[first:]))
            draft.compute(seq, count)
            budget -= count
            i += 1
        while prompts:
            budget -= self._prefills.plan_chunk(draft, prompts.pop(), budget)
        return budget, preempted

    def _plan_waiting(self, draft: StepDraft, budget: int, held_up_from: Rank | None) -> None:
        """Begins what waits, requests and prompts that have their place, in order."""
        prompts = self._prefills.not_begun()
        self._queue.short_of_blocks = None
        put_off: list[Sequence] = []
        while budget > 0:
            may_begin = self._running.has_row and self._queue.short_of_blocks is None
            seq = self._queue.first(held_up_from, put_off) if may_begin else None
            if prompts and (seq is None or prompts[-1].rank < rank_of(seq)):
                budget -= self._prefills.begin(draft, prompts.pop(), budget)
            elif seq is not None:
                budget -= self._begin_request(draft, seq, budget)
            else:
                break
        self._queue.wake(put_off)

    def _begin_request(self, draft: StepDraft, seq: Sequence, budget: int) -> int:
        """Plans the first tokens of the first waiting request; returns how many, 0 where memory is short."""
        budget = min(budget, draft.share)
        copies = self._memory.begin(seq, budget)
        if copies is None:
            self._queue.short_of_blocks = seq
            return 0
        self._queue.pop()
        draft.plan.copies.extend(copies.full)
        draft.plan.window.copies.extend(copies.window)
        self._running.start(seq)
        count = min(seq.num_tokens - seq.num_computed_tokens, budget)
        draft.compute(seq, count)
        # Only a penalty on repetition looks at the tokens of a pinned prefix again.
        draft.start(seq, skipped=seq.prefix_len if seq.sampling_params.repetition_penalty == 1.0 else 0)
        return count

    def _preempt(self, seq: Sequence) -> None:
        """Frees the blocks of a running sequence that has nothing planned in this step; it waits to run again."""
        self._running.stop(seq)
        self.blocks.free(seq)
        seq.status = SequenceStatus.PREEMPTED
        if not seq.awaits_search:
            self._queue.push(seq)
        self._num_preempted += 1
        self._queue.short_of_blocks = seq

    # What was drawn --------------------------------------------------------------------------------------------

    @property
    def num_in_flight(self) -> int:
        """Plans whose tokens have not been taken in."""
        return len(self._in_flight)

    @property
    def newest_batch(self) -> PlannedBatch:
        """The batch of the latest plan."""
        return self._in_flight[-1]

    @property
    def oldest_batch(self) -> PlannedBatch:
        """The batch whose tokens `postprocess` takes in next."""
        return self._in_flight[0]

    def postprocess(self, drawn: list[int]) -> list[tuple[Sequence, int, int | None]]:
        """Takes in the tokens of the oldest plan in flight.

        Args:
            drawn: A token for each entry of the plan's batch, -1 where none was drawn.

        Returns (sequence, new token, stop token id or None) for each sequence that got a token; a sequence whose
        answer ended has its status set and is gone from the scheduler. A beam does not get the token: it is held until
        `fork` says how its search goes on.
        """
        batch = self._in_flight.popleft()
        for prompt in batch.prefilled:
            self.pool.note_prefill(prompt)
        news: list[tuple[Sequence, int, int | None]] = []
        for seq, token in zip(batch.sequences, drawn, strict=True):
            # A sequence that ended while this step was in flight (a stop token, an abort) has no use for its token.
            if seq.is_finished or seq.is_system_prompt:
                continue
            if token >= 0 and not seq.is_beam:
                seq.num_in_flight -= 1
                seq.token_ids.append(token)
            if seq.status == SequenceStatus.RUNNING:
                self.blocks.commit(seq)
            if token < 0:
                continue
            if seq.is_beam:
                if seq.status == SequenceStatus.RUNNING:
                    self._running.stop(seq)
                    self._memory.hold(seq)
                news.append((seq, token, None))
                continue
            self._release_forks(seq)
            if seq.matcher is not None:
                seq.matcher.accept(token)
            status, stop_token = self._stops.after(seq, token)
            news.append((seq, token, stop_token))
            if status is not None:
                self._finish(seq, status)
        return news

    def _release_forks(self, seq: Sequence) -> None:
        for child in seq.fork_children:
            if child.is_finished:
                continue
            self.pool.attach_sibling(child, seq)
            child.fork_parent = seq
            if not self.pool.is_waiting(child):
                self._queue.push(child)
        seq.fork_children = []

    def fork(self, request_id: str, beams: list[tuple[int, int]]) -> None:
        """Goes on with a search, all beams of which have got their draws; unknown ids are ignored.

        Args:
            beams: (index of the beam that it continues, its next token) for each beam of the next step; it has its
                place in this list as its index from now on. Beams that nothing continues end.
        """
        parents = {seq.index: seq for seq in self._requests.get(request_id, ())}
        children: dict[int, list[tuple[int, int]]] = {index: [] for index in parents}
        for index, (parent, token) in enumerate(beams if parents else ()):
            children[parent].append((index, token))
        if any(not seq.awaits_search for seq in parents.values()):
            raise RuntimeError(f"the search {request_id} has beams that are not drawn for")
        for old_index, seq in parents.items():
            if not children[old_index]:
                self._finish(seq, SequenceStatus.FINISHED_STOPPED)
                continue
            # The others fork from the first one, which keeps its blocks and goes on in them.
            (index, token), *others = children[old_index]
            twins = [seq.fork(other) for other, _ in others]
            for twin, (_, its_token) in zip(twins, others, strict=True):
                twin.token_ids.append(its_token)
                self.pool.attach_sibling(twin, seq)
            seq.index, seq.awaits_search = index, False
            seq.token_ids.append(token)
            self._num_awaiting -= 1
            self._num_unfinished += len(twins)
            self._requests[request_id].extend(twins)
            self._queue.wake([seq, *twins])

    def _finish(self, seq: Sequence, status: SequenceStatus) -> None:
        if seq.is_finished:
            return
        self._release_forks(seq)
        if seq.status == SequenceStatus.RUNNING:
            self._running.stop(seq)
        elif seq.status == SequenceStatus.HELD:
            self._memory.held.remove(seq)
        self._num_unfinished -= 1
        self._num_awaiting -= seq.awaits_search
        seq.status = status
        self.blocks.free(seq)
        self.pool.detach(seq)
        siblings = self._requests[seq.request_id]
        siblings.remove(seq)
        if not siblings:
            del self._requests[seq.request_id]

    # Books -----------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raises AssertionError with numbers when blocks, readers or rows do not add up."""
        holders, computing = [*self.running, *self._memory.held], [p.sequence for p in self.pool.computing]
        extents = [e for several in self.pool.blocks.extents.values() for e in several]
        pinned = {b for e in extents for b in range(e.start, e.end)}
        self.blocks.check_integrity(holders, pinned)
        if self.blocks.windows is not None:
            of_windows = (e for p in self.pool.prompts() for e in p.window_extents)
            pinned_in_windows = {b for e in of_windows for b in range(e.start, e.end)}
            self.blocks.windows.check_integrity([*holders, *computing], pinned_in_windows)
        free, cached = self.blocks.num_free_blocks - self.blocks.num_cached_blocks, self.blocks.num_cached_blocks
        total = free + cached + self.blocks.num_used_blocks + self.pool.blocks.pinned_blocks
        assert total == self.blocks.num_blocks, (free, cached, self.blocks.num_used_blocks, len(pinned))
        readers: dict[str, int] = {}
        for seq in self.unfinished():
            if seq.system_prompt is not None:
                readers[seq.system_prompt.id] = readers.get(seq.system_prompt.id, 0) + 1
            if seq.status != SequenceStatus.RUNNING:
                assert seq.row == -1, seq
            if seq.status not in (SequenceStatus.RUNNING, SequenceStatus.HELD):
                assert not seq.block_table, seq
        self.pool.check_integrity(readers)
        self._running.check_integrity([seq for seq in computing if seq.row >= 0])
        held = [s for s in self.unfinished() if s.status == SequenceStatus.HELD]
        assert len(held) == len(self._memory.held) and set(held) == set(self._memory.held), (held, self._memory.held)
        assert self._num_unfinished == len(list(self.unfinished()))
        assert self._num_awaiting == sum(s.awaits_search for s in self.unfinished())
