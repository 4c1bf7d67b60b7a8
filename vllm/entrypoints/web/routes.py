"""The routes of the page: its files, which are in this package, and the last hour of what it draws."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from vllm.entrypoints.http.answering import json_response
from vllm.entrypoints.web.history import History

_FOLDER = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FILES = {
    "/" if path.name == "index.html" else f"/web/{path.relative_to(_FOLDER).as_posix()}": path
    for path in sorted(_FOLDER.rglob("*"))
    if path.suffix in _TYPES
}
_HISTORY = "/web/history"
# They hold nothing that `/metrics` does not tell, so no key is asked for; a page has none before it is there.
OPEN_PATHS = (*_FILES, _HISTORY)
_HEADERS = {
    # Nothing but files of this server, no inline code, no other site, and no frame around it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    # Tells this server, and no other, that a request is the page's: see `AdminGuard`.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def web_routes(history: History) -> APIRouter:
    """A route for each file of the page, and one for what `history` has kept."""
    router = APIRouter(include_in_schema=False)
    for path, file in _FILES.items():
        router.add_api_route(path, _file_route(file), methods=["GET", "HEAD"])

    @router.get(_HISTORY)
    async def last_hour(after: float = 0.0) -> Response:
        return json_response(history.json(after))

    return router


def _file_route(file: Path) -> Callable[[Request], Awaitable[Response]]:
    """Answers with one file, or 304 to who has it."""
    content, media_type = file.read_bytes(), _TYPES[file.suffix]
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": tag}

    async def file_of_the_page(request: Request) -> Response:
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return file_of_the_page
