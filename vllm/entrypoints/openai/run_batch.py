"""Answers a file of requests in the OpenAI batch format, without a server: `vllm run-batch -i FILE -o FILE`.

A line of the input is `{"custom_id", "method": "POST", "url", "body"}`, a line of the output `{"id", "custom_id",
"response": {"status_code", "request_id", "body"}, "error"}`, in the order of the input. A line that cannot be answered
gets its error and hurts no other.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import orjson
import uvloop
from tqdm import tqdm

from vllm.engine.arg_utils import EngineArgs
from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.args.cli_args import check_args, make_arg_parser
from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.entrypoints.assembly import Services
from vllm.entrypoints.http.api_model import ApiModel, random_id
from vllm.entrypoints.http.body_limits import MAX_BODY_BYTES
from vllm.entrypoints.http.errors import ApiError, describe, error_body
from vllm.entrypoints.http.json_body import parse_json_object, parse_model, snippet
from vllm.entrypoints.http.streaming import EventStream
from vllm.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest
from vllm.entrypoints.openai.system_prompt_files import preload, read_system_prompt_file
from vllm.entrypoints.responses.protocol import ResponsesRequest
from vllm.exceptions import EngineDeadError, StartupError, VLLMValidationError
from vllm.logger import init_logger

# Run as a script, the module's own name is __main__.
logger = init_logger("vllm.entrypoints.openai.run_batch")

MAX_CUSTOM_ID_CHARS = 1024
# Requests that are read ahead: enough to keep the engine's batch full while the oldest of them runs.
_FEWEST_AHEAD = 256
_AHEAD_PER_SEQUENCE = 4


class _Route(NamedTuple):
    model: type[ApiModel]
    create: Callable[[Any, str], Coroutine[Any, Any, dict[str, Any] | EventStream]]


class BatchRunner:
    """Answers lines of a batch file."""

    def __init__(self, services: Services) -> None:
        self._routes = {
            "/v1/chat/completions": _Route(ChatCompletionRequest, services.chat.create),
            "/v1/completions": _Route(CompletionRequest, services.completion.create),
            "/v1/responses": _Route(ResponsesRequest, services.responses.create),
        }

    async def answer(self, line: bytes) -> dict[str, Any]:
        """The output for a line.

        Raises:
            EngineDeadError: the engine process has ended.
        """
        request_id = f"vllm-batch-{random_id()}"
        custom_id: str | None = None
        status, error = 200, None
        try:
            if len(line) > MAX_BODY_BYTES:
                raise ApiError(413, f"A line may have at most {MAX_BODY_BYTES // 2**20} MiB.")
            request = parse_json_object(line)
            custom_id = _custom_id(request)
            body = await self._create(request, request_id)
        except EngineDeadError:
            raise
        except Exception as exc:
            described = describe(exc)
            status, body = described.status, error_body(described.status, described.message, described.param)
            error = body["error"]
        return {
            "id": f"vllm-{random_id()}",
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": request_id, "body": body},
            "error": error,
        }

    async def _create(self, request: dict[str, Any], request_id: str) -> dict[str, Any]:
        if request.get("method", "POST") != "POST":
            raise ApiError(400, f"method must be 'POST', got {snippet(request['method'])}.", "method")
        url = request.get("url")
        route = self._routes.get(url) if isinstance(url, str) else None
        if route is None:
            raise ApiError(400, f"url must be one of {', '.join(self._routes)}, got {snippet(url)}.", "url")
        body = request.get("body")
        if not isinstance(body, dict):
            raise ApiError(400, f"body must be an object, got {snippet(body)}.", "body")
        for name in ("stream", "background"):
            if body.get(name):
                raise ApiError(400, f"{name} is not available in a batch.", name)
        answer = await route.create(parse_model(route.model, body), request_id)
        if isinstance(answer, EventStream):
            raise RuntimeError(f"{url} answered a request of a batch with a stream")
        return answer


def _custom_id(request: dict[str, Any]) -> str:
    custom_id = request.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        raise ApiError(
            400,
            f"custom_id must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters, got {snippet(custom_id)}.",
            "custom_id",
        )
    return custom_id


async def answer_file(runner: BatchRunner, lines: BinaryIO, output: BinaryIO, num_ahead: int) -> tuple[int, int]:
    """Writes the output for every line that is not blank, each as soon as those before it are written.

    Args:
        num_ahead: Most lines that are read and not yet written.

    Returns the number of lines answered, and of those among them that got an error.
    """
    tasks: deque[asyncio.Task[dict[str, Any]]] = deque()
    num_answered = num_failed = 0
    with tqdm(unit=" requests", disable=None) as progress:

        async def write_oldest() -> None:
            nonlocal num_answered, num_failed
            answer = await tasks.popleft()
            output.write(orjson.dumps(answer) + b"\n")
            output.flush()
            num_answered += 1
            num_failed += answer["error"] is not None
            progress.update()

        try:
            # One byte more than a line may have: enough to tell that it is too long, and a file without line ends is
            # not read into memory.
            while line := await asyncio.to_thread(lines.readline, MAX_BODY_BYTES + 1):
                while len(line) > MAX_BODY_BYTES and not line.endswith(b"\n"):
                    rest = await asyncio.to_thread(lines.readline, MAX_BODY_BYTES)
                    if not rest or rest.endswith(b"\n"):
                        break
                if not line.strip():
                    continue
                tasks.append(asyncio.create_task(runner.answer(line)))
                while len(tasks) >= num_ahead or (tasks and tasks[0].done()):
                    await write_oldest()
            while tasks:
                await write_oldest()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return num_answered, num_failed


def add_arguments(parser: FlexibleArgumentParser) -> None:
    """Adds `-i`, `-o` and the flags of the server, of which those of HTTP have no effect here."""
    parser.add_argument(
        "-i", "--input-file", type=Path, required=True, metavar="FILE", help="requests, a line of JSON each"
    )
    parser.add_argument("-o", "--output-file", type=Path, required=True, metavar="FILE", help="where the answers go")
    make_arg_parser(parser)


def run(args: argparse.Namespace) -> int:
    """Answers the file; returns the exit code, 0 also when lines of it got errors.

    Raises:
        StartupError: flags do not fit each other, a file cannot be used, or the engine cannot start.
    """
    check_args(args)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as loop:
            return loop.run(_run(args))
    except VLLMValidationError as exc:
        raise StartupError(str(exc)) from None


async def _run(args: argparse.Namespace) -> int:
    prompts = [read_system_prompt_file(Path(path)) for path in args.system_prompt_file]
    if args.output_file.exists() and args.input_file.exists() and args.output_file.samefile(args.input_file):
        raise StartupError(f"The answers would overwrite the requests in {args.input_file}; name another output file.")
    with contextlib.ExitStack() as files:
        # Both are opened before the model loads: a long wait must not end in "no such file".
        try:
            lines = files.enter_context(args.input_file.open("rb"))
            output = files.enter_context(args.output_file.open("wb"))
        except OSError as exc:
            raise StartupError(f"Cannot open {exc.filename}: {exc.strerror}.") from None
        engine = AsyncLLMEngine.from_engine_args(EngineArgs.from_cli_args(args))
        try:
            services = Services(engine, args)
            await preload(engine, services.prompts, prompts)
            num_ahead = max(_FEWEST_AHEAD, _AHEAD_PER_SEQUENCE * engine.vllm_config.scheduler.max_num_seqs)
            answered, failed = await answer_file(BatchRunner(services), lines, output, num_ahead)
        except EngineDeadError:
            raise StartupError(
                f"The engine process has ended; {args.output_file} holds the answers until then."
            ) from None
        finally:
            engine.shutdown()
    logger.info("%d requests answered, %d of them with an error: %s", answered, failed, args.output_file)
    return 0


def main() -> None:
    parser = FlexibleArgumentParser(
        prog="python -m vllm.entrypoints.openai.run_batch",
        usage="%(prog)s -i FILE -o FILE [options]",
        description="Answers a file of requests in the OpenAI batch format.",
    )
    add_arguments(parser)
    try:
        sys.exit(run(parser.parse_args()))
    except StartupError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
