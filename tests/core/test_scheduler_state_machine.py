"""Random histories of the scheduler and the pool, without a model: blocks, readers and budgets always add up.

Invariants 1 (free + cached + used + pinned == num_blocks), 2 (a block belongs to one writer), 3 (budget and floor),
4 (a full pool never wedges a request), 5 (one prefill a prompt) and 7 (nothing leaks on abort) of the design.
"""

import os
import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm.config import SchedulerConfig, SystemPromptConfig
from vllm.core.block_manager import BlockManager
from vllm.core.prompt_room import WindowRoom
from vllm.core.prompt_tiers import PromptTiers
from vllm.core.scheduler import Scheduler
from vllm.core.system_prompt_pool import PinClass, SystemPromptPool, SystemPromptRefusedError
from vllm.core.window_blocks import WindowBlocks
from vllm.inputs import CacheMark
from vllm.kv_cache.extents import PinnedBlockPool
from vllm.kv_cache.windows import WindowLayout
from vllm.sampling_params import SamplingParams
from vllm.sequence import Sequence

BLOCK = 4
MAX_LEN = 64
PROMPTS = [[p] * n for p, n in ((1, 3), (2, 8), (3, 17), (4, 31), (5, 44), (6, 12), (7, 4))]
# Some continue others, up to more links than a chain may have.
PROMPTS += [[3] * 17 + [8] * 6, [3] * 17 + [8] * 6 + [9] * 5, [2] * 12, [2] * 14, [2] * 19, [2] * 25, [2] * 30]
SUFFIXES = [[11] * 4, [11] * 8, [11] * 9, [12] * 12]


class Group:
    """The blocks of a cache group: what every slot holds, and the block table of each row."""

    def __init__(self) -> None:
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}
        self.tables: dict[int, list[int]] = {}

    def apply(self, orders, freed, started) -> None:
        for pairs in (orders.moves, orders.copies):
            old = dict(self.slots)
            for source, destination in pairs:
                for offset in range(BLOCK):
                    self.slots.pop((destination, offset), None)
                    if (source, offset) in old:
                        self.slots[destination, offset] = old[source, offset]
        for block in orders.cleared:
            for offset in range(BLOCK):
                self.slots.pop((block, offset), None)
        for seq in freed:
            assert self.tables.pop(seq.row, None) is not None, "a row is freed once"
        for row, first, blocks in orders.new_blocks:
            if row in self.tables:
                self.tables[row][first : first + len(blocks)] = blocks
        for row, table in started:
            assert row not in self.tables, "a row is freed before it is used again"
            self.tables[row] = list(table)

    def own_slot(self, row: int, position: int) -> tuple[int, int]:
        return self.tables[row][position // BLOCK], position % BLOCK


class Device:
    """A rank in numbers: what every KV slot holds, and which tokens and blocks each row has, as its plans say.

    Args:
        window: W of the window group; None where there is none.
    """

    def __init__(self, window: int | None = None) -> None:
        self.full = Group()
        self.windows = Group()
        self.window = window
        self.tokens: dict[int, list[int]] = {}
        self.prefix: dict[int, tuple] = {}
        self.window_prefix: dict[int, tuple] = {}

    @property
    def slots(self) -> dict[tuple[int, int], tuple[int, int]]:
        return self.full.slots

    def run(self, plan, token, heads, max_num_seqs) -> list[int]:
        """Carries out a plan; every sequence that draws gets `token`. `heads` are the tokens that plans leave out since
        their KV is pinned, by row."""
        self.full.apply(plan, plan.freed, [(seq.row, seq.block_table) for seq in plan.started])
        self.windows.apply(plan.window, plan.freed, [(seq.row, seq.window_table) for seq in plan.started])
        for seq in plan.started:
            assert seq.num_skipped <= sum(e.num_tokens for e in seq.prefix)
            assert (seq.row >= max_num_seqs) == seq.is_system_prompt
            self.tokens[seq.row] = [*heads[seq.row][: seq.num_skipped], *seq.token_ids]
            self.prefix[seq.row], self.window_prefix[seq.row] = seq.prefix, seq.window_prefix
        self.begin_copies(plan)
        self.compute(plan, self.full, self.slot, MAX_LEN)
        if self.window is not None:
            self.compute(plan, self.windows, self.window_slot, self.window)
        drawn = []
        for row, start, count, samples in zip(plan.rows, plan.starts, plan.counts, plan.samples, strict=True):
            assert count >= 1
            drawn.append(token if samples else -1)
            if samples:
                assert len(self.tokens[row]) == start + count
                self.tokens[row].append(token)
                assert len(self.tokens[row]) <= MAX_LEN
        return drawn

    def compute(self, plan, group, slot_of, window) -> None:
        """Writes the KV of all tokens of a batch, then reads what each of them reads."""
        written = {}
        for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
            for i in range(start, start + count):
                slot = slot_of(row, i)
                assert written.setdefault(slot, (row, i)) == (row, i), "two tokens are written into one slot"
                group.slots[slot] = (self.tokens[row][i], i)
        for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
            for i in range(max(0, start - window + 1), start + count):
                seen = group.slots.get(slot_of(row, i))
                assert seen == (self.tokens[row][i], i), (row, i, seen, "KV of another context")

    def begin_copies(self, plan) -> None:
        """Copies to other tiers begin when blocks are in their places, and run beside the batch."""
        assert not (plan.transfers or plan.jobs or plan.dropped)

    def slot(self, row: int, position: int) -> tuple[int, int]:
        for extent in self.prefix[row]:
            if position < extent.num_tokens:
                return extent.start_block + position // BLOCK, position % BLOCK
            position -= extent.num_tokens
        return self.full.own_slot(row, position)

    def window_slot(self, row: int, position: int) -> tuple[int, int]:
        for extent in self.window_prefix[row]:
            if extent.position <= position < extent.position + extent.num_tokens:
                offset = position - extent.position
                return extent.start_block + offset // BLOCK, offset % BLOCK
        own = position - sum(e.num_tokens for e in self.prefix[row])
        assert own >= 0, (row, position, "not pinned in the window group")
        return self.windows.own_slot(row, own)


class Machine(RuleBasedStateMachine):
    @initialize(
        extra=st.integers(0, 40),
        budget=st.integers(0, 40),
        caching=st.booleans(),
        seqs=st.integers(1, 5),
        batched=st.integers(5, 40),
        mode=st.sampled_from(["auto", "auto", "auto", "declared", "off"]),
        depth=st.sampled_from([1, 2]),
        private=st.booleans(),
        markers=st.sampled_from(["off", "soft", "soft", "hard"]),
        ttl=st.sampled_from([None, None, 20.0]),
        threshold=st.sampled_from([None, 1, 6]),
        outputs=st.sampled_from([None, 1, 2]),
        seed=st.integers(0, 1000),
    )
    def start(
        self, extra, budget, caching, seqs, batched, mode, depth, private, markers, ttl, threshold, outputs, seed
    ):
        self.now = 1000.0
        self.num_blocks = MAX_LEN // BLOCK + extra
        window = self.make_window(seed)
        windows = None
        if window is not None:
            layout = WindowLayout(window, BLOCK, max(batched, seqs, BLOCK))
            floor = layout.most_blocks(MAX_LEN)
            windows = WindowBlocks(layout, floor + extra // 2, caching)
            pinned_windows = PinnedBlockPool(floor + extra // 2, budget, floor)
        self.blocks = BlockManager(self.num_blocks, BLOCK, caching, windows)
        self.pinned = PinnedBlockPool(self.num_blocks, budget, MAX_LEN // BLOCK)
        self.pool = SystemPromptPool(
            SystemPromptConfig(mode=mode, min_tokens=4, private=private, markers=markers, ttl=ttl),
            self.pinned,
            BLOCK,
            on_release=self.blocks.give_back,
            clock=lambda: self.now,
            tiers=self.make_tiers(),
            windows=None if windows is None else WindowRoom(pinned_windows, layout, windows.give_back),
        )
        config = SchedulerConfig(
            max_num_seqs=seqs,
            max_num_batched_tokens=max(batched, seqs),
            long_prefill_token_threshold=threshold,
            max_outputs_beside_others=outputs,
        )
        self.scheduler = Scheduler(config, self.blocks, self.pool, MAX_LEN, eos_token_ids=(99,))
        self.device = self.make_device(window)
        self.depth = depth
        self.drawn: list[list[int]] = []
        self.next_id = 0
        self.requests: dict[str, int] = {}
        # Searches: steps that are left, and the beams that have got their draws.
        self.searches: dict[str, tuple[int, set[int]]] = {}
        self.random = random.Random(seed)
        self.computed: dict[str, int] = {}

    def make_tiers(self):
        return PromptTiers()

    def make_window(self, seed):
        return None

    def make_device(self, window):
        return Device(window)

    @rule(
        prompt=st.sampled_from([*PROMPTS, None]),
        suffix=st.lists(st.integers(10, 12), min_size=1, max_size=14) | st.sampled_from(SUFFIXES),
        max_tokens=st.integers(1, 12),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        namespace=st.sampled_from([b"", b"a"]),
        tenant=st.sampled_from([b"", b"t"]),
        priority=st.sampled_from([0, 0, 1]),
        marks=st.lists(st.builds(CacheMark, st.integers(1, MAX_LEN), st.sampled_from([None, 5.0, 50.0])), max_size=4),
    )
    def add(self, prompt, suffix, max_tokens, n, namespace, tenant, priority, marks):
        ids = ((prompt or []) + suffix)[: MAX_LEN - 1]
        params = SamplingParams(max_tokens=max_tokens, n=n)
        request_id = f"r{self.next_id}"
        self.next_id += 1
        sequences = [
            Sequence(
                request_id,
                list(ids),
                params,
                index=i,
                cache_seed=tenant + namespace,
                priority=priority,
                tenant=tenant,
                namespace=tenant + namespace,
            )
            for i in range(n)
        ]
        self.requests[request_id] = n
        self.scheduler.add(sequences, len(prompt) if prompt and len(prompt) < len(ids) else None, marks)
        read = sequences[0].system_prompt
        if read is not None:
            assert ids[: read.num_tokens] == read.token_ids.tolist() and read.num_tokens < len(ids)
            assert read.scope in (b"", tenant, tenant + namespace), "another namespace's prompt"

    @rule(
        prompt=st.sampled_from([*PROMPTS, None]),
        suffix=st.sampled_from(SUFFIXES),
        steps=st.integers(1, 12),
        priority=st.sampled_from([0, 0, 1]),
    )
    def search(self, prompt, suffix, steps, priority):
        """A beam search: after each draw, the machine chooses how its beams go on."""
        ids = ((prompt or []) + suffix)[: MAX_LEN - steps]
        request_id = f"search{self.next_id}"
        self.next_id += 1
        seq = Sequence(request_id, ids, SamplingParams(max_tokens=steps), priority=priority, is_beam=True)
        self.searches[request_id] = (steps, set())
        self.scheduler.add([seq], len(prompt) if prompt and len(prompt) < len(ids) else None)

    def go_on_with_searches(self):
        for request_id, (steps, drawn) in list(self.searches.items()):
            beams = [seq for seq in self.scheduler.unfinished() if seq.request_id == request_id]
            if len(drawn) < len(beams) or self.random.random() < 0.3:
                continue
            if steps == 1:
                self.scheduler.abort(request_id)
                del self.searches[request_id]
                continue
            width = self.random.randint(1, 4)
            chosen = [(self.random.randrange(len(beams)), self.random.choice([10, 11, 99])) for _ in range(width)]
            self.scheduler.fork(request_id, chosen)
            self.searches[request_id] = (steps - 1, set())

    @rule(data=st.data())
    @precondition(lambda self: self.searches)
    def abort_search(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.searches)))
        self.scheduler.abort(request_id)
        del self.searches[request_id]

    @rule(data=st.data())
    @precondition(lambda self: self.requests)
    def abort(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        index = data.draw(st.sampled_from([None, None, 0, self.requests[request_id] - 1]))
        self.scheduler.abort(request_id, index)
        if index is None:
            del self.requests[request_id]

    @rule(
        prompt=st.sampled_from(PROMPTS),
        ttl=st.sampled_from([None, 5.0, 50.0]),
        pin=st.sampled_from([PinClass.HARD, PinClass.SOFT]),
    )
    def declare(self, prompt, ttl, pin):
        kept = {p.id for p in self.pool.prompts() if p.readers or (p.pin == PinClass.HARD and not p.doomed)}
        try:
            self.scheduler.add_system_prompt(list(prompt), ttl=ttl, pin=pin)
        except SystemPromptRefusedError as error:
            assert str(error)
        assert kept <= {p.id for p in self.pool.prompts()}, "what is hard, or is read, gives way to nothing"

    @rule(data=st.data(), ttl=st.sampled_from([None, 3.0, 30.0]))
    def change(self, data, ttl):
        known = [p.id for p in self.pool.prompts()]
        if known:
            self.pool.update(data.draw(st.sampled_from(sorted(known))), ttl=ttl, name="n")

    @rule(blocks=st.integers(0, 40))
    def change_budget(self, blocks):
        try:
            self.pool.set_budget(blocks * BLOCK)
        except ValueError:
            assert blocks < self.pinned.pinned_blocks + sum(p.num_blocks for p in self.pool.prompts() if not p.extents)
        assert self.pinned.budget_blocks >= self.pinned.pinned_blocks

    @rule(data=st.data())
    def remove(self, data):
        known = [p.id for p in self.pool.prompts()]
        if known:
            self.pool.remove(data.draw(st.sampled_from(sorted(known))))

    @rule(seconds=st.sampled_from([1.0, 10.0, 100.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def forget_cache(self):
        self.blocks.reset_prefix_cache()

    @rule(data=st.data(), steps=st.integers(1, 4))
    def step(self, data, steps):
        for _ in range(steps):
            self.one_step(data.draw(st.sampled_from([10, 11, 12, 99])))

    def one_step(self, token):
        before = {p.id: p.extents for p in self.pool.prompts() if p.extents}
        self.computed = {k: v for k, v in self.computed.items() if k in before}
        preempted = self.scheduler.num_preemptions
        plan = self.scheduler.schedule()
        limits = self.scheduler.config
        assert sum(plan.counts) <= max(limits.max_num_batched_tokens, len(self.scheduler.running) + BLOCK)
        assert len(plan.rows) == len(set(plan.rows))
        assert sum(row < limits.max_num_seqs for row in plan.rows) <= limits.max_num_seqs
        for prompt in self.pool.prompts():
            if prompt.id in before and prompt.extents:
                assert prompt.extents == before[prompt.id], "an extent never moves"
        if self.scheduler.num_preemptions > preempted:
            assert not self.idle_probationers(), "what is on probation goes before anybody is preempted"
        if not plan.is_empty:
            batch = {} if not self.scheduler.num_in_flight else self.scheduler.newest_batch.sequences
            heads = {seq.row: seq.token_ids for seq in self.scheduler.running}
            by_row = dict(zip(plan.rows, batch, strict=True)) if plan.rows else {}
            for seq in plan.started:
                if seq.is_system_prompt:
                    prompt = by_row[seq.row]
                    heads[seq.row] = prompt.token_ids
                    assert self.computed.get(prompt.request_id) is None, "a prompt is computed once while it is known"
            for row, start, count in zip(plan.rows, plan.starts, plan.counts, strict=True):
                seq = by_row[row]
                if seq.is_system_prompt:
                    key, above = seq.request_id, seq.prefix_len
                    assert start == self.computed.get(key, above), "no token of it is computed twice"
                    self.computed[key] = start + count
                    ends = start + count == seq.num_tokens
                    assert ends or count % BLOCK == 0, "whole blocks at a time"
                    assert not any(s for r, s in zip(plan.rows, plan.samples, strict=True) if r == row)
            self.drawn.append(self.device.run(plan, token, heads, limits.max_num_seqs))
        assert self.scheduler.num_in_flight == len(self.drawn)
        if self.drawn and (plan.is_empty or len(self.drawn) >= self.depth):
            for seq, _, _ in self.scheduler.postprocess(self.drawn.pop(0)):
                if seq.is_beam:
                    self.searches[seq.request_id][1].add(seq.index)
        self.go_on_with_searches()
        running = {s.request_id for s in self.scheduler.unfinished()}
        self.requests = {k: v for k, v in self.requests.items() if k in running}

    def idle_probationers(self):
        """Prompts on probation that nothing holds, neither a reader nor a prompt that continues them."""
        return [
            p
            for p in self.pool.prompts()
            if p.on_probation
            and p.state == "pinned"
            and not (p.readers or p.num_children_on_device or p.doomed or p.is_being_written)
        ]

    @invariant()
    def books_balance(self):
        self.scheduler.check_integrity()
        if self.blocks.windows is not None:
            layout, windows = self.blocks.windows.layout, self.blocks.windows
            assert windows.num_schedulable_blocks >= layout.most_blocks(MAX_LEN)
            for prompt in self.pool.prompts():
                if prompt.window_extents:
                    kept = sum(e.num_blocks for e in prompt.window_extents)
                    assert kept <= -(-(min(prompt.num_own_tokens, layout.window - 1)) // BLOCK) + 1
        assert self.pinned.pinned_blocks <= self.pinned.budget_blocks
        assert self.blocks.num_schedulable_blocks >= MAX_LEN // BLOCK

    def teardown(self):
        """Every admitted request finishes, whatever is pinned, and then nothing is held."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5000):
            if not self.scheduler.has_work() and not self.searches:
                break
            self.one_step(10)
        assert not self.scheduler.has_work(), list(self.scheduler.unfinished())
        self.scheduler.check_integrity()
        assert self.blocks.num_used_blocks == 0 and self.pool.num_readers == 0
        assert self.blocks.windows is None or self.blocks.windows.num_used_blocks == 0
        for prompt in self.pool.prompts():
            if self.pool.get(prompt.id) is prompt:
                self.pool.remove(prompt.id)
        assert self.pinned.pinned_blocks == 0 and not self.pool.prompts()
        assert self.blocks.num_free_blocks == self.num_blocks
        assert self.blocks.windows is None or self.blocks.windows.num_free_blocks == self.blocks.windows.num_blocks


_EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "0"))
_settings = {"print_blob": False, "deadline": None, "suppress_health_check": list(HealthCheck)}


class TestScheduler(Machine.TestCase):
    settings = settings(max_examples=_EXAMPLES or 200, stateful_step_count=40, **_settings)


@pytest.mark.nightly
class TestSchedulerLong(Machine.TestCase):
    settings = settings(max_examples=_EXAMPLES or 3000, stateful_step_count=80, **_settings)


class WindowMachine(Machine):
    """The same with a window group beside the full one: a pin keeps its window there, a request gives back the rest."""

    def make_window(self, seed):
        return [1, 2, BLOCK, BLOCK + 1, 6, 9, 13, 20, 31][seed % 9]


class TestWindows(WindowMachine.TestCase):
    settings = settings(max_examples=_EXAMPLES or 200, stateful_step_count=40, **_settings)


@pytest.mark.nightly
class TestWindowsLong(WindowMachine.TestCase):
    settings = settings(max_examples=_EXAMPLES or 3000, stateful_step_count=80, **_settings)
