"""Errors in the OpenAI API's shape: `{"error": {"message", "type", "param", "code"}}`; `code` is the HTTP status.

Paths of the Anthropic API answer in that API's shape: `{"type": "error", "error": {"type", "message"}}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from vllm.exceptions import EngineDeadError, ServerBusyError, VLLMValidationError
from vllm.logger import init_logger

logger = init_logger(__name__)

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "PayloadTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# A form is compiled, and a long request read, in about so many seconds.
_RETRY_AFTER_S = 1
_POOLING = "The model of this server writes text; embeddings, scores and classes need a pooling model."
_LORA = "This server has no LoRA adapters; serve a checkpoint that the adapter was merged into."
_AUDIO = "The model of this server reads text only."
# Routes that clients of vLLM know and this server lacks: why they are missing.
_ABSENT = {
    **dict.fromkeys(("/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/score", "/v1/score"), _POOLING),
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), _POOLING),
    **dict.fromkeys(("/v1/load_lora_adapter", "/v1/unload_lora_adapter"), _LORA),
    **dict.fromkeys(("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/realtime"), _AUDIO),
}


class ApiError(Exception):
    """A request that cannot be served, with the HTTP status to answer.

    Args:
        param: Name of the request field at fault, or None.
        headers: Extra response headers.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = headers


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status) or ("BadRequestError" if status < 500 else "InternalServerError")
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def anthropic_error_body(status: int, message: str) -> dict[str, Any]:
    kind = _ANTHROPIC_TYPES.get(status) or ("invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_response(error: ApiError, scope: Scope) -> Response:
    """The error in the shape that clients of the request's path read."""
    path = _route(scope)
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        body = anthropic_error_body(error.status, error.message)
    else:
        body = error_body(error.status, error.message, error.param)
    return Response(orjson.dumps(body), status_code=error.status, headers=error.headers, media_type="application/json")


def _route(scope: Scope) -> str:
    """The request's path without `--root-path`."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def describe(exc: BaseException) -> ApiError:
    """The answer to an exception. What is not meant for users is logged, and only said to be our fault."""
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, VLLMValidationError):
        return ApiError(400, str(exc), exc.param)
    if isinstance(exc, ServerBusyError):
        return ApiError(503, str(exc), headers={"Retry-After": str(_RETRY_AFTER_S)})
    if isinstance(exc, EngineDeadError):
        return ApiError(503 if exc.restarts else 500, str(exc))
    logger.error("A request failed.", exc_info=exc)
    return ApiError(500, "The server failed to answer this request; its log says why.")


@contextmanager
def naming_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Tells errors about fields of a chat, which a request of another API has become, by that API's names for them.

    Args:
        names: A chat's field → what the client called it.
    """
    try:
        yield
    except (ApiError, VLLMValidationError) as exc:
        error = describe(exc)
        name = names.get(error.param or "")
        if name is None:
            raise
        message = re.sub(rf"(?<![\w-]){error.param}\b", name, error.message)
        raise ApiError(error.status, message, name, error.headers) from None


async def handle_exception(request: Request, exc: Exception) -> Response:
    """Exception handler of the app for everything that `describe` knows."""
    return error_response(describe(exc), request.scope)


async def handle_http_exception(request: Request, exc: Exception) -> Response:
    """Exception handler of the app for what the router raises: unknown paths and methods."""
    if not isinstance(exc, HTTPException):
        return await handle_exception(request, exc)
    message = str(exc.detail)
    if exc.status_code == 404:
        path = request.scope["path"]
        message = _ABSENT.get(_route(request.scope), f"There is no {path} here.")
    elif exc.status_code == 405:
        message = f"{request.method} is not allowed for {request.scope['path']}."
    headers = dict(exc.headers) if exc.headers else None
    return error_response(ApiError(exc.status_code, message, headers=headers), request.scope)
