"""Tools, thinking and structured outputs as the `anthropic` SDK asks for them."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest

USER = {"role": "user", "content": "Weather in Rome?"}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"name": "get_weather", "description": "Weather of a city.", "input_schema": SCHEMA}
NOW: Any = {"name": "now", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}}
NAMED: Any = {"type": "tool", "name": "get_weather"}


@pytest.fixture
def ask(tools_server):
    """Asks without thinking, which is all that the default model would do otherwise."""
    with anthropic.Anthropic(base_url=tools_server.url, api_key="EMPTY", max_retries=0) as client:
        common = {"model": tools_server.model, "max_tokens": 60, "thinking": {"type": "disabled"}}

        def create(streamed: bool, **fields: Any) -> anthropic.types.Message:
            asked = {**common, "messages": [USER], "extra_body": {"temperature": 0}, **fields}
            if not streamed:
                return client.messages.create(**asked)
            with client.messages.stream(**asked) as events:
                return events.get_final_message()

        yield create


def is_weather(value: Any) -> bool:
    return set(value) == {"city", "days"} and value["city"] in ("Rome", "Paris") and value["days"] in (1, 2)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_tool_is_called_as_asked_and_its_result_is_read(ask, streamed):
    message = ask(streamed, tools=[WEATHER, NOW], tool_choice=NAMED)
    (call,) = message.content
    assert (call.type, call.name, message.stop_reason) == ("tool_use", "get_weather", "tool_use")
    assert is_weather(call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny."}
    turns = [USER, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = ask(streamed, tools=[WEATHER, NOW], tool_choice={"type": "none"}, messages=turns, max_tokens=5)
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens > message.usage.input_tokens


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_any_tool_may_be_demanded_and_only_one_of_them(ask, streamed):
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    message = ask(streamed, tools=[WEATHER, NOW], tool_choice=choice)
    (call,) = message.content
    assert call.type == "tool_use"
    assert call.name == "now" or is_weather(call.input)
    assert message.stop_reason == "tool_use"


def test_tools_that_are_not_used_leave_text(ask):
    for fields in ({"tools": [WEATHER]}, {"tools": [WEATHER], "tool_choice": {"type": "auto"}}):
        message = ask(False, max_tokens=5, **fields)
        assert [block.type for block in message.content] == ["text"]
        assert message.stop_reason in ("end_turn", "max_tokens")


def test_a_call_that_is_cut_off_is_told_as_such(ask):
    message = ask(False, tools=[WEATHER], tool_choice=NAMED, max_tokens=2)
    assert message.stop_reason == "max_tokens"


def test_thinking_is_a_block_of_its_own(ask):
    whole, streamed = (ask(way, thinking={"type": "adaptive"}, max_tokens=5) for way in (False, True))
    assert [block.type for block in whole.content] == ["thinking"]
    assert streamed.content[0].thinking == whole.content[0].thinking


def test_output_has_the_schema_that_was_asked_for(ask):
    message = ask(False, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    assert is_weather(json.loads(message.content[0].text))
