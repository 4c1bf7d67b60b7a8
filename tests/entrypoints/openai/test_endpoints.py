"""The other routes of the server, and what happens when a client leaves."""

from __future__ import annotations

import json
import re
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

USER = {"role": "user", "content": "Write a very long story about a lighthouse."}


@pytest.fixture
def client(server):
    with httpx.Client(verify=False, base_url=server.url, timeout=120) as client:
        yield client


def gauge(client: httpx.Client, name: str) -> float:
    found = re.findall(rf"^vllm:{name}(?:{{.*}})? (\S+)$", client.get("/metrics").text, re.M)
    assert found, f"there is no metric {name}"
    return sum(map(float, found))


def num_aborted(client: httpx.Client) -> float:
    pattern = r'^vllm:request_success_total{.*finished_reason="abort".*} (\S+)$'
    return sum(map(float, re.findall(pattern, client.get("/metrics").text, re.M)))


def send(url: str, path: str, body: dict[str, Any]) -> socket.socket:
    """Sends a request and returns its connection, for clients that do not stay for the answer."""
    address, content = urlsplit(url), json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((address.hostname, address.port), timeout=60)
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def test_models(client, server):
    (card,) = client.get("/v1/models").json()["data"]
    assert card["id"] == server.model
    assert card["object"] == "model"
    assert card["owned_by"] == "vllm"
    assert card["max_model_len"] == 2048
    assert client.get(f"/v1/models/{server.model}").json()["id"] == server.model


def test_health_ping_version_load(client):
    assert client.get("/health").status_code == 200
    assert client.get("/ping").status_code == client.post("/ping").status_code == 200
    assert re.match(r"\d+\.\d+", client.get("/version").json()["version"])
    assert client.get("/load").json()["server_load"] >= 0


def test_development_routes_are_closed(client):
    assert client.get("/server_info").status_code == 404
    assert client.post("/reset_prefix_cache").status_code == 404


def test_routes_of_other_kinds_of_models_say_what_is_missing(client, server):
    words = {"/v1/embeddings": "pooling model", "/v1/load_lora_adapter": "LoRA", "/v1/nothing": "no /v1/nothing here"}
    for path, text in words.items():
        answer = client.post(path, json={"model": server.model, "input": "x"})
        assert answer.status_code == 404
        assert text in answer.json()["error"]["message"]


def test_tokenize_and_back(client):
    text = "Hello, wörld 123 😀"
    answer = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 2048
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}


def test_tokenize_messages_as_chat_does(client):
    answer = client.post("/tokenize", json={"messages": [USER]}).json()
    chat = client.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 1}).json()
    assert answer["count"] == chat["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/v1/system_prompts", {}, None),
        ("/v1/system_prompts", {"prompt": ""}, "prompt"),
        ("/v1/system_prompts", {"prompt": "x", "ttl": 0}, "ttl"),
        ("/v1/system_prompts", {"prompt": "x", "name": ""}, "name"),
        ("/v1/system_prompts", {"messages": [USER]}, "messages"),
        ("/v1/system_prompts", {"messages": []}, "messages"),
    ],
)
def test_wrong_requests_are_400(client, path, body, param):
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_detokenize_nothing(client):
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_system_prompts_can_be_pinned_shown_and_released(client):
    messages = [{"role": "system", "content": "You are the keeper of a lighthouse in a test of the HTTP server."}]
    made = client.post("/v1/system_prompts", json={"messages": messages, "name": "keeper"}).json()
    assert made["object"] == "system_prompt"
    assert made["name"] == "keeper"
    assert made["num_tokens"] > 10
    path = f"/v1/system_prompts/{made['id']}"
    assert made["id"] in [entry["id"] for entry in client.get("/v1/system_prompts").json()["data"]]
    assert client.get(path).json()["num_tokens"] == made["num_tokens"]
    assert client.delete(path).json()["deleted"] is True
    wait_for(lambda: client.get(path).status_code == 404)
    assert client.delete(path).status_code == 404


def test_metrics_are_prometheus_text(client):
    client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    for name in ("vllm:num_requests_running", "process_resident_memory_bytes", "python_info"):
        assert name in response.text


@pytest.mark.parametrize(
    ("path", "streamed"),
    [
        ("/v1/chat/completions", False),
        ("/v1/chat/completions", True),
        ("/v1/completions", False),
        ("/v1/completions", True),
        ("/v1/messages", True),
        ("/v1/responses", True),
    ],
)
def test_a_client_that_leaves_ends_its_request(client, server, path, streamed):
    wait_for(lambda: gauge(client, "num_requests_running") == 0)
    before = num_aborted(client)
    body = {"ignore_eos": True, "stream": streamed}
    if path == "/v1/responses":
        body |= {"input": "Once", "max_output_tokens": 1900}
    else:
        body |= {"messages": [USER], "prompt": ["Once", "Twice"], "max_tokens": 1900}
    with send(server.url, path, body) as leaver:
        received = b""
        while streamed and not re.search(rb"\n(data|event): ", received):
            received += leaver.recv(4096)
        wait_for(lambda: gauge(client, "num_requests_running") > 0)
    wait_for(lambda: num_aborted(client) == before + (2 if path == "/v1/completions" else 1))
    wait_for(lambda: gauge(client, "num_requests_running") == 0)


def test_pages_of_other_sites_may_not_use_the_server_unless_told(client):
    headers = {"Origin": "http://elsewhere", "Access-Control-Request-Method": "POST"}
    for response in (
        client.options("/v1/chat/completions", headers=headers),
        client.get("/v1/models", headers=headers),
    ):
        assert not [name for name in response.headers if name.startswith("access-control-")]


def test_health_and_models_answer_head(client, server):
    for path in ("/health", "/v1/models", f"/v1/models/{server.model}"):
        response = client.head(path)
        assert (response.status_code, response.content) == (200, b"")
    assert client.head("/v1/models/nobody").status_code == 404


def test_a_mark_of_byte_order_before_json_is_no_harm(client):
    for padding in ("", "x " * 20_000):
        body = b"\xef\xbb\xbf" + json.dumps({"prompt": "Hi", "max_tokens": 1, "user": padding}).encode()
        response = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 200, response.text


def test_errors_of_the_context_have_the_sentences_that_clients_read(client):
    sentence = r"maximum context length is 2048 tokens\..*your prompt contains at least (\d+) input tokens"
    long = {"role": "user", "content": "word " * 3000}
    for path, body in (
        ("/v1/chat/completions", {"messages": [long]}),
        ("/v1/completions", {"prompt": long["content"]}),
        ("/v1/completions", {"prompt": [1] * 3000}),
        ("/v1/responses", {"input": [long]}),
        ("/v1/responses", {"input": "x" * 10**6}),
    ):
        message = client.post(path, json=body).json()["error"]["message"]
        found = re.search(sentence, message)
        assert found and int(found[1]) >= 2048, message
    for content in (long["content"], "x" * 10**6):
        error = client.post("/v1/messages", json={"max_tokens": 1, "messages": [long | {"content": content}]}).json()
        assert re.fullmatch(r"prompt is too long: \d{4,} tokens > 2048 maximum", error["error"]["message"])
