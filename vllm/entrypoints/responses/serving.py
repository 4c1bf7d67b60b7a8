"""`/v1/responses`: answers made of items, kept so that clients can come back to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.engine.tenant import current_tenant
from vllm.entrypoints.chat.blocks import Block, BlockNews, BlockReader
from vllm.entrypoints.chat.prompts import PromptReader
from vllm.entrypoints.http.errors import ApiError, describe, naming_fields
from vllm.entrypoints.http.json_body import snippet
from vllm.entrypoints.http.streaming import EventStream, typed_sse
from vllm.entrypoints.openai.chat_completions import ServingChat
from vllm.entrypoints.openai.models import ServingModels
from vllm.entrypoints.openai.protocol import ChatCompletionRequest, now, random_id
from vllm.entrypoints.responses.protocol import InputTokensRequest, PageRequest, ResponsesRequest
from vllm.entrypoints.responses.request import (
    chat_request,
    continues,
    input_items,
    input_messages,
    wants_logprobs,
    with_more,
)
from vllm.entrypoints.responses.store import BackgroundRun, ResponseStore, StoredResponse
from vllm.exceptions import VLLMValidationError

MAX_BACKGROUND = 1024
_NAMES = {
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "max_completion_tokens": "max_output_tokens",
    "logprobs": "top_logprobs",
}
_ID_PREFIXES = {"reasoning": "rs", "text": "msg", "tool_call": "fc"}
_DELTA_EVENTS = {
    "reasoning": "response.reasoning_text",
    "text": "response.output_text",
    "tool_call": "response.function_call_arguments",
}


class _Answer:
    """A response while it is made: from chat chunks to items, and to the events that tell of them.

    Attributes:
        stored: The response and its conversation.
    """

    def __init__(self, stored: StoredResponse, request: ResponsesRequest) -> None:
        self.stored = stored
        self._with_logprobs = wants_logprobs(request)
        self._continues = continues(request.input)
        self._reader = BlockReader()
        self._sequence_number = 0
        self._item_ids: list[str] = []
        self._finish_reason: str | None = None

    @property
    def response(self) -> dict[str, Any]:
        return self.stored.response

    @property
    def reasoning(self) -> str:
        return self._text("reasoning")

    def take(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Takes in a chat completion or a chunk of one; returns what is new as events without numbers."""
        self.response["usage"] = _usage(chunk["usage"])
        for choice in chunk["choices"]:
            self._finish_reason = choice["finish_reason"] or self._finish_reason
            for news in self._reader.read(choice):
                yield from self._block_events(news)

    def finish(self) -> Iterator[dict[str, Any]]:
        """The chat has ended: the last item is complete, and so is the response."""
        for news in self._reader.end():
            yield from self._block_events(news)
        cut_off = self._finish_reason == "length"
        self.response["status"] = "incomplete" if cut_off else "completed"
        if cut_off:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
            if self.response["output"]:
                self.response["output"][-1]["status"] = "incomplete"
        self.response["completed_at"] = now()
        self._add_message()
        yield {"type": f"response.{self.response['status']}", "response": self.response}

    def fail(self, exc: Exception) -> dict[str, Any]:
        """The event that ends the response with an error."""
        error = describe(exc)
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        self.response.update(status="failed", error={"code": code, "message": error.message})
        return {"type": "response.failed", "response": self.response}

    def cancel(self) -> None:
        self.response["status"] = "cancelled"

    def encode(self, event: dict[str, Any]) -> bytes:
        """The event as a server-sent one with the next number."""
        numbered = event | {"sequence_number": self._sequence_number}
        self._sequence_number += 1
        return typed_sse(numbered)

    def _add_message(self) -> None:
        """Adds the answer to the conversation, as the chat message that a next request goes on from."""
        message: dict[str, Any] = {"role": "assistant", "content": self._text("text")}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        calls = [block for block in self._reader.blocks if block.kind == "tool_call"]
        if calls:
            message["tool_calls"] = [
                {"id": block.call_id, "type": "function", "function": {"name": block.name, "arguments": block.text}}
                for block in calls
            ]
        messages = self.stored.messages
        if self._continues:
            message = with_more(messages.pop(), message)
        messages.append(message)

    def _text(self, kind: str) -> str:
        return "".join(block.text for block in self._reader.blocks if block.kind == kind)

    def _block_events(self, news: BlockNews) -> Iterator[dict[str, Any]]:
        block = news.block
        if news.what == "start":
            self._item_ids.append(f"{_ID_PREFIXES[block.kind]}_{random_id()}")
            item = self._item(block, "in_progress")
            self.response["output"].append(item)
            yield {"type": "response.output_item.added", "output_index": block.index, "item": item}
            if block.kind != "tool_call":
                yield self._place(block) | {"type": "response.content_part.added", "part": self._part(block)}
        elif news.what == "delta":
            event = self._place(block) | {"type": f"{_DELTA_EVENTS[block.kind]}.delta", "delta": news.text}
            if block.kind == "text":
                event["logprobs"] = list(news.logprobs)
            yield event
        else:
            yield from self._end_events(block)

    def _end_events(self, block: Block) -> Iterator[dict[str, Any]]:
        done = self._place(block) | {"type": f"{_DELTA_EVENTS[block.kind]}.done"}
        if block.kind == "tool_call":
            yield done | {"name": block.name, "arguments": block.text}
        else:
            yield done | {"text": block.text} | ({"logprobs": block.logprobs} if block.kind == "text" else {})
            yield self._place(block) | {"type": "response.content_part.done", "part": self._part(block)}
        item = self._item(block, "completed")
        self.response["output"][block.index] = item
        yield {"type": "response.output_item.done", "output_index": block.index, "item": item}

    def _place(self, block: Block) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": self._item_ids[block.index], "output_index": block.index}
        return place if block.kind == "tool_call" else place | {"content_index": 0}

    def _part(self, block: Block) -> dict[str, Any]:
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": block.text}
        logprobs = block.logprobs if self._with_logprobs else []
        return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": logprobs}

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._item_ids[block.index], "status": status}
        content = [self._part(block)] if status == "completed" else []
        if block.kind == "tool_call":
            return item | {
                "type": "function_call",
                "call_id": block.call_id,
                "name": block.name,
                "arguments": block.text,
            }
        if block.kind == "reasoning":
            return item | {"type": "reasoning", "summary": [], "content": content, "encrypted_content": None}
        return item | {"type": "message", "role": "assistant", "content": content}


class ServingResponses:
    """Answers requests of the Responses API by the chat path."""

    def __init__(self, engine: AsyncLLMEngine, models: ServingModels, prompts: PromptReader, chat: ServingChat) -> None:
        self._tokenizer = engine.tokenizer
        self._prompts = prompts
        self._models = models
        self._chat = chat
        self._defaults = engine.vllm_config.model.generation_defaults
        self._store = ResponseStore()

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
        stored = await self._prompts.prepared(self._start, request, previous, current_tenant.get())
        answer = _Answer(stored, request)
        chat = await self._prompts.prepared(chat_request, request, stored.messages)
        engine_id = request_id or stored.id
        cut = request.truncation == "auto"
        if request.background:
            return await self._create_in_background(request, answer, await self._chat.chunks(chat, engine_id, cut=cut))
        if request.stream:
            chunks = await self._chat.chunks(chat, engine_id, cut=cut)
            return await EventStream.start(self._events(answer, chunks))
        completion = await self._chat.create(chat, engine_id, cut=cut)
        if isinstance(completion, EventStream):
            raise RuntimeError(f"the chat answered {stored.id} with a stream")
        list(answer.take(completion))
        await self._count_reasoning(answer)
        list(answer.finish())
        self._keep(answer)
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
        return StoredResponse(self._response(request), messages, items, tenant=tenant)

    def _previous(self, request: ResponsesRequest) -> StoredResponse | None:
        if request.previous_response_id is None:
            return None
        previous = self._get(request.previous_response_id, "previous_response_id")
        if previous.response["status"] not in ("completed", "incomplete"):
            raise VLLMValidationError(
                f"previous_response_id names a response whose status is {previous.response['status']}; only one "
                "that is completed can be gone on with.",
                "previous_response_id",
            )
        return previous

    async def count_tokens(self, request: InputTokensRequest) -> dict[str, Any]:
        """How many input tokens a response with these fields has.

        Raises:
            VLLMValidationError, ApiError: A field is wrong.
        """
        with naming_fields(_NAMES):
            previous = self._previous(request)
            chat = await self._prompts.prepared(self._chat_request, request, previous)
            count = await self._chat.count_tokens(chat)
        return {"object": "response.input_tokens", "input_tokens": count}

    def chat_request(self, request: InputTokensRequest) -> ChatCompletionRequest:
        """The chat that a response with these fields is the answer of.

        Raises:
            VLLMValidationError, ApiError: A field is wrong.
        """
        return self._chat_request(request, self._previous(request))

    def _chat_request(self, request: InputTokensRequest, previous: StoredResponse | None) -> ChatCompletionRequest:
        messages = [] if previous is None else previous.messages
        if request.input is not None:
            messages = [*messages, *input_messages(request.input)]
        if not messages and not request.instructions:
            raise VLLMValidationError("A request must have input, instructions or previous_response_id.", "input")
        return chat_request(request, messages)

    async def list_input_items(self, response_id: str, page: PageRequest) -> dict[str, Any]:
        """A page of the items that a response was made from.

        Raises:
            ApiError: 404 for an id that is not in the store.
            VLLMValidationError: No item has the id to go on after.
        """
        items = self._get(response_id).input_items
        if page.order == "desc":
            items = items[::-1]
        start = 0
        if page.after is not None:
            found = [i for i, item in enumerate(items) if item["id"] == page.after]
            if not found:
                raise VLLMValidationError(f"after names {snippet(page.after)}, which is none of the items.", "after")
            start = found[0] + 1
        shown = items[start : start + page.limit]
        return {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": start + len(shown) < len(items),
        }

    def _response(self, request: ResponsesRequest) -> dict[str, Any]:
        def default(name: str) -> Any:
            return self._defaults.get(name, 1.0)

        return {
            "id": f"resp_{random_id()}",
            "object": "response",
            "created_at": now(),
            "completed_at": None,
            "status": "in_progress",
            "background": bool(request.background),
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "model": self._models.resolve(request.model),
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "prompt_cache_key": request.prompt_cache_key,
            "prompt_cache_retention": request.prompt_cache_retention,
            "reasoning": {"effort": None, "summary": None} | (request.reasoning or {}),
            "safety_identifier": request.safety_identifier,
            "service_tier": "default",
            "store": request.store is not False,
            "temperature": default("temperature") if request.temperature is None else request.temperature,
            "text": {"format": {"type": "text"}} | (request.text or {}),
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": default("top_p") if request.top_p is None else request.top_p,
            "truncation": request.truncation or "disabled",
            "usage": None,
            "user": request.user,
        }

    async def _events(
        self, answer: _Answer, chunks: AsyncGenerator[dict[str, Any], None]
    ) -> AsyncGenerator[bytes, None]:
        """Server-sent events of a response. An error before the first of them is raised, a later one is the last."""
        started = False
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    news = answer.take(chunk)
                    if not started:
                        started = True
                        yield answer.encode({"type": "response.created", "response": answer.response})
                        yield answer.encode({"type": "response.in_progress", "response": answer.response})
                    for event in news:
                        yield answer.encode(event)
        except Exception as exc:
            if not started:
                raise
            yield answer.encode(answer.fail(exc))
        else:
            await self._count_reasoning(answer)
            for event in answer.finish():
                # Kept before its end is told, so that a client may come back at once.
                if "response" in event:
                    self._keep(answer)
                yield answer.encode(event)

    async def _count_reasoning(self, answer: _Answer) -> None:
        """Sets `reasoning_tokens`: those of the reasoning's text, since a chat counts all of its output together."""
        text, usage = answer.reasoning, answer.response["usage"]
        if text and usage is not None:
            count = len(await asyncio.to_thread(self._tokenizer.encode, text, False))
            usage["output_tokens_details"]["reasoning_tokens"] = min(count, usage["output_tokens"])

    def _keep(self, answer: _Answer) -> None:
        if answer.response["store"]:
            self._store.put(answer.stored)

    async def _create_in_background(
        self, request: ResponsesRequest, answer: _Answer, chunks: AsyncGenerator[dict[str, Any], None]
    ) -> dict[str, Any] | EventStream:
        if self._store.num_running >= MAX_BACKGROUND:
            await chunks.aclose()
            raise ApiError(429, f"There are {MAX_BACKGROUND} responses in the background already; try again later.")
        run = answer.stored.run = BackgroundRun(keeps_events=bool(request.stream))
        answer.response["status"] = "queued"
        self._store.put(answer.stored)
        first = dict(answer.response)
        run.task = asyncio.create_task(self._run(answer, run, chunks))
        return await EventStream.start(run.follow()) if request.stream else first

    async def _run(self, answer: _Answer, run: BackgroundRun, chunks: AsyncGenerator[dict[str, Any], None]) -> None:
        run.add(answer.encode({"type": "response.created", "response": answer.response}))
        run.add(answer.encode({"type": "response.queued", "response": answer.response}))
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    if answer.response["status"] == "queued":
                        answer.response["status"] = "in_progress"
                        run.add(answer.encode({"type": "response.in_progress", "response": answer.response}))
                    for event in answer.take(chunk):
                        run.add(answer.encode(event))
            await self._count_reasoning(answer)
            for event in answer.finish():
                run.add(answer.encode(event))
        except Exception as exc:
            run.add(answer.encode(answer.fail(exc)))
        except asyncio.CancelledError:
            answer.cancel()
        finally:
            run.end()
            if self._store.get(answer.stored.id) is answer.stored:
                self._store.put(answer.stored)

    async def get(self, response_id: str, stream: bool, starting_after: int | None) -> dict[str, Any] | EventStream:
        """A stored response, or the events of one that is made in the background as a stream.

        Args:
            starting_after: Number of the last event that the client has.

        Raises:
            ApiError: 404 for an id that is not in the store.
            VLLMValidationError: There are no events of this response.
        """
        stored = self._get(response_id)
        if not stream:
            return stored.response
        if stored.run is None or stored.run.events is None:
            raise VLLMValidationError(
                "Only responses that were created with background and stream can be streamed again.", "stream"
            )
        start = 0 if starting_after is None else starting_after + 1
        if stored.run.ended and start >= len(stored.run.events):
            raise VLLMValidationError(
                f"starting_after must be less than {len(stored.run.events) - 1}, the number of the last event, "
                f"got {starting_after}.",
                "starting_after",
            )
        return await EventStream.start(stored.run.follow(max(0, start)))

    async def cancel(self, response_id: str) -> dict[str, Any]:
        """Ends a response in the background; one that has ended is left as it is.

        Raises:
            ApiError: 404 for an id that is not in the store, 400 for a response that a client waited for.
        """
        stored = self._get(response_id)
        if stored.run is None:
            raise ApiError(400, "Only responses that were created with background can be cancelled.", "response_id")
        await self._stop(stored)
        return stored.response

    async def delete(self, response_id: str) -> dict[str, Any]:
        """Forgets a response; raises ApiError 404 for an id that is not in the store."""
        stored = self._get(response_id)
        self._store.remove(stored.id)
        await self._stop(stored)
        return {"id": stored.id, "object": "response", "deleted": True}

    async def _stop(self, stored: StoredResponse) -> None:
        if stored.is_running and stored.run is not None and stored.run.task is not None:
            stored.run.task.cancel()
            await asyncio.wait({stored.run.task})

    def _get(self, response_id: str, param: str = "response_id") -> StoredResponse:
        stored = self._store.get(response_id)
        if stored is None or stored.tenant != current_tenant.get():
            raise ApiError(404, f"There is no response {snippet(response_id)}, or it was forgotten.", param)
        return stored


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    details = usage["prompt_tokens_details"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": details["cached_tokens"],
            "cache_write_tokens": details["cache_write_tokens"],
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
