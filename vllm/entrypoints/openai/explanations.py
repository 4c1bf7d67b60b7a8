"""`/v1/system_prompts?explain=1`: what the pool would do for a request, whichever API's body it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.chat.cache_marks import to_keep
from vllm.entrypoints.chat.prompts import PromptReader
from vllm.entrypoints.chat.request import ChatRequest
from vllm.entrypoints.chat.sampling import prompt_logprobs
from vllm.entrypoints.chat.service import ChatService
from vllm.entrypoints.http.json_body import parse_model
from vllm.entrypoints.openai.protocol import ChatCompletionRequest, CompletionRequest, ExplainRequest
from vllm.exceptions import VLLMValidationError
from vllm.inputs import CacheMark
from vllm.sampling_params import SamplingParams
from vllm.transformers_utils.tokenizer import Tokenizer

_SHOWN_TOKENS = 16
_REASONS = {
    "hit": "It starts with a pinned system prompt, which is read instead of computed.",
    "probation": "Its system prompt is new: this request would have it computed, and the next one would pin it.",
    "created": "Its system prompt is not pinned yet: this request would have it computed once and pinned.",
    "disabled": "The mode of the pool does not let requests pin anything (--system-prompt-cache).",
    "prompt_logprobs": "It asks for prompt_logprobs, for which every token of the prompt is computed.",
    None: "It has no system prompt, and starts with none that is pinned.",
}


class ServingExplanations:
    """Says what would come of a request, and why.

    Args:
        dialects: Each reads the fields of a body as the chat that they ask for; None if only others have such fields.
            The first that reads them is right; what none of them reads is one of OpenAI's.
    """

    def __init__(
        self,
        engine: AsyncLLMEngine,
        prompts: PromptReader,
        chat: ChatService,
        dialects: Sequence[Callable[[dict[str, Any]], ChatRequest | None]],
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._chat = chat
        self._dialects = dialects

    async def explain(self, request: ExplainRequest) -> dict[str, Any]:
        """What the pool would do for a chat, response, message or text completion, and why; nothing is changed.

        Raises:
            VLLMValidationError: the request would be refused.
        """
        chat = self._chat_request(request)
        if (chat is None) == (request.prompt is None):
            raise VLLMValidationError("Give the body of a request to explain: messages, input or prompt, and only one.")
        system: int | None = None
        marks: list[CacheMark] = []
        if chat is not None:
            rendered = await self._chat.render(chat, cut=request.truncation == "auto")
            token_ids = rendered.prompt_token_ids
            system, marks = to_keep(rendered, chat)
        elif isinstance(request.prompt, str):
            special = request.add_special_tokens is not False
            token_ids = await self._prompts.text(request.prompt, "prompt", add_special_tokens=special)
        else:
            token_ids = request.prompt or []
        asked = chat or parse_model(CompletionRequest, request.model_dump(exclude_unset=True))
        logprobs = None if asked.logprobs is None or asked.logprobs is False else 0
        params = SamplingParams(
            prompt_logprobs=prompt_logprobs(asked, logprobs), truncate_prompt_tokens=request.truncate_prompt_tokens
        )
        found = await self._engine.explain_request(
            token_ids, params, num_system_tokens=system, cache_salt=request.cache_salt, marks=marks
        )
        return {
            "object": "system_prompt.explanation",
            "prompt_tokens": len(token_ids),
            "system_tokens": system,
            "text": await self._engine.lanes.run(_texts, self._engine.tokenizer, token_ids, system or 0),
            **found,
            "nearest": _nearest_json(found["nearest"], token_ids, self._engine.tokenizer),
            "reason": _reason(found),
        }

    def _chat_request(self, request: ExplainRequest) -> ChatRequest | None:
        """The chat that the route for such a body would answer; None for a text completion."""
        fields = request.model_dump(exclude_unset=True)
        for read in self._dialects:
            chat = read(fields)
            if chat is not None:
                return chat
        return None if request.messages is None else parse_model(ChatCompletionRequest, fields)


def _texts(tokenizer: Tokenizer, token_ids: list[int], boundary: int) -> dict[str, str]:
    """The prompt as the model reads it, control tokens included, cut where the system part ends."""
    system, own = token_ids[:boundary], token_ids[boundary:]
    return {
        "system": tokenizer.decode(system, skip_special_tokens=False),
        "own": tokenizer.decode(own, skip_special_tokens=False),
    }


def _nearest_json(nearest: dict[str, Any] | None, token_ids: list[int], tokenizer: Tokenizer) -> dict[str, Any] | None:
    if nearest is None:
        return None
    position = nearest["position"]
    shown = {key: nearest[key] for key in ("id", "name", "num_tokens", "position")}
    for key in ("pinned_token", "request_token"):
        token = nearest[key]
        shown[key] = None if token is None else {"id": token, "text": tokenizer.token_text(token)}
    return shown | {"before": tokenizer.decode(token_ids[max(0, position - _SHOWN_TOKENS) : position])}


def _reason(found: dict[str, Any]) -> str:
    refused = found["refused"]
    reason = _REASONS.get(found["outcome"]) or refused[-1]["reason"]
    if refused and found["outcome"] in ("hit", "probation", "created"):
        reason += f" More of it cannot be pinned: {refused[-1]['reason']}"
    nearest = found["nearest"]
    if nearest is not None and nearest["position"] < nearest["num_tokens"]:
        reason += (
            f" It leaves the pinned prompt {nearest['id']} of {nearest['num_tokens']} tokens at token "
            f"{nearest['position']}."
        )
    return reason
