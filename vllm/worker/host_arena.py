"""Host memory for copies of extents, taken as it is used.

The range of addresses is there from the start, its pages come with their first use. Copies from and to a GPU only run
beside its work, and at the speed of its link, where the memory is page-locked. So threads fill slab after slab with
zeros and lock it, ahead of what is used.

On the host of an H100, for 1 GiB: 180 ms where locking also brings the pages; 186 ms for a thread to fill it, in huge
pages, and 36 ms to lock what is there. While a slab is being locked, launches of kernels wait for the driver. So slabs
are small, and are locked one by one with pauses: 6 GB/s, and no launch waits for more than a millisecond.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from vllm.exceptions import StartupError
from vllm.logger import init_logger
from vllm.platforms.devices import is_gpu

logger = init_logger(__name__)

_SLAB = 16 << 20
# Slabs locked ahead: four prompts of 8,192 tokens of Llama-3.1-8B; but no more than an eighth of the arena.
_AHEAD = 256
_THREADS = 3
_PAUSE_S = 0.002


class HostArena:
    """One array of bytes on the host.

    Args:
        num_bytes: Its size.
        device: Whose copies it serves; memory is page-locked for a GPU only.

    Attributes:
        tensor: The bytes; uint8 [num_bytes].

    Raises:
        StartupError: the system does not give so many addresses.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        self._slabs: dict[int, Future[bool]] = {}
        # Those of them that nobody needs yet.
        self._spare: set[int] = set()
        self._threads: ThreadPoolExecutor | None = None
        self._locking = threading.Lock()
        if not num_bytes:
            self.tensor = torch.empty(0, dtype=torch.uint8)
            return
        try:
            memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise StartupError(
                f"--system-prompt-host-cache-gib: {num_bytes / 2**30:.1f} GiB of host memory cannot be had: {error}"
            ) from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.tensor = torch.frombuffer(memory, dtype=torch.uint8)
        if is_gpu(device):
            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="host-memory")

    def lock_first(self) -> None:
        """Locks the slabs that are used first, in threads."""
        if self._threads is not None:
            self._lock_ahead(self._threads, -(-len(self.tensor) // _SLAB) - 1)

    def parts_of(self, first: int, width: int, pitch: int, height: int) -> Iterator[tuple[int, int, slice]]:
        """Makes a rectangle of the arena ready to be copied from or to, perhaps waiting for that.

        Args:
            first: Byte at which its first row begins.
            width, height: Bytes of a row, and rows.
            pitch: Bytes from one row to the next.

        Returns the parts of it that lie in one slab each, as first row, rows, and columns: a copy must not cross from
        one slab to the next, since they are locked one by one.
        """
        row = 0
        while row < height:
            start = first + row * pitch
            end = (start // _SLAB + 1) * _SLAB
            rows = min(height - row, (end - start - width) // pitch + 1) if width <= end - start else 0
            if rows:
                self._prepare(start // _SLAB)
                yield row, rows, slice(0, width)
                row += rows
                continue
            column = 0
            while column < width:
                slab = (start + column) // _SLAB
                self._prepare(slab)
                stop = min(width, (slab + 1) * _SLAB - start)
                yield row, 1, slice(column, stop)
                column = stop
            row += 1

    def prepare(self, first: int, num_bytes: int) -> Callable[[], None]:
        """Has a part of the arena made ready, from its first byte on and before all that nobody needs yet; returns what
        waits until it is.

        Making memory ready fills it with zeros, so what the host writes before would be lost.
        """
        ready: list[Future[bool]] = []
        if self._threads is not None:
            slabs = range(first // _SLAB, -(-(first + num_bytes) // _SLAB))
            if any(slab not in self._slabs or slab in self._spare for slab in slabs):
                for slab in list(self._spare):
                    if self._slabs[slab].cancel():
                        del self._slabs[slab]
                self._spare.clear()
            ready = [self._lock_soon(self._threads, slab) for slab in slabs]
            self._lock_ahead(self._threads, slabs.start)

        def wait() -> None:
            for slab in ready:
                slab.result()

        return wait

    def _prepare(self, slab: int) -> None:
        if self._threads is not None:
            ready = self._lock_soon(self._threads, slab)
            self._lock_ahead(self._threads, slab)
            ready.result()

    def _lock_soon(self, threads: ThreadPoolExecutor, slab: int) -> Future[bool]:
        """Has a slab locked that is needed."""
        self._spare.discard(slab)
        if slab not in self._slabs:
            self._slabs[slab] = threads.submit(self._lock, slab)
        return self._slabs[slab]

    def _lock_ahead(self, threads: ThreadPoolExecutor, slab: int) -> None:
        """Has those slabs locked that are used after one: the tier is filled from its end on."""
        count = max(1, min(_AHEAD, len(self.tensor) // _SLAB // 8))
        last = max(0, slab - count + 1)
        # Each part of each copy asks, mostly for what has been begun.
        if slab not in self._slabs or last not in self._slabs:
            for ahead in range(slab, last - 1, -1):
                if ahead not in self._slabs:
                    self._slabs[ahead] = threads.submit(self._lock, ahead)
                    self._spare.add(ahead)

    def _lock(self, slab: int) -> bool:
        """Page-locks a slab; without that, its copies are slower and hold up the steps, but right."""
        first, end = slab * _SLAB, min((slab + 1) * _SLAB, len(self.tensor))
        np.copyto(self.tensor[first:end].numpy(), 0)
        with self._locking, torch.cuda.device(self._device):
            error = int(torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr() + first, end - first, 0))
            time.sleep(_PAUSE_S)
        if error:
            logger.warning(
                "%d MiB of host memory for system prompts cannot be page-locked (CUDA error %d); copies from and to it "
                "are slow. A limit on locked memory (ulimit -l) may be the reason.",
                (end - first) >> 20,
                error,
            )
        return not error

    def close(self) -> None:
        """Gives page-locked memory back; no copy may be under way."""
        if self._threads is None:
            return
        self._threads.shutdown(wait=True, cancel_futures=True)
        for slab, locked in self._slabs.items():
            if not locked.cancelled() and locked.result():
                torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr() + slab * _SLAB)
        self._slabs = {}
