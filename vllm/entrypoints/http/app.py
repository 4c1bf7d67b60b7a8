"""The HTTP application: what every request passes before it reaches a route of any dialect."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException

from vllm import envs
from vllm.engine.work_lanes import WorkLanes
from vllm.entrypoints.http.body_limits import BodyBytes
from vllm.entrypoints.http.errors import ApiError, handle_exception, handle_http_exception
from vllm.entrypoints.http.metrics import HttpMetricsMiddleware
from vllm.entrypoints.http.middleware import (
    ApiKeyMiddleware,
    EngineChoiceMiddleware,
    RequestIdMiddleware,
    RootPathMiddleware,
)
from vllm.entrypoints.http.openapi import Bodies, describe_bodies
from vllm.entrypoints.http.turns import Turns
from vllm.version import __version__


def make_app(
    args: argparse.Namespace,
    routers: Iterable[APIRouter],
    bodies: Bodies,
    lanes: WorkLanes,
    registry: CollectorRegistry,
    open_paths: Iterable[str] = (),
) -> FastAPI:
    """An application with these routes.

    Args:
        args: The flags of `args.cli_args`.
        bodies: What the routes read, for `/openapi.json`.
        lanes: Where long work is done.
        registry: Gets the metrics of HTTP.
        open_paths: Paths that may be read without a key, besides those of monitors.
    """
    app = FastAPI(
        title="vLLM-compatible server",
        version=__version__,
        # /docs and /redoc are made from it.
        openapi_url=None if args.disable_fastapi_docs else "/openapi.json",
    )
    app.add_exception_handler(HTTPException, handle_http_exception)
    app.add_exception_handler(ApiError, handle_exception)
    app.add_exception_handler(Exception, handle_exception)
    for router in routers:
        app.include_router(router)
    describe_bodies(app, bodies)
    _add_middleware(app, args, registry, open_paths)
    app.state.turns = Turns()
    app.state.bodies = BodyBytes()
    app.state.lanes = lanes
    return app


def admin_key(args: argparse.Namespace) -> str | None:
    """The key of the operator's routes, if one is set."""
    return args.admin_api_key or envs.admin_api_key()


def _add_middleware(
    app: FastAPI, args: argparse.Namespace, registry: CollectorRegistry, open_paths: Iterable[str]
) -> None:
    """The one added last sees a request first."""
    app.add_middleware(EngineChoiceMiddleware)
    keys = args.api_key or ([envs.api_key()] if envs.api_key() else [])
    if keys:
        app.add_middleware(
            ApiKeyMiddleware,
            keys=keys,
            root_path=args.root_path,
            admin_key=admin_key(args),
            open_paths=tuple(open_paths),
        )
    if args.root_path:
        app.add_middleware(RootPathMiddleware, root_path=args.root_path)
    app.add_middleware(RequestIdMiddleware, always=args.enable_request_id_headers)
    if args.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=args.allowed_origins,
            allow_methods=args.allowed_methods,
            allow_headers=args.allowed_headers,
            allow_credentials=args.allow_credentials,
        )
    app.add_middleware(HttpMetricsMiddleware, registry=registry)
