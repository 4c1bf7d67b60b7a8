"""What every request passes before it reaches a route."""

from __future__ import annotations

import hashlib
import hmac
import uuid
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm.entrypoints.openai.errors import ApiError, error_response

OPEN_PATHS = ("/health", "/ping", "/version", "/metrics")
MAX_REQUEST_ID_CHARS = 256


class ApiKeyMiddleware:
    """Answers 401 to everything that does not carry one of the keys, but for reading `OPEN_PATHS`.

    The decision rests on `scope["path"]`, the very path that the router matches, and denies by default: a route is
    guarded unless its exact path is listed. Keys are compared as digests, in constant time.

    Args:
        keys: Accepted keys; not empty.
        root_path: Prefix under which a proxy serves the app (`--root-path`).
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], root_path: str = "") -> None:
        self.app = app
        self._digests = [_digest(key.encode(errors="surrogateescape")) for key in keys]
        self._open = frozenset(OPEN_PATHS) | frozenset(root_path + path for path in OPEN_PATHS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_open(scope) or self._has_key(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            error = ApiError(
                401,
                "This server needs an API key: send it as `Authorization: Bearer KEY`, or as `X-Api-Key: KEY`.",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error_response(error, scope)(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and scope["path"] in self._open

    def _has_key(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [bearer if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
        digests = [_digest(key.strip().encode("latin-1")) for key in given]
        # All keys are compared, so that the time does not tell which one came close.
        return any([hmac.compare_digest(one, other) for one in digests for other in self._digests])


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class RequestIdMiddleware:
    """Gives `X-Request-Id` back to the client that sent it; with `always`, makes one up for the others."""

    def __init__(self, app: ASGIApp, always: bool = False) -> None:
        self.app = app
        self.always = always

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id", "")[:MAX_REQUEST_ID_CHARS]
        if not request_id and self.always:
            request_id = uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start" and request_id:
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)
