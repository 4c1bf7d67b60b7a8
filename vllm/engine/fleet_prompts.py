"""System prompts of all engines of a server as if they were one pool."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from vllm.engine.calls import MAX_BUDGET_TOKENS, PinOptions
from vllm.engine.prompt_calls import PromptCalls
from vllm.exceptions import EngineDeadError, VLLMValidationError
from vllm.outputs import SystemPromptInfo, SystemPromptPoolInfo
from vllm.sampling_params import check_int

_T = TypeVar("_T")
_SUMMED_OF_PROMPT = ("hits", "uses", "readers", "num_bytes", "tokens_saved", "children")
_SUMMED_OF_POOL = (
    "budget_tokens",
    "pinned_tokens",
    "prompts",
    "readers",
    "tokens_reused",
    "prefills",
    "displaced",
    "pinned_bytes",
    "budget_bytes",
)
# A prompt is in the best state that it has in any engine.
_STATES = ("pinned", "probation", "computing", "loading", "pending", "host", "removing", "removed")


class FleetPrompts:
    """What an operator does, he does to every engine that runs.

    Args:
        engines: The calls to each, by its number.
    """

    def __init__(self, engines: Sequence[PromptCalls]) -> None:
        self._engines = engines

    async def add(self, token_ids: list[int], options: PinOptions) -> SystemPromptInfo:
        """Pins a system prompt in every engine; returns once it is computed there."""
        return joined_infos(await self._each(lambda engine: engine.add(token_ids, options)))

    async def update(self, prompt_id: str, changes: dict[str, Any]) -> SystemPromptInfo:
        """See `AsyncLLMEngine.update_system_prompt`."""
        return joined_infos(await self._where_it_is(lambda engine: engine.update(prompt_id, changes)))

    async def remove(self, prompt_id: str) -> SystemPromptInfo:
        """See `AsyncLLMEngine.remove_system_prompt`."""
        return joined_infos(await self._where_it_is(lambda engine: engine.remove(prompt_id)))

    async def infos(self) -> list[SystemPromptInfo]:
        """All of them, each once."""
        found: dict[str, dict[int, SystemPromptInfo]] = {}
        for number, infos in (await self._each(lambda engine: engine.infos())).items():
            for info in infos:
                found.setdefault(info.id, {})[number] = info
        return [joined_infos(infos) for infos in found.values()]

    async def pool(self) -> SystemPromptPoolInfo:
        """State and totals of all pools."""
        return joined_pools([*(await self._each(lambda engine: engine.pool())).values()])

    async def set_budget(self, num_tokens: int) -> int:
        """Shares a budget among the engines; returns what they have of it."""
        check_int("num_tokens", num_tokens, 0, MAX_BUDGET_TOKENS)
        count = len(self._engines)
        shares = await self._each(lambda engine: engine.set_budget(-(-num_tokens // count)))
        return sum(shares.values())

    async def _each(
        self, call: Callable[[PromptCalls], Awaitable[_T]], forgiven: tuple[type[Exception], ...] = (EngineDeadError,)
    ) -> dict[int, _T]:
        """What a call returns, by engine; those in which it fails by a `forgiven` error are left out.

        Raises the first error if that is another one, or if it fails in all of them.
        """
        results = await asyncio.gather(*map(call, self._engines), return_exceptions=True)
        found = {i: result for i, result in enumerate(results) if not isinstance(result, BaseException)}
        for result in results:
            if isinstance(result, BaseException) and not (found and isinstance(result, forgiven)):
                raise result
        return found

    async def _where_it_is(self, call: Callable[[PromptCalls], Awaitable[_T]]) -> dict[int, _T]:
        """What a call about one prompt returns, by the engines that have it.

        Raises:
            VLLMValidationError: none has.
        """
        return await self._each(call, (EngineDeadError, VLLMValidationError))


def joined_infos(infos: dict[int, SystemPromptInfo]) -> SystemPromptInfo:
    """A prompt as several engines have it, by their numbers."""
    if len(infos) == 1:
        ((number, info),) = infos.items()
        return replace(info, engines=[number])
    best = min(infos.values(), key=lambda info: _STATES.index(info.state))
    sums = {name: sum(getattr(info, name) for info in infos.values()) for name in _SUMMED_OF_PROMPT}
    return replace(
        best,
        created=min(info.created for info in infos.values()),
        last_used=max(info.last_used for info in infos.values()),
        engines=sorted(infos),
        **sums,
    )


def joined_pools(pools: Sequence[SystemPromptPoolInfo]) -> SystemPromptPoolInfo:
    """The pools of several engines as one."""
    if len(pools) == 1:
        return pools[0]
    sums = {name: sum(getattr(pool, name) for pool in pools) for name in _SUMMED_OF_POOL}
    outcomes: dict[str, int] = {}
    for pool in pools:
        for outcome, count in pool.outcomes.items():
            outcomes[outcome] = outcomes.get(outcome, 0) + count
    refused = sorted((one for pool in pools for one in pool.refused), key=lambda one: one.last_seen)
    varying = [span for pool in pools for span in pool.varying]
    return replace(pools[0], outcomes=outcomes, refused=refused, varying=varying, **sums)
