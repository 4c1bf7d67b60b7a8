"""The routes of `/v1/system_prompts`, which are the operator's."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from vllm.entrypoints.http.answering import answer, answer_body
from vllm.entrypoints.http.middleware import AdminGuard
from vllm.entrypoints.http.openapi import Bodies
from vllm.entrypoints.openai.explanations import ServingExplanations
from vllm.entrypoints.openai.protocol import (
    ExplainRequest,
    SystemPromptChange,
    SystemPromptPoolChange,
    SystemPromptRequest,
)
from vllm.entrypoints.openai.system_prompts import ServingSystemPrompts

BODIES: Bodies = {
    ("post", "/v1/system_prompts"): SystemPromptRequest,
    ("patch", "/v1/system_prompts"): SystemPromptPoolChange,
    ("patch", "/v1/system_prompts/{prompt_id}"): SystemPromptChange,
}


def system_prompt_routes(
    system_prompts: ServingSystemPrompts, explanations: ServingExplanations, guard: AdminGuard
) -> APIRouter:
    router = APIRouter(prefix="/v1/system_prompts", dependencies=[Depends(guard)])

    @router.post("")
    async def create_system_prompt(request: Request) -> Response:
        if _asks_to_explain(request):
            return await answer_body(request, ExplainRequest, explanations.explain)
        return await answer_body(request, SystemPromptRequest, system_prompts.create)

    @router.get("")
    async def list_system_prompts(request: Request) -> Response:
        if _asks_to_explain(request):
            return await answer_body(request, ExplainRequest, explanations.explain)
        return await answer(system_prompts.list(), request)

    @router.patch("")
    async def change_pool(request: Request) -> Response:
        return await answer_body(request, SystemPromptPoolChange, system_prompts.change_pool)

    @router.get("/{prompt_id}")
    async def get_system_prompt(request: Request, prompt_id: str) -> Response:
        return await answer(system_prompts.get(prompt_id), request)

    @router.patch("/{prompt_id}")
    async def change_system_prompt(request: Request, prompt_id: str) -> Response:
        return await answer_body(request, SystemPromptChange, lambda change: system_prompts.change(prompt_id, change))

    @router.delete("/{prompt_id}")
    async def delete_system_prompt(request: Request, prompt_id: str) -> Response:
        return await answer(system_prompts.delete(prompt_id), request)

    return router


def _asks_to_explain(request: Request) -> bool:
    return request.query_params.get("explain", "") in ("1", "true")
