"""Decides what each step computes: decode and prefill in one batch, within a token budget, first come first served."""

from __future__ import annotations

import bisect
import heapq
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from typing import Any, NamedTuple

from vllm.config import SchedulerConfig
from vllm.core.block_manager import BlockManager, Copies
from vllm.core.pinned_prompt import UNORDERED, Rank
from vllm.core.system_prompt_pool import PinnedPrompt, PromptState, SystemPromptPool
from vllm.inputs import CacheMark
from vllm.kv_cache.extents import Extent
from vllm.sequence import Sequence, SequenceStatus
from vllm.step import PROMPT_ROWS, FreedSequence, SequenceStart, StepPlan
from vllm.system_prompt_store.manifest import SnapshotRecord


class PlannedBatch(NamedTuple):
    """A plan in flight: its sequences, the first position that each one computed, and the system prompts whose last
    chunks it computes. Prefills of system prompts are among the sequences; nothing is drawn for them."""

    sequences: list[Sequence]
    starts: list[int]
    prefilled: list[PinnedPrompt]


class Scheduler:
    """Runs sequences and system-prompt prefills over one KV cache, in one batch, first come first served.

    The prefill of a system prompt is a sequence with a row, too; it writes into the extents of the prompt instead of
    schedulable blocks, and it is never preempted.

    A sequence waits, runs (it has a row in the ranks' buffers and blocks), may be preempted (its blocks are freed, its
    suffix is computed again later; its system prompt stays pinned and is not), and finishes.

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
        self.max_model_len = max_model_len
        self.eos_token_ids = frozenset(eos_token_ids)
        self._clock = clock
        self.running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._num_waiting = 0
        self._held: list[Sequence] = []
        self._num_awaiting = 0
        self._requests: dict[str, list[Sequence]] = {}
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._free_prompt_rows = list(range(config.max_num_seqs + PROMPT_ROWS - 1, config.max_num_seqs - 1, -1))
        self._short_of_blocks: Sequence | None = None
        self._freed: list[FreedSequence] = []
        self._scheduled: list[tuple[Sequence, int]] = []
        self._prefilled: list[PinnedPrompt] = []
        self._in_flight: deque[PlannedBatch] = deque()
        self._next_order = 1
        self._num_running_of: Counter[str] = Counter()
        self.num_preemptions = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0

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
            self._place(seq)
        first.fork_children = others
        self._requests[first.request_id] = list(sequences)
        self._num_waiting += len(sequences)
        self.pool.route(first, num_system_tokens, marks)
        if not self.pool.is_waiting(first):
            heapq.heappush(self._waiting, first)

    def _place(self, seq: Sequence) -> None:
        """Gives a new sequence its place in the order, behind all that have come."""
        seq.order = max(int(seq.arrival_time * 1e6), self._next_order)
        self._next_order = seq.order + 1

    def add_system_prompt(self, token_ids: Iterable[int], **options: Any) -> PinnedPrompt:
        """Declares a system prompt; its prefill takes its turn among the requests. `options` as of `pool.add`.

        Raises:
            SystemPromptRefusedError: it cannot be pinned.
        """
        prompt = self.pool.add(token_ids, **options)
        self._set_order(prompt)
        return prompt

    def restore(self, record: SnapshotRecord) -> bool:
        """Brings back what a snapshot is of, in its turn; see `pool.restore`."""
        prompt = self.pool.restore(record)
        if prompt is not None:
            self._set_order(prompt)
        return prompt is not None

    def _set_order(self, prompt: PinnedPrompt) -> None:
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
        requests = self.num_running + self._num_waiting > self._num_awaiting
        return requests or pool or bool(self._freed) or bool(self._in_flight)

    @property
    def num_running(self) -> int:
        """Sequences that have blocks, beams between two steps of their search among them."""
        return len(self.running) + len(self._held)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

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
        plan = StepPlan()
        self._scheduled, self._prefilled = [], []
        self.pool.expire()
        held_up_from = None
        if self.pool.has_prefill:
            held_up_from = self._admit_prompts(plan)
            self._plan_loads(plan)
        budget, preempted = self._plan_running(plan)
        if not preempted:
            self._plan_waiting(plan, budget, held_up_from)
        plan.freed = self._freed
        self._freed = []
        self._fill_batch(plan)
        for prompt in self._prefilled:
            self._end_prefill(prompt)
        for prompt in self.pool.tiers.plan_rest(plan):
            self.pool.end_save(prompt)
        if not plan.is_empty:
            self._in_flight.append(PlannedBatch([seq for seq, _ in self._scheduled], plan.starts, self._prefilled))
        return plan

    # System prompts --------------------------------------------------------------------------------------------

    def _plan_loads(self, plan: StepPlan) -> None:
        is_idle = not (self.running or self.pool.computing)
        ended = self.pool.tiers.plan_loads(plan, is_idle)
        for prompt in ended.failed:
            self.pool.fail_load(prompt)
        for prompt in ended.done:
            self._wake(self.pool.end_load(prompt))

    def _admit_prompts(self, plan: StepPlan) -> Rank | None:
        """Makes room for new prompts, as many as the step may compute and whatever is to be loaded.

        All this comes before anything else is planned, since blocks in use are moved for it. Returns the rank of a
        prompt that no later request may overtake, because it waits for blocks that others use.
        """
        held_up_from = None
        left = self.config.max_num_batched_tokens - sum(
            p.num_tokens - p.sequence.num_computed_tokens for p in self.pool.computing
        )
        short = self._short_of_blocks
        for prompt in sorted(self.pool.pending, key=_rank_of_prompt):
            if prompt.state != PromptState.PENDING:
                continue
            if short is not None and not short.is_finished and _rank(short) < prompt.rank:
                break  # A request that came before it waits for blocks, too.
            must_compute = not self.pool.tiers.can_load(prompt)
            if must_compute and left <= 0:
                continue
            if prompt.parent is not None and not prompt.parent.extents:
                continue
            extents = self.pool.find_room(prompt)
            if extents is None:
                self._wake(self.pool.refuse(prompt))
                continue
            window_extents = self.pool.find_window_room(prompt)
            is_vacated = self._vacate(plan, extents, window_extents)
            while not is_vacated and self._reclaim(prompt.sequence):
                extents = self.pool.find_room(prompt) or extents
                window_extents = self.pool.find_window_room(prompt) or window_extents
                is_vacated = self._vacate(plan, extents, window_extents)
            if not is_vacated:
                held_up_from = prompt.rank
                break
            self._place_prompt(plan, prompt, extents, window_extents)
            left -= prompt.num_own_tokens if must_compute else 0
        if plan.moves:
            plan.new_blocks.extend((s.row, 0, list(s.block_table)) for s in self.running)
        if plan.window.moves:
            begun = [p.sequence for p in self.pool.computing if p.sequence.row >= 0]
            plan.window.new_blocks.extend((s.row, 0, _window_blocks(s)) for s in (*self.running, *begun))
        return held_up_from

    def _vacate(self, plan: StepPlan, extents: tuple[Extent, ...], window_extents: tuple[Extent, ...]) -> bool:
        """Takes extents of both groups out of the schedulable memory, and plans the moves for that. Returns False (and
        changes nothing) where what is used in them finds no room elsewhere."""
        windows, holders = self.blocks.windows, [*self.running, *self._held]
        if windows is not None and not windows.has_room_for(window_extents):
            return False
        moves = self.blocks.vacate(extents, holders)
        if moves is None:
            return False
        _add_moves(plan.moves, moves)
        if windows is not None:
            prompts = [p.sequence for p in self.pool.computing]
            _add_moves(plan.window.moves, windows.vacate(window_extents, [*holders, *prompts]))
        return True

    def _place_prompt(
        self,
        plan: StepPlan,
        prompt: PinnedPrompt,
        extents: tuple[Extent, ...],
        window_extents: tuple[Extent, ...],
    ) -> None:
        self.pool.place(prompt, extents, window_extents)
        if self.pool.tiers.keeps_snapshots and prompt.num_own_tokens % self.blocks.block_size:
            # Slots that the prompt leaves unused would take what a request has left there to disk.
            plan.cleared.append(extents[-1].end - 1)
            plan.window.cleared.extend(extent.end - 1 for extent in window_extents[-1:])

    def _plan_chunk(self, plan: StepPlan, prompt: PinnedPrompt, budget: int) -> int:
        """Plans the next tokens of a system prompt, whole blocks of them until its end; returns how many."""
        seq = prompt.sequence
        count = prompt.num_tokens - seq.num_computed_tokens
        budget = min(budget, self._share)
        if count > budget:
            count = budget // self.blocks.block_size * self.blocks.block_size
        if not count:
            return 0
        if seq.row < 0:
            if not self._begin_windows(prompt):
                self._short_of_blocks = seq
                return 0
            seq.row = self._free_prompt_rows.pop()
            self.pool.begin_prefill(prompt)
            plan.started.append(self._sequence_start(seq, skipped=prompt.start))
        self._scheduled.append((seq, count))
        if seq.num_computed_tokens + count == prompt.num_tokens:
            self._prefilled.append(prompt)
            # Keys and values of all tokens of a step are written before any of them are read, so the waiters may run
            # in this very step.
            self._wake(self.pool.end_prefill(prompt))
        return count

    def _begin_windows(self, prompt: PinnedPrompt) -> bool:
        """Gives a prompt the blocks of the window group in which it is computed; returns whether there are so many."""
        windows, seq = self.blocks.windows, prompt.sequence
        if windows is None:
            return True
        while not windows.begin_prompt(seq, prompt.window_extents):
            if not self._reclaim(seq):
                return False
        return True

    def _end_prefill(self, prompt: PinnedPrompt) -> None:
        """The row of a prompt whose last chunk is planned is free from the next plan on."""
        if self.blocks.windows is not None:
            self.blocks.windows.end_prompt(prompt.sequence)
        self._freed.append(FreedSequence(prompt.sequence.row, is_system_prompt=True))
        self._free_prompt_rows.append(prompt.sequence.row)
        prompt.sequence.row = -1

    def _wake(self, sequences: Iterable[Sequence]) -> None:
        for seq in sequences:
            heapq.heappush(self._waiting, seq)

    # Requests that run -----------------------------------------------------------------------------------------

    def _plan_running(self, plan: StepPlan) -> tuple[int, bool]:
        """Plans what already runs, in order. A decode token is never held back by the budget, only prefill is.

        Returns the budget that is left and whether a sequence had to be preempted.
        """
        budget = self.config.max_num_batched_tokens - len(self.running)
        if self.pool.computing:
            # Less than a block is never computed of a prompt, and no prompt waits until others have ended.
            budget = max(budget, self.blocks.block_size)
        prompts = sorted((p for p in self.pool.computing if p.sequence.row >= 0), key=_rank_of_prompt, reverse=True)
        self._share = self._share_of_a_prompt()
        preempted = False
        i = 0
        while i < len(self.running):
            seq = self.running[i]
            while prompts and prompts[-1].rank <= _rank(seq):
                budget -= self._plan_chunk(plan, prompts.pop(), budget)
            missing = seq.num_tokens - seq.num_computed_tokens
            budget += 1  # What was set aside for its next token.
            if not missing or (missing > 1 and budget <= 0) or self._ends_by_length(seq):
                i += 1
                continue
            count = min(missing, max(min(budget, self._share), 1))
            new = self._grow(seq, seq.num_computed_tokens + count)
            while new is None and self.running[-1] is not seq:
                self._preempt(self.running[-1])
                budget += 1
                preempted = True
                new = self._grow(seq, seq.num_computed_tokens + count)
            if new is None:
                self._preempt(seq)
                preempted = True
                break
            if new:
                first = len(seq.block_table) - len(new)
                plan.new_blocks.append((seq.row, first, new))
                if self.blocks.windows is not None:
                    plan.window.new_blocks.append((seq.row, first, seq.window_table[first:]))
            self._scheduled.append((seq, count))
            budget -= count
            i += 1
        while prompts:
            budget -= self._plan_chunk(plan, prompts.pop(), budget)
        return budget, preempted

    def _share_of_a_prompt(self) -> int:
        """Most tokens of one prompt in this step: few where streams wait for their next tokens."""
        most = self.config.long_prefill_token_threshold
        if most is None or not any(seq.num_tokens - seq.num_computed_tokens == 1 for seq in self.running):
            most = self.config.max_num_batched_tokens
        # Less than a block is never computed of a system prompt.
        return max(most, self.blocks.block_size)

    def _grow(self, seq: Sequence, num_tokens: int) -> list[int] | None:
        """Blocks for the first `num_tokens` tokens of `seq`; see `_reclaim` for what gives way to it. None if even then
        there are not enough."""
        new = self.blocks.grow(seq, num_tokens)
        while new is None and self._reclaim(seq):
            new = self.blocks.grow(seq, num_tokens)
        return new

    def _reclaim(self, seq: Sequence, keep: Sequence | None = None) -> bool:
        """Frees some memory for `seq`: of a prompt on probation, else of a held beam that comes no earlier in the order
        (`keep` excepted). Returns whether there was any."""
        if self.pool.give_way():
            return True
        later = [held for held in self._held if held is not seq and held is not keep and not held < seq]
        if not later:
            return False
        self._drop(max(later))
        return True

    def _plan_waiting(self, plan: StepPlan, budget: int, held_up_from: Rank | None) -> None:
        """Begins what waits, requests and prompts that have their place, in order."""
        prompts = sorted((p for p in self.pool.computing if p.sequence.row < 0), key=_rank_of_prompt, reverse=True)
        self._short_of_blocks = None
        put_off: list[Sequence] = []
        while budget > 0:
            may_begin = self._free_rows and self._short_of_blocks is None
            seq = self._next_waiting(held_up_from, put_off) if may_begin else None
            if prompts and (seq is None or prompts[-1].rank < _rank(seq)):
                budget -= self._begin_prompt(plan, prompts.pop(), budget)
            elif seq is not None:
                budget -= self._begin_request(plan, seq, budget)
            else:
                break
        self._wake(put_off)

    def _next_waiting(self, held_up_from: Rank | None, put_off: list[Sequence]) -> Sequence | None:
        """The first request that waits, unless it may not begin. Outputs of a request that has its share of the rows
        are taken out of the queue, into `put_off`."""
        while self._waiting and (self._waiting[0].is_finished or self._has_its_share(self._waiting[0])):
            seq = heapq.heappop(self._waiting)
            if not seq.is_finished:
                put_off.append(seq)
        if not self._waiting or (held_up_from is not None and _rank(self._waiting[0]) > held_up_from):
            return None
        return self._waiting[0]

    def _has_its_share(self, seq: Sequence) -> bool:
        """Whether no more outputs of its request may run beside others."""
        most, running = self.config.max_outputs_beside_others, self._num_running_of[seq.request_id]
        return most is not None and running >= most and len(self.running) > running

    def _begin_prompt(self, plan: StepPlan, prompt: PinnedPrompt, budget: int) -> int:
        """Plans the first tokens of a prompt, unless it must wait for its parent, a row or blocks; returns how many."""
        if self.blocks.windows is not None and self._short_of_blocks is not None:
            return 0  # Who waits for blocks comes before it.
        if not self._free_prompt_rows or (prompt.parent is not None and prompt.parent.state != PromptState.PINNED):
            return 0
        return self._plan_chunk(plan, prompt, budget)

    def _begin_request(self, plan: StepPlan, seq: Sequence, budget: int) -> int:
        """Plans the first tokens of the first waiting request; returns how many, 0 where memory is short."""
        budget = min(budget, self._share)
        copies = self._start(seq, budget)
        if copies is None:
            self._short_of_blocks = seq
            return 0
        heapq.heappop(self._waiting)
        plan.copies.extend(copies.full)
        plan.window.copies.extend(copies.window)
        if seq.status == SequenceStatus.HELD:
            self._held.remove(seq)
        else:
            self._num_waiting -= 1
        seq.row = self._free_rows.pop()
        seq.status = SequenceStatus.RUNNING
        self._num_running_of[seq.request_id] += 1
        bisect.insort(self.running, seq)
        count = min(seq.num_tokens - seq.num_computed_tokens, budget)
        self._scheduled.append((seq, count))
        # Only a penalty on repetition looks at the tokens of a pinned prefix again.
        skipped = seq.prefix_len if seq.sampling_params.repetition_penalty == 1.0 else 0
        plan.started.append(self._sequence_start(seq, skipped))
        return count

    def _sequence_start(self, seq: Sequence, skipped: int) -> SequenceStart:
        prompt = seq.system_prompt
        if prompt is not None and not prompt.prefix:
            raise RuntimeError(f"{seq} reads system prompt {prompt.id}, which has no extent")
        return SequenceStart(
            row=seq.row,
            token_ids=seq.token_ids[skipped:],
            num_skipped=skipped,
            num_prompt_tokens=seq.num_prompt_tokens,
            block_table=list(seq.block_table),
            prefix=prompt.prefix if prompt is not None else (),
            window_table=_window_blocks(seq),
            window_prefix=prompt.window_prefix if prompt is not None else (),
            sampling_params=seq.sampling_params,
            seed=seq.seed,
            stop_token_ids=() if seq.is_system_prompt else self._stop_token_ids(seq),
            is_system_prompt=seq.is_system_prompt,
        )

    def _start(self, seq: Sequence, budget: int) -> Copies | None:
        """Gives a waiting sequence what it can reuse and the blocks for its first step.

        Returns the block copies to make, or None (and changes nothing) when memory is short.
        """
        copies = Copies([], [])
        if seq.status == SequenceStatus.HELD:
            return None if self._grow(seq, seq.num_tokens) is None else copies
        seq.num_computed_tokens = seq.prefix_len
        forked = self._fork_blocks(seq)
        if forked is not None:
            copies = forked
        elif seq.sampling_params.prompt_logprobs is None:
            found = self.blocks.find_cached(seq)
            reused = seq.prefix_len + len(found) * self.blocks.block_size
            first_step = reused + min(seq.num_tokens - reused, budget)
            while not self.blocks.can_begin(seq, found, first_step):
                if not self._reclaim(seq):
                    return None
            self.blocks.adopt(seq, found)
        count = min(seq.num_tokens - seq.num_computed_tokens, budget)
        if self._grow(seq, seq.num_computed_tokens + count) is None:
            self.blocks.free(seq)
            return None
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_computed_tokens - seq.num_cache_write_tokens
            seq.first_scheduled_time = self._clock()
            if seq.index == 0:
                self.prefix_cache_queries += seq.num_prompt_tokens
                self.prefix_cache_hits += seq.num_cached_tokens
        return copies

    def _fork_blocks(self, seq: Sequence) -> Copies | None:
        """Lets `seq` share what its parent holds; see `BlockManager.fork`."""
        parent, seq.fork_parent = seq.fork_parent, None
        if parent is None or parent.is_finished:
            return None
        windows = self.blocks.windows
        while not (self.blocks.num_free_blocks and (windows is None or windows.num_free_blocks)):
            if not self._reclaim(seq, keep=parent):
                break
        return self.blocks.fork(parent, seq)

    def _fill_batch(self, plan: StepPlan) -> None:
        """Writes the batch, sequences of one group side by side so that its extent is read once."""
        self._scheduled.sort(key=_order_key)
        for seq, count in self._scheduled:
            samples = seq.num_computed_tokens + count == seq.num_tokens and not seq.is_system_prompt
            plan.rows.append(seq.row)
            plan.starts.append(seq.num_computed_tokens)
            plan.counts.append(count)
            plan.samples.append(samples)
            if samples and seq.matcher is not None:
                plan.masked.append(len(plan.samples) - 1)
            plan.wants_prompt_logprobs.append(
                seq.sampling_params.prompt_logprobs is not None
                and seq.index == 0
                and seq.num_computed_tokens < seq.num_prompt_tokens
                and seq.num_output_tokens == 0
            )
            seq.num_computed_tokens += count
            if samples and seq.is_beam:
                seq.awaits_search = True
                self._num_awaiting += 1
            elif samples:
                seq.num_in_flight += 1

    def _ends_by_length(self, seq: Sequence) -> bool:
        """Whether the last token that `seq` may have is drawn already, perhaps in flight."""
        most = seq.sampling_params.max_tokens or self.max_model_len
        return seq.num_output_tokens >= most or seq.num_tokens >= self.max_model_len

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
                    self._hold(seq)
                news.append((seq, token, None))
                continue
            self._release_forks(seq)
            if seq.matcher is not None:
                seq.matcher.accept(token)
            status, stop_token = self._stop(seq, token)
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
                heapq.heappush(self._waiting, child)
        seq.fork_children = []

    def _stop(self, seq: Sequence, token: int) -> tuple[SequenceStatus | None, int | None]:
        params = seq.sampling_params
        num_outputs = len(seq.token_ids) - seq.num_prompt_tokens
        # A form that is complete leaves nothing to say, whatever min_tokens and ignore_eos ask.
        if seq.matcher is not None and seq.matcher.ended:
            return SequenceStatus.FINISHED_STOPPED, None
        if num_outputs >= params.min_tokens:
            if token in self.eos_token_ids and not params.ignore_eos:
                return SequenceStatus.FINISHED_STOPPED, None
            if token in (params.stop_token_ids or ()):
                return SequenceStatus.FINISHED_STOPPED, token
        if num_outputs >= (params.max_tokens or self.max_model_len) or len(seq.token_ids) >= self.max_model_len:
            return SequenceStatus.FINISHED_LENGTH, None
        return None, None

    def _stop_token_ids(self, seq: Sequence) -> tuple[int, ...]:
        params = seq.sampling_params
        eos = () if params.ignore_eos else self.eos_token_ids
        return tuple({*eos, *(params.stop_token_ids or ())})

    # Beams of a search -----------------------------------------------------------------------------------------

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
            self._num_waiting += len(twins)
            self._requests[request_id].extend(twins)
            self._wake([seq, *twins])

    def _hold(self, seq: Sequence) -> None:
        """Takes a running beam out of its row until its search goes on. Its blocks stay, as long as nobody needs
        them: see `_reclaim`."""
        self.running.remove(seq)
        self._num_running_of[seq.request_id] -= 1
        self._leave_row(seq)
        seq.status = SequenceStatus.HELD
        self._held.append(seq)

    def _drop(self, seq: Sequence) -> None:
        """Frees the blocks of a held beam; it computes what they held again when it goes on."""
        self._held.remove(seq)
        self.blocks.free(seq)
        seq.status = SequenceStatus.PREEMPTED
        self._num_waiting += 1
        self.num_preemptions += 1

    # Leaving ---------------------------------------------------------------------------------------------------

    def _leave_row(self, seq: Sequence) -> None:
        self._freed.append(FreedSequence(seq.row, seq.is_system_prompt))
        self._free_rows.append(seq.row)
        seq.row = -1

    def _preempt(self, seq: Sequence) -> None:
        """Frees the blocks of a running sequence that has nothing planned in this step; it waits to run again."""
        self.running.remove(seq)
        self._num_running_of[seq.request_id] -= 1
        self._leave_row(seq)
        self.blocks.free(seq)
        seq.status = SequenceStatus.PREEMPTED
        if not seq.awaits_search:
            heapq.heappush(self._waiting, seq)
        self._num_waiting += 1
        self.num_preemptions += 1
        self._short_of_blocks = seq

    def _finish(self, seq: Sequence, status: SequenceStatus) -> None:
        if seq.is_finished:
            return
        self._release_forks(seq)
        if seq.status == SequenceStatus.RUNNING:
            self.running.remove(seq)
            self._num_running_of[seq.request_id] -= 1
            self._leave_row(seq)
        elif seq.status == SequenceStatus.HELD:
            self._held.remove(seq)
        else:
            self._num_waiting -= 1
        self._num_awaiting -= seq.awaits_search
        seq.status = status
        self.blocks.free(seq)
        self.pool.detach(seq)
        siblings = self._requests[seq.request_id]
        siblings.remove(seq)
        if not siblings:
            del self._requests[seq.request_id]
            self._num_running_of.pop(seq.request_id, None)

    def check_integrity(self) -> None:
        """Raises AssertionError with numbers when blocks, readers or rows do not add up."""
        extents = [e for several in self.pool.blocks.extents.values() for e in several]
        pinned = {b for e in extents for b in range(e.start, e.end)}
        self.blocks.check_integrity([*self.running, *self._held], pinned)
        if self.blocks.windows is not None:
            of_windows = (e for p in self.pool.prompts() for e in p.window_extents)
            prompts = [p.sequence for p in self.pool.computing]
            pinned_in_windows = {b for e in of_windows for b in range(e.start, e.end)}
            self.blocks.windows.check_integrity([*self.running, *self._held, *prompts], pinned_in_windows)
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
        assert +self._num_running_of == Counter(s.request_id for s in self.running), self._num_running_of
        rows = [s.row for s in self.running] + self._free_rows
        assert sorted(rows) == list(range(self.config.max_num_seqs)), rows
        rows = [p.sequence.row for p in self.pool.computing if p.sequence.row >= 0] + self._free_prompt_rows
        first = self.config.max_num_seqs
        assert sorted(rows) == list(range(first, first + PROMPT_ROWS)), rows
        assert self.running == sorted(self.running)
        held = [s for s in self.unfinished() if s.status == SequenceStatus.HELD]
        assert len(held) == len(self._held) and set(held) == set(self._held), (held, self._held)
        assert self.num_running + self._num_waiting == len(list(self.unfinished()))
        assert self._num_awaiting == sum(s.awaits_search for s in self.unfinished())


def _rank(seq: Sequence) -> Rank:
    """The place of a request in the order in which requests and system prompts are served."""
    return seq.priority, seq.order, seq.num_tokens


def _rank_of_prompt(prompt: PinnedPrompt) -> Rank:
    return prompt.rank


def _add_moves(moves: list[tuple[int, int]], more: list[tuple[int, int]]) -> None:
    """Adds block moves that follow on others of the same plan; a plan's moves run all at once."""
    source_of = {target: source for source, target in moves}
    for source, target in more:
        source_of[target] = source_of.pop(source, source)
    moves[:] = [(source, target) for target, source in source_of.items()]


def _window_blocks(seq: Sequence) -> list[int]:
    """Its window table as the ranks get it; they never read what a hole stands for."""
    return [max(0, block) for block in seq.window_table]


def _order_key(entry: tuple[Sequence, int]) -> tuple[int, ...]:
    """Brings those side by side that read the same extents."""
    prompt = entry[0].system_prompt
    return prompt.order_key if prompt is not None else ()
