"""The engine in a process of its own, for servers: the caller's event loop never waits for a step."""

from __future__ import annotations

import asyncio
import itertools
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import msgspec
import zmq
import zmq.asyncio
from prometheus_client import CollectorRegistry
from transformers import PreTrainedTokenizerFast

from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.admission import Admission
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.calls import MAX_BUDGET_TOKENS, PinName, PinOptions, PromptChanges, check_prompt_id
from vllm.engine.core_client import CoreClient
from vllm.engine.input_processor import CheckedParams, InputProcessor, ProcessedPrompt, check_sampling_params
from vllm.engine.mailbox import Mailbox
from vllm.engine.messages import (
    AbortRequests,
    CoreProcessArgs,
    EngineInput,
    EngineStats,
    StepOutputs,
    UtilityCall,
)
from vllm.engine.metrics import EngineMetrics
from vllm.engine.output_processor import OutputProcessor
from vllm.engine.search_state import Search
from vllm.engine.stats_log import StatsLog
from vllm.engine.tenant import current_tenant
from vllm.engine.varying_prompts import log_varying_prompts
from vllm.engine.watchdog import Watchdog
from vllm.engine.work_lanes import WorkLanes
from vllm.exceptions import EngineDeadError, StartupError, VLLMValidationError
from vllm.inputs import CacheMark, PromptType, TokensPrompt
from vllm.logger import init_logger
from vllm.outputs import RequestOutput, SystemPromptInfo, SystemPromptPoolInfo
from vllm.sampling_params import SamplingParams, StructuredOutputsParams, check_int
from vllm.structured_output.compiler import ConstraintCompiler
from vllm.structured_output.constraint import CompiledConstraint
from vllm.transformers_utils.chat_template import ChatRenderer, RenderedChat
from vllm.transformers_utils.system_parts import PartKey, SystemPart, SystemPartPending

logger = init_logger(__name__)
_T = TypeVar("_T")

_STOP_GRACE_S = 5.0
# A process that was killed may take its time to give memory back.
_END_GRACE_S = 30.0
# Copied in about 0.1 ms.
_MANY_IDS = 4096


class AsyncLLMEngine:
    """Client of an engine process that it starts and ends with itself.

    Args:
        args: Flags; the engine process gets what they are resolved to.
        max_restarts: How often an engine process that has died is started again. What was in flight fails with
            `EngineDeadError`, as does whatever comes until the new process is ready; its caches start empty.

    Attributes:
        lanes: Threads for work on long requests.
        process_command: Starts an engine process, which takes its arguments from standard input.
        stats: The engine core's state after its latest step.
        metrics_registry: Prometheus metrics.

    Raises:
        StartupError: the engine process cannot run with these arguments on this machine.
    """

    process_command: ClassVar[Sequence[str]] = (sys.executable, "-m", "vllm.engine.core_process")

    def __init__(self, args: EngineArgs, max_restarts: int = 0) -> None:
        self._logs_stats = not args.disable_log_stats
        self._restarts_left = max_restarts
        self._incarnation = 0
        self.vllm_config: VllmConfig
        self.vllm_config, self.tokenizer = args.resolve()
        model = self.vllm_config.model
        self.renderer = ChatRenderer(self.tokenizer, model.chat_template)
        self.input_processor = InputProcessor(model, self.tokenizer, self.renderer, serves=True)
        self._compiler = ConstraintCompiler(model)
        self.stats = EngineStats()
        self._watchdog = Watchdog(envs.execute_model_timeout_s())
        self._dead: EngineDeadError | None = None
        self._closed = False
        self._is_sleeping = False
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count()
        self._kept: dict[str, tuple[list[int], PinOptions]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._stats_log: asyncio.Task[None] | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self.lanes = WorkLanes()
        # Only this user may enter the folder, so only this user's processes can reach the sockets.
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-", ignore_cleanup_errors=True)
        self._context = zmq.asyncio.Context()
        self._client = self._open()
        try:
            ready = self._client.wait_until_ready(lambda: self._closed)
        except BaseException:
            self.shutdown()
            raise
        self.num_blocks = ready.num_blocks
        self.pool_budget_tokens = ready.pool_budget_tokens
        self.metrics = EngineMetrics(self.vllm_config, ready.num_blocks)
        self._processor = OutputProcessor(self.tokenizer, self.metrics)
        self._admission = Admission(
            self.vllm_config.scheduler.max_num_queued_reqs,
            lambda: self._processor.num_outputs,
            self.metrics.on_refusal,
        )

    @classmethod
    def from_engine_args(cls, args: EngineArgs, max_restarts: int = 0) -> AsyncLLMEngine:
        return cls(args, max_restarts)

    @property
    def metrics_registry(self) -> CollectorRegistry:
        return self.metrics.registry

    # The process -----------------------------------------------------------------------------------------------

    def _open(self) -> CoreClient:
        self._incarnation += 1

        def make_args(input_address: str, output_address: str) -> CoreProcessArgs:
            return CoreProcessArgs(self.vllm_config, input_address, output_address)

        name = str(self._incarnation)
        return CoreClient(self.process_command, make_args, self._context, Path(self._folder.name), name)

    def _ensure_reading(self) -> None:
        """Starts taking in news; needs a running event loop, so it happens with the first use."""
        if self._reader is None and self._dead is None and not self._closed:
            loop = asyncio.get_running_loop()
            self._reader = loop.create_task(self._read(self._client))
            threading.Thread(target=self._watch, args=(loop, self._client), name="engine-watch", daemon=True).start()
            if self._stats_log is None and self._logs_stats:
                self._stats_log = loop.create_task(StatsLog(self.metrics, lambda: self.stats).run())

    def _watch(self, loop: asyncio.AbstractEventLoop, client: CoreClient) -> None:
        code = client.process.wait()
        if not self._closed:
            loop.call_soon_threadsafe(self._on_end, client, code)

    def _on_end(self, client: CoreClient, code: int) -> None:
        if client is self._client and self._dead is None:
            logger.error("The engine process ended unexpectedly (code %d).", code)
            self._die()

    def _die(self) -> None:
        """The engine is lost: ends what was in flight, and starts another one if that is allowed."""
        restarts = self._restarts_left > 0
        self._dead = EngineDeadError(restarts=restarts)
        if self._reader is not None and self._reader is not asyncio.current_task():
            self._reader.cancel()
        self._reader = None
        self._client.process.kill()
        self._processor.fail_all(self._dead)
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
            # What it held, memory of the device above all, is needed again.
            await loop.run_in_executor(None, self._client.process.wait, _END_GRACE_S)
            self._client.close()
            self._client = self._open()
            ready = await loop.run_in_executor(None, self._client.wait_until_ready, lambda: self._closed)
            self.num_blocks = ready.num_blocks
            self.pool_budget_tokens = ready.pool_budget_tokens
            self.stats = EngineStats()
            self.metrics.on_restart(ready.num_blocks)
        except Exception as error:
            known = isinstance(error, StartupError)
            logger.error("The engine could not be started again: %s", error, exc_info=None if known else error)
            self._dead = EngineDeadError()
            self._ended.set()
            return
        self._dead = None
        self._is_sleeping = False
        self._ensure_reading()
        if await self._pin_again():
            logger.info("The engine serves again.")

    async def _pin_again(self) -> bool:
        """Gives a new engine process what operators pinned for good in the one that died; False if it dies of it."""
        for prompt_id, (token_ids, options) in list(self._kept.items()):
            try:
                await self._call("add_system_prompt", token_ids, options)
            except EngineDeadError:
                return False
            except Exception as error:
                logger.error("System prompt %s is not pinned again: %s", prompt_id, error)
        return True

    async def _read(self, client: CoreClient) -> None:
        """Takes in what the engine says, until it or we end. Without it nobody would get an answer any more."""
        try:
            while True:
                await self._take_in(await client.receive())
                # News that wait already are taken without a turn of the loop, in which what came before them is sent.
                await asyncio.sleep(0)
        except Exception:
            # Not the fault of one request, which ends by itself: there is no telling what is right any more.
            if self._dead is None and not self._closed:
                logger.exception("The engine's news could not be taken in; the engine process is ended.")
                self._die()

    async def _take_in(self, news: StepOutputs) -> None:
        if news.outputs or news.results or (news.stats is not None and news.stats.iteration_tokens):
            self._watchdog.note_progress()
        orders = self._processor.process(news.outputs)
        if orders.aborts:
            await self._send(AbortRequests(orders.aborts))
        for fork in orders.forks:
            await self._send(fork)
        if news.stats is not None:
            self.stats = news.stats
            self.metrics.on_stats(news.stats)
            log_varying_prompts(news.stats.varying_prompts, self.tokenizer)
        for result in news.results:
            future = self._calls.pop(result.call_id, None)
            if future is None or future.done():
                continue
            if result.error is None:
                future.set_result(result.result)
            else:
                future.set_exception(VLLMValidationError(result.error, result.param))

    async def _send(self, message: EngineInput) -> None:
        if self._dead is not None:
            raise self._dead
        await self._client.send(message)

    @property
    def errored(self) -> bool:
        """Whether the engine process has ended, for good or until it is started again."""
        return self._dead is not None or (not self._closed and self._client.has_ended)

    @property
    def dead_error(self) -> EngineDeadError:
        return self._dead or EngineDeadError()

    def _has_work(self) -> bool:
        """Whether the engine ought to finish steps."""
        return not self._is_sleeping and bool(self._processor.requests or self._calls)

    def _expect_work(self) -> None:
        """Work is about to go to the engine."""
        if not self._has_work():
            self._watchdog.note_progress()

    async def check_health(self) -> None:
        """Raises `EngineDeadError` if the engine process has ended, `EngineStalledError` while it has work and has not
        finished a step for long."""
        if self.errored:
            raise self.dead_error
        self._watchdog.check(self._has_work())

    async def wait_until_dead(self) -> None:
        """Returns when the engine process has ended and is not started again."""
        self._ensure_reading()
        await self._ended.wait()

    def shutdown(self) -> None:
        """Ends the engine process; open requests end with an error."""
        if self._closed:
            return
        self._closed = True
        self._client.stop(_STOP_GRACE_S)
        for task in (self._reader, self._stats_log, self._restarting):
            if task is not None:
                task.cancel()
        self._compiler.shutdown()
        self.lanes.shutdown()
        self._client.close()
        self._context.term()
        self._folder.cleanup()

    # Requests --------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompt: PromptType | ProcessedPrompt,
        sampling_params: SamplingParams | CheckedParams,
        request_id: str,
        *,
        num_system_tokens: int | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        marks: Sequence[CacheMark] = (),
        arrival_time: float | None = None,
        search: Search | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of a request as they come. Closing the iterator early aborts the request.

        Args:
            sampling_params: If `check_params` has checked them, they may be those of several requests.
            num_system_tokens, cache_salt, priority, marks: As in `LLMEngine.add_request`.
            arrival_time: When it came, in seconds of `time.time()`; None for now.
            search: As of `LLMEngine.add_request`; its outputs come as one item, when it is over.

        Raises:
            VLLMValidationError: a value is not allowed; before the first item.
            ServerBusyError: too many are on their way; before the first item.
            EngineDeadError: the engine process has ended.
        """
        self._ensure_reading()
        if arrival_time is None:
            arrival_time = time.time()
        params = sampling_params
        if not isinstance(params, CheckedParams):
            check_sampling_params(params)
        asked = params.asked if isinstance(params, CheckedParams) else params
        with self._admission.entry(asked.n if search is None else search.beams.params.beam_width):
            if isinstance(prompt, str):
                prompt = TokensPrompt(prompt_token_ids=await self.encode(prompt), prompt=prompt)
            if not isinstance(params, CheckedParams):
                params = await self.check_params(params)
            wanted = params.asked.structured_outputs
            request, processed = self.input_processor.request(
                request_id,
                prompt,
                params,
                constraint=None if wanted is None else await self._compile(wanted),
                num_system_tokens=num_system_tokens,
                cache_salt=cache_salt,
                priority=priority,
                marks=marks,
                tenant=current_tenant.get(),
                arrival_time=arrival_time,
                is_search=search is not None,
            )
            mailbox = Mailbox(request.sampling_params.output_kind)
            self._expect_work()
            try:
                state = self._processor.add(request, processed, mailbox.put, search)
            except ValueError as error:
                raise VLLMValidationError(str(error), "request_id") from None
        try:
            await self._send(request)
            while True:
                try:
                    news = await mailbox.take()
                except VLLMValidationError as error:
                    if wanted and error.param == "structured_outputs":
                        self._compiler.refuse(wanted, error)
                    raise
                yield news
                if news.finished:
                    return
        finally:
            if not state.finished and self._processor.requests.get(request_id) is state:
                await self.abort(request_id)

    async def admitted(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Awaits work that begins with one request, for which it keeps a place from now on. What it does before that,
        reading and rendering, is spent on nobody who is then turned away.

        Raises:
            ServerBusyError: too many are on their way; `work` was not begun.
        """
        try:
            with self._admission.place():
                return await work
        finally:
            work.close()

    async def _compile(self, wanted: StructuredOutputsParams) -> CompiledConstraint:
        # Several requests may wait for the same one: it goes on when one of them leaves.
        try:
            return await asyncio.shield(asyncio.wrap_future(self._compiler.compile(wanted)))
        except VLLMValidationError as error:
            raise VLLMValidationError(str(error).replace("structured_outputs", wanted.field, 1), wanted.field) from None

    async def abort(self, request_id: str) -> None:
        """Ends a request; the engine takes note before its next step. Unknown ids are ignored."""
        self._processor.drop(request_id)
        if self._dead is None:
            await self._send(AbortRequests([(request_id, None)]))

    async def check_params(self, params: SamplingParams, num_prompts: int = 1) -> CheckedParams:
        """`InputProcessor.params`, off the event loop where it takes a while.

        Raises:
            VLLMValidationError: a value is not allowed.
        """
        if params.bad_words or len(params.allowed_token_ids or ()) > _MANY_IDS:
            return await self.lanes.run(self.input_processor.params, params, num_prompts)
        return self.input_processor.params(params, num_prompts)

    def own_prompt(self, token_ids: list[int], num_system_tokens: int | None = None) -> ProcessedPrompt:
        """`InputProcessor.own_prompt`, for `generate`."""
        return self.input_processor.own_prompt(token_ids, num_system_tokens, current_tenant.get())

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, off the event loop.

        Raises:
            VLLMValidationError: too long for the model.
        """
        return await self.lanes.run(self.input_processor.encode, text, add_special_tokens, size=len(text))

    async def render_chat(self, cache_salt: str | None = None, **kwargs: Any) -> RenderedChat:
        """`ChatRenderer.render`, off the event loop; what it keeps is shared as pinned prompts and suffixes are."""
        tenant = current_tenant.get()
        system_scope = tenant if self.vllm_config.system_prompt.private else None

        awaited: dict[PartKey, SystemPart] = {}

        def render() -> RenderedChat:
            return self.renderer.render(
                **kwargs, system_scope=system_scope, scope=(tenant, cache_salt), awaited=awaited
            )

        while True:
            try:
                return await self.lanes.run(render)
            except SystemPartPending as pending:
                # Whoever waits here holds no thread, which others may need meanwhile.
                awaited[pending.key] = await asyncio.shield(asyncio.wrap_future(pending.part))

    def get_tokenizer(self) -> PreTrainedTokenizerFast:
        return self.tokenizer.hf

    # System prompts --------------------------------------------------------------------------------------------

    async def add_system_prompt(
        self,
        prompt_or_ids: str | list[int] | list[dict],
        name: str | None = None,
        ttl: float | None = None,
        pin: PinName = "hard",
        source: str = "declared",
    ) -> SystemPromptInfo:
        """Pins a system prompt; returns once it is computed. See `LLMEngine.add_system_prompt`.

        Raises:
            VLLMValidationError: empty, too long, an option is not allowed, or no room in the pool.
        """
        options = PinOptions.checked(name, ttl, pin, source)
        size = len(prompt_or_ids) if isinstance(prompt_or_ids, str | list | tuple) else 0
        token_ids = await self.lanes.run(self.input_processor.system_prompt, prompt_or_ids, size=size)
        info = SystemPromptInfo(**await self._call("add_system_prompt", token_ids, options))
        self._keep(info, token_ids, options)
        return info

    def _keep(self, info: SystemPromptInfo, token_ids: list[int], options: PinOptions) -> None:
        """Remembers what is pinned until an operator says otherwise, for an engine process that follows this one."""
        if info.pin == "hard" and info.ttl is None:
            self._kept[info.id] = (token_ids, options)
        else:
            self._kept.pop(info.id, None)

    async def update_system_prompt(self, prompt_id: str, **changes: Any) -> SystemPromptInfo:
        """Changes the `name` or `ttl` of a prompt; its ttl counts from now on.

        Raises:
            VLLMValidationError: there is no such system prompt, or a value is not allowed.
        """
        check_prompt_id(prompt_id)
        checked = PromptChanges.checked(changes)
        info = SystemPromptInfo(**await self._call("update_system_prompt", prompt_id, checked))
        if prompt_id in self._kept:
            token_ids, options = self._kept[prompt_id]
            self._keep(info, token_ids, msgspec.structs.replace(options, **checked.as_dict()))
        return info

    async def remove_system_prompt(self, prompt_id: str) -> SystemPromptInfo:
        """Ends a pin, at once or when its last reader has finished.

        Raises:
            VLLMValidationError: there is no such system prompt.
        """
        check_prompt_id(prompt_id)
        self._kept.pop(prompt_id, None)
        return SystemPromptInfo(**await self._call("remove_system_prompt", prompt_id))

    async def list_system_prompts(self) -> list[SystemPromptInfo]:
        return [SystemPromptInfo(**info) for info in await self._call("list_system_prompts")]

    async def system_prompt_pool(self) -> SystemPromptPoolInfo:
        """State and totals of the pool."""
        return msgspec.convert(await self._call("system_prompt_pool"), SystemPromptPoolInfo)

    async def set_system_prompt_budget(self, num_tokens: int) -> int:
        """Changes how many tokens may be pinned; returns what it is now, whole blocks and as far as memory allows.

        Raises:
            VLLMValidationError: not such a number, or more than that is pinned.
        """
        check_int("num_tokens", num_tokens, 0, MAX_BUDGET_TOKENS)
        return int(await self._call("set_system_prompt_budget", num_tokens))

    async def explain_request(
        self,
        token_ids: list[int],
        params: SamplingParams,
        *,
        num_system_tokens: int | None = None,
        cache_salt: str | None = None,
        marks: Sequence[CacheMark] = (),
    ) -> dict[str, Any]:
        """What the pool would do for a request, and why; see `SystemPromptPool.explain`."""
        request, _ = self.input_processor.request(
            "explain",
            token_ids,
            params,
            num_system_tokens=num_system_tokens,
            cache_salt=cache_salt,
            marks=marks,
            tenant=current_tenant.get(),
        )
        answer: dict[str, Any] = await self._call("explain_request", request)
        return answer

    async def reset_prefix_cache(self) -> bool:
        """Forgets cached suffix blocks; pinned prompts stay."""
        return bool(await self._call("reset_prefix_cache"))

    async def sleep(self, level: int = 1) -> None:
        """Starts no step until `wake_up`; see `EngineCore.sleep`.

        Raises:
            VLLMValidationError: there is no such level.
        """
        check_int("level", level, 0, 2)
        await self._call("sleep", level)
        self._is_sleeping = True

    async def wake_up(self) -> None:
        await self._call("wake_up")
        self._expect_work()
        self._is_sleeping = False

    async def is_sleeping(self) -> bool:
        return bool(await self._call("is_sleeping"))

    async def _call(self, method: str, *args: Any) -> Any:
        self._ensure_reading()
        if self.errored:
            raise self.dead_error
        self._expect_work()
        call_id = next(self._call_ids)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = future
        await self._send(UtilityCall(call_id, method, list(args)))
        return await future
