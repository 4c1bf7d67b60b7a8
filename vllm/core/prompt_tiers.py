"""Where the K/V of pinned prompts are kept besides the device: in host memory, and in snapshots on disk.

    device  ⇄  image on the host  ⇄  snapshot

A prompt is saved once, when its prefill has run: its extents are copied to an image on the host, and from there, once
it is no longer on probation, written to disk in the background. The image stays if the host tier has room for it; then
the prompt may leave the device and come back. Copies go in slices, so many blocks a step, loads ahead of saves.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import msgspec

from vllm.core.pinned_prompt import BlockCount, PinClass, PinnedPrompt
from vllm.kv_cache.extents import Extent, PinnedBlockPool
from vllm.step import EndedJob, ExtentCopy, HostImage, SnapshotJob, SnapshotOp, StepPlan
from vllm.system_prompt_store.manifest import SnapshotRecord

_OK = "ok"
_PIN_NAMES: dict[PinClass, Literal["hard", "automatic", "soft"]] = {
    PinClass.HARD: "hard",
    PinClass.AUTOMATIC: "automatic",
    PinClass.SOFT: "soft",
}
# While a load is all there is to do, a step waits so long for it; a request that comes meanwhile waits no longer.
_PATIENCE_S = 0.01
# Without other work, the end of a save is looked for so often.
_LOOK_EVERY_S = 0.5
# A load, for which a request waits, may delay the tokens of others by so many times what a save may; with nobody else
# there it takes so many times more: 1 GiB a step where `copy_blocks` are 64 MiB. A save in an idle engine delays who
# comes meanwhile, by 5 ms for 256 MiB.
_TIMES_OF_A_LOAD = 4
_TIMES_WHEN_IDLE = 16
_TIMES_OF_A_SAVE_WHEN_IDLE = 4
# A step lasts longer for so many tokens, and hides another `copy_blocks` of a save: 576 MiB in the 190 ms of 8,448
# tokens on an H100. The link would take six times as much, but host memory is made ready at 6 GB/s (`HostArena`).
_TOKENS_OF_A_COPY = 1024


class _Image:
    """Bytes of a prompt on the host: there, on their way there, or on their way out.

    Attributes:
        owner: Whose they are; None once that prompt is gone and only work under way still needs them.
        filled: Whether all of them are there.
    """

    def __init__(self, place: HostImage, owner: PinnedPrompt) -> None:
        self.place = place
        self.owner: PinnedPrompt | None = owner
        self.filled = False

    @property
    def stays(self) -> bool:
        """Whether it is one of the host tier, not just a stop on the way."""
        return self.place.start is not None


class _Load:
    """A prompt on its way to the device.

    Attributes:
        num_loaded: Blocks whose copy is planned.
        failed: What was read from disk is worth nothing.
    """

    def __init__(self, prompt: PinnedPrompt) -> None:
        self.prompt = prompt
        self.num_loaded = 0
        self.failed = False


class EndedLoads(NamedTuple):
    """Loads that have come to an end: the coming batch may read what is `done`; what `failed` must be computed."""

    done: list[PinnedPrompt]
    failed: list[PinnedPrompt]


class PromptTiers:
    """Plans copies and snapshots. It decides with integers; the ranks move the bytes.

    Args:
        host_blocks: Blocks of the host tier.
        keeps_snapshots: Whether there is a place for snapshots.
        stored: Snapshots that are there already.
        copy_blocks: Blocks that a decode step saves: what the tokens of others may be late by. Loads, long steps and
            an idle engine take a multiple.
        window_share: Bytes of a block of the window group, in blocks of the full group.
        clock: Seconds; replaced in tests.

    Attributes:
        num_host_blocks: Blocks of the full group whose content has its place in the host tier.
    """

    def __init__(
        self,
        host_blocks: int = 0,
        keeps_snapshots: bool = False,
        stored: Iterable[SnapshotRecord] = (),
        copy_blocks: int = 1,
        window_share: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.host = PinnedBlockPool(host_blocks, host_blocks, 0)
        self.keeps_snapshots = keeps_snapshots
        self.copy_blocks = copy_blocks
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.num_host_blocks = 0
        self._window_share = window_share
        self._clock = clock
        self._stored = {record.prompt_id: record for record in stored}
        self._images: dict[str, _Image] = {}
        self._saves: deque[PinnedPrompt] = deque()
        self._num_saved = 0
        self._loads: list[_Load] = []
        self._jobs: list[SnapshotJob] = []
        self._under_way: deque[SnapshotJob] = deque()
        self._next_look = 0.0
        self._dropped: list[HostImage] = []

    # What there is ---------------------------------------------------------------------------------------------

    def blocks_of(self, size: BlockCount) -> int:
        """Blocks of the host tier, as large as those of the full group, that hold a prompt of this size."""
        return size.full + self._extra(size)

    def _extra(self, size: BlockCount) -> int:
        return math.ceil(size.window * self._window_share)

    def can_load(self, prompt: PinnedPrompt) -> bool:
        """Whether the K/V of a prompt need not be computed, as far as is known."""
        image = self._images.get(prompt.id)
        return self._is_stored(prompt) if image is None else image.filled and image.owner is prompt

    def is_on_host(self, prompt: PinnedPrompt) -> bool:
        """Whether the host tier holds all of a prompt."""
        image = self._images.get(prompt.id)
        return image is not None and image.stays and image.filled and image.owner is prompt

    def has_room(self, num_blocks: int) -> bool:
        """Whether the host tier could take so many blocks more."""
        return self.host.find_window(num_blocks) is not None

    def wants_room(self, prompt: PinnedPrompt) -> bool:
        """Whether a prompt would be kept on the host if others left it."""
        if (
            prompt.pin == PinClass.HARD
            or self.blocks_of(prompt.size) > self.host.budget_blocks
            or prompt.id in self._images
        ):
            return False
        return not self.has_room(self.blocks_of(prompt.size))

    def idle_owners(self) -> list[PinnedPrompt]:
        """Prompts whose images in the host tier nothing needs just now."""
        busy = {job.record.prompt_id for job in self._under_way} | {load.prompt.id for load in self._loads}
        return [
            image.owner
            for key, image in self._images.items()
            if image.owner is not None and image.stays and image.filled and key not in busy
        ]

    def drop(self, prompt: PinnedPrompt) -> None:
        """What the host has of a prompt is not worth keeping."""
        image = self._images.get(prompt.id)
        if image is not None and image.owner is prompt:
            image.owner = None
            self._drop_unless_kept(image)

    def _is_stored(self, prompt: PinnedPrompt) -> bool:
        record = self._stored.get(prompt.id)
        if record is None or record.start != prompt.start:
            return False
        return (record.num_blocks, record.num_window_blocks) == (prompt.size.full, prompt.size.window)

    @property
    def has_work(self) -> bool:
        """Whether the next step has something to do for the tiers; saves in the background need no step."""
        return bool(self._saves or self._jobs or self._dropped)

    @property
    def must_end(self) -> bool:
        """Whether there is work that outlives the server."""
        return bool(self._jobs) or any(map(self._wants_snapshot, self._saves))

    # Loads -----------------------------------------------------------------------------------------------------

    def begin_load(self, prompt: PinnedPrompt) -> None:
        """A prompt that `can_load` has got its place, and is brought into it by the coming steps."""
        self._loads.append(_Load(prompt))
        if prompt.id not in self._images:
            self._begin_job("load", self._stored[prompt.id], self._make_image(prompt))

    def plan_loads(self, plan: StepPlan, is_idle: bool) -> EndedLoads:
        """Plans the next slices of all loads, the first one first.

        Args:
            is_idle: Nobody else runs.

        Returns those that have come to an end. The copies of what is done were planned by the plans before.
        """
        ended = EndedLoads([], [])
        left = self.copy_blocks * (_TIMES_WHEN_IDLE if is_idle else _TIMES_OF_A_LOAD)
        for load in list(self._loads):
            prompt = load.prompt
            image = self._images[prompt.id]
            if load.failed:
                self._loads.remove(load)
                self._drop_image(image)
                ended.failed.append(prompt)
            elif load.num_loaded == image.place.size:
                self._loads.remove(load)
                self._drop_unless_kept(image)
                ended.done.append(prompt)
            elif image.filled:
                count = min(left, image.place.size - load.num_loaded)
                if count > 0:
                    plan.transfers.append(_copy(image, prompt, load.num_loaded, count, to_host=False))
                load.num_loaded += count
                left -= count
        return ended

    # Saves -----------------------------------------------------------------------------------------------------

    def save(self, prompt: PinnedPrompt) -> bool:
        """Keeps what was computed for a prompt, if a tier has room for it. Returns whether its extents are going to be
        copied, and must stay until `plan_rest` returns the prompt or `cancel_save` ends it."""
        image = self._images.get(prompt.id)
        if image is not None:
            if self.is_on_host(prompt) and self._wants_snapshot(prompt):
                self._begin_job("save", record_of(prompt), image)
            return False
        may_leave = prompt.pin != PinClass.HARD and self.has_room(self.blocks_of(prompt.size))
        if not may_leave and not self._wants_snapshot(prompt):
            return False
        self._make_image(prompt)
        self._saves.append(prompt)
        return True

    def cancel_save(self, prompt: PinnedPrompt) -> None:
        """The extents of a prompt are needed for others: what has been copied of them is given up."""
        if prompt is self._saves[0]:
            self._num_saved = 0
        self._saves.remove(prompt)
        self._drop_image(self._images[prompt.id])

    def plan_rest(self, plan: StepPlan) -> list[PinnedPrompt]:
        """Adds slices of the saves, and all other orders for the tiers, to a plan whose other parts are settled.

        Returns the prompts whose extents need not stay any longer for a save.
        """
        # What this plan still copies is dropped by the next one.
        plan.dropped, self._dropped = self._dropped, []
        times = 1 + plan.num_tokens // _TOKENS_OF_A_COPY if plan.rows else _TIMES_OF_A_SAVE_WHEN_IDLE
        left = self.copy_blocks * times - sum(transfer.count for transfer in plan.transfers)
        saved: list[PinnedPrompt] = []
        while self._saves and left > 0:
            prompt = self._saves[0]
            image = self._images[prompt.id]
            count = min(left, image.place.size - self._num_saved)
            plan.transfers.append(_copy(image, prompt, self._num_saved, count, to_host=True))
            self._num_saved += count
            left -= count
            if self._num_saved == image.place.size:
                self._num_saved = 0
                saved.append(self._saves.popleft())
                self._end_save(prompt, image)
        plan.jobs, self._jobs = self._jobs, []
        self._plan_look(plan)
        return saved

    def _end_save(self, prompt: PinnedPrompt, image: _Image) -> None:
        image.filled = True
        if self._wants_snapshot(prompt) and not prompt.doomed:
            self._begin_job("save", record_of(prompt), image)
        else:
            self._drop_unless_kept(image)

    # Snapshots -------------------------------------------------------------------------------------------------

    def _wants_snapshot(self, prompt: PinnedPrompt) -> bool:
        """Whether a prompt is to outlive the server and does not yet. Soft pins are not: they hold what clients have
        marked for some minutes, which is nothing to leave on a disk. Nor is what was used only once."""
        if not self.keeps_snapshots or prompt.pin == PinClass.SOFT or prompt.on_probation or self._is_stored(prompt):
            return False
        return not any(job.op == "save" and job.record.prompt_id == prompt.id for job in self._under_way)

    def note_change(self, prompt: PinnedPrompt) -> None:
        """Tells a prompt's snapshot how it is pinned now."""
        record = self._stored.get(prompt.id)
        if record is None or not self._is_stored(prompt):
            return
        changed = msgspec.structs.replace(record, **_pinning(prompt))
        if changed != record:
            self._stored[prompt.id] = changed
            self._begin_job("update", changed)

    def delete_snapshot(self, prompt: PinnedPrompt) -> None:
        """Deletes what is on disk of a prompt, also what is just being written."""
        if self.keeps_snapshots:
            self._stored.pop(prompt.id, None)
            self._begin_job("delete", record_of(prompt))

    def forget(self, prompt: PinnedPrompt) -> None:
        """A prompt is gone from the pool. Its snapshot stays, unless an operator asked for it: what has been removed
        must not come back with the next start."""
        coming = any(job.op == "save" and job.record.prompt_id == prompt.id for job in self._under_way)
        if prompt.pin == PinClass.HARD and (coming or prompt.id in self._stored):
            self.delete_snapshot(prompt)
        self.drop(prompt)

    def _begin_job(self, op: SnapshotOp, record: SnapshotRecord, image: _Image | None = None) -> None:
        job = SnapshotJob(op, record, image.place if image is not None else None)
        self._jobs.append(job)
        self._under_way.append(job)

    def _plan_look(self, plan: StepPlan) -> None:
        """Asks how the work in the background goes: always while a prompt waits for it, else with whatever else is
        planned, or now and then."""
        if not self._under_way:
            return
        is_waiting, now = bool(self._loads), self._clock()
        if is_waiting or not plan.is_empty or now >= self._next_look:
            plan.job_patience_s = _PATIENCE_S if is_waiting and plan.is_empty else 0.0
            self._next_look = now + _LOOK_EVERY_S

    def end_jobs(self, ended: list[EndedJob]) -> None:
        """Takes in how work on snapshots has ended; jobs end in the order in which they began."""
        for end in ended:
            job = self._under_way.popleft()
            record, key = job.record, job.record.prompt_id
            self.outcomes[job.op, end.outcome] += 1
            is_ok = end.outcome == _OK
            image = self._images.get(key)
            if job.op == "load" and image is not None:
                image.filled = is_ok
                if not is_ok:
                    self._stored.pop(key, None)
                    for load in self._loads:
                        load.failed |= load.prompt.id == key
            elif job.op == "save" and image is not None:
                if is_ok:
                    self._stored[key] = record
                    if image.owner is not None:
                        self.note_change(image.owner)
                self._drop_unless_kept(image)
            elif job.op == "delete":
                self._stored.pop(key, None)

    # Images ----------------------------------------------------------------------------------------------------

    def _make_image(self, prompt: PinnedPrompt) -> _Image:
        """Memory for a prompt's K/V: in the host tier if it may leave the device and there is room, else its own."""
        size, count = prompt.size, self.blocks_of(prompt.size)
        start = self.host.find_window(count) if prompt.pin != PinClass.HARD else None
        if start is not None:
            self.host.pin(prompt.id, (Extent(start, count),))
            self.num_host_blocks += size.full
        place = HostImage(prompt.id, size.full, start, size.window, self._extra(size))
        image = self._images[prompt.id] = _Image(place, prompt)
        return image

    def _drop_unless_kept(self, image: _Image) -> None:
        """Ends an image that nothing needs: not its prompt, and no work under way."""
        if any(job.image is image.place for job in self._under_way):
            return
        if image.owner is None or not image.stays:
            self._drop_image(image)

    def _drop_image(self, image: _Image) -> None:
        place = image.place
        del self._images[place.prompt_id]
        if place.start is None:
            self._dropped.append(place)
        else:
            self.host.unpin(place.prompt_id)
            self.num_host_blocks -= place.num_blocks

    def check_integrity(self, prompts: dict[str, PinnedPrompt]) -> None:
        """Raises AssertionError when images, host blocks and prompts do not fit together."""
        self.host.check_integrity()
        assert {k: i.place.start for k, i in self._images.items() if i.stays} == {
            k: e.start for k, (e,) in self.host.extents.items()
        }
        assert self.num_host_blocks == sum(i.place.num_blocks for i in self._images.values() if i.stays)
        busy = {job.record.prompt_id for job in self._under_way}
        for key, image in self._images.items():
            loading = any(load.prompt is image.owner for load in self._loads)
            going = key in busy or image.owner in self._saves or loading
            if image.owner is None:
                assert key in busy, (key, "an image that nobody needs")
            else:
                assert prompts.get(key) is image.owner and (image.stays or going), (key, image.place)


def _copy(image: _Image, prompt: PinnedPrompt, first: int, count: int, *, to_host: bool) -> ExtentCopy:
    return ExtentCopy(image.place, prompt.extents, first, count, to_host, prompt.window_extents)


def record_of(prompt: PinnedPrompt) -> SnapshotRecord:
    """What a snapshot of a prompt says about it."""
    return SnapshotRecord(
        prompt_id=prompt.id,
        token_ids=prompt.token_ids.tolist(),
        start=prompt.start,
        num_blocks=prompt.size.full,
        num_window_blocks=prompt.size.window,
        scope=prompt.scope.hex(),
        **_pinning(prompt),
    )


def _pinning(prompt: PinnedPrompt) -> dict[str, Any]:
    """What of a prompt's record may change while it is pinned."""
    return {"pin": _PIN_NAMES[prompt.pin], "name": prompt.name, "source": prompt.source, "ttl": prompt.ttl}
