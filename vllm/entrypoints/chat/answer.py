"""From the engine's outputs to the events of an answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

from vllm.entrypoints.chat.answer_format import AnswerFormat
from vllm.entrypoints.chat.answer_parser import AnswerParser
from vllm.entrypoints.chat.events import (
    AnswerEnd,
    AnswerEvent,
    Finished,
    PromptRead,
    Reasoning,
    Step,
    StepEvent,
    Text,
    Tokens,
    Usage,
)
from vllm.entrypoints.chat.logprobs import num_logprobs
from vllm.outputs import CompletionOutput, RequestOutput


@dataclass(frozen=True)
class AnswerReading:
    """How outputs are read.

    Attributes:
        parsers: One a choice.
        shows_reasoning: Tell of reasoning, instead of leaving it out.
        shows_tokens: Tell of tokens one by one.
        is_silent: The prompt alone was asked for: choices end without saying anything.
        echoed: Text that each choice repeats first.
        count_tokens: How many tokens a text has; None where reasoning is not told apart.
    """

    format: AnswerFormat
    parsers: list[AnswerParser]
    shows_reasoning: bool
    shows_tokens: bool
    echoed: str
    count_tokens: Callable[[str], Awaitable[int]] | None = None
    is_silent: bool = False

    def events(self, output: CompletionOutput) -> list[StepEvent]:
        """What is new in an output."""
        if self.is_silent:
            return [] if output.finish_reason is None else [Finished("stop", None)]
        parser = self.parsers[output.index]
        events: list[StepEvent] = []
        if self.shows_tokens:
            events.append(Tokens(output.token_ids, output.logprobs))
        parts = parser.feed(output.text, output.finish_reason is not None)
        events += parts if self.shows_reasoning else [part for part in parts if not isinstance(part, Reasoning)]
        if output.finish_reason is not None:
            reason = self.format.finish_reason(output.finish_reason, parser.num_calls)
            events.append(Finished(reason, output.stop_reason))
        return events


async def answer_events(
    outputs: AsyncGenerator[RequestOutput, None], reading: AnswerReading
) -> AsyncGenerator[AnswerEvent, None]:
    """The events of a request's outputs, each of which comes once: in deltas, or whole."""
    generated = [0] * len(reading.parsers)
    item: RequestOutput | None = None
    usage: Usage | None = None
    async with aclosing(outputs) as items:
        async for item in items:
            if usage is None:
                usage = Usage(len(item.prompt_token_ids), item.num_cached_tokens, item.num_cache_write_tokens)
                yield PromptRead(item.prompt_token_ids, usage)
                for choice in range(len(generated)) if reading.echoed else ():
                    yield Step(choice, (Text(reading.echoed),), 0)
            for output in item.outputs:
                generated[output.index] += 0 if reading.is_silent else len(output.token_ids)
                yield Step(output.index, reading.events(output), generated[output.index])
    if item is None or usage is None:
        raise RuntimeError("the engine gave no output for a chat")
    usage = usage.with_completion(
        (0 if reading.is_silent else item.num_discarded_tokens) + sum(generated),
        await _reasoning_tokens(reading, generated),
    )
    yield AnswerEnd(usage, item.prompt_logprobs)


async def _reasoning_tokens(reading: AnswerReading, generated: list[int]) -> int | None:
    """Tokens of the reasoning's text, since a chat counts all of its output together."""
    if reading.count_tokens is None:
        return None
    total = 0
    for parser, most in zip(reading.parsers, generated, strict=True):
        text = "".join(parser.thoughts)
        total += min(most, await reading.count_tokens(text)) if text else 0
    return total


async def collect(events: AsyncGenerator[AnswerEvent, None]) -> tuple[list[AnswerEvent], int]:
    """All events of an answer, and how many log-probabilities they hold, about."""
    async with aclosing(events):
        collected = [event async for event in events]
    rows = [
        part.logprobs
        for event in collected
        if isinstance(event, Step)
        for part in event.events
        if isinstance(part, Tokens)
    ]
    return collected, num_logprobs([event.prompt_logprobs for event in collected if isinstance(event, AnswerEnd)], rows)
