"""What passes between the executor and a rank in a process of its own: msgspec structs, encoded as MessagePack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from vllm.config import VllmConfig
from vllm.kv_cache.windows import KVMemory
from vllm.step import EndedJob, StepPlan
from vllm.system_prompt_store import SnapshotRecord
from vllm.wire import received, sendable


class InitializeCache(msgspec.Struct, tag="cache"):
    """As `Executor.initialize_cache`; answered by `CacheReady`."""

    num_blocks: int
    num_window_blocks: int


class RunStep(msgspec.Struct, tag="step"):
    """As `Executor.submit`; not answered: every rank draws the same tokens."""

    plan: StepPlan


class DrawMasked(msgspec.Struct, tag="masks"):
    """The masks of the latest step, for `RunningStep.draw`.

    Attributes:
        num_words: Words of 32 bits a mask has.
        masks: int32 [masked entries, num_words].
    """

    num_words: int
    masks: bytes

    @classmethod
    def of(cls, token_masks: np.ndarray) -> DrawMasked:
        return cls(token_masks.shape[1], np.ascontiguousarray(token_masks).tobytes())

    def array(self) -> np.ndarray:
        return np.frombuffer(self.masks, np.int32).reshape(-1, self.num_words).copy()


class EndJobs(msgspec.Struct, tag="jobs"):
    """Asks for the jobs that ended with the oldest step that was asked for them; answered by `JobsEnded`."""


RankInput = InitializeCache | RunStep | DrawMasked | EndJobs


class RankReady(msgspec.Struct, tag="ready"):
    """First message of a rank: it has its weights, and so much memory for KV."""

    memory: KVMemory


class CacheReady(msgspec.Struct, tag="cached"):
    """The cache is made; what the rank has found on disk."""

    snapshots: list[SnapshotRecord]


class JobsEnded(msgspec.Struct, tag="ended"):
    jobs: list[EndedJob]


class RankFailed(msgspec.Struct, tag="failed"):
    """The rank cannot run with these settings, and has ended."""

    error: str


RankOutput = RankReady | CacheReady | JobsEnded | RankFailed


class RankArgs(msgspec.Struct):
    """What the process of a rank is given, as one JSON line on its standard input.

    Attributes:
        config: As in `CoreProcessArgs`.
        rank, world_size: Its place among the tensor-parallel ranks.
        folder: Where the ranks find each other; who may enter it may speak to them.
        input_address, output_address: ZeroMQ endpoints, PULL and PUSH on the rank's side.
    """

    config: VllmConfig
    rank: int
    world_size: int
    folder: str
    input_address: str
    output_address: str

    def to_line(self) -> bytes:
        return msgspec.json.encode(msgspec.structs.replace(self, config=sendable(self.config))) + b"\n"

    @classmethod
    def read(cls, line: bytes, hf_config_of: Callable[[dict[str, Any]], Any]) -> RankArgs:
        args = msgspec.json.decode(line, type=cls)
        return msgspec.structs.replace(args, config=received(args.config, hf_config_of))
