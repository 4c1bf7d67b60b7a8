"""The dashboard and the alerts against a real Prometheus (Debian's package) that scrapes a loaded server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from server_process import ServerProcess, free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(PROMETHEUS is None, reason="needs prometheus"),
]


def dashboard_queries() -> list[str]:
    panels = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return [query.replace("$model_name", ".*").replace("$__rate_interval", "30s") for query in found]


def alert_queries() -> list[str]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def prometheus(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Prometheus that has seen requests come and go."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / "alerts.yaml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{server.port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        str(PROMETHEUS), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: ask(url, 'up{job="vllm"} == 1'))
        load(server, 6)
        before = ask(url, "vllm:generation_tokens_total")
        load(server, 6)
        wait_until(lambda: ask(url, "vllm:generation_tokens_total")[0]["value"][1] != before[0]["value"][1])
        time.sleep(3)  # rates need a few scrapes on each side
        yield url
    finally:
        process.terminate()
        process.wait(20)


def load(server: ServerProcess, requests: int) -> None:
    for i in range(requests):
        messages = [{"role": "system", "content": "You are a librarian. " * 8}, {"role": "user", "content": f"{i}"}]
        body = {"messages": messages, "max_tokens": 6}
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).raise_for_status()


def wait_until(done: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if done():
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        assert time.monotonic() < end, "Prometheus has not seen it"
        time.sleep(0.3)


def ask(url: str, query: str) -> list[dict[str, Any]]:
    answer = httpx.get(f"{url}/api/v1/query", params={"query": query}).json()
    assert answer["status"] == "success", f"{query}: {answer}"
    return answer["data"]["result"]


def selectors(query: str) -> set[str]:
    """The series that a query reads, with the labels it asks for."""
    return set(re.findall(r"(?:vllm:\w+|up|http_\w+)(?:\{[^}]*\})?", query))


@pytest.mark.parametrize("query", dashboard_queries())
def test_every_query_of_the_dashboard_gives_something(prometheus, query):
    assert ask(prometheus, query), query


@pytest.mark.parametrize("query", alert_queries())
def test_every_alert_reads_series_that_are_there(prometheus, query):
    ask(prometheus, query)
    for selector in selectors(query):
        assert ask(prometheus, selector), f"{query}: nothing is {selector}"


def test_prometheus_has_taken_the_alerts_and_none_fires(prometheus):
    groups = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(alert_queries())
    assert {rule["health"] for rule in rules} == {"ok"}
    assert {rule["state"] for rule in rules} == {"inactive"}
