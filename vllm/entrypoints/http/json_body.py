"""Request bodies: strict JSON in, checked models out. What is wrong is the client's to mend: 400, or 413 for size."""

from __future__ import annotations

import asyncio
import codecs
import gc
import reprlib
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from vllm.engine.work_lanes import WorkLanes, is_long, request_bytes
from vllm.entrypoints.http import json_pieces
from vllm.entrypoints.http.body_limits import MAX_BODY_BYTES, MAX_BODY_FIELDS, BodyBytes, checked_marks
from vllm.entrypoints.http.errors import ApiError
from vllm.logger import init_logger

logger = init_logger(__name__)

# Longer than what a network needs for a chunk; a client that says nothing for so long is gone or means harm.
_MAX_SILENCE_S = 60.0
_MAX_LOGGED_FIELDS = 256
_SNIPPET_CHARS = 64

_logged_fields: set[str] = set()
_M = TypeVar("_M", bound=BaseModel)


async def read_json_object(request: Request) -> dict[str, Any]:
    """Reads and parses the body; `request_bytes` is its length from then on.

    Raises:
        ApiError: 413 as soon as more than `MAX_BODY_BYTES` have come, or for a body that would take long to parse; 503
            while too many bytes of other bodies are held; 408 for one that stops coming; 415 for a compressed body; 400
            unless it is one JSON object.
    """
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(400, f"Content-Type must be application/json, got {content_type[:_SNIPPET_CHARS]!r}.")
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding != "identity":
        raise ApiError(415, f"Content-Encoding must be identity, got {coding[:_SNIPPET_CHARS]!r}.")
    body = bytearray()
    bodies: BodyBytes = request.app.state.bodies
    try:
        await _read_body(request, body, bodies)
        request_bytes.set(len(body))
        await request.app.state.turns.take()
        text = body.removeprefix(codecs.BOM_UTF8)
        if not is_long():
            return parse_json_object(text)
        lanes: WorkLanes = request.app.state.lanes
        return await lanes.run(_parse_long, text)
    finally:
        bodies.give_back(len(body))


async def _read_body(request: Request, body: bytearray, bodies: BodyBytes) -> None:
    """Fills `body`, and takes what it has of `bodies`, also when it raises."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit():
        length = int(declared[:20])
        if length > MAX_BODY_BYTES:
            raise _too_large()
        bodies.check(length, length)
    chunks = request.stream()
    try:
        while True:
            async with asyncio.timeout(_MAX_SILENCE_S):
                chunk = await anext(chunks, None)
            if chunk is None:
                return
            if len(body) + len(chunk) > MAX_BODY_BYTES:
                raise _too_large()
            bodies.check(len(body) + len(chunk), len(chunk))
            bodies.take(len(chunk))
            body += chunk
    except ClientDisconnect:
        raise ApiError(400, "The connection closed before the whole body came.") from None
    except TimeoutError:
        raise ApiError(
            408,
            f"No more of the request body came for {_MAX_SILENCE_S:.0f} s.",
            headers={"Connection": "close"},
        ) from None


def _too_large() -> ApiError:
    # The rest of the body is not read, so the connection cannot serve another request.
    return ApiError(
        413, f"The request body may have at most {MAX_BODY_BYTES // 2**20} MiB.", headers={"Connection": "close"}
    )


def _parse_long(body: bytearray) -> dict[str, Any]:
    marks = checked_marks(body)
    # The collector would look at what is made again and again, which takes as long as making it.
    gc.disable()
    try:
        return parse_json_object(body, partial(json_pieces.loads, marks=marks))
    finally:
        gc.enable()


def parse_json_object(
    body: bytes | bytearray, loads: Callable[[bytes | bytearray], Any] = orjson.loads
) -> dict[str, Any]:
    """Parses strict JSON: no NaN or Infinity, no lone surrogates, valid UTF-8.

    Args:
        loads: Parses it, as `orjson.loads` does.

    Raises:
        ApiError: 400 with what is wrong, and where.
    """
    try:
        value = loads(body)
    except orjson.JSONDecodeError as exc:
        raise ApiError(400, _explain(exc)) from None
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", type(None): "null", bool: "a boolean"}.get(type(value), "a number")
        raise ApiError(400, f"The request body must be a JSON object, got {kind}.")
    if len(value) > MAX_BODY_FIELDS:
        raise ApiError(400, f"The request body may have at most {MAX_BODY_FIELDS} fields, got {len(value)}.")
    return value


def _explain(exc: orjson.JSONDecodeError) -> str:
    where = f"line {exc.lineno}, column {exc.colno}"
    text = exc.doc[max(0, exc.pos - 1) : exc.pos + 8].lstrip("-")
    if text.startswith(("NaN", "Inf", ":NaN", ":Inf")) or text[1:].startswith(("NaN", "Inf")):
        return f"Numbers in the request body must be finite: NaN and Infinity are not JSON ({where})."
    if "infinity" in exc.msg:
        return f"A number in the request body is too large for a 64-bit float ({where})."
    if "UTF-8" in exc.msg and "BOM" not in exc.msg:
        return "The request body must be valid UTF-8."
    if "surrogate" in exc.msg:
        return (
            f"Text in the request body must be valid Unicode: a \\uD800-\\uDFFF escape lacks its other half ({where})."
        )
    return f"The request body must be valid JSON: {exc.msg.split(': line ')[0]} ({where})."


def parse_model(model: type[_M], data: dict[str, Any]) -> _M:
    """Turns a JSON object into `model`; unknown fields are kept and logged once per name.

    Raises:
        ApiError: 400 naming the first field at fault, its value and what is allowed.
    """
    try:
        parsed = model.model_validate(data)
    except ValidationError as exc:
        raise _validation_error(exc) from None
    for name in parsed.model_extra or ():
        _log_unknown_field(name)
    return parsed


def _log_unknown_field(name: str) -> None:
    # Names come from clients: what is kept and logged is bounded.
    name = name[:_SNIPPET_CHARS]
    if name not in _logged_fields and len(_logged_fields) < _MAX_LOGGED_FIELDS:
        _logged_fields.add(name)
        logger.warning("Ignoring the unknown request field %r (said once per field).", name)


def _validation_error(exc: ValidationError) -> ApiError:
    errors = exc.errors(include_url=False, include_context=False)
    field = str(errors[0]["loc"][0]) if errors[0]["loc"] else None
    if field is None:
        return ApiError(400, errors[0]["msg"])
    same = [e for e in errors if e["loc"][0] == field]
    if same[0]["type"] == "missing" and len(same[0]["loc"]) == 1:
        return ApiError(400, f"{field} is required.", field)
    # A field of several types gives one error for each; together they say what is allowed.
    wanted: list[str] = []
    for error in same[:4]:
        # The one message that is not of this form.
        message = error["msg"] if error["type"] != "int_parsing_size" else "Input should be an integer of 64 bits"
        text = message.removeprefix("Input should be ")
        text = text if text != message else text[:1].lower() + text[1:]
        if text not in wanted:
            wanted.append(text)
    return ApiError(400, f"{field} must be {' or '.join(wanted)}, got {snippet(same[0]['input'])}.", field)


def snippet(value: Any) -> str:
    """A value as it may stand in an error message: short, on one line."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _SNIPPET_CHARS
    short.maxlevel = 2
    return short.repr(value)
