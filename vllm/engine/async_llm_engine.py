"""The engine in a process of its own, for servers: the caller's event loop never waits for a step."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedTokenizerFast

from vllm.config import VllmConfig
from vllm.engine.admission import Admission
from vllm.engine.arg_utils import EngineArgs
from vllm.engine.calls import PinName, PinOptions
from vllm.engine.fleet_prompts import FleetPrompts
from vllm.engine.input_processor import CheckedParams, InputProcessor, ProcessedPrompt, check_sampling_params
from vllm.engine.mailbox import Mailbox
from vllm.engine.messages import EngineRequest
from vllm.engine.metrics import JoinedMetrics
from vllm.engine.replica import Replica, start_replicas
from vllm.engine.routing import Router, current_engine, prefixes
from vllm.engine.search_state import Search
from vllm.engine.tenant import current_tenant
from vllm.engine.work_lanes import WorkLanes
from vllm.exceptions import EngineDeadError, ServerBusyError, VLLMValidationError
from vllm.inputs import CacheMark, PromptType, TokensPrompt
from vllm.outputs import RequestOutput, SystemPromptInfo, SystemPromptPoolInfo
from vllm.sampling_params import SamplingParams, StructuredOutputsParams, check_int
from vllm.structured_output.compiler import ConstraintCompiler
from vllm.structured_output.constraint import CompiledConstraint
from vllm.transformers_utils.chat_template import ChatRenderer, RenderedChat
from vllm.transformers_utils.system_parts import PartKey, SystemPart, SystemPartPending

_T = TypeVar("_T")

# Copied in about 0.1 ms.
_MANY_IDS = 4096


class AsyncLLMEngine:
    """Client of engine processes that it starts and ends with itself: one, or `--data-parallel-size` of them, each of
    which has the whole model and serves the requests that it is picked for.

    Args:
        args: Flags; the engine processes get what they are resolved to.
        max_restarts: How often each engine process that has died is started again. What was in flight fails with
            `EngineDeadError`, as does whatever comes until a process is ready; its caches start empty.

    Attributes:
        lanes: Threads for work on long requests.
        process_command: Starts an engine process, which takes its arguments from standard input.
        replicas: The engine processes.
        metrics_registry: Prometheus metrics.

    Raises:
        StartupError: an engine process cannot run with these arguments on this machine.
    """

    process_command: ClassVar[Sequence[str]] = (sys.executable, "-m", "vllm.engine.core_process")

    def __init__(self, args: EngineArgs, max_restarts: int = 0) -> None:
        self.vllm_config: VllmConfig
        self.vllm_config, self.tokenizer = args.resolve()
        model = self.vllm_config.model
        self.renderer = ChatRenderer(self.tokenizer, model.chat_template)
        self.input_processor = InputProcessor(model, self.tokenizer, self.renderer, serves=True)
        self._compiler = ConstraintCompiler(model)
        self._closed = False
        self.lanes = WorkLanes()
        logs_stats = not args.disable_log_stats
        try:
            self.replicas = start_replicas(
                self.vllm_config, self.tokenizer, self.process_command, max_restarts, logs_stats
            )
        except BaseException:
            self._compiler.shutdown()
            self.lanes.shutdown()
            raise
        self._router = Router([replica.load for replica in self.replicas])
        self._prompts = FleetPrompts([replica.prompts for replica in self.replicas])
        metrics = [replica.metrics for replica in self.replicas]
        self.metrics_registry = metrics[0].registry if len(metrics) == 1 else JoinedMetrics(metrics).registry
        self._admission = Admission(
            self.vllm_config.scheduler.max_num_queued_reqs,
            lambda: sum(replica.processor.num_outputs for replica in self.replicas),
            metrics[0].on_refusal,
        )

    @classmethod
    def from_engine_args(cls, args: EngineArgs, max_restarts: int = 0) -> AsyncLLMEngine:
        return cls(args, max_restarts)

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache, of all engines."""
        return sum(replica.num_blocks for replica in self.replicas)

    @property
    def pool_budget_tokens(self) -> int:
        """Tokens that may be pinned, of all engines."""
        return sum(replica.pool_budget_tokens for replica in self.replicas)

    @property
    def num_requests(self) -> int:
        """Sequences that run or wait, after the latest step of each engine."""
        return sum(replica.stats.num_running + replica.stats.num_waiting for replica in self.replicas)

    # Life ------------------------------------------------------------------------------------------------------

    def _ensure_reading(self) -> None:
        """Starts what needs a running event loop, with the first use."""
        for replica in self.replicas:
            replica.ensure_reading()

    @property
    def errored(self) -> bool:
        """Whether every engine process has ended, for good or until it is started again."""
        return all(replica.link.errored for replica in self.replicas)

    @property
    def dead_error(self) -> EngineDeadError:
        return self.replicas[0].link.dead_error

    async def check_health(self) -> None:
        """Raises `EngineDeadError` or `EngineStalledError` if no engine serves: its process has ended, or has work and
        has not finished a step for long."""
        faults = [replica.fault() for replica in self.replicas]
        if faults[0] is not None and all(faults):
            raise faults[0]

    async def wait_until_dead(self) -> None:
        """Returns when every engine process has ended and none is started again."""
        self._ensure_reading()
        await asyncio.gather(*(replica.link.wait_until_dead() for replica in self.replicas))

    def shutdown(self) -> None:
        """Ends the engine processes; open requests end with an error."""
        if self._closed:
            return
        self._closed = True
        for replica in self.replicas:
            replica.shutdown()
        self._compiler.shutdown()
        self.lanes.shutdown()

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
            if any(request_id in replica.processor.requests for replica in self.replicas):
                raise VLLMValidationError(f"request id {request_id!r} is in use", "request_id")
            replica, to_compute = self._pick(request)
            replica.expect_work()
            state = replica.processor.add(request, processed, mailbox.put, search)
            replica.load.waiting_tokens += to_compute
        try:
            await replica.link.send(request)
            while True:
                try:
                    news = await mailbox.take()
                except VLLMValidationError as error:
                    if wanted and error.param == "structured_outputs":
                        self._compiler.refuse(wanted, error)
                    raise
                replica.load.waiting_tokens -= to_compute
                to_compute = 0
                yield news
                if news.finished:
                    return
        finally:
            replica.load.waiting_tokens -= to_compute
            if not state.finished and replica.processor.requests.get(request_id) is state:
                await replica.abort(request_id)

    def _pick(self, request: EngineRequest) -> tuple[Replica, int]:
        """The engine for a request, and how many tokens of its prompt that most likely has to compute.

        Raises:
            VLLMValidationError: the client names an engine that there is not.
        """
        wanted = current_engine.get()
        if wanted is not None and wanted >= len(self.replicas):
            raise VLLMValidationError(
                f"X-data-parallel-rank must be an engine of this server, 0 to {len(self.replicas) - 1}; got {wanted}.",
                "X-data-parallel-rank",
            )
        if len(self.replicas) == 1:
            return self.replicas[0], 0
        token_ids = request.prompt_token_ids
        system_scope = request.tenant if self.vllm_config.system_prompt.private else None
        heads = prefixes(token_ids, request.num_system_tokens, system_scope, (request.tenant, request.cache_salt))
        for replica in self.replicas:
            replica.load.num_outputs = replica.processor.num_outputs
        replica = self.replicas[self._router.pick(len(token_ids), heads) if wanted is None else wanted]
        to_compute = len(token_ids) - replica.load.num_known(heads)
        replica.load.note(heads)
        return replica, to_compute

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

    def in_background(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """A task for work that begins with a request, which has the place that `admitted` keeps here."""
        task = asyncio.create_task(work)
        self._admission.hand_on(task)
        return task

    async def _compile(self, wanted: StructuredOutputsParams) -> CompiledConstraint:
        # Several requests may wait for the same one: it goes on when one of them leaves.
        try:
            return await asyncio.shield(asyncio.wrap_future(self._compiler.compile(wanted)))
        except VLLMValidationError as error:
            raise VLLMValidationError(str(error).replace("structured_outputs", wanted.field, 1), wanted.field) from None

    async def abort(self, request_id: str) -> None:
        """Ends a request; the engine takes note before its next step. Unknown ids are ignored."""
        for replica in self.replicas:
            if request_id in replica.processor.requests:
                await replica.abort(request_id)

    async def abort_all(self) -> None:
        """Ends all requests that wait or run; they end with `ServerBusyError`."""
        error = ServerBusyError("The operator has paused the server, which ended its open requests; try again later.")
        for replica in self.replicas:
            await replica.abort_all(error)

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
        return await self._prompts.add(token_ids, options)

    async def update_system_prompt(self, prompt_id: str, **changes: Any) -> SystemPromptInfo:
        """Changes the `name` or `ttl` of a prompt; its ttl counts from now on.

        Raises:
            VLLMValidationError: there is no such system prompt, or a value is not allowed.
        """
        return await self._prompts.update(prompt_id, changes)

    async def remove_system_prompt(self, prompt_id: str) -> SystemPromptInfo:
        """Ends a pin, at once or when its last reader has finished.

        Raises:
            VLLMValidationError: there is no such system prompt.
        """
        return await self._prompts.remove(prompt_id)

    async def list_system_prompts(self) -> list[SystemPromptInfo]:
        return await self._prompts.infos()

    async def system_prompt_pool(self) -> SystemPromptPoolInfo:
        """State and totals of the pool."""
        return await self._prompts.pool()

    async def set_system_prompt_budget(self, num_tokens: int) -> int:
        """Changes how many tokens may be pinned; returns what it is now, whole blocks and as far as memory allows.

        Raises:
            VLLMValidationError: not such a number, or more than that is pinned.
        """
        return await self._prompts.set_budget(num_tokens)

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
        replica, _ = self._pick(request)
        answer: dict[str, Any] = await replica.call("explain_request", request)
        return answer

    async def reset_prefix_cache(self) -> bool:
        """Forgets cached suffix blocks; pinned prompts stay."""
        return all(await self._call("reset_prefix_cache"))

    async def sleep(self, level: int = 1) -> None:
        """Starts no step until `wake_up`; see `EngineCore.sleep`.

        Raises:
            VLLMValidationError: there is no such level.
        """
        check_int("level", level, 0, 2)
        await self._call("sleep", level)
        for replica in self.replicas:
            replica.is_sleeping = True

    async def wake_up(self) -> None:
        await self._call("wake_up")
        for replica in self.replicas:
            replica.expect_work()
            replica.is_sleeping = False

    async def is_sleeping(self) -> bool:
        return any(await self._call("is_sleeping"))

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """Calls a method of every engine core that runs."""
        running = [replica for replica in self.replicas if not replica.link.errored] or self.replicas
        return await asyncio.gather(*(replica.call(method, *args) for replica in running))
