"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any

from vllm.engine.work_lanes import WorkLanes
from vllm.entrypoints.chat.answer import collect
from vllm.entrypoints.chat.logprobs import shaped
from vllm.entrypoints.chat.service import ChatAnswer, ChatService
from vllm.entrypoints.http.api_model import now, random_id
from vllm.entrypoints.http.streaming import DONE, EventStream, sse
from vllm.entrypoints.openai.chat_chunks import ChunkWriter
from vllm.entrypoints.openai.chat_message import chat_completion
from vllm.entrypoints.openai.protocol import ChatCompletionRequest, include_usage


class ServingChat:
    """Answers chat requests.

    Args:
        fingerprint: `system_fingerprint` of answers.
        always_usage: Streams end with their usage, asked for or not.
    """

    def __init__(
        self, chat: ChatService, lanes: WorkLanes, fingerprint: str | None, always_usage: bool = False
    ) -> None:
        self._chat = chat
        self._lanes = lanes
        self._fingerprint = fingerprint
        self._always_usage = always_usage

    async def create(self, request: ChatCompletionRequest, request_id: str | None) -> dict[str, Any] | EventStream:
        """The answer, or the stream of it once its first token is there.

        Args:
            request_id: What the client calls the request (`X-Request-Id`), or None.

        Raises:
            VLLMValidationError, ApiError, EngineDeadError: nothing has been sent yet.
        """
        public_id = f"chatcmpl-{request_id or request.request_id or random_id()}"
        if self._always_usage:
            include_usage(request)
        answer = await self._chat.answer(request, public_id)
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        head = {"id": public_id, "object": kind, "created": now(), "model": answer.model}
        if request.stream:
            return await EventStream.start(_chunks(ChunkWriter(head, request, answer, self._fingerprint), answer))
        events, size = await collect(answer.events)
        write = partial(chat_completion, head, request, answer, events, self._fingerprint)
        return await shaped(write, self._lanes, size)


async def _chunks(writer: ChunkWriter, answer: ChatAnswer) -> AsyncGenerator[bytes, None]:
    """Server-sent events: the chunks, and `[DONE]`."""
    async with aclosing(answer.events) as events:
        async for event in events:
            for chunk in writer.write(event):
                yield sse(chunk)
    yield DONE
