"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.engine.input_processor import ProcessedPrompt
from vllm.entrypoints.chat.events import Usage
from vllm.entrypoints.chat.generation import generate
from vllm.entrypoints.chat.logprobs import num_logprobs, shaped
from vllm.entrypoints.chat.prompts import PromptReader
from vllm.entrypoints.chat.sampling import num_choices, sampling_params
from vllm.entrypoints.chat.served_models import ServedModels
from vllm.entrypoints.http.api_model import now, random_id
from vllm.entrypoints.http.merging import merge
from vllm.entrypoints.http.request_log import RequestLog
from vllm.entrypoints.http.streaming import DONE, EventStream, sse
from vllm.entrypoints.openai.answer_json import prompt_logprobs_json, usage_json
from vllm.entrypoints.openai.completion_logprobs import completion_logprobs_json
from vllm.entrypoints.openai.completion_request import DEFAULT_COMPLETION_TOKENS, check_completion, split_prompts
from vllm.entrypoints.openai.protocol import CompletionRequest, include_usage
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from vllm.transformers_utils.detokenizer import incremental_detokenizer


@dataclass
class _Call:
    """One request on its way: its prompts, each an engine request of its own, and what the answer is made of.

    Attributes:
        texts: The prompts given as text, None for the others.
        prompt_only: `echo` with `max_tokens` 0: the prompt alone is the answer.
    """

    id: str
    model: str
    request: CompletionRequest
    streams: list[AsyncGenerator[RequestOutput, None]]
    n: int
    texts: list[str | None]
    prompt_only: bool
    as_token_ids: bool
    created: int = field(default_factory=now)

    def head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}


class ServingCompletion:
    """Answers text completions.

    Args:
        as_token_ids: Name tokens in log-probabilities by id unless the request says otherwise.
        always_usage: Streams end with their usage, asked for or not.
        log: Is told of all requests.
    """

    def __init__(
        self,
        engine: AsyncLLMEngine,
        models: ServedModels,
        prompts: PromptReader,
        as_token_ids: bool = False,
        always_usage: bool = False,
        log: RequestLog | None = None,
    ) -> None:
        self._engine = engine
        self._models = models
        self._prompts = prompts
        self._as_token_ids = as_token_ids
        self._always_usage = always_usage
        self._log = log
        self._defaults = engine.vllm_config.model.generation_defaults

    async def create(self, request: CompletionRequest, request_id: str | None) -> dict[str, Any] | EventStream:
        """The answer, or the stream of it once its first token is there.

        Args:
            request_id: What the client calls the request (`X-Request-Id`), or None.

        Raises:
            VLLMValidationError, ApiError, EngineDeadError: nothing has been sent yet.
        """
        call = await self._start(request, request_id)
        if request.stream:
            return await EventStream.start(self._events(call))
        return await self._answer(call)

    async def _start(self, request: CompletionRequest, request_id: str | None) -> _Call:
        model = self._models.resolve(request.model)
        check_completion(request)
        if self._always_usage:
            include_usage(request)
        prompt_only = bool(request.echo) and request.max_tokens == 0
        if prompt_only:
            # The engine always draws a token; one is the least it can do.
            max_tokens = 1
        elif request.max_tokens is None:
            max_tokens = int(self._defaults.get("max_tokens", DEFAULT_COMPLETION_TOKENS))
        else:
            max_tokens = request.max_tokens
        params = sampling_params(request, self._defaults, max_tokens=max_tokens, logprobs=request.logprobs)
        prompts = await self._prompts.prepared(split_prompts, request.prompt, params.n)
        checked = await self._engine.check_params(params, len(prompts))
        processed = [await self._process(request, prompt) for prompt in prompts]
        public_id = f"cmpl-{request_id or request.request_id or random_id()}"
        # Clients may repeat an id; the engine's must be unique.
        engine_id = f"{public_id}-{random_id()[:12]}"
        as_token_ids = request.return_tokens_as_token_ids
        return _Call(
            id=public_id,
            model=model,
            request=request,
            streams=[
                generate(
                    self._engine,
                    request,
                    ids,
                    checked,
                    f"{engine_id}-{i}",
                    log=self._log,
                    text=prompt if isinstance(prompt, str) else None,
                    cache_salt=request.cache_salt,
                    priority=request.priority or 0,
                )
                for i, (prompt, ids) in enumerate(zip(prompts, processed, strict=True))
            ],
            n=num_choices(request),
            texts=[prompt if isinstance(prompt, str) else None for prompt in prompts],
            prompt_only=prompt_only,
            as_token_ids=self._as_token_ids if as_token_ids is None else as_token_ids,
        )

    async def _process(self, request: CompletionRequest, prompt: str | list[int]) -> list[int] | ProcessedPrompt:
        must_fit = request.truncate_prompt_tokens is None
        if not isinstance(prompt, str):
            if must_fit:
                self._prompts.check_tokens(len(prompt), "prompt")
            return prompt
        token_ids = await self._prompts.text(
            prompt,
            "prompt",
            add_special_tokens=request.add_special_tokens is not False,
            must_fit=must_fit,
        )
        if not token_ids:
            raise VLLMValidationError("prompt must not be empty.", "prompt")
        return self._engine.own_prompt(token_ids)

    def _echoed(self, call: _Call, prompt_index: int, item: RequestOutput) -> str:
        """The text of a prompt that its answers repeat first; "" without `echo`."""
        request = call.request
        if not request.echo:
            return ""
        text = call.texts[prompt_index]
        if text is not None and request.truncate_prompt_tokens is None:
            return text
        tokenizer, skip = self._engine.tokenizer, request.skip_special_tokens is not False
        shown = tokenizer.decode(item.prompt_token_ids, skip)
        if call.prompt_only:
            return shown
        # A character that the prompt ends within comes with the output that completes it.
        return shown.removesuffix(incremental_detokenizer(tokenizer, item.prompt_token_ids, skip).flush())

    async def _answer(self, call: _Call) -> dict[str, Any]:
        last: dict[int, RequestOutput] = {}
        outputs: dict[int, CompletionOutput] = {}
        async with aclosing(merge(call.streams)) as items:
            async for prompt_index, item in items:
                last[prompt_index] = item
                outputs.update((prompt_index * call.n + output.index, output) for output in item.outputs)
        size = num_logprobs(
            [item.prompt_logprobs for item in last.values()], [output.logprobs for output in outputs.values()]
        )
        return await shaped(partial(self._shape, call, last, outputs), self._engine.lanes, size)

    def _shape(
        self, call: _Call, last: dict[int, RequestOutput], outputs: dict[int, CompletionOutput]
    ) -> dict[str, Any]:
        """The answer once all outputs have ended."""
        choices = [self._choice(call, index, outputs[index], last[index // call.n]) for index in sorted(outputs)]
        completion_tokens = sum(len(output.token_ids) for output in outputs.values())
        completion_tokens += sum(item.num_discarded_tokens for item in last.values())
        return call.head() | {
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": self._models.fingerprint,
            "usage": _usage(last.values(), 0 if call.prompt_only else completion_tokens),
            "kv_transfer_params": None,
        }

    def _choice(self, call: _Call, index: int, output: CompletionOutput, item: RequestOutput) -> dict[str, Any]:
        request = call.request
        generated = CompletionOutput(index, "", [], finish_reason="length") if call.prompt_only else output
        logprobs = None
        if request.logprobs is not None:
            token_ids = list(generated.token_ids)
            rows: list[TokenLogprobs | None] = [*(generated.logprobs or ())]
            if request.echo:
                token_ids = item.prompt_token_ids + token_ids
                rows = [*(item.prompt_logprobs or [None] * len(item.prompt_token_ids)), *rows]
            logprobs = completion_logprobs_json(token_ids, rows, self._engine.tokenizer, call.as_token_ids)
        return {
            "index": index,
            "text": self._echoed(call, index // call.n, item) + generated.text,
            "logprobs": logprobs,
            "finish_reason": generated.finish_reason,
            "stop_reason": generated.stop_reason,
            "token_ids": list(generated.token_ids) if request.return_token_ids else None,
            "prompt_logprobs": prompt_logprobs_json(item.prompt_logprobs),
            "prompt_token_ids": item.prompt_token_ids if request.return_token_ids else None,
        }

    async def _events(self, call: _Call) -> AsyncGenerator[bytes, None]:
        """Server-sent events: the deltas of all prompts as they come, and usage if it was asked for."""
        options = call.request.stream_options
        tells_usage = bool(options and options.include_usage)
        every_usage = bool(tells_usage and options and options.continuous_usage_stats)
        head = call.head()
        prompts: dict[int, RequestOutput] = {}
        generated = [0] * (len(call.streams) * call.n)
        offsets = [0] * len(generated)
        async with aclosing(merge(call.streams)) as items:
            async for prompt_index, item in items:
                choices = []
                if prompt_index not in prompts:
                    prompts[prompt_index] = item
                    if call.request.echo or call.request.return_token_ids:
                        repeat = partial(self._first_choices, call, prompt_index, item)
                        size = num_logprobs([item.prompt_logprobs], ())
                        choices += await shaped(repeat, self._engine.lanes, size)
                        offsets[prompt_index * call.n : (prompt_index + 1) * call.n] = [_end(choices[0], 0)] * call.n
                for output in item.outputs:
                    index = prompt_index * call.n + output.index
                    generated[index] += len(output.token_ids)
                    choice = self._delta_choice(call, index, output, offsets[index])
                    if choice is not None:
                        offsets[index] = _end(choice, offsets[index])
                        choices.append(choice)
                for choice in choices:
                    chunk = head | {"choices": [choice]}
                    if every_usage:
                        chunk["usage"] = _usage([item], generated[choice["index"]])
                    if choice["finish_reason"] is not None and not tells_usage:
                        chunk["system_fingerprint"] = self._models.fingerprint
                    yield sse(chunk)
        if tells_usage:
            completion_tokens = 0 if call.prompt_only else sum(generated)
            total = {"usage": _usage(prompts.values(), completion_tokens)}
            yield sse(head | {"choices": []} | total | {"system_fingerprint": self._models.fingerprint})
        yield DONE

    def _first_choices(self, call: _Call, prompt_index: int, item: RequestOutput) -> list[dict[str, Any]]:
        return [self._first_choice(call, prompt_index * call.n + i, item) for i in range(call.n)]

    def _first_choice(self, call: _Call, index: int, item: RequestOutput) -> dict[str, Any]:
        """Repeats the prompt, as text with `echo` and as token ids if they were asked for."""
        choice = _text_choice(index, self._echoed(call, index // call.n, item))
        if call.request.echo and call.request.logprobs is not None:
            choice["logprobs"] = completion_logprobs_json(
                item.prompt_token_ids, item.prompt_logprobs, self._engine.tokenizer, call.as_token_ids
            )
        if call.request.return_token_ids:
            choice |= {"prompt_token_ids": item.prompt_token_ids, "token_ids": []}
        return choice

    def _delta_choice(
        self, call: _Call, index: int, output: CompletionOutput, text_offset: int
    ) -> dict[str, Any] | None:
        """The choice of a chunk; None while there is nothing to tell, as when a character is not complete yet."""
        request = call.request
        if call.prompt_only:
            return _text_choice(index, "", "length") if output.finish_reason is not None else None
        wants_tokens = bool(output.token_ids) and (request.logprobs is not None or bool(request.return_token_ids))
        if not output.text and not wants_tokens and output.finish_reason is None:
            return None
        choice = _text_choice(index, output.text, output.finish_reason, output.stop_reason)
        if request.logprobs is not None and output.token_ids:
            choice["logprobs"] = completion_logprobs_json(
                output.token_ids, output.logprobs, self._engine.tokenizer, call.as_token_ids, text_offset
            )
        if request.return_token_ids:
            choice["token_ids"] = list(output.token_ids)
        return choice


def _end(choice: dict[str, Any], offset: int) -> int:
    """Where in the text the tokens end that a choice tells of; the text itself may wait, for it may become a stop."""
    logprobs = choice["logprobs"]
    return logprobs["text_offset"][-1] + len(logprobs["tokens"][-1]) if logprobs and logprobs["tokens"] else offset


def _usage(prompts: Collection[RequestOutput], completion_tokens: int) -> dict[str, Any]:
    """Usage of a request with these prompts, each given by any output of its."""
    return usage_json(
        Usage(
            sum(len(item.prompt_token_ids) for item in prompts),
            sum(item.num_cached_tokens for item in prompts),
            sum(item.num_cache_write_tokens for item in prompts),
            completion_tokens,
        )
    )


def _text_choice(
    index: int, text: str, finish_reason: str | None = None, stop_reason: int | str | None = None
) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": None,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }
