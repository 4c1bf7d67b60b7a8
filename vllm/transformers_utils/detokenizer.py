"""Turns tokens into text while they arrive."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Self

from vllm.transformers_utils.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 8
_MAX_WINDOW = 64
_UTF8_MAX_BYTES = 4


class IncrementalDetokenizer(ABC):
    """Text of an output, token by token.

    All that `append` and `flush` return, joined, is `decode(prompt + output)` without `decode(prompt)`: the first
    token keeps its leading space, and a character whose bytes are spread over tokens comes out when it is whole.
    (Exception: with SentencePiece vocabularies the number of U+FFFD in a run of bytes that is no UTF-8 may differ.)
    """

    @abstractmethod
    def append(self, token_id: int) -> str:
        """Returns the text that became certain; "" while a character is unfinished."""

    @abstractmethod
    def flush(self) -> str:
        """Returns what is left at the end: an unfinished character as U+FFFD."""

    @abstractmethod
    def fork(self) -> Self:
        """A copy that goes on by itself."""


def incremental_detokenizer(
    tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True
) -> IncrementalDetokenizer:
    """The detokenizer that fits a tokenizer.

    Args:
        prompt_token_ids: What precedes the output; read only at its end.
        skip_special_tokens: Leave control tokens out of the text.
    """
    kind = ByteDetokenizer if tokenizer.joins_bytes else WindowDetokenizer
    return kind(tokenizer, prompt_token_ids, skip_special_tokens)


class ByteDetokenizer(IncrementalDetokenizer):
    """For tokens that are bytes: they are looked up and decoded as a stream of UTF-8."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._hidden = tokenizer.hidden_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # The prompt may end inside a character; it belongs to the output then.
        for token_id in prompt_token_ids[-_CONTEXT_TOKENS:]:
            self.append(token_id)

    def append(self, token_id: int) -> str:
        return "" if token_id in self._hidden else self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest

    def fork(self) -> Self:
        twin = copy(self)
        twin._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        twin._decoder.setstate(self._decoder.getstate())
        return twin


class WindowDetokenizer(IncrementalDetokenizer):
    """For any tokenizer: a window of the last tokens is decoded at each step and compared with what was handed out.

    `DecodeStream` of the `tokenizers` library does the same, but raises on some outputs that are no UTF-8 and keeps its
    rest to itself.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids = self._context(prompt_token_ids)
        self._text = self._decode(self._ids)
        self._sent = len(self._text) - self._unfinished(self._text)
        self._settled = len(self._ids)

    def append(self, token_id: int) -> str:
        self._ids.append(token_id)
        self._text = self._decode(self._ids)
        end = len(self._text) - self._unfinished(self._text)
        new = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        if self._sent == len(self._text):
            self._advance()
        elif len(self._ids) > _MAX_WINDOW:
            self._shorten()
        return new

    def flush(self) -> str:
        rest = self._text[self._sent :]
        self._sent = len(self._text)
        return rest

    def fork(self) -> Self:
        twin = copy(self)
        twin._ids = self._ids.copy()
        return twin

    def _advance(self) -> None:
        """Drops from the window what came before the last tokens handed out, unless those are invisible alone."""
        tail = self._ids[self._settled :]
        text = self._decode(tail)
        if text:
            self._ids, self._text, self._sent = tail, text, len(text)
        self._settled = len(self._ids)

    def _shorten(self) -> None:
        """Cuts a window that keeps growing because its end stays unfinished (output that is no UTF-8)."""
        middle = len(self._ids) - _MAX_WINDOW // 2
        for cut in range(middle, middle + _UTF8_MAX_BYTES):
            text = self._decode(self._ids[cut:])
            dropped = len(self._text) - len(text)
            if dropped <= self._sent and self._text.endswith(text):
                self._ids, self._text, self._sent = self._ids[cut:], text, self._sent - dropped
                self._settled = 0
                return

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """An end of the prompt that shows, so that the decoder does not take the output for the start of a text."""
        size = _CONTEXT_TOKENS
        while size < len(prompt_token_ids) and not self._decode(prompt_token_ids[-size:]):
            size *= 2
        return list(prompt_token_ids[-size:])

    def _unfinished(self, text: str) -> int:
        """Number of characters at the end of `text` that may change with the next token."""
        size = len(text) - len(text.rstrip(_REPLACEMENT))
        if self._tokenizer.is_byte_level:
            return min(size, 1)  # only the last one can stand for the beginning of a character
        # SentencePiece decodes a run of byte tokens as a whole: one unfinished character turns all of it into U+FFFD.
        return size if size <= _MAX_WINDOW // 2 else _UTF8_MAX_BYTES - 1

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip_special_tokens)
