"""The server's OpenAPI document: the routes read their bodies themselves, so what these hold is added here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

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
