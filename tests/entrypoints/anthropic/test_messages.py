"""`/v1/messages` as the `anthropic` SDK uses it, and as plain HTTP."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import pytest

SYSTEM = "You are the librarian of a small town, who answers in one short sentence and never gives a book away."
USER = {"role": "user", "content": "Name a colour."}
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
# The SDK has no argument for the temperature any more.
SDK_GREEDY: dict[str, Any] = {"max_tokens": 6, "extra_body": {"temperature": 0}}
CACHED = {"type": "ephemeral"}
TOOL = {"name": "lend", "description": "Lends a book.", "input_schema": {"type": "object", "properties": {}}}


@pytest.fixture
def sdk(server):
    with anthropic.Anthropic(base_url=server.url, api_key="EMPTY", max_retries=0) as client:
        yield client


@pytest.fixture
def client(server):
    with httpx.Client(verify=False, base_url=server.url, timeout=120) as client:
        yield client


def post(client: httpx.Client, path: str = "/v1/messages", **fields: Any) -> httpx.Response:
    return client.post(path, json={"messages": [USER], **GREEDY, **fields})


def stream(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    """Events of a streamed message; checks that each is named by its type."""
    with client.stream(
        "POST", "/v1/messages", json={"messages": [USER], **GREEDY, "stream": True, **fields}
    ) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert len(lines) % 2 == 0
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert [line.removeprefix("event: ") for line in lines[::2]] == [event["type"] for event in events]
    return events


def test_message(sdk, server):
    message = sdk.messages.create(model=server.model, system=SYSTEM, messages=[USER], **SDK_GREEDY)
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", server.model)
    assert [block.type for block in message.content] == ["text"]
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert 0 < message.usage.output_tokens <= 6


def test_message_is_the_chat_answer(sdk, client, server):
    message = sdk.messages.create(model=server.model, system=SYSTEM, messages=[USER], **SDK_GREEDY)
    chat = client.post(
        "/v1/chat/completions", json={"messages": [{"role": "system", "content": SYSTEM}, USER], **GREEDY}
    ).json()
    assert message.content[0].text == chat["choices"][0]["message"]["content"]


def test_streamed_message_equals_the_message_at_once(sdk, server):
    whole = sdk.messages.create(model=server.model, system=SYSTEM, messages=[USER], **SDK_GREEDY)
    with sdk.messages.stream(model=server.model, system=SYSTEM, messages=[USER], **SDK_GREEDY) as events:
        text = "".join(events.text_stream)
        final = events.get_final_message()
    assert text == final.content[0].text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert (
        final.usage.cache_read_input_tokens
        == whole.usage.cache_read_input_tokens + whole.usage.cache_creation_input_tokens
    )


def test_events_come_in_order(client):
    kinds = [event["type"] for event in stream(client)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_usage_tells_what_was_pinned_and_what_was_read(sdk, server):
    system = [{"type": "text", "text": "In this library, silence is golden. " * 20, "cache_control": CACHED}]
    asked = {"model": server.model, "system": system, "messages": [USER], **SDK_GREEDY}
    first = sdk.messages.create(**asked).usage
    assert first.cache_creation_input_tokens > 100
    assert first.cache_read_input_tokens == 0
    second = sdk.messages.create(**{**asked, "messages": [{"role": "user", "content": "Name an animal."}]}).usage
    assert second.cache_read_input_tokens == first.cache_creation_input_tokens
    assert second.cache_creation_input_tokens == 0
    assert 0 < second.input_tokens < 40
    counted = sdk.messages.count_tokens(model=server.model, system=system, messages=[USER]).input_tokens
    assert counted == first.input_tokens + first.cache_creation_input_tokens
    with sdk.messages.stream(**asked) as events:
        third = events.get_final_message().usage
    assert third.cache_read_input_tokens >= first.cache_creation_input_tokens
    assert third.input_tokens + third.cache_read_input_tokens == counted


def test_no_tokens_asked_for_pins_the_prompt_and_answers_nothing(sdk, client, server):
    system = "Warmth comes before words, says the stove. " * 20
    message = sdk.messages.create(model=server.model, system=system, messages=[USER], max_tokens=0)
    assert (message.content, message.stop_reason, message.usage.output_tokens) == ([], "max_tokens", 0)
    assert message.usage.cache_creation_input_tokens > 100
    assert post(client, system=system).json()["usage"]["cache_read_input_tokens"] > 100
    kinds = [event["type"] for event in stream(client, system=system, max_tokens=0)]
    assert kinds == ["message_start", "message_delta", "message_stop"]


def test_a_stop_sequence_is_named(client):
    text = post(client, max_tokens=12).json()["content"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    message = post(client, max_tokens=12, stop_sequences=[stop]).json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", stop)
    assert message["content"][0]["text"] == text[: text.index(stop)]
    delta = stream(client, max_tokens=12, stop_sequences=[stop])[-2]["delta"]
    assert delta == {"stop_reason": "stop_sequence", "stop_sequence": stop}


def test_max_tokens_is_the_reason_when_it_ends_the_answer(client):
    message = post(client, max_tokens=3, ignore_eos=True).json()
    assert (message["stop_reason"], message["usage"]["output_tokens"]) == ("max_tokens", 3)


def test_an_assistant_turn_at_the_end_is_continued(client):
    ended = [USER, {"role": "assistant", "content": "My favourite colour is"}]
    message = post(client, messages=ended).json()
    chat = client.post(
        "/v1/chat/completions",
        json={"messages": ended, "continue_final_message": True, "add_generation_prompt": False, **GREEDY},
    ).json()
    assert message["content"][0]["text"] == chat["choices"][0]["message"]["content"]


def test_blocks_of_a_turn_and_turns_that_follow_each_other_are_one_turn(client):
    def tokens(messages: list[dict[str, Any]], **fields: Any) -> int:
        response = post(client, "/v1/messages/count_tokens", messages=messages, **fields)
        assert response.status_code == 200, response.text
        return response.json()["input_tokens"]

    parts = [{"type": "text", "text": text} for text in ("One.", "Two.")]
    turns = [{"role": "user", "content": text} for text in ("One.", "Two.")]
    assert (
        tokens([{"role": "user", "content": parts}])
        == tokens(turns)
        == tokens([{"role": "user", "content": "One.Two."}])
    )
    assert tokens(turns, system=parts) == tokens(turns, system="One.Two.") != tokens(turns)


def test_tool_turns_are_read(client):
    messages = [
        USER,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "A book.", "signature": ""},
                {"type": "text", "text": "I shall look."},
                {"type": "tool_use", "id": "toolu_1", "name": "lend", "input": {"title": "Emma"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "Lent."}]},
                {"type": "text", "text": "Thank you."},
            ],
        },
    ]
    response = post(client, messages=messages, tools=[TOOL], tool_choice={"type": "none"})
    assert response.status_code == 200, response.text
    assert response.json()["stop_reason"] in ("end_turn", "max_tokens")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b"}]}]}, "input"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"stop_sequences": [5]}, "stop_sequences[0]"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": "x"}, "top_k"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [{"name": "a"}]}, "tools[0].input_schema"),
        ({"tools": [{"type": "custom", "name": "web_search"}]}, "tools[0]"),
        ({"tool_choice": {"type": "maybe"}}, "tool_choice"),
        ({"thinking": {}}, "thinking"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format must have a schema"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "objekt"}}}},
            "output_config.format has a JSON schema that is not valid: type must be one or several of",
        ),
        ({"output_config": {"effort": "zzz"}}, "output_config.effort"),
        ({"stop_sequences": ["x"] * 300}, "stop_sequences"),
        ({"system": [{"type": "text", "text": "a", "cache_control": {"type": "eternal"}}]}, "system[0].cache_control"),
        ({"cache_control": {"type": "ephemeral", "ttl": "2h"}}, "ttl"),
        ({"system": [{"type": "text", "text": "a", "cache_control": CACHED}] * 5}, "at most 4"),
        (
            {
                "tools": [{**TOOL, "cache_control": CACHED}],
                "tool_choice": {"type": "none"},
                "system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "1h"}}],
            },
            "ttl",
        ),
    ],
)
def test_wrong_requests_are_told_in_anthropics_shape(client, fields, told):
    response = post(client, **fields)
    assert response.status_code == 400, response.text
    body = response.json()
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert told in body["error"]["message"]


def test_four_breakpoints_of_either_ttl_are_accepted(client):
    hour = {"type": "ephemeral", "ttl": "1h"}
    answer = post(
        client,
        tools=[{**TOOL, "cache_control": hour}],
        tool_choice={"type": "none"},
        system=[{"type": "text", "text": SYSTEM, "cache_control": hour}],
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hello", "cache_control": CACHED}]}],
        cache_control=CACHED,
    )
    assert answer.status_code == 200, answer.text


def test_errors_are_the_sdks_own(sdk, server):
    with pytest.raises(anthropic.NotFoundError) as unknown:
        sdk.messages.create(model="nobody", messages=[USER], **SDK_GREEDY)
    assert unknown.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError), sdk.messages.stream(model=server.model, messages=[], **SDK_GREEDY):
        pass


def test_other_methods_and_paths_answer_in_anthropics_shape(client):
    assert client.get("/v1/messages").json()["error"]["type"] == "invalid_request_error"
    missing = client.post("/v1/messages/nothing", json={})
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")


def test_a_broken_body_is_told_in_anthropics_shape(client):
    response = client.post("/v1/messages", content=b"{", headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["type"]) == (400, "error")
