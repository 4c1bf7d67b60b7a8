"""Prometheus metrics, under the names that vLLM's dashboards and routers read, and our own for the pool."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from vllm.config import VllmConfig
from vllm.core.pinned_prompt import Outcome, PoolTokens
from vllm.engine.messages import EngineStats
from vllm.engine.observer import ObservedRequest, RequestObserver
from vllm.sequence import FINISH_REASONS
from vllm.step import SnapshotOp
from vllm.system_prompt_store import SnapshotOutcome

_LABELS = ("model_name", "engine")
_LATENCY_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# Values of labels, each of which is there from the start: a dashboard cannot tell what is missing from what is zero.
_FINISHED_REASONS = tuple(dict.fromkeys((*FINISH_REASONS.values(), "error")))
_SNAPSHOT_OPS = tuple(itertools.product(get_args(SnapshotOp), SnapshotOutcome))
_REFUSED_BY = ("max_num_queued_reqs",)


def _each(values: Iterable[str]) -> list[tuple[str]]:
    """Values of a metric's only label."""
    return [(value,) for value in values]


def _token_buckets(longest: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 … up to `longest`."""
    buckets: list[int] = []
    decade = 1
    while True:
        for step in (1, 2, 5):
            if step * decade > longest:
                return tuple(buckets) or (1,)
            buckets.append(step * decade)
        decade *= 10


_M = TypeVar("_M", Counter, Gauge)


class _Histogram:
    """A histogram with one set of labels, whose observations cost next to nothing: the event loop makes them all, one
    for each token, and needs no lock for it."""

    def __init__(self, name: str, text: str, labels: dict[str, str], buckets: tuple[float, ...]) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """What a registry asks for."""
        so_far = 0
        buckets = []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            so_far += count
            buckets.append((floatToGoString(bound), so_far))
        family = HistogramMetricFamily(self._name, self._text, labels=tuple(self._labels))
        family.add_metric(tuple(self._labels.values()), buckets, self._sum)
        yield family


class EngineMetrics(RequestObserver):
    """Metrics of one engine, in a registry of its own.

    Args:
        index: Number of the engine.

    Attributes:
        num_prompt_tokens, num_generated_tokens: Computed since the start; of prompts, when their first token comes.

    Counters whose totals the engine core keeps are advanced by the difference to the last totals seen.
    """

    def __init__(self, config: VllmConfig, num_blocks: int, index: int = 0) -> None:
        self.registry = CollectorRegistry()
        self._values = {"model_name": config.model.served_model_names[0], "engine": str(index)}
        self._totals: dict[tuple[str, str], int] = {}
        self._new_tokens = 0
        self.num_prompt_tokens = self.num_generated_tokens = 0
        tokens = _token_buckets(config.model.max_model_len)
        hist, gauge, counter = self._histogram, self._gauge, self._counter

        self._running = gauge("num_requests_running", "Requests in the running batch.")
        self._waiting = gauge("num_requests_waiting", "Requests waiting to run.")
        self._usage = [
            gauge("kv_cache_usage_perc", "Share of the schedulable KV cache in use, 0 to 1."),
            gauge("gpu_cache_usage_perc", "Older name of kv_cache_usage_perc."),
        ]
        self._hit_rate = gauge("gpu_prefix_cache_hit_rate", "Share of prompt tokens found in cache since start.")
        self._queries = [
            counter("prefix_cache_queries", "Prompt tokens looked up in cache."),
            counter("gpu_prefix_cache_queries", "Older name of prefix_cache_queries."),
        ]
        self._hits = [
            counter("prefix_cache_hits", "Prompt tokens found in cache, pinned or not."),
            counter("gpu_prefix_cache_hits", "Older name of prefix_cache_hits."),
        ]
        self._preemptions = counter("num_preemptions", "Preemptions of running sequences.")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that got their first token.")
        self._cached_tokens = counter("prompt_tokens_cached", "Prompt tokens that requests did not have to compute.")
        self._generation_tokens = counter("generation_tokens", "Generated tokens.")
        self._success = self._labelled(
            Counter, "request_success", "Requests by how they ended.", ("finished_reason",), _each(_FINISHED_REASONS)
        )
        self._refusals = self._labelled(
            Counter,
            "admission_rejections",
            "Requests answered 503 because of a limit on those that wait or run.",
            ("reason",),
            _each(_REFUSED_BY),
        )
        self._iteration_tokens = hist("iteration_tokens_total", "Tokens computed in a step.", _ITERATION_TOKENS)
        self._ttft = hist("time_to_first_token_seconds", "Arrival to first token.", _LATENCY_S)
        self._itl = hist("inter_token_latency_seconds", "Gap between tokens of an output.", _TOKEN_S)
        self._tpot = hist("request_time_per_output_token_seconds", "Mean gap between a request's tokens.", _TOKEN_S)
        self._e2e = hist("e2e_request_latency_seconds", "Arrival to last token.", _REQUEST_S)
        self._queue = hist("request_queue_time_seconds", "Arrival to first scheduling.", _REQUEST_S)
        self._prefill = hist("request_prefill_time_seconds", "First scheduling to first token.", _REQUEST_S)
        self._decode = hist("request_decode_time_seconds", "First to last token.", _REQUEST_S)
        self._request_prompt = hist("request_prompt_tokens", "Prompt tokens of a request.", tokens)
        self._request_output = hist("request_generation_tokens", "Generated tokens of a request.", tokens)
        self._request_longest = hist("request_max_num_generation_tokens", "Longest output of a request.", tokens)
        self._request_max = hist("request_params_max_tokens", "max_tokens of a request.", tokens)
        self._request_n = hist("request_params_n", "n of a request.", (1, 2, 5, 10, 20))

        self._pool_tokens = self._labelled(
            Gauge, "system_prompt_pool_tokens", "Tokens of the pool by state.", ("state",), _each(PoolTokens)
        )
        self._pool_budget = gauge("system_prompt_pool_budget_tokens", "Tokens that may be pinned.")
        self._pool_pinned = gauge("system_prompt_pinned", "System prompts in the pool.")
        self._pool_requests = self._labelled(
            Counter,
            "system_prompt_requests",
            "Requests by what the pool did for them.",
            ("outcome",),
            _each(Outcome),
        )
        self._pool_snapshots = self._labelled(
            Counter,
            "system_prompt_snapshot",
            "Operations on snapshots of system prompts by how they ended.",
            ("op", "outcome"),
            _SNAPSHOT_OPS,
        )
        self._pool_reused = counter("system_prompt_tokens_reused", "System-prompt tokens read instead of computed.")
        self._pool_prefills = counter("system_prompt_prefills", "Prefills of system prompts.")
        self._pool_prefill_seconds = hist("system_prompt_prefill_seconds", "Duration of a prefill.", _REQUEST_S)
        self._cache_settings = {
            "block_size": str(config.cache.block_size),
            "gpu_memory_utilization": str(config.cache.gpu_memory_utilization),
            "enable_prefix_caching": str(config.cache.enable_prefix_caching),
            "cache_dtype": config.model.dtype,
            "engine": str(index),
        }
        self._cache_info = Gauge(
            "vllm:cache_config_info",
            "Settings of the KV cache.",
            (*self._cache_settings, "num_gpu_blocks"),
            registry=self.registry,
        )
        self._set_cache_info(num_blocks)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> _Histogram:
        metric = _Histogram(f"vllm:{name}", text, self._values, buckets)
        self.registry.register(metric)
        return metric

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, _LABELS, registry=self.registry).labels(**self._values)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, _LABELS, registry=self.registry).labels(**self._values)

    def _labelled(
        self, kind: type[_M], name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[str, ...]]
    ) -> _M:
        """A counter or gauge with labels of its own, whose known values begin at 0."""
        metric = kind(f"vllm:{name}", text, (*_LABELS, *labels), registry=self.registry)
        for value in values:
            metric.labels(*self._values.values(), *value)
        return metric

    def _set_cache_info(self, num_blocks: int) -> None:
        self._cache_info.clear()
        self._cache_info.labels(**self._cache_settings, num_gpu_blocks=str(num_blocks)).set(1)

    def on_restart(self, num_blocks: int) -> None:
        """A new engine core has taken the place of one that died: its totals start at zero, ours go on."""
        self._totals.clear()
        self.on_stats(EngineStats())
        self._set_cache_info(num_blocks)

    def on_stats(self, stats: EngineStats) -> None:
        """Takes in the state of the engine core after a step."""
        self._generation_tokens.inc(self._new_tokens)
        self._new_tokens = 0
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        for usage in self._usage:
            usage.set(stats.kv_cache_usage)
        if stats.prefix_cache_queries:
            self._hit_rate.set(stats.prefix_cache_hits / stats.prefix_cache_queries)
        for counters, name in ((self._queries, "prefix_cache_queries"), (self._hits, "prefix_cache_hits")):
            news = self._news(name, getattr(stats, name))
            for c in counters:
                c.inc(news)
        self._preemptions.inc(self._news("num_preemptions", stats.num_preemptions))
        if stats.iteration_tokens:
            self._iteration_tokens.observe(stats.iteration_tokens)
        tokens = {
            PoolTokens.PINNED: stats.pinned_tokens,
            PoolTokens.PROBATION: stats.probation_tokens,
            PoolTokens.FREE: stats.pool_budget_tokens - stats.pinned_tokens - stats.probation_tokens,
            PoolTokens.HOST: stats.pool_host_tokens,
        }
        for state, value in tokens.items():
            self._pool_tokens.labels(**self._values, state=state.value).set(value)
        self._pool_budget.set(stats.pool_budget_tokens)
        self._pool_pinned.set(stats.pinned_prompts)
        for outcome, total in stats.pool_outcomes.items():
            self._pool_requests.labels(**self._values, outcome=outcome).inc(self._news("outcome", total, outcome))
        self._pool_reused.inc(self._news("pool_tokens_reused", stats.pool_tokens_reused))
        self._pool_prefills.inc(self._news("pool_prefills", stats.pool_prefills))
        for seconds in stats.pool_prefill_seconds:
            self._pool_prefill_seconds.observe(seconds)
        for key, total in stats.pool_snapshots.items():
            op, outcome = key.split("/")
            news = self._news("snapshot", total, key)
            self._pool_snapshots.labels(**self._values, op=op, outcome=outcome).inc(news)

    def _news(self, name: str, total: int, label: str = "") -> int:
        before = self._totals.get((name, label), 0)
        self._totals[name, label] = total
        return total - before

    def on_refusal(self) -> None:
        """A request was turned away since too many wait or run."""
        self._refusals.labels(**self._values, reason="max_num_queued_reqs").inc()

    def on_first_token(self, request: ObservedRequest, now: float) -> None:
        self._prompt_tokens.inc(len(request.prompt_token_ids))
        self._cached_tokens.inc(request.num_cached_tokens)
        self.num_prompt_tokens += len(request.prompt_token_ids) - request.num_cached_tokens
        self._ttft.observe(now - request.metrics.arrival_time)

    def on_token(self, now: float, previous: float | None) -> None:
        self._new_tokens += 1
        self.num_generated_tokens += 1
        if previous is not None:
            self._itl.observe(now - previous)

    def on_tokens(self, count: int) -> None:
        self._generation_tokens.inc(count)
        self.num_generated_tokens += count

    def on_finish(self, request: ObservedRequest, now: float) -> None:
        """Counts how a request ended. One that was cut off is in no histogram of requests: how long it took and how
        much it said is its client's doing, or an error's."""
        reasons = [output.finish_reason for output in request.outputs]
        reason = next((r for r in reasons if r not in ("abort", "error")), reasons[0])
        self._success.labels(**self._values, finished_reason=reason).inc()
        if reason in ("abort", "error"):
            return
        times = request.metrics
        lengths = [len(o.token_ids) for o in request.outputs]
        self._request_prompt.observe(len(request.prompt_token_ids))
        self._request_output.observe(sum(lengths))
        self._request_longest.observe(max(lengths))
        self._request_max.observe(request.params.max_tokens or 0)
        self._request_n.observe(request.params.n)
        self._e2e.observe(now - times.arrival_time)
        if times.first_scheduled_time is not None and times.first_token_time is not None:
            self._queue.observe(max(0.0, times.first_scheduled_time - times.arrival_time))
            self._prefill.observe(max(0.0, times.first_token_time - times.first_scheduled_time))
            decode = (times.last_token_time or now) - times.first_token_time
            self._decode.observe(decode)
            if max(lengths) > 1:
                self._tpot.observe(decode / (max(lengths) - 1))


class JoinedMetrics:
    """The metrics of several engines under the same names, as a registry collects them."""

    def __init__(self, engines: Sequence[EngineMetrics]) -> None:
        self._engines = engines
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Each name once, with the samples of all engines."""
        families: dict[str, Metric] = {}
        for engine in self._engines:
            for family in engine.registry.collect():
                if family.name in families:
                    families[family.name].samples += family.samples
                else:
                    families[family.name] = family
        yield from families.values()
