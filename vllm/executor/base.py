"""The contract of an executor: it hides how many ranks there are and where they run."""

from __future__ import annotations

from abc import ABC, abstractmethod

from vllm.kv_cache.windows import KVMemory
from vllm.step import StepPlan
from vllm.system_prompt_store import SnapshotRecord
from vllm.worker.running_step import RunningStep


class Executor(ABC):
    """Starts the ranks at construction (weights are loaded then) and runs plans on all of them.

    Every rank holds the same block numbering, so a plan means the same on each.
    """

    @abstractmethod
    def kv_memory(self) -> KVMemory:
        """What there is for KV, on the rank with the least room."""

    @abstractmethod
    def initialize_cache(self, num_blocks: int, num_window_blocks: int = 0) -> None:
        """Makes the KV cache on every rank.

        Args:
            num_window_blocks: Blocks of the window group; only where `kv_memory` speaks of one.
        """

    @abstractmethod
    def snapshots(self) -> list[SnapshotRecord]:
        """Snapshots of system prompts that every rank has found on disk, the last used first."""

    @property
    @abstractmethod
    def pipeline_depth(self) -> int:
        """Plans that may be in flight: 1 where a step occupies the host, 2 where the next can be prepared meanwhile."""

    @abstractmethod
    def submit(self, plan: StepPlan) -> RunningStep:
        """Starts one step on every rank. Steps run in the order in which they were submitted.

        Where the plan has masked entries, the caller gives their masks before it submits the next one.
        """

    @abstractmethod
    def shutdown(self) -> None:
        """Ends the ranks."""
