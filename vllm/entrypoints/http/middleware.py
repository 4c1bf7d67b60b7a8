"""What every request passes before it reaches a route."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import uuid
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm.engine.routing import current_engine
from vllm.engine.tenant import current_tenant
from vllm.entrypoints.http.errors import ApiError, error_response
from vllm.entrypoints.http.json_body import snippet

OPEN_PATHS = ("/health", "/ping", "/version", "/metrics")
MAX_REQUEST_ID_CHARS = 256
_OF_OTHERS = frozenset({"origin", "forwarded", "via", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip"})
_OF_OTHERS_PREFIXES = ("x-forwarded-", "x-original-", "sec-fetch-")


class ApiKeyMiddleware:
    """Answers 401 to everything that does not carry one of the keys, but for reading `OPEN_PATHS`.

    The decision rests on `scope["path"]`, the very path that the router matches, and denies by default: a route is
    guarded unless its exact path is listed. Keys are compared as digests, in constant time.

    Where there are several keys, the one that a request carries is its tenant (`current_tenant`).

    Args:
        keys: Accepted keys; not empty.
        root_path: Prefix under which a proxy serves the app (`--root-path`).
        admin_key: Accepted as well; the routes of operators ask for it (`AdminGuard`).
        open_paths: More paths that may be read without a key.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Iterable[str],
        root_path: str = "",
        admin_key: str | None = None,
        open_paths: Iterable[str] = (),
    ) -> None:
        self.app = app
        keys = list(keys)
        self._tells_tenants = len(keys) > 1
        self._digests = [_digest_of_key(key) for key in [*keys, *([admin_key] if admin_key else [])]]
        paths = (*OPEN_PATHS, *open_paths)
        self._open = frozenset(paths) | frozenset(root_path + path for path in paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = _match(scope, self._digests) if scope["type"] != "lifespan" else None
        if scope["type"] == "lifespan" or self._is_open(scope) or key is not None:
            current_tenant.set(key.hex() if key is not None and self._tells_tenants else None)
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


class EngineChoiceMiddleware:
    """Lets a client name the engine that serves it, by its number: `X-data-parallel-rank`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = Headers(scope=scope).get("x-data-parallel-rank") if scope["type"] == "http" else None
        if named is not None and not (named.isascii() and named.isdecimal() and len(named) <= 9):
            error = ApiError(400, f"X-data-parallel-rank must be the number of an engine, got {snippet(named)}.")
            await error_response(error, scope)(scope, receive, send)
            return
        current_engine.set(None if named is None else int(named))
        await self.app(scope, receive, send)


class AdminGuard:
    """Dependency of the routes that are the operator's: it travels with them, whatever path leads there.

    Args:
        key: Must come with every request (`--admin-api-key`); None lets TCP clients of this machine in that speak for
            themselves, and nobody else: no proxy, and no web page in a browser of this machine.
        own_pages: Whether pages that this server has sent to such a browser are let in as well.
    """

    def __init__(self, key: str | None, own_pages: bool = False) -> None:
        self._digests = [_digest_of_key(key)] if key is not None else None
        self._own_pages = own_pages

    def __call__(self, request: Request) -> None:
        if self._digests is not None:
            if _match(request.scope, self._digests) is None:
                raise ApiError(
                    401,
                    "This route is the operator's: send the key of --admin-api-key as `Authorization: Bearer KEY`.",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        elif request.client is None:  # Unix sockets have no address, and a proxy may stand behind each connection.
            raise ApiError(403, "This route is the operator's: over a Unix socket (--uds) it needs --admin-api-key.")
        elif not _is_loopback(request.client.host):
            raise ApiError(
                403,
                "Without --admin-api-key, this route answers only to clients on the server's own machine.",
            )
        elif (header := _speaks_for_another(request.headers, self._own_pages)) is not None:
            raise ApiError(
                403,
                f"Without --admin-api-key, this route answers neither to proxies nor to web pages, and the header "
                f"{header} comes from one.",
            )


def _speaks_for_another(headers: Headers, own_pages: bool) -> str | None:
    """The header by which a request shows that a proxy passes it on, or that a web page makes a browser send it; with
    `own_pages`, a page that is not of this server."""
    of_own_page = own_pages and _is_of_own_page(headers)
    for name in headers:
        if of_own_page and (name == "origin" or name.startswith("sec-fetch-")):
            continue
        if name in _OF_OTHERS or name.startswith(_OF_OTHERS_PREFIXES):
            return name
    # A page of a domain that its owner lets point to this machine. Names without a dot are nobody's domain.
    host = headers.get("host", "").rpartition("@")[2]
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return "host" if "." in name and not _is_loopback(name) and not name.endswith(".localhost") else None


def _is_of_own_page(headers: Headers) -> bool:
    """Whether a browser says that a page of the very host that it asks, by name and port, makes it send the request.

    Scripts can set none of these headers. Behind a proxy that hides itself, the page's address is the proxy's.
    """
    page = headers.get("origin") or headers.get("referer", "")
    fetched = headers.get("sec-fetch-site") == "same-origin" and headers.get("sec-fetch-dest") == "empty"
    return fetched and urlsplit(page).netloc == headers.get("host")


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _match(scope: Scope, digests: list[bytes]) -> bytes | None:
    """Digest of the key that a request carries, if it is one of these."""
    headers = Headers(scope=scope)
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    given = [bearer if scheme.lower() == "bearer" else "", headers.get("x-api-key", "")]
    found = [_digest(key.strip().encode("latin-1")) for key in given]
    # All keys are compared, so that the time does not tell which one came close.
    matches = [other for one in found for other in digests if hmac.compare_digest(one, other)]
    return matches[0] if matches else None


def _digest_of_key(key: str) -> bytes:
    return _digest(key.encode(errors="surrogateescape"))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class RootPathMiddleware:
    """Tells the app under which path a proxy serves it (`--root-path`).

    Requests may come with that prefix or, where the proxy takes it off, without.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self.root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["root_path"] = self.root_path
        await self.app(scope, receive, send)


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
        if not request_id:
            await self.app(scope, receive, send)
            return

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self.app(scope, receive, send_with_id)
