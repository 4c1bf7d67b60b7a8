"""Tensor-parallel ranks on one host: the first in the engine's own process, the others in one process each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, TypeVar

import msgspec
import numpy as np
import zmq

from vllm import envs
from vllm.child_process import child_environment
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import join_ranks, leave_ranks
from vllm.exceptions import StartupError
from vllm.executor.base import Executor
from vllm.executor.rank_messages import (
    CacheReady,
    DrawMasked,
    EndJobs,
    InitializeCache,
    JobsEnded,
    RankArgs,
    RankFailed,
    RankInput,
    RankOutput,
    RankReady,
    RunStep,
)
from vllm.kv_cache.windows import KVMemory
from vllm.logger import init_logger
from vllm.step import EndedJob, StepPlan, StepResult
from vllm.system_prompt_store import SnapshotRecord
from vllm.system_prompt_store.store import SnapshotOutcome
from vllm.wire import to_wire
from vllm.worker.running_step import RunningStep
from vllm.worker.worker import Worker

logger = init_logger(__name__)

_POLL_S = 0.2
# After a rank has died, the first one mostly ends by itself: a collective with a peer that is gone is an error.
_GRACE_S = 10.0
_Answer = TypeVar("_Answer", RankReady, CacheReady, JobsEnded)


class Rank:
    """A rank in a process of its own, as seen from the executor.

    Attributes:
        command: Starts the process, which takes its arguments from standard input.
    """

    command: ClassVar[Sequence[str]] = (sys.executable, "-m", "vllm.executor.rank_process")

    def __init__(self, args: RankArgs, context: zmq.Context) -> None:
        self.number = args.rank
        self._inputs, self._outputs = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        for socket, address in ((self._inputs, args.input_address), (self._outputs, args.output_address)):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.bind(address)
        self._decoder = msgspec.msgpack.Decoder(RankOutput)
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            env=child_environment(),
        )
        if self.process.stdin is None:
            raise RuntimeError("the process of a rank has no standard input")
        self.process.stdin.write(args.to_line())
        self.process.stdin.flush()

    def send(self, message: bytes) -> None:
        self._inputs.send(message)

    def receive(self, kind: type[_Answer]) -> _Answer:
        """The next answer, which is of this kind.

        Raises:
            StartupError: the rank cannot run.
            RuntimeError: it has died.
        """
        while not self._outputs.poll(100):
            if self.process.poll() is not None and not self._outputs.poll(100):
                raise StartupError(
                    f"The process of rank {self.number} ended with code {self.process.returncode}; the lines above say "
                    "why, or the machine has too little memory for another rank."
                )
        answer = self._decoder.decode(self._outputs.recv())
        if isinstance(answer, RankFailed):
            raise StartupError(answer.error)
        if not isinstance(answer, kind):
            raise RuntimeError(f"rank {self.number} answered {type(answer).__name__} instead of {kind.__name__}")
        return answer

    def stop(self) -> None:
        """Ends the process, which waits for nothing but its running step."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._inputs.close()
        self._outputs.close()


class MultiprocExecutor(Executor):
    """See the module.

    A plan is sent to the other ranks before the first one begins with it. All of them draw the same tokens from the
    same scores, so that only the first one's are looked at.

    Raises:
        StartupError: one of the ranks cannot run.
    """

    def __init__(self, config: VllmConfig) -> None:
        self._encoder = msgspec.msgpack.Encoder(enc_hook=to_wire)
        self._context = zmq.Context()
        self._folder = Path(tempfile.mkdtemp(prefix="vllm-ranks-"))
        self._is_closed = False
        self._death: str | None = None
        self._busy: deque[float] = deque()
        self._ended: list[deque[EndedJob]] = []
        self._snapshots: list[SnapshotRecord] = []
        self._ranks: list[Rank] = []
        world_size = config.parallel.tensor_parallel_size
        try:
            for rank in range(1, world_size):
                ends = [f"ipc://{self._folder / f'{direction}{rank}'}" for direction in ("in", "out")]
                args = RankArgs(config, rank, world_size, str(self._folder), *ends)
                self._ranks.append(Rank(args, self._context))
            threading.Thread(target=self._watch, name="rank-watch", daemon=True).start()
            self._worker = Worker(config, join_ranks(config.device, 0, world_size, self._folder))
            own = self._worker.kv_memory()
            others = [rank.receive(RankReady).memory for rank in self._ranks]
        except BaseException:
            self._close()
            raise
        self._memory = replace(own, available=min(memory.available for memory in (own, *others)))
        self._ended = [deque() for _ in range(world_size)]

    def kv_memory(self) -> KVMemory:
        return self._memory

    def initialize_cache(self, num_blocks: int, num_window_blocks: int = 0) -> None:
        self._broadcast(InitializeCache(num_blocks, num_window_blocks))
        self._worker.initialize_cache(num_blocks, num_window_blocks)
        found = [rank.receive(CacheReady).snapshots for rank in self._ranks]
        self._snapshots = common_snapshots(self._worker.snapshots(), found)

    def snapshots(self) -> list[SnapshotRecord]:
        return self._snapshots

    @property
    def pipeline_depth(self) -> int:
        return self._worker.platform.pipeline_depth

    def submit(self, plan: StepPlan) -> RunningStep:
        if self._death is not None:
            raise RuntimeError(self._death)
        self._busy.append(time.monotonic())
        self._broadcast(RunStep(plan))
        own = self._worker.submit(plan)

        def draw(token_masks: np.ndarray | None) -> Callable[[], StepResult]:
            if token_masks is not None:
                self._broadcast(DrawMasked.of(token_masks))
                own.draw(token_masks)
            return own.wait

        def finish(result: StepResult) -> StepResult:
            self._busy.popleft()
            if plan.job_patience_s is not None:
                self._broadcast(EndJobs())
                told = [result.ended_jobs, *(rank.receive(JobsEnded).jobs for rank in self._ranks)]
                for ended, jobs in zip(self._ended, told, strict=True):
                    ended.extend(jobs)
                result.ended_jobs = take_agreed(self._ended)
            return result

        return RunningStep(draw, own.awaits_masks, finish)

    def shutdown(self) -> None:
        self._worker.shutdown()
        self._close()

    def _broadcast(self, message: RankInput) -> None:
        encoded = self._encoder.encode(message)
        for rank in self._ranks:
            rank.send(encoded)

    def _close(self) -> None:
        self._is_closed = True
        for rank in self._ranks:
            rank.stop()
        leave_ranks()
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _watch(self) -> None:
        """Ends this process where a rank has died or a step does not end, and nothing else has noticed: collectives of
        a captured step wait for a peer for ever."""
        limit = envs.execute_model_timeout_s()
        while not self._is_closed:
            time.sleep(_POLL_S)
            dead = [rank for rank in self._ranks if rank.process.poll() is not None]
            if dead and not self._is_closed:
                self._death = f"The process of rank {dead[0].number} has ended with code {dead[0].process.returncode}."
                logger.error("%s", self._death)
                self._end_unless_closed(_GRACE_S)
                return
            oldest = next(iter(tuple(self._busy)), None)
            if oldest is not None and time.monotonic() - oldest > limit:
                logger.error("A step of %d ranks has not ended for %d s.", len(self._ranks) + 1, limit)
                self._end_unless_closed(0.0)
                return

    def _end_unless_closed(self, grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        while not self._is_closed and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if not self._is_closed:
            logger.error("This process waits for a rank that is gone, and ends.")
            os._exit(1)


def common_snapshots(own: list[SnapshotRecord], others: list[list[SnapshotRecord]]) -> list[SnapshotRecord]:
    """Those that every rank has found, in the order of the first one."""
    everywhere = [{record.prompt_id for record in found} for found in others]
    return [record for record in own if all(record.prompt_id in found for found in everywhere)]


def take_agreed(ended: list[deque[EndedJob]]) -> list[EndedJob]:
    """Takes the jobs that have ended on every rank; each rank ends them in the same order. A job that one of them could
    not do has not been done."""
    agreed = []
    while all(ended):
        jobs = [jobs.popleft() for jobs in ended]
        failed = next((job for job in jobs if job.outcome != SnapshotOutcome.OK), jobs[0])
        agreed.append(failed)
    return agreed
