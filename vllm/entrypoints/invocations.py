"""`POST /invocations`, the one route of hosted endpoints that know no others: a body shows which API it is for."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.http.answering import Work, answer, client_request_id, error_answer, parsed
from vllm.entrypoints.http.errors import ApiError
from vllm.entrypoints.http.json_body import read_json_object
from vllm.entrypoints.http.openapi import Bodies
from vllm.entrypoints.openai.chat_completions import ServingChat
from vllm.entrypoints.openai.completions import ServingCompletion
from vllm.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from vllm.entrypoints.responses.protocol import ResponsesRequest
from vllm.entrypoints.responses.serving import ServingResponses

BODIES: Bodies = {("post", "/invocations"): ChatCompletionRequest}


def invocation_routes(
    engine: AsyncLLMEngine, chat: ServingChat, completion: ServingCompletion, responses: ServingResponses
) -> APIRouter:
    router = APIRouter()

    @router.post("/invocations")
    async def invoke(request: Request) -> Response:
        request_id = client_request_id(request)
        try:
            body = await read_json_object(request)
            work: Work
            if "messages" in body:
                work = chat.create(await parsed(ChatCompletionRequest, body, request), request_id)
            elif "prompt" in body:
                work = completion.create(await parsed(CompletionRequest, body, request), request_id)
            elif "input" in body:
                work = responses.create(await parsed(ResponsesRequest, body, request), request_id)
            else:
                raise ApiError(400, "The body must have messages, prompt or input, as the API it is meant for has.")
        except Exception as exc:
            return error_answer(exc, request)
        return await answer(engine.admitted(work), request)

    return router
