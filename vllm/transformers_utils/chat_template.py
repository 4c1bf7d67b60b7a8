"""Turns chat messages into a prompt's token ids and finds where its system part ends."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from typing import Any, NamedTuple

import orjson
from transformers import PreTrainedTokenizerBase

from vllm.exceptions import VLLMValidationError
from vllm.inputs import Breakpoint, CacheMark
from vllm.logger import init_logger
from vllm.transformers_utils.control_tokens import ControlTokens, Marks
from vllm.transformers_utils.system_parts import NO_PART, PartKey, SystemPart, SystemPartCache
from vllm.transformers_utils.text_heads import TextHead, TextHeads
from vllm.transformers_utils.tokenizer import Tokenizer

logger = init_logger(__name__)

_SYSTEM_ROLES = ("system", "developer")
_TEXT_PARTS = ("text", "input_text", "output_text")
_PROBES = ("a", "\n7", " \u00e9")
"""User texts that begin so differently (letter; newline and digit; space and a letter beyond ASCII) that a token merged
across the end of the system part differs between at least two of them, also in templates that strip what users say."""

_MAX_TEMPLATES = 32
_MAX_REASON_CHARS = 500
_RESERVED_KWARGS = frozenset(
    {"messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"}
    | set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
) - {"documents", "kwargs"}
"""Template variables that a request sets by fields of its own, and arguments of transformers' function."""


@dataclass(frozen=True)
class RenderedChat:
    """A chat as the model reads it.

    Attributes:
        prompt_token_ids: Token ids of the whole prompt.
        num_system_tokens: How many of them, from the first on, belong to the system part; None if there is no system
            part or its end is not certain.
        text: What the chat template wrote.
        marks: Ends of the prefixes that breakpoints of the chat mark, as far as they are certain.
    """

    prompt_token_ids: list[int]
    num_system_tokens: int | None
    text: str
    marks: tuple[CacheMark, ...] = ()


@dataclass(frozen=True)
class _Template:
    """What is known about a chat template.

    Attributes:
        takes_text: Shows content that is a string.
        takes_parts: Shows content that is a list of text parts.
        takes_objects: Shows a call whose arguments are an object.
        takes_raw: Shows a call whose arguments are text.
        has_developers: Knows that role; where it does not, what developers say is the system's.
        separator: Stands between the parts of a content that it shows as a string.
        tells_date: Its output depends on the day.
    """

    source: str
    controls: ControlTokens
    takes_text: bool
    takes_parts: bool
    takes_objects: bool
    takes_raw: bool
    has_developers: bool
    tells_date: bool
    separator: str = "\n"


@dataclass(frozen=True)
class _Chat:
    """All that a rendering depends on."""

    template: _Template
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    kwargs: dict[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool
    add_special_tokens: bool


class _Written(NamedTuple):
    """A rendered chat.

    Attributes:
        marked: The text with the marks around spellings of control tokens.
        marks: Those marks; None if there was nothing to mark.
    """

    text: str
    marked: str
    marks: Marks | None


class ChatRenderer:
    """Renders chats by a tokenizer's chat template. Safe to use from several threads.

    The system part of a chat is its leading system and developer messages with the tools and template variables. Where
    it ends is found by rendering it with several different user texts: the token ids that all of these prompts start
    with do not depend on the user. A prompt has these as its system part if it starts with exactly them.

    Args:
        tokenizer: Encodes the rendered text.
        chat_template: Template source to use instead of the tokenizer's own.
    """

    def __init__(self, tokenizer: Tokenizer, chat_template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._heads = TextHeads(tokenizer)
        self._parts = SystemPartCache()
        self._inspect: Callable[[str], _Template] = lru_cache(maxsize=_MAX_TEMPLATES)(self._inspect_template)

    @property
    def has_template(self) -> bool:
        """Whether chats can be rendered without a template of their own."""
        return bool(self._chat_template or self._tokenizer.hf.chat_template)

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
        chat_template: str | None = None,
        add_special_tokens: bool = False,
        separator: str = "\n",
        breakpoints: Sequence[Breakpoint] = (),
        system_scope: Hashable = None,
        scope: Hashable = None,
        checked: bool = False,
        awaited: Mapping[PartKey, SystemPart] | None = None,
    ) -> RenderedChat:
        """Renders and encodes a chat.

        Args:
            messages: Role, content (a string or text parts) and whatever else the template reads.
            tools: Function definitions, as in the OpenAI API.
            add_generation_prompt: End with the header of the assistant's next message.
            continue_final_message: Leave the last message open instead.
            template_kwargs: Further variables of the template.
            chat_template: Template source for this chat alone.
            add_special_tokens: Also add what the tokenizer adds to plain text; templates write it themselves.
            separator: What joins text parts where the template reads strings.
            breakpoints: Places in the chat whose positions in the prompt are asked for.
            system_scope: Who else may notice, by the time it takes, that this system part has been seen.
            scope: The same of what the breakpoints mark beyond it.
            checked: The messages are known to be well-formed: each has a role and content, which is a string or
                parts `{"type": "text", "text": …}`, and no field is null.
            awaited: As of `SystemPartCache.get`.

        Raises:
            SystemPartPending: as of `SystemPartCache.get`.
            VLLMValidationError: there is no template, the messages are malformed, or the template refuses them.
        """
        kwargs = template_kwargs or {}
        reserved = _RESERVED_KWARGS & kwargs.keys()
        if reserved:
            raise VLLMValidationError(
                f"chat_template_kwargs must not hold {min(reserved)!r}; it is set by a field of the request itself.",
                "chat_template_kwargs",
            )
        template = replace(self._inspect(self._choose_template(chat_template, tools)), separator=separator)
        chat = _Chat(
            template=template,
            messages=[
                _shaped(message, template)
                for message in (messages if checked else map(_normalised, _checked(messages)))
            ],
            tools=tools or None,
            kwargs=kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            add_special_tokens=add_special_tokens,
        )
        part = self._system_part(chat, system_scope, awaited)
        written = self._write(chat)
        ids, head = self._tokenise(chat, written, part.head)
        system = part.size_in(ids, head)
        marks = [
            CacheMark(self._position(chat, messages, ids, system, part.head, b, scope, awaited), b.ttl)
            for b in breakpoints
        ]
        return RenderedChat(ids, system, written.text, tuple(mark for mark in marks if mark.num_tokens))

    def system_prefix(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int] | None:
        """Token ids of the system part of all chats that begin with these messages; None if there is no such part.

        Raises:
            VLLMValidationError: there is no template, or the messages are malformed.
        """
        template = self._inspect(self._choose_template(None, tools))
        normal = [_shaped(_normalised(message), template) for message in _checked(messages)]
        chat = _Chat(template, normal, tools or None, template_kwargs or {}, True, False, False)
        part = self._system_part(chat, None)
        return part.token_ids.copy() or None

    def text_prefix(self, text: str) -> list[int]:
        """Token ids that plain prompts starting with `text` start with, whatever follows it.

        The last tokens of `text` alone may merge with what follows; those are left out.
        """
        return _common_prefix([self._tokenizer.encode(text + probe) for probe in _PROBES])

    def _choose_template(self, chat_template: str | None, tools: list[dict[str, Any]] | None) -> str:
        given = chat_template or self._chat_template
        if given:
            return given
        try:
            # A checkpoint may have several, one of them for tools.
            return self._tokenizer.hf.get_chat_template(None, tools or None)
        except ValueError:
            raise VLLMValidationError(
                "This model has no chat template, so it takes no chat messages. Start the server with --chat-template "
                "FILE to give it one, or use /v1/completions.",
                "messages",
            ) from None

    def _write(self, chat: _Chat) -> _Written:
        """The chat as text."""
        try:
            marked = chat.template.controls.mark(chat.messages, chat.tools, chat.kwargs)
        except RecursionError:
            raise VLLMValidationError("The messages or tools are nested too deeply.", "messages") from None
        if marked is None:
            text = self._render_text(chat)
            return _Written(text, text, None)
        marks, messages, (tools, kwargs) = marked
        try:
            text = self._render_text(replace(chat, messages=messages, tools=tools, kwargs=kwargs))
        except VLLMValidationError as error:
            raise VLLMValidationError(marks.strip(str(error)), error.param) from error
        return _Written(marks.strip(text), text, marks)

    def _tokenise(self, chat: _Chat, written: _Written, head: TextHead | None) -> tuple[list[int], TextHead | None]:
        """Token ids, in which spellings of control tokens in the inputs stay text, and `head` if they begin with it."""
        if written.marks is not None:
            return chat.template.controls.encode_marked(written.marked, written.marks, chat.add_special_tokens), None
        if head is not None and not chat.add_special_tokens and head.starts(written.text):
            return self._heads.encode(head, written.text), head
        return self._tokenizer.encode(written.text, add_special_tokens=chat.add_special_tokens), None

    def _render_text(self, chat: _Chat) -> str:
        hf: Any = self._tokenizer.hf  # declared to return many things, of which these arguments choose a string
        try:
            return hf.apply_chat_template(
                chat.messages,
                tools=chat.tools,
                chat_template=chat.template.source,
                add_generation_prompt=chat.add_generation_prompt,
                continue_final_message=chat.continue_final_message,
                tokenize=False,
                **chat.kwargs,
            )
        except Exception as error:  # a template is a program: it raises what it likes
            reason = " ".join(str(error).split())[:_MAX_REASON_CHARS] or type(error).__name__
            raise VLLMValidationError(f"The chat template refused these messages: {reason}", "messages") from error

    def _position(
        self,
        chat: _Chat,
        messages: list[dict[str, Any]],
        ids: list[int],
        system: int | None,
        head: TextHead | None,
        place: Breakpoint,
        scope: Hashable,
        awaited: Mapping[PartKey, SystemPart] | None,
    ) -> int:
        """How many tokens of the prompt `ids` come before a place in its chat; 0 if that is not certain.

        They are the tokens that the prompt shares with prompts of the same chat up to there which go on differently.
        """
        count = _num_system_messages(chat)
        if place.message is not None and place.message == count - 1:
            content = messages[place.message]["content"]
            if place.parts is None or place.parts == len(content):
                return system or 0
        marked = None if place.message is None else messages[place.message]
        variants = [_cut(chat, place, marked, probe, has_system=count > 0) for probe in _PROBES[:2]]
        try:
            key = (scope, _digest(variants[0], variants[0].messages))
        except (TypeError, ValueError, RecursionError):
            return 0
        shared = self._parts.get(key, lambda: self._shared(variants, head), awaited).token_ids
        return len(shared) if ids[: len(shared)] == shared else len(_common_prefix([ids, shared]))

    def _shared(self, variants: list[_Chat], head: TextHead | None) -> SystemPart:
        """What all of these chats' prompts start with; nothing if the template refuses one of them."""
        try:
            prompts = [self._tokenise(variant, self._write(variant), head)[0] for variant in variants]
        except VLLMValidationError as error:
            logger.debug("No end of a marked prefix: %s", error)
            return NO_PART
        return SystemPart(_common_prefix(prompts))

    def _system_part(
        self, chat: _Chat, scope: Hashable, awaited: Mapping[PartKey, SystemPart] | None = None
    ) -> SystemPart:
        """The system part of a chat; empty if there is none or its end is not certain."""
        count = _num_system_messages(chat)
        if count == 0 and not chat.tools:
            return NO_PART
        messages = chat.messages[:count]
        try:
            key = (scope, *_key(chat, messages))
        except (TypeError, ValueError, RecursionError):  # variables that are no JSON: nothing to know the prompt by
            return NO_PART
        return self._parts.get(
            key,
            lambda: self._probe(
                replace(chat, messages=messages, add_generation_prompt=True, continue_final_message=False)
            ),
            awaited,
        )

    def _probe(self, head: _Chat) -> SystemPart:
        """What the prompts of a system part start with, whatever the user says; nothing if that is unknown."""
        chats = [
            replace(head, messages=[*head.messages, _shaped({"role": "user", "content": probe}, head.template)])
            for probe in _PROBES
        ]
        try:
            written = [self._write(chat) for chat in chats]
            is_plain = not head.add_special_tokens and all(w.marks is None for w in written)
            known = self._heads.common([w.text for w in written]) if is_plain else None
            prompts = [self._tokenise(chat, w, known)[0] for chat, w in zip(chats, written, strict=True)]
        except VLLMValidationError as error:
            logger.debug("No boundary of a system prompt: %s", error)
            return NO_PART
        if any(prompt == prompts[0] for prompt in prompts[1:]):  # the template drops what the user says
            return NO_PART
        return SystemPart(_common_prefix(prompts), known)

    def _inspect_template(self, source: str) -> _Template:
        dated = "strftime_now" in source
        developers = "'developer'" in source or '"developer"' in source
        template = _Template(source, ControlTokens(self._tokenizer, source), True, False, True, True, developers, dated)

        def shown(message: dict[str, Any]) -> str:
            messages = [{"role": "user", "content": "a"}, message] if "tool_calls" in message else [message]
            try:
                return self._render_text(_Chat(template, messages, None, {}, True, False, False))
            except VLLMValidationError:
                return ""

        def shows(content: Any) -> bool:
            text = shown({"role": "user", "content": content})
            return "Content" in text and "'type'" not in text and '"type"' not in text

        def shows_call(arguments: Any) -> bool:
            function = {"name": "f", "arguments": arguments}
            # Nine letters and digits, since some templates take no other ids.
            call = {"id": "abcdefghi", "type": "function", "function": function}
            return "Content" in shown({"role": "assistant", "content": "", "tool_calls": [call]})

        takes_parts = shows([{"type": "text", "text": "Content"}])
        takes_text = shows("Content") or not takes_parts
        template = replace(template, takes_text=takes_text, takes_parts=takes_parts)
        takes_raw = shows_call("{Content")
        return replace(template, takes_raw=takes_raw, takes_objects=not takes_raw or shows_call({"a": "Content"}))


def _num_system_messages(chat: _Chat) -> int:
    return next((i for i, m in enumerate(chat.messages) if m["role"] not in _SYSTEM_ROLES), len(chat.messages))


def _cut(chat: _Chat, place: Breakpoint, marked: dict[str, Any] | None, probe: str, *, has_system: bool) -> _Chat:
    """The chat up to a place in the message `marked`, where it goes on with `probe`."""
    template = chat.template
    said = _shaped({"role": "user", "content": probe}, template)
    if marked is None:
        system = [_shaped({"role": "system", "content": probe}, template)] if has_system else []
        messages = [*system, said]
    else:
        messages = chat.messages[: place.message]
        if marked["role"] in ("user", *_SYSTEM_ROLES):
            content = marked["content"]
            longer = content + probe if isinstance(content, str) else [*content[: place.parts], _text(probe)]
            marked = marked | {"content": longer}
        messages = [*messages, _shaped(_normalised(marked), template), *([] if marked["role"] == "user" else [said])]
    return replace(chat, messages=messages, add_generation_prompt=True, continue_final_message=False)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _common_prefix(prompts: list[list[int]]) -> list[int]:
    """The token ids that all of `prompts` start with."""
    size = 0
    for column in zip(*prompts, strict=False):
        if len(set(column)) > 1:
            break
        size += 1
    return prompts[0][:size]


def _key(chat: _Chat, messages: list[dict[str, Any]]) -> tuple[Hashable, ...]:
    """What the system part `messages` of a chat is known by. A few texts are that themselves, which is found fastest;
    all else by a digest.

    Raises:
        TypeError, ValueError, RecursionError: there are template variables that are no JSON.
    """
    texts = [message["content"] for message in messages]
    plain = not chat.tools and not chat.kwargs and all(len(message) == 2 for message in messages)
    if plain and all(isinstance(text, str) for text in texts):
        roles = tuple(message["role"] for message in messages)
        return (chat.template.source, chat.add_special_tokens, _today(chat), roles, tuple(texts))
    return (_digest(chat, messages),)


def _digest(chat: _Chat, messages: list[dict[str, Any]]) -> bytes:
    # Keys keep their order: templates write tools as they come, so another order is another prompt.
    parts = [messages, chat.tools, chat.kwargs, chat.template.source, chat.add_special_tokens, _today(chat)]
    return hashlib.sha256(orjson.dumps(parts)).digest()


def _today(chat: _Chat) -> str:
    return str(date.today()) if chat.template.tells_date else ""


def _checked(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise VLLMValidationError("messages must be a list of at least one message.", "messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise VLLMValidationError(f"messages[{i}] must be an object with a role that is a string.", "messages")
    return messages


def _normalised(message: dict[str, Any]) -> dict[str, Any]:
    """The message with content that is a string or text parts; fields that are null are left out."""
    normal = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list):
        content = [{"type": "text", "text": _part_text(part)} for part in content]
    elif not isinstance(content, str) and content is not None:
        raise VLLMValidationError(f"content must be a string or text parts, got {content!r:.100}.", "messages")
    normal["content"] = "" if content is None else content
    if normal.get("tool_calls") and not isinstance(normal["tool_calls"], list):
        raise VLLMValidationError("tool_calls must be a list.", "messages")
    return normal


def _shaped(message: dict[str, Any], template: _Template) -> dict[str, Any]:
    """A normalised message in the form that the template reads; itself if that is its form already."""
    changes: dict[str, Any] = {}
    content = message["content"]
    if message["role"] == "developer" and not template.has_developers:
        changes["role"] = "system"
    if isinstance(content, str):
        if not template.takes_text:
            changes["content"] = [_text(content)]
    elif not template.takes_parts:
        changes["content"] = template.separator.join(part["text"] for part in content)
    if message.get("tool_calls"):
        changes["tool_calls"] = [_tool_call(call, template) for call in message["tool_calls"]]
    # What gpt-oss' template calls it; of a message that calls and also says something it takes one of the two.
    thinking = message.get("reasoning_content")
    if thinking and "message.thinking" in template.source and not (message.get("tool_calls") and content):
        changes["thinking"] = thinking
    return message | changes if changes else message


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if kind in _TEXT_PARTS else part.get("refusal") if kind == "refusal" else None
    if not isinstance(text, str):
        raise VLLMValidationError(
            f"content parts must be {{'type': 'text', 'text': …}}; got one of type {kind!r:.100}.", "messages"
        )
    return text


def _tool_call(call: Any, template: _Template) -> Any:
    """The call with its arguments as the template reads them: an object where they are one.

    What a model wrote is history, whatever it is: arguments that are no JSON object stay the text that they are. A
    template that reads objects alone gets one that holds the text.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise VLLMValidationError("tool_calls must hold objects with a function.", "messages")
    given = function.get("arguments")
    arguments = _json_object(given) if isinstance(given, str) else given
    if arguments is None and isinstance(given, str):
        arguments = given if template.takes_raw else {"arguments": given}
    elif isinstance(arguments, dict) and not template.takes_objects:
        arguments = given if isinstance(given, str) else json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}} if arguments is not given else call


def _json_object(text: str) -> dict[str, Any] | None:
    """The object that a JSON text stands for; an empty one for no text, None if it stands for no object."""
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
