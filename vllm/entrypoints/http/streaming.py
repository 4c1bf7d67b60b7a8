"""Answers that take a while: they end when the client leaves, and streams are server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, Self, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm.entrypoints.http.errors import describe, error_body

DONE = b"data: [DONE]\n\n"
_T = TypeVar("_T")


class ClientGoneError(Exception):
    """The client closed the connection before the answer was ready."""


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Awaits `work`, but cancels it as soon as the client leaves. The request body must have been read.

    Raises:
        ClientGoneError: the client left; `work` has been cancelled and has cleaned up.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def sse(payload: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


def typed_sse(payload: dict[str, Any]) -> bytes:
    """One server-sent event named by its payload's `type`, as the Anthropic and the Responses API have them."""
    return b"event: " + str(payload["type"]).encode() + b"\n" + sse(payload)


class EventStream(Response):
    """Sends events until they end or the client leaves; always closes their generator, which aborts the request.

    Made by `start`, which waits for the first event: until then an error can still be a status code. Later it can only
    be told in the stream, by `error_event`.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest

    @classmethod
    async def start(cls, events: AsyncGenerator[bytes, None]) -> Self:
        """Pulls the first event; whatever that raises is raised here."""
        try:
            return cls(await anext(events), events)
        except BaseException:
            await events.aclose()
            raise

    def error_event(self, exc: Exception) -> bytes:
        """The end of a stream that an error cuts off: an error object and `[DONE]`."""
        error = describe(exc)
        return sse(error_body(error.status, error.message, error.param)) + DONE

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._pump(send))
        except (ClientGoneError, OSError):
            return

    async def _pump(self, send: Send) -> None:
        async with aclosing(self._rest) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            try:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except OSError:
                raise
            except Exception as exc:
                event = self.error_event(exc)
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
