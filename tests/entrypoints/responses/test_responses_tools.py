"""Function calls, reasoning and structured outputs of the Responses API as the `openai` SDK asks for them."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, ConfigDict

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": True}
NAMED: Any = {"type": "function", "name": "get_weather"}


class Trip(BaseModel):
    model_config = ConfigDict(extra="forbid")

    city: Literal["Rome", "Paris"]
    days: Literal[1, 2]


@pytest.fixture
def sdk(tools_server):
    with openai.OpenAI(base_url=f"{tools_server.url}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


@pytest.fixture
def asked(tools_server) -> dict[str, Any]:
    """Without reasoning, which is all that the default model would do otherwise."""
    return {
        "model": tools_server.model,
        "input": "Weather in Rome?",
        "temperature": 0,
        "max_output_tokens": 60,
        "extra_body": {"chat_template_kwargs": {"enable_thinking": False}},
    }


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_function_is_called_and_its_output_is_read(sdk, asked, choice):
    response = sdk.responses.create(**asked, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)
    (call,) = response.output
    assert (call.type, call.name, call.status, response.status) == (
        "function_call",
        "get_weather",
        "completed",
        "completed",
    )
    assert json.loads(call.arguments)["city"] in ("Rome", "Paris")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    going_on = {**asked, "max_output_tokens": 5, "tools": [WEATHER], "tool_choice": "none"}
    by_id = sdk.responses.create(**{**going_on, "input": [output]}, previous_response_id=response.id)
    said = [{"role": "user", "content": asked["input"]}, call.model_dump(exclude_none=True), output]
    at_once = sdk.responses.create(**{**going_on, "input": said})
    assert by_id.usage.input_tokens == at_once.usage.input_tokens > response.usage.input_tokens
    assert by_id.output_text == at_once.output_text


def test_a_streamed_call_equals_the_call_at_once(sdk, asked):
    call = {**asked, "tools": [WEATHER], "tool_choice": NAMED}
    (whole,) = sdk.responses.create(**call).output
    with sdk.responses.stream(**call) as events:
        seen = list(events)
    kinds = [event.type.removeprefix("response.") for event in seen]
    assert kinds[:3] == ["created", "in_progress", "output_item.added"]
    assert kinds[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    assert "".join(e.delta for e in seen if e.type.endswith("arguments.delta")) == whole.arguments
    (streamed,) = seen[-1].response.output
    assert (streamed.name, streamed.arguments) == (whole.name, whole.arguments)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_output_has_the_form_that_was_asked_for(sdk, asked, streamed):
    if streamed:
        with sdk.responses.stream(**asked, text_format=Trip) as events:
            response = events.get_final_response()
    else:
        response = sdk.responses.parse(**asked, text_format=Trip)
    assert isinstance(response.output_parsed, Trip)


def test_reasoning_is_an_item_of_its_own(sdk, asked):
    thinking = {**asked, "extra_body": {}, "max_output_tokens": 5}
    response = sdk.responses.create(**thinking)
    (item,) = response.output
    assert item.type == "reasoning"
    assert 0 < response.usage.output_tokens_details.reasoning_tokens <= response.usage.output_tokens
    with sdk.responses.stream(**thinking) as events:
        text = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert text == item.content[0].text
    assert sdk.responses.create(**thinking | {"extra_body": {"include_reasoning": False}}).output == []
