"""The server's OpenAPI document: the routes read their bodies themselves, so what these hold is added here, and so are
the errors that a route may answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_ERRORS = {
    400: "A field is wrong, or asks for what this server cannot do.",
    401: "The API key is missing or wrong.",
    403: "The route is the operator's.",
    404: "There is no such model, response or route.",
    408: "The body stopped coming.",
    413: "The body is too large.",
    415: "The body is compressed.",
    429: "Too many responses are in the background.",
    500: "The server failed; its log says why.",
    503: "The server is busy, the engine is starting again, or it has died.",
}
_OF_BODIES = (400, 404, 408, 413, 415)
_OF_ALL = (401, 500, 503)
_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer"},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            "required": ["type", "message"],
        },
    },
    "required": ["type", "error"],
}
# Whose answers may be streams.
_STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/invocations")
_SCHEMAS = {"ErrorResponse": _ERROR, "AnthropicErrorResponse": _ANTHROPIC_ERROR}
Bodies = Mapping[tuple[str, str], type[BaseModel]]
"""(Method, path) → what its body holds."""


def describe_bodies(app: FastAPI, bodies: Bodies) -> None:
    """Makes `/openapi.json` tell these bodies."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _add_bodies(plain(), bodies)
        return plain()

    app.openapi = openapi  # type: ignore[method-assign]


def _add_bodies(document: dict[str, Any], bodies: Bodies) -> None:
    models = sorted(set(bodies.values()), key=lambda model: model.__name__)
    references, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    document.setdefault("components", {}).setdefault("schemas", {}).update(definitions.get("$defs", {}))
    for (method, path), model in bodies.items():
        schema = references[model, "validation"]
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        document["paths"][path][method]["requestBody"] = body
    document["components"]["schemas"].update(_SCHEMAS)
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _add_errors(path, operation, has_body=(method, path) in bodies)


def _add_errors(path: str, operation: dict[str, Any], *, has_body: bool) -> None:
    """Adds the errors that a route may answer; FastAPI's 422 is none of them."""
    answers = operation["responses"]
    answers.pop("422", None)
    takes_values = bool(operation.get("parameters")) or operation.get("requestBody") is not None
    statuses = {*_OF_ALL, *(_OF_BODIES if has_body else ()), *((400, 404) if takes_values else ())}
    if path.startswith("/v1/system_prompts"):
        statuses |= {400, 403, 404}
    if path == "/v1/responses":
        statuses.add(429)
    name = "AnthropicErrorResponse" if path.startswith("/v1/messages") else "ErrorResponse"
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    for status in sorted(statuses):
        answers[str(status)] = {"description": _ERRORS[status], "content": content}
    if path in _STREAMED:
        answers["200"].setdefault("content", {})["text/event-stream"] = {"schema": {"type": "string"}}
