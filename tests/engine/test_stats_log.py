"""The line about what the engine does."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from vllm.engine import stats_log
from vllm.engine.messages import EngineStats
from vllm.engine.metrics import EngineMetrics
from vllm.engine.stats_log import StatsLog


class Totals:
    num_prompt_tokens = 7
    num_generated_tokens = 5


def test_a_line_says_what_came_since_the_last_one_and_none_comes_of_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(stats_log.logger, "info", lambda text, *values: lines.append(text % values))
    totals, stats, now = Totals(), EngineStats(), 0.0
    log = StatsLog(cast(EngineMetrics, totals), lambda: stats, clock=lambda: now)
    now = 10.0
    log.write()
    assert lines == []
    totals.num_prompt_tokens, totals.num_generated_tokens, now = 107, 45, 20.0
    stats = EngineStats(num_running=2, num_waiting=1, kv_cache_usage=0.25, prefix_cache_queries=8, prefix_cache_hits=2)
    log.write()
    assert lines == [
        "Engine 000: Avg prompt throughput: 10.0 tokens/s, Avg generation throughput: 4.0 tokens/s, "
        "Running: 2 reqs, Waiting: 1 reqs, KV cache usage: 25.0%, Prefix cache hit rate: 25.0%, "
        "System prompts: 0 pinned, 0 tokens"
    ]
    # A request that waits without a token is worth a line; an idle engine is not.
    log.write()
    stats = EngineStats()
    log.write()
    assert len(lines) == 2


def test_a_line_that_cannot_be_written_does_not_end_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(stats_log.logger, "info", lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(stats_log, "INTERVAL_S", 0.001)
    looks = 0

    def stats() -> EngineStats:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise ZeroDivisionError
        return EngineStats(num_running=1)

    async def go() -> None:
        task = asyncio.create_task(StatsLog(cast(EngineMetrics, Totals()), stats).run())
        while not lines:
            assert not task.done()
            await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(go())
