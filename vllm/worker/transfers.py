"""Copies of pinned extents on the host, and the snapshots that are read and written beside the steps.

    device  ⇄  image on the host  ⇄  disk
       slices, in steps      a thread

An image is K of every layer, then V, uint8 [num_blocks, block_bytes] each, one after the other; those of the window
group, which have blocks of their own, behind those of the full group. It lies in the host tier, or in memory of its own
until the plan drops it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from vllm.logger import init_logger
from vllm.ops.driver_copy import copy_rectangle, max_pitch
from vllm.platforms.devices import on_gpu
from vllm.step import EndedJob, ExtentCopy, HostImage, SnapshotJob, StepPlan
from vllm.system_prompt_store import SnapshotOutcome, SnapshotStore
from vllm.worker.cache_engine import CacheEngine
from vllm.worker.host_arena import HostArena

logger = init_logger(__name__)

# What a background thread gives way by: the steps' own threads are to get the processors they ask for.
_NICENESS = 10


class ExtentTransfers:
    """Carries out what plans say about tiers, on one rank.

    Args:
        cache: The KV memory that extents lie in.
        host_blocks: Blocks of the host tier; its memory is taken as it is used.
        store: Snapshots of this rank; None where none are kept.

    Raises:
        StartupError: there cannot be a host tier of this size.
    """

    def __init__(self, cache: CacheEngine, host_blocks: int, store: SnapshotStore | None) -> None:
        groups = [cache.full, *([cache.window] if cache.window is not None else [])]
        caches = cache.full.tensors
        self._caches = [t.view(group.num_blocks, -1).view(torch.uint8) for group in groups for t in group.tensors]
        self._block_bytes = [tensor.shape[1] for tensor in self._caches]
        self._num_full = len(caches)
        # A block of the tier is as large as one of the full group.
        self._all_block_bytes = sum(self._block_bytes[: self._num_full])
        # Whether a tensor lies right behind the one before it, which is of its size.
        self._follows = [False] + [
            a.shape == b.shape and b.data_ptr() == a.data_ptr() + a.nbytes for a, b in pairwise(self._caches)
        ]
        if cache.window is not None:
            self._follows[self._num_full] = False
        self._on_gpu = on_gpu(caches[0])
        self._max_pitch = max_pitch(caches[0].device.index) if self._on_gpu else 0
        self._arena = HostArena(host_blocks * self._all_block_bytes, caches[0].device)
        self._own: dict[str, torch.Tensor] = {}
        self._store = store
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        self._to_follow = False
        if self._on_gpu:
            self._stream, self._copied = torch.cuda.Stream(), torch.cuda.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshots", initializer=_give_way)
        self._running: deque[tuple[SnapshotJob, Future[str]]] = deque()

    def start(self) -> None:
        """Has the first host memory made ready. To be called when all steps are captured: what locks memory in another
        thread ends a capture with an error."""
        self._arena.lock_first()

    def join(self) -> None:
        """What is put on the device from now on runs after the copies of the plans so far: it may read what they have
        written, and write what they have read."""
        if self._copied is not None and self._to_follow:
            self._copied.wait()
            self._to_follow = False

    def mark(self) -> torch.cuda.Event | None:
        """The place in the device's work behind which a plan's copies may begin: its blocks are where they belong."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def begin(self, plan: StepPlan, behind: torch.cuda.Event | None = None) -> None:
        """Starts what a plan says, beside its batch; `join` has been called before it.

        Args:
            behind: From `mark`; None for this place. The batch itself should be on its way already: copies are many,
                and the driver takes no more than about a thousand orders of a stream that waits for others.
        """
        for image in plan.dropped:
            self._own.pop(image.prompt_id, None)
        if plan.transfers:
            self._copy(plan.transfers, behind or self.mark())
        for job in plan.jobs:
            self._running.append((job, self._thread.submit(self._work(job))))

    def _copy(self, transfers: list[ExtentCopy], behind: torch.cuda.Event | None) -> None:
        if self._stream is None or self._copied is None or behind is None:
            self._copy_blocks(transfers)
            return
        # At the same time as the step's computation, which touches neither these blocks nor these images.
        self._stream.wait_event(behind)
        with torch.cuda.stream(self._stream):
            self._copy_blocks(transfers)
            self._copied.record()
        self._to_follow = True

    def _copy_blocks(self, transfers: Iterable[ExtentCopy]) -> None:
        for transfer in transfers:
            image = self._image(transfer.image)
            if transfer.to_host and transfer.first == 0 and transfer.image.start is not None:
                # Copies of this image come step by step: its memory is made ready ahead of them, in their order.
                size = transfer.image.size * self._all_block_bytes
                self._arena.prepare(transfer.image.start * self._all_block_bytes, size)
            for area in _areas_of(transfer, self._block_bytes, self._follows, self._num_full):
                if self._on_gpu and transfer.image.start is not None:
                    self._copy_area(image, area, transfer.to_host)
                else:
                    self._copy_rows(image, area, transfer.to_host)

    def _copy_rows(self, image: list[torch.Tensor], area: Area, to_host: bool) -> None:
        """An area between the device and memory that is not page-locked, or that is not a GPU's at all."""
        here = slice(area.here, area.here + area.num_blocks)
        for i in range(area.first, area.first + area.num_tensors):
            on_host, on_device = image[i][area.there : area.there + area.num_blocks], self._caches[i][here]
            source, target = (on_device, on_host) if to_host else (on_host, on_device)
            if self._on_gpu:
                target.copy_(source, non_blocking=True)
            else:
                # A slice is small: waking torch's threads for it costs more than copying it.
                np.copyto(target.numpy(), source.numpy())

    def _copy_area(self, image: list[torch.Tensor], area: Area, to_host: bool) -> None:
        """An area between a GPU and the host tier, by as few orders to the driver as may be."""
        on_host, on_device = image[area.first], self._caches[area.first]
        block, pitch = self._block_bytes[area.first], on_host.nbytes
        first = int(on_host.storage_offset()) + area.there * block
        host = self._arena.tensor.data_ptr() + first
        for row, rows, columns in self._arena.parts_of(first, area.num_blocks * block, pitch, area.num_tensors):
            # Tensors further apart than the driver can go by go one by one.
            step = rows if on_device.nbytes <= self._max_pitch else 1
            for i in range(row, row + rows, step):
                copy_rectangle(
                    host + i * pitch + columns.start,
                    pitch,
                    self._caches[area.first + i].data_ptr() + area.here * block + columns.start,
                    on_device.nbytes if step > 1 else pitch,
                    columns.stop - columns.start,
                    step,
                    to_host=to_host,
                )

    def _image(self, image: HostImage) -> list[torch.Tensor]:
        """Its tensors; uint8 [num_blocks, block_bytes] each."""
        size = image.size * self._all_block_bytes
        if image.start is not None:
            first = image.start * self._all_block_bytes
            flat = self._arena.tensor[first : first + size]
        else:
            if image.prompt_id not in self._own:
                self._own[image.prompt_id] = torch.empty(size, dtype=torch.uint8)
            flat = self._own[image.prompt_id]
        tensors, at = [], 0
        for i, size in enumerate(self._block_bytes):
            blocks = image.num_blocks if i < self._num_full else image.num_window_blocks
            tensors.append(flat[at : at + blocks * size].view(blocks, -1))
            at += blocks * size
        return tensors

    # Snapshots -------------------------------------------------------------------------------------------------

    def _work(self, job: SnapshotJob) -> Callable[[], str]:
        """What a job does, in the background; its memory is settled now, so that a later plan may drop the image."""
        store, record = self._store, job.record
        if store is None:
            raise RuntimeError("a plan has work on snapshots, but none are kept")
        if job.image is None:
            return (lambda: store.update(record)) if job.op == "update" else (lambda: store.delete(record.prompt_id))
        tensors = self._image(job.image)
        arrays = [tensor.numpy() for tensor in tensors]
        ready = None
        if job.image.start is not None:
            size = job.image.size * self._all_block_bytes
            ready = self._arena.prepare(int(tensors[0].storage_offset()), size)

        def work() -> str:
            if ready is not None:
                ready()
            # Copies that fill what is written, or that still read what was in this memory before.
            if self._copied is not None:
                self._copied.synchronize()
            return store.read(record, arrays) if job.op == "load" else store.write(record, arrays)

        return work

    def ended_jobs(self, patience_s: float = 0.0) -> list[EndedJob]:
        """Jobs that have ended, in their order; waits up to `patience_s` for the first one."""
        if self._running and patience_s:
            wait([self._running[0][1]], patience_s)
        ended = []
        while self._running and self._running[0][1].done():
            job, future = self._running.popleft()
            error = future.exception()
            if error is not None:
                logger.error("The %s of snapshot %s broke off.", job.op, job.record.prompt_id, exc_info=error)
            outcome = SnapshotOutcome.ERROR if error is not None else future.result()
            ended.append(EndedJob(job.op, job.record.prompt_id, str(outcome)))
        return ended

    def close(self) -> None:
        """Waits until every copy and every job has ended."""
        if self._stream is not None:
            self._stream.synchronize()
        self._thread.shutdown(wait=True)
        self._arena.close()


class Area(NamedTuple):
    """Neighbouring blocks of neighbouring K/V tensors of one size.

    Attributes:
        first, num_tensors: The tensors.
        there: First block in the image.
        here: First block on the device.
        num_blocks: Blocks of each tensor.
    """

    first: int
    num_tensors: int
    there: int
    here: int
    num_blocks: int


def _areas_of(transfer: ExtentCopy, block_bytes: list[int], follows: list[bool], num_full: int) -> Iterator[Area]:
    """What a copy is of.

    Copies carry whole tensors one after the other, as many bytes as their blocks take in all of them. So each lies in
    one piece in the image: where memory is used for the first time, that costs by the piece that the system hands out,
    and some blocks of every layer at a time would touch all of these in the first copy. A block that a boundary falls
    into belongs to the copy that it begins in.

    Args:
        block_bytes: Bytes of a block in each tensor.
        follows: Whether a tensor lies right behind the one before it, which is of its size and group.
        num_full: Tensors of the full group, which come first.
    """
    bytes_of_all = sum(block_bytes[:num_full])
    begin, end = transfer.first * bytes_of_all, (transfer.first + transfer.count) * bytes_of_all
    # (first tensor, tensors, first block of each, end) of what may go together.
    runs: list[tuple[int, int, int, int]] = []
    offset = 0
    for i, size in enumerate(block_bytes):
        num_blocks = transfer.image.num_blocks if i < num_full else transfer.image.num_window_blocks
        block, stop = (min(num_blocks, max(0, -((offset - at) // size))) for at in (begin, end))
        offset += num_blocks * size
        if runs and follows[i] and runs[-1][0] + runs[-1][1] == i and runs[-1][2:] == (block, stop):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, block, stop)
        elif block < stop:
            runs.append((i, 1, block, stop))
    for i, tensors, block, stop in runs:
        before = 0
        for start, count in transfer.extents if i < num_full else transfer.window_extents:
            first, last = max(block, before), min(stop, before + count)
            if first < last:
                yield Area(i, tensors, first, start + first - before, last - first)
            before += count


def _give_way() -> None:
    """Lowers this thread's share of the processors, where the system has shares for threads."""
    with contextlib.suppress(OSError, AttributeError):
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, min(19, os.getpriority(os.PRIO_PROCESS, own) + _NICENESS))
