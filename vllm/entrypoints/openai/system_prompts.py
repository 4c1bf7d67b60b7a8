"""`/v1/system_prompts`: what operators pin, look at, change and release."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.engine.calls import MAX_BUDGET_TOKENS, MAX_NAME_CHARS, MAX_TTL_SECONDS
from vllm.engine.varying_prompts import describe_varying
from vllm.entrypoints.chat.messages import check_messages
from vllm.entrypoints.chat.prompts import ChatOptions, PromptReader
from vllm.entrypoints.http.errors import ApiError
from vllm.entrypoints.http.json_body import snippet
from vllm.entrypoints.openai.protocol import (
    SystemPromptChange,
    SystemPromptPoolChange,
    SystemPromptRequest,
)
from vllm.exceptions import VLLMValidationError
from vllm.outputs import SystemPromptInfo
from vllm.sampling_params import check_float

_SYSTEM_ROLES = ("system", "developer")
# The system part of a chat ends where the next turn's text begins, so a turn must follow it.
_NEXT_TURN = {"role": "user", "content": "Hello"}


class ServingSystemPrompts:
    """Creates, lists, changes and releases pinned system prompts."""

    def __init__(self, engine: AsyncLLMEngine, prompts: PromptReader) -> None:
        self._engine = engine
        self._prompts = prompts

    async def create(self, request: SystemPromptRequest) -> dict[str, Any]:
        """See `pin`."""
        return _json(await self.pin(request))

    async def pin(self, request: SystemPromptRequest, source: str = "declared") -> SystemPromptInfo:
        """Pins a system prompt, given as the messages (and tools) of a chat, as text, or as token ids.

        Raises:
            VLLMValidationError: A field is wrong, or the chat template has no system part that could be pinned.
        """
        given = [name for name in ("messages", "prompt", "prompt_token_ids") if getattr(request, name) is not None]
        if len(given) != 1:
            raise VLLMValidationError(
                "Give one of messages, prompt and prompt_token_ids"
                + (f", not {' and '.join(given)}." if given else "."),
                given[-1] if given else None,
            )
        _check_name_and_ttl(request.name, request.ttl)
        prompt = await self._prompt(request)
        if not prompt:
            raise VLLMValidationError(f"{given[0]} must not be empty.", given[0])
        return await self._engine.add_system_prompt(
            prompt, name=request.name, ttl=request.ttl, pin=request.pin, source=source
        )

    async def _prompt(self, request: SystemPromptRequest) -> str | list[int]:
        if request.prompt_token_ids is not None:
            return request.prompt_token_ids
        if request.prompt is not None:
            return request.prompt
        messages = check_messages(request.messages or [])
        for message in messages:
            if message["role"] not in _SYSTEM_ROLES:
                raise VLLMValidationError(
                    f"messages may hold only {' and '.join(_SYSTEM_ROLES)} messages, got {snippet(message['role'])}.",
                    "messages",
                )
        options = ChatOptions(tools=request.tools, chat_template_kwargs=request.chat_template_kwargs)
        rendered = await self._prompts.chat([*messages, _NEXT_TURN], options)
        if not rendered.num_system_tokens:
            raise VLLMValidationError(
                "messages have no system part that this model's chat template could share between chats.", "messages"
            )
        return rendered.prompt_token_ids[: rendered.num_system_tokens]

    async def list(self) -> dict[str, Any]:
        """All prompts of the pool, what it is up to, which prompts it refused, and what it would advise."""
        pool = await self._engine.system_prompt_pool()
        tokenizer = self._engine.tokenizer
        totals = {key: value for key, value in vars(pool).items() if key not in ("refused", "varying")}
        return {
            "object": "list",
            "data": [_json(info) for info in await self._engine.list_system_prompts()],
            "refused": [asdict(info) for info in pool.refused],
            "warnings": [
                {
                    "message": describe_varying(span, tokenizer),
                    "position": span.position,
                    "examples": [tokenizer.decode(ids) for ids in span.examples],
                    "num_prompts": span.num_prompts,
                    "num_shared_tokens": span.num_shared,
                }
                for span in pool.varying
            ],
            "pool": totals,
        }

    async def get(self, prompt_id: str) -> dict[str, Any]:
        """Raises ApiError 404 for an id that is not in the pool."""
        for info in await self._engine.list_system_prompts():
            if info.id == prompt_id:
                return _json(info)
        raise _unknown(prompt_id)

    async def change(self, prompt_id: str, change: SystemPromptChange) -> dict[str, Any]:
        """Changes what is given of name and ttl; raises ApiError 404 for an unknown id."""
        changes = {name: getattr(change, name) for name in ("name", "ttl") if name in change.model_fields_set}
        if not changes:
            raise VLLMValidationError("Give name or ttl, or both.")
        _check_name_and_ttl(changes.get("name"), changes.get("ttl"))
        await self.get(prompt_id)
        return _json(await self._engine.update_system_prompt(prompt_id, **changes))

    async def change_pool(self, change: SystemPromptPoolChange) -> dict[str, Any]:
        """Changes the pool's budget; raises VLLMValidationError while more than that is pinned."""
        if not 0 <= change.budget_tokens <= MAX_BUDGET_TOKENS:
            raise VLLMValidationError(
                f"budget_tokens must be from 0 to {MAX_BUDGET_TOKENS}, got {change.budget_tokens}.", "budget_tokens"
            )
        return {"budget_tokens": await self._engine.set_system_prompt_budget(change.budget_tokens)}

    async def delete(self, prompt_id: str) -> dict[str, Any]:
        """Releases a prompt, now or once nobody holds it, and says which; raises ApiError 404 for an unknown id."""
        await self.get(prompt_id)
        info = await self._engine.remove_system_prompt(prompt_id)
        gone = info.state == "removed"
        message = "Released." if gone else _why_deferred(info)
        answer = {"id": prompt_id, "object": "system_prompt", "deleted": gone, "state": info.state, "message": message}
        return answer | {"readers": info.readers, "children": info.children}


def _why_deferred(info: SystemPromptInfo) -> str:
    holders = []
    if info.readers:
        holders.append(f"requests that read it ({info.readers})")
    if info.children:
        holders.append(f"pinned prompts that continue it ({info.children})")
    return (
        f"Deferred until it is held no more by {' and '.join(holders) or 'its own prefill'}; it takes no new readers."
    )


def _check_name_and_ttl(name: str | None, ttl: float | None) -> None:
    if name is not None and not 1 <= len(name) <= MAX_NAME_CHARS:
        raise VLLMValidationError(f"name must have 1 to {MAX_NAME_CHARS} characters, got {len(name)}.", "name")
    if ttl is not None:
        check_float("ttl", ttl, 0.0, MAX_TTL_SECONDS, low_open=True)


def _unknown(prompt_id: str) -> ApiError:
    return ApiError(404, f"There is no system prompt {snippet(prompt_id)}; GET /v1/system_prompts lists them.", "id")


def _json(info: SystemPromptInfo) -> dict[str, Any]:
    return {"object": "system_prompt", **asdict(info)}
