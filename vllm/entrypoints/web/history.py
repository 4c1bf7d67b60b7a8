"""The last hour of the metrics that the page draws, so that a page that is opened now shows what was before."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry

from vllm.logger import init_logger

logger = init_logger(__name__)

INTERVAL_S = 5.0
_KEPT = 720
# Samples as `/metrics` has them. Those of several label values are summed, unless one value is named; of a share, it is
# the mean that counts.
_USAGE = "vllm:kv_cache_usage_perc"
_GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", _USAGE)
_TOTALS = (
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:system_prompt_tokens_reused_total",
    "vllm:time_to_first_token_seconds_sum",
    "vllm:time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_sum",
    "vllm:inter_token_latency_seconds_count",
    "vllm:system_prompt_prefill_seconds_sum",
    "vllm:system_prompt_prefill_seconds_count",
)
_HITS = "vllm:system_prompt_requests_total"
NAMES = (*_GAUGES, *_TOTALS, _HITS)
_WANTED = frozenset(NAMES)


class History:
    """Samples of a registry, one every `INTERVAL_S`, an hour of them.

    Args:
        registry: The engine's.
        clock: Seconds since 1970.
    """

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.time) -> None:
        self._registry = registry
        self._clock = clock
        self._rows: deque[tuple[float, ...]] = deque(maxlen=_KEPT)

    async def run(self) -> None:
        while True:
            try:
                self.sample()
            except Exception:  # one point less in a drawing
                logger.exception("The metrics could not be sampled for the page.")
            await asyncio.sleep(INTERVAL_S)

    def sample(self) -> None:
        """Takes a sample now, which costs the event loop less than an answer of `/metrics` does."""
        found, usages = dict.fromkeys(NAMES, 0.0), 0
        for family in self._registry.collect():
            for sample in family.samples:
                if sample.name in _WANTED and (sample.name != _HITS or sample.labels["outcome"] == "hit"):
                    found[sample.name] += sample.value
                    usages += sample.name == _USAGE
        found[_USAGE] /= max(1, usages)
        self._rows.append((round(self._clock(), 3), *found.values()))

    def json(self, after: float = 0.0) -> dict[str, Any]:
        """The samples that are younger than `after`, as columns by name.

        `time` is in seconds since 1970, totals are those since the server's start.
        """
        rows = [row for row in self._rows if row[0] > after]
        columns = zip(*rows, strict=True) if rows else ([] for _ in range(len(NAMES) + 1))
        return {"interval_s": INTERVAL_S, "columns": dict(zip(("time", *NAMES), map(list, columns), strict=True))}
