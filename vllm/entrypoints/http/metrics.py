"""HTTP requests in `/metrics`, under the names and labels of prometheus-fastapi-instrumentator, which vLLM uses."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What load balancers, monitors and an open page ask for all day is not counted.
_UNCOUNTED = frozenset({"/health", "/load", "/metrics", "/ping", "/server_info", "/version", "/web/history"})
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_DURATION_S = (0.1, 0.5, 1)
_FINE_DURATION_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75),
    *(1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60),
)


class HttpMetricsMiddleware:
    """Counts and times requests, from their first byte here to the last of their answer, streams included.

    `handler` is the template of a route (`/v1/responses/{response_id}`), or `none` for what reaches no route, as one
    without the right key; `status` is `2xx` and so on. No client can make up values of labels.
    """

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self.app = app
        self._requests = Counter(
            "http_requests_total",
            "Requests by method, status and handler.",
            ("method", "status", "handler"),
            registry=registry,
        )
        self._request_size = Summary(
            "http_request_size_bytes", "Content-Length of requests; 0 without one.", ("handler",), registry=registry
        )
        self._response_size = Summary(
            "http_response_size_bytes",
            "Content-Length of responses; 0 without one, as of streams.",
            ("handler",),
            registry=registry,
        )
        self._fine_duration = Histogram(
            "http_request_duration_highr_seconds",
            "Duration of all requests, in many buckets.",
            buckets=_FINE_DURATION_S,
            registry=registry,
        )
        self._duration = Histogram(
            "http_request_duration_seconds",
            "Duration of requests by handler, in few buckets.",
            ("method", "handler"),
            buckets=_DURATION_S,
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status, size = 500, 0

        # Not a coroutine of its own: it is called for every chunk of a stream.
        def watched(message: Message) -> Awaitable[None]:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status, size = message["status"], _content_length(message.get("headers", ()))
            return send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            self._count(scope, status, size, time.perf_counter() - started)

    def _count(self, scope: Scope, status: int, size: int, duration: float) -> None:
        # The router has put it there.
        handler = getattr(scope.get("route"), "path", "none")
        if handler in _UNCOUNTED:
            return
        method = scope["method"] if scope["method"] in _METHODS else "none"
        self._requests.labels(method, f"{status // 100}xx", handler).inc()
        self._request_size.labels(handler).observe(_content_length(scope["headers"]))
        self._response_size.labels(handler).observe(size)
        self._fine_duration.observe(duration)
        self._duration.labels(method, handler).observe(duration)


def _content_length(headers: Iterable[tuple[bytes, bytes]]) -> int:
    value = next((value for name, value in headers if name.lower() == b"content-length"), b"")
    return int(value) if value.isdigit() and len(value) < 20 else 0
