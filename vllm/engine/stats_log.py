"""What the engine does, a line every few seconds in which it does anything, in the terms that vLLM's log has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from vllm.engine.messages import EngineStats
from vllm.engine.metrics import EngineMetrics
from vllm.logger import init_logger

logger = init_logger(__name__)

INTERVAL_S = 10.0


class StatsLog:
    """Says what came since the last line; nothing while nothing comes.

    Args:
        metrics: Counts tokens.
        stats: Gives the engine core's latest state.
        index: Number of the engine.
        clock: Seconds.
    """

    def __init__(
        self,
        metrics: EngineMetrics,
        stats: Callable[[], EngineStats],
        index: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._stats = stats
        self._index = index
        self._clock = clock
        self._before = self._totals()

    def _totals(self) -> tuple[float, int, int]:
        return self._clock(), self._metrics.num_prompt_tokens, self._metrics.num_generated_tokens

    async def run(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                self.write()
            except Exception:  # a line less; the next one may be right
                logger.exception("The state of the engine could not be logged.")

    def write(self) -> None:
        """Writes the line of the time since the last one, unless nothing happened in it."""
        (start, prompt, generated), self._before = self._before, self._totals()
        end, prompt_now, generated_now = self._before
        stats, seconds = self._stats(), max(end - start, 1e-9)
        if (prompt_now, generated_now) == (prompt, generated) and not stats.num_running and not stats.num_waiting:
            return
        hit_rate = stats.prefix_cache_hits / max(1, stats.prefix_cache_queries)
        logger.info(
            "Engine %03d: Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, "
            "Running: %d reqs, Waiting: %d reqs, KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%, "
            "System prompts: %d pinned, %d tokens",
            self._index,
            (prompt_now - prompt) / seconds,
            (generated_now - generated) / seconds,
            stats.num_running,
            stats.num_waiting,
            100 * stats.kv_cache_usage,
            100 * hit_rate,
            stats.pinned_prompts,
            stats.pinned_tokens,
        )
