"""Where the marks of a chat lie in its prompt, and what is kept of it, in both dialects."""

from __future__ import annotations

import httpx
import pytest

from vllm.entrypoints.chat.cache_marks import take_breakpoints
from vllm.entrypoints.chat.messages import check_messages
from vllm.entrypoints.chat.request import PromptCacheOptions
from vllm.inputs import Breakpoint
from vllm.transformers_utils.chat_template import ChatRenderer
from vllm.transformers_utils.tokenizer import load_tokenizer

FIVE_MINUTES, AN_HOUR = {"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}
LAW = "You are a clerk of the court. " + "Every case has a number, and every number has a case. " * 6
CASE = "The case of the miller against the baker, in which a sack of flour was lost on the way to town. " * 5


def part(text, mark=None):
    return {"type": "text", "text": text} | ({"cache_control": mark} if mark else {})


def test_marks_are_taken_out_of_what_templates_see():
    messages = [
        {"role": "system", "content": [part("a", FIVE_MINUTES), part("b")]},
        {"role": "user", "content": "c", "cache_control": AN_HOUR},
    ]
    tools = [{"type": "function", "function": {"name": "f"}, "cache_control": AN_HOUR}]
    plain, plain_tools, found = take_breakpoints(messages, tools)
    assert plain == [
        {"role": "system", "content": [part("a"), part("b")]},
        {"role": "user", "content": "c"},
    ]
    assert plain_tools == [{"type": "function", "function": {"name": "f"}}]
    assert found == [Breakpoint(None, None, 3600.0), Breakpoint(0, 1, 300.0), Breakpoint(1, None, 3600.0)]
    many = [{"role": "user", "content": [part(str(i), FIVE_MINUTES) for i in range(9)]}]
    assert [b.parts for b in take_breakpoints(many, None)[2]] == [6, 7, 8, 9], "the last four"


@pytest.fixture(scope="module")
def renderer(default_model_path):
    return ChatRenderer(load_tokenizer(default_model_path))


def test_a_mark_lies_where_its_text_ends(renderer):
    chat = [
        {"role": "system", "content": [part("First rule."), part("Second rule.")]},
        {"role": "user", "content": [part("A long document."), part("What does it say?")]},
        {"role": "assistant", "content": "It says nothing."},
        {"role": "user", "content": "Why?"},
    ]
    places = [Breakpoint(0, 1), Breakpoint(0, 2), Breakpoint(1, 1), Breakpoint(1, None), Breakpoint(2, None)]
    rendered = renderer.render(chat, breakpoints=places)
    ends = [mark.num_tokens for mark in rendered.marks]
    assert ends == sorted(set(ends)) and ends[1] == rendered.num_system_tokens
    decode = renderer._tokenizer.decode
    for end, text in zip(ends, ("First rule.", None, "A long document.", "What does it say?", None), strict=True):
        if text is not None:
            assert decode(rendered.prompt_token_ids[:end]).rstrip("\n").endswith(text)
    # Another end of the same chat has its marks at the same places.
    other = renderer.render([*chat[:3], {"role": "user", "content": "1,000 reasons, please."}], breakpoints=places)
    assert [mark.num_tokens for mark in other.marks] == ends
    assert other.prompt_token_ids[: ends[-1]] == rendered.prompt_token_ids[: ends[-1]]


def anthropic(client, messages, system=None, **options):
    body = {"model": "any", "max_tokens": 1, "messages": messages, "system": system or [part(LAW, AN_HOUR)]}
    answer = client.post("/v1/messages", json=body | options)
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    return usage["input_tokens"], usage["cache_creation_input_tokens"], usage["cache_read_input_tokens"]


@pytest.fixture
def client(server):
    with httpx.Client(verify=False, base_url=server.url, timeout=120) as client:
        yield client


def pinned(client):
    return client.get("/v1/system_prompts").json()["data"]


def test_breakpoints_of_anthropic_are_nested_pins(client, server):
    def ask(messages, **options):
        return anthropic(client, messages, model=server.model, **options)

    question = {"role": "user", "content": [part(CASE, FIVE_MINUTES), part("Who won?")]}
    fresh, written, read = ask([question])
    assert written > 150 and read == 0 and fresh < 30
    (marker,) = (p for p in pinned(client) if p["source"] == "marker" and p["num_tokens"] == written)
    assert (marker["pin"], marker["ttl"]) == ("soft", 300)
    assert marker["parent"] is not None
    assert ask([question]) == (fresh, 0, written)
    # Another question about the same document.
    other = {"role": "user", "content": [part(CASE, FIVE_MINUTES), part("Who lost, and why did it take so long?")]}
    assert ask([other])[1:] == (0, written)
    # The next turn moves the mark to its own end: what was pinned is read, only the rest is written.
    turns = [question, {"role": "assistant", "content": "The miller."}, {"role": "user", "content": "Why?"}]
    turns[2]["content"] = [part("Why? " + CASE, FIVE_MINUTES)]
    _, more, again = ask(turns)
    assert again == written and more > 50
    turns += [{"role": "assistant", "content": "So it was."}, {"role": "user", "content": "Thank you."}]
    assert ask(turns)[1:] == (0, written + more)
    for p in sorted(pinned(client), key=lambda p: -p["num_tokens"]):
        client.delete(f"/v1/system_prompts/{p['id']}")


def test_marks_in_openai_chats_and_retention(client):
    def ask(content, system, **options):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        body = {"messages": messages, "max_tokens": 1, "prompt_cache_key": "k", **options}
        answer = client.post("/v1/chat/completions", json=body).json()
        details = answer["usage"]["prompt_tokens_details"]
        return details["cached_tokens"], details["cache_write_tokens"]

    marked = [part(CASE, AN_HOUR), part("Who won?")]
    read, written = ask(marked, LAW + "Be brief.")
    assert read == 0 and written > 150
    assert ask([part(CASE), part("Who lost?")], LAW + "Be brief.") == (written, 0), "whoever marked it"
    system = LAW + "Be kind."
    ask("Hello", system, prompt_cache_retention="24h")
    ask("Hello", system, prompt_cache_retention="in_memory")
    assert any(p["source"] == "auto" and p["pin"] == "automatic" for p in pinned(client))
    for body in ({"prompt": "a", "max_tokens": 1}, {"input": "a", "max_output_tokens": 1}):
        path = "/v1/completions" if "prompt" in body else "/v1/responses"
        answer = client.post(path, json=body | {"prompt_cache_key": "k", "prompt_cache_retention": "24h"})
        assert answer.status_code == 200, answer.text
    for p in sorted(pinned(client), key=lambda p: -p["num_tokens"]):
        client.delete(f"/v1/system_prompts/{p['id']}")


def test_breakpoints_of_openai_are_taken_as_well():
    mark = {"mode": "explicit"}
    parts = [{"type": "text", "text": str(i), "prompt_cache_breakpoint": mark} for i in range(6)]
    parts[5]["prompt_cache_breakpoint"] = mark | {"ttl": "12h"}
    checked = check_messages([{"role": "user", "content": parts}])
    assert all(part.keys() == {"type", "text"} for part in take_breakpoints(checked, None)[0][0]["content"])
    found = take_breakpoints(checked, None)[2]
    assert found == [Breakpoint(0, 4, 1800.0), Breakpoint(0, 5, 1800.0), Breakpoint(0, 6, 43200.0)], "one is implicit"
    explicit = PromptCacheOptions(mode="explicit", ttl="12h")
    assert [(b.parts, b.ttl) for b in take_breakpoints(checked, None, explicit)[2]] == [
        (i, 43200) for i in (3, 4, 5, 6)
    ]


def ask(server, path, **body):
    response = httpx.post(f"{server.url}/v1/{path}", json={"temperature": 0} | body, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_what_a_breakpoint_marks_is_written_once_and_read_exactly(server, path):
    """The second request goes on differently right behind the mark, and reads all that stands before it."""
    name, limit, kind = (
        ("messages", "max_tokens", "text") if path[0] == "c" else ("input", "max_output_tokens", "input_text")
    )
    law = f"By {path}. " + LAW

    def turn(question, **options):
        parts = [{"type": kind, "text": CASE, "prompt_cache_breakpoint": {"mode": "explicit"}}]
        said = [
            {"role": "system", "content": law},
            {"role": "user", "content": [*parts, {"type": kind, "text": question}]},
        ]
        answer = ask(server, path, **{name: said, limit: 2} | options)
        usage = answer["usage"]
        details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
        return details["cache_write_tokens"], details["cached_tokens"]

    written, cached = turn("Who won?")
    assert cached < 20 < written
    assert turn("Why?") == (0, written + cached)


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_prewarming_keeps_the_prompt_and_says_nothing(server, path):
    name, limit = ("messages", "max_tokens") if path[0] == "c" else ("input", "max_output_tokens")
    said = [{"role": "system", "content": f"Warm by {path}. " + LAW}, {"role": "user", "content": "Hi"}]
    warm = ask(server, path, **{name: said, "prompt_cache_options": {"prewarm": True}})
    if path == "responses":
        assert (warm["output"], warm["status"], warm["usage"]["output_tokens"]) == ([], "completed", 0)
        assert warm["prompt_cache_options"]["mode"] == "implicit"
        written = warm["usage"]["input_tokens_details"]["cache_write_tokens"]
    else:
        (choice,) = warm["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
        assert warm["usage"]["completion_tokens"] == 0
        written = warm["usage"]["prompt_tokens_details"]["cache_write_tokens"]
    assert written > 50
    usage = ask(server, path, **{name: said, limit: 1})["usage"]
    details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
    assert details["cached_tokens"] >= written
    body = {name: said, limit: 5, "stream": True, "prompt_cache_options": {"prewarm": True}}
    streamed = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60).text
    assert "output_text.delta" not in streamed
    assert "data: [DONE]" in streamed or "response.completed" in streamed


def test_explicit_breakpoints_keep_nothing_else(server):
    said = [{"role": "system", "content": "Explicitly. " + LAW}, {"role": "user", "content": "Hi"}]
    for _ in range(2):
        usage = ask(server, "chat/completions", messages=said, max_tokens=1, prompt_cache_options={"mode": "explicit"})
        assert usage["usage"]["prompt_tokens_details"]["cache_write_tokens"] == 0


@pytest.mark.parametrize("mark", [{"mode": "implicit"}, {}, "explicit", {"mode": "explicit", "ttl": "1h"}])
def test_malformed_breakpoints_are_refused(server, mark):
    parts = [{"type": "text", "text": "Hi", "prompt_cache_breakpoint": mark}]
    body = {"messages": [{"role": "user", "content": parts}]}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 400
    assert "prompt_cache_breakpoint" in response.json()["error"]["message"]


def test_a_response_says_why_it_did_not_read_its_prompt(server):
    def create(**fields):
        return ask(
            server, "responses", **{"instructions": "Diagnose. " + LAW, "input": CASE, "max_output_tokens": 2} | fields
        )

    def compared(with_id, **fields):
        options = {"comparison_response_id": with_id}
        return create(prompt_cache_options=options, **fields)["prompt_cache_diagnostics"]

    first = create()
    create()
    assert first["prompt_cache_diagnostics"] is None
    assert compared(first["id"]) == {"type": "cache_hit"}
    assert compared("resp_nobodys") == {"type": "comparison_response_not_found"}
    changed = compared(first["id"], input="Another case.")
    assert (changed["type"], changed["reason"]) == ("cache_miss", "input_changed")
    assert compared(first["id"], instructions="Others.")["reason"] == "input_changed"
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}]
    assert compared(first["id"], tools=tools, tool_choice="none")["reason"] == "tools_changed"
