"""Which form a request wants its output to have, in all the spellings that clients use."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm.entrypoints.chat.request import GenerationRequest
from vllm.entrypoints.http.json_body import snippet
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

_GUIDED = ("json", "regex", "choice", "grammar")


def output_form(request: GenerationRequest) -> StructuredOutputsParams | None:
    """What `response_format`, `structured_outputs` or the older `guided_*` ask for; None for free text.

    Raises:
        VLLMValidationError: one of them is malformed, or there are several.
    """
    forms = [form for form in (*_response_formats(request), *_structured(request), *_guided(request)) if form]
    if len(forms) > 1:
        fields = " and ".join(dict.fromkeys(form.field for form in forms))
        raise VLLMValidationError(f"The output can have one form only, got {fields}.", forms[-1].field)
    return forms[0] if forms else None


def _response_formats(request: GenerationRequest) -> list[StructuredOutputsParams]:
    value = request.response_format
    if value is None:
        return []
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return []
    if kind == "json_object":
        return [StructuredOutputsParams(json_object=True, field="response_format")]
    if kind == "structural_tag":
        return [StructuredOutputsParams(structural_tag=value, field="response_format")]
    if kind == "json_schema":
        holder = value.get("json_schema")
        if not isinstance(holder, dict) or not isinstance(holder.get("schema"), dict):
            raise VLLMValidationError(
                'response_format of type "json_schema" must have {"json_schema": {"name": ..., "schema": {...}}}, '
                f"got {snippet(holder)}.",
                "response_format",
            )
        return [StructuredOutputsParams(json=holder["schema"], field="response_format")]
    raise VLLMValidationError(
        'response_format must have type "text", "json_object", "json_schema" or "structural_tag", '
        f"got {snippet(value)}.",
        "response_format",
    )


def _structured(request: GenerationRequest) -> list[StructuredOutputsParams]:
    value = request.structured_outputs
    if value is None:
        return []
    if not isinstance(value, dict):
        raise VLLMValidationError(
            f'structured_outputs must be an object such as {{"regex": "..."}}, got {snippet(value)}.',
            "structured_outputs",
        )
    known = {name: value[name] for name in StructuredOutputsParams.PUBLIC if value.get(name) is not None}
    try:
        return [msgspec.convert(known, StructuredOutputsParams)]
    except msgspec.ValidationError as error:
        raise VLLMValidationError(f"structured_outputs is malformed: {error}.", "structured_outputs") from None


def _guided(request: GenerationRequest) -> list[StructuredOutputsParams]:
    forms = []
    for name in _GUIDED:
        value = getattr(request, f"guided_{name}")
        if value is None:
            continue
        fields: dict[str, Any] = {name: value, "field": f"guided_{name}"}
        if request.guided_whitespace_pattern is not None:
            fields["whitespace_pattern"] = request.guided_whitespace_pattern
        try:
            forms.append(msgspec.convert(fields, StructuredOutputsParams))
        except msgspec.ValidationError as error:
            raise VLLMValidationError(f"guided_{name} is malformed: {error}.", f"guided_{name}") from None
    return forms
