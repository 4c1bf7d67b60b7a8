"""What a request asks of the sampler, and the limits it must keep."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any, ClassVar, Literal

import msgspec

from vllm.exceptions import VLLMValidationError

MAX_N = 128
MAX_STOP_STRINGS = 256
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
# Of bad words there are two spellings each, and the sampler's tables have room for so many tokens and sequences a row.
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 1024
MAX_BAD_WORD_TOKENS = 2048
MAX_BAD_SEQUENCES = 512
# What is looked at for each output: stop strings at each of its tokens, and what the sampler's tables take when it
# starts. A few outputs may have all of it. A hundred must share it, or one request would hold up the others' tokens.
MAX_STOP_SEARCHES = 8192
MAX_SAMPLER_ENTRIES = 262_144
# Most likely tokens to report, over all outputs at each of their tokens; and over all tokens of a prompt. Where the
# operator lets a token have more than `DEFAULT_MAX_LOGPROBS`, these are as many times more.
DEFAULT_MAX_LOGPROBS = 20
MAX_STEP_LOGPROBS = 500
MAX_PROMPT_LOGPROBS = 262_140
_SAMPLING_EPS = 1e-5
MAX_LENGTH_PENALTY = 10.0
_MAX_INT = 2**31 - 1


class RequestOutputKind(IntEnum):
    """What each `RequestOutput` of a request holds: all so far, the news only, or one final answer."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class StructuredOutputsParams(msgspec.Struct, omit_defaults=True):
    """What the output must look like: exactly one of the first six.

    Attributes:
        json: JSON schema, as an object or as its text.
        regex: The whole output matches it.
        choice: The output is one of these.
        grammar: In GBNF (with a rule `root`) or Lark (with a rule `start`).
        json_object: Any JSON object.
        structural_tag: Structural tag of xgrammar, as an object or as its text.
        disable_any_whitespace: JSON in one line, with a space after commas and colons and nowhere else.
        disable_additional_properties: Accepted; what a schema does not name is never allowed unless it says so.
        whitespace_pattern: Not supported.
        after: The constraint begins after the first time that this text comes, anything before it is free.
        field: The request field that it comes from; errors blame that one.
        enforces_all: A JSON schema with a keyword that cannot be enforced is refused, not followed as far as possible.
    """

    PUBLIC: ClassVar[tuple[str, ...]] = (
        "json",
        "regex",
        "choice",
        "grammar",
        "json_object",
        "structural_tag",
        "disable_any_whitespace",
        "disable_additional_properties",
        "whitespace_pattern",
    )

    json: Any = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    after: str | None = None
    field: str = "structured_outputs"
    enforces_all: bool = True


class SamplingParams(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Sampling parameters of a request, named as vLLM and the OpenAI API name them.

    `bad_words_token_ids` is filled by the engine, which knows the tokenizer.

    Raises:
        VLLMValidationError: on construction, when a value is out of range; `param` names it.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    bad_words_token_ids: list[list[int]] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] = "left"
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.stop is None:
            self.stop = []
        elif isinstance(self.stop, str):
            self.stop = [self.stop]
        if self.stop_token_ids is None:
            self.stop_token_ids = []
        if self.top_k == -1:
            self.top_k = 0
        if self.seed == -1:
            self.seed = None
        self._verify()
        if self.is_greedy:
            self.temperature, self.top_p, self.top_k, self.min_p = 0.0, 1.0, 0, 0.0

    @property
    def is_greedy(self) -> bool:
        return self.temperature < _SAMPLING_EPS

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def clone(self) -> SamplingParams:
        """A copy whose lists may be changed."""
        return msgspec.convert(msgspec.to_builtins(self), SamplingParams)

    def _verify(self) -> None:
        check_int("n", self.n, 1, MAX_N)
        check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        check_float("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        check_float("temperature", self.temperature, 0.0, 100.0)
        check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        check_int("top_k", self.top_k, 0, _MAX_INT, note="; 0 or -1 turns it off")
        check_float("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), 2**63 - 1)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1, _MAX_INT)
        check_min_tokens(self.min_tokens, self.max_tokens)
        if self.logprobs is not None:
            check_int("logprobs", self.logprobs, -1, _MAX_INT)
        if self.prompt_logprobs is not None:
            check_int("prompt_logprobs", self.prompt_logprobs, -1, _MAX_INT)
        if self.truncate_prompt_tokens is not None:
            check_int("truncate_prompt_tokens", self.truncate_prompt_tokens, -1, _MAX_INT)
        if self.truncation_side not in ("left", "right"):
            raise VLLMValidationError(
                f"truncation_side must be 'left' or 'right', got {self.truncation_side!r:.64}.", "truncation_side"
            )
        self._verify_stops()
        if self.logit_bias:
            check_count("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
            for token_id, bias in self.logit_bias.items():
                check_float(f"logit_bias[{token_id}]", bias, -math.inf, math.inf, param="logit_bias")
            self.logit_bias = {t: min(100.0, max(-100.0, b)) for t, b in self.logit_bias.items()}
        if self.allowed_token_ids == []:
            raise VLLMValidationError("allowed_token_ids must name at least one token id.", "allowed_token_ids")
        if self.bad_words:
            check_texts("bad_words", self.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS)

    def _verify_stops(self) -> None:
        check_stops(self.stop_strings)
        if self.stop_strings and not self.detokenize:
            raise VLLMValidationError("stop strings need detokenize=True.", "stop")
        check_count("stop_token_ids", self.stop_token_ids or [], MAX_STOP_TOKEN_IDS)

    def resolve_logprobs(self, vocab_size: int) -> None:
        """Turns -1, which asks for the log-probabilities of all tokens, into their number."""
        if self.logprobs == -1:
            self.logprobs = vocab_size
        if self.prompt_logprobs == -1:
            self.prompt_logprobs = vocab_size

    def verify_for_model(self, vocab_size: int, max_logprobs: int) -> None:
        """Checks what depends on the model.

        Raises:
            VLLMValidationError: a token id outside the vocabulary, or more log-probabilities than the server allows.
        """
        if self.allowed_token_ids is not None:
            check_count("allowed_token_ids", self.allowed_token_ids, vocab_size)
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            given = getattr(self, name)
            for token_id in (min(given), max(given)) if given else ():
                if not 0 <= token_id < vocab_size:
                    raise VLLMValidationError(
                        f"{name} holds token id {token_id}; ids of this model are 0 to {vocab_size - 1}.", name
                    )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value > max_logprobs:
                raise VLLMValidationError(f"{name} may be at most {max_logprobs} (--max-logprobs), got {value}.", name)

    def check_work(self, max_logprobs: int, num_prompts: int = 1) -> None:
        """Checks what a server has to do for a request beside the model; `bad_words_token_ids` must be known.

        Args:
            max_logprobs: Most that a token may have.
            num_prompts: Prompts that have these parameters, each with `n` outputs.

        Raises:
            VLLMValidationError: too many entries over all outputs.
        """
        lists = {
            "bad_words": sum(map(len, self.bad_words_token_ids or ())),
            "logit_bias": len(self.logit_bias or ()),
            "stop_token_ids": len(self.stop_token_ids or ()),
            "allowed_token_ids": len(self.allowed_token_ids or ()),
        }
        entries, outputs = sum(lists.values()), num_prompts * self.n
        most = times_more(MAX_STEP_LOGPROBS, max_logprobs)
        if self.n > 1 and self.n * (self.logprobs or 0) > most:
            raise VLLMValidationError(
                f"logprobs may be at most {most} over all n outputs, got {self.logprobs} for each of {self.n}.",
                "logprobs",
            )
        if outputs > 1 and outputs * len(self.stop_strings) > MAX_STOP_SEARCHES:
            raise VLLMValidationError(
                f"stop may have {MAX_STOP_SEARCHES} entries over all outputs of a request, got "
                f"{len(self.stop_strings)} for each of {outputs}.",
                "stop",
            )
        if outputs > 1 and outputs * entries > MAX_SAMPLER_ENTRIES:
            longest = max(lists, key=lists.__getitem__)
            raise VLLMValidationError(
                f"{', '.join(lists)} may have {MAX_SAMPLER_ENTRIES} entries over all outputs of a request, got "
                f"{entries} for each of {outputs}; most of them are in {longest}.",
                longest,
            )


class BeamSearchParams(msgspec.Struct, omit_defaults=True):
    """Parameters of a beam search, named as vLLM names them; `stop`, `stop_token_ids` and `min_tokens` are ours.

    Attributes:
        beam_width: Sequences that are kept at each step, and returned.
        max_tokens: Most tokens to generate.
        ignore_eos: Go on after the end-of-sequence token.
        temperature: Without effect: the search compares the model's own log-probabilities.
        length_penalty: A sequence's score is its summed log-probability by its length to this power.
        include_stop_str_in_output: Outputs keep the stop string or token that ended them.

    Raises:
        VLLMValidationError: on construction, when a value is out of range; `param` names it.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    stop: list[str] | str = []
    stop_token_ids: list[int] = []
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        check_int("beam_width", self.beam_width, 1, MAX_N)
        check_int("max_tokens", self.max_tokens, 1, _MAX_INT)
        check_min_tokens(self.min_tokens, self.max_tokens)
        check_float("temperature", self.temperature, 0.0, 100.0)
        check_float("length_penalty", self.length_penalty, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY)
        check_stops(self.stop_strings)
        check_count("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


def times_more(limit: int, max_logprobs: int) -> int:
    """A limit of log-probabilities where the operator lets a token have `max_logprobs` of them."""
    return limit * max(1, max_logprobs // DEFAULT_MAX_LOGPROBS)


def check_min_tokens(min_tokens: Any, max_tokens: int | None) -> None:
    """Raises `VLLMValidationError` for a least number of tokens that is none, or above the most."""
    check_int("min_tokens", min_tokens, 0, _MAX_INT)
    if max_tokens is not None and min_tokens > max_tokens:
        raise VLLMValidationError(
            f"min_tokens must not exceed max_tokens ({max_tokens}), got {min_tokens}.", "min_tokens"
        )


def check_stops(stops: list[str]) -> None:
    """Raises `VLLMValidationError` for too many stop strings, or one that is empty or too long."""
    check_texts("stop", stops, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS)


def check_texts(name: str, texts: list[str], most: int, most_chars: int) -> None:
    """Raises `VLLMValidationError` for more than `most` texts, or one that is empty or longer than `most_chars`."""
    check_count(name, texts, most)
    for text in texts:
        if not text:
            raise VLLMValidationError(f"{name} must not hold an empty string.", name)
        if len(text) > most_chars:
            raise VLLMValidationError(
                f"{name} may hold strings of at most {most_chars} characters, got one of {len(text)}.", name
            )


def check_int(name: str, value: Any, low: int, high: int, note: str = "") -> None:
    """Raises `VLLMValidationError` unless `value` is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise VLLMValidationError(f"{name} must be an integer, got {value!r}.", name)
    if not low <= value <= high:
        bound = f"at least {low}" if high >= _MAX_INT and value < low else f"from {low} to {high}"
        raise VLLMValidationError(f"{name} must be {bound}{note}, got {value}.", name)


def check_float(
    name: str, value: Any, low: float, high: float, low_open: bool = False, param: str | None = None
) -> None:
    """Raises `VLLMValidationError` unless `value` is a finite number in [low, high], or (low, high] if `low_open`."""
    param = param or name
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise VLLMValidationError(f"{name} must be a number, got {value!r}.", param)
    if not math.isfinite(value):
        raise VLLMValidationError(f"{name} must be a finite number, got {value}.", param)
    if value > high or value < low or (low_open and value <= low):
        raise VLLMValidationError(
            f"{name} must be {'above' if low_open else 'at least'} {low:g} and at most {high:g}, got {value}.", param
        )


def check_count(name: str, values: Any, most: int) -> None:
    """Raises `VLLMValidationError` when a list or mapping has more than `most` entries."""
    if len(values) > most:
        raise VLLMValidationError(f"{name} may have at most {most} entries, got {len(values)}.", name)
