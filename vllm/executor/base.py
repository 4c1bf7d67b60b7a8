"""The contract of an executor: it hides how many ranks there are and where they run."""

from __future__ import annotations

from abc import ABC, abstractmethod

from vllm.step import StepPlan, StepResult


class Executor(ABC):
    """Starts the ranks at construction (weights are loaded then) and runs plans on all of them.

    Every rank holds the same block numbering, so a plan means the same on each.
    """

    @abstractmethod
    def kv_memory(self) -> tuple[int, int]:
        """(Bytes that KV may take, bytes of a block), of the rank with the least room."""

    @abstractmethod
    def initialize_cache(self, num_blocks: int) -> None:
        """Makes the KV cache of `num_blocks` blocks on every rank."""

    @abstractmethod
    def execute(self, plan: StepPlan) -> StepResult:
        """Runs one step on every rank and returns what was drawn."""

    @abstractmethod
    def shutdown(self) -> None:
        """Ends the ranks."""
