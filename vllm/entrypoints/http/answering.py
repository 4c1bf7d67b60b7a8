"""What every route does around its own work: read the body, wait for the answer, encode it, tell errors."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response

from vllm.engine.work_lanes import WorkLanes, is_long
from vllm.entrypoints.http.api_model import ApiModel
from vllm.entrypoints.http.errors import describe, error_response
from vllm.entrypoints.http.json_answer import cost, encode_in_pieces
from vllm.entrypoints.http.json_body import parse_model, read_json_object
from vllm.entrypoints.http.middleware import MAX_REQUEST_ID_CHARS
from vllm.entrypoints.http.streaming import ClientGoneError, EventStream, unless_disconnected

# What servers conventionally record when the client left first; nobody reads it.
_CLIENT_CLOSED_REQUEST = 499
# In `cost`: encoded on the event loop up to here, in less than a tenth of a millisecond.
_LARGE_ANSWER = 4096

_M = TypeVar("_M", bound=ApiModel)
Work = Coroutine[Any, Any, dict[str, Any] | EventStream]


async def answer(work: Work, request: Request) -> Response:
    """The result of `work` as a response; `work` is cancelled when the client leaves."""
    try:
        result = await unless_disconnected(request.receive, work)
    except ClientGoneError:
        return Response(status_code=_CLIENT_CLOSED_REQUEST)
    except Exception as exc:
        return error_answer(exc, request)
    if isinstance(result, EventStream):
        return result
    size = cost(result)
    if size <= _LARGE_ANSWER:
        return json_response(result)
    lanes: WorkLanes = request.app.state.lanes
    text = await lanes.run(encode_in_pieces, result, size=size)
    return Response(text, media_type="application/json")


async def answer_body(request: Request, model: type[_M], create: Callable[[_M], Work]) -> Response:
    """Reads the body as `model` and answers with what `create` makes of it."""
    try:
        read = await parsed(model, await read_json_object(request), request)
    except Exception as exc:
        return error_answer(exc, request)
    return await answer(create(read), request)


async def parsed(model: type[_M], body: dict[str, Any], request: Request) -> _M:
    """`parse_model`, off the event loop for long bodies."""
    if not is_long():
        return parse_model(model, body)
    lanes: WorkLanes = request.app.state.lanes
    return await lanes.run(parse_model, model, body)


def error_answer(exc: Exception, request: Request) -> Response:
    return error_response(describe(exc), request.scope)


def json_response(value: dict[str, Any]) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def client_request_id(request: Request) -> str | None:
    """What the client calls the request (`X-Request-Id`)."""
    return request.headers.get("x-request-id", "")[:MAX_REQUEST_ID_CHARS] or None
