"""Starts the engine and serves it over HTTP: `python -m vllm.entrypoints.openai.api_server`.

Exit codes: 0 after SIGTERM or SIGINT, 1 when the server cannot start or the engine has died, 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import signal
import socket
import ssl
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType

import uvicorn
import uvloop

from vllm.engine.arg_utils import EngineArgs
from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.args.cli_args import check_args, make_arg_parser
from vllm.entrypoints.args.parser import FlexibleArgumentParser
from vllm.entrypoints.assembly import build_app
from vllm.entrypoints.chat.prompts import PromptReader
from vllm.entrypoints.http.listening import listen, listening_socket
from vllm.entrypoints.http.start_log import address_of, log_start
from vllm.entrypoints.openai.system_prompt_files import preload, read_system_prompt_file
from vllm.exceptions import StartupError, VLLMValidationError
from vllm.logger import init_logger

# Run as a script, the module's own name is __main__.
logger = init_logger("vllm.entrypoints.openai.api_server")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_GC_THRESHOLDS = (10_000, 10, 10)
# How long the server goes on after the engine's death, so that open requests get their error and load balancers see
# /health fail, instead of a connection that breaks.
_ENGINE_DEATH_GRACE_S = 2


class _Server(uvicorn.Server):
    """Leaves signals to `_serve`, which also has an engine to stop.

    Args:
        on_started: Called when connections are taken, as the last thing of the start.
    """

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def run_server(args: argparse.Namespace) -> int:
    """Serves until a signal or the engine's death ends it.

    Returns:
        The exit code. Why the server cannot start is said in one line on stderr.
    """
    try:
        check_args(args)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_load_and_serve(args))
    except (StartupError, VLLMValidationError) as exc:
        print(f"error: {exc}", file=sys.stderr, flush=True)
        return 1


async def _load_and_serve(args: argparse.Namespace) -> int:
    for sig in _SIGNALS:
        signal.signal(sig, _stop_loading)
    # The port is taken before the model loads: a long wait must not end in "address in use".
    with listening_socket(args) as sock:
        files = [read_system_prompt_file(Path(path)) for path in args.system_prompt_file]
        engine = AsyncLLMEngine.from_engine_args(EngineArgs.from_cli_args(args), args.engine_restarts)
        try:
            await preload(engine, PromptReader(engine, args.default_chat_template_kwargs), files)
            return await _serve(engine, sock, args)
        finally:
            engine.shutdown()


def _stop_loading(sig: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + sig)


async def _serve(engine: AsyncLLMEngine, sock: socket.socket, args: argparse.Namespace) -> int:
    app = build_app(engine, args)
    config = uvicorn.Config(
        app,
        uds=args.uds,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        timeout_graceful_shutdown=args.shutdown_timeout,
        lifespan="off",
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as exc:
        raise StartupError(f"The --ssl files cannot be used: {exc}.") from None
    listen(sock, args.uds)
    server = _Server(config, on_started=lambda: log_start(engine, args, address_of(sock, args)))
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    loop = asyncio.get_running_loop()
    for sig in _SIGNALS:
        loop.add_signal_handler(sig, _on_signal, server, serving, signal.Signals(sig).name)
    beside = [asyncio.create_task(_watch_engine(engine, server))]
    if args.web:
        beside.append(asyncio.create_task(app.state.history.run()))
    # What is loaded by now stays. The collector need not look at it again and again while requests come and go, which
    # took a quarter of this process's time at 5,000 streamed tokens a second; nor at new objects as often as usual,
    # since reference counts free nearly all of them.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    try:
        await serving
    except asyncio.CancelledError:
        logger.warning("Stopped at once; open requests were cut off.")
    finally:
        for task in beside:
            task.cancel()
        for sig in _SIGNALS:
            loop.remove_signal_handler(sig)
    return 1 if engine.errored else 0


def _on_signal(server: _Server, serving: asyncio.Task[None], name: str) -> None:
    if server.should_exit:
        serving.cancel()
        return
    logger.info("Received %s: no new requests; open ones may end. A second signal stops at once.", name)
    server.should_exit = True


async def _watch_engine(engine: AsyncLLMEngine, server: _Server) -> None:
    """Ends the server some moments after the engine has died."""
    await engine.wait_until_dead()
    logger.error("The engine has died; the server stops. %s", engine.dead_error)
    await asyncio.sleep(_ENGINE_DEATH_GRACE_S)
    server.config.timeout_graceful_shutdown = _ENGINE_DEATH_GRACE_S
    server.should_exit = True


def main() -> None:
    parser = FlexibleArgumentParser(
        prog="python -m vllm.entrypoints.openai.api_server",
        usage="%(prog)s [options]",
        description="Serves a model over the OpenAI API.",
    )
    sys.exit(run_server(make_arg_parser(parser).parse_args()))


if __name__ == "__main__":
    main()
