"""What the output must look like, in the one form that is compiled: a format of xgrammar's structural tags."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import orjson

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.structured_output.grammars import EngineName

MAX_CONSTRAINT_BYTES = 256 * 1024
MAX_CHOICES = 10_000
_KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


class CompiledConstraint(msgspec.Struct):
    """A constraint as the engine process takes it.

    Attributes:
        key: SHA-256 of what it was compiled from.
        data: The compiled grammar, as its engine serialises it.
    """

    key: bytes
    data: bytes
    engine: EngineName


def constraint_source(params: StructuredOutputsParams) -> bytes:
    """The JSON text that says all there is to a constraint; equal constraints have equal texts.

    It holds `format`, a format of structural tags (or of type "lark" or "compact_json", which the compiler turns into
    one), `after`, the text that ends what comes unconstrained before it, or null, and `enforces_all`: whether a schema
    is refused that cannot be kept in every point.

    Raises:
        VLLMValidationError: naming the field at fault and what is allowed.
    """
    given = [kind for kind in _KINDS if getattr(params, kind) not in (None, False)]
    if len(given) != 1:
        raise _error(f"must hold exactly one of {', '.join(_KINDS)}, got {' and '.join(given) or 'none'}")
    if params.whitespace_pattern is not None:
        raise _error("does not support whitespace_pattern; disable_any_whitespace it does")
    kind = given[0]
    form = _format(kind, params)
    return bounded_json({"format": form, "after": params.after, "enforces_all": params.enforces_all}, kind)


def bounded_json(value: Any, kind: str, field: str = "structured_outputs") -> bytes:
    """The JSON text of what the request's `field` holds as `kind`.

    Raises:
        VLLMValidationError: it is longer than a constraint may be, or nested too deeply.
    """
    try:
        text = orjson.dumps(value)
    except (orjson.JSONEncodeError, RecursionError):
        raise _error(f"has a {kind} that is nested too deeply or no JSON", field) from None
    if len(text) > MAX_CONSTRAINT_BYTES:
        limit = MAX_CONSTRAINT_BYTES // 1024
        raise _error(f"may have {limit} KiB at most, got {len(text) // 1024} of {kind}", field)
    return text


def constraint_key(source: bytes) -> bytes:
    return hashlib.sha256(source).digest()


def _format(kind: str, params: StructuredOutputsParams) -> dict[str, Any]:
    if kind == "json_object":
        return _json_format({"type": "object"}, params)
    value = getattr(params, kind)
    if kind == "json":
        return _json_format(_parsed(value) if isinstance(value, str) else value, params)
    if kind == "choice":
        return _choice(value)
    if kind == "structural_tag":
        return _structural_tag(_parsed(value) if isinstance(value, str) else value)
    if not isinstance(value, str) or not value:
        raise _error(f"must have a {kind} that is a string and not empty, got {value!r:.64}")
    if kind == "regex":
        return {"type": "regex", "pattern": value}
    return {"type": "lark" if _is_lark(value) else "grammar", "grammar": value}


def _json_format(schema: Any, params: StructuredOutputsParams) -> dict[str, Any]:
    if not isinstance(schema, dict) and schema is not True:
        raise _error(f"must have a JSON schema that is an object, got {schema!r:.64}")
    return {"type": "compact_json" if params.disable_any_whitespace else "json_schema", "json_schema": schema}


def _choice(value: Any) -> dict[str, Any]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise _error(f"must have a choice that is a list of strings, none of them empty, got {value!r:.64}")
    if len(value) > MAX_CHOICES:
        raise _error(f"may have at most {MAX_CHOICES} choices, got {len(value)}")
    return {"type": "or", "elements": [{"type": "const_string", "value": text} for text in value]}


def _structural_tag(value: Any) -> dict[str, Any]:
    """The format of a structural tag; the older shape, with `structures` and `triggers`, is translated."""
    if isinstance(value, dict) and isinstance(value.get("format"), dict):
        return value["format"]
    structures = value.get("structures") if isinstance(value, dict) else None
    triggers = value.get("triggers") if isinstance(value, dict) else None
    if not isinstance(structures, list) or not isinstance(triggers, list):
        raise _error("must have a structural_tag with a format, or with structures and triggers")
    tags = []
    for i, tag in enumerate(structures):
        if not isinstance(tag, dict):
            raise _error(f"must have objects as structures of its structural_tag, got {tag!r:.64} as number {i}")
        content = {"type": "json_schema", "json_schema": tag.get("schema", True)}
        tags.append({"type": "tag", "begin": tag.get("begin"), "content": content, "end": tag.get("end")})
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


def _is_lark(grammar: str) -> bool:
    """Whether a grammar is written in Lark's syntax (`start: …`) and not in GBNF (`root ::= …`)."""
    return not any("::=" in line.partition("#")[0] for line in grammar.splitlines())


def _parsed(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise _error(f"holds text that is not valid JSON ({error!s:.100})") from None


def _error(what: str, field: str = "structured_outputs") -> VLLMValidationError:
    return VLLMValidationError(f"{field} {what}.", field)
