"""The API key guards every path but the few that monitoring reads."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from vllm.entrypoints.http.middleware import ApiKeyMiddleware

KEYS = ["first-key", "second-ключ"]


async def show(request: Request) -> PlainTextResponse:
    return PlainTextResponse("secret")


def make_app(root_path: str = "") -> ApiKeyMiddleware:
    methods = ["GET", "POST", "DELETE"]
    paths = ("/health", "/ping", "/version", "/metrics", "/v1/models", "/tokenize", "/load", "/anything/{rest:path}")
    inner = Starlette(
        routes=[*(Route(path, show, methods=methods) for path in paths), Mount("/sub", routes=[Route("/x", show)])]
    )
    return ApiKeyMiddleware(inner, keys=KEYS, root_path=root_path)


def ask(
    path: str,
    key: str | bytes | None = None,
    method: str = "GET",
    root_path: str = "",
    header: str = "Authorization",
) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=make_app(root_path), root_path=root_path)
        headers: dict[str, str | bytes] = {} if key is None else {header: key}
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(go())


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/metrics"])
def test_monitoring_needs_no_key(path):
    assert ask(path).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models", "/tokenize", "/load", "/sub/x", "/docs", "/nothing", "//health", "/health/", "/%68ealth/x",
        "/health/../v1/models", "/v1/models?path=/health", "/v1/models/health", "/HEALTH", "/anything/health",
        "/anything/..%2fhealth",
    ],
)  # fmt: skip
def test_everything_else_does(path):
    response = ask(path)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert "secret" not in response.text


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT", "OPTIONS"])
def test_only_reading_is_open(method):
    assert ask("/health", method=method).status_code == 401


@pytest.mark.parametrize(
    "key", ["Bearer first-key", "bearer first-key", "Bearer  first-key", "Bearer second-ключ".encode()]
)
def test_each_key_opens(key):
    assert ask("/v1/models", key).status_code == 200


@pytest.mark.parametrize(
    "key",
    ["", "first-key", "Bearer", "Bearer ", "Bearer first-ke", "Bearer first-key2", "Basic first-key", "Bearer None"],
)
def test_anything_else_does_not(key):
    assert ask("/v1/models", key).status_code == 401


@pytest.mark.parametrize(("key", "status"), [("first-key", 200), ("second-ключ".encode(), 200), ("", 401), ("no", 401)])
def test_keys_may_come_as_anthropic_clients_send_them(key, status):
    assert ask("/v1/messages", key, header="x-api-key").status_code == (404 if status == 200 else 401)
    assert ask("/v1/models", key, header="x-api-key").status_code == status


@pytest.mark.parametrize("root_path", ["", "/api"])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_anthropic_paths_refuse_in_anthropics_shape(path, root_path):
    response = ask(root_path + path, root_path=root_path)
    assert response.status_code == 401
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == "authentication_error"


def test_the_host_header_does_not_move_the_path():
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=make_app())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/v1/models", headers={"Host": "test/health?"})

    assert asyncio.run(go()).status_code == 401


def test_a_root_path_opens_only_its_own_monitoring_paths():
    assert ask("/api/health", root_path="/api").status_code == 200
    assert ask("/api/v1/models", root_path="/api").status_code == 401
    assert ask("/other/health", root_path="/api").status_code == 401


def test_websockets_are_turned_away():
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/health", "headers": []}
    asyncio.run(make_app()(scope, receive, send))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["websocket.close"]
