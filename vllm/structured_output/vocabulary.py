"""The vocabulary as grammars see it."""

from __future__ import annotations

from collections.abc import Iterable

import xgrammar

from vllm.transformers_utils.tokenizer import Tokenizer

_TEXT_OF_REASONING = ("<think>", "</think>")
"""Marks that are text to a grammar even where a tokenizer takes them for control tokens."""


def tokenizer_info(tokenizer: Tokenizer, vocab_size: int, stop_token_ids: Iterable[int]) -> xgrammar.TokenizerInfo:
    """The bytes of each token; control tokens have none, so that no grammar lets them through.

    Args:
        vocab_size: Columns of the logits, which may be more than the tokenizer has tokens.
        stop_token_ids: What may be drawn when the grammar has ended.
    """
    hidden = set(tokenizer.all_special_ids)
    hidden -= {i for i, token in tokenizer.added_tokens.items() if token.content in _TEXT_OF_REASONING}
    vocab = [b"" if i in hidden else tokenizer.token_bytes(i) for i in range(min(tokenizer.vocab_size, vocab_size))]
    return xgrammar.TokenizerInfo(
        vocab, xgrammar.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=list(stop_token_ids)
    )
