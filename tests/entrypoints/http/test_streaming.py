"""Streams: merged, cut short by the client, and ended by errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from vllm.entrypoints.http.merging import merge
from vllm.entrypoints.http.streaming import ClientGoneError, EventStream, unless_disconnected
from vllm.exceptions import VLLMValidationError


class Source:
    """A stream of numbers in place of engine outputs, which says whether it has been closed."""

    def __init__(self, items: int, error: Exception | None = None, pause: float = 0.001) -> None:
        self.closed = False
        self._items, self._error, self._pause = items, error, pause

    async def stream(self) -> AsyncGenerator[Any, None]:
        try:
            for i in range(self._items):
                await asyncio.sleep(self._pause)
                yield i
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True


async def leaves_after(seconds: float) -> dict[str, str]:
    await asyncio.sleep(seconds)
    return {"type": "http.disconnect"}


async def never_leaves() -> dict[str, str]:
    await asyncio.Event().wait()
    return {}


@pytest.mark.parametrize("count", [1, 3])
def test_merge_gives_every_item_of_every_stream(count):
    async def go() -> list[tuple[int, Any]]:
        return [item async for item in merge([Source(4).stream() for _ in range(count)])]

    items = asyncio.run(go())
    assert sorted(items) == [(i, j) for i in range(count) for j in range(4)]
    for i in range(count):
        assert [item for index, item in items if index == i] == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [1, 3])
def test_leaving_a_merge_closes_all_streams(count):
    sources = [Source(1000) for _ in range(count)]

    async def go() -> None:
        merged = merge([source.stream() for source in sources])
        for _ in range(5):
            await anext(merged)
        await merged.aclose()

    asyncio.run(go())
    assert all(source.closed for source in sources)


def test_an_error_ends_the_merge_and_the_other_streams():
    sources = [Source(1000), Source(2, ValueError("second")), Source(1000)]

    async def go() -> None:
        async for _ in merge([source.stream() for source in sources]):
            pass

    with pytest.raises(ValueError, match="second"):
        asyncio.run(go())
    assert all(source.closed for source in sources)


def test_a_refusal_comes_before_the_first_item_of_the_others():
    sources = [Source(5, pause=0), Source(0, VLLMValidationError("no", "prompt"))]

    async def go() -> None:
        await anext(merge([source.stream() for source in sources]))

    with pytest.raises(VLLMValidationError):
        asyncio.run(go())


def test_work_is_cancelled_when_the_client_leaves():
    source = Source(10_000)

    async def work() -> int:
        return len([item async for item in source.stream()])

    with pytest.raises(ClientGoneError):
        asyncio.run(unless_disconnected(lambda: leaves_after(0.05), work()))
    assert source.closed


def test_work_gives_its_result_and_its_errors():
    async def result() -> int:
        return 7

    async def error() -> int:
        raise KeyError("x")

    assert asyncio.run(unless_disconnected(never_leaves, result())) == 7
    with pytest.raises(KeyError):
        asyncio.run(unless_disconnected(never_leaves, error()))


def send_stream(source: Source, receive: Any, fail_after: int | None = None) -> list[dict[str, Any]]:
    """What an `EventStream` over `source` sends; `send` fails like a broken connection after so many messages."""
    sent: list[dict[str, Any]] = []

    async def events() -> AsyncGenerator[bytes, None]:
        async for item in source.stream():
            yield b"%d " % item

    async def send(message: Any) -> None:
        if fail_after is not None and len(sent) >= fail_after:
            raise OSError("gone")
        sent.append(message)

    async def go() -> None:
        response = await EventStream.start(events())
        await response({"type": "http"}, receive, send)

    asyncio.run(go())
    return sent


def test_events_are_sent_as_they_come():
    sent = send_stream(Source(3), never_leaves)
    assert sent[0]["status"] == 200
    assert dict(sent[0]["headers"])[b"content-type"].startswith(b"text/event-stream")
    assert [message["body"] for message in sent[1:]] == [b"0 ", b"1 ", b"2 ", b""]
    assert sent[-1]["more_body"] is False


def test_an_error_before_the_first_event_is_raised():
    with pytest.raises(VLLMValidationError):
        send_stream(Source(0, VLLMValidationError("no")), never_leaves)


def test_a_later_error_is_an_event_and_says_nothing_about_our_insides():
    body = b"".join(message["body"] for message in send_stream(Source(2, KeyError("secret")), never_leaves)[1:])
    assert body.startswith(b'0 1 data: {"error":')
    assert body.endswith(b"data: [DONE]\n\n")
    assert b"secret" not in body


def test_a_client_that_leaves_closes_the_events():
    source = Source(10_000)
    send_stream(source, lambda: leaves_after(0.05))
    assert source.closed


def test_a_broken_connection_closes_the_events():
    source = Source(10_000)
    send_stream(source, never_leaves, fail_after=4)
    assert source.closed
