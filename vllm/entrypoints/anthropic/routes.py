"""The routes of the Messages API."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.anthropic.protocol import CountTokensRequest, MessagesRequest
from vllm.entrypoints.anthropic.serving import ServingMessages
from vllm.entrypoints.http.answering import answer_body, client_request_id
from vllm.entrypoints.http.openapi import Bodies

BODIES: Bodies = {
    ("post", "/v1/messages"): MessagesRequest,
    ("post", "/v1/messages/count_tokens"): CountTokensRequest,
}


def messages_routes(engine: AsyncLLMEngine, messages: ServingMessages) -> APIRouter:
    router = APIRouter(prefix="/v1/messages")

    @router.post("")
    async def create_message(request: Request) -> Response:
        request_id = client_request_id(request)
        return await answer_body(
            request, MessagesRequest, lambda parsed: engine.admitted(messages.create(parsed, request_id))
        )

    @router.post("/count_tokens")
    async def count_tokens(request: Request) -> Response:
        return await answer_body(request, CountTokensRequest, messages.count_tokens)

    return router
