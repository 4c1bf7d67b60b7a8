"""`--enable-log-requests` and its kin: what an operator reads, and what no user can write."""

from __future__ import annotations

import ast
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server_process import ServerProcess

KEY, SALT = "sk-secret", "the-salt"
FORGED = "INFO 01-01 00:00:00 [vllm] Received request forged"
PROMPT = f"One\n{FORGED}\r\x1b[2J\u2028 two three" + " and so on" * 5 + " to the end"


@pytest.fixture(scope="module")
def verbose(server_factory: Callable[..., ServerProcess], tiny_model_dir: Path) -> Iterator[ServerProcess]:
    size = ("--model", str(tiny_model_dir), "--max-model-len", "512", "--num-gpu-blocks-override", "64")
    flags = ("--enable-log-requests", "--enable-log-outputs", "--max-log-len", "80", "--api-key", KEY)
    server = server_factory(*size, *flags, env={"VLLM_LOGGING_LEVEL": "DEBUG"}, api_key=KEY, cold=True)
    yield server
    server.stop()


def ask(server: ServerProcess, path: str, name: str | bytes, **fields: Any) -> httpx.Response:
    headers = httpx.Headers([("Authorization", f"Bearer {KEY}"), ("X-Request-Id", name)])
    return httpx.post(f"{server.url}{path}", json={"cache_salt": SALT, **fields}, headers=headers, timeout=60)


def log(server: ServerProcess, *words: str, count: int = 1) -> list[str]:
    """The lines that hold all of these words, once there are `count`."""
    deadline = time.monotonic() + 30
    while True:
        # Not splitlines: what other separators do is what is tested.
        text = server.log_path.read_bytes().decode()
        found = [line for line in text.split("\n") if all(word in line for word in words)]
        if len(found) >= count:
            assert len(found) == count, found
            return found
        assert time.monotonic() < deadline, text
        time.sleep(0.05)


def test_a_request_and_its_answer_are_lines_that_no_user_can_forge(verbose):
    fields = {"prompt": PROMPT, "max_tokens": 4, "stop": [f"never\n{FORGED}"], "seed": 3, "temperature": 0.5}
    answer = ask(verbose, "/v1/completions", "plain", **fields).json()["choices"][0]
    (output,) = log(verbose, "Generated response cmpl-plain-", "output: ")
    assert output.startswith("INFO")
    assert output.endswith(f"output: {answer['text'][:80]!r}, finish_reason: {answer['finish_reason']}")
    (received,) = log(verbose, "Received request cmpl-plain-")
    assert received.startswith("INFO") and "seed=3" in received and "temperature=0.5" in received
    assert f"never\\n{FORGED}" in received and "the end" not in received
    (prompt,) = log(verbose, "Request cmpl-plain-", "prompt_token_ids: [")
    assert prompt.startswith("DEBUG") and f"prompt: {PROMPT[:80]!r}" in prompt and "the end" not in prompt
    (tokens,) = log(verbose, "Generated response cmpl-plain-", "output_token_ids: [")
    assert tokens.startswith("DEBUG")
    text = verbose.log_path.read_bytes().decode()
    assert f"\n{FORGED}" not in text
    assert "\x1b" not in text and "\u2028" not in text
    assert KEY not in text and SALT not in text


def test_an_id_that_cannot_be_printed_stays_in_its_line(verbose):
    ask(verbose, "/v1/completions", b"id\x85x", prompt="a", max_tokens=1)
    log(verbose, "Received request cmpl-id\\x85x-")


def test_streams_are_logged_by_the_piece_and_whole(verbose):
    fields = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "ignore_eos": True, "stream": True}
    body = ask(verbose, "/v1/chat/completions", "stream", **fields).text
    chunks = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    (whole,) = log(verbose, "Generated response chatcmpl-stream-", "(streaming complete)", "output: ")
    assert whole.endswith(f"output: {text[:80]!r}, finish_reason: length")
    # Tokens that come faster than they can be sent are one piece.
    lines = verbose.log_path.read_bytes().decode().split("\n")
    deltas = [
        line for line in lines if "chatcmpl-stream-" in line and "(streaming delta)" in line and "output: " in line
    ]
    pieces = [re.search(r"output: (.*), finish_reason: ", line)[1] for line in deltas]
    assert "".join(map(ast.literal_eval, pieces)) == text and 1 < len(pieces) <= 12


def test_a_beam_search_is_one_request_with_several_outputs(verbose):
    fields = {"prompt": [1, 2, 3], "use_beam_search": True, "n": 2, "max_tokens": 3, "ignore_eos": True}
    choices = ask(verbose, "/v1/completions", "beams", **fields).json()["choices"]
    outputs = log(verbose, "Generated response cmpl-beams-", "output: ", count=2)
    for index, (line, choice) in enumerate(zip(outputs, choices, strict=True)):
        assert f"index: {index}, output: {choice['text'][:80]!r}, finish_reason: length" in line
    assert "BeamSearchParams(beam_width=2" in log(verbose, "Received request cmpl-beams-")[0]
    assert "prompt: None, prompt_token_ids: [1, 2, 3]." in log(verbose, "Request cmpl-beams-", "DEBUG")[0]


def test_a_request_that_is_left_is_logged_as_aborted(verbose):
    body = {"prompt": "Once", "max_tokens": 500, "ignore_eos": True, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": "left"}
    with httpx.stream("POST", f"{verbose.url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
        next(answer.iter_lines())
    log(verbose, "Request cmpl-left-", "aborted.")


def test_unless_it_is_asked_for_nothing_is_logged(server):
    words = "Nobody writes these words down."
    body = {"prompt": words, "max_tokens": 2, "stop": ["a stop to tell"]}
    response = httpx.post(f"{server.url}/v1/completions", json=body, headers={"X-Request-Id": "quiet"}, timeout=60)
    assert response.status_code == 200
    text = server.log_path.read_text()
    assert words not in text and "a stop to tell" not in text and "Received request" not in text
