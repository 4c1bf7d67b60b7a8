"""One rank, inside the engine's own process."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.executor.base import Executor
from vllm.kv_cache.windows import KVMemory
from vllm.step import StepPlan
from vllm.system_prompt_store import SnapshotRecord
from vllm.worker.running_step import RunningStep
from vllm.worker.worker import Worker


class UniprocExecutor(Executor):
    def __init__(self, config: VllmConfig) -> None:
        self._worker = Worker(config)

    def kv_memory(self) -> KVMemory:
        return self._worker.kv_memory()

    def initialize_cache(self, num_blocks: int, num_window_blocks: int = 0) -> None:
        self._worker.initialize_cache(num_blocks, num_window_blocks)

    def snapshots(self) -> list[SnapshotRecord]:
        return self._worker.snapshots()

    @property
    def pipeline_depth(self) -> int:
        return self._worker.platform.pipeline_depth

    def submit(self, plan: StepPlan) -> RunningStep:
        return self._worker.submit(plan)

    def shutdown(self) -> None:
        self._worker.shutdown()
