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

_SLEEPERS = ("weights", "kv_cache")


def development_routes(engine: AsyncLLMEngine) -> APIRouter:
    """The routes of `VLLM_SERVER_DEV_MODE=1`."""
    router = APIRouter()
    # Of what /sleep has put to sleep, what /wake_up has not been asked for yet.
    asleep: set[str] = set()

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
        asleep.update(_SLEEPERS)
        return await answer(_empty(engine.sleep(int(level))), request)

    @router.post("/wake_up")
    async def wake_up(request: Request) -> Response:
        """Goes on once all that sleeps has been woken: that which `tags` name, or all of it."""
        tags = request.query_params.getlist("tags") or _SLEEPERS
        unknown = sorted(set(tags) - set(_SLEEPERS))
        if unknown:
            message = f"tags must be among {', '.join(_SLEEPERS)}, got {snippet(unknown[0])}."
            return error_answer(ApiError(400, message, "tags"), request)
        asleep.difference_update(tags)
        return json_response({}) if asleep else await answer(_empty(engine.wake_up()), request)

    @router.post("/pause")
    async def pause(request: Request) -> Response:
        """Starts no step until /resume; open requests wait (`mode=keep`), or are ended first (`abort`, the default)."""
        mode = request.query_params.get("mode", "abort")
        if mode not in ("abort", "keep"):
            message = f"mode must be 'abort' or 'keep', got {snippet(mode)}."
            return error_answer(ApiError(400, message, "mode"), request)
        forgets = request.query_params.get("clear_cache", "true").lower() not in ("false", "0")

        async def work() -> dict[str, Any]:
            if mode == "abort":
                await engine.abort_all()
            await engine.sleep(int(forgets))
            return {"status": "paused"}

        return await answer(work(), request)

    @router.post("/resume")
    async def resume(request: Request) -> Response:
        async def work() -> dict[str, Any]:
            asleep.clear()
            await engine.wake_up()
            return {"status": "resumed"}

        return await answer(work(), request)

    @router.get("/is_paused")
    async def is_paused(request: Request) -> Response:
        async def ask() -> dict[str, Any]:
            return {"is_paused": await engine.is_sleeping()}

        return await answer(ask(), request)

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
