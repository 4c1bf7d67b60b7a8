"""Where the K/V of pinned prompts are kept besides the device: in host memory, and in snapshots on disk.

    device  ⇄  image on the host  ⇄  snapshot

A prompt is saved once, when its prefill has run: its extent is copied to an image on the host, and from there written
to disk in the background. The image stays if the host tier has room for it; then the prompt may leave the device and
come back. Copies go in slices, so many blocks a step, loads ahead of saves.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from enum import Enum, auto
from typing import Any, Literal

import msgspec

from vllm.core.pinned_prompt import PinClass, PinnedPrompt
from vllm.step import EndedJob, ExtentCopy, HostImage, SnapshotJob, StepPlan
from vllm.system_prompt_store.manifest import SnapshotRecord
from vllm.worker.cache_engine import PinnedBlockPool

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


class LoadState(Enum):
    """How far a load has come."""

    GOING_ON = auto()
    DONE = auto()
    FAILED = auto()


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


class PromptTiers:
    """Plans copies and snapshots. It decides with integers; the ranks move the bytes.

    Args:
        host_blocks: Blocks of the host tier.
        keeps_snapshots: Whether there is a place for snapshots.
        stored: Snapshots that are there already.
        copy_blocks: Blocks copied in a step: what the tokens of others may be late by, or a request that comes to an
            idle engine. Memory that is used for the first time takes longer than a copy does.
        clock: Seconds; replaced in tests.
    """

    def __init__(
        self,
        host_blocks: int = 0,
        keeps_snapshots: bool = False,
        stored: Iterable[SnapshotRecord] = (),
        copy_blocks: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.host = PinnedBlockPool(host_blocks, host_blocks, 0)
        self.keeps_snapshots = keeps_snapshots
        self.copy_blocks = copy_blocks
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self._clock = clock
        self._stored = {record.prompt_id: record for record in stored}
        self._images: dict[str, _Image] = {}
        self._saves: deque[PinnedPrompt] = deque()
        self._num_saved = 0
        self._loading: PinnedPrompt | None = None
        self._num_loaded = 0
        self._load_failed = False
        self._jobs: list[SnapshotJob] = []
        self._under_way: deque[SnapshotJob] = deque()
        self._next_look = 0.0
        self._dropped: list[HostImage] = []

    # What there is ---------------------------------------------------------------------------------------------

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

    def _is_stored(self, prompt: PinnedPrompt) -> bool:
        record = self._stored.get(prompt.id)
        return record is not None and (record.start, record.num_blocks) == (prompt.start, prompt.num_blocks)

    @property
    def has_work(self) -> bool:
        """Whether the next step has something to do for the tiers; saves in the background need no step."""
        return bool(self._saves or self._jobs or self._dropped)

    # Loads -----------------------------------------------------------------------------------------------------

    def begin_load(self, prompt: PinnedPrompt) -> None:
        """A prompt that `can_load` has got its extent, and is brought into it by the coming steps."""
        self._loading, self._num_loaded, self._load_failed = prompt, 0, False
        if prompt.id not in self._images:
            self._begin_job("load", self._stored[prompt.id], self._make_image(prompt))

    def plan_load(self, plan: StepPlan) -> LoadState:
        """Plans the next slice of the load. DONE comes with the first plan whose batch may read the prompt."""
        prompt = self._loading
        if prompt is None or prompt.extent is None:
            raise RuntimeError("no system prompt is being loaded")
        image = self._images[prompt.id]
        if self._load_failed:
            self._loading = None
            self._drop_image(image)
            return LoadState.FAILED
        if self._num_loaded == prompt.num_blocks:
            self._loading = None
            self._drop_unless_kept(image)
            return LoadState.DONE
        if image.filled:
            count = min(self.copy_blocks, prompt.num_blocks - self._num_loaded)
            plan.transfers.append(ExtentCopy(image.place, prompt.extent.start, self._num_loaded, count, to_host=False))
            self._num_loaded += count
        return LoadState.GOING_ON

    # Saves -----------------------------------------------------------------------------------------------------

    def save(self, prompt: PinnedPrompt) -> bool:
        """Keeps what was computed for a prompt, if a tier has room for it. Returns whether its extent is going to be
        copied, and must stay until `plan_rest` returns the prompt."""
        image = self._images.get(prompt.id)
        if image is not None:
            if self.is_on_host(prompt) and self._wants_snapshot(prompt):
                self._begin_job("save", record_of(prompt), image)
            return False
        may_leave = prompt.pin != PinClass.HARD and self.has_room(prompt.num_blocks)
        if not may_leave and not self._wants_snapshot(prompt):
            return False
        self._make_image(prompt)
        self._saves.append(prompt)
        return True

    def plan_rest(self, plan: StepPlan) -> list[PinnedPrompt]:
        """Adds slices of the saves, and all other orders for the tiers, to a plan whose other parts are settled.

        Returns the prompts whose extents need not stay any longer for a save.
        """
        # What this plan still copies is dropped by the next one.
        plan.dropped, self._dropped = self._dropped, []
        left = self.copy_blocks - sum(transfer.count for transfer in plan.transfers)
        saved: list[PinnedPrompt] = []
        while self._saves and left > 0:
            prompt = self._saves[0]
            if prompt.extent is None:
                raise RuntimeError(f"system prompt {prompt.id} is being saved without an extent")
            image = self._images[prompt.id]
            count = min(left, prompt.num_blocks - self._num_saved)
            plan.transfers.append(ExtentCopy(image.place, prompt.extent.start, self._num_saved, count, to_host=True))
            self._num_saved += count
            left -= count
            if self._num_saved == prompt.num_blocks:
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
        marked for some minutes, which is nothing to leave on a disk."""
        if not self.keeps_snapshots or prompt.pin == PinClass.SOFT or self._is_stored(prompt):
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
        image = self._images.get(prompt.id)
        if image is not None and image.owner is prompt:
            image.owner = None
            self._drop_unless_kept(image)

    def _begin_job(
        self, op: Literal["load", "save", "update", "delete"], record: SnapshotRecord, image: _Image | None = None
    ) -> None:
        job = SnapshotJob(op, record, image.place if image is not None else None)
        self._jobs.append(job)
        self._under_way.append(job)

    def _plan_look(self, plan: StepPlan) -> None:
        """Asks how the work in the background goes: always while a prompt waits for it, else with whatever else is
        planned, or now and then."""
        if not self._under_way:
            return
        is_waiting, now = self._loading is not None, self._clock()
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
                    self._load_failed = True
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
        start = self.host.find_window(prompt.num_blocks) if prompt.pin != PinClass.HARD else None
        if start is not None:
            self.host.pin(prompt.id, start, prompt.num_blocks)
        image = self._images[prompt.id] = _Image(HostImage(prompt.id, prompt.num_blocks, start), prompt)
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

    def check_integrity(self, prompts: dict[str, PinnedPrompt]) -> None:
        """Raises AssertionError when images, host blocks and prompts do not fit together."""
        self.host.check_integrity()
        assert {k: i.place.start for k, i in self._images.items() if i.stays} == {
            k: e.start for k, e in self.host.extents.items()
        }
        busy = {job.record.prompt_id for job in self._under_way}
        for key, image in self._images.items():
            going = key in busy or image.owner in self._saves or image.owner is self._loading
            if image.owner is None:
                assert key in busy, (key, "an image that nobody needs")
            else:
                assert prompts.get(key) is image.owner and (image.stays or going), (key, image.place)


def record_of(prompt: PinnedPrompt) -> SnapshotRecord:
    """What a snapshot of a prompt says about it."""
    return SnapshotRecord(
        prompt_id=prompt.id,
        token_ids=prompt.token_ids.tolist(),
        start=prompt.start,
        num_blocks=prompt.num_blocks,
        scope=prompt.scope.hex(),
        **_pinning(prompt),
    )


def _pinning(prompt: PinnedPrompt) -> dict[str, Any]:
    """What of a prompt's record may change while it is pinned."""
    return {"pin": _PIN_NAMES[prompt.pin], "name": prompt.name, "source": prompt.source, "ttl": prompt.ttl}
