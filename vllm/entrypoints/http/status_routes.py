"""What the server says about itself: health, version, load and metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import generate_latest
from starlette.responses import Response

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.http.answering import json_response
from vllm.entrypoints.http.errors import ApiError, error_response
from vllm.exceptions import EngineDeadError, EngineStalledError
from vllm.version import __version__


def status_routes(engine: AsyncLLMEngine, registry: CollectorRegistry) -> APIRouter:
    """The routes of load balancers and monitors.

    Args:
        registry: Holds the metrics of HTTP; those of the process are added.
    """
    router = APIRouter()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    @router.head("/ping", include_in_schema=False)
    @router.get("/ping")
    @router.post("/ping")
    async def health(request: Request) -> Response:
        try:
            await engine.check_health()
        except (EngineDeadError, EngineStalledError) as exc:
            return error_response(ApiError(503, str(exc)), request.scope)
        return Response(status_code=200)

    @router.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @router.get("/load")
    async def load() -> Response:
        return json_response({"server_load": engine.num_requests})

    @router.get("/metrics")
    async def metrics() -> Response:
        text = generate_latest(engine.metrics_registry) + generate_latest(registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return router
