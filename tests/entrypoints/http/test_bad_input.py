"""Bad input: a 400 that names the field and says what is allowed, and an engine that does not notice."""

from __future__ import annotations

import gzip
import json
from typing import Any

import httpx
import pytest

USER = {"role": "user", "content": "Hello"}
JSON = {"content-type": "application/json"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
TOOLS = [{"type": "function", "function": {"name": "f"}}]

# Fields of a chat request, the field the error names, and words its message must have.
BAD_CHATS: list[tuple[str, dict[str, Any], str, str]] = [
    ("no messages field", {"messages": None}, "messages", "list"),
    ("empty messages", {"messages": []}, "messages", "at least one"),
    ("message is no object", {"messages": ["hi"]}, "messages", "messages[0]"),
    ("role is missing", {"messages": [{"content": "x"}]}, "messages", "role"),
    ("content is a number", {"messages": [{"role": "user", "content": 5}]}, "messages", "text parts"),
    ("content is null", {"messages": [{"role": "user", "content": None}]}, "messages", "text parts"),
    ("content is an object", {"messages": [{"role": "user", "content": {"text": "x"}}]}, "messages", "text parts"),
    ("content has an image", {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages", "only text parts"),
    ("text part without text", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "text"),
    (
        "prompt over the context",
        {"messages": [{"role": "user", "content": "word " * 4000}]},
        "messages",
        "maximum context length is 2048 tokens",
    ),
    (
        "a million characters",
        {"messages": [{"role": "system", "content": "x" * 10**6}, USER]},
        "messages",
        "maximum context length is 2048 tokens",
    ),
    ("temperature below 0", {"temperature": -0.1}, "temperature", "at least 0"),
    ("temperature is text", {"temperature": "warm"}, "temperature", "number"),
    ("top_p 0", {"top_p": 0}, "top_p", "above 0"),
    ("top_p 2", {"top_p": 2}, "top_p", "at most 1"),
    ("top_k 2**70", {"top_k": 2**70}, "top_k", "integer"),
    ("top_k below -1", {"top_k": -2}, "top_k", "top_k"),
    ("min_p above 1", {"min_p": 1.5}, "min_p", "at most 1"),
    ("repetition_penalty 0", {"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    ("max_tokens 0", {"max_tokens": 0}, "max_tokens", "at least 1"),
    ("max_tokens -1", {"max_tokens": -1}, "max_tokens", "at least 1"),
    ("max_completion_tokens 0", {"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
    ("n 0", {"n": 0}, "n", "1 to 128"),
    ("n a million", {"n": 10**6}, "n", "1 to 128"),
    ("ten thousand stop strings", {"stop": ["x"] * 10**4}, "stop", "at most 256"),
    ("empty stop string", {"stop": [""]}, "stop", "empty"),
    ("stop is a number", {"stop": 5}, "stop", "string or a valid list"),
    ("stop token id out of the vocabulary", {"stop_token_ids": [10**9]}, "stop_token_ids", "0 to"),
    ("logit_bias out of the vocabulary", {"logit_bias": {"999999999": 1}}, "logit_bias", "0 to"),
    ("logit_bias is no number", {"logit_bias": {"1": "much"}}, "logit_bias", "number"),
    ("allowed_token_ids is empty", {"allowed_token_ids": []}, "allowed_token_ids", "at least one"),
    ("top_logprobs without logprobs", {"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ("too many logprobs", {"logprobs": True, "top_logprobs": 10**6}, "logprobs", "at most"),
    ("logprobs of the whole vocabulary", {"logprobs": True, "top_logprobs": -1}, "logprobs", "at most 20"),
    ("top_logprobs -2", {"logprobs": True, "top_logprobs": -2}, "top_logprobs", "at least -1"),
    ("min_tokens above max_tokens", {"min_tokens": 9, "max_tokens": 4}, "min_tokens", "exceed"),
    ("prompt_logprobs in a stream", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
    ("stream_options without stream", {"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ("beam too wide", {"use_beam_search": True, "n": 11}, "n", "at most 10"),
    ("length_penalty too large", {"use_beam_search": True, "length_penalty": 99}, "length_penalty", "at most 10"),
    ("beam search with a form", {"use_beam_search": True, "guided_regex": "a"}, "guided_regex", "use_beam_search"),
    ("beam search with biases", {"use_beam_search": True, "logit_bias": {"1": 1}}, "logit_bias", "use_beam_search"),
    ("beam search with a penalty", {"use_beam_search": True, "presence_penalty": 1}, "presence_penalty", "beam"),
    ("best_of below n", {"best_of": 2, "n": 3}, "best_of", "3 to 128"),
    ("best_of a million", {"best_of": 10**6}, "best_of", "1 to 128"),
    ("best_of with n 0", {"best_of": 2, "n": 0}, "n", "1 to 128"),
    ("best_of in a stream", {"best_of": 2, "stream": True}, "best_of", "streamed"),
    ("unknown response_format", {"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    ("no schema", {"response_format": {"type": "json_schema"}}, "response_format", "schema"),
    ("unknown type", {"guided_json": {"type": "objekt"}}, "guided_json", "objekt"),
    ("malformed regex", {"structured_outputs": {"regex": "(["}}, "structured_outputs", "Unclosed"),
    ("two forms", {"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice", "one form"),
    ("costly regex", {"guided_regex": "((a?){1,50}){1,50}"}, "guided_regex", "simplify it"),
    ("tools without a parser", {"tools": TOOLS}, "tool_choice", "--enable-auto-tool-choice"),
    ("unknown tool_choice", {"tools": TOOLS, "tool_choice": "any"}, "tool_choice", "required"),
    (
        "tool_choice of no tool",
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nobody"}}},
        "tool_choice",
        "not among tools",
    ),
    ("tool_choice without tools", {"tool_choice": "required"}, "tool_choice", "tools"),
    ("tool without a name", {"tools": [{"function": {}}], "tool_choice": "none"}, "tools", "name"),
    ("chat template in the request", {"chat_template": "{{ 1 }}"}, "chat_template", "not allowed"),
    ("seed of 100 bits", {"seed": 2**100}, "seed", "seed must be an integer of 64 bits, got 1.26"),
    ("line end in an id", {"request_id": "a\nb"}, "request_id", "printable"),
    ("cache_salt empty", {"cache_salt": ""}, "cache_salt", "1 to 1024"),
    ("cache_salt too long", {"cache_salt": "x" * 1025}, "cache_salt", "1 to 1024"),
    (
        "two ends of a prompt",
        {"continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
        "",
    ),
    ("going on with the user's message", {"continue_final_message": True}, "continue_final_message", "role 'user'"),
    ("unknown reasoning effort", {"reasoning_effort": "zzz"}, "reasoning_effort", "'minimal', 'low'"),
    (
        "schema in another document",
        {"structured_outputs": {"json": {"properties": {"a": {"$ref": "http://x/y"}}}}},
        "structured_outputs",
        "another document, 'http://x/y'",
    ),
    ("reserved template variable", {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
]

BAD_COMPLETIONS: list[tuple[str, dict[str, Any], str, str]] = [
    ("no prompt", {"prompt": None}, "prompt", "list of token ids"),
    ("prompt is a number", {"prompt": 5}, "prompt", "string"),
    ("empty list", {"prompt": []}, "prompt", "list"),
    ("empty token ids", {"prompt": [[]]}, "prompt", "empty"),
    ("mixed list", {"prompt": ["a", 1]}, "prompt", "list"),
    ("booleans as token ids", {"prompt": [True, False]}, "prompt", "token ids"),
    ("fractions as token ids", {"prompt": [1.5]}, "prompt", "token ids"),
    ("negative token id", {"prompt": [1, -1]}, "prompt", "0 to"),
    ("token id out of the vocabulary", {"prompt": [[1], [10**9]]}, "prompt", "0 to"),
    ("too many token ids", {"prompt": [1] * 5000}, "prompt", "maximum context length is 2048 tokens"),
    ("too many prompts", {"prompt": ["a"] * 2000}, "prompt", "1024"),
    ("too many outputs", {"prompt": ["a"] * 1000, "n": 100}, "n", "4096"),
    ("suffix", {"suffix": "the end"}, "suffix", "not supported"),
    ("max_tokens 0", {"max_tokens": 0}, "max_tokens", "at least 1"),
    ("too many logprobs", {"logprobs": 10**6}, "logprobs", "at most"),
    ("logprobs of the whole vocabulary", {"logprobs": -1}, "logprobs", "at most 20"),
]

# Bodies that never become a request, and words the message must have.
BAD_BODIES = [
    (b"", "valid JSON"),
    (b"hello", "valid JSON"),
    (b"{", "valid JSON"),
    (b'{"messages": [],}', "valid JSON"),
    (b"[1]", "JSON object"),
    (b'"text"', "JSON object"),
    (b"null", "JSON object"),
    (b'{"temperature": NaN}', "finite"),
    (b'{"temperature": Infinity}', "finite"),
    (b'{"temperature": -Infinity}', "finite"),
    (b'{"temperature": 1e999}', "too large"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "Unicode"),
    (b'{"messages": [{"role": "user", "content": "\\udc00 x"}]}', "Unicode"),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}', "UTF-8"),
    (b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}', "UTF-8"),
    (b"[" * 60_000, "valid JSON"),
]


@pytest.fixture
def client(server):
    with httpx.Client(verify=False, base_url=server.url, timeout=120) as client:
        yield client
        # Whatever was sent, the server still answers.
        answer = client.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 1})
        assert answer.status_code == 200, answer.text


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500
    return error


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("fields", "param", "words"), [c[1:] for c in BAD_CHATS], ids=[c[0] for c in BAD_CHATS])
def test_bad_chats(client, fields, param, words, streamed):
    body = {"messages": [USER], "max_tokens": 4, **fields}
    if streamed and "stream_options" not in fields:
        body["stream"] = True
    error = refused(client.post("/v1/chat/completions", json=body))
    assert error["type"] == "BadRequestError"
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("fields", "param", "words"), [c[1:] for c in BAD_COMPLETIONS], ids=[c[0] for c in BAD_COMPLETIONS]
)
def test_bad_completions(client, fields, param, words, streamed):
    error = refused(client.post("/v1/completions", json={"prompt": "a", "stream": streamed, **fields}))
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(("body", "words"), BAD_BODIES, ids=[repr(b[0][:40]) for b in BAD_BODIES])
def test_bodies_that_are_not_strict_json(client, body, words):
    error = refused(client.post("/v1/chat/completions", content=body, headers=JSON))
    assert words in error["message"]


def test_a_prompt_over_the_context_is_told_both_lengths(client):
    error = refused(client.post("/v1/completions", json={"prompt": [1] * 3000}))
    assert "3000" in error["message"]
    assert "2048" in error["message"]


def test_other_content_types_are_refused(client):
    error = refused(client.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"}))
    assert "application/json" in error["message"]
    packed = JSON | {"content-encoding": "gzip"}
    error = refused(client.post("/v1/completions", content=gzip.compress(b'{"prompt": "a"}'), headers=packed), 415)
    assert error["message"] == "Content-Encoding must be identity, got 'gzip'."


def test_a_missing_field_is_named(client):
    assert refused(client.post("/v1/chat/completions", json={}))["param"] == "messages"


def test_an_unknown_model_is_a_404(client):
    body = {"model": "nobody", "messages": [USER]}
    error = refused(client.post("/v1/chat/completions", json=body), 404)
    assert error["type"] == "NotFoundError"
    assert error["param"] == "model"
    refused(client.get("/v1/models/nobody"), 404)


def test_unknown_paths_and_methods_have_the_same_shape(client):
    refused(client.get("/v1/nothing"), 404)
    refused(client.get("/v1/chat/completions"), 405)


@pytest.mark.parametrize("declared", [True, False], ids=["declared length", "chunked"])
def test_a_body_over_16_mib_is_refused_while_it_comes(client, declared):
    part = b'{"prompt": "' + b"x" * (2**20 - 12)

    def parts():
        for _ in range(18):
            yield part

    headers = JSON | ({"content-length": str(18 * 2**20)} if declared else {})
    try:
        response = client.post("/v1/completions", content=parts(), headers=headers)
    except httpx.TransportError:
        return  # the server answered and closed while the client was still sending
    assert "16 MiB" in refused(response, 413)["message"]


def test_deep_nesting_is_refused_or_served_but_no_server_error(client):
    nested: Any = "x"
    for _ in range(900):
        nested = [nested]
    for field in ("chat_template_kwargs", "tools", "logit_bias", "response_format", "vllm_xargs"):
        value = (
            [{"type": "function", "function": {"name": "f", "parameters": nested}}]
            if field == "tools"
            else {"a": nested}
        )
        body = json.dumps({"messages": [USER], "max_tokens": 1, "tool_choice": "none", field: value}).encode()
        response = client.post("/v1/chat/completions", content=body, headers=JSON)
        assert response.status_code in (200, 400), (field, response.text)


@pytest.mark.parametrize("field", ["stop_token_ids", "stop", "allowed_token_ids", "bad_words", "tools"])
def test_half_a_million_wrong_entries_make_one_short_error(client, field):
    body = json.dumps({"messages": [USER], field: [None] * 500_000}).encode()
    assert refused(client.post("/v1/chat/completions", content=body, headers=JSON))["param"] == field
