"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.chat.answers import (
    AnswerDelta,
    AnswerFormat,
    AnswerParser,
    AnswerReader,
    calls_json,
    reasoning_ended,
    whole_calls_json,
)
from vllm.entrypoints.chat.cache_marks import cache_marks
from vllm.entrypoints.chat.generation import generate
from vllm.entrypoints.chat.logprobs import chat_logprobs_json, num_logprobs, shaped
from vllm.entrypoints.chat.messages import check_messages
from vllm.entrypoints.chat.prompts import ChatOptions, PromptReader
from vllm.entrypoints.chat.sampling import chat_logprobs, chat_max_tokens, check_chat, num_choices, sampling_params
from vllm.entrypoints.http.request_log import RequestLog
from vllm.entrypoints.http.streaming import DONE, EventStream, sse
from vllm.entrypoints.openai.models import ServingModels
from vllm.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    include_usage,
    now,
    prompt_logprobs_json,
    random_id,
    usage,
)
from vllm.exceptions import VLLMValidationError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.transformers_utils.chat_template import RenderedChat


@dataclass
class _Call:
    """One request on its way: what its answer is made of.

    Attributes:
        top_logprobs: Most likely tokens to show at each position; None for no log-probabilities.
        echoed: Text of the request's last message that the answer repeats first.
        parsers: One a choice, which tells its reasoning, content and calls apart; None where all is content.
    """

    id: str
    model: str
    request: ChatCompletionRequest
    outputs: AsyncGenerator[RequestOutput, None]
    num_choices: int
    top_logprobs: int | None
    as_token_ids: bool
    role: str
    echoed: str
    format: AnswerFormat
    parsers: list[AnswerParser | None]
    created: int = field(default_factory=now)

    @property
    def shows_reasoning(self) -> bool:
        return self.request.include_reasoning is not False

    @property
    def shows_tokens(self) -> bool:
        """Whether the answer's tokens may be told one by one: they would tell of reasoning that is left out."""
        return self.shows_reasoning or self.format.reasoning is None

    @property
    def returns_token_ids(self) -> bool:
        return bool(self.request.return_token_ids) and self.shows_tokens

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


class ServingChat:
    """Answers chat requests.

    Args:
        response_role: `role` of answers that open a new turn.
        as_token_ids: Name tokens in log-probabilities by id unless the request says otherwise.
        answers: How the model writes calls and reasoning.
        hide_unused_tools: With tool_choice "none" the model does not see the tools.
        always_usage: Streams end with their usage, asked for or not.
        log: Is told of all requests.
    """

    def __init__(
        self,
        engine: AsyncLLMEngine,
        models: ServingModels,
        prompts: PromptReader,
        response_role: str = "assistant",
        as_token_ids: bool = False,
        answers: AnswerReader | None = None,
        hide_unused_tools: bool = False,
        always_usage: bool = False,
        log: RequestLog | None = None,
    ) -> None:
        self._engine = engine
        self._models = models
        self._prompts = prompts
        self._response_role = response_role
        self._as_token_ids = as_token_ids
        self._answers = answers or AnswerReader()
        self._hide_unused_tools = hide_unused_tools
        self._always_usage = always_usage
        self._log = log
        self._defaults = engine.vllm_config.model.generation_defaults

    async def create(
        self, request: ChatCompletionRequest, request_id: str | None, *, cut: bool = False
    ) -> dict[str, Any] | EventStream:
        """The answer, or the stream of it once its first token is there.

        Args:
            request_id: What the client calls the request (`X-Request-Id`), or None.
            cut: Leave out the oldest of a conversation that is too long, instead of refusing it.

        Raises:
            VLLMValidationError, ApiError, EngineDeadError: nothing has been sent yet.
        """
        call = await self._start(request, request_id, cut)
        if request.stream:
            return await EventStream.start(self._events(call))
        return await self._answer(call)

    async def _start(self, request: ChatCompletionRequest, request_id: str | None, cut: bool) -> _Call:
        model = self._models.resolve(request.model)
        check_chat(request)
        if self._always_usage:
            include_usage(request)
        max_tokens = chat_max_tokens(request, self._defaults)
        top_logprobs = chat_logprobs(request, self._engine.vllm_config.model.vocab_size)
        params = sampling_params(request, self._defaults, max_tokens=max_tokens, logprobs=top_logprobs)
        answer_format = self._answers.format(request)
        if answer_format.needs_special_tokens:
            params.skip_special_tokens = False
        options = self._options(request, answer_format)
        rendered = await self._render(request, options, max_tokens, cut)
        public_id = f"chatcmpl-{request_id or request.request_id or random_id()}"
        last = request.messages[-1]
        continues = request.continue_final_message or request.add_generation_prompt is False
        role = last["role"] if continues else self._response_role
        ended = reasoning_ended(
            answer_format,
            rendered.text,
            _last_text(last) if continues else None,
            self._prompts.template_kwargs(options),
        )
        _constrain(params, answer_format, ended)
        checked = await self._engine.check_params(params)
        as_token_ids = request.return_tokens_as_token_ids
        return _Call(
            id=public_id,
            model=model,
            request=request,
            # Clients may repeat an id; the engine's must be unique.
            outputs=generate(
                self._engine,
                request,
                self._engine.own_prompt(rendered.prompt_token_ids, rendered.num_system_tokens),
                checked,
                f"{public_id}-{random_id()[:12]}",
                log=self._log,
                text=rendered.text,
                num_system_tokens=rendered.num_system_tokens,
                marks=cache_marks(rendered, request.prompt_cache_retention),
                cache_salt=request.cache_salt,
                priority=request.priority or 0,
            ),
            num_choices=num_choices(request),
            top_logprobs=top_logprobs,
            as_token_ids=self._as_token_ids if as_token_ids is None else as_token_ids,
            role=role,
            echoed=_last_text(last) if request.echo and last["role"] == role else "",
            format=answer_format,
            parsers=[answer_format.make_parser(ended) for _ in range(num_choices(request))],
        )

    def _options(self, request: ChatCompletionRequest, answer_format: AnswerFormat) -> ChatOptions:
        return ChatOptions(
            tools=None if self._hide_unused_tools and answer_format.tools is None else request.tools,
            documents=request.documents,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            add_special_tokens=request.add_special_tokens,
            chat_template=request.chat_template,
            chat_template_kwargs=request.chat_template_kwargs,
            reasoning_effort=request.reasoning_effort,
        )

    async def _render(
        self, request: ChatCompletionRequest, options: ChatOptions, max_tokens: int | None, cut: bool
    ) -> RenderedChat:
        return await self._prompts.chat(
            request.messages,
            options,
            must_fit=request.truncate_prompt_tokens is None,
            cache_salt=request.cache_salt,
            cut_for=(max_tokens or 1) if cut else None,
        )

    async def render(self, request: ChatCompletionRequest, *, cut: bool) -> RenderedChat:
        """The prompt that `create` would answer.

        Raises:
            VLLMValidationError, ApiError: A field is wrong.
        """
        options = self._options(request, self._answers.format(request))
        return await self._render(request, options, chat_max_tokens(request, self._defaults), cut)

    async def count_tokens(self, request: ChatCompletionRequest) -> int:
        """Tokens of the prompt that the request's messages make.

        Raises:
            VLLMValidationError, ApiError: A field is wrong.
        """
        self._models.resolve(request.model)
        options = self._options(request, self._answers.format(request))
        return len((await self._prompts.chat(request.messages, options, must_fit=False)).prompt_token_ids)

    def _logprobs(self, call: _Call, output: CompletionOutput) -> dict[str, Any] | None:
        if call.top_logprobs is None or not output.token_ids or not call.shows_tokens:
            return None
        return chat_logprobs_json(
            output.token_ids, output.logprobs, call.top_logprobs, self._engine.tokenizer, call.as_token_ids
        )

    async def _answer(self, call: _Call) -> dict[str, Any]:
        final: RequestOutput | None = None
        outputs: dict[int, CompletionOutput] = {}
        async with aclosing(call.outputs) as items:
            async for final in items:
                outputs.update((output.index, output) for output in final.outputs)
        if final is None:
            raise RuntimeError(f"the engine gave no output for {call.id}")
        size = num_logprobs([final], outputs.values())
        return await shaped(partial(self._shape, call, final, outputs), self._engine.lanes, size)

    def _shape(self, call: _Call, final: RequestOutput, outputs: dict[int, CompletionOutput]) -> dict[str, Any]:
        """The answer once all outputs have ended."""
        completion_tokens = final.num_discarded_tokens + sum(len(output.token_ids) for output in outputs.values())
        return call.head("chat.completion") | {
            "choices": [self._choice(call, outputs[index]) for index in sorted(outputs)],
            "service_tier": None,
            "system_fingerprint": self._models.fingerprint,
            "usage": usage(
                len(final.prompt_token_ids), completion_tokens, final.num_cached_tokens, final.num_cache_write_tokens
            ),
            "prompt_logprobs": prompt_logprobs_json(final.prompt_logprobs),
            "prompt_token_ids": final.prompt_token_ids if call.request.return_token_ids else None,
            "kv_transfer_params": None,
        }

    def _choice(self, call: _Call, output: CompletionOutput) -> dict[str, Any]:
        parser = call.parsers[output.index]
        answer = AnswerDelta(content=output.text) if parser is None else parser.feed(output.text, True)
        content: str | None = call.echoed + answer.content
        if parser is not None and not content:
            content = None
        reasoning = (answer.reasoning if call.shows_reasoning else "") or None
        message: dict[str, Any] = {
            "role": call.role,
            "content": content,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": reasoning,
            "reasoning_content": reasoning,
        }
        if answer.calls:
            message["tool_calls"] = whole_calls_json(answer.calls)
        return {
            "index": output.index,
            "message": message,
            "logprobs": self._logprobs(call, output),
            "finish_reason": call.format.finish_reason(output.finish_reason, parser.num_calls if parser else 0),
            "stop_reason": output.stop_reason,
            "token_ids": list(output.token_ids) if call.returns_token_ids else None,
        }

    async def chunks(
        self, request: ChatCompletionRequest, request_id: str | None, *, cut: bool = False
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of a streamed answer before they are encoded: the APIs of other dialects are made of them.

        What is left to go wrong once this returns, the first chunk raises.

        Args:
            cut: As of `create`.

        Raises:
            VLLMValidationError, ApiError: A field is wrong.
        """
        return self._chunks(await self._start(request, request_id, cut))

    async def _events(self, call: _Call) -> AsyncGenerator[bytes, None]:
        """The chunks as server-sent events."""
        async with aclosing(self._chunks(call)) as chunks:
            async for chunk in chunks:
                yield sse(chunk)
        yield DONE

    async def _chunks(self, call: _Call) -> AsyncGenerator[dict[str, Any], None]:
        """A chunk with the role for each choice, the deltas, and usage if it was asked for."""
        options = call.request.stream_options
        tells_usage = bool(options and options.include_usage)
        every_usage = bool(tells_usage and options and options.continuous_usage_stats)
        head = call.head("chat.completion.chunk")
        item: RequestOutput | None = None
        prompt_tokens = cached_tokens = written_tokens = 0
        generated = [0] * call.num_choices

        def chunk(choice: dict[str, Any], completion_tokens: int) -> dict[str, Any]:
            made = head | {"choices": [choice]}
            if every_usage:
                made["usage"] = usage(prompt_tokens, completion_tokens, cached_tokens, written_tokens)
            return made

        async with aclosing(call.outputs) as items:
            async for item in items:
                if not prompt_tokens:
                    prompt_tokens = len(item.prompt_token_ids)
                    cached_tokens = item.num_cached_tokens
                    written_tokens = item.num_cache_write_tokens
                    for index in range(call.num_choices):
                        first = chunk(_delta(index, {"role": call.role, "content": ""}), 0)
                        if call.request.return_token_ids:
                            first["prompt_token_ids"] = item.prompt_token_ids
                        yield first
                        if call.echoed:
                            yield chunk(_delta(index, {"content": call.echoed}), 0)
                for output in item.outputs:
                    generated[output.index] += len(output.token_ids)
                    choice = self._delta_choice(call, output)
                    if choice is not None:
                        made = chunk(choice, generated[output.index])
                        if output.finish_reason is not None and not tells_usage:
                            made["system_fingerprint"] = self._models.fingerprint
                        yield made
        if item is None:
            raise RuntimeError(f"the engine gave no output for {call.id}")
        if tells_usage:
            total = usage(prompt_tokens, sum(generated), cached_tokens, written_tokens)
            yield head | {"choices": [], "usage": total, "system_fingerprint": self._models.fingerprint}

    def _delta_choice(self, call: _Call, output: CompletionOutput) -> dict[str, Any] | None:
        """The choice of a chunk; None while there is nothing to tell, as when a character is not complete yet."""
        logprobs = self._logprobs(call, output)
        finished = output.finish_reason is not None
        parser = call.parsers[output.index]
        if parser is None:
            delta: dict[str, Any] = {"content": output.text}
            is_empty = not output.text
        else:
            delta = _answer_json(parser.feed(output.text, finished), call.shows_reasoning)
            is_empty = not delta
        if is_empty and logprobs is None and not finished and not call.returns_token_ids:
            return None
        choice = _delta(output.index, delta)
        choice["logprobs"] = logprobs
        if call.returns_token_ids:
            choice["token_ids"] = list(output.token_ids)
        if finished:
            num_calls = parser.num_calls if parser is not None else 0
            choice["finish_reason"] = call.format.finish_reason(output.finish_reason, num_calls)
            choice["stop_reason"] = output.stop_reason
        return choice


def _answer_json(answer: AnswerDelta, shows_reasoning: bool) -> dict[str, Any]:
    """The `delta` of a chunk."""
    delta: dict[str, Any] = {}
    if answer.reasoning and shows_reasoning:
        delta["reasoning"] = delta["reasoning_content"] = answer.reasoning
    if answer.content:
        delta["content"] = answer.content
    if answer.calls:
        delta["tool_calls"] = calls_json(answer.calls)
    return delta


def _constrain(params: SamplingParams, answer_format: AnswerFormat, reasoning_is_over: bool) -> None:
    """Gives the output the form of the calls that it must make; what a form asks for begins after the reasoning."""
    calls = answer_format.form()
    asked = params.structured_outputs
    if calls is not None and asked is not None and asked.field != "response_format":
        raise VLLMValidationError(
            f"{asked.field} cannot be combined with a tool_choice that demands calls.", asked.field
        )
    params.structured_outputs = form = calls or asked
    if form is not None and answer_format.reasoning is not None and not reasoning_is_over:
        form.after = answer_format.reasoning.end


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _last_text(message: dict[str, Any]) -> str:
    content = check_messages([message])[0]["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
