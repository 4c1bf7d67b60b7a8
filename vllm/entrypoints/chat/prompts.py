"""From request fields to prompt token ids, refusing what cannot fit before the tokenizer reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from vllm.engine.async_llm_engine import AsyncLLMEngine
from vllm.engine.work_lanes import is_long
from vllm.entrypoints.chat.cache_marks import take_breakpoints
from vllm.entrypoints.chat.messages import (
    check_messages,
    check_template_kwargs,
    check_tools,
    count_chars,
    without_billing_line,
)
from vllm.entrypoints.chat.request import PromptCacheOptions
from vllm.entrypoints.http.json_body import snippet
from vllm.exceptions import ContextLengthError, VLLMValidationError
from vllm.transformers_utils.chat_template import RenderedChat

_T = TypeVar("_T")

# The most that is tokenised for one request, even where the answer would not depend on the context's length.
MAX_TOKENIZE_CHARS = 4_000_000


@dataclass(frozen=True)
class ChatOptions:
    """What shapes the rendering of messages besides the messages themselves.

    Attributes:
        separator: What joins the text parts of a message where the template reads strings.
    """

    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    separator: str = "\n"
    cache: PromptCacheOptions | None = None


class PromptReader:
    """Renders and tokenises.

    Args:
        default_template_kwargs: Template variables for requests that do not set them.
    """

    def __init__(self, engine: AsyncLLMEngine, default_template_kwargs: dict[str, Any] | None = None) -> None:
        self._engine = engine
        self._default_kwargs = default_template_kwargs or {}
        model = engine.vllm_config.model
        self._trust_template = model.trust_request_chat_template
        self._max_model_len = model.max_model_len
        self._max_chars_per_token = max(1, engine.tokenizer.max_chars_per_token)

    async def chat(
        self,
        messages: list[Any],
        options: ChatOptions,
        *,
        must_fit: bool = True,
        cache_salt: str | None = None,
        cut_for: int | None = None,
    ) -> RenderedChat:
        """Token ids of messages, and how many of them are the system prompt.

        Args:
            must_fit: Refuse messages that leave no room for an answer, and unread those that cannot fit at all.
            cache_salt: Only chats with the same one may be answered sooner for what the breakpoints of this one mark.
            cut_for: Leave out the oldest tokens after the system part where that is needed to leave so many for an
                answer, instead of refusing the messages.

        Raises:
            VLLMValidationError: A field is wrong, the template refuses the messages, or they are too long.
        """
        arguments = await self.prepared(self._render_arguments, messages, options, must_fit, cut_for)
        rendered = await self._engine.render_chat(**arguments, checked=True, cache_salt=cache_salt)
        if cut_for is not None:
            rendered = self._without_oldest(rendered, self._max_model_len - cut_for)
        if must_fit:
            self.check_tokens(len(rendered.prompt_token_ids), "messages")
        return rendered

    async def prepared(self, function: Callable[..., _T], *args: Any) -> _T:
        """What `function(*args)` returns; off the event loop if the request is long, of which it reads every part."""
        return await self._engine.lanes.run(function, *args) if is_long() else function(*args)

    def _render_arguments(
        self, messages: list[Any], options: ChatOptions, must_fit: bool, cut_for: int | None
    ) -> dict[str, Any]:
        """What the renderer is to be called with; reads every message, but none of them twice."""
        own = without_billing_line(check_messages(messages))
        checked, tools, breakpoints = take_breakpoints(own, check_tools(options.tools), options.cache)
        kwargs = self.template_kwargs(options)
        if options.chat_template is not None and not self._trust_template:
            raise VLLMValidationError(
                "chat_template in a request is not allowed by this server (--trust-request-chat-template allows it).",
                "chat_template",
            )
        continue_final = bool(options.continue_final_message)
        add_generation_prompt = options.add_generation_prompt
        if add_generation_prompt is None:
            # vLLM refuses this combination whoever wrote the message; an answer that goes on is what it can only mean.
            if continue_final and checked[-1]["role"] != "assistant":
                raise VLLMValidationError(
                    f"continue_final_message goes on from an assistant's message, and the last one has role "
                    f"{snippet(checked[-1]['role'])}; with add_generation_prompt false as well, that one is gone on "
                    "with.",
                    "continue_final_message",
                )
            add_generation_prompt = not continue_final
        if continue_final and add_generation_prompt:
            raise VLLMValidationError(
                "continue_final_message and add_generation_prompt cannot both be true.", "continue_final_message"
            )
        self._check_chars(count_chars([m["content"] for m in checked]), "messages", must_fit and cut_for is None)
        self._check_chars(count_chars([checked, tools, kwargs]), "messages", must_fit=False)
        return {
            "messages": checked,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final,
            "template_kwargs": kwargs or None,
            "chat_template": options.chat_template,
            "add_special_tokens": bool(options.add_special_tokens),
            "separator": options.separator,
            "breakpoints": breakpoints if must_fit else (),
        }

    def _without_oldest(self, chat: RenderedChat, num_tokens: int) -> RenderedChat:
        """The chat in so many tokens at most: its system part, which stays what others share, and its end."""
        token_ids, system = chat.prompt_token_ids, chat.num_system_tokens or 0
        num_last = num_tokens - system
        if len(token_ids) <= num_tokens:
            return chat
        if num_last < 1:
            raise VLLMValidationError(
                f"Nothing of the conversation can be kept: of the maximum context length of {self._max_model_len} "
                f"tokens, the system part takes {system} and the answer {self._max_model_len - num_tokens}.",
                "messages",
            )
        kept = token_ids[:system] + token_ids[-num_last:]
        return replace(
            chat, prompt_token_ids=kept, marks=tuple(mark for mark in chat.marks if mark.num_tokens <= system)
        )

    def template_kwargs(self, options: ChatOptions) -> dict[str, Any]:
        """Variables of the chat template: the server's, the request's, and those that other fields of it set.

        Raises:
            VLLMValidationError: they are too many or too large.
        """
        own = check_template_kwargs(options.chat_template_kwargs)
        kwargs = self._default_kwargs | own
        if options.reasoning_effort is not None:
            kwargs["reasoning_effort"] = options.reasoning_effort
            # Some templates think only when they are told to. One that knows no such variable does not read it.
            if "enable_thinking" not in own:
                kwargs["enable_thinking"] = options.reasoning_effort != "none"
        if options.documents is not None:
            kwargs["documents"] = options.documents
        return kwargs

    async def text(self, text: str, param: str, *, add_special_tokens: bool = True, must_fit: bool = True) -> list[int]:
        """Token ids of plain text; `param` is the request field that errors name."""
        self._check_chars(len(text), param, must_fit)
        if must_fit:
            return await self._engine.encode(text, add_special_tokens=add_special_tokens)
        return await self._engine.lanes.run(self._engine.tokenizer.encode, text, add_special_tokens, size=len(text))

    def check_tokens(self, num_tokens: int, param: str) -> None:
        """Raises ContextLengthError for a prompt that leaves no room for an answer; `param` is its request field."""
        if num_tokens >= self._max_model_len:
            raise ContextLengthError(self._max_model_len, num_tokens, param)

    def _check_chars(self, chars: int, param: str, must_fit: bool) -> None:
        fewest_tokens = -(-chars // self._max_chars_per_token)
        if must_fit and fewest_tokens > self._max_model_len:
            raise ContextLengthError(self._max_model_len, fewest_tokens, param)
        if chars > MAX_TOKENIZE_CHARS:
            raise VLLMValidationError(
                f"{param} may have at most {MAX_TOKENIZE_CHARS} characters in all, got {chars}.", param
            )
