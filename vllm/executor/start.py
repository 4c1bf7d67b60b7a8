"""The executor that a configuration asks for."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.executor.base import Executor
from vllm.executor.multiproc import MultiprocExecutor
from vllm.executor.uniproc import UniprocExecutor


def start_executor(config: VllmConfig) -> Executor:
    """Starts the ranks.

    Raises:
        StartupError: one of them cannot run on this machine with these settings.
    """
    kind = UniprocExecutor if config.parallel.tensor_parallel_size == 1 else MultiprocExecutor
    return kind(config)
