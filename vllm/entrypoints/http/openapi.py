"""The server's OpenAPI document: the routes read their bodies themselves, so what these hold is added here."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from vllm.entrypoints.anthropic.protocol import CountTokensRequest, MessagesRequest
from vllm.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    SystemPromptChange,
    SystemPromptPoolChange,
    SystemPromptRequest,
    TokenizeRequest,
)
from vllm.entrypoints.responses.protocol import InputTokensRequest, ResponsesRequest

BODIES: dict[tuple[str, str], type[BaseModel]] = {
    ("post", "/v1/chat/completions"): ChatCompletionRequest,
    ("post", "/v1/completions"): CompletionRequest,
    ("post", "/invocations"): ChatCompletionRequest,
    ("post", "/v1/responses"): ResponsesRequest,
    ("post", "/v1/responses/input_tokens"): InputTokensRequest,
    ("post", "/v1/messages"): MessagesRequest,
    ("post", "/v1/messages/count_tokens"): CountTokensRequest,
    ("post", "/tokenize"): TokenizeRequest,
    ("post", "/detokenize"): DetokenizeRequest,
    ("post", "/v1/system_prompts"): SystemPromptRequest,
    ("patch", "/v1/system_prompts"): SystemPromptPoolChange,
    ("patch", "/v1/system_prompts/{prompt_id}"): SystemPromptChange,
}
"""(Method, path) → what its body holds."""


def describe_bodies(app: FastAPI) -> None:
    """Makes `/openapi.json` tell the bodies of `BODIES`."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _add_bodies(plain())
        return plain()

    app.openapi = openapi  # type: ignore[method-assign]


def _add_bodies(document: dict[str, Any]) -> None:
    models = sorted(set(BODIES.values()), key=lambda model: model.__name__)
    references, definitions = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    document.setdefault("components", {}).setdefault("schemas", {}).update(definitions.get("$defs", {}))
    for (method, path), model in BODIES.items():
        schema = references[model, "validation"]
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        document["paths"][path][method]["requestBody"] = body
