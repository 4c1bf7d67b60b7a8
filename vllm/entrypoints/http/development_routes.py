"""What only developers may do to a running engine: read its configuration, reset its cache, let it sleep."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import asdict
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.http.answering import answer, error_answer, json_response
from vllm.entrypoints.http.errors import ApiError
from vllm.entrypoints.http.json_body import snippet


def development_routes(engine: AsyncLLMEngine) -> APIRouter:
    """The routes of `VLLM_SERVER_DEV_MODE=1`."""
    router = APIRouter()

    @router.get("/server_info")
    async def server_info() -> Response:
        return json_response({"vllm_config": _config_json(engine)})

    @router.post("/reset_prefix_cache")
    async def reset_prefix_cache(request: Request) -> Response:
        return await answer(_empty(engine.reset_prefix_cache()), request)

    @router.post("/sleep")
    async def sleep(request: Request) -> Response:
        """Pauses the engine; the memory of weights and KV cache stays reserved, which is what level 2 would give up."""
        level, mode = (request.query_params.get(name, known) for name, known in (("level", "1"), ("mode", "keep")))
        if level not in ("0", "1"):
            message = f"level must be 0 (pause) or 1 (and forget cached suffixes), got {snippet(level)}."
            return error_answer(ApiError(400, message, "level"), request)
        if mode != "keep":
            message = f"mode must be 'keep': open requests go on after /wake_up; got {snippet(mode)}."
            return error_answer(ApiError(400, message, "mode"), request)
        return await answer(_empty(engine.sleep(int(level))), request)

    @router.post("/wake_up")
    async def wake_up(request: Request) -> Response:
        return await answer(_empty(engine.wake_up()), request)

    @router.get("/is_sleeping")
    async def is_sleeping(request: Request) -> Response:
        async def ask() -> dict[str, Any]:
            return {"is_sleeping": await engine.is_sleeping()}

        return await answer(ask(), request)

    return router


async def _empty(work: Coroutine[Any, Any, Any]) -> dict[str, Any]:
    await work
    return {}


def _config_json(engine: AsyncLLMEngine) -> dict[str, Any]:
    config = engine.vllm_config
    model = {k: v for k, v in vars(config.model).items() if k != "hf_config"}
    return {
        "model": model | {"hf_config": orjson.loads(config.model.hf_config.to_json_string(use_diff=False))},
        "cache": asdict(config.cache),
        "system_prompt": asdict(config.system_prompt),
        "scheduler": asdict(config.scheduler),
        "parallel": asdict(config.parallel),
        "device": config.device,
        "attention_backend": config.attention_backend,
        "enforce_eager": config.enforce_eager,
    }
