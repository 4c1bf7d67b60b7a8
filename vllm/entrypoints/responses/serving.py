"""`POST /v1/responses`: a response from its request to its end, with a client that waits or in the background."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.engine.tenant import current_tenant
from vllm.entrypoints.chat.answer import collect
from vllm.entrypoints.chat.events import AnswerEvent
from vllm.entrypoints.chat.logprobs import shaped
from vllm.entrypoints.chat.prompts import PromptReader
from vllm.entrypoints.chat.request import ChatRequest
from vllm.entrypoints.chat.served_models import ServedModels
from vllm.entrypoints.chat.service import ChatService
from vllm.entrypoints.http.errors import ApiError, naming_fields
from vllm.entrypoints.http.json_body import parse_model
from vllm.entrypoints.http.streaming import EventStream
from vllm.entrypoints.responses.cache_diagnostics import cache_diagnostics
from vllm.entrypoints.responses.items import continues, input_items, input_messages, references, resolved
from vllm.entrypoints.responses.lookup import KeptResponses
from vllm.entrypoints.responses.protocol import InputTokensRequest, ResponsesRequest
from vllm.entrypoints.responses.request import chat_request
from vllm.entrypoints.responses.shape import new_response
from vllm.entrypoints.responses.store import BackgroundRun, ResponseStore, StoredResponse, kept_items
from vllm.entrypoints.responses.writer import ResponseWriter
from vllm.exceptions import VLLMValidationError

MAX_BACKGROUND = 1024
_OWN_FIELDS = ("input", "instructions", "previous_response_id")
_NAMES = {
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "max_completion_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
}


class ServingResponses:
    """Creates responses as answers of chats.

    Attributes:
        kept: Those that clients may come back to.
    """

    def __init__(self, engine: AsyncLLMEngine, models: ServedModels, prompts: PromptReader, chat: ChatService) -> None:
        self._engine = engine
        self._lanes = engine.lanes
        self._prompts = prompts
        self._models = models
        self._chat = chat
        self._defaults = engine.vllm_config.model.generation_defaults
        self._store = ResponseStore()
        self.kept = KeptResponses(self._store)

    async def create(self, request: ResponsesRequest, request_id: str | None) -> dict[str, Any] | EventStream:
        """The response; or the stream of its events once its first token is there; or, in the background, its start.

        Args:
            request_id: What the client calls the request (`X-Request-Id`), or None. Responses are found by their own
                ids, which nobody can guess.

        Raises:
            VLLMValidationError, ApiError, EngineDeadError: nothing has been sent yet.
        """
        with naming_fields(_NAMES):
            return await self._create(request, request_id)

    async def _create(self, request: ResponsesRequest, request_id: str | None) -> dict[str, Any] | EventStream:
        previous = self._previous(request)
        await self._resolve(request)
        stored = await self._prompts.prepared(self._start, request, previous, current_tenant.get())
        chat = await self._prompts.prepared(chat_request, request, stored.messages)
        answer = await self._chat.answer(chat, request_id or stored.id, cut=request.truncation == "auto")
        writer = ResponseWriter(stored, continues(request.input), answer.logprobs)
        if request.background:
            return await self._create_in_background(request, writer, answer.events)
        if request.stream:
            return await EventStream.start(self._stream(writer, answer.events))
        events, size = await collect(answer.events)
        await shaped(lambda: [news for event in events for news in writer.take(event)], self._lanes, size)
        self._diagnose(writer)
        list(writer.finish())
        self._keep(writer)
        return stored.response

    def _start(self, request: ResponsesRequest, previous: StoredResponse | None, tenant: str | None) -> StoredResponse:
        if request.background and request.store is False:
            raise VLLMValidationError("background needs store to be true: it is how the response is read.", "store")
        messages = input_messages(request.input)
        # Only those of a response that is kept can be asked for.
        items = [] if request.store is False else input_items(request.input)
        if previous is not None:
            messages = [*previous.messages, *messages]
            if request.store is not False:
                items = [*previous.input_items, *previous.response["output"], *items]
        response = new_response(request, self._models.resolve(request.model), self._defaults)
        return StoredResponse(response, messages, items, tenant=tenant)

    def _previous(self, request: ResponsesRequest) -> StoredResponse | None:
        if request.previous_response_id is None:
            return None
        previous = self.kept.find(request.previous_response_id, "previous_response_id")
        if previous.response["status"] not in ("completed", "incomplete"):
            raise VLLMValidationError(
                f"previous_response_id names a response whose status is {previous.response['status']}; only one "
                "that is completed can be gone on with.",
                "previous_response_id",
            )
        return previous

    async def _resolve(self, request: ResponsesRequest) -> None:
        """Puts the items that references of the input stand for in their place."""
        ids = references(request.input)
        if ids and isinstance(request.input, list):
            kept = await self._lanes.run(kept_items, self._store.of_tenant(current_tenant.get()), ids)
            request.input = resolved(request.input, kept)

    async def count_tokens(self, request: InputTokensRequest) -> dict[str, Any]:
        """How many input tokens a response with these fields has.

        Raises:
            VLLMValidationError, ApiError: A field is wrong.
        """
        with naming_fields(_NAMES):
            previous = self._previous(request)
            await self._resolve(request)
            chat = await self._prompts.prepared(self._chat_request, request, previous)
            count = await self._chat.count_tokens(chat)
        return {"object": "response.input_tokens", "input_tokens": count}

    def explained_chat(self, fields: dict[str, Any]) -> ChatRequest | None:
        """The chat that a response with these fields is the answer of; None if none of them are of this API alone.

        Raises:
            VLLMValidationError, ApiError: A field is wrong.
        """
        if all(fields.get(name) is None for name in _OWN_FIELDS):
            return None
        if fields.get("messages") is not None:
            raise VLLMValidationError(
                f"Chats have messages, responses have {', '.join(_OWN_FIELDS)}; give the body of one of them."
            )
        request = parse_model(InputTokensRequest, fields)
        return self._chat_request(request, self._previous(request))

    def _chat_request(self, request: InputTokensRequest, previous: StoredResponse | None) -> ChatRequest:
        messages = [] if previous is None else previous.messages
        if request.input is not None:
            messages = [*messages, *input_messages(request.input)]
        if not messages and not request.instructions:
            raise VLLMValidationError("A request must have input, instructions or previous_response_id.", "input")
        return chat_request(request, messages)

    async def _stream(
        self, writer: ResponseWriter, events: AsyncGenerator[AnswerEvent, None]
    ) -> AsyncGenerator[bytes, None]:
        """Server-sent events of a response. An error before the first of them is raised, a later one is the last."""
        started = False
        try:
            async with aclosing(events):
                async for event in events:
                    if not started:
                        started = True
                        yield writer.encode({"type": "response.created", "response": writer.response})
                        yield writer.encode({"type": "response.in_progress", "response": writer.response})
                    for news in writer.take(event):
                        yield writer.encode(news)
        except Exception as exc:
            if not started:
                raise
            yield writer.encode(writer.fail(exc))
        else:
            self._diagnose(writer)
            for news in writer.finish():
                # Kept before its end is told, so that a client may come back at once.
                if "response" in news:
                    self._keep(writer)
                yield writer.encode(news)

    def _diagnose(self, writer: ResponseWriter) -> None:
        """Says why the prompt was not read from the cache, if the request names a response that should have left it
        there."""
        asked = (writer.response["prompt_cache_options"] or {}).get("comparison_response_id")
        if asked is not None:
            earlier = self._store.get(asked)
            if earlier is not None and (earlier.tenant != writer.stored.tenant or earlier.is_running):
                earlier = None
            writer.response["prompt_cache_diagnostics"] = cache_diagnostics(writer.stored, earlier)

    def _keep(self, writer: ResponseWriter) -> None:
        if writer.response["store"]:
            self._store.put(writer.stored)

    async def _create_in_background(
        self, request: ResponsesRequest, writer: ResponseWriter, events: AsyncGenerator[AnswerEvent, None]
    ) -> dict[str, Any] | EventStream:
        if self._store.num_running >= MAX_BACKGROUND:
            await events.aclose()
            raise ApiError(429, f"There are {MAX_BACKGROUND} responses in the background already; try again later.")
        run = writer.stored.run = BackgroundRun(keeps_events=bool(request.stream))
        writer.response["status"] = "queued"
        self._store.put(writer.stored)
        first = dict(writer.response)
        run.task = self._engine.in_background(self._run(writer, run, events))
        return await EventStream.start(run.follow()) if request.stream else first

    async def _run(self, writer: ResponseWriter, run: BackgroundRun, events: AsyncGenerator[AnswerEvent, None]) -> None:
        run.add(writer.encode({"type": "response.created", "response": writer.response}))
        run.add(writer.encode({"type": "response.queued", "response": writer.response}))
        try:
            async with aclosing(events):
                async for event in events:
                    if writer.response["status"] == "queued":
                        writer.response["status"] = "in_progress"
                        run.add(writer.encode({"type": "response.in_progress", "response": writer.response}))
                    for news in writer.take(event):
                        run.add(writer.encode(news))
            self._diagnose(writer)
            for news in writer.finish():
                run.add(writer.encode(news))
        except Exception as exc:
            run.add(writer.encode(writer.fail(exc)))
        except asyncio.CancelledError:
            writer.cancel()
        finally:
            run.end()
            if self._store.get(writer.stored.id) is writer.stored:
                self._store.put(writer.stored)
