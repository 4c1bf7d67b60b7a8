"""The routes of the Responses API."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.http.answering import answer, answer_body, client_request_id, error_answer
from vllm.entrypoints.http.errors import ApiError
from vllm.entrypoints.http.json_body import parse_model, snippet
from vllm.entrypoints.http.openapi import Bodies
from vllm.entrypoints.responses.protocol import InputTokensRequest, PageRequest, ResponsesRequest
from vllm.entrypoints.responses.serving import ServingResponses

BODIES: Bodies = {
    ("post", "/v1/responses"): ResponsesRequest,
    ("post", "/v1/responses/input_tokens"): InputTokensRequest,
}


def responses_routes(engine: AsyncLLMEngine, responses: ServingResponses) -> APIRouter:
    router = APIRouter(prefix="/v1/responses")
    kept = responses.kept

    @router.post("")
    async def create_response(request: Request) -> Response:
        request_id = client_request_id(request)
        return await answer_body(
            request, ResponsesRequest, lambda parsed: engine.admitted(responses.create(parsed, request_id))
        )

    @router.post("/input_tokens")
    async def count_response_tokens(request: Request) -> Response:
        return await answer_body(request, InputTokensRequest, responses.count_tokens)

    @router.get("/{response_id}/input_items")
    async def list_response_input_items(request: Request, response_id: str) -> Response:
        try:
            page = parse_model(PageRequest, dict(request.query_params))
        except Exception as exc:
            return error_answer(exc, request)
        return await answer(kept.list_input_items(response_id, page), request)

    @router.get("/{response_id}")
    async def get_response(request: Request, response_id: str) -> Response:
        after = request.query_params.get("starting_after")
        if after is not None and not after.isdecimal():
            message = f"starting_after must be a whole number of 0 or more, got {snippet(after)}."
            return error_answer(ApiError(400, message, "starting_after"), request)
        stream = request.query_params.get("stream", "").lower() in ("true", "1")
        return await answer(kept.get(response_id, stream, None if after is None else int(after[:20])), request)

    @router.post("/{response_id}/cancel")
    async def cancel_response(request: Request, response_id: str) -> Response:
        return await answer(kept.cancel(response_id), request)

    @router.delete("/{response_id}")
    async def delete_response(request: Request, response_id: str) -> Response:
        return await answer(kept.delete(response_id), request)

    return router
