"""Calls about system prompts to an engine in another process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from vllm.engine.calls import PinOptions, PromptChanges, check_prompt_id
from vllm.exceptions import EngineDeadError
from vllm.logger import init_logger
from vllm.outputs import SystemPromptInfo, SystemPromptPoolInfo

logger = init_logger(__name__)


class PromptCalls:
    """Owns the memory of what operators have pinned for good, so that an engine process that is started anew gets it.

    Args:
        call: Calls a method of the engine core; see `CoreLink.call`.
    """

    def __init__(self, call: Callable[..., Awaitable[Any]]) -> None:
        self._call = call
        self._kept: dict[str, tuple[list[int], PinOptions]] = {}

    async def add(self, token_ids: list[int], options: PinOptions) -> SystemPromptInfo:
        """Pins a system prompt; returns once it is computed."""
        info = SystemPromptInfo(**await self._call("add_system_prompt", token_ids, options))
        self._keep(info, token_ids, options)
        return info

    async def update(self, prompt_id: str, changes: dict[str, Any]) -> SystemPromptInfo:
        """See `AsyncLLMEngine.update_system_prompt`."""
        check_prompt_id(prompt_id)
        checked = PromptChanges.checked(changes)
        info = SystemPromptInfo(**await self._call("update_system_prompt", prompt_id, checked))
        if prompt_id in self._kept:
            token_ids, options = self._kept[prompt_id]
            self._keep(info, token_ids, msgspec.structs.replace(options, **checked.as_dict()))
        return info

    async def remove(self, prompt_id: str) -> SystemPromptInfo:
        """See `AsyncLLMEngine.remove_system_prompt`."""
        check_prompt_id(prompt_id)
        self._kept.pop(prompt_id, None)
        return SystemPromptInfo(**await self._call("remove_system_prompt", prompt_id))

    async def infos(self) -> list[SystemPromptInfo]:
        return [SystemPromptInfo(**info) for info in await self._call("list_system_prompts")]

    async def pool(self) -> SystemPromptPoolInfo:
        """State and totals of the pool."""
        return msgspec.convert(await self._call("system_prompt_pool"), SystemPromptPoolInfo)

    async def set_budget(self, num_tokens: int) -> int:
        """See `AsyncLLMEngine.set_system_prompt_budget`; the number has been checked."""
        return int(await self._call("set_system_prompt_budget", num_tokens))

    async def pin_again(self) -> bool:
        """Gives a new engine process what the one that died had pinned for good; returns False if it dies of it."""
        for prompt_id, (token_ids, options) in [*self._kept.items()]:
            try:
                await self._call("add_system_prompt", token_ids, options)
            except EngineDeadError:
                return False
            except Exception as error:
                logger.error("System prompt %s is not pinned again: %s", prompt_id, error)
        return True

    def _keep(self, info: SystemPromptInfo, token_ids: list[int], options: PinOptions) -> None:
        if info.pin == "hard" and info.ttl is None:
            self._kept[info.id] = (token_ids, options)
        else:
            self._kept.pop(info.id, None)
