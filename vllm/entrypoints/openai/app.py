"""The HTTP application: its routes, and what every request passes before it reaches one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from vllm import envs
from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.anthropic.protocol import CountTokensRequest, MessagesRequest
from vllm.entrypoints.anthropic.serving_messages import ServingMessages
from vllm.entrypoints.openai.errors import ApiError, describe, error_response, handle_exception, handle_http_exception
from vllm.entrypoints.openai.json_body import parse_model, read_json_object
from vllm.entrypoints.openai.middleware import MAX_REQUEST_ID_CHARS, ApiKeyMiddleware, RequestIdMiddleware
from vllm.entrypoints.openai.prompts import PromptReader
from vllm.entrypoints.openai.protocol import (
    ApiModel,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    SystemPromptRequest,
    TokenizeRequest,
)
from vllm.entrypoints.openai.serving_chat import ServingChat
from vllm.entrypoints.openai.serving_completion import ServingCompletion
from vllm.entrypoints.openai.serving_models import ServingModels
from vllm.entrypoints.openai.serving_system_prompts import ServingSystemPrompts
from vllm.entrypoints.openai.serving_tokenization import ServingTokenization
from vllm.entrypoints.openai.streaming import ClientGoneError, EventStream, unless_disconnected
from vllm.exceptions import EngineDeadError
from vllm.version import __version__

# What servers conventionally record when the client left first; nobody reads it.
_CLIENT_CLOSED_REQUEST = 499

_M = TypeVar("_M", bound=ApiModel)


def build_app(engine: AsyncLLMEngine, args: argparse.Namespace) -> FastAPI:
    """The application for a running engine; `args` are the flags of `cli_args`."""
    app = FastAPI(
        title="vLLM-compatible server",
        version=__version__,
        root_path=args.root_path,
        # /docs and /redoc are made from it.
        openapi_url=None if args.disable_fastapi_docs else "/openapi.json",
    )
    app.add_exception_handler(HTTPException, handle_http_exception)
    app.add_exception_handler(Exception, handle_exception)

    models = ServingModels(engine.vllm_config)
    prompts = PromptReader(engine, args.default_chat_template_kwargs)
    _add_openai_routes(app, engine, args, models, prompts)
    _add_tokenization_routes(app, ServingTokenization(engine, models, prompts))
    _add_system_prompt_routes(app, ServingSystemPrompts(engine, prompts))
    _add_status_routes(app, engine)
    if envs.server_dev_mode():
        _add_development_routes(app, engine)

    # The one added last sees a request first.
    keys = args.api_key or ([envs.api_key()] if envs.api_key() else [])
    if keys:
        app.add_middleware(ApiKeyMiddleware, keys=keys, root_path=args.root_path)
    app.add_middleware(RequestIdMiddleware, always=args.enable_request_id_headers)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=args.allowed_origins,
        allow_methods=args.allowed_methods,
        allow_headers=args.allowed_headers,
        allow_credentials=args.allow_credentials,
    )
    return app


async def _answer(work: Coroutine[Any, Any, dict[str, Any] | EventStream], request: Request) -> Response:
    """The result of `work` as a response; `work` is cancelled when the client leaves."""
    try:
        result = await unless_disconnected(request.receive, work)
    except ClientGoneError:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    except Exception as exc:
        return _error(exc, request)
    return result if isinstance(result, EventStream) else _json(result)


async def _answer_body(
    request: Request, model: type[_M], create: Callable[[_M], Coroutine[Any, Any, dict[str, Any] | EventStream]]
) -> Response:
    """Reads the body as `model` and answers with what `create` makes of it."""
    try:
        parsed = parse_model(model, await read_json_object(request))
    except Exception as exc:
        return _error(exc, request)
    return await _answer(create(parsed), request)


def _error(exc: Exception, request: Request) -> Response:
    return error_response(describe(exc), request.scope)


def _json(value: dict[str, Any]) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def _client_request_id(request: Request) -> str | None:
    return request.headers.get("x-request-id", "")[:MAX_REQUEST_ID_CHARS] or None


def _add_openai_routes(
    app: FastAPI, engine: AsyncLLMEngine, args: argparse.Namespace, models: ServingModels, prompts: PromptReader
) -> None:
    chat = ServingChat(engine, models, prompts, args.response_role, args.return_tokens_as_token_ids)
    completion = ServingCompletion(engine, models, prompts, args.return_tokens_as_token_ids)

    @app.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        request_id = _client_request_id(request)
        return await _answer_body(request, ChatCompletionRequest, lambda parsed: chat.create(parsed, request_id))

    @app.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        request_id = _client_request_id(request)
        return await _answer_body(request, CompletionRequest, lambda parsed: completion.create(parsed, request_id))

    messages = ServingMessages(chat, models, prompts)

    @app.post("/v1/messages")
    async def create_message(request: Request) -> Response:
        request_id = _client_request_id(request)
        return await _answer_body(request, MessagesRequest, lambda parsed: messages.create(parsed, request_id))

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        return await _answer_body(request, CountTokensRequest, messages.count_tokens)

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


def _add_system_prompt_routes(app: FastAPI, system_prompts: ServingSystemPrompts) -> None:
    @app.post("/v1/system_prompts")
    async def create_system_prompt(request: Request) -> Response:
        return await _answer_body(request, SystemPromptRequest, system_prompts.create)

    @app.get("/v1/system_prompts")
    async def list_system_prompts(request: Request) -> Response:
        return await _answer(system_prompts.list(), request)

    @app.get("/v1/system_prompts/{prompt_id}")
    async def get_system_prompt(request: Request, prompt_id: str) -> Response:
        return await _answer(system_prompts.get(prompt_id), request)

    @app.delete("/v1/system_prompts/{prompt_id}")
    async def delete_system_prompt(request: Request, prompt_id: str) -> Response:
        return await _answer(system_prompts.delete(prompt_id), request)


def _add_status_routes(app: FastAPI, engine: AsyncLLMEngine) -> None:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)

    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health(request: Request) -> Response:
        try:
            await engine.check_health()
        except EngineDeadError as exc:
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
        async def reset() -> dict[str, Any]:
            await engine.reset_prefix_cache()
            return {}

        return await _answer(reset(), request)


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
