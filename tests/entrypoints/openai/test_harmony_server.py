"""Answers in gpt-oss' format over HTTP: the default model, whose words are put into its mouth, read by its parsers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.conftest import ServerFactory

TOOLS: Any = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}]
THOUGHT = "<|channel|>analysis<|message|>They ask.<|end|><|start|>assistant"
CALL = f'{THOUGHT}<|channel|>commentary to=functions.now <|constrain|>json<|message|>{{"zone": "UTC"}}<|call|>'
SAID = f"{THOUGHT}<|channel|>final<|message|>It is noon."


@pytest.fixture(scope="module")
def sdk(server_factory: ServerFactory) -> Iterator[openai.OpenAI]:
    server = server_factory("--enable-auto-tool-choice", "--tool-call-parser", "openai", "--max-model-len", "1024")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as client:
        yield client


def words(text: str) -> dict[str, Any]:
    return {"structured_outputs": {"choice": [text]}}


def asked(sdk: openai.OpenAI) -> dict[str, Any]:
    return {
        "model": sdk.models.list().data[0].id,
        "messages": [{"role": "user", "content": "What time is it?"}],
        "tools": TOOLS,
        "max_tokens": 120,
    }


def test_calls_and_reasoning_of_a_chat(sdk: openai.OpenAI) -> None:
    (choice,) = sdk.chat.completions.create(**asked(sdk), extra_body=words(CALL)).choices
    (call,) = choice.message.tool_calls or ()
    assert (call.function.name, json.loads(call.function.arguments)) == ("now", {"zone": "UTC"})
    assert (choice.finish_reason, choice.message.content or "") == ("tool_calls", "")
    assert choice.message.reasoning == "They ask."  # type: ignore[attr-defined]
    (choice,) = sdk.chat.completions.create(**asked(sdk), extra_body=words(SAID)).choices
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls or []) == (
        "stop",
        "It is noon.",
        [],
    )


def test_a_chat_that_comes_in_pieces(sdk: openai.OpenAI) -> None:
    seen = {"reasoning": "", "content": "", "arguments": ""}
    for chunk in sdk.chat.completions.create(**asked(sdk), stream=True, extra_body=words(CALL)):
        for part in chunk.choices:
            seen["reasoning"] += getattr(part.delta, "reasoning", None) or ""
            seen["content"] += part.delta.content or ""
            for call in part.delta.tool_calls or ():
                seen["arguments"] += call.function.arguments or "" if call.function else ""
    assert seen == {"reasoning": "They ask.", "content": "", "arguments": '{"zone": "UTC"}'}


def test_responses_have_reasoning_and_calls_as_items(sdk: openai.OpenAI) -> None:
    response = sdk.responses.create(
        model=sdk.models.list().data[0].id,
        input="What time is it?",
        tools=[{"type": "function", "name": "now", "parameters": {"type": "object"}, "strict": False}],
        max_output_tokens=120,
        extra_body=words(CALL),
    )
    assert [item.type for item in response.output] == ["reasoning", "function_call"]
    call: Any = response.output[1]
    assert (call.name, json.loads(call.arguments)) == ("now", {"zone": "UTC"})
