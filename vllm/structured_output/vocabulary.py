"""The vocabulary as grammars see it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

from vllm.transformers_utils.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance
    import xgrammar

_TEXT_OF_REASONING = {"<think>", "</think>"}
"""Marks that are text to a grammar even where a tokenizer takes them for control tokens."""
_HARMONY = {"<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"}
"""The same of tokenizers that have all of these: marks of gpt-oss' messages, with which its reasoning comes."""


class Vocabulary:
    """The bytes of each token, for both engines. Control tokens have none, so that no grammar lets them through.

    Args:
        tokens: The bytes of each token.
        size: Columns of the logits, which may be more than there are tokens.
        stop_token_ids: What may be drawn when the grammar has ended.
    """

    def __init__(self, tokens: list[bytes], size: int, stop_token_ids: Iterable[int]) -> None:
        self.tokens = tokens
        self.size = size
        self.stop_token_ids = list(stop_token_ids)

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int, stop_token_ids: Iterable[int]) -> Vocabulary:
        """The vocabulary of a tokenizer."""
        hidden = set(tokenizer.all_special_ids)
        names = {token.content for token in tokenizer.added_tokens.values()}
        shown = _TEXT_OF_REASONING | (_HARMONY if names >= _HARMONY else set())
        hidden -= {i for i, token in tokenizer.added_tokens.items() if token.content in shown}
        ids = range(min(tokenizer.vocab_size, size))
        return cls([b"" if i in hidden else tokenizer.token_bytes(i) for i in ids], size, stop_token_ids)

    @cached_property
    def for_xgrammar(self) -> xgrammar.TokenizerInfo:
        import xgrammar

        return xgrammar.TokenizerInfo(
            self.tokens, xgrammar.VocabType.RAW, vocab_size=self.size, stop_token_ids=self.stop_token_ids
        )

    @cached_property
    def for_llguidance(self) -> llguidance.LLTokenizer:
        """Raises `ValueError` where no token ends an output."""
        import llguidance

        if not self.stop_token_ids:
            raise ValueError("no token of this model ends an output")
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(self)), n_vocab=self.size, eos_token=self.stop_token_ids
        )


class _Tokens:
    """What llguidance reads of a vocabulary. It never has text to encode: nothing is forced into an output."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        stops = vocabulary.stop_token_ids
        self.tokens = [b"" if i in stops else token for i, token in enumerate(vocabulary.tokens)]
        self.eos_token_id = stops[0]
        self.special_token_ids: list[int] = []

    def __call__(self, text: bytes) -> list[int]:
        return []
