"""Forms in which a prompt may be given to `LLM.generate` and the engines."""

from dataclasses import dataclass
from typing import NotRequired, TypedDict


class TextPrompt(TypedDict):
    """A prompt as text; the tokenizer's special tokens are added."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids, taken as they are; `prompt` is the text they came from, handed back with the output."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]


@dataclass(frozen=True)
class CacheMark:
    """A place up to which a client wants the KV of its prompt to be kept.

    Attributes:
        num_tokens: Tokens before it.
        ttl: Seconds after its last use when it may go; None leaves that to the pool.
    """

    num_tokens: int
    ttl: float | None = None


@dataclass(frozen=True)
class Breakpoint:
    """A `CacheMark` in a chat that is not rendered yet.

    Attributes:
        message: Index of the message that it is in; None for the end of the tools.
        parts: How many content parts of that message come before it; None for all of the message.
        ttl: As of `CacheMark`.
    """

    message: int | None
    parts: int | None
    ttl: float | None = None


PromptType = str | list[int] | TextPrompt | TokensPrompt
