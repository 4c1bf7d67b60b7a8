"""What agents send: conversations with odd histories, tools of others, and what the model reads of them."""

from __future__ import annotations

import ast
import json
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server_process import ServerProcess

# Shows all that a history may hold.
TEMPLATE = """
{%- if tools %}<|im_start|>tools
{{ tools | map(attribute="function") | map(attribute="name") | join(",") }}<|im_end|>
{% endif -%}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for c in m.tool_calls or [] %}{{ "<call " + c.function.name + ">" }}
{{- c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}</call>
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""
USER = {"role": "user", "content": "Go on."}
SHELL = {"type": "function", "name": "shell", "parameters": {"type": "object", "properties": {}}}
READ = {"name": "read", "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}}}

Ask = Callable[..., tuple[httpx.Response, str]]


@pytest.fixture(scope="module")
def agents_server(server_factory: Any, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ServerProcess:
    template = tmp_path_factory.mktemp("template") / "agents.jinja"
    template.write_text(TEMPLATE)
    return server_factory(
        *("--model", str(tiny_model_dir), "--chat-template", str(template), "--enable-log-requests"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--max-model-len", "2048", "--num-gpu-blocks-override", "512"),
        env={"VLLM_LOGGING_LEVEL": "DEBUG"},
        cold=True,
    )


@pytest.fixture
def ask(agents_server: ServerProcess) -> Ask:
    """`ask(route, **body)` returns the answer, and the prompt that the model read for it."""

    def post(route: str, **body: Any) -> tuple[httpx.Response, str]:
        name = uuid.uuid4().hex
        limit = "max_output_tokens" if route == "responses" else "max_tokens"
        response = httpx.post(
            f"{agents_server.url}/v1/{route}",
            json={"model": agents_server.model, limit: 2} | body,
            headers={"X-Request-Id": name},
            timeout=60,
        )
        shown = re.search(rf"{name}\S*: prompt: (.*), prompt_token_ids", agents_server.log_path.read_text())
        return response, ast.literal_eval(shown[1]) if shown else ""

    return post


def calls_of(arguments: list[str]) -> list[dict[str, Any]]:
    return [
        {"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": text}}
        for i, text in enumerate(arguments)
    ]


@pytest.mark.parametrize("arguments", ['{\n   "', '{"a":[1]}{"a":[1]}', "[1, 2]", "ls -l", "[" * 500])
def test_a_call_with_broken_arguments_in_the_history_is_shown_as_it_is(ask: Ask, arguments: str) -> None:
    cut = {"role": "assistant", "content": None, "tool_calls": calls_of([arguments])}
    result = {"role": "tool", "tool_call_id": "c0", "content": "The call was cut off."}
    response, prompt = ask("chat/completions", messages=[USER, cut, result, USER])
    assert response.status_code == 200, response.text
    assert f"<call f>{arguments}</call>" in prompt
    items = [
        {"role": "user", "content": "Go on."},
        {"type": "function_call", "call_id": "c0", "name": "f", "arguments": arguments},
        {"type": "function_call_output", "call_id": "c0", "output": "The call was cut off."},
        {"role": "user", "content": "Go on."},
    ]
    response, same = ask("responses", input=items)
    assert response.status_code == 200, response.text
    assert same == prompt


def test_a_conversation_goes_on_from_a_call_that_this_server_cut(ask: Ask) -> None:
    tool = {"type": "function", "name": "f", "parameters": {"properties": {"path": {"enum": ["a-long-name" * 9]}}}}
    choice = {"type": "function", "name": "f"}
    cut, _ = ask("responses", input="Hi", tools=[tool], tool_choice=choice, max_output_tokens=6)
    (call,) = cut.json()["output"]
    with pytest.raises(ValueError):
        json.loads(call["arguments"])
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "Again."}
    response, prompt = ask("responses", input=[output], previous_response_id=cut.json()["id"], tools=[tool])
    assert response.status_code == 200, response.text
    assert f"<call f>{call['arguments']}</call>" in prompt


def test_no_tools_need_no_choice(ask: Ask) -> None:
    for route, body in (
        ("chat/completions", {"messages": [USER], "tools": [], "tool_choice": "auto"}),
        ("chat/completions", {"messages": [USER], "tool_choice": "auto"}),
        ("responses", {"input": "Hi", "tools": [], "tool_choice": "auto", "include": ["reasoning.encrypted_content"]}),
        ("messages", {"messages": [USER], "tools": [], "tool_choice": {"type": "auto"}}),
    ):
        response, _ = ask(route, **body)
        assert response.status_code == 200, response.text
    response, _ = ask("chat/completions", messages=[USER], tools=[], tool_choice="required")
    assert response.status_code == 400


def test_tools_of_others_are_skipped_and_functions_kept(ask: Ask) -> None:
    others = [
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
        {"type": "web_search", "external_web_access": False},
        {"type": "namespace", "name": "n", "tools": []},
        {"type": "local_shell"},
    ]
    response, prompt = ask("responses", input="Hi", tools=[*others, SHELL])
    assert response.status_code == 200, response.text
    assert prompt.startswith("<|im_start|>tools\nshell<|im_end|>")
    assert len(response.json()["tools"]) == 5
    response, prompt = ask("responses", input="Hi", tools=others, tool_choice="auto")
    assert response.status_code == 200, response.text
    assert "tools" not in prompt
    for choice in ("required", {"type": "web_search"}, {"type": "custom", "name": "apply_patch"}):
        response, _ = ask("responses", input="Hi", tools=others, tool_choice=choice)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_choice")
    custom = {"type": "custom", "custom": {"name": "apply_patch"}}
    function = {"function": {"name": "shell"}}
    response, prompt = ask("chat/completions", messages=[USER], tools=[custom, function])
    assert response.status_code == 200, response.text
    assert prompt.startswith("<|im_start|>tools\nshell<|im_end|>")
    response, prompt = ask("messages", messages=[USER], tools=[{"type": "web_search_20250305", "name": "s"}, READ])
    assert response.status_code == 200, response.text
    assert prompt.startswith("<|im_start|>tools\nread<|im_end|>")


def test_items_of_tools_of_others_are_read(ask: Ask) -> None:
    action = {"type": "exec", "command": ["ls"]}
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "patch"}]},
        {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": "*** Begin Patch"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "ok"},
        {"type": "local_shell_call", "call_id": "c2", "status": "completed", "action": action},
        {"type": "function_call_output", "call_id": "c2", "output": "a.txt"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "tea"}},
        {"type": "message", "role": "assistant", "content": None},
        {"type": "compaction", "encrypted_content": "gAAA"},
        {"type": "message", "role": "user", "content": "Go on."},
    ]
    response, prompt = ask("responses", input=items)
    assert response.status_code == 200, response.text
    assert '<call apply_patch>{"input": "*** Begin Patch"}</call><|im_end|>\n<|im_start|>tool\nok' in prompt
    assert '<call local_shell>{"type": "exec", "command": ["ls"]}</call><|im_end|>\n<|im_start|>tool\na.txt' in prompt
    assert '[web_search_call] {"type":"search","query":"tea"}' in prompt
    kept = httpx.get(f"{response.url}/{response.json()['id']}/input_items", params={"order": "asc"}).json()["data"]
    assert [item["type"] for item in kept] == [item["type"] for item in items]
    assert all(item["id"] for item in kept)
    response, _ = ask("responses", input=[*items, {"type": "riddle"}])
    assert (response.status_code, response.json()["error"]["param"]) == (400, "input")


def test_references_stand_for_items_that_are_kept(ask: Ask) -> None:
    first, _ = ask("responses", input=[{"type": "message", "role": "user", "id": "msg_mine", "content": "Tea?"}])
    (said,) = first.json()["output"]
    references = [{"type": "item_reference", "id": "msg_mine"}, {"id": said["id"]}]
    response, prompt = ask("responses", input=[*references, USER])
    assert response.status_code == 200, response.text
    _, whole = ask("responses", input=[{"role": "user", "content": "Tea?"}, said, USER])
    assert prompt == whole
    response, _ = ask("responses", input=[{"type": "item_reference", "id": "msg_nobodys"}, USER])
    assert (response.status_code, response.json()["error"]["param"]) == (404, "input")


def test_images_in_results_of_tools_are_said_to_be_left_out(ask: Ask) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    image, line = {"type": "image", "source": source}, "[image left out: this model reads text only]"
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "A page."}, image]}
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "read", "input": {}}]}
    response, prompt = ask("messages", messages=[USER, use, {"role": "user", "content": [result]}], tools=[READ])
    assert response.status_code == 200, response.text
    assert f"A page.\n{line}" in prompt
    url = {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo="}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "A."}, url]}
    response, prompt = ask("responses", input=[USER, call, output])
    assert response.status_code == 200, response.text
    assert line in prompt
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    messages = [USER, {"role": "assistant", "tool_calls": calls_of(["{}"])}, {"role": "tool", "content": [part]}]
    response, prompt = ask("chat/completions", messages=messages)
    assert response.status_code == 200, response.text
    assert line in prompt
    # What the user shows is asked about.
    response, _ = ask("messages", messages=[{"role": "user", "content": [image]}])
    assert response.status_code == 400


def test_blocks_of_anthropics_tools_are_read_as_text(ask: Ask) -> None:
    found = {"type": "search_result", "title": "Tea", "source": "tea.txt", "content": [{"type": "text", "text": "Hot"}]}
    plain = {"type": "document", "title": "Notes", "source": {"type": "text", "media_type": "text/plain", "data": "Da"}}
    inner = {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "Inner"}]}}
    results = [{"type": "web_search_result", "url": "https://a.b", "title": "T", "encrypted_content": "x" * 99}]
    history = [
        {"role": "user", "content": [found, plain, inner, {"type": "text", "text": "Go"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "tea"}},
                {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": results},
                {"type": "text", "text": "I read.", "citations": []},
                {"type": "tool_use", "id": "toolu_1", "name": "read", "input": '{"pa'},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "tool_reference", "tool_name": "read"}, found],
                }
            ],
        },
    ]
    response, prompt = ask("messages", messages=history, tools=[READ])
    assert response.status_code == 200, response.text
    for text in ("Tea\ntea.txt\nHot", "Notes\nDa", "Inner", '[web_search] {"query":"tea"}', "https://a.b", "I read."):
        assert text in prompt
    assert '<call read>{"pa</call>' in prompt
    assert "<|im_start|>tool\nTool: read\nTea\ntea.txt\nHot" in prompt
    assert "xxxx" not in prompt


def test_roles_of_context_are_the_users(ask: Ask) -> None:
    roles = [("user", "a"), ("ctx", "b"), ("msg", "c"), ("user", "d")]
    response, prompt = ask("messages", messages=[{"role": role, "content": text} for role, text in roles])
    assert response.status_code == 200, response.text
    assert prompt.count("<|im_start|>user") == 1
    assert re.search(r"user\na\n?b\n?c\n?d<", prompt)


def test_a_choice_among_allowed_tools(ask: Ask) -> None:
    functions = [{"name": name, "parameters": {"type": "object", "properties": {}}} for name in ("f", "g", "h")]
    chat_tools = [{"type": "function", "function": function} for function in functions]
    tools = [{"type": "function"} | function for function in functions]
    allowed = [{"type": "function", "function": {"name": "g"}}]
    of_chat = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": allowed}}
    of_responses = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}
    for seed in range(3):
        sampled = {"temperature": 2, "seed": seed}
        answer, prompt = ask(
            "chat/completions", messages=[USER], tools=chat_tools, tool_choice=of_chat, max_tokens=60, **sampled
        )
        assert "tools\nf,g,h<" in prompt
        names = {call["function"]["name"] for call in answer.json()["choices"][0]["message"]["tool_calls"]}
        assert names == {"g"}
        answer, _ = ask("responses", input="Hi", tools=tools, tool_choice=of_responses, max_output_tokens=60, **sampled)
        assert {item["name"] for item in answer.json()["output"]} == {"g"}
    for mode, status in (("auto", 200), ("maybe", 400)):
        of_chat = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": allowed}}
        assert ask("chat/completions", messages=[USER], tools=chat_tools, tool_choice=of_chat)[0].status_code == status
    of_chat["allowed_tools"] = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "nobody"}}]}
    response, _ = ask("chat/completions", messages=[USER], tools=chat_tools, tool_choice=of_chat)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tool_choice")


def test_a_call_of_a_tool_that_is_not_allowed_stays_text(ask: Ask) -> None:
    functions = [{"name": name, "parameters": {"type": "object", "properties": {}}} for name in ("f", "g")]
    tools = [{"type": "function", "function": function} for function in functions]
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "g"}}]}
    for name in ("f", "g"):
        said = f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>'
        answer, _ = ask(
            "chat/completions",
            messages=[USER],
            tools=tools,
            tool_choice={"type": "allowed_tools", "allowed_tools": allowed},
            structured_outputs={"choice": [said]},
            max_tokens=60,
        )
        message = answer.json()["choices"][0]["message"]
        assert bool(message.get("tool_calls")) == (name == "g"), message
        assert (message["content"] or "") == ("f{}" if name == "f" else "")


def test_a_function_is_chosen_without_a_type(ask: Ask) -> None:
    tools = [{"function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    choice = {"function": {"name": "f"}}
    answer, _ = ask("chat/completions", messages=[USER], tools=tools, tool_choice=choice, max_tokens=20)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "f"


def test_text_blocks_of_a_message_are_one_text(ask: Ask) -> None:
    blocks = [{"type": "text", "text": text} for text in ("One.", "Two.")]
    marked = [blocks[0] | {"cache_control": {"type": "ephemeral"}}, blocks[1]]
    prompts = {
        ask("messages", system=said, messages=[{"role": "user", "content": said}])[1] for said in (blocks, marked)
    }
    (prompt,) = prompts
    assert prompt.count("One.Two.") == 2


@pytest.mark.parametrize("thinking", [{"type": "deep"}, {}, {"type": "enabled", "budget_tokens": 0}])
def test_unknown_ways_of_thinking_are_refused(ask: Ask, thinking: dict[str, Any]) -> None:
    response, _ = ask("messages", messages=[USER], thinking=thinking)
    assert response.status_code == 400
    assert "thinking." in response.json()["error"]["message"]
