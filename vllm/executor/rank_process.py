"""The process of a rank other than the first one: does the plans that the executor sends, in their order.

Started by `MultiprocExecutor` as `python -m vllm.executor.rank_process`, with its arguments as one JSON line on
standard input. Standard input stays open while the parent lives; its end means that nobody has plans any more.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections import deque
from pathlib import Path

import msgspec
import zmq

from vllm.child_process import end_with_parent
from vllm.distributed.parallel_state import join_ranks
from vllm.exceptions import StartupError
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
)
from vllm.logger import init_logger
from vllm.step import EndedJob, StepPlan
from vllm.transformers_utils.config import hf_config_of
from vllm.wire import from_wire
from vllm.worker.running_step import RunningStep
from vllm.worker.worker import Worker

logger = init_logger(__name__)


class RankProcess:
    """The loop: take in a message, do what it says."""

    def __init__(self, worker: Worker, inputs: zmq.Socket, outputs: zmq.Socket) -> None:
        self._worker = worker
        self._inputs, self._outputs = inputs, outputs
        self._decoder = msgspec.msgpack.Decoder(RankInput, dec_hook=from_wire)
        self._encoder = msgspec.msgpack.Encoder()
        self._in_flight: deque[tuple[StepPlan, RunningStep]] = deque()
        # Of each step that was asked for them and has been waited for.
        self._ended: deque[list[EndedJob]] = deque()

    def run(self) -> None:
        while True:
            message = self._decoder.decode(self._inputs.recv())
            if isinstance(message, InitializeCache):
                self._worker.initialize_cache(message.num_blocks, message.num_window_blocks)
                self._send(CacheReady(self._worker.snapshots()))
            elif isinstance(message, DrawMasked):
                self._in_flight[-1][1].draw(message.array())
            elif isinstance(message, EndJobs):
                while not self._ended:
                    self._wait_for_oldest()
                self._send(JobsEnded(self._ended.popleft()))
            else:
                # As many as the executor has in flight: buffers are reused after so many steps.
                while len(self._in_flight) >= self._worker.platform.pipeline_depth:
                    self._wait_for_oldest()
                self._in_flight.append((message.plan, self._worker.submit(message.plan)))

    def _wait_for_oldest(self) -> None:
        plan, step = self._in_flight.popleft()
        result = step.wait()
        if plan.job_patience_s is not None:
            self._ended.append(result.ended_jobs)

    def _send(self, message: RankOutput) -> None:
        self._outputs.send(self._encoder.encode(message))


def main() -> None:
    args = RankArgs.read(sys.stdin.buffer.readline(), hf_config_of)
    end_with_parent()
    # The parent decides when to stop; Ctrl-C reaches the whole group.
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, signal.SIG_IGN)
    # The first rank tells what they all do.
    root = logging.getLogger("vllm")
    root.setLevel(max(root.level, logging.WARNING))
    context = zmq.Context()
    outputs, inputs = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    outputs.connect(args.output_address)
    outputs.setsockopt(zmq.LINGER, 5000)
    inputs.connect(args.input_address)
    try:
        group = join_ranks(args.config.device, args.rank, args.world_size, Path(args.folder))
        worker = Worker(args.config, group)
        process = RankProcess(worker, inputs, outputs)
        outputs.send(msgspec.msgpack.encode(RankReady(worker.kv_memory())))
        process.run()
    except StartupError as error:
        outputs.send(msgspec.msgpack.encode(RankFailed(str(error))))
        outputs.close()
        context.term()
        os._exit(1)
    except Exception:
        logger.exception("Rank %d ends after an unexpected error.", args.rank)
        os._exit(1)


if __name__ == "__main__":
    main()
