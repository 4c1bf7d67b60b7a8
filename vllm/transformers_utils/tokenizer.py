"""Text to token ids and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vllm.exceptions import StartupError, VLLMValidationError
from vllm.transformers_utils.gguf import gguf_file
from vllm.transformers_utils.gguf_tokenizer import build_gguf_tokenizer

_SPACE_MARK = "\u2581"
"""What SentencePiece vocabularies write for a space."""

# The library decodes so many ids in less than a millisecond, in which it holds the interpreter's lock; more ids are a
# batch of one, for which it gives the lock away.
_MAX_IDS_WITH_LOCK = 1024


class Tokenizer:
    """A tokenizer of the `tokenizers` library with what the server needs of it. Safe to use from several threads.

    Attributes:
        hf: The same tokenizer as transformers' object; holds the chat template.
        vocab_size: Highest token id + 1.
        all_special_ids: Ids of control tokens.
        hidden_ids: Those that decoding with `skip_special_tokens` leaves out.
        max_chars_per_token: No token stands for more characters, so a text of more than n times as many characters
            has more than n tokens; lets callers turn a text away without encoding it.
        is_byte_level: Tokens stand for bytes, in GPT-2's alphabet.
        joins_bytes: The text of tokens is their bytes one after the other, as UTF-8; nothing else is done to it.
    """

    def __init__(self, hf: PreTrainedTokenizerFast) -> None:
        self.hf = hf
        self.backend = hf.backend_tokenizer
        # Both are settings that tokenizer.json may carry for training; a server must see the whole text and no more.
        self.backend.no_truncation()
        self.backend.no_padding()
        vocab = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocab.values()) + 1
        self.max_chars_per_token: int = max(map(len, vocab))
        self.added_tokens = dict(self.backend.get_added_tokens_decoder())
        self.eos_token_id: int | None = hf.eos_token_id
        self.bos_token_id: int | None = hf.bos_token_id
        special = {token_id for token_id, token in self.added_tokens.items() if token.special}
        self.all_special_ids: list[int] = sorted(special | set(hf.all_special_ids))
        self.hidden_ids = frozenset(special)
        steps = _step_types(self.backend.decoder)
        self.is_byte_level = "ByteLevel" in steps
        self.joins_bytes = steps == {"ByteLevel"}
        self._known_bytes: dict[int, bytes] = {}
        self._known_texts: dict[int, str] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Spellings of control tokens become those tokens.

        Raises:
            VLLMValidationError: the text cannot be written as UTF-8 (it holds a lone surrogate).
        """
        try:
            return encode_text(self.backend, text, add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            raise VLLMValidationError("The text holds a lone surrogate, which is not a Unicode character.") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        if len(ids) > _MAX_IDS_WITH_LOCK:
            return self.backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """Text of one token alone, with its leading space; half a character becomes U+FFFD."""
        text = self._known_texts.get(token_id)
        if text is None:
            text = self.token_bytes(token_id).decode("utf-8", errors="replace")
            if 0 <= token_id < self.vocab_size:
                self._known_texts[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that a token stands for; empty for an id outside the vocabulary."""
        known = self._known_bytes.get(token_id)
        if known is None:
            known = self._find_bytes(token_id)
            if 0 <= token_id < self.vocab_size:
                self._known_bytes[token_id] = known
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        added = self.added_tokens.get(token_id)
        if added is not None:
            return added.content.encode()
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            try:
                return token.translate(self._latin_of_letter).encode("latin-1")
            except UnicodeEncodeError:
                return token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace(_SPACE_MARK, " ").encode()

    def digest(self) -> str:
        """SHA-256 (hex) over all that decides which tokens a text becomes."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    @cached_property
    def _latin_of_letter(self) -> dict[int, int]:
        """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes are numbered from U+0100. For
        `str.translate`; Latin-1 that is no letter of the alphabet becomes what Latin-1 cannot encode."""
        printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        others = [byte for byte in range(256) if byte not in printable]
        return {byte: 0xFFFD for byte in others} | {0x100 + i: byte for i, byte in enumerate(others)}


def encode_text(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of `text`; other threads of this process run meanwhile.

    The library's `encode` holds the interpreter's lock to its end, a second for a million characters, in which no
    thread can do anything. Its functions for batches give the lock away, and this one also skips the places of tokens
    in the text, which takes half the time of long texts.
    """
    return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face directory or of a `.gguf` file.

    Raises:
        StartupError: there is none, it is damaged, or it is not one of the `tokenizers` library ("fast").
    """
    if Path(path).is_file():
        return Tokenizer(build_gguf_tokenizer(gguf_file(path)))
    try:
        hf: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers of these files raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise StartupError(f"The tokenizer in {path} cannot be loaded: {reason}") from error
    if not getattr(hf, "is_fast", False):
        raise StartupError(f"The tokenizer in {path} has no tokenizer.json, which is needed. Give one by --tokenizer.")
    return Tokenizer(hf)


def _step_types(component: Any) -> set[str]:
    """Names of the kinds of a pipeline component and of its parts."""
    if component is None:
        return set()
    state = json.loads(component.__getstate__())
    return {step["type"] for step in [state, *state.get("decoders", [])]}
