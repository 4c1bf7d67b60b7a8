"""The server's OpenAPI document, and thousands of requests made from it."""

from __future__ import annotations

import time

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from vllm.entrypoints.assembly import BODIES

CASES_OF_A_KIND = 110
# A request that says nothing of its length may run to the end of the context: a short one keeps thousands short.
MAX_MODEL_LEN = "128"


def test_bodies_are_described(server):
    document = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    with_body = {
        (method, path)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if "requestBody" in operation
    }
    assert with_body == set(BODIES)
    chat = document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert {"messages", "temperature", "max_tokens", "stream"} <= chat.keys()
    for method, path in BODIES:
        content = document["paths"][path][method]["requestBody"]["content"]
        name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert name in document["components"]["schemas"]


def test_answers_are_listed(server):
    document = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            listed = operation["responses"].keys()
            assert {"200", "401", "500", "503"} <= listed, path
            assert "422" not in listed, path
            for status in listed - {"200"}:
                schema = operation["responses"][status]["content"]["application/json"]["schema"]
                assert schema["$ref"].rpartition("/")[2] in document["components"]["schemas"]
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert chat.keys() == {"200", "400", "401", "404", "408", "413", "415", "500", "503"}
    assert "text/event-stream" in chat["200"]["content"]
    said = httpx.post(f"{server.url}/v1/messages", json={}, timeout=60).json()
    assert said.keys() == document["components"]["schemas"]["AnthropicErrorResponse"]["properties"].keys()


@pytest.mark.nightly
def test_no_request_that_the_document_allows_or_forbids_breaks_the_server(server_factory, tiny_model_dir):
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    server = server_factory(
        *("--model", str(tiny_model_dir), "--max-model-len", MAX_MODEL_LEN, "--num-gpu-blocks-override", "256"),
        env={"VLLM_SERVER_DEV_MODE": "1"},
    )
    children = [child.pid for child in psutil.Process(server.process.pid).children(recursive=True)]
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", wait_for_schema=60)
    operations = [result.ok() for result in schema.get_all_operations()]
    seen: list[tuple[str, int]] = []
    listed = {
        (path, method.upper()): {int(status) for status in operation["responses"]}
        for path, operations_of in httpx.get(f"{server.url}/openapi.json", timeout=60).json()["paths"].items()
        for method, operation in operations_of.items()
    }

    def check(case) -> None:
        answer = case.call(base_url=server.url, timeout=120)
        seen.append((case.path, answer.status_code))
        assert answer.status_code in listed[case.path, case.method.upper()], f"{case.as_curl_command()}\n{answer.text}"
        assert answer.status_code < 500 or answer.status_code == 503, f"{case.as_curl_command()}\n{answer.text}"

    try:
        for operation in operations:
            # Where there is no body, nothing can be asked wrongly: parameters are strings, of any kind.
            for mode in schemathesis.GenerationMode if operation.body else [schemathesis.GenerationMode.POSITIVE]:
                options = settings(
                    max_examples=CASES_OF_A_KIND,
                    deadline=None,
                    database=None,
                    derandomize=True,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                options(given(case=operation.as_strategy(generation_mode=mode))(check))()
        # Whatever put the engine to sleep is over now.
        httpx.post(f"{server.url}/wake_up", timeout=60)
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
        deadline = time.monotonic() + 60
        idle = ('num_requests_running{engine="0"', 'num_requests_waiting{engine="0"', 'kv_cache_usage_perc{engine="0"')
        while True:
            lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
            left = [line for line in lines if line.startswith(tuple(f"vllm:{n}" for n in idle))]
            if [line.split()[-1] for line in left] == ["0.0"] * 3:
                break
            assert time.monotonic() < deadline, left
            time.sleep(0.2)
        assert [child.pid for child in psutil.Process(server.process.pid).children(recursive=True)] == children
    finally:
        server.stop()
    assert "Traceback" not in server.log_path.read_text()
    assert len(seen) >= 2000
    assert {status for _, status in seen} >= {200, 400}
