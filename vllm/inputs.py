"""Forms in which a prompt may be given to `LLM.generate` and the engines."""

from typing import NotRequired, TypedDict


class TextPrompt(TypedDict):
    """A prompt as text; the tokenizer's special tokens are added."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids, taken as they are; `prompt` is the text they came from, handed back with the output."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]


PromptType = str | list[int] | TextPrompt | TokensPrompt
