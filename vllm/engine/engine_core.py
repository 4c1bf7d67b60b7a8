"""Scheduler, pool and ranks as one machine: token ids in, token ids out. No text and no sockets in here."""

from __future__ import annotations

import hashlib
import secrets
from collections import deque
from collections.abc import Iterable
from concurrent import futures
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.core.block_manager import BlockManager
from vllm.core.prompt_room import WindowRoom
from vllm.core.prompt_tiers import PromptTiers
from vllm.core.scheduler import PlannedBatch, Scheduler
from vllm.core.system_prompt_pool import PinClass, PinnedPrompt, PromptState, SystemPromptPool
from vllm.core.window_blocks import WindowBlocks
from vllm.engine.calls import PinName
from vllm.engine.messages import EngineOutput, EngineRequest, EngineStats, StepOutputs
from vllm.exceptions import StartupError
from vllm.executor.base import Executor
from vllm.executor.start import start_executor
from vllm.kv_cache.extents import PinnedBlockPool
from vllm.kv_cache.windows import WindowLayout
from vllm.logger import init_logger
from vllm.sequence import Sequence
from vllm.step import PositionLogprobs, StepPlan, StepResult
from vllm.structured_output.masks import MaskFiller
from vllm.structured_output.store import ConstraintStore
from vllm.system_prompt_store import SnapshotRecord
from vllm.worker.running_step import RunningStep

if TYPE_CHECKING:
    from vllm.structured_output.grammars import Grammar

logger = init_logger(__name__)

# With nothing else to do, the engine waits so long for a constraint before it looks for other news.
_CONSTRAINT_POLL_S = 0.005

_FIELD_SEPARATOR = b"\x00"


class EngineCore:
    """One engine, stepped by its owner.

    Args:
        config: What to run.
        executor: The ranks; None starts those of `config`.

    Raises:
        StartupError: it cannot run on this machine with these settings.
    """

    def __init__(self, config: VllmConfig, executor: Executor | None = None) -> None:
        self.config = config
        self.executor = executor or start_executor(config)
        block_size = config.cache.block_size
        floor = -(-config.model.max_model_len // block_size)
        self._memory = self.executor.kv_memory()
        layout = self._window_layout()
        num_blocks, num_window_blocks = self._num_blocks(floor, layout)
        self.executor.initialize_cache(num_blocks, num_window_blocks)
        caching = config.cache.enable_prefix_caching
        windows = None if layout is None else WindowBlocks(layout, num_window_blocks, caching)
        blocks = BlockManager(num_blocks, block_size, caching, windows)
        pinned = PinnedBlockPool(num_blocks, self._budget_blocks(num_blocks), floor)
        self.pool = SystemPromptPool(
            config.system_prompt,
            pinned,
            block_size,
            on_release=blocks.give_back,
            bytes_per_block=self._memory.block_bytes * config.parallel.tensor_parallel_size,
            tiers=self._tiers(),
            windows=None if windows is None else self._window_room(windows),
        )
        self.scheduler = Scheduler(
            config.scheduler, blocks, self.pool, config.model.max_model_len, config.model.eos_token_ids
        )
        self.is_sleeping = False
        self._seeds_drawn = 0
        self._prompt_logprobs: dict[str, PositionLogprobs] = {}
        self._failed: list[EngineOutput] = []
        self._constraints = ConstraintStore(config.model)
        self._unready: dict[str, tuple[EngineRequest, futures.Future[Grammar]]] = {}
        self._masks = MaskFiller()
        self._in_flight: deque[tuple[StepPlan, RunningStep]] = deque()
        self._to_restore: deque[SnapshotRecord] = deque()
        self._restore_snapshots()

    @property
    def num_blocks(self) -> int:
        return self.scheduler.blocks.num_blocks

    def _window_layout(self) -> WindowLayout | None:
        """What the window group keeps; None where there is none."""
        block_size = self.config.cache.block_size
        if self._memory.window is None:
            return None
        return WindowLayout(
            self._memory.window, block_size, max(block_size, self.config.scheduler.max_num_batched_tokens)
        )

    def _window_room(self, windows: WindowBlocks) -> WindowRoom:
        """The pinned part of the window group. Its budget is that of the full group: the same share of its blocks, or
        as many tokens, which short prompts need here as well; long ones need fewer."""
        floor = windows.layout.most_blocks(self.config.model.max_model_len)
        return WindowRoom(
            PinnedBlockPool(windows.num_blocks, self._budget_blocks(windows.num_blocks), floor),
            windows.layout,
            windows.give_back,
            self._memory.window_block_bytes * self.config.parallel.tensor_parallel_size,
        )

    def _num_blocks(self, floor: int, layout: WindowLayout | None) -> tuple[int, int]:
        """Blocks of the full and of the window group.

        Raises:
            StartupError: there is no room for a sequence of the longest length.
        """
        cache, memory, longest = self.config.cache, self._memory, self.config.model.max_model_len
        num_bytes, source = memory.available, "the memory that is left"
        if cache.kv_cache_memory_bytes is not None:
            num_bytes, source = cache.kv_cache_memory_bytes, "--kv-cache-memory-bytes"
        num_blocks, num_window_blocks = num_bytes // memory.block_bytes, 0
        if cache.num_blocks is not None:
            num_blocks, source = cache.num_blocks, "--num-gpu-blocks-override"
            num_window_blocks = 0 if layout is None else layout.blocks_beside(num_blocks, memory, longest)
        elif layout is not None:
            num_blocks, num_window_blocks = layout.split(num_bytes, memory, longest)
        if num_blocks < floor:
            raise StartupError(
                f"The KV cache has room for {max(0, num_blocks) * cache.block_size} tokens ({source}), fewer than one "
                f"sequence of {self.config.model.max_model_len}; lower --max-model-len, or raise "
                "--kv-cache-memory-bytes or --gpu-memory-utilization."
            )
        if layout is not None:
            logger.info(
                "Layers that read %d tokens keep K and V of %d tokens (%.2f GiB), the others of %d (%.2f GiB).",
                layout.window,
                num_window_blocks * cache.block_size,
                num_window_blocks * memory.window_block_bytes / 2**30,
                num_blocks * cache.block_size,
                num_blocks * memory.block_bytes / 2**30,
            )
        return num_blocks, num_window_blocks

    def _tiers(self) -> PromptTiers:
        pool = self.config.system_prompt
        return PromptTiers(
            host_blocks=pool.host_blocks(self._memory.block_bytes, self.config.parallel.tensor_parallel_size),
            keeps_snapshots=pool.snapshot_dir is not None,
            stored=self.executor.snapshots(),
            copy_blocks=max(1, pool.copy_bytes // self._memory.block_bytes),
            window_share=self._memory.window_block_bytes / self._memory.block_bytes,
        )

    def _restore_snapshots(self) -> None:
        """Brings back what an operator has pinned before, and leaves the rest to the steps to come."""
        longest = self.config.model.max_model_len - 2
        found = [record for record in self.executor.snapshots() if len(record.token_ids) <= longest]
        # Parents before their children; otherwise what was used last comes first.
        for record in sorted(found, key=lambda r: len(r.token_ids)):
            if record.pin == "hard":
                self.scheduler.restore(record)
        while self.pool.has_prefill:
            self.step()
        if self.pool.num_prompts:
            logger.info("%d pinned system prompts are back from snapshots.", self.pool.num_prompts)
        self._to_restore.extend(record for record in found if record.pin != "hard")

    def _restore_next(self) -> None:
        """Brings back one more prompt; one at a time, so that a new one does not wait for all of them."""
        record = self._to_restore.popleft()
        parents = [
            other
            for other in self._to_restore
            if other.scope in ("", record.scope)
            and len(other.token_ids) <= record.start
            and other.token_ids == record.token_ids[: len(other.token_ids)]
        ]
        for parent in sorted(parents, key=lambda r: len(r.token_ids)):
            self._to_restore.remove(parent)
            self.scheduler.restore(parent)
        self.scheduler.restore(record)

    def _budget_blocks(self, num_blocks: int) -> int:
        pool = self.config.system_prompt
        if pool.mode == "off":
            return 0
        if pool.budget_tokens is not None:
            return pool.budget_tokens // self.config.cache.block_size
        return int(num_blocks * pool.budget_fraction)

    # Requests --------------------------------------------------------------------------------------------------

    def add_request(self, request: EngineRequest) -> None:
        """Takes in a request. One that cannot be taken fails alone, with an output that carries the error."""
        if request.constraint is not None:
            self._unready[request.request_id] = (request, self._constraints.load(request.constraint))
        else:
            self._admit(request)

    def _admit_ready(self) -> None:
        """Lets in the requests whose constraints have been loaded."""
        for request, loading in list(self._unready.values()):
            if loading.done():
                del self._unready[request.request_id]
                error = loading.exception()
                if error is None:
                    self._admit(request, loading.result())
                else:
                    self._fail(request.request_id, f"The structured outputs cannot be read: {error}", None)

    def _fail(self, request_id: str, error: str, param: str | None) -> None:
        """Ends a request with an error, which comes with the next outputs."""
        self.abort(request_id)
        self._failed.append(EngineOutput(request_id, 0, [], finish_reason="abort", error=error, param=param))

    def _admit(self, request: EngineRequest, grammar: Grammar | None = None) -> None:
        params = request.sampling_params
        seed = self._seed(params.seed)
        tenant, namespace = self._namespaces(request)
        cache_seed = self._cache_seed(namespace)
        # Where the order is that of arrival, no client may put itself before others.
        priority = request.priority if self.config.scheduler.policy == "priority" else 0
        sequences = [
            Sequence(
                request.request_id,
                request.prompt_token_ids,
                params,
                index=i,
                priority=priority,
                seed=seed + i,
                arrival_time=request.arrival_time,
                cache_seed=cache_seed,
                tenant=tenant,
                namespace=namespace,
                is_beam=request.is_search,
            )
            for i in range(params.n)
        ]
        if grammar is not None:
            from vllm.structured_output.matcher import MatchingCost, TokenMatcher, token_bits

            cost = MatchingCost()
            model, allowed, stops = self.config.model, None, None
            if params.allowed_token_ids is not None:
                allowed = token_bits(params.allowed_token_ids, model.vocab_size)
                stops = token_bits(model.eos_token_ids, model.vocab_size)
            for seq in sequences:
                seq.matcher = TokenMatcher(grammar, allowed, stops, cost)
        try:
            self.scheduler.add(sequences, request.num_system_tokens, request.marks)
        except ValueError as error:
            self._failed.append(EngineOutput(request.request_id, 0, [], finish_reason="abort", error=str(error)))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request, or one output of it, and frees what it held. Unknown ids are ignored."""
        if index is None:
            self._unready.pop(request_id, None)
        self.scheduler.abort(request_id, index)
        self._prompt_logprobs.pop(request_id, None)

    def fork(self, request_id: str, beams: list[tuple[int, int]]) -> None:
        """Goes on with a beam search; see `Scheduler.fork`."""
        self.scheduler.fork(request_id, beams)

    def _seed(self, asked: int | None) -> int:
        """The seed of a request: its own, else drawn from the engine's seed, else fresh entropy."""
        if asked is not None:
            return asked
        self._seeds_drawn += 1
        if self.config.model.seed is None:
            return secrets.randbits(63)
        material = f"{self.config.model.seed}:{self._seeds_drawn}".encode()
        return int.from_bytes(hashlib.sha256(material).digest()[:7], "little")

    @staticmethod
    def _namespaces(request: EngineRequest) -> tuple[bytes, bytes]:
        """Digests of whose request it is, and of the namespace within; each empty where there is none."""
        tenant = b"" if request.tenant is None else hashlib.sha256(request.tenant.encode()).digest()
        if request.cache_salt is None:
            return tenant, tenant
        salt = hashlib.sha256(request.cache_salt.encode()).digest()
        return tenant, hashlib.sha256(tenant + salt).digest()

    def _cache_seed(self, namespace: bytes) -> bytes:
        """Start of the key chain of a request's blocks: equal only for the same weights and namespace."""
        fields = (self.config.model.weights_digest.encode(), self.config.model.dtype.encode())
        return _FIELD_SEPARATOR.join((*fields, namespace))

    # System prompts --------------------------------------------------------------------------------------------

    def add_system_prompt(
        self,
        token_ids: Iterable[int],
        name: str | None = None,
        ttl: float | None = None,
        pin: PinName = "hard",
        source: str = "declared",
    ) -> PinnedPrompt:
        """Declares a system prompt; it is computed in the coming steps.

        Raises:
            SystemPromptRefusedError: it cannot be pinned; the message says why.
        """
        return self.scheduler.add_system_prompt(token_ids, name=name, ttl=ttl, pin=PinClass[pin.upper()], source=source)

    def update_system_prompt(self, prompt_id: str, **changes: Any) -> PinnedPrompt:
        """Changes the `name` or `ttl` of a prompt.

        Raises:
            KeyError: there is no such prompt.
        """
        return self.pool.update(prompt_id, **changes)

    def explain_request(self, request: EngineRequest) -> dict[str, Any]:
        """What the pool would do for a request, and why; see `SystemPromptPool.explain`."""
        tenant, namespace = self._namespaces(request)
        seq = Sequence(
            request.request_id,
            request.prompt_token_ids,
            request.sampling_params,
            tenant=tenant,
            namespace=namespace,
        )
        return self.pool.explain(seq, request.num_system_tokens, request.marks)

    def remove_system_prompt(self, prompt_id: str) -> PinnedPrompt:
        """Ends a pin, once its last reader has finished.

        Raises:
            KeyError: there is no such prompt.
        """
        prompt = self.pool.remove(prompt_id)
        self.pool.tiers.delete_snapshot(prompt)
        return prompt

    def list_system_prompts(self) -> list[PinnedPrompt]:
        return self.pool.prompts()

    def reset_prefix_cache(self) -> None:
        """Forgets cached blocks of suffixes; pinned prompts stay."""
        self.scheduler.blocks.reset_prefix_cache()

    def sleep(self, level: int) -> None:
        """Starts no step until `wake_up`: requests wait, whether they run already or come meanwhile.

        The memory of weights and KV cache stays reserved.

        Args:
            level: From 1 on, cached blocks of suffixes are forgotten as well; pinned prompts stay.
        """
        self.is_sleeping = True
        if level >= 1:
            self.reset_prefix_cache()

    def wake_up(self) -> None:
        """Goes on with the requests that wait."""
        self.is_sleeping = False

    @staticmethod
    def is_computed(prompt: PinnedPrompt) -> bool:
        """Whether a declared prompt has left the states in which it waits for its prefill."""
        return prompt.state not in (PromptState.PENDING, PromptState.COMPUTING, PromptState.LOADING)

    # Steps -----------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        if self.is_sleeping:
            return bool(self._in_flight or self._failed)
        waiting = self._failed or self._unready or self._to_restore
        return self.scheduler.has_work() or bool(waiting)

    def step(self) -> StepOutputs:
        """Plans a step and starts it; takes in the oldest one in flight and returns its news.

        Where the device leaves the host free, the oldest is the step before: its tokens come back while the one that
        was just started computes.
        """
        plan = StepPlan() if self.is_sleeping else self._plan()
        if not plan.is_empty:
            self._in_flight.append((plan, self.executor.submit(plan)))
        if len(self._in_flight) <= 1:
            self._draw_masked()
        if not self._in_flight or (not plan.is_empty and len(self._in_flight) < self.executor.pipeline_depth):
            if self._unready and not self._in_flight:
                futures.wait([loading for _, loading in self._unready.values()], _CONSTRAINT_POLL_S, "FIRST_COMPLETED")
            return StepOutputs(outputs=self._take_failed(), stats=self.stats(0))
        oldest, step = self._in_flight.popleft()
        result = step.wait()
        self.pool.tiers.end_jobs(result.ended_jobs)
        batch = self.scheduler.oldest_batch
        logprobs = {seq: f for seq, f in zip(batch.sequences, result.logprobs, strict=False) if f is not None}
        self._collect_prompt_logprobs(batch, result)
        outputs = self._take_failed()
        for seq, token, stop_token in self.scheduler.postprocess(result.token_ids):
            if seq.matcher is not None and seq.matcher.error is not None:
                self._fail(seq.request_id, f"{seq.matcher.field} {seq.matcher.error}.", seq.matcher.field)
                continue
            # A beam does not keep the token that is drawn for it.
            first = len(seq.token_ids) - seq.num_prompt_tokens == (0 if seq.is_beam else 1)
            outputs.append(
                EngineOutput(
                    seq.request_id,
                    seq.index,
                    [token],
                    logprobs=logprobs.get(seq),
                    prompt_logprobs=self._prompt_logprobs.pop(seq.request_id, None) if first else None,
                    finish_reason=seq.finish_reason,
                    stop_reason=stop_token,
                    num_cached_tokens=seq.num_cached_tokens if first else None,
                    num_cache_write_tokens=seq.num_cache_write_tokens if first else 0,
                    first_scheduled_time=seq.first_scheduled_time if first else None,
                )
            )
        self._draw_masked()
        return StepOutputs(outputs=outputs, stats=self.stats(oldest.num_tokens))

    def _plan(self) -> StepPlan:
        if self._unready:
            self._admit_ready()
        if self._to_restore and not self.pool.has_prefill:
            self._restore_next()
        return self.scheduler.schedule()

    def _draw_masked(self) -> None:
        """Gives the newest step its masks, once all tokens before it are known; the device computes meanwhile."""
        if not self._in_flight:
            return
        plan, step = self._in_flight[-1]
        if step.awaits_masks:
            sequences = self.scheduler.newest_batch.sequences
            matchers = [sequences[entry].matcher for entry in plan.masked]
            step.draw(self._masks.fill([m for m in matchers if m is not None], self.config.model.vocab_size))

    def _take_failed(self) -> list[EngineOutput]:
        failed, self._failed = self._failed, []
        return failed

    def _collect_prompt_logprobs(self, batch: PlannedBatch, result: StepResult) -> None:
        """Gathers the chunks of a prompt's log-probabilities until its first token is drawn."""
        for seq, start, found in zip(batch.sequences, batch.starts, result.prompt_logprobs, strict=False):
            if found is None or seq.is_finished:
                continue
            if start == 0:
                self._prompt_logprobs[seq.request_id] = found
                continue
            so_far = self._prompt_logprobs[seq.request_id]
            self._prompt_logprobs[seq.request_id] = PositionLogprobs.joined([so_far, found])

    def stats(self, iteration_tokens: int) -> EngineStats:
        scheduler, pool, blocks = self.scheduler, self.pool, self.scheduler.blocks
        new_spans, pool.log.new_spans = pool.log.new_spans, []
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_cache_usage=blocks.usage,
            iteration_tokens=iteration_tokens,
            num_preemptions=scheduler.num_preemptions,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            num_blocks=blocks.num_blocks,
            num_free_blocks=blocks.num_free_blocks - blocks.num_cached_blocks,
            num_cached_blocks=blocks.num_cached_blocks,
            num_used_blocks=blocks.num_used_blocks,
            pinned_tokens=pool.pinned_tokens - pool.probation_tokens,
            probation_tokens=pool.probation_tokens,
            pinned_prompts=pool.num_prompts,
            pool_budget_tokens=pool.budget_tokens,
            pool_readers=pool.num_readers,
            pool_prefills=pool.num_prefills,
            pool_tokens_reused=pool.tokens_reused,
            pool_outcomes=dict(pool.outcomes),
            pool_prefill_seconds=pool.take_prefill_seconds(),
            varying_prompts=new_spans,
            pool_host_tokens=pool.tiers.num_host_blocks * blocks.block_size,
            pool_snapshots={f"{op}/{outcome}": n for (op, outcome), n in pool.tiers.outcomes.items()},
        )

    def shutdown(self) -> None:
        """Ends the ranks. What has been computed for pinned prompts is saved first."""
        while self.pool.tiers.must_end and not any(self.scheduler.unfinished()):
            self.step()
        self._constraints.shutdown()
        self._masks.shutdown()
        self.executor.shutdown()
