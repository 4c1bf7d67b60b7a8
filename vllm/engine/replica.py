"""One engine process of a server, with all that the API process keeps for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm import envs
from vllm.config import SystemPromptConfig, VllmConfig
from vllm.engine.core_link import CoreLink, LinkEvents
from vllm.engine.messages import AbortRequests, EngineReady, EngineStats, StepOutputs
from vllm.engine.metrics import EngineMetrics
from vllm.engine.output_processor import OutputProcessor
from vllm.engine.prompt_calls import PromptCalls
from vllm.engine.routing import EngineLoad
from vllm.engine.stats_log import StatsLog
from vllm.engine.varying_prompts import log_varying_prompts
from vllm.engine.watchdog import Watchdog
from vllm.exceptions import EngineDeadError, EngineStalledError, StartupError
from vllm.transformers_utils.tokenizer import Tokenizer


class Replica:
    """Starts an engine process, listens to it, and ends with it.

    Args:
        config: What it runs.
        command, max_restarts: As of `CoreLink`.
        environment: Variables of the process beside those of this one.
        index: Its number among the engines of the server.

    Attributes:
        stats: The engine core's state after its latest step.
        load: What it has to do, for the router.
        prompts: Calls about system prompts.
        is_sleeping: It starts no steps.

    Raises:
        StartupError: it cannot run with this configuration on this machine.
    """

    def __init__(
        self,
        config: VllmConfig,
        tokenizer: Tokenizer,
        command: Sequence[str],
        max_restarts: int,
        logs_stats: bool,
        environment: Mapping[str, str] | None = None,
        index: int = 0,
    ) -> None:
        self.index = index
        self.stats = EngineStats()
        self.load = EngineLoad()
        self.is_sleeping = False
        self._tokenizer = tokenizer
        self._logs_stats = logs_stats
        self._stats_log: asyncio.Task[None] | None = None
        self._watchdog = Watchdog(envs.execute_model_timeout_s())
        self._closed = False
        self.prompts = PromptCalls(self.call)
        events = LinkEvents(self._take_in, self._on_death, self._on_restart, self.prompts.pin_again)
        self.link = CoreLink(config, command, max_restarts, events, environment)
        ready = self.link.ready
        self.num_blocks, self.pool_budget_tokens = ready.num_blocks, ready.pool_budget_tokens
        self.metrics = EngineMetrics(config, ready.num_blocks, index)
        self.processor = OutputProcessor(tokenizer, self.metrics)

    # Life ------------------------------------------------------------------------------------------------------

    def ensure_reading(self) -> None:
        """Starts what needs a running event loop, with the first use."""
        self.link.ensure_reading()
        if self._stats_log is None and self._logs_stats and not (self._closed or self.link.errored):
            log = StatsLog(self.metrics, lambda: self.stats, self.index)
            self._stats_log = asyncio.get_running_loop().create_task(log.run())

    async def _take_in(self, news: StepOutputs) -> None:
        if news.outputs or news.results or (news.stats is not None and news.stats.iteration_tokens):
            self._watchdog.note_progress()
        orders = self.processor.process(news.outputs)
        if orders.aborts:
            await self.link.send(AbortRequests(orders.aborts))
        for fork in orders.forks:
            await self.link.send(fork)
        if news.stats is not None:
            self.stats = news.stats
            self.metrics.on_stats(news.stats)
            log_varying_prompts(news.stats.varying_prompts, self._tokenizer)
        self.link.take_results(news.results)

    def _on_death(self, error: EngineDeadError) -> None:
        self.load.is_open = False
        self.load.forget()
        self.processor.fail_all(error)

    def _on_restart(self, ready: EngineReady) -> None:
        self.num_blocks, self.pool_budget_tokens = ready.num_blocks, ready.pool_budget_tokens
        self.stats = EngineStats()
        self.metrics.on_restart(ready.num_blocks)
        self.is_sleeping = False
        self.load.is_open = True

    def _has_work(self) -> bool:
        """Whether the engine ought to finish steps."""
        return not self.is_sleeping and bool(self.processor.requests or self.link.num_calls)

    def expect_work(self) -> None:
        """Tells the watchdog that work is about to go to the engine."""
        if not self._has_work():
            self._watchdog.note_progress()

    def fault(self) -> EngineDeadError | EngineStalledError | None:
        """Why it does not serve: it has ended, or has work and has not finished a step for long."""
        if self.link.errored:
            return self.link.dead_error
        try:
            self._watchdog.check(self._has_work())
        except EngineStalledError as error:
            return error
        return None

    def shutdown(self) -> None:
        """Ends the engine process; open requests end with an error."""
        if self._closed:
            return
        self._closed = True
        self.link.shutdown()
        if self._stats_log is not None:
            self._stats_log.cancel()

    # Requests and calls ----------------------------------------------------------------------------------------

    async def abort(self, request_id: str) -> None:
        """Ends a request; the engine takes note before its next step. Unknown ids are ignored."""
        self.processor.drop(request_id)
        if not self.link.is_dead:
            await self.link.send(AbortRequests([(request_id, None)]))

    async def abort_all(self, error: Exception) -> None:
        """Ends all requests; whoever waits for them gets the error."""
        ids = list(self.processor.requests)
        self.processor.fail_all(error)
        if ids and not self.link.is_dead:
            await self.link.send(AbortRequests([(request_id, None) for request_id in ids]))

    async def call(self, method: str, *args: Any) -> Any:
        """Calls a method of the engine core; see `CoreLink.call`."""
        self.ensure_reading()
        self.expect_work()
        return await self.link.call(method, *args)


def start_replicas(
    config: VllmConfig, tokenizer: Tokenizer, command: Sequence[str], max_restarts: int, logs_stats: bool
) -> list[Replica]:
    """Starts `--data-parallel-size` engine processes beside each other.

    Raises:
        StartupError: one of them cannot run; none is left.
    """
    count = config.parallel.data_parallel_size
    if count == 1:
        return [Replica(config, tokenizer, command, max_restarts, logs_stats)]
    environments = _environments(config, count)

    def start(index: int) -> Replica:
        own = replace(config, system_prompt=_own_snapshots(config.system_prompt, index))
        return Replica(own, tokenizer, command, max_restarts, logs_stats, environments[index], index)

    with ThreadPoolExecutor(count, thread_name_prefix="replicas") as threads:
        starting = [threads.submit(start, index) for index in range(count)]
    failed = next((error for one in starting if (error := one.exception()) is not None), None)
    if failed is not None:
        for one in starting:
            if one.exception() is None:
                one.result().shutdown()
        raise failed
    return [one.result() for one in starting]


def _environments(config: VllmConfig, count: int) -> list[dict[str, str]]:
    """Which GPUs each of the engines sees: as many as it has ranks."""
    if config.device != "cuda":
        return [{}] * count
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    ranks = config.parallel.tensor_parallel_size
    gpus = given.split(",") if given else [str(i) for i in range(count * ranks)]
    if len(gpus) < count * ranks:
        raise StartupError(
            f"--data-parallel-size {count} with --tensor-parallel-size {ranks} needs {count * ranks} GPUs; "
            f"CUDA_VISIBLE_DEVICES names {len(gpus)}."
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * ranks : (i + 1) * ranks])} for i in range(count)]


def _own_snapshots(config: SystemPromptConfig, index: int) -> SystemPromptConfig:
    """Snapshots of each engine lie in a folder of its own: two would take away what the other one reads."""
    folder = config.snapshot_dir
    return replace(config, snapshot_dir=None if folder is None else str(Path(folder) / f"engine{index}"))
