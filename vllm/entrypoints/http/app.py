"""The HTTP application: its routes, and what every request passes before it reaches one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Any, TypeVar

import orjson
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from vllm import envs
from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.engine.work_lanes import WorkLanes, is_long
from vllm.entrypoints.anthropic.protocol import CountTokensRequest, MessagesRequest
from vllm.entrypoints.anthropic.serving import ServingMessages
from vllm.entrypoints.assembly import Services
from vllm.entrypoints.http.body_limits import BodyBytes
from vllm.entrypoints.http.errors import ApiError, describe, error_response, handle_exception, handle_http_exception
from vllm.entrypoints.http.json_answer import cost, encode_in_pieces
from vllm.entrypoints.http.json_body import parse_model, read_json_object, snippet
from vllm.entrypoints.http.metrics import HttpMetricsMiddleware
from vllm.entrypoints.http.middleware import (
    MAX_REQUEST_ID_CHARS,
    AdminGuard,
    ApiKeyMiddleware,
    RequestIdMiddleware,
    RootPathMiddleware,
)
from vllm.entrypoints.http.openapi import describe_bodies
from vllm.entrypoints.http.streaming import ClientGoneError, EventStream, unless_disconnected
from vllm.entrypoints.http.turns import Turns
from vllm.entrypoints.openai.explanations import ServingExplanations
from vllm.entrypoints.openai.models import ServingModels
from vllm.entrypoints.openai.protocol import (
    ApiModel,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    ExplainRequest,
    SystemPromptChange,
    SystemPromptPoolChange,
    SystemPromptRequest,
    TokenizeRequest,
)
from vllm.entrypoints.openai.system_prompts import ServingSystemPrompts
from vllm.entrypoints.openai.tokenization import ServingTokenization
from vllm.entrypoints.responses.protocol import InputTokensRequest, PageRequest, ResponsesRequest
from vllm.entrypoints.responses.serving import ServingResponses
from vllm.exceptions import EngineDeadError, EngineStalledError
from vllm.version import __version__

# What servers conventionally record when the client left first; nobody reads it.
_CLIENT_CLOSED_REQUEST = 499
# In `cost`: encoded on the event loop up to here, in less than a tenth of a millisecond.
_LARGE_ANSWER = 4096

_M = TypeVar("_M", bound=ApiModel)


def build_app(engine: AsyncLLMEngine, args: argparse.Namespace) -> FastAPI:
    """The application for a running engine; `args` are the flags of `cli_args`."""
    app = FastAPI(
        title="vLLM-compatible server",
        version=__version__,
        # /docs and /redoc are made from it.
        openapi_url=None if args.disable_fastapi_docs else "/openapi.json",
    )
    app.add_exception_handler(HTTPException, handle_http_exception)
    app.add_exception_handler(ApiError, handle_exception)
    app.add_exception_handler(Exception, handle_exception)

    services = Services(engine, args)
    _add_completion_routes(app, engine, services)
    _add_responses_routes(app, engine, services.responses)
    _add_anthropic_routes(app, engine, services.messages)
    _add_model_routes(app, services.models)
    _add_tokenization_routes(app, services.tokenization)
    admin_key = args.admin_api_key or envs.admin_api_key()
    _add_system_prompt_routes(app, services.system_prompts, services.explanations, AdminGuard(admin_key))
    registry = CollectorRegistry()
    _add_status_routes(app, engine, registry)
    if envs.server_dev_mode():
        _add_development_routes(app, engine)

    describe_bodies(app)

    # The one added last sees a request first.
    keys = args.api_key or ([envs.api_key()] if envs.api_key() else [])
    if keys:
        app.add_middleware(ApiKeyMiddleware, keys=keys, root_path=args.root_path, admin_key=admin_key)
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
    app.state.turns = Turns()
    app.state.bodies = BodyBytes()
    app.state.lanes = engine.lanes
    return app


async def _answer(work: Coroutine[Any, Any, dict[str, Any] | EventStream], request: Request) -> Response:
    """The result of `work` as a response; `work` is cancelled when the client leaves."""
    try:
        result = await unless_disconnected(request.receive, work)
    except ClientGoneError:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    except Exception as exc:
        return _error(exc, request)
    if isinstance(result, EventStream):
        return result
    size = cost(result)
    if size <= _LARGE_ANSWER:
        return _json(result)
    lanes: WorkLanes = request.app.state.lanes
    text = await lanes.run(encode_in_pieces, result, size=size)
    return Response(text, media_type="application/json")


async def _answer_body(
    request: Request, model: type[_M], create: Callable[[_M], Coroutine[Any, Any, dict[str, Any] | EventStream]]
) -> Response:
    """Reads the body as `model` and answers with what `create` makes of it."""
    try:
        parsed = await _parsed(model, await read_json_object(request), request)
    except Exception as exc:
        return _error(exc, request)
    return await _answer(create(parsed), request)


async def _parsed(model: type[_M], body: dict[str, Any], request: Request) -> _M:
    """`parse_model`, off the event loop for long bodies."""
    if not is_long():
        return parse_model(model, body)
    lanes: WorkLanes = request.app.state.lanes
    return await lanes.run(parse_model, model, body)


def _error(exc: Exception, request: Request) -> Response:
    return error_response(describe(exc), request.scope)


def _json(value: dict[str, Any]) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def _client_request_id(request: Request) -> str | None:
    return request.headers.get("x-request-id", "")[:MAX_REQUEST_ID_CHARS] or None


def _add_completion_routes(app: FastAPI, engine: AsyncLLMEngine, services: Services) -> None:
    @app.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        request_id = _client_request_id(request)
        return await _answer_body(
            request, ChatCompletionRequest, lambda parsed: engine.admitted(services.chat.create(parsed, request_id))
        )

    @app.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        request_id = _client_request_id(request)
        return await _answer_body(
            request, CompletionRequest, lambda parsed: engine.admitted(services.completion.create(parsed, request_id))
        )

    @app.post("/invocations")
    async def invoke(request: Request) -> Response:
        """The one route of hosted endpoints that know no others: which API is meant shows in the body's fields."""
        request_id = _client_request_id(request)
        try:
            body = await read_json_object(request)
            work: Coroutine[Any, Any, dict[str, Any] | EventStream]
            if "messages" in body:
                work = services.chat.create(await _parsed(ChatCompletionRequest, body, request), request_id)
            elif "prompt" in body:
                work = services.completion.create(await _parsed(CompletionRequest, body, request), request_id)
            elif "input" in body:
                work = services.responses.create(await _parsed(ResponsesRequest, body, request), request_id)
            else:
                raise ApiError(400, "The body must have messages, prompt or input, as the API it is meant for has.")
        except Exception as exc:
            return _error(exc, request)
        return await _answer(engine.admitted(work), request)


def _add_responses_routes(app: FastAPI, engine: AsyncLLMEngine, responses: ServingResponses) -> None:
    @app.post("/v1/responses")
    async def create_response(request: Request) -> Response:
        request_id = _client_request_id(request)
        return await _answer_body(
            request, ResponsesRequest, lambda parsed: engine.admitted(responses.create(parsed, request_id))
        )

    @app.post("/v1/responses/input_tokens")
    async def count_response_tokens(request: Request) -> Response:
        return await _answer_body(request, InputTokensRequest, responses.count_tokens)

    @app.get("/v1/responses/{response_id}/input_items")
    async def list_response_input_items(request: Request, response_id: str) -> Response:
        try:
            page = parse_model(PageRequest, dict(request.query_params))
        except Exception as exc:
            return _error(exc, request)
        return await _answer(responses.list_input_items(response_id, page), request)

    @app.get("/v1/responses/{response_id}")
    async def get_response(request: Request, response_id: str) -> Response:
        after = request.query_params.get("starting_after")
        if after is not None and not after.isdecimal():
            message = f"starting_after must be a whole number of 0 or more, got {snippet(after)}."
            return _error(ApiError(400, message, "starting_after"), request)
        stream = request.query_params.get("stream", "").lower() in ("true", "1")
        return await _answer(responses.get(response_id, stream, None if after is None else int(after[:20])), request)

    @app.post("/v1/responses/{response_id}/cancel")
    async def cancel_response(request: Request, response_id: str) -> Response:
        return await _answer(responses.cancel(response_id), request)

    @app.delete("/v1/responses/{response_id}")
    async def delete_response(request: Request, response_id: str) -> Response:
        return await _answer(responses.delete(response_id), request)


def _add_anthropic_routes(app: FastAPI, engine: AsyncLLMEngine, messages: ServingMessages) -> None:
    @app.post("/v1/messages")
    async def create_message(request: Request) -> Response:
        request_id = _client_request_id(request)
        return await _answer_body(
            request, MessagesRequest, lambda parsed: engine.admitted(messages.create(parsed, request_id))
        )

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        return await _answer_body(request, CountTokensRequest, messages.count_tokens)


def _add_model_routes(app: FastAPI, models: ServingModels) -> None:
    @app.get("/v1/models")
    async def list_models() -> Response:
        return _json(models.list())

    # Names of models may hold slashes.
    @app.get("/v1/models/{name:path}")
    async def get_model(request: Request, name: str) -> Response:
        try:
            return _json(models.card(models.resolve(name)))
        except Exception as exc:
            return _error(exc, request)


def _add_tokenization_routes(app: FastAPI, tokenization: ServingTokenization) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        return await _answer_body(request, TokenizeRequest, tokenization.tokenize)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        return await _answer_body(request, DetokenizeRequest, tokenization.detokenize)


def _add_system_prompt_routes(
    app: FastAPI, system_prompts: ServingSystemPrompts, explanations: ServingExplanations, guard: AdminGuard
) -> None:
    router = APIRouter(prefix="/v1/system_prompts", dependencies=[Depends(guard)])

    @router.post("")
    async def create_system_prompt(request: Request) -> Response:
        if _asks_to_explain(request):
            return await _answer_body(request, ExplainRequest, explanations.explain)
        return await _answer_body(request, SystemPromptRequest, system_prompts.create)

    @router.get("")
    async def list_system_prompts(request: Request) -> Response:
        if _asks_to_explain(request):
            return await _answer_body(request, ExplainRequest, explanations.explain)
        return await _answer(system_prompts.list(), request)

    @router.patch("")
    async def change_pool(request: Request) -> Response:
        return await _answer_body(request, SystemPromptPoolChange, system_prompts.change_pool)

    @router.get("/{prompt_id}")
    async def get_system_prompt(request: Request, prompt_id: str) -> Response:
        return await _answer(system_prompts.get(prompt_id), request)

    @router.patch("/{prompt_id}")
    async def change_system_prompt(request: Request, prompt_id: str) -> Response:
        return await _answer_body(request, SystemPromptChange, lambda change: system_prompts.change(prompt_id, change))

    @router.delete("/{prompt_id}")
    async def delete_system_prompt(request: Request, prompt_id: str) -> Response:
        return await _answer(system_prompts.delete(prompt_id), request)

    app.include_router(router)


def _asks_to_explain(request: Request) -> bool:
    return request.query_params.get("explain", "") in ("1", "true")


def _add_status_routes(app: FastAPI, engine: AsyncLLMEngine, registry: CollectorRegistry) -> None:
    """`registry` holds the metrics of the process and of HTTP."""
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)

    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health(request: Request) -> Response:
        try:
            await engine.check_health()
        except (EngineDeadError, EngineStalledError) as exc:
            return error_response(ApiError(503, str(exc)), request.scope)
        return Response(status_code=200)

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": __version__})

    @app.get("/load")
    async def load() -> Response:
        return _json({"server_load": engine.stats.num_running + engine.stats.num_waiting})

    @app.get("/metrics")
    async def metrics() -> Response:
        text = generate_latest(engine.metrics_registry) + generate_latest(registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)


def _add_development_routes(app: FastAPI, engine: AsyncLLMEngine) -> None:
    """Routes of `VLLM_SERVER_DEV_MODE=1`."""

    @app.get("/server_info")
    async def server_info() -> Response:
        return _json({"vllm_config": _config_json(engine)})

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache(request: Request) -> Response:
        return await _answer(_empty(engine.reset_prefix_cache()), request)

    @app.post("/sleep")
    async def sleep(request: Request) -> Response:
        """Pauses the engine; the memory of weights and KV cache stays reserved, which is what level 2 would give up."""
        level, mode = (request.query_params.get(name, known) for name, known in (("level", "1"), ("mode", "keep")))
        if level not in ("0", "1"):
            message = f"level must be 0 (pause) or 1 (and forget cached suffixes), got {snippet(level)}."
            return _error(ApiError(400, message, "level"), request)
        if mode != "keep":
            message = f"mode must be 'keep': open requests go on after /wake_up; got {snippet(mode)}."
            return _error(ApiError(400, message, "mode"), request)
        return await _answer(_empty(engine.sleep(int(level))), request)

    @app.post("/wake_up")
    async def wake_up(request: Request) -> Response:
        return await _answer(_empty(engine.wake_up()), request)

    @app.get("/is_sleeping")
    async def is_sleeping(request: Request) -> Response:
        async def ask() -> dict[str, Any]:
            return {"is_sleeping": await engine.is_sleeping()}

        return await _answer(ask(), request)


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
