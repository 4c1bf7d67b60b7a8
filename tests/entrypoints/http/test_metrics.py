"""Names and values of `/metrics`, and the dashboard's queries against them."""

from __future__ import annotations

import concurrent.futures
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.entrypoints.openai.test_endpoints import send, wait_for

DASHBOARD = Path(__file__).parents[3] / "deploy" / "grafana" / "dashboard.json"

HISTOGRAMS = {
    "e2e_request_latency_seconds",
    "inter_token_latency_seconds",
    "iteration_tokens_total",
    "request_decode_time_seconds",
    "request_generation_tokens",
    "request_max_num_generation_tokens",
    "request_params_max_tokens",
    "request_params_n",
    "request_prefill_time_seconds",
    "request_prompt_tokens",
    "request_queue_time_seconds",
    "request_time_per_output_token_seconds",
    "system_prompt_prefill_seconds",
    "time_to_first_token_seconds",
}
COUNTERS = {
    "generation_tokens_total",
    "gpu_prefix_cache_hits_total",
    "gpu_prefix_cache_queries_total",
    "num_preemptions_total",
    "prefix_cache_hits_total",
    "prefix_cache_queries_total",
    "prompt_tokens_cached_total",
    "prompt_tokens_total",
    "request_success_total",
    "system_prompt_prefills_total",
    "system_prompt_requests_total",
    "system_prompt_snapshot_total",
    "system_prompt_tokens_reused_total",
}
GAUGES = {
    "cache_config_info",
    "gpu_cache_usage_perc",
    "gpu_prefix_cache_hit_rate",
    "kv_cache_usage_perc",
    "num_requests_running",
    "num_requests_waiting",
    "system_prompt_pinned",
    "system_prompt_pool_budget_tokens",
    "system_prompt_pool_tokens",
}
OLDER_NAMES = {
    "gpu_cache_usage_perc": "kv_cache_usage_perc",
    "gpu_prefix_cache_hits_total": "prefix_cache_hits_total",
    "gpu_prefix_cache_queries_total": "prefix_cache_queries_total",
}


class Metrics:
    """What a server exposes now: types by name, samples by name."""

    def __init__(self, text: str) -> None:
        self.kinds: dict[str, str] = {}
        self.samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        self.labels: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(text):
            if not family.name.startswith("vllm:"):
                continue
            suffix = "_total" if family.type == "counter" else ""
            self.kinds[family.name.removeprefix("vllm:") + suffix] = family.type
            for sample in family.samples:
                self.samples.setdefault(sample.name.removeprefix("vllm:"), []).append((sample.labels, sample.value))

    def value(self, name: str, **labels: str) -> float:
        """Sum of the samples with these labels."""
        found = self.samples.get(name, [])
        return sum(value for own, value in found if labels.items() <= own.items())


@pytest.fixture(scope="module")
def url(server) -> str:
    """The shared server, after a few requests of each kind."""
    chat = {"messages": [{"role": "system", "content": "You count."}, {"role": "user", "content": "One"}]}
    for _ in range(2):
        httpx.post(f"{server.url}/v1/chat/completions", json=chat | {"max_tokens": 3}, timeout=120).raise_for_status()
    return server.url


def read(url: str) -> Metrics:
    return Metrics(httpx.get(f"{url}/metrics", timeout=60).text)


def settled(url: str) -> Metrics:
    """Metrics once nothing runs and the engine has told the totals of its last step."""
    deadline = time.monotonic() + 30
    while True:
        metrics = read(url)
        if metrics.value("num_requests_running") + metrics.value("num_requests_waiting") == 0:
            return metrics
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_every_name_is_there_with_its_type_and_labels(url, server):
    metrics = settled(url)
    for names, kind in ((HISTOGRAMS, "histogram"), (COUNTERS, "counter"), (GAUGES, "gauge")):
        assert {name: metrics.kinds.get(name) for name in names} == dict.fromkeys(names, kind)
    for name, samples in metrics.samples.items():
        for labels, _ in samples:
            assert labels["engine"] == "0"
            assert name.startswith("cache_config_info") or labels["model_name"] == server.model
    for name, kind in metrics.kinds.items():
        if kind == "histogram":
            bounds = [labels["le"] for labels, _ in metrics.samples[f"{name}_bucket"]]
            assert bounds[-1] == "+Inf"
            assert metrics.value(f"{name}_bucket", le="+Inf") == metrics.value(f"{name}_count")


def test_older_names_say_the_same(url):
    metrics = settled(url)
    assert {old: metrics.value(old) for old in OLDER_NAMES} == {old: metrics.value(n) for old, n in OLDER_NAMES.items()}
    queries, hits = metrics.value("prefix_cache_queries_total"), metrics.value("prefix_cache_hits_total")
    assert metrics.value("gpu_prefix_cache_hit_rate") == pytest.approx(hits / queries)


def test_a_request_is_counted_and_timed_once(url):
    before = settled(url)
    body = {"prompt": "One two three", "max_tokens": 6, "n": 2, "ignore_eos": True, "temperature": 1}
    prompt_tokens = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["usage"]["prompt_tokens"]
    after = settled(url)

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    assert grown("request_success_total", finished_reason="length") == grown("request_success_total") == 1
    assert (grown("prompt_tokens_total"), grown("generation_tokens_total")) == (prompt_tokens, 12)
    for name in HISTOGRAMS - {"inter_token_latency_seconds", "iteration_tokens_total", "system_prompt_prefill_seconds"}:
        assert grown(f"{name}_count") == 1, name
    assert grown("inter_token_latency_seconds_count") == 10
    sums = {name: grown(f"{name}_sum") for name in HISTOGRAMS}
    assert sums["request_prompt_tokens"] == prompt_tokens
    assert sums["request_generation_tokens"] == 12
    assert (sums["request_max_num_generation_tokens"], sums["request_params_max_tokens"]) == (6, 6)
    assert sums["request_params_n"] == 2
    parts = sums["request_queue_time_seconds"] + sums["request_prefill_time_seconds"]
    assert parts == pytest.approx(sums["time_to_first_token_seconds"], abs=1e-3)
    assert parts + sums["request_decode_time_seconds"] == pytest.approx(sums["e2e_request_latency_seconds"], abs=0.05)
    tpot = sums["request_time_per_output_token_seconds"]
    assert tpot == pytest.approx(sums["request_decode_time_seconds"] / 5, abs=1e-6)


def test_a_beam_search_is_one_request(url):
    system = "You list colours, one after the other, and say nothing else whatever you are asked."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Begin."}]
    body = {"messages": messages, "use_beam_search": True, "n": 2, "best_of": 3, "max_tokens": 5, "ignore_eos": True}
    for outcome in ("probation", "hit"):
        before = settled(url)
        usage = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["usage"]
        after = settled(url)

        def grown(name: str, before: Metrics = before, after: Metrics = after, **labels: str) -> float:
            return after.value(name, **labels) - before.value(name, **labels)

        assert grown("request_success_total", finished_reason="length") == grown("request_success_total") == 1
        assert grown("prompt_tokens_total") == grown("prefix_cache_queries_total") == usage["prompt_tokens"]
        assert grown("generation_tokens_total") == usage["completion_tokens"] == 10
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert grown("prompt_tokens_cached_total") == grown("prefix_cache_hits_total") == cached
        assert grown("system_prompt_requests_total", outcome=outcome) == grown("system_prompt_requests_total") == 1
        # One that is computed is not there to be read yet.
        assert grown("system_prompt_tokens_reused_total") == (0 if outcome == "probation" else cached)
        assert grown("inter_token_latency_seconds_count") == 0
        for name in HISTOGRAMS - {
            "inter_token_latency_seconds",
            "iteration_tokens_total",
            "system_prompt_prefill_seconds",
        }:
            assert grown(f"{name}_count") == 1, name
        sums = {name: grown(f"{name}_sum") for name in HISTOGRAMS}
        assert sums["request_prompt_tokens"] == usage["prompt_tokens"]
        assert (sums["request_generation_tokens"], sums["request_max_num_generation_tokens"]) == (10, 5)
        assert (sums["request_params_max_tokens"], sums["request_params_n"]) == (5, 2)
        parts = sums["request_queue_time_seconds"] + sums["request_prefill_time_seconds"]
        assert parts == pytest.approx(sums["time_to_first_token_seconds"], abs=1e-3)
        assert sums["request_decode_time_seconds"] > 0
        whole = parts + sums["request_decode_time_seconds"]
        assert whole == pytest.approx(sums["e2e_request_latency_seconds"], abs=1e-3)


def test_a_beam_search_that_is_left_is_one_aborted_request(url):
    before = settled(url)
    body = {"prompt": "Once", "use_beam_search": True, "n": 2, "max_tokens": 1900, "ignore_eos": True}
    with send(url, "/v1/completions", body):
        wait_for(lambda: read(url).value("prompt_tokens_total") > before.value("prompt_tokens_total"))
    wait_for(lambda: read(url).value("request_success_total") > before.value("request_success_total"))

    def quiet() -> bool:
        # Between two steps nothing runs either: it must stay so.
        steps = read(url).value("iteration_tokens_total_count")
        time.sleep(0.5)
        return read(url).value("iteration_tokens_total_count") == steps

    wait_for(quiet)
    after = settled(url)
    aborted = {"finished_reason": "abort"}
    assert after.value("request_success_total", **aborted) == before.value("request_success_total", **aborted) + 1
    assert after.value("request_success_total") == before.value("request_success_total") + 1
    for name in ("e2e_request_latency_seconds", "request_decode_time_seconds", "request_generation_tokens"):
        assert after.value(f"{name}_count") == before.value(f"{name}_count")


def test_an_aborted_request_is_counted_and_in_no_latency(url):
    before = settled(url)
    body = {"prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        while not next(lines).startswith("data: "):
            pass
    after = settled(url)
    assert after.value("request_success_total", finished_reason="abort") == 1 + before.value(
        "request_success_total", finished_reason="abort"
    )
    assert after.value("generation_tokens_total") > before.value("generation_tokens_total")
    for name in ("e2e_request_latency_seconds", "request_decode_time_seconds", "request_generation_tokens"):
        assert after.value(f"{name}_count") == before.value(f"{name}_count")
    assert after.value("kv_cache_usage_perc") == before.value("kv_cache_usage_perc")


@pytest.mark.nightly
def test_timing_is_right_under_preemption(server_factory, tiny_model_dir):
    # 16 blocks of 16 tokens: three requests of 204 tokens cannot all stay.
    small = ("--num-gpu-blocks-override", "16", "--max-model-len", "250", "--dtype", "float32")
    server = server_factory("--model", str(tiny_model_dir), *small)
    try:
        started = time.time()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            body = {"prompt": "Once upon a time", "max_tokens": 200, "ignore_eos": True}
            answers = [
                pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=120) for _ in range(3)
            ]
        assert {answer.result().status_code for answer in answers} == {200}
        elapsed = time.time() - started
        metrics = settled(server.url)
    finally:
        server.stop()
    assert metrics.value("num_preemptions_total") > 0
    assert metrics.value("generation_tokens_total") == metrics.value("request_generation_tokens_sum") == 600
    assert metrics.value("time_to_first_token_seconds_count") == metrics.value("e2e_request_latency_seconds_count") == 3
    assert metrics.value("prompt_tokens_total") == metrics.value("request_prompt_tokens_sum")
    assert metrics.value("inter_token_latency_seconds_count") == 3 * 199
    parts = [metrics.value(f"request_{part}_time_seconds_sum") for part in ("queue", "prefill", "decode")]
    whole = metrics.value("e2e_request_latency_seconds_sum")
    assert all(part >= 0 for part in parts)
    assert sum(parts) == pytest.approx(whole, rel=0.02)
    assert whole <= 3 * elapsed
    # The wait of a preempted request is a gap between its tokens.
    assert metrics.value("inter_token_latency_seconds_sum") == pytest.approx(parts[2], rel=0.02)


# HTTP ------------------------------------------------------------------------------------------------------------


def http_samples(url: str) -> dict[tuple[str, ...], float]:
    """Values of the metrics of HTTP by name and values of the labels, in the order of the labels' names."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text)
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        if family.name.startswith("http_")
        for sample in family.samples
    }


def test_http_requests_are_counted_by_route_and_never_by_what_clients_make_up(url):
    chat = "/v1/chat/completions"
    body = json.dumps({"messages": [{"role": "user", "content": "One"}], "max_tokens": 2}).encode()
    streamed = json.dumps(json.loads(body) | {"stream": True}).encode()
    headers = {"Content-Type": "application/json"}
    before = http_samples(url)
    with httpx.Client(verify=False, base_url=url, timeout=60) as client:
        whole = client.post(chat, content=body, headers=headers)
        assert client.post(chat, content=streamed, headers=headers).status_code == 200
        assert client.post(chat, content=b"{", headers=headers).status_code == 400
        assert client.get("/v1/responses/resp_made_up").status_code == 404
        assert client.get("/v1/responses/resp_made_up/", follow_redirects=False).status_code == 307
        assert client.request("PROPFIND", "/made/up").status_code == 404
        assert client.get("/health").status_code == 200

    def grown(*key: str) -> float:
        return http_samples(url).get(key, 0.0) - before.get(key, 0.0)

    wait_for(lambda: grown("http_request_duration_highr_seconds_count") >= 6)
    # Labels by name: handler, method, status.
    assert grown("http_requests_total", chat, "POST", "2xx") == 2
    assert grown("http_requests_total", chat, "POST", "4xx") == 1
    assert grown("http_requests_total", "/v1/responses/{response_id}", "GET", "4xx") == 1
    assert (
        grown("http_requests_total", "none", "GET", "3xx") == grown("http_requests_total", "none", "none", "4xx") == 1
    )
    assert grown("http_request_size_bytes_count", chat) == grown("http_response_size_bytes_count", chat) == 3
    assert grown("http_request_size_bytes_sum", chat) == len(body) + len(streamed) + 1
    assert len(whole.content) < grown("http_response_size_bytes_sum", chat) < 2 * len(whole.content)
    assert grown("http_request_duration_seconds_count", chat, "POST") == 3
    assert grown("http_request_duration_seconds_bucket", chat, "+Inf", "POST") == 3
    after = http_samples(url)
    assert not [key for key in after if "made" in str(key) or "/health" in key or "/metrics" in key]
    fine = sorted(float(key[1]) for key in after if key[0] == "http_request_duration_highr_seconds_bucket")
    assert (len(fine), fine[0], fine[-2]) == (22, 0.01, 60)
    coarse = {key[2] for key in after if key[:2] == ("http_request_duration_seconds_bucket", chat)}
    assert coarse == {"0.1", "0.5", "1.0", "+Inf"}


def test_the_process_tells_about_itself(url):
    text = httpx.get(f"{url}/metrics", timeout=60).text
    names = {family.name for family in text_string_to_metric_families(text)}
    for name in ("cpu_seconds", "resident_memory_bytes", "virtual_memory_bytes", "start_time_seconds", "open_fds"):
        assert f"process_{name}" in names
    assert {"process_max_fds", "python_info", "python_gc_collections", "python_gc_objects_collected"} <= names


# The dashboard ---------------------------------------------------------------------------------------------------


def queries() -> Iterator[tuple[str, str]]:
    """(Title of the panel, query) of all panels."""

    def targets(panels: list[dict]) -> Iterator[tuple[str, str]]:
        for panel in panels:
            yield from targets(panel.get("panels", []))
            for target in panel.get("targets", []):
                yield panel["title"], target["expr"]

    yield from targets(json.loads(DASHBOARD.read_text())["panels"])


@pytest.mark.parametrize(("title", "expr"), list(queries()))
def test_queries_of_the_dashboard_find_what_they_ask_for(url, title, expr):
    metrics = settled(url)
    exposed = set(metrics.samples) | set(metrics.kinds)
    asked = re.findall(r"vllm:([a-z0-9_]+)(?:\{([^}]*)\})?", expr)
    assert asked, expr
    for name, selector in asked:
        assert name in exposed
        labels = set().union(*(own for own, _ in metrics.samples.get(name, [])))
        if not labels:  # a counter whose labels have had no value yet
            labels = {"model_name", "engine", "outcome", "op"}
        grouped = ",".join(re.findall(r"by ?\(([^)]*)\)", expr)).replace(" ", "").split(",")
        wanted = set(re.findall(r"(\w+) ?=", selector)) | set(filter(None, grouped))
        assert wanted - {"instance", "job"} <= labels


def test_the_dashboard_shows_requests_and_the_pool():
    text = " ".join(expr for _, expr in queries())
    for name in (
        (HISTOGRAMS | COUNTERS | GAUGES)
        - OLDER_NAMES.keys()
        - {
            "cache_config_info",
            "gpu_prefix_cache_hit_rate",
            "request_params_n",
        }
    ):
        assert f"vllm:{name}" in text, f"no panel shows {name}"
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
