"""Tools, reasoning and constrained outputs over HTTP: the real server, asked by the SDK as clients ask."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

MESSAGES = [{"role": "system", "content": "You use tools."}, {"role": "user", "content": "Weather in Rome?"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}, "unit": {"$ref": "#/$defs/unit"}},
    "required": ["city", "unit"],
    "$defs": {"unit": {"enum": ["C", "F"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
# The server has a reasoning parser; without this all that the default model says would be reasoning.
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
# The default model calls nothing by itself: its words are put into its mouth.
ARGUMENTS = r'\{"city": "(Rome|Paris)", "unit": "C"\}'
CALL = rf'(Sure\. )?<tool_call>\n\{{"name": "get_weather", "arguments": {ARGUMENTS}\}}\n</tool_call>'


@pytest.fixture(scope="module")
def url(tools_server: Any) -> str:
    return str(tools_server.url)


@pytest.fixture(scope="module")
def sdk(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


def ask(sdk: openai.OpenAI, stream: bool = False, **fields: Any) -> dict[str, Any]:
    """The first choice of an answer: `content`, `reasoning`, `calls` (name, arguments), `finish_reason`."""
    model = sdk.models.list().data[0].id
    body = {"max_tokens": 120, "temperature": 0, **fields}
    extra = NO_THINKING | body.pop("extra_body", {})
    if not stream:
        answer = sdk.chat.completions.create(model=model, messages=MESSAGES, extra_body=extra, **body)
        (choice,) = answer.choices
        calls = choice.message.tool_calls or []
        assert all(call.id and call.type == "function" for call in calls)
        return {
            "content": choice.message.content or "",
            "reasoning": choice.message.reasoning or "",  # type: ignore[attr-defined]
            "calls": [(call.function.name, call.function.arguments) for call in calls],
            "finish_reason": choice.finish_reason,
        }
    seen: dict[str, Any] = {"content": "", "reasoning": "", "calls": [], "finish_reason": None}
    for chunk in sdk.chat.completions.create(model=model, messages=MESSAGES, stream=True, extra_body=extra, **body):
        for part in chunk.choices:
            seen["content"] += part.delta.content or ""
            seen["reasoning"] += getattr(part.delta, "reasoning", None) or ""
            seen["finish_reason"] = part.finish_reason or seen["finish_reason"]
            for call in part.delta.tool_calls or []:
                if call.id:
                    assert call.index == len(seen["calls"])
                    seen["calls"].append((call.function.name, ""))
                name, arguments = seen["calls"][call.index]
                seen["calls"][call.index] = (name, arguments + (call.function.arguments or ""))
    return seen


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_function_is_called_with_arguments_of_its_schema(sdk: openai.OpenAI, stream: bool) -> None:
    answer = ask(sdk, stream, tools=TOOLS, tool_choice=NAMED)
    ((name, arguments),) = answer["calls"]
    assert name == "get_weather"
    assert json.loads(arguments)["city"] in ("Rome", "Paris")
    assert json.loads(arguments)["unit"] in ("C", "F")
    assert answer["finish_reason"] == "stop"
    assert answer["content"] == ""


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_required_call_is_made_with_arguments_of_its_schema(sdk: openai.OpenAI, stream: bool, seed: int) -> None:
    single = ask(sdk, stream, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, temperature=1, seed=seed)
    ((name, arguments),) = single["calls"]
    assert name in ("get_weather", "now")
    assert json.loads(arguments).keys() == ({"city", "unit"} if name == "get_weather" else set())
    assert single["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_the_model_makes_by_itself_are_found(sdk: openai.OpenAI, stream: bool) -> None:
    answer = ask(sdk, stream, tools=TOOLS, extra_body={"structured_outputs": {"regex": CALL}})
    ((name, arguments),) = answer["calls"]
    assert (name, json.loads(arguments)["unit"]) == ("get_weather", "C")
    assert answer["content"] in ("", "Sure.")
    assert answer["finish_reason"] == "tool_calls"


def test_tool_choice_none_leaves_all_as_text(sdk: openai.OpenAI) -> None:
    answer = ask(sdk, tools=TOOLS, tool_choice="none", extra_body={"structured_outputs": {"regex": CALL}})
    assert answer["calls"] == []
    assert "<tool_call>" in answer["content"]
    assert answer["finish_reason"] == "stop"


def test_a_conversation_with_calls_and_results_goes_on(sdk: openai.OpenAI) -> None:
    function = {"name": "get_weather", "arguments": '{"city": "Rome", "unit": "C"}'}
    history: Any = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "a", "content": "21 degrees"},
    ]
    model = sdk.models.list().data[0].id
    answer = sdk.chat.completions.create(
        model=model,
        messages=history,
        tools=TOOLS,
        max_tokens=4,
        extra_body=NO_THINKING,  # type: ignore[arg-type]
    )
    assert answer.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_of_several_outputs_has_calls_of_each(sdk: openai.OpenAI, stream: bool) -> None:
    model = sdk.models.list().data[0].id
    fields: Any = {"tools": TOOLS, "tool_choice": NAMED, "n": 3, "temperature": 1, "seed": 5, "max_tokens": 120}
    answer = sdk.chat.completions.create(
        model=model,
        messages=MESSAGES,
        stream=stream,
        extra_body=NO_THINKING,
        **fields,  # type: ignore[arg-type]
    )
    arguments = {0: "", 1: "", 2: ""}
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            for call in (choice.delta if stream else choice.message).tool_calls or []:
                arguments[choice.index] += call.function.arguments
    assert all(json.loads(text)["city"] in ("Rome", "Paris") for text in arguments.values())


PERSON: Any = [{"role": "user", "content": "Tell me about a person named Ann, aged 31, as JSON."}]


class Person(BaseModel):
    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=99)


def test_the_sdk_parses_answers_into_its_own_classes(sdk: openai.OpenAI) -> None:
    model = sdk.models.list().data[0].id
    answer = sdk.chat.completions.parse(
        model=model,
        messages=PERSON,
        response_format=Person,
        max_tokens=120,
        temperature=0,
        extra_body=NO_THINKING,  # type: ignore[arg-type]
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"guided_choice": ["red", "blue"]}, "red|blue"),
        ({"guided_regex": r"\d{3}-\d"}, r"\d{3}-\d"),
        ({"guided_grammar": 'root ::= "<" [a-c]{2} ">"'}, "<[a-c]{2}>"),
        ({"guided_json": {"enum": ["x", 7]}}, '"x"|7'),
        ({"structured_outputs": {"json": '{"enum": ["x", 7]}'}}, '"x"|7'),
        (
            {"response_format": {"type": "structural_tag", "format": {"type": "regex", "pattern": "ab{1,3}c"}}},
            "ab{1,3}c",
        ),
        ({"response_format": {"type": "json_object"}, "max_tokens": 4}, r"(?s)\{.*"),
    ],
)
def test_every_spelling_of_a_form_is_honoured(sdk: openai.OpenAI, extra: dict[str, Any], pattern: str) -> None:
    assert re.fullmatch(pattern, ask(sdk, extra_body=extra)["content"])
    model = sdk.models.list().data[0].id
    text = sdk.completions.create(model=model, prompt="Say:", max_tokens=120, temperature=0, extra_body=extra)
    assert re.fullmatch(pattern, text.choices[0].text)


def test_log_probabilities_cover_what_a_form_allows(sdk: openai.OpenAI) -> None:
    model = sdk.models.list().data[0].id
    answer = sdk.chat.completions.create(
        model=model, messages=MESSAGES, logprobs=True, top_logprobs=3, max_tokens=20,  # type: ignore[arg-type]
        extra_body=NO_THINKING | {"guided_choice": ["red", "blue"]},
    )  # fmt: skip
    entries = answer.choices[0].logprobs.content
    assert b"".join(bytes(e.bytes) for e in entries).decode().startswith(answer.choices[0].message.content)
    assert all(len(e.top_logprobs) == 3 for e in entries)


def test_the_form_begins_after_the_reasoning(sdk: openai.OpenAI, url: str) -> None:
    """The model may only write pieces of the end mark; some seed or other soon makes it write the whole."""
    ids = httpx.post(f"{url}/tokenize", json={"prompt": "</think>", "add_special_tokens": False}).json()["tokens"]
    extra = {
        "chat_template_kwargs": {"enable_thinking": True},
        "allowed_token_ids": ids,
        "logit_bias": {str(ids[1]): 4},
        "guided_choice": [">>>"],
    }
    for seed in range(20):
        fields: dict[str, Any] = {"temperature": 2, "seed": seed, "max_tokens": 24}
        answer = ask(sdk, extra_body=extra, **fields)
        assert answer["reasoning"]
        if answer["finish_reason"] == "stop":
            break
        assert answer["content"] == ""
    assert answer["content"] == ">>>"
    assert answer["finish_reason"] == "stop"
    assert "</think>" not in answer["reasoning"]
    assert ask(sdk, stream=True, extra_body=extra, **fields) == answer
    hidden = ask(sdk, extra_body=extra | {"include_reasoning": False}, **fields)
    assert hidden == answer | {"reasoning": ""}
    # Its tokens would tell it too.
    body = {
        "messages": MESSAGES,
        "max_tokens": 3,
        "include_reasoning": False,
        "logprobs": True,
        "return_token_ids": True,
    }
    choice = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
    assert (choice["logprobs"], choice["token_ids"]) == (None, None)
    lines = httpx.post(f"{url}/v1/chat/completions", json=body | {"stream": True}, timeout=60).text.splitlines()
    choices = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert not any(choice["logprobs"] or "token_ids" in choice for choice in choices)


@pytest.mark.parametrize(
    ("effort", "kwargs", "thinks"),
    [("none", {}, False), ("low", {}, True), ("high", {"enable_thinking": False}, False)],
)
def test_an_effort_of_none_turns_reasoning_off_where_nothing_else_is_said(url, effort, kwargs, thinks):
    body = {"messages": MESSAGES, "max_tokens": 4, "reasoning_effort": effort, "chat_template_kwargs": kwargs}
    message = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]
    assert (bool(message.get("reasoning")), bool(message["content"])) == (thinks, not thinks)


def test_costly_forms_hold_up_nobody(sdk: openai.OpenAI) -> None:
    """Answers come while many costly forms are refused, each with a 400."""

    def costly(i: int) -> int:
        try:
            ask(sdk, extra_body={"guided_regex": f"(({chr(97 + i)}?){{1,50}}){{1,50}}"})
        except openai.BadRequestError as error:
            return error.status_code
        return 200

    with ThreadPoolExecutor(8) as threads:
        refused = list(threads.map(costly, range(8)))
        assert ask(sdk, max_tokens=5)["content"]
    assert refused == [400] * 8


def test_a_schema_that_cannot_be_enforced_is_refused_where_it_is_relied_on(sdk):
    tags = {"type": "array", "items": {"type": "string", "pattern": "^[ab]$"}, "uniqueItems": True, "minItems": 1}
    parameters = {"type": "object", "properties": {"tags": tags}, "required": ["tags"]}
    function = {"name": "tag", "parameters": parameters}
    schema = {"name": "tags", "schema": parameters}
    for fields, param in (
        ({"response_format": {"type": "json_schema", "json_schema": schema}}, "response_format"),
        ({"tools": [{"type": "function", "function": function | {"strict": True}}]}, "tools"),
    ):
        with pytest.raises(openai.BadRequestError, match="a JSON schema with uniqueItems") as caught:
            ask(sdk, **fields, **({"tool_choice": "required"} if param == "tools" else {}))
        assert caught.value.param == param
    # Without strict, arguments follow the rest of the schema.
    tools: list[Any] = [{"type": "function", "function": function}]
    for name, arguments in ask(sdk, tools=tools, tool_choice="required", parallel_tool_calls=False, seed=2)["calls"]:
        assert name == "tag"
        assert arguments.replace(" ", "").replace("\n", "").startswith(('{"tags":["a"', '{"tags":["b"'))


def test_letters_come_out_as_the_schema_writes_them(sdk):
    schema = {"type": "object", "properties": {"größe": {"enum": ["année", "字段1"]}}, "required": ["größe"]}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    assert json.loads(ask(sdk, response_format=form)["content"])["größe"] in ("année", "字段1")
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        ((_, arguments),) = ask(sdk, tools=tools, tool_choice=choice, parallel_tool_calls=False)["calls"]
        assert json.loads(arguments)["größe"] in ("année", "字段1")


def test_allowed_token_ids_and_a_form_both_hold(url: str) -> None:
    def ids(text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        return httpx.post(f"{url}/tokenize", json=body).json()["tokens"]

    def complete(**fields: Any) -> httpx.Response:
        return httpx.post(f"{url}/v1/completions", json={**form, **fields}, timeout=60)

    form = {"structured_outputs": {"choice": ["red", "blue"]}, "prompt": "A colour:", "max_tokens": 8}
    for choice in ("red", "blue"):
        answer = complete(allowed_token_ids=ids(choice)).json()
        assert answer["choices"][0]["text"] == choice
        assert answer["choices"][0]["finish_reason"] == "stop"
    for _ in range(2):
        response = complete(allowed_token_ids=ids("seven"))
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, "allowed_token_ids"), error
    assert complete().json()["choices"][0]["text"] in ("red", "blue"), "others may ask for that form"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_while_thinking_calls_nothing(sdk: openai.OpenAI, stream: bool) -> None:
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    answer = ask(sdk, stream, tools=TOOLS, tool_choice=NAMED, max_tokens=4, extra_body=thinking)
    assert answer["reasoning"]
    assert (answer["calls"], answer["content"], answer["finish_reason"]) == ([], "", "length")


def test_tokens_of_the_reasoning_are_counted(url: str) -> None:
    def details(**fields: Any) -> list[int]:
        body = {"messages": MESSAGES, "max_tokens": 5} | fields
        whole = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
        lines = httpx.post(f"{url}/v1/chat/completions", json=streamed, timeout=60).text.splitlines()
        last = json.loads([line for line in lines if line.startswith("data: {")][-1][6:])
        return [part["usage"]["completion_tokens_details"]["reasoning_tokens"] for part in (whole, last)]

    assert details(temperature=0) == [5, 5]
    assert details(n=2, include_reasoning=False, temperature=0) == [10, 10]
    assert details(**NO_THINKING) == [0, 0]


def test_a_broken_call_becomes_text(sdk: openai.OpenAI) -> None:
    broken = '<tool_call>{"name": "now", "arguments": {"a": }}</tool_call>'
    answer = ask(sdk, tools=TOOLS, extra_body={"guided_choice": [broken]})
    assert (answer["content"], answer["calls"], answer["finish_reason"]) == (broken, [], "stop")
    cut = '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome'
    for stream in (False, True):
        answer = ask(sdk, stream, tools=TOOLS, extra_body={"guided_choice": [cut[:30]]})
        assert (answer["content"], answer["calls"], answer["finish_reason"]) == (cut[:30], [], "stop")
    answer = ask(sdk, tools=TOOLS, extra_body={"guided_choice": [cut]})
    assert (answer["content"], answer["calls"]) == (cut, [])
