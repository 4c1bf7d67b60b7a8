"""The routes of the OpenAI API, and those of vLLM beside it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.http.answering import answer_body, client_request_id, error_answer, json_response
from vllm.entrypoints.http.openapi import Bodies
from vllm.entrypoints.openai.chat_completions import ServingChat
from vllm.entrypoints.openai.completions import ServingCompletion
from vllm.entrypoints.openai.models import ServingModels
from vllm.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from vllm.entrypoints.openai.tokenization import ServingTokenization

BODIES: Bodies = {
    ("post", "/v1/chat/completions"): ChatCompletionRequest,
    ("post", "/v1/completions"): CompletionRequest,
    ("post", "/tokenize"): TokenizeRequest,
    ("post", "/detokenize"): DetokenizeRequest,
}


def completion_routes(engine: AsyncLLMEngine, chat: ServingChat, completion: ServingCompletion) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        request_id = client_request_id(request)
        return await answer_body(
            request, ChatCompletionRequest, lambda parsed: engine.admitted(chat.create(parsed, request_id))
        )

    @router.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        request_id = client_request_id(request)
        return await answer_body(
            request, CompletionRequest, lambda parsed: engine.admitted(completion.create(parsed, request_id))
        )

    return router


def model_routes(models: ServingModels) -> APIRouter:
    router = APIRouter()

    @router.head("/v1/models", include_in_schema=False)
    @router.get("/v1/models")
    async def list_models() -> Response:
        return json_response(models.list())

    # Names of models may hold slashes.
    @router.head("/v1/models/{name:path}", include_in_schema=False)
    @router.get("/v1/models/{name:path}")
    async def get_model(request: Request, name: str) -> Response:
        try:
            return json_response(models.get(name))
        except Exception as exc:
            return error_answer(exc, request)

    return router


def tokenization_routes(tokenization: ServingTokenization) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await answer_body(request, TokenizeRequest, tokenization.tokenize)

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await answer_body(request, DetokenizeRequest, tokenization.detokenize)

    return router
