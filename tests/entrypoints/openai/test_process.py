"""The server as a process: how it starts, refuses to start, drains, and ends."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from server_process import free_port
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.exceptions import StartupError
from vllm.platforms import CudaPlatform

LONG = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True}


@pytest.fixture
def start(server_factory, tiny_model_dir):
    """Starts a server of the tiny model; stops it after the test."""
    servers = []

    def start_server(*args: str, **kwargs):
        servers.append(
            server_factory("--model", str(tiny_model_dir), "--num-gpu-blocks-override", "256", *args, **kwargs)
        )
        return servers[-1]

    yield start_server
    for server in servers:
        server.stop()


def engine_process(server) -> psutil.Process:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(child for child in children if "vllm.engine.core_process" in " ".join(child.cmdline()))


def test_version_and_help_end_at_once():
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert run("--version").stdout.strip()[0].isdigit()
    assert "serve" in run("--help").stdout
    assert "HTTP server" in run("serve", "--help").stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["/no/such/model"], "/no/such/model"),
        (["a", "--model", "b"], "Two models"),
        (["--quantization", "awq"], "--quantization"),
        (["--enable-auto-tool-choice"], "--tool-call-parser"),
        (["--host", "203.0.113.5"], "203.0.113.5"),
        (["--ssl-keyfile", "/no/such/file"], "/no/such/file"),
    ],
)
def test_what_cannot_start_says_so_in_one_line(run_vllm, args, words):
    done = run_vllm("serve", *args)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert words in last


def test_a_port_in_use_is_noticed_before_the_model_loads(run_vllm, tiny_model_dir):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run_vllm("serve", tiny_model_dir, "--host", "127.0.0.1", "--port", str(port))
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"error: Cannot listen on 127.0.0.1 port {port}: Address already in use. Choose another with --host and --port."
    )


def test_nothing_answers_while_the_model_loads(tiny_model_dir, tmp_path: Path):
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(tiny_model_dir), "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*command, "--num-gpu-blocks-override", "256"], stdout=log, stderr=log)
    statuses = []
    try:
        while process.poll() is None and 200 not in statuses:
            with contextlib.suppress(httpx.TransportError):
                statuses.append(httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code)
            time.sleep(0.05)
        assert statuses == [200]
        answer = httpx.post(
            f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "a", "max_tokens": 1}, timeout=60
        )
        assert answer.status_code == 200
    finally:
        process.terminate()
        assert process.wait(30) == 0
    text = (tmp_path / "log").read_text()
    for words in ("Model: ", "dtype ", "KV cache: 4096 tokens", "pinned", f":{port}/v1"):
        assert words in text


@pytest.mark.nightly
def test_a_signal_ends_the_loading(tiny_model_dir):
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        str(tiny_model_dir),
        "--port",
        str(free_port()),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while not children and time.monotonic() < deadline:
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_the_api_key_guards_the_running_server(start):
    server = start("--api-key", "one", "--api-key", "two", api_key="one")
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
    for path in ("/v1/models", "/v1/system_prompts", "/docs", "/openapi.json", "/load", "/nothing"):
        assert httpx.get(f"{server.url}{path}", timeout=60).status_code == 401
        assert (
            httpx.get(f"{server.url}{path}", headers={"Authorization": "Bearer three"}, timeout=60).status_code == 401
        )
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    assert httpx.get(f"{server.url}/v1/models", headers=two, timeout=60).status_code == 200
    body = {"input": "Hello", "max_output_tokens": 1}
    response = httpx.post(f"{server.url}/v1/responses", json=body, headers=one, timeout=60).json()
    assert httpx.get(f"{server.url}/v1/responses/{response['id']}", headers=one, timeout=60).status_code == 200
    for method in ("GET", "DELETE"):
        assert httpx.request(method, f"{server.url}/v1/responses/{response['id']}", headers=two).status_code == 404


def test_flags_of_the_http_layer(start, tmp_path: Path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}, {{ enable_thinking }}, {{ reasoning_effort }}"
    )
    rendering = ["--chat-template", str(template), "--default-chat-template-kwargs"]
    rendering.append('{"enable_thinking": false, "reasoning_effort": "low"}')
    flags = ["--root-path", "/api", "--enable-force-include-usage", "--enable-request-id-headers"]
    names = ["--served-model-name", "one", "two", "--fingerprint-mode", "custom", "--fingerprint-value", "hash"]
    server = start(*flags, *names, *rendering, "--allowed-origins", '["http://a"]', "--disable-fastapi-docs")
    assert "Warning" not in server.log_path.read_text()
    with httpx.Client(verify=False, base_url=server.url, timeout=60) as client:
        # A proxy may take the prefix off, or leave it.
        for prefix in ("", "/api"):
            models = client.get(f"{prefix}/v1/models", headers={"Origin": "http://b"})
            assert [card["id"] for card in models.json()["data"]] == ["one", "two"]
            assert "access-control-allow-origin" not in models.headers
            allowed = client.get(f"{prefix}/v1/models", headers={"Origin": "http://a"})
            assert allowed.headers["access-control-allow-origin"] == "http://a"
            assert len(models.headers["x-request-id"]) == 32
            refused = client.post(f"{prefix}/v1/messages", json={"model": "three"})
            assert refused.json()["type"] == "error"
        assert client.get("/openapi.json").status_code == 404
        chat = {"model": "two", "messages": [{"role": "user", "content": "Hi"}]}
        for path, body in (("chat/completions", chat), ("completions", {"model": "two", "prompt": "Hi"})):
            text = client.post(f"/v1/{path}", json=body | {"stream": True, "max_tokens": 2}).text
            *others, last = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            assert last["usage"]["completion_tokens"] <= 2
            assert last["choices"] == []
            assert (last["model"], last["system_fingerprint"]) == ("two", "hash")
            assert not any("system_fingerprint" in chunk or "usage" in chunk for chunk in others)
        own = {"enable_thinking": False, "reasoning_effort": "max"}
        for fields, want in (
            ({}, "False, low"),
            ({"chat_template_kwargs": own}, "False, max"),
            ({"reasoning_effort": "high"}, "True, high"),
            ({"reasoning_effort": "none"}, "False, none"),
            ({"reasoning_effort": "high", "chat_template_kwargs": own}, "False, high"),
        ):
            body = chat | {"max_tokens": 1, "return_token_ids": True} | fields
            ids = client.post("/v1/chat/completions", json=body).json()["prompt_token_ids"]
            assert client.post("/detokenize", json={"tokens": ids}).json()["prompt"] == f"Hi, {want}"


def test_development_routes_open_in_development_mode(start):
    server = start("--max-model-len", "2048", env={"VLLM_SERVER_DEV_MODE": "1"})
    assert httpx.get(f"{server.url}/server_info", timeout=60).json()["vllm_config"]["model"]["max_model_len"] == 2048
    with httpx.Client(verify=False, base_url=server.url, timeout=60) as client:
        chat = {
            "messages": [{"role": "system", "content": "Be brief. " * 40}, {"role": "user", "content": "Hi. " * 40}]
        }

        def cached_tokens() -> int:
            answer = client.post("/v1/chat/completions", json=chat | {"max_tokens": 1}).json()
            return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

        cached_tokens()
        with_suffix = cached_tokens()
        assert client.post("/reset_prefix_cache").status_code == 200
        pinned = cached_tokens()
        assert 100 < pinned < with_suffix
        assert cached_tokens() == with_suffix

        assert client.post("/sleep?level=2").json()["error"]["param"] == "level"
        assert client.get("/is_sleeping").json() == {"is_sleeping": False}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            long = {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True}
            open_request = pool.submit(client.post, "/v1/completions", json=long)
            wait_until_running(server)
            assert client.post("/sleep?level=1").status_code == 200
            assert client.get("/is_sleeping").json() == {"is_sleeping": True}
            assert client.get("/health").status_code == 200
            waiting = pool.submit(cached_tokens)
            time.sleep(0.5)
            assert not open_request.done() and not waiting.done()
            assert client.post("/wake_up").status_code == 200
            assert open_request.result().json()["usage"]["completion_tokens"] == 1500
            assert waiting.result() == pinned
        assert client.get("/is_sleeping").json() == {"is_sleeping": False}

        assert client.post("/sleep").status_code == 200
        assert client.post("/wake_up?tags=weights").status_code == 200
        assert client.get("/is_sleeping").json() == {"is_sleeping": True}
        assert client.post("/wake_up?tags=brain").json()["error"]["param"] == "tags"
        assert client.post("/wake_up?tags=kv_cache&tags=weights").status_code == 200
        assert client.get("/is_sleeping").json() == {"is_sleeping": False}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            open_request = pool.submit(client.post, "/v1/completions", json=long)
            wait_until_running(server)
            assert client.post("/pause").json() == {"status": "paused"}
            assert open_request.result().status_code == 503
            assert client.get("/is_paused").json() == {"is_paused": True}
            waiting = pool.submit(cached_tokens)
            assert client.post("/resume").json() == {"status": "resumed"}
            assert waiting.result() == pinned
        assert client.post("/pause?mode=sometimes").json()["error"]["param"] == "mode"


@pytest.fixture(scope="module")
def cold_server(server_factory, tiny_model_dir):
    """Started as users start one, so that its processes are what theirs are."""
    return server_factory("--model", str(tiny_model_dir), "--num-gpu-blocks-override", "256", cold=True)


@pytest.mark.skipif(CudaPlatform.is_available(), reason="GPUs compute with Triton")
def test_no_process_of_a_cpu_server_has_loaded_triton(cold_server):
    process = psutil.Process(cold_server.process.pid)
    processes = (process, *process.children(recursive=True))
    assert len(processes) > 1
    for each in processes:
        maps = Path(f"/proc/{each.pid}/maps").read_text()
        assert "libtorch" in maps
        assert "libtriton" not in maps


def test_sigterm_lets_open_requests_end(cold_server):
    """The last that its server does."""
    server = cold_server
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=LONG, timeout=120)
        wait_until_running(server)
        os.killpg(server.process.pid, signal.SIGTERM)  # as a supervisor does
        assert answer.result().json()["usage"]["completion_tokens"] == 1000
    assert server.process.wait(30) == 0


@pytest.mark.nightly
def test_a_second_signal_stops_at_once(start):
    server = start("--shutdown-timeout", "600", cold=True)
    engine = engine_process(server)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=LONG | {"max_tokens": 4000}, timeout=120)
        wait_until_running(server)
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: "Received SIGINT" in server.log_path.read_text())
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
        # Cut off: an error if there was time to say so, else a broken connection.
        with contextlib.suppress(httpx.TransportError):
            assert answer.result().status_code == 500
    assert not engine.is_running()


@pytest.mark.nightly
def test_when_the_engine_dies_requests_fail_and_it_is_started_again_as_often_as_allowed(start):
    server = start("--engine-restarts", "1", cold=True)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        whole = pool.submit(httpx.post, f"{server.url}/v1/completions", json=LONG, timeout=60)
        streamed = pool.submit(httpx.post, f"{server.url}/v1/completions", json=LONG | {"stream": True}, timeout=60)
        told = {"messages": [{"role": "user", "content": "Hi"}], "input": "Hi", "stream": True, "ignore_eos": True}
        message, response = (
            pool.submit(httpx.post, f"{server.url}{path}", json=told | {limit: 1000}, timeout=60)
            for path, limit in (("/v1/messages", "max_tokens"), ("/v1/responses", "max_output_tokens"))
        )
        wait_until_running(server, 4)
        os.kill(engine_process(server).pid, signal.SIGKILL)
        error = whole.result().json()["error"]
        assert error["code"] == whole.result().status_code == 503
        assert error["message"] == "The engine process has ended; it is being started again, try again soon."
        assert '"error"' in streamed.result().text
        assert streamed.result().text.endswith("data: [DONE]\n\n")
        for answer, name in ((message, "error"), (response, "response.failed")):
            assert answer.result().text.split("\n\n")[-2].startswith(f"event: {name}\n")
    long = f"{server.url}/v1/completions"
    for ask in (lambda: health(server), lambda: httpx.post(long, json=LONG, timeout=60).status_code):
        # This process may be held up until the engine serves again, which is logged before anybody can notice.
        assert ask() == 503 or "The engine serves again" in server.log_path.read_text()
    server.wait_until_healthy(60)
    before = metric(server, "generation_tokens_total")
    short = {"prompt": "Once", "max_tokens": 5, "ignore_eos": True}
    assert httpx.post(f"{server.url}/v1/completions", json=short, timeout=60).status_code == 200
    assert metric(server, "generation_tokens_total") == before + 5
    assert metric(server, "num_requests_running") == 0

    os.kill(engine_process(server).pid, signal.SIGKILL)
    wait_until(lambda: health(server) in (503, None))
    assert server.process.wait(30) == 1


def health(server) -> int | None:
    """Status of `/health`; None where nothing listens any more."""
    try:
        return httpx.get(f"{server.url}/health", timeout=60).status_code
    except httpx.TransportError:
        return None


def metric(server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    return float(next(line for line in text.splitlines() if line.startswith(f"vllm:{name}{{")).split()[-1])


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_until_running(server, count: int = 1) -> None:
    wait_until(lambda: httpx.get(f"{server.url}/load", timeout=60).json()["server_load"] >= count)


@pytest.mark.nightly
def test_an_engine_that_breaks_while_it_loads_ends_the_start_in_one_line(monkeypatch, tiny_model_dir, capfd):
    code = "from vllm.engine import core_process; core_process.EngineCore = None; core_process.main()"
    monkeypatch.setattr(AsyncLLMEngine, "process_command", [sys.executable, "-c", code])
    with pytest.raises(StartupError, match=r"ended with code 1 while it was loading; the lines above say why"):
        AsyncLLMEngine.from_engine_args(EngineArgs(model=str(tiny_model_dir)))
    errors = capfd.readouterr().err
    assert "TypeError" in errors
    assert "Fatal" not in errors
