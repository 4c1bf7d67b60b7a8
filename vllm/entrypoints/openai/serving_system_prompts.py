"""`/v1/system_prompts`: what operators pin, look at and release."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.openai.chat_messages import check_messages
from vllm.entrypoints.openai.errors import ApiError
from vllm.entrypoints.openai.json_body import snippet
from vllm.entrypoints.openai.prompts import ChatOptions, PromptReader
from vllm.entrypoints.openai.protocol import SystemPromptRequest
from vllm.exceptions import VLLMValidationError
from vllm.outputs import SystemPromptInfo
from vllm.sampling_params import check_float

MAX_NAME_CHARS = 256
MAX_TTL_SECONDS = 10 * 365 * 86400.0
_SYSTEM_ROLES = ("system", "developer")
# The system part of a chat ends where the next turn's text begins, so a turn must follow it.
_NEXT_TURN = {"role": "user", "content": "Hello"}


class ServingSystemPrompts:
    """Creates, lists and releases pinned system prompts."""

    def __init__(self, engine: AsyncLLMEngine, prompts: PromptReader) -> None:
        self._engine = engine
        self._prompts = prompts

    async def create(self, request: SystemPromptRequest) -> dict[str, Any]:
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
        if request.name is not None and not 1 <= len(request.name) <= MAX_NAME_CHARS:
            raise VLLMValidationError(
                f"name must have 1 to {MAX_NAME_CHARS} characters, got {len(request.name)}.", "name"
            )
        if request.ttl is not None:
            check_float("ttl", request.ttl, 0.0, MAX_TTL_SECONDS, low_open=True)
        prompt = await self._prompt(request)
        if not prompt:
            raise VLLMValidationError(f"{given[0]} must not be empty.", given[0])
        return _json(await self._engine.add_system_prompt(prompt, name=request.name, ttl=request.ttl))

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
        return {"object": "list", "data": [_json(info) for info in await self._engine.list_system_prompts()]}

    async def get(self, prompt_id: str) -> dict[str, Any]:
        """Raises ApiError 404 for an id that is not in the pool."""
        for info in await self._engine.list_system_prompts():
            if info.id == prompt_id:
                return _json(info)
        raise _unknown(prompt_id)

    async def delete(self, prompt_id: str) -> dict[str, Any]:
        """Releases a prompt once its last reader has finished; raises ApiError 404 for an unknown id."""
        await self.get(prompt_id)
        await self._engine.remove_system_prompt(prompt_id)
        return {"id": prompt_id, "object": "system_prompt", "deleted": True}


def _unknown(prompt_id: str) -> ApiError:
    return ApiError(404, f"There is no system prompt {snippet(prompt_id)}; GET /v1/system_prompts lists them.", "id")


def _json(info: SystemPromptInfo) -> dict[str, Any]:
    return {"object": "system_prompt", **asdict(info)}
