"""`POST /v1/completions`: prompts in all their forms, echo, log-probabilities, streams."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from .test_chat import stream


@pytest.fixture
def client(server):
    with httpx.Client(verify=False, base_url=server.url, timeout=120) as client:
        yield client


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"prompt": "The sky is", "max_tokens": 4, "temperature": 0, "ignore_eos": True, **fields}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_answer_has_the_shape_of_the_openai_api(client, server):
    answer = complete(client, model=server.model)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == server.model
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["logprobs"] is None
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 4


def test_sixteen_tokens_where_the_request_is_silent(client):
    assert complete(client, max_tokens=None)["usage"]["completion_tokens"] == 16


def test_text_and_its_token_ids_give_the_same_answer(client):
    ids = client.post("/tokenize", json={"prompt": "The sky is"}).json()["tokens"]
    texts = [complete(client, prompt=prompt)["choices"][0]["text"] for prompt in ("The sky is", ids, [ids])]
    assert texts[0] == texts[1] == texts[2]


def test_texts_and_token_ids_may_come_in_one_batch(client):
    ids = client.post("/tokenize", json={"prompt": "Once upon a time"}).json()["tokens"]
    batch = complete(client, prompt=["The sky is", ids, "One"], echo=True)["choices"]
    alone = [complete(client, prompt=prompt, echo=True)["choices"][0] for prompt in ("The sky is", ids, "One")]
    assert [choice["text"] for choice in batch] == [choice["text"] for choice in alone]
    assert batch[1]["text"].startswith("Once upon a time")


def test_choices_of_many_prompts_are_numbered_prompt_by_prompt(client):
    answer = complete(client, prompt=["One", "Two two", "Three"], n=2, echo=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    starts = ("One", "One", "Two two", "Two two", "Three", "Three")
    for choice, start in zip(answer["choices"], starts, strict=True):
        assert choice["text"].startswith(start)
    assert answer["usage"]["completion_tokens"] == 6 * 4


def test_streams_of_many_prompts_equal_their_answers_at_once(client):
    prompts = ["The sky is", "Once upon a time"]
    chunks = stream(client, "/v1/completions", prompt=prompts, max_tokens=4, ignore_eos=True)
    for choice in complete(client, prompt=prompts)["choices"]:
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]


def test_stream_tells_usage_when_asked(client):
    chunks = stream(client, "/v1/completions", prompt=["a", "b"], stream_options={"include_usage": True})
    usage = chunks[-1]["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert chunks[-1]["choices"] == []


def test_logprobs_are_parallel_lists(client):
    logprobs = complete(client, logprobs=2)["choices"][0]["logprobs"]
    lengths = {len(logprobs[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    assert lengths == {4}
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top[token] == value
        assert len(top) in (2, 3)


def test_echo_with_logprobs_covers_the_prompt(client):
    answer = complete(client, echo=True, logprobs=1)
    logprobs = answer["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == answer["usage"]["total_tokens"]
    assert logprobs["token_logprobs"][0] is None
    assert all(value is not None for value in logprobs["token_logprobs"][1:])


def test_echo_without_output_gives_the_prompt_alone(client):
    answer = complete(client, echo=True, max_tokens=0, logprobs=1)
    assert answer["choices"][0]["text"] == "The sky is"
    assert answer["usage"]["completion_tokens"] == 0
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]


def test_streamed_echo_starts_with_the_prompt(client):
    chunks = stream(client, "/v1/completions", prompt="The sky is", echo=True)
    assert chunks[0]["choices"][0]["text"] == "The sky is"


def test_streamed_echo_with_logprobs_covers_the_prompt(client):
    prompts = ["The sky is", "Once upon a time"]
    asked = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 4, "ignore_eos": True}
    chunks = stream(client, "/v1/completions", **asked)
    for choice in complete(client, **asked)["choices"]:
        parts = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        for key in ("tokens", "text_offset"):
            assert [value for part in parts for value in part[key]] == choice["logprobs"][key]
        streamed = [value for part in parts for value in part["token_logprobs"]]
        assert streamed == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-3)


def test_streamed_offsets_are_those_of_the_tokens_while_text_waits_for_a_stop(client):
    asked = {"prompt": "One, two, three,", "stop": ["never this"], "logprobs": 1, "max_tokens": 8, "ignore_eos": True}
    chunks = stream(client, "/v1/completions", **asked, return_token_ids=True)
    parts = [part for chunk in chunks if (part := chunk["choices"][0]["logprobs"])]
    whole = complete(client, **asked)["choices"][0]["logprobs"]
    assert [offset for part in parts for offset in part["text_offset"]] == whole["text_offset"]


def test_prompt_logprobs_are_right_over_cached_positions(client):
    prompt = "The lighthouse keeper writes down every ship that passes by. " * 8

    def prompt_logprobs(**fields: Any) -> list[dict[str, Any]]:
        choice = complete(client, prompt=prompt, max_tokens=1, prompt_logprobs=2, **fields)["choices"][0]
        first, *entries = choice["prompt_logprobs"]
        assert first is None
        return entries

    # Under a salt of its own nothing of the prompt is cached.
    fresh = prompt_logprobs(cache_salt="prompt-logprobs-fresh")
    complete(client, prompt=prompt)
    assert complete(client, prompt=prompt)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    for cached in (prompt_logprobs(), prompt_logprobs()):
        assert len(cached) == len(fresh)
        for entry, want in zip(cached, fresh, strict=True):
            assert {key: lp["rank"] for key, lp in entry.items()} == {key: lp["rank"] for key, lp in want.items()}
            assert [lp["logprob"] for lp in entry.values()] == pytest.approx(
                [lp["logprob"] for lp in want.values()], abs=1e-3
            )


def test_token_ids_come_back_when_asked_for(client):
    choice = complete(client, return_token_ids=True)["choices"][0]
    assert len(choice["token_ids"]) == 4
    assert choice["prompt_token_ids"]


def test_a_stop_string_ends_the_answer_and_is_named(client):
    text = complete(client, max_tokens=12)["choices"][0]["text"]
    stop = text[len(text) // 2 :][:3]
    choice = complete(client, max_tokens=12, stop=[stop])["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == stop
    assert choice["text"] == text[: text.index(stop)]
    kept = complete(client, max_tokens=12, stop=[stop], include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == text[: text.index(stop)] + stop


def test_the_prompt_can_be_truncated_from_its_start(client):
    answer = complete(client, prompt="word " * 5000, truncate_prompt_tokens=7, return_token_ids=True)
    assert answer["usage"]["prompt_tokens"] == 7


def test_the_prompt_can_be_truncated_from_its_end(client):
    words = client.post("/tokenize", json={"prompt": "one two three four five six"}).json()["tokens"]
    for side, kept in (("left", words[-3:]), ("right", words[:3])):
        answer = complete(client, prompt=words, truncate_prompt_tokens=3, truncation_side=side, return_token_ids=True)
        assert answer["choices"][0]["prompt_token_ids"] == kept
    body = {"prompt": words, "truncate_prompt_tokens": 3, "truncation_side": "middle"}
    assert client.post("/v1/completions", json=body).json()["error"]["param"] == "truncation_side"


@pytest.mark.parametrize("streamed", [False, True])
def test_an_echoed_prompt_that_ends_inside_a_character_shows_it_once(client, streamed):
    spelled = {"prompt": "I see \U0001f600", "add_special_tokens": False}
    *cut, last = client.post("/tokenize", json=spelled).json()["tokens"]
    body = {"prompt": cut, "echo": True, "max_tokens": 1, "allowed_token_ids": [last], "stream": streamed}
    response = client.post("/v1/completions", json=body)
    if streamed:
        lines = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        text = "".join(choice["text"] for line in lines for choice in line["choices"])
    else:
        text = response.json()["choices"][0]["text"]
    assert text == "I see \U0001f600"
    alone = client.post("/v1/completions", json={"prompt": cut, "echo": True, "max_tokens": 0}).json()
    assert alone["choices"][0]["text"] == "I see \ufffd"
