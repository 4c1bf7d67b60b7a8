"""Random histories with a host tier and snapshots: the same invariants, and no byte of a prompt is ever another's.

Work on snapshots ends whenever it likes, and loads may find damage. An image or an extent that was given away too early
shows as KV of another context.
"""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant

from tests.core.test_scheduler_state_machine import (
    _EXAMPLES,
    BLOCK,
    MAX_LEN,
    PROMPTS,
    Device,
    Group,
    Machine,
    _settings,
)
from vllm.core.pinned_prompt import prompt_id
from vllm.core.prompt_tiers import PromptTiers
from vllm.kv_cache.windows import WindowLayout
from vllm.step import EndedJob
from vllm.system_prompt_store import SnapshotRecord

GARBAGE = [(-1, -1)] * BLOCK


class TieredDevice(Device):
    """A rank that also has a host and a disk. A copy between them is done when the next step begins: until then it may
    read its source, and what it writes is worth nothing. A job works when it ends."""

    def __init__(self, rng: random.Random, disk: dict[str, list], window: int | None) -> None:
        super().__init__(window)
        self.rng = rng
        self.disk = disk
        self.host: dict[object, object] = {}
        self.jobs: list = []
        self.copies: list[tuple[bool, tuple[Group, int], object, object]] = []

    def run(self, plan, token, heads, max_num_seqs) -> list[int]:
        self.join()
        drawn = super().run(plan, token, heads, max_num_seqs)
        return drawn

    def begin_copies(self, plan) -> None:
        for image in plan.dropped:
            for i in range(image.size):
                self.host.pop(self.place(image, i), None)
        for transfer in plan.transfers:
            # A block of the window group is as large as one of the full group here.
            extents = ((self.full, transfer.extents), (self.windows, transfer.window_extents))
            blocks = [(g, b) for g, some in extents for start, size in some for b in range(start, start + size)]
            assert len(blocks) == transfer.image.size
            assert transfer.image.num_extra == transfer.image.num_window_blocks
            for i in range(transfer.first, transfer.first + transfer.count):
                place, block = self.place(transfer.image, i), blocks[i]
                source = self.block(block) if transfer.to_host else self.host[place]
                assert source != GARBAGE, "copied while it is written"
                self.copies.append((transfer.to_host, block, place, source))
                if transfer.to_host:
                    self.host[place] = GARBAGE
                else:
                    self.put(block, GARBAGE)
        self.jobs += plan.jobs

    def join(self) -> None:
        """What the copies of the step before have done is there."""
        for to_host, block, place, source in self.copies:
            now, target = (self.block(block), self.host[place]) if to_host else (self.host[place], self.block(block))
            assert now == source, "changed while it was copied"
            assert target == GARBAGE, "written while it was copied to"
            if to_host:
                self.host[place] = source
            else:
                self.put(block, source)
        self.copies = []

    def put(self, where: tuple[Group, int], content: list) -> None:
        group, block = where
        for offset, slot in enumerate(content):
            group.slots[block, offset] = slot

    def block(self, where: tuple[Group, int]) -> list:
        group, block = where
        return [group.slots.get((block, offset)) for offset in range(BLOCK)]

    @staticmethod
    def place(image, i: int) -> object:
        return (image.prompt_id, i) if image.start is None else image.start + i

    def end_one(self) -> EndedJob:
        self.join()  # It waits for the copies that are under way.
        job = self.jobs.pop(0)
        key, outcome = job.record.prompt_id, "ok"
        if job.op == "save":
            content = [self.host[self.place(job.image, i)] for i in range(job.image.size)]
            if self.rng.random() < 0.2:
                outcome = "error"
            else:
                self.disk[key] = content
        elif job.op == "delete":
            outcome = "ok" if self.disk.pop(key, None) else "missing"
        elif job.op == "load":
            content = self.disk.get(key)
            outcome = "missing" if content is None else "damaged" if self.rng.random() < 0.3 else "ok"
            for i in range(job.image.size):
                self.host[self.place(job.image, i)] = content[i] if outcome == "ok" else [(-2, -2)] * BLOCK
            if outcome == "damaged":
                del self.disk[key]
        return EndedJob(job.op, key, outcome)


def snapshot(tokens: list[int], window: int | None) -> tuple[SnapshotRecord, list]:
    """A snapshot that an earlier run has left."""
    count = -(-len(tokens) // BLOCK)
    slots = [(token, i) for i, token in enumerate(tokens)] + [None] * (count * BLOCK - len(tokens))
    full = [slots[i * BLOCK : (i + 1) * BLOCK] for i in range(count)]
    kept = full[WindowLayout(window, BLOCK, 1).first_of_tail(len(tokens)) :] if window is not None else []
    record = SnapshotRecord(prompt_id(tokens), tokens, 0, count, "automatic", num_window_blocks=len(kept))
    return record, [*full, *kept]


class TieredMachine(Machine):
    @initialize(
        extra=st.integers(0, 40),
        budget=st.integers(0, 40),
        caching=st.booleans(),
        seqs=st.integers(1, 5),
        batched=st.integers(5, 40),
        mode=st.sampled_from(["auto", "auto", "auto", "declared"]),
        depth=st.sampled_from([1, 2]),
        markers=st.sampled_from(["off", "soft", "hard"]),
        ttl=st.sampled_from([None, None, 20.0]),
        host=st.sampled_from([0, 5, 12, 30]),
        keeps=st.booleans(),
        stored=st.sets(st.integers(0, len(PROMPTS) - 1)),
        copied=st.sampled_from([1, 2, 3, 100]),
        seed=st.integers(0, 2**20),
    )
    def start(
        self, extra, budget, caching, seqs, batched, mode, depth, markers, ttl, host, keeps, stored, copied, seed
    ):
        self.rng = random.Random(seed)
        window = self.make_window(seed)
        found = [snapshot(list(PROMPTS[i]), window) for i in stored] if keeps else []
        self.disk = {record.prompt_id: content for record, content in found}
        share = 0.0 if window is None else 1.0
        self.tiers = PromptTiers(host, keeps, [r for r, _ in found], copied, share, clock=lambda: self.now)
        super().start(extra, budget, caching, seqs, batched, mode, depth, False, markers, ttl, None, None, seed)

    def make_window(self, seed):
        """A window group beside the full one, half of the time."""
        return [1, 2, BLOCK, BLOCK + 1, 6, 9, 13, 20, 31, *[None] * 9][seed % 18]

    def make_tiers(self):
        return self.tiers

    def make_device(self, window):
        return TieredDevice(self.rng, self.disk, window)

    def one_step(self, token):
        super().one_step(token)
        while self.device.jobs and self.rng.random() < 0.6:
            self.tiers.end_jobs([self.device.end_one()])

    @invariant()
    def host_is_bounded(self):
        assert self.tiers.host.pinned_blocks <= self.tiers.host.num_blocks

    def teardown(self):
        super().teardown()
        if not hasattr(self, "tiers"):
            return
        self.one_step(10)
        while self.device.jobs:
            self.tiers.end_jobs([self.device.end_one()])
        assert self.tiers.host.pinned_blocks == 0
        self.one_step(10)
        assert not self.device.host or all(isinstance(place, int) for place in self.device.host), "an image was left"
        assert not self.tiers.has_work and MAX_LEN


class TestTiers(TieredMachine.TestCase):
    settings = settings(max_examples=_EXAMPLES or 60, stateful_step_count=40, **_settings)


@pytest.mark.nightly
class TestTiersLong(TieredMachine.TestCase):
    settings = settings(max_examples=_EXAMPLES or 2000, stateful_step_count=80, **_settings)
