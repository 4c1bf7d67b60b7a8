"""`POST /tokenize` and `POST /detokenize`."""

from __future__ import annotations

from typing import Any

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.chat.prompts import ChatOptions, PromptReader
from vllm.entrypoints.chat.served_models import ServedModels
from vllm.entrypoints.openai.protocol import DetokenizeRequest, TokenizeRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import check_count

MAX_DETOKENIZE_TOKENS = 1_000_000


class ServingTokenization:
    """Shows how text and messages become token ids, and back."""

    def __init__(self, engine: AsyncLLMEngine, models: ServedModels, prompts: PromptReader) -> None:
        self._engine = engine
        self._models = models
        self._prompts = prompts

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """Token ids as a completion of `prompt`, or a chat with `messages`, would have them.

        Raises:
            VLLMValidationError, ApiError: A field is wrong.
        """
        self._models.resolve(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise VLLMValidationError("A request must have either prompt or messages.", "prompt")
        if request.messages is not None:
            options = ChatOptions(
                tools=request.tools,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                add_special_tokens=request.add_special_tokens,
                chat_template=request.chat_template,
                chat_template_kwargs=request.chat_template_kwargs,
            )
            token_ids = (await self._prompts.chat(request.messages, options, must_fit=False)).prompt_token_ids
        else:
            token_ids = await self._prompts.text(
                request.prompt or "",
                "prompt",
                add_special_tokens=request.add_special_tokens is not False,
                must_fit=False,
            )
        strings = None
        if request.return_token_strs:
            strings = await self._engine.lanes.run(
                self._engine.tokenizer.hf.convert_ids_to_tokens, token_ids, size=len(token_ids)
            )
        return {
            "count": len(token_ids),
            "max_model_len": self._engine.vllm_config.model.max_model_len,
            "tokens": token_ids,
            "token_strs": strings,
        }

    async def detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids, special tokens included.

        Raises:
            VLLMValidationError, ApiError: A field is wrong.
        """
        self._models.resolve(request.model)
        check_count("tokens", request.tokens, MAX_DETOKENIZE_TOKENS)
        vocab_size = self._engine.tokenizer.vocab_size
        for token_id in (min(request.tokens), max(request.tokens)) if request.tokens else ():
            if not 0 <= token_id < vocab_size:
                raise VLLMValidationError(
                    f"tokens holds token id {token_id}; ids of this model are 0 to {vocab_size - 1}.", "tokens"
                )
        text = await self._engine.lanes.run(
            self._engine.tokenizer.decode, request.tokens, False, size=len(request.tokens)
        )
        return {"prompt": text}
