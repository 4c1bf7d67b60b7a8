"""Two engines behind one port, over HTTP."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server_process import ServerProcess
from tests.conftest import ServerFactory

SYSTEMS = [f"You are number {i}. " + "Answer in one short sentence. " * 12 for i in range(4)]


FLAGS = ("--data-parallel-size", "2", "--num-gpu-blocks-override", "256", "--max-model-len", "1024")


@pytest.fixture(scope="module")
def fleet(server_factory: ServerFactory, tiny_model_dir: Path) -> Iterator[ServerProcess]:
    server = server_factory("--model", str(tiny_model_dir), *FLAGS)
    yield server
    server.stop()


def ask(server: ServerProcess, system: str, user: str, max_tokens: int = 4, **headers: str) -> httpx.Response:
    body: dict[str, Any] = {
        "model": server.model,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=120)


def samples(server: ServerProcess, name: str) -> dict[str, float]:
    """Values of a metric by engine."""
    text = httpx.get(f"{server.url}/metrics").text
    assert text.count(f"# TYPE vllm:{name} ") <= 1
    found: dict[str, float] = {}
    for engine, value in re.findall(rf'^vllm:{name}(?:_total)?\{{[^}}]*engine="(\d+)"[^}}]*\}} (\S+)', text, re.M):
        found[engine] = found.get(engine, 0.0) + float(value)
    return found


def test_each_prompt_is_computed_in_one_engine(fleet: ServerProcess) -> None:
    answers = {}
    for system in SYSTEMS:
        answers[system] = ask(fleet, system, "Hello 0").json()["choices"][0]["message"]
    for turn in range(3):
        for system in SYSTEMS:
            answer = ask(fleet, system, "Hello 0").json()
            assert answer["choices"][0]["message"] == answers[system]
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 50, turn
    assert sum(samples(fleet, "system_prompt_prefills").values()) == len(SYSTEMS)
    assert set(samples(fleet, "num_requests_running")) == {"0", "1"}
    prompts = httpx.get(f"{fleet.url}/v1/system_prompts").json()["data"]
    homes = [prompt["engines"] for prompt in prompts]
    assert len(homes) == len(SYSTEMS) and all(len(home) == 1 for home in homes)
    assert {number for home in homes for number in home} == {0, 1}, "they spread"


def test_an_operator_pins_in_every_engine(fleet: ServerProcess) -> None:
    body = {"messages": [{"role": "system", "content": "Pinned by an operator. " * 20}], "name": "all"}
    info = httpx.post(f"{fleet.url}/v1/system_prompts", json=body, timeout=60).json()
    assert (info["engines"], info["pin"]) == ([0, 1], "hard")
    for rank in ("0", "1"):
        answer = ask(fleet, "Pinned by an operator. " * 20, "Hi", **{"X-data-parallel-rank": rank}).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 50
    gone = httpx.delete(f"{fleet.url}/v1/system_prompts/{info['id']}")
    assert gone.status_code == 200
    assert httpx.delete(f"{fleet.url}/v1/system_prompts/{info['id']}").status_code == 404


@pytest.mark.parametrize("rank", ["2", "-1", "x"])
def test_a_client_names_an_engine_that_there_is(fleet: ServerProcess, rank: str) -> None:
    before = samples(fleet, "prompt_tokens")
    assert ask(fleet, "", "Hi", **{"X-data-parallel-rank": "1"}).status_code == 200
    after = samples(fleet, "prompt_tokens")
    assert after["0"] == before["0"] and after["1"] > before["1"]
    answer = ask(fleet, "", "Hi", **{"X-data-parallel-rank": rank})
    assert answer.status_code == 400
    assert "X-data-parallel-rank must be" in answer.json()["error"]["message"]


@pytest.mark.nightly
def test_one_engines_death_is_an_error_for_its_own_requests_only(
    server_factory: ServerFactory, tiny_model_dir: Path
) -> None:
    fleet = server_factory("--model", str(tiny_model_dir), *FLAGS, "--engine-restarts", "1", cold=True)
    engines = [p for p in psutil.Process(fleet.process.pid).children() if "core_process" in " ".join(p.cmdline())]
    assert len(engines) == 2
    with ThreadPoolExecutor(2) as threads:
        open_requests = [
            threads.submit(ask, fleet, "", "Go on", 900, **{"X-data-parallel-rank": str(i)}) for i in range(2)
        ]
        while not all(samples(fleet, "num_requests_running").values()):
            time.sleep(0.02)
        engines[0].kill()
        codes = sorted(one.result().status_code for one in open_requests)
    assert codes == [200, 503] or codes == [200, 500]
    # Those that come meanwhile go to the other one.
    for i in range(4):
        assert ask(fleet, SYSTEMS[i], "Still there?").status_code == 200
    assert httpx.get(f"{fleet.url}/health").status_code == 200
    deadline = time.monotonic() + 90
    while any(ask(fleet, "", "Hi", **{"X-data-parallel-rank": str(i)}).status_code != 200 for i in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.3)
