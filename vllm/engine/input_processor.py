"""From what a caller hands over to what the engine core takes: tokenised, checked, limits applied."""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from typing import NamedTuple, SupportsIndex, TypeVar

import msgspec
import numpy as np

from vllm.config import ModelConfig
from vllm.engine.messages import EngineRequest
from vllm.exceptions import ContextLengthError, VLLMValidationError
from vllm.inputs import CacheMark, PromptType
from vllm.sampling_params import (
    MAX_BAD_SEQUENCES,
    MAX_BAD_WORD_TOKENS,
    MAX_N,
    MAX_PROMPT_LOGPROBS,
    SamplingParams,
    check_float,
    check_int,
    times_more,
)
from vllm.structured_output.constraint import CompiledConstraint
from vllm.token_ids import KnownPrefixes, TokenIds, token_array
from vllm.transformers_utils.chat_template import ChatRenderer
from vllm.transformers_utils.tokenizer import Tokenizer

_MAX_CACHE_SALT_CHARS = 1024


Ids = TypeVar("Ids", list[int], TokenIds)


class ProcessedPrompt(NamedTuple):
    """A prompt for both sides of the engine.

    Attributes:
        token_ids: For whoever reads the outputs.
        array: The same ids, for the engine core.
        text: What they came from if it was text.
    """

    token_ids: list[int]
    array: TokenIds
    text: str | None


class CheckedParams(NamedTuple):
    """Sampling parameters that fit the model; of one request or of several that share them.

    Attributes:
        sampling: For the engine core: with bad words as tokens, and without a form of the output, which it gets
            compiled. Not to be changed.
        asked: What they came from.
    """

    sampling: SamplingParams
    asked: SamplingParams


class InputProcessor:
    """Checks requests at the edge, so that nothing a request holds can surprise the engine core.

    Args:
        config: Vocabulary and length limits.
        tokenizer: Encodes text prompts.
        renderer: Renders chats, for system prompts given as messages.
        serves: Others' tokens wait for what is done for a request, so that its products are bounded as well.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, renderer: ChatRenderer, serves: bool = False) -> None:
        self.config = config
        self.serves = serves
        self.tokenizer = tokenizer
        self.renderer = renderer
        self._known_prefixes = KnownPrefixes()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            VLLMValidationError: so long that it cannot fit the model; noticed before it is tokenised.
        """
        self.check_text_length(len(text))
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def check_text_length(self, num_chars: int, param: str | None = "prompt") -> None:
        """Raises `VLLMValidationError` when a text of so many characters is longer than the model can take, whatever
        its tokens are."""
        at_least = num_chars // self.tokenizer.max_chars_per_token
        if at_least >= self.config.max_model_len:
            raise ContextLengthError(self.config.max_model_len, at_least, param)

    def prompt(
        self, prompt: PromptType, num_system_tokens: int | None = None, tenant: str | None = None
    ) -> ProcessedPrompt:
        """Token ids of a prompt given as text, token ids, or a dict with either.

        Args:
            num_system_tokens: How many at its head other prompts of the tenant are likely to begin with as well.

        Raises:
            VLLMValidationError: it is none of these, or holds ids that are no tokens.
        """
        if isinstance(prompt, dict):
            text = prompt.get("prompt")
            if "prompt_token_ids" in prompt:
                ids = self._checked_ids(prompt.get("prompt_token_ids"), num_system_tokens, tenant)
                return ProcessedPrompt(*ids, text)
            prompt = text or ""
        if isinstance(prompt, str):
            token_ids = self.encode(prompt)
            return ProcessedPrompt(token_ids, token_array(token_ids), prompt)
        return ProcessedPrompt(*self._checked_ids(prompt, num_system_tokens, tenant), None)

    def own_prompt(
        self, token_ids: list[int], num_system_tokens: int | None = None, tenant: str | None = None
    ) -> ProcessedPrompt:
        """A prompt whose ids this server's tokenizer made: they need no check.

        Args:
            token_ids: Kept; not to be changed.
            num_system_tokens: How many at its head other prompts of the tenant are likely to begin with as well.
        """
        shared = num_system_tokens or 0
        if not 0 < shared <= len(token_ids):
            return ProcessedPrompt(token_ids, token_array(token_ids), None)
        head = self._known_prefixes.find(token_ids, shared, tenant)
        if head is None:
            head = token_array(token_ids[:shared])
            self._known_prefixes.keep(token_ids[:shared], head, tenant)
        return ProcessedPrompt(token_ids, head + token_array(token_ids[shared:]), None)

    def params(self, params: SamplingParams, num_prompts: int = 1) -> CheckedParams:
        """Checks sampling parameters against the model and encodes their bad words, which may take a moment.

        Args:
            num_prompts: Prompts of one client's request that get these parameters.

        Raises:
            VLLMValidationError: a value is not allowed; the message says what is.
        """
        check_sampling_params(params)
        asked, params = params, copy(params)
        params.structured_outputs = None
        params = _checked_copy(params)
        params.resolve_logprobs(self.config.vocab_size)
        params.verify_for_model(self.config.vocab_size, self.config.max_logprobs)
        params.bad_words_token_ids = self._bad_words(params.bad_words) if params.bad_words else None
        if self.serves:
            params.check_work(self.config.max_logprobs, num_prompts)
        return CheckedParams(params, asked)

    def request(
        self,
        request_id: str,
        prompt: PromptType | ProcessedPrompt,
        params: SamplingParams | CheckedParams,
        *,
        num_system_tokens: int | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        marks: Sequence[CacheMark] = (),
        tenant: str | None = None,
        arrival_time: float | None = None,
        constraint: CompiledConstraint | None = None,
        is_search: bool = False,
    ) -> tuple[EngineRequest, ProcessedPrompt]:
        """Returns the request as the engine core takes it, and its prompt.

        `max_tokens` is cut to what the context leaves; None becomes all of it.

        Args:
            prompt, params: What is processed or checked is not checked again.
            constraint: What the parameters' `structured_outputs` were compiled to.
            is_search: As of `EngineRequest`.

        Raises:
            VLLMValidationError: a value is not allowed; the message says what is.
        """
        _check_options(request_id, num_system_tokens, cache_salt, priority, marks, arrival_time)
        processed = prompt if isinstance(prompt, ProcessedPrompt) else self.prompt(prompt, num_system_tokens, tenant)
        # Only single values are changed below, so the lists may be those of other requests.
        params = copy((params if isinstance(params, CheckedParams) else self.params(params)).sampling)
        if params.truncate_prompt_tokens is not None:
            processed = ProcessedPrompt(
                self.truncate(processed.token_ids, params), self.truncate(processed.array, params), processed.text
            )
            num_system_tokens, marks = None, ()
        token_ids = processed.array
        longest = self.config.max_model_len
        if not token_ids:
            raise VLLMValidationError("The prompt is empty; give at least one token.", "prompt")
        if len(token_ids) >= longest:
            raise ContextLengthError(longest, len(token_ids), "prompt", params.max_tokens or 1)
        if self.serves:
            self._check_prompt_logprobs(params.prompt_logprobs, len(token_ids))
        room = longest - len(token_ids)
        params.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        params.min_tokens = min(params.min_tokens, params.max_tokens)
        if cache_salt is not None and not 1 <= len(cache_salt) <= _MAX_CACHE_SALT_CHARS:
            raise VLLMValidationError(
                f"cache_salt must have 1 to {_MAX_CACHE_SALT_CHARS} characters, got {len(cache_salt)}.", "cache_salt"
            )
        if num_system_tokens is not None and not 0 < num_system_tokens < len(token_ids):
            num_system_tokens = None
        request = EngineRequest(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling_params=params,
            arrival_time=time.time() if arrival_time is None else arrival_time,
            num_system_tokens=num_system_tokens,
            cache_salt=cache_salt,
            priority=priority,
            constraint=constraint,
            marks=[mark for mark in marks if 0 < mark.num_tokens < len(token_ids)],
            tenant=tenant,
            is_search=is_search,
        )
        return request, processed

    def system_prompt(self, prompt: str | list[int] | list[dict]) -> list[int]:
        """Token ids of a system prompt.

        Args:
            prompt: Token ids; or text that prompts start with; or chat messages, of which the leading system messages
                count, as the chat template renders them.

        Raises:
            VLLMValidationError: it is empty, too long, or the chat template marks no boundary after it.
        """
        if isinstance(prompt, str):
            self.check_text_length(len(prompt))
            token_ids = self.renderer.text_prefix(prompt)
        elif isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], dict):
            found = self.renderer.system_prefix([m for m in prompt if isinstance(m, dict)])
            if found is None:
                raise VLLMValidationError(
                    "These messages have no system part that can be pinned: the first message must have role 'system', "
                    "and the chat template must render it ahead of the user's text.",
                    "messages",
                )
            token_ids = found
        else:
            token_ids, _ = self._checked_ids(prompt)
        if not 0 < len(token_ids) < self.config.max_model_len - 1:
            raise VLLMValidationError(
                f"The system prompt has {len(token_ids)} tokens; it must have from 1 to "
                f"{self.config.max_model_len - 2}, since the whole context has {self.config.max_model_len}.",
                "prompt",
            )
        return token_ids

    def _checked_ids(
        self, token_ids: object, num_shared: int | None = None, tenant: str | None = None
    ) -> tuple[list[int], TokenIds]:
        """The ids as a list of its own and as an array.

        Args:
            num_shared: How many at their head other prompts of the tenant are likely to begin with as well.
        """
        if not isinstance(token_ids, list | tuple):
            raise VLLMValidationError(
                f"The prompt must be text or a list of token ids, got {type(token_ids).__name__}.", "prompt"
            )
        size = self.config.vocab_size
        token_ids = list(token_ids)
        # Prompts have tens of thousands of tokens: the good case must not loop in Python, and reads each once.
        with suppress(TypeError, OverflowError):
            shared = num_shared if num_shared is not None and 0 < num_shared <= len(token_ids) else 0
            head = self._known_prefixes.find(token_ids, shared, tenant) if shared else None
            rest = token_ids if head is None else token_ids[shared:]
            array = token_array(rest)
            if self._are_tokens(array, rest):
                if head is not None:
                    return token_ids, head + array
                if shared:
                    self._known_prefixes.keep(token_ids[:shared], array[:shared], tenant)
                return token_ids, array
        wrong = next((token_id for token_id in token_ids if not _is_integer_below(size, token_id)), None)
        raise VLLMValidationError(
            f"The prompt holds {wrong!r}; token ids of this model are integers from 0 to {size - 1}.", "prompt"
        )

    def _are_tokens(self, array: TokenIds, token_ids: list[int]) -> bool:
        """Whether the array that was made of `token_ids` holds tokens of the model, and none of them was a bool."""
        # With the numbers from 2 on moved to 0, what bools would be is at the far end, beyond the vocabulary.
        values = np.asarray(array)
        moved = values - np.uint32(2)
        if not len(moved) or moved.max() < self.config.vocab_size - 2:
            return True
        low = np.flatnonzero(moved >= 2**32 - 2).tolist()
        if any(isinstance(token_ids[i], bool) for i in low):
            return False
        return bool(values.max() < self.config.vocab_size)

    def truncate(self, token_ids: Ids, params: SamplingParams) -> Ids:
        """The last tokens of a prompt, or the first ones if `truncation_side` is right: as many as
        `truncate_prompt_tokens` says; -1 for all that leave room for `max_tokens`.

        Raises:
            VLLMValidationError: that is none, or more than the model takes.
        """
        limit = self.config.max_model_len - (params.max_tokens or 1)
        keep = params.truncate_prompt_tokens
        keep = limit if keep is None or keep < 0 else keep
        if keep == 0 or keep >= self.config.max_model_len:
            raise VLLMValidationError(
                f"truncate_prompt_tokens must be -1 or from 1 to {self.config.max_model_len - 1}, got {keep}.",
                "truncate_prompt_tokens",
            )
        return token_ids[:keep] if params.truncation_side == "right" else token_ids[-keep:]

    def _check_prompt_logprobs(self, top: int | None, num_tokens: int) -> None:
        most = times_more(MAX_PROMPT_LOGPROBS, self.config.max_logprobs)
        if (top or 0) * num_tokens > most:
            raise VLLMValidationError(
                f"prompt_logprobs may be at most {most} over all tokens of the prompt, got {top} for each of "
                f"{num_tokens}.",
                "prompt_logprobs",
            )

    def _bad_words(self, words: list[str]) -> list[list[int]]:
        """Token sequences of each word, at the start of a text and after a space.

        Raises:
            VLLMValidationError: they are more than the sampler takes; noticed before all words are encoded.
        """
        found: dict[tuple[int, ...], None] = {}
        num_tokens = 0
        for count, word in enumerate(words, 1):
            for spelling in (word, " " + word.lstrip()):
                ids = tuple(self.tokenizer.encode(spelling, add_special_tokens=False))
                if ids and ids not in found:
                    found[ids] = None
                    num_tokens += len(ids)
            if num_tokens > MAX_BAD_WORD_TOKENS or len(found) > MAX_BAD_SEQUENCES:
                raise VLLMValidationError(
                    f"bad_words may be at most {MAX_BAD_WORD_TOKENS} tokens and {MAX_BAD_SEQUENCES} token sequences in "
                    f"all, each word as it starts a text and as it follows a space; the first {count} of {len(words)} "
                    f"words are {num_tokens} tokens and {len(found)} sequences.",
                    "bad_words",
                )
        return [list(ids) for ids in found]


def check_sampling_params(params: object) -> None:
    """Raises `VLLMValidationError` for what are no sampling parameters at all."""
    if not isinstance(params, SamplingParams):
        raise VLLMValidationError(f"sampling_params must be SamplingParams, got {params!r}.", "sampling_params")
    check_int("n", params.n, 1, MAX_N)


def _checked_copy(params: SamplingParams) -> SamplingParams:
    """A copy, whose fields have the types they should: fields may have been set since the parameters were made."""
    try:
        return params.clone()
    except (msgspec.ValidationError, TypeError, OverflowError) as error:
        raise VLLMValidationError(f"The sampling parameters are not valid: {error}.", "sampling_params") from None


def _check_options(
    request_id: object,
    num_system_tokens: object,
    cache_salt: object,
    priority: object,
    marks: object,
    arrival_time: object,
) -> None:
    """Raises `VLLMValidationError` for a value whose type is not the one that the engine core relies on."""
    for name, text in (("request_id", request_id), ("cache_salt", cache_salt)):
        if not isinstance(text, str) and (text is not None or name == "request_id"):
            raise VLLMValidationError(f"{name} must be a string, got {text!r}.", name)
    check_int("priority", priority, -(2**31), 2**31 - 1)
    if num_system_tokens is not None:
        check_int("num_system_tokens", num_system_tokens, -(2**31), 2**31 - 1)
    if arrival_time is not None:
        check_float("arrival_time", arrival_time, 0.0, 1e11)
    if not isinstance(marks, list | tuple):
        raise VLLMValidationError(f"marks must be a list of CacheMark, got {marks!r}.", "marks")
    for mark in marks:
        if not isinstance(mark, CacheMark):
            raise VLLMValidationError(f"marks must hold CacheMark values, got {mark!r}.", "marks")
        check_int("marks", mark.num_tokens, -(2**31), 2**31 - 1)
        if mark.ttl is not None:
            check_float("marks", mark.ttl, 0.0, 1e11)


def _is_integer_below(size: int, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return False
    try:
        return 0 <= operator.index(value) < size
    except TypeError:
        return False
