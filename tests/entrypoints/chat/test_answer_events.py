"""The events of an answer, and what each dialect writes of them: in pieces and at once it is the same answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.entrypoints.anthropic.writer import MessageWriter
from vllm.entrypoints.chat.answer import AnswerReading, answer_events, collect
from vllm.entrypoints.chat.answer_format import AnswerFormat
from vllm.entrypoints.chat.events import (
    AnswerEnd,
    AnswerEvent,
    CallArguments,
    CallBegun,
    CallEnded,
    Finished,
    PromptRead,
    Reasoning,
    Step,
    Text,
    Tokens,
)
from vllm.entrypoints.chat.reasoning_parsers import REASONING_PARSERS
from vllm.entrypoints.chat.service import ChatAnswer
from vllm.entrypoints.chat.tool_parsers import TOOL_PARSERS
from vllm.entrypoints.openai.chat_chunks import ChunkWriter
from vllm.entrypoints.openai.chat_message import chat_completion
from vllm.entrypoints.openai.protocol import ChatCompletionRequest
from vllm.entrypoints.responses.store import StoredResponse
from vllm.entrypoints.responses.writer import ResponseWriter
from vllm.outputs import CompletionOutput, RequestOutput

TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
FORMAT = AnswerFormat(tools=TOOLS, parser=TOOL_PARSERS["hermes"], reasoning=REASONING_PARSERS["qwen3"])
CALL = '<tool_call>{"name": "now", "arguments": {"zone": "CET"}}</tool_call>'
ANSWER = f"<think>Hm.</think>Let me see.{CALL}{CALL}Wait for it."
REQUEST = ChatCompletionRequest(messages=[])


def events_of(text: str, cuts: list[int], format: AnswerFormat = FORMAT, **reading: Any) -> list[AnswerEvent]:
    """The events of an output that comes in these pieces, a token each; the last says that it was stopped."""
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]

    async def outputs() -> AsyncGenerator[RequestOutput, None]:
        for i, (a, b) in enumerate(pairwise(ends)):
            reason = "stop" if i == len(ends) - 2 else None
            yield RequestOutput(
                "id", None, [1, 2, 3], [CompletionOutput(0, text[a:b], [i], finish_reason=reason)], True
            )

    fields = {"shows_reasoning": True, "shows_tokens": True, "echoed": ""} | reading
    read = AnswerReading(format, [format.make_parser(False)], **fields)
    return asyncio.run(collect(answer_events(outputs(), read)))[0]


def parts_of(events: list[AnswerEvent]) -> list[Any]:
    return [part for step in events if isinstance(step, Step) for part in step.events if not isinstance(part, Tokens)]


def answer(format: AnswerFormat = FORMAT) -> ChatAnswer:
    async def nothing() -> AsyncGenerator[AnswerEvent, None]:
        return
        yield

    return ChatAnswer("m", "assistant", 1, format.is_plain, None, nothing())


def test_an_answer_at_once_has_its_parts_in_the_order_of_the_text() -> None:
    events = events_of(ANSWER, [])
    assert isinstance(events[0], PromptRead) and isinstance(events[-1], AnswerEnd)
    parts = parts_of(events)
    ids = [part.id for part in parts if isinstance(part, CallBegun)]
    assert parts == [
        Reasoning("Hm."),
        Text("Let me see."),
        *(CallBegun(0, ids[0], "now"), CallArguments(0, '{"zone": "CET"}'), CallEnded(0)),
        *(CallBegun(1, ids[1], "now"), CallArguments(1, '{"zone": "CET"}'), CallEnded(1)),
        Text("Wait for it."),
        Finished("tool_calls", None),
    ]


def test_usage_counts_every_token_and_steps_count_up() -> None:
    events = events_of(ANSWER, list(range(0, len(ANSWER), 9)))
    generated = [event.num_generated for event in events if isinstance(event, Step)]
    assert generated == list(range(1, len(generated) + 1))
    assert isinstance(events[-1], AnswerEnd)
    assert (events[-1].usage.prompt, events[-1].usage.completion) == (3, len(generated))


def test_hidden_reasoning_is_told_neither_as_text_nor_by_tokens() -> None:
    events = events_of(ANSWER, [4, 12], shows_reasoning=False, shows_tokens=False)
    assert "Hm" not in repr(events)
    assert not any(isinstance(part, Tokens) for step in events if isinstance(step, Step) for part in step.events)


def message(events: list[AnswerEvent], format: AnswerFormat = FORMAT) -> dict[str, Any]:
    """As a whole chat completion: the message and the reason of its end, with calls that have numbers as ids."""
    (choice,) = chat_completion({}, REQUEST, answer(format), events, None)["choices"]
    shown = {key: choice["message"][key] for key in ("content", "reasoning")} | {"end": choice["finish_reason"]}
    return shown | {"calls": [call["function"] for call in choice["message"].get("tool_calls", [])]}


def joined_chunks(events: list[AnswerEvent], format: AnswerFormat = FORMAT) -> dict[str, Any]:
    writer = ChunkWriter({}, REQUEST, answer(format), None)
    made: dict[str, Any] = {"content": "", "reasoning": "", "end": None, "calls": []}
    for event in events:
        for chunk in writer.write(event):
            (choice,) = chunk["choices"]
            made["end"] = choice["finish_reason"] or made["end"]
            for key in ("content", "reasoning"):
                made[key] += choice["delta"].get(key, "")
            for call in choice["delta"].get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(made["calls"])
                    made["calls"].append(call["function"])
                else:
                    made["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return made | {key: made[key] or None for key in ("content", "reasoning")}


def response_items(events: list[AnswerEvent]) -> list[tuple[str, str]]:
    """Items of a response; checks that the events of its stream tell the same."""
    writer = ResponseWriter(StoredResponse({"id": "r", "output": []}, [], []), False, None)
    told = [news for event in events for news in writer.take(event)] + list(writer.finish())
    deltas: dict[int, str] = {}
    for news in told:
        if news["type"].endswith(".delta"):
            deltas[news["output_index"]] = deltas.get(news["output_index"], "") + news["delta"]
    items = []
    for index, item in enumerate(writer.response["output"]):
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert text == deltas.get(index, "")
        items.append((item["type"], text))
    return items


def message_blocks(events: list[AnswerEvent]) -> list[tuple[str, str]]:
    """Blocks of an Anthropic message; checks that the events of its stream tell the same."""
    writer = MessageWriter("msg", "m", silent=False)
    told = [news for event in events for news in writer.take(event)]
    assert [told[0]["type"], told[-2]["type"], told[-1]["type"]] == ["message_start", "message_delta", "message_stop"]
    deltas: dict[int, str] = {}
    for news in told:
        if news["type"] == "content_block_delta":
            (text,) = (value for key, value in news["delta"].items() if key != "type")
            deltas[news["index"]] = deltas.get(news["index"], "") + text
    blocks = []
    for index, block in enumerate(writer.message()["content"]):
        shown = deltas.get(index, "")
        if block["type"] == "tool_use":
            assert block["input"] == json.loads(shown)
        else:
            assert block[block["type"]] == shown
        blocks.append((block["type"], shown))
    return blocks


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, len(ANSWER)), max_size=20))
def test_every_dialect_writes_the_same_answer_however_it_comes(cuts: list[int]) -> None:
    events = events_of(ANSWER, cuts)
    arguments = {"name": "now", "arguments": '{"zone": "CET"}'}
    assert message(events) == joined_chunks(events) == {
        "content": "Let me see.Wait for it.",
        "reasoning": "Hm.",
        "calls": [arguments, arguments],
        "end": "tool_calls",
    }  # fmt: skip
    texts = ["Hm.", "Let me see.", arguments["arguments"], arguments["arguments"], "Wait for it."]
    kinds = ["reasoning", "message", "function_call", "function_call", "message"]
    assert response_items(events) == list(zip(kinds, texts, strict=True))
    kinds = ["thinking", "text", "tool_use", "tool_use", "text"]
    assert message_blocks(events) == list(zip(kinds, texts, strict=True))


@pytest.mark.parametrize("cuts", [[], [3], list(range(1, 9))])
def test_an_answer_without_parts_is_text_that_repeats_what_it_echoes(cuts: list[int]) -> None:
    plain = AnswerFormat()
    events = events_of("<think>x", cuts, plain, echoed="Once ")
    for made in (message(events, plain), joined_chunks(events, plain)):
        assert made == {"content": "Once <think>x", "reasoning": None, "calls": [], "end": "stop"}
    assert message(events_of("", [], plain), plain)["content"] == ""
    assert message(events_of("", []))["content"] is None
