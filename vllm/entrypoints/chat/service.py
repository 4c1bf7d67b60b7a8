"""Answers chats: from a `ChatRequest` to the events of its answer, whatever dialect asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.entrypoints.chat.answer import AnswerReading, answer_events
from vllm.entrypoints.chat.answer_format import AnswerFormat, AnswerReader, constrain, reasoning_ended
from vllm.entrypoints.chat.cache_marks import to_keep
from vllm.entrypoints.chat.events import AnswerEvent
from vllm.entrypoints.chat.generation import generate
from vllm.entrypoints.chat.logprobs import LogprobWriter
from vllm.entrypoints.chat.messages import last_text
from vllm.entrypoints.chat.prompts import ChatOptions, PromptReader
from vllm.entrypoints.chat.request import ChatRequest
from vllm.entrypoints.chat.sampling import chat_logprobs, chat_max_tokens, check_chat, num_choices, sampling_params
from vllm.entrypoints.chat.served_models import ServedModels
from vllm.entrypoints.http.api_model import random_id
from vllm.entrypoints.http.request_log import RequestLog
from vllm.transformers_utils.chat_template import RenderedChat


@dataclass(frozen=True)
class ChatAnswer:
    """An answer on its way.

    Attributes:
        model: The name to report back.
        role: Whose turn the answer is.
        num_choices: Choices it has; their steps come in any order.
        is_plain: All of it is text: neither reasoning nor calls are looked for.
        logprobs: Writes those of its tokens; None if there are none to show.
        events: Must be read to its end or closed, which ends all that runs for the answer. What could not be known
            before, such as the engine's death, is raised by the first event or a later one.
    """

    model: str
    role: str
    num_choices: int
    is_plain: bool
    logprobs: LogprobWriter | None
    events: AsyncGenerator[AnswerEvent, None]


class ChatService:
    """Answers chats.

    Args:
        response_role: Role of answers that open a new turn.
        as_token_ids: Name tokens in log-probabilities by id unless the request says otherwise.
        answers: How the model writes calls and reasoning.
        hide_unused_tools: With tool_choice "none" the model does not see the tools.
        log: Is told of all requests.
    """

    def __init__(
        self,
        engine: AsyncLLMEngine,
        models: ServedModels,
        prompts: PromptReader,
        response_role: str = "assistant",
        as_token_ids: bool = False,
        answers: AnswerReader | None = None,
        hide_unused_tools: bool = False,
        log: RequestLog | None = None,
    ) -> None:
        self._engine = engine
        self._models = models
        self._prompts = prompts
        self._response_role = response_role
        self._as_token_ids = as_token_ids
        self._answers = answers or AnswerReader()
        self._hide_unused_tools = hide_unused_tools
        self._log = log
        self._defaults = engine.vllm_config.model.generation_defaults

    async def answer(
        self, request: ChatRequest, request_id: str, *, cut: bool = False, separator: str = "\n"
    ) -> ChatAnswer:
        """Renders the prompt, checks all fields, and hands on the answer, which begins when its events are read.

        Args:
            request_id: Under which the log tells of the request; clients may repeat it.
            cut: Leave out the oldest of a conversation that is too long, instead of refusing it.
            separator: As of `ChatOptions`.

        Raises:
            VLLMValidationError, ApiError: A field is wrong.
        """
        model = self._models.resolve(request.model)
        check_chat(request)
        max_tokens = 1 if request.is_prewarming else chat_max_tokens(request, self._defaults)
        top_logprobs = chat_logprobs(request, self._engine.vllm_config.model.vocab_size)
        params = sampling_params(request, self._defaults, max_tokens=max_tokens, logprobs=top_logprobs)
        answer_format = self._answers.format(request)
        if answer_format.needs_special_tokens:
            params.skip_special_tokens = False
        options = replace(self._options(request, answer_format), separator=separator)
        rendered = await self._render(request, options, max_tokens, cut)
        last = request.messages[-1]
        continues = request.continue_final_message or request.add_generation_prompt is False
        role = last["role"] if continues else self._response_role
        ended = reasoning_ended(
            answer_format,
            rendered.text,
            last_text(last) if continues else None,
            self._prompts.template_kwargs(options),
        )
        constrain(params, answer_format, ended)
        system, marks = to_keep(rendered, request)
        outputs = generate(
            self._engine,
            request,
            self._engine.own_prompt(rendered.prompt_token_ids, rendered.num_system_tokens),
            await self._engine.check_params(params),
            # Clients may repeat an id; the engine's must be unique.
            f"{request_id}-{random_id()[:12]}",
            log=self._log,
            text=rendered.text,
            num_system_tokens=system,
            marks=marks,
            cache_salt=request.cache_salt,
            priority=request.priority or 0,
        )
        shows_reasoning = request.include_reasoning is not False
        # One by one, the tokens would tell of reasoning that is left out.
        shows_tokens = shows_reasoning or answer_format.reasoning is None
        wants_tokens = top_logprobs is not None or bool(request.return_token_ids)
        reading = AnswerReading(
            format=answer_format,
            parsers=[answer_format.make_parser(ended, not request.stream) for _ in range(num_choices(request))],
            shows_reasoning=shows_reasoning,
            shows_tokens=shows_tokens and wants_tokens,
            echoed=last_text(last) if request.echo and last["role"] == role else "",
            is_silent=request.is_prewarming,
            count_tokens=None if answer_format.reasoning is None else self._count_tokens,
        )
        return ChatAnswer(
            model=model,
            role=role,
            num_choices=num_choices(request),
            is_plain=answer_format.is_plain,
            logprobs=self._logprobs(request, top_logprobs if shows_tokens else None),
            events=answer_events(outputs, reading),
        )

    async def _count_tokens(self, text: str) -> int:
        return len(await self._engine.lanes.run(self._engine.tokenizer.encode, text, False, size=len(text)))

    def _logprobs(self, request: ChatRequest, top: int | None) -> LogprobWriter | None:
        if top is None:
            return None
        asked = request.return_tokens_as_token_ids
        return LogprobWriter(self._engine.tokenizer, top, self._as_token_ids if asked is None else asked)

    def _options(self, request: ChatRequest, answer_format: AnswerFormat) -> ChatOptions:
        return ChatOptions(
            tools=None if self._hide_unused_tools and answer_format.tools is None else request.tools,
            documents=request.documents,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            add_special_tokens=request.add_special_tokens,
            chat_template=request.chat_template,
            chat_template_kwargs=request.chat_template_kwargs,
            reasoning_effort=request.reasoning_effort,
            cache=request.prompt_cache_options,
        )

    async def _render(
        self, request: ChatRequest, options: ChatOptions, max_tokens: int | None, cut: bool
    ) -> RenderedChat:
        return await self._prompts.chat(
            request.messages,
            options,
            must_fit=request.truncate_prompt_tokens is None,
            cache_salt=request.cache_salt,
            cut_for=(max_tokens or 1) if cut else None,
        )

    async def render(self, request: ChatRequest, *, cut: bool) -> RenderedChat:
        """The prompt that `answer` would answer.

        Raises:
            VLLMValidationError, ApiError: A field is wrong.
        """
        options = self._options(request, self._answers.format(request))
        return await self._render(request, options, chat_max_tokens(request, self._defaults), cut)

    async def count_tokens(self, request: ChatRequest) -> int:
        """Tokens of the prompt that the request's messages make.

        Raises:
            VLLMValidationError, ApiError: A field is wrong.
        """
        self._models.resolve(request.model)
        options = self._options(request, self._answers.format(request))
        return len((await self._prompts.chat(request.messages, options, must_fit=False)).prompt_token_ids)
