"""`--uds`, and with it `--hf-overrides`: a server of the tiny model, started once for both."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time

import httpx
import pytest

from vllm.entrypoints.http.listening import bind_socket, listen, unix_socket
from vllm.exceptions import StartupError


def test_a_unix_socket_in_place_of_a_port(nursery, tiny_model_dir, tmp_path):
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    overrides = '{"max_position_embeddings": 77}'
    args = ["--uds", str(path), "--hf-overrides", overrides, "--num-gpu-blocks-override", "16"]
    command = [*nursery.command("vllm.entrypoints.cli.main"), "serve", str(tiny_model_dir), *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://localhost", timeout=60) as client:
            for _ in range(600):
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").status_code == 200:
                        break
                assert process.poll() is None
                time.sleep(0.1)
            assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 77
            answer = client.post("/v1/completions", json={"prompt": "One", "max_tokens": 2})
            assert answer.json()["usage"]["completion_tokens"] == 2
            refused = client.get("/v1/system_prompts")
            assert refused.status_code == 403
            assert "over a Unix socket (--uds) it needs --admin-api-key" in refused.json()["error"]["message"]
            # A second server would see that this one lives, and leave its socket alone.
            with pytest.raises(StartupError, match=f"--uds {path}: Address already in use"), unix_socket(str(path)):
                pass
            assert client.get("/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        log = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0
    assert f"on {path}" in log
    assert not list(tmp_path.glob("api.sock*"))


def test_a_socket_that_does_not_listen_yet_is_left_alone(tmp_path):
    path = tmp_path / "api.sock"
    with unix_socket(str(path)) as first:
        with pytest.raises(StartupError, match="Address already in use"), unix_socket(str(path)):
            pass
        first.listen()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not list(tmp_path.iterdir())


def test_a_server_without_a_lock_is_seen_too(tmp_path):
    path = str(tmp_path / "api.sock")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        with pytest.raises(StartupError, match="Address already in use"), unix_socket(path):
            pass
    with unix_socket(path):
        pass


def test_only_its_own_socket_is_removed(tmp_path):
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as other:
        with unix_socket(str(path)):
            path.rename(tmp_path / "moved")
            other.bind(str(path))
        assert path.is_socket()


def test_what_is_no_socket_is_left_alone(tmp_path):
    path = tmp_path / "notes"
    path.write_text("mine")
    for name in (str(path), str(tmp_path / "no" / "folder"), str(tmp_path / ("x" * 200))):
        with pytest.raises(StartupError, match="Cannot listen on --uds"), unix_socket(name):
            pass
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_where_it_cannot_listen_is_named(tmp_path):
    path = str(tmp_path / "api.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:  # Datagram sockets cannot listen.
        deaf.bind(path)
        with pytest.raises(StartupError, match=rf"^Cannot listen on --uds {path}: .*\. Choose another path\.$"):
            listen(deaf, path)
    with bind_socket("127.0.0.1", 0) as first, socket.socket() as second:
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        second.bind(first.getsockname())
        first.listen()
        with pytest.raises(StartupError, match=rf"127\.0\.0\.1 port {first.getsockname()[1]}: Address already in use"):
            listen(second, None)
