"""The link to the engine process over its whole life: started, listened to, called, started again when it dies."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import zmq.asyncio

from vllm.config import VllmConfig
from vllm.engine.core_client import CoreClient
from vllm.engine.messages import CoreProcessArgs, EngineInput, EngineReady, StepOutputs, UtilityCall, UtilityResult
from vllm.exceptions import EngineDeadError, StartupError, VLLMValidationError
from vllm.logger import init_logger

logger = init_logger(__name__)

_STOP_GRACE_S = 5.0
# A process that was killed may take its time to give memory back.
_END_GRACE_S = 30.0


class LinkEvents(NamedTuple):
    """What the owner of a link is told.

    Attributes:
        on_news: The engine process has said something.
        on_death: It has ended unexpectedly; what was in flight is lost.
        on_restart: Another one has taken its place.
        before_serving: Prepares the new process for requests; returns False if it died meanwhile.
    """

    on_news: Callable[[StepOutputs], Awaitable[None]]
    on_death: Callable[[EngineDeadError], None]
    on_restart: Callable[[EngineReady], None]
    before_serving: Callable[[], Awaitable[bool]]


class CoreLink:
    """Owns the engine process, its sockets, and the calls that wait for an answer.

    Args:
        config: What the process runs.
        command: Starts it; it takes its arguments from standard input.
        max_restarts: How often it is started again after it has died.
        environment: Variables of the process beside those of this one.

    Attributes:
        client: The process that runs now, or ran last.

    Raises:
        StartupError: it cannot run with this configuration on this machine.
    """

    def __init__(
        self,
        config: VllmConfig,
        command: Sequence[str],
        max_restarts: int,
        events: LinkEvents,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._config = config
        self._command = command
        self._environment = environment or {}
        self._restarts_left = max_restarts
        self._events = events
        self._incarnation = 0
        self._dead: EngineDeadError | None = None
        self._closed = False
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count()
        self._reader: asyncio.Task[None] | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        # Only this user may enter the folder, so only this user's processes can reach the sockets.
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-", ignore_cleanup_errors=True)
        self._context = zmq.asyncio.Context()
        self.client = self._open()
        try:
            self.ready = self.client.wait_until_ready(lambda: self._closed)
        except BaseException:
            self.shutdown()
            raise

    def _open(self) -> CoreClient:
        self._incarnation += 1

        def make_args(input_address: str, output_address: str) -> CoreProcessArgs:
            return CoreProcessArgs(self._config, input_address, output_address)

        folder = Path(self._folder.name)
        return CoreClient(self._command, make_args, self._context, folder, str(self._incarnation), self._environment)

    # Speaking --------------------------------------------------------------------------------------------------

    async def send(self, message: EngineInput) -> None:
        """Raises `EngineDeadError` if the process has ended."""
        if self._dead is not None:
            raise self._dead
        await self.client.send(message)

    async def call(self, method: str, *args: Any) -> Any:
        """Calls a method of the engine core; returns its result.

        Raises:
            VLLMValidationError: the engine core refuses the arguments.
            EngineDeadError: the process has ended.
        """
        self.ensure_reading()
        if self.errored:
            raise self.dead_error
        call_id = next(self._call_ids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        await self.send(UtilityCall(call_id, method, list(args)))
        return await future

    def take_results(self, results: list[UtilityResult]) -> None:
        """Answers the calls that these are the results of."""
        for result in results:
            future = self._calls.pop(result.call_id, None)
            if future is None or future.done():
                continue
            if result.error is None:
                future.set_result(result.result)
            else:
                future.set_exception(VLLMValidationError(result.error, result.param))

    @property
    def num_calls(self) -> int:
        """Calls that wait for their results."""
        return len(self._calls)

    # Listening -------------------------------------------------------------------------------------------------

    def ensure_reading(self) -> None:
        """Starts taking in news; needs a running event loop, so it happens with the first use."""
        if self._reader is None and self._dead is None and not self._closed:
            loop = asyncio.get_running_loop()
            self._reader = loop.create_task(self._read(self.client))
            threading.Thread(target=self._watch, args=(loop, self.client), name="engine-watch", daemon=True).start()

    async def _read(self, client: CoreClient) -> None:
        """Takes in what the engine says, until it or we end. Without it nobody would get an answer any more."""
        try:
            while True:
                await self._events.on_news(await client.receive())
                # News that wait already are taken without a turn of the loop, in which what came before them is sent.
                await asyncio.sleep(0)
        except Exception:
            # No single request is at fault, which would end by itself: no state of the engine can be trusted any more.
            if self._dead is None and not self._closed:
                logger.exception("The engine's news could not be taken in; the engine process is ended.")
                self._die()

    def _watch(self, loop: asyncio.AbstractEventLoop, client: CoreClient) -> None:
        code = client.process.wait()
        if not self._closed:
            loop.call_soon_threadsafe(self._on_end, client, code)

    def _on_end(self, client: CoreClient, code: int) -> None:
        if client is self.client and self._dead is None:
            logger.error("The engine process ended unexpectedly (code %d).", code)
            self._die()

    # Death and restart -----------------------------------------------------------------------------------------

    @property
    def errored(self) -> bool:
        """Whether the engine process has ended, for good or until it is started again."""
        return self._dead is not None or (not self._closed and self.client.has_ended)

    @property
    def is_dead(self) -> bool:
        """Whether the engine process is known to have ended."""
        return self._dead is not None

    @property
    def dead_error(self) -> EngineDeadError:
        return self._dead or EngineDeadError()

    async def wait_until_dead(self) -> None:
        """Returns when the engine process has ended and is not started again."""
        self.ensure_reading()
        await self._ended.wait()

    def _die(self) -> None:
        """Ends what was in flight, and starts another process if that is allowed."""
        restarts = self._restarts_left > 0
        self._dead = EngineDeadError(restarts=restarts)
        if self._reader is not None and self._reader is not asyncio.current_task():
            self._reader.cancel()
        self._reader = None
        self.client.process.kill()
        self._events.on_death(self._dead)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(self._dead)
        self._calls.clear()
        if restarts:
            self._restarts_left -= 1
            self._restarting = asyncio.get_running_loop().create_task(self._restart())
        else:
            self._ended.set()

    async def _restart(self) -> None:
        logger.warning("Starting the engine again; it may die %d more times.", self._restarts_left)
        loop = asyncio.get_running_loop()
        try:
            # The new process needs what the old one held, above all the memory of the device.
            await loop.run_in_executor(None, self.client.process.wait, _END_GRACE_S)
            self.client.close()
            self.client = self._open()
            ready = await loop.run_in_executor(None, self.client.wait_until_ready, lambda: self._closed)
            self._events.on_restart(ready)
        except Exception as error:
            known = isinstance(error, StartupError)
            logger.error("The engine could not be started again: %s", error, exc_info=None if known else error)
            self._dead = EngineDeadError()
            self._ended.set()
            return
        self._dead = None
        self.ensure_reading()
        if await self._events.before_serving():
            logger.info("The engine serves again.")

    def shutdown(self) -> None:
        """Ends the process and closes the sockets."""
        self._closed = True
        self.client.stop(_STOP_GRACE_S)
        for task in (self._reader, self._restarting):
            if task is not None:
                task.cancel()
        self.client.close()
        self._context.term()
        self._folder.cleanup()
