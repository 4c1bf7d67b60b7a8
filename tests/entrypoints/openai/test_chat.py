"""`POST /v1/chat/completions`: shapes of answers, streamed and not, and what usage says."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

SYSTEM = {"role": "system", "content": "You answer in one short sentence."}
USER = {"role": "user", "content": "Name a colour."}


@pytest.fixture
def client(server):
    with httpx.Client(verify=False, base_url=server.url, timeout=120) as client:
        yield client


def chat(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"messages": [SYSTEM, USER], "max_tokens": 6, "temperature": 0, **fields}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(client: httpx.Client, path: str = "/v1/chat/completions", **fields: Any) -> list[dict[str, Any]]:
    """Chunks of a streamed answer; checks that each line is an event and that `[DONE]` ends them."""
    body = {"max_tokens": 6, "temperature": 0, "stream": True, **fields}
    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    events = [line.removeprefix("data: ") for line in lines]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_answer_has_the_shape_of_the_openai_api(client, server):
    answer = chat(client, model=server.model)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == server.model
    assert isinstance(answer["created"], int)
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] in ("stop", "length")
    assert choice["stop_reason"] is None
    assert choice["logprobs"] is None


def test_usage_adds_up_and_counts_cached_tokens(client):
    usage = chat(client)["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["completion_tokens"] <= 6
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]


def test_length_is_the_reason_when_max_tokens_ends_the_answer(client):
    answer = chat(client, max_tokens=3, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_max_completion_tokens_wins_over_max_tokens(client):
    assert chat(client, max_tokens=50, max_completion_tokens=2, ignore_eos=True)["usage"]["completion_tokens"] == 2


def test_more_tokens_than_the_context_leaves_are_cut(client):
    long = {"role": "user", "content": "word " * 2000}
    answer = chat(client, messages=[long], max_tokens=100_000, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == 2048


def test_streamed_text_equals_the_text_at_once(client):
    chunks = stream(client, messages=[SYSTEM, USER])
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert text == chat(client)["choices"][0]["message"]["content"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] in ("stop", "length")
    assert not any(reasons[:-1])
    assert not any("usage" in chunk for chunk in chunks)


def test_usage_comes_last_in_a_stream_that_asks_for_it(client):
    chunks = stream(client, messages=[USER], stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["prompt_tokens"] > 0
    assert "cached_tokens" in chunks[-1]["usage"]["prompt_tokens_details"]
    assert all(chunk.get("usage") is None for chunk in chunks[:-1])


def test_the_fingerprint_is_the_same_in_answers_and_at_the_end_of_streams(client):
    mark = chat(client)["system_fingerprint"]
    assert mark.startswith("vllm-")
    chunks = stream(client, messages=[USER], n=2)
    marked = [chunk for chunk in chunks if "system_fingerprint" in chunk]
    assert [chunk["choices"][0]["finish_reason"] is not None for chunk in marked] == [True, True]
    assert {chunk["system_fingerprint"] for chunk in marked} == {mark}


def test_empty_stream_options_ask_for_nothing(client):
    assert chat(client, stream_options={})["choices"]


def test_usage_comes_with_every_chunk_that_asks_for_it(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = stream(client, messages=[USER], stream_options=options, ignore_eos=True)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 6


def test_n_answers_have_their_own_index(client):
    answer = chat(client, n=3, temperature=1.0, seed=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]


def test_n_streams_are_told_apart_by_index(client):
    chunks = stream(client, messages=[USER], n=2, temperature=1.0)
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert own[-1]["finish_reason"] is not None


def test_logprobs_tell_tokens_bytes_and_alternatives(client):
    choice = chat(client, logprobs=True, top_logprobs=2, ignore_eos=True)["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 6
    for entry in content:
        assert entry["logprob"] <= 0
        assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"]
        assert len(entry["top_logprobs"]) == 2
    text = b"".join(bytes(entry["bytes"]) for entry in content).decode(errors="replace")
    assert text.startswith(choice["message"]["content"][:5])


def test_logprobs_without_alternatives(client):
    content = chat(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert content[0]["top_logprobs"] == []


def test_streamed_logprobs_cover_every_token(client):
    chunks = stream(client, messages=[USER], logprobs=True, top_logprobs=1, ignore_eos=True)
    entries = [e for chunk in chunks for e in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert len(entries) == 6


def test_tokens_can_be_named_by_id(client):
    answer = chat(client, logprobs=True, return_tokens_as_token_ids=True, return_token_ids=True)
    choice = answer["choices"][0]
    names = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert names == [f"token_id:{token_id}" for token_id in choice["token_ids"]]
    assert len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]


def test_streamed_token_ids(client):
    chunks = stream(client, messages=[USER], return_token_ids=True, ignore_eos=True)
    assert chunks[0]["prompt_token_ids"]
    assert len([t for chunk in chunks for t in chunk["choices"][0].get("token_ids", [])]) == 6


def test_prompt_logprobs_have_an_entry_for_each_prompt_token(client):
    answer = chat(client, prompt_logprobs=1)
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert answer["prompt_logprobs"][0] is None
    assert all(entry for entry in answer["prompt_logprobs"][1:])


def test_a_stream_that_asks_for_no_prompt_logprobs_by_number_reads_its_pinned_prompt(client):
    messages = [{"role": "system", "content": "You count sheep, one by one. " * 10}, USER]
    plain = chat(client, messages=messages)
    chunks = stream(client, messages=messages, prompt_logprobs=0, stream_options={"include_usage": True})
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 50
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks[:-1])
    assert text == plain["choices"][0]["message"]["content"]


def test_text_parts_are_read_as_text(client):
    parts = [{"type": "text", "text": "Name a colour."}]
    assert (
        chat(client, messages=[SYSTEM, {"role": "user", "content": parts}])["usage"]["prompt_tokens"]
        == chat(client, messages=[SYSTEM, USER])["usage"]["prompt_tokens"]
    )


def test_a_role_the_template_knows_nothing_about_is_accepted(client):
    assert chat(client, messages=[{"role": "critic", "content": "Hm."}, USER])["choices"]


def test_the_last_message_can_be_continued_and_echoed(client):
    messages = [USER, {"role": "assistant", "content": "A colour is"}]
    answer = chat(client, messages=messages, continue_final_message=True, add_generation_prompt=False, echo=True)
    assert answer["choices"][0]["message"]["content"].startswith("A colour is")
    assert answer["prompt_logprobs"] is None
    parts = [{"type": "text", "text": "A colour"}, {"type": "text", "text": "is"}]
    messages = [USER, {"role": "assistant", "content": parts}]
    going_on = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False, "echo": True}
    answer = chat(client, **going_on, logprobs=True, top_logprobs=2)
    text = answer["choices"][0]["message"]["content"]
    assert text.startswith("A colour\nis")
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert all(len(row) in (2, 3) for row in answer["prompt_logprobs"][1:])
    chunks = stream(client, **going_on, logprobs=True, top_logprobs=2)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == text


def test_tools_are_shown_to_the_model_when_tool_choice_is_none(client):
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
    assert "tool_calls" not in chat(client, tools=tools, tool_choice="none")["choices"][0]["message"]


def test_unknown_fields_are_accepted_and_logged_once(client, server):
    for _ in range(2):
        chat(client, favourite_colour_of_this_test="blue")
    assert server.log_path.read_text().count("favourite_colour_of_this_test") == 1


def test_the_clients_request_id_comes_back(client):
    response = client.post(
        "/v1/chat/completions", json={"messages": [USER], "max_tokens": 1}, headers={"X-Request-Id": "my-id-1"}
    )
    assert response.headers["x-request-id"] == "my-id-1"
    assert response.json()["id"] == "chatcmpl-my-id-1"


def test_two_requests_may_bear_the_same_id(client):
    first, second = (chat(client, request_id="twin") for _ in range(2))
    assert first["id"] == second["id"] == "chatcmpl-twin"


def test_a_cache_salt_changes_nothing_but_who_shares(client):
    assert chat(client, cache_salt="tenant-7")["choices"][0]["message"] == chat(client)["choices"][0]["message"]
