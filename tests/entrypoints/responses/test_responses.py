"""`/v1/responses` as the `openai` SDK uses it, and as plain HTTP."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import openai
import pytest

INSTRUCTIONS = "You keep the only inn of a mountain village, and you answer every guest in one short sentence."
GREEDY: dict[str, Any] = {"temperature": 0, "max_output_tokens": 6}
TOOL = {"type": "function", "name": "book", "description": "Books a room.", "parameters": {"type": "object"}}


@pytest.fixture
def sdk(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


@pytest.fixture
def client(server):
    with httpx.Client(verify=False, base_url=server.url, timeout=120) as client:
        yield client


def post(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post("/v1/responses", json={"input": "Name a colour.", **GREEDY, **fields})


def create(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = post(client, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Events of a stream; checks that each is named by its type and that their numbers have no gap."""
    assert response.status_code == 200, response.read()
    lines = [line for line in response.iter_lines() if line]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert [line.removeprefix("event: ") for line in lines[::2]] == [event["type"] for event in events]
    first = events[0]["sequence_number"]
    assert [event["sequence_number"] for event in events] == list(range(first, first + len(events)))
    return events


def stream(client: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    body = {"input": "Name a colour.", **GREEDY, "stream": True, **fields}
    with client.stream("POST", "/v1/responses", json=body) as response:
        return events_of(response)


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def wait_for_end(client: httpx.Client, response_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while (response := client.get(f"/v1/responses/{response_id}").json())["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline, response
        time.sleep(0.05)
    return response


def test_response(sdk, server):
    response = sdk.responses.create(model=server.model, instructions=INSTRUCTIONS, input="Name a colour.", **GREEDY)
    assert response.id.startswith("resp_")
    assert (response.object, response.model) == ("response", server.model)
    assert response.status in ("completed", "incomplete")
    (message,) = response.output
    assert (message.type, message.role) == ("message", "assistant")
    assert message.content[0].type == "output_text"
    assert response.output_text == message.content[0].text
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_response_is_the_chat_answer(client):
    chat = client.post(
        "/v1/chat/completions",
        json={
            "messages": [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": "Name a colour."}],
            "temperature": 0,
            "max_tokens": 6,
        },
    ).json()
    response = create(client, instructions=INSTRUCTIONS)
    assert text_of(response) == chat["choices"][0]["message"]["content"]
    assert response["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]


def test_usage_tells_what_was_pinned_and_what_was_read(sdk, server):
    asked = {"model": server.model, "instructions": "Every guest pays in advance. " * 20, **GREEDY}
    first = sdk.responses.create(**asked, input="Name a colour.").usage.input_tokens_details
    assert (first.cached_tokens, first.cache_write_tokens > 100) == (0, True)
    second = sdk.responses.create(**asked, input="Name an animal.").usage.input_tokens_details
    assert (second.cached_tokens, second.cache_write_tokens) == (first.cache_write_tokens, 0)


def test_tokens_that_run_out_make_the_response_incomplete(client):
    response = create(client, max_output_tokens=3, ignore_eos=True)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["output"][0]["status"] == "incomplete"
    assert response["usage"]["output_tokens"] == 3


def test_streamed_response_equals_the_response_at_once(sdk, server):
    asked = {"model": server.model, "instructions": INSTRUCTIONS, "input": "Name a colour.", **GREEDY}
    whole = sdk.responses.create(**asked)
    with sdk.responses.stream(**asked) as events:
        seen = list(events)
    text = "".join(event.delta for event in seen if event.type == "response.output_text.delta")
    assert text == whole.output_text == seen[-1].response.output_text
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert seen[-1].type == f"response.{whole.status}"
    assert seen[-1].response.usage.output_tokens == whole.usage.output_tokens


def test_events_come_in_order(client):
    kinds = [event["type"].removeprefix("response.") for event in stream(client)]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:-1] == ["output_text.done", "content_part.done", "output_item.done"]
    assert kinds[-1] in ("completed", "incomplete")
    assert set(kinds[4:-4]) == {"output_text.delta"}


def test_logprobs_come_when_asked_for(client):
    asked = {"top_logprobs": 2, "include": ["message.output_text.logprobs"], "ignore_eos": True}
    entries = create(client, **asked)["output"][0]["content"][0]["logprobs"]
    assert len(entries) == 6
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    events = stream(client, **asked)
    streamed = [entry for event in events if event["type"].endswith("text.delta") for entry in event["logprobs"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in entries]


def test_a_conversation_goes_on_from_a_response(client):
    first = create(client, instructions=INSTRUCTIONS)
    second = create(client, input="And an animal?", instructions=INSTRUCTIONS, previous_response_id=first["id"])
    third = create(
        client, input="And a tree?", instructions=INSTRUCTIONS, previous_response_id=second["id"], store=False
    )
    said = [
        {"role": "user", "content": "Name a colour."},
        *first["output"],
        {"role": "user", "content": "And an animal?"},
        *second["output"],
        {"role": "user", "content": "And a tree?"},
    ]
    at_once = create(client, input=said, instructions=INSTRUCTIONS)
    assert third["usage"]["input_tokens"] == at_once["usage"]["input_tokens"]
    assert text_of(third) == text_of(at_once)
    assert third["previous_response_id"] == second["id"]


def test_a_message_that_is_only_begun_is_gone_on_with(client):
    asked = {"role": "user", "content": "Name a colour."}
    begun: dict[str, Any] = {"type": "message", "role": "assistant", "status": "in_progress", "content": "A colour is"}
    chat = {"messages": [asked, {"role": "assistant", "content": "A colour is"}], "temperature": 0, "max_tokens": 6}
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    want = client.post("/v1/chat/completions", json=chat | goes_on).json()
    parts = begun | {"status": "incomplete", "content": [{"type": "output_text", "text": "A colour is"}]}
    for item in (begun, parts):
        for response in (create(client, input=[asked, item]), stream(client, input=[asked, item])[-1]["response"]):
            assert text_of(response) == want["choices"][0]["message"]["content"]
            assert response["usage"]["input_tokens"] == want["usage"]["prompt_tokens"]
        # What comes next reads the two as one message.
        more = {"role": "user", "content": "And an animal?"}
        told = begun | {"status": "completed", "content": "A colour is" + text_of(response)}
        next_one = create(client, input=[more], previous_response_id=response["id"])
        at_once = create(client, input=[asked, told, more])
        assert next_one["usage"]["input_tokens"] == at_once["usage"]["input_tokens"]
        assert text_of(next_one) == text_of(at_once)
        given = client.get(f"/v1/responses/{response['id']}/input_items").json()["data"][0]
        assert given["status"] == item["status"]
    # Only the assistant's own last message, and only if it says so.
    for last in (begun | {"status": "completed"}, asked | {"status": "incomplete"}):
        assert create(client, input=[asked, last])["usage"]["input_tokens"] != want["usage"]["prompt_tokens"]


def test_a_response_that_was_cut_off_can_be_sent_back_to_be_finished(client):
    whole = create(client, max_output_tokens=6, ignore_eos=True)
    first = create(client, max_output_tokens=3, ignore_eos=True)
    items = [{"role": "user", "content": "Name a colour."}, *first["output"]]
    second = create(client, input=items, max_output_tokens=3, ignore_eos=True)
    assert text_of(first) + text_of(second) == text_of(whole)


def test_a_streamed_response_can_be_gone_on_with_as_soon_as_it_is_told(client):
    end = stream(client)[-1]
    assert create(client, previous_response_id=end["response"]["id"])["status"] in ("completed", "incomplete")


def test_responses_are_found_again_until_deleted(sdk, server):
    response = sdk.responses.create(model=server.model, input="Name a colour.", metadata={"guest": "7"}, **GREEDY)
    found = sdk.responses.retrieve(response.id)
    assert found.output_text == response.output_text
    assert found.metadata == {"guest": "7"}
    sdk.responses.delete(response.id)
    for ask in (sdk.responses.retrieve, sdk.responses.delete, sdk.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            ask(response.id)


def test_a_response_that_is_not_to_be_stored_is_not(client):
    response = create(client, store=False)
    assert response["store"] is False
    assert client.get(f"/v1/responses/{response['id']}").status_code == 404
    assert post(client, previous_response_id=response["id"]).status_code == 404


def test_ids_are_not_the_clients_to_choose(client):
    body = {"input": "Hello", **GREEDY, "request_id": "resp_mine"}
    response = client.post("/v1/responses", json=body, headers={"X-Request-Id": "resp_mine"}).json()
    assert response["id"] != "resp_mine"
    assert client.get("/v1/responses/resp_mine").status_code == 404


def test_a_response_in_the_background(sdk, client, server):
    started = sdk.responses.create(model=server.model, input="Name a colour.", background=True, **GREEDY)
    assert started.status in ("queued", "in_progress")
    ended = wait_for_end(client, started.id)
    assert ended["background"] is True
    assert text_of(ended) == text_of(create(client))
    assert client.post(f"/v1/responses/{started.id}/cancel").json()["status"] == ended["status"]


def test_a_response_in_the_background_can_be_cancelled(sdk, server):
    long = {"max_output_tokens": 1900, "extra_body": {"ignore_eos": True}}
    started = sdk.responses.create(model=server.model, input="Tell a story.", background=True, **long)
    with pytest.raises(openai.BadRequestError):
        sdk.responses.create(model=server.model, input="And then?", previous_response_id=started.id)
    assert sdk.responses.cancel(started.id).status == "cancelled"
    assert sdk.responses.retrieve(started.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        sdk.responses.create(model=server.model, input="And then?", previous_response_id=started.id)


def test_a_stream_in_the_background_can_be_taken_up_again(client):
    events = stream(client, background=True)
    response_id = events[0]["response"]["id"]
    with client.stream("GET", f"/v1/responses/{response_id}?stream=true") as response:
        assert events_of(response) == events
    with client.stream("GET", f"/v1/responses/{response_id}?stream=true&starting_after=3") as response:
        assert events_of(response) == events[4:]
    assert client.get(f"/v1/responses/{response_id}?stream=true&starting_after=100000").status_code == 400


def test_only_responses_in_the_background_can_be_cancelled_or_streamed_again(client):
    response = create(client)
    assert client.post(f"/v1/responses/{response['id']}/cancel").status_code == 400
    assert client.get(f"/v1/responses/{response['id']}?stream=true").status_code == 400


def test_items_are_read_as_the_messages_they_stand_for(client):
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": INSTRUCTIONS}]},
        {"type": "message", "role": "user", "content": "Is a room free?"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "I look it up."}]},
        {"type": "function_call", "call_id": "call_1", "name": "book", "arguments": '{"room": 1}'},
        {"type": "function_call_output", "call_id": "call_1", "output": "booked"},
        {"role": "user", "content": "Which one?"},
    ]
    response = create(client, input=items, tools=[TOOL], tool_choice="none")
    assert response["tools"] == [TOOL]
    assert text_of(response)


def test_invocations_find_the_api_by_the_fields(client):
    sampling = {"max_tokens": 2}
    chat = client.post("/invocations", json={"messages": [{"role": "user", "content": "Hello"}], **sampling}).json()
    assert chat["object"] == "chat.completion"
    assert client.post("/invocations", json={"prompt": "Hello", **sampling}).json()["object"] == "text_completion"
    assert client.post("/invocations", json={"input": "Hello", **GREEDY}).json()["object"] == "response"
    assert client.post("/invocations", json={"text": "Hello"}).status_code == 400


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"type": "riddle"}]}, "input"),
        ({"input": [{"type": ["message"]}]}, "input"),
        ({"input": [{"type": "function_call", "name": "a"}]}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input"),
        ({"input": [{"type": "reasoning", "summary": 5}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": "many"}, "top_k"),
        ({"tools": [{"name": "web_search"}]}, "tools"),
        ({"tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": {"type": "hosted"}}, "tool_choice"),
        ({"text": {"format": 5}}, "text"),
        ({"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"metadata": {"a": 5}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"truncation": "sometimes"}, "truncation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True, "store": False}, "store"),
        ({"allowed_token_ids": 5, "logit_bias": {"x": 1}}, "logit_bias"),
    ],
)
@pytest.mark.parametrize("mode", [{}, {"stream": True}, {"background": True}], ids=["whole", "streamed", "background"])
def test_wrong_requests_are_400(client, fields, param, mode):
    response = post(client, **{**mode, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"text": {"format": {"type": "xml"}}}, "text.format", "text.format must have type"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a"}}},
            "text.format",
            'text.format of type "json_schema" must',
        ),
        ({"reasoning": {"effort": "zzz"}}, "reasoning.effort", "reasoning.effort must be 'none'"),
        ({"top_logprobs": 100}, "top_logprobs", "top_logprobs may be at most 20 (--max-logprobs)"),
    ],
)
def test_errors_name_the_fields_of_this_api(client, fields, param, words):
    error = post(client, **fields).json()["error"]
    assert (error["param"], error["message"][: len(words)]) == (param, words)


def test_deep_nesting_is_refused(client):
    deep: Any = "x"
    for _ in range(400):
        deep = {"a": deep}
    for fields in (
        {"tools": [{**TOOL, "parameters": deep}], "tool_choice": "none"},
        {"input": [{"role": "user", "content": "x", "more": deep}]},
        {"text": {"format": {"type": "text"}, "more": deep}},
    ):
        assert post(client, **fields).status_code == 400


def test_unknown_models_and_responses_are_404(client):
    assert post(client, model="nobody").status_code == 404
    assert client.get("/v1/responses/resp_0").status_code == 404
    assert post(client, previous_response_id="resp_0").status_code == 404


def test_input_items_are_those_that_the_sdk_pages_through(sdk, client):
    first = create(client, input="Name a colour.", instructions=INSTRUCTIONS)
    call = {"type": "function_call", "id": "fc_mine", "call_id": "c1", "name": "book", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c1", "output": "done"}
    parts = [{"type": "input_text", "text": "And"}, {"type": "input_text", "text": " a number."}]
    given = [call, result, {"role": "user", "content": parts}]
    second = create(client, input=given, previous_response_id=first["id"])
    items = list(sdk.responses.input_items.list(second["id"], limit=2, order="asc"))
    assert [item.type for item in items] == ["message", "message", "function_call", "function_call_output", "message"]
    assert items[0].content[0].to_dict() == {"type": "input_text", "text": "Name a colour."}
    assert items[1].id == first["output"][0]["id"]
    assert items[2].id == "fc_mine"
    assert [part.text for part in items[4].content] == ["And", " a number."]
    assert len({item.id for item in items}) == 5
    newest_first = sdk.responses.input_items.list(second["id"]).data
    assert [item.id for item in newest_first] == [item.id for item in items[::-1]]


@pytest.mark.parametrize(
    ("query", "param"), [("limit=0", "limit"), ("limit=101", "limit"), ("order=up", "order"), ("after=x", "after")]
)
def test_a_page_of_input_items_that_cannot_be_is_refused(client, query, param):
    made = create(client)
    response = client.get(f"/v1/responses/{made['id']}/input_items?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_input_items_of_what_is_not_stored_are_not_found(client):
    for response_id in ("resp_nobody", create(client, store=False)["id"]):
        response = client.get(f"/v1/responses/{response_id}/input_items")
        assert response.status_code == 404
        assert "no response" in response.json()["error"]["message"]


def test_input_tokens_are_those_that_a_response_counts(sdk, client):
    fields: dict[str, Any] = {"input": "Name a colour.", "instructions": INSTRUCTIONS, "tools": [TOOL]}
    made = create(client, **fields, tool_choice="none")
    counted = sdk.responses.input_tokens.count(**fields, tool_choice="none")
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", made["usage"]["input_tokens"])
    follow: dict[str, Any] = {"input": "And a number.", "previous_response_id": made["id"]}
    assert sdk.responses.input_tokens.count(**follow).input_tokens == create(client, **follow)["usage"]["input_tokens"]
    response = client.post("/v1/responses/input_tokens", json={})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "input")


@pytest.mark.parametrize("mode", [{}, {"stream": True}], ids=["whole", "streamed"])
def test_automatic_truncation_drops_the_oldest_and_keeps_the_instructions(client, mode):
    long = [{"role": "user", "content": "word " * 5000}, {"role": "user", "content": "Name a colour."}]
    fields = {"instructions": INSTRUCTIONS, "input": long, "max_output_tokens": 1800, "stop": list("aeiou"), **mode}
    assert post(client, **fields, truncation="disabled").status_code == 400
    fields["truncation"] = "auto"
    response = stream(client, **fields)[-1]["response"] if mode else create(client, **fields)
    usage = response["usage"]
    assert usage["input_tokens"] == 2048 - 1800
    again = create(client, **{**fields, "input": [*long, {"role": "user", "content": "Now a fruit."}], "stream": False})
    details = again["usage"]["input_tokens_details"]
    assert details["cached_tokens"] >= 16, "the pinned instructions are read, not computed"
    whole = create(client, instructions=INSTRUCTIONS, truncation="auto")
    assert whole["usage"] == create(client, instructions=INSTRUCTIONS)["usage"] | {
        "input_tokens_details": whole["usage"]["input_tokens_details"]
    }


def test_automatic_truncation_needs_room_for_the_conversation(client):
    error = post(client, truncation="auto", max_output_tokens=2048).json()["error"]
    assert "Nothing of the conversation can be kept" in error["message"]
