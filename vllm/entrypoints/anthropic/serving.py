"""`POST /v1/messages` and `POST /v1/messages/count_tokens`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.entrypoints.anthropic.conversation import read_conversation
from vllm.entrypoints.anthropic.protocol import CountTokensRequest, MessagesRequest
from vllm.entrypoints.anthropic.request import chat_request, reasoning_effort
from vllm.entrypoints.anthropic.writer import MessageWriter
from vllm.entrypoints.chat.events import AnswerEvent
from vllm.entrypoints.chat.prompts import ChatOptions, PromptReader
from vllm.entrypoints.chat.served_models import ServedModels
from vllm.entrypoints.chat.service import ChatService
from vllm.entrypoints.http.api_model import random_id
from vllm.entrypoints.http.errors import ApiError, anthropic_error_body, describe, naming_fields
from vllm.entrypoints.http.streaming import EventStream, typed_sse
from vllm.exceptions import ContextLengthError

_NAMES = {"response_format": "output_config.format", "stop": "stop_sequences"}


class MessageStream(EventStream):
    """A streamed message; an error ends it with an event of type `error`."""

    def error_event(self, exc: Exception) -> bytes:
        error = describe(exc)
        return typed_sse(anthropic_error_body(error.status, error.message))


class ServingMessages:
    """Creates messages as answers of chats."""

    def __init__(self, chat: ChatService, models: ServedModels, prompts: PromptReader) -> None:
        self._chat = chat
        self._models = models
        self._prompts = prompts

    async def create(self, request: MessagesRequest, request_id: str | None) -> dict[str, Any] | MessageStream:
        """The message, or the stream of it once its first token is there.

        Args:
            request_id: What the client calls the request (`X-Request-Id`), or None.

        Raises:
            VLLMValidationError, ApiError, EngineDeadError: nothing has been sent yet.
        """
        try:
            with naming_fields(_NAMES):
                return await self._create(request, request_id)
        except ContextLengthError as exc:
            # Clients shorten their conversation when they read this sentence, which is Anthropic's.
            message = f"prompt is too long: {exc.at_least} tokens > {exc.limit} maximum"
            raise ApiError(400, message, "messages") from None

    async def _create(self, request: MessagesRequest, request_id: str | None) -> dict[str, Any] | MessageStream:
        chat = await self._prompts.prepared(chat_request, request)
        message_id = f"msg_{request_id or random_id()}"
        answer = await self._chat.answer(chat, message_id, separator="")
        writer = MessageWriter(message_id, answer.model, silent=request.max_tokens == 0)
        if request.stream:
            return await MessageStream.start(_stream(writer, answer.events))
        async with aclosing(answer.events) as events:
            async for event in events:
                list(writer.take(event))
        return writer.message()

    async def count_tokens(self, request: CountTokensRequest) -> dict[str, Any]:
        """How many input tokens a message with these fields has.

        Raises:
            VLLMValidationError, ApiError: A field is wrong.
        """
        self._models.resolve(request.model)
        conversation = await self._prompts.prepared(read_conversation, request)
        options = ChatOptions(
            tools=conversation.tools,
            add_generation_prompt=not conversation.continues,
            continue_final_message=conversation.continues,
            chat_template_kwargs=conversation.template_kwargs,
            reasoning_effort=reasoning_effort(request.output_config),
            separator="",
        )
        rendered = await self._prompts.chat(conversation.messages, options, must_fit=False)
        return {"input_tokens": len(rendered.prompt_token_ids)}


async def _stream(writer: MessageWriter, events: AsyncGenerator[AnswerEvent, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            for news in writer.take(event):
                yield typed_sse(news)
