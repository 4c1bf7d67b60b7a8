"""Beginnings of texts whose tokens are known, so that only what follows them has to be tokenised."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm.transformers_utils.control_tokens import any_of
from vllm.transformers_utils.tokenizer import Tokenizer

_PIECEWISE_STEPS = frozenset(
    {
        "BertNormalizer",
        "BertPreTokenizer",
        "ByteLevel",
        "CharDelimiterSplit",
        "Digits",
        "Lowercase",
        "Metaspace",
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Nmt",
        "Precompiled",
        "Prepend",
        "Punctuation",
        "Replace",
        "Sequence",
        "Split",
        "Strip",
        "StripAccents",
        "UnicodeScripts",
        "Whitespace",
        "WhitespaceSplit",
    }
)
"""Normalizers and pre-tokenizers that treat a stretch of text between two added tokens the same wherever it stands."""

_MAX_TRIES = 4


@dataclass(frozen=True)
class TextHead:
    """A text that ends where tokens end, whatever follows it."""

    text: str
    token_ids: list[int]

    def starts(self, text: str) -> bool:
        # A slice of ASCII is ASCII, also where `text` is not: then the comparison is that of bytes.
        return text[: len(self.text)] == self.text


class TextHeads:
    """Finds such heads, and tokenises what follows them.

    The tokenizer first cuts a text at its added tokens, then makes tokens of each stretch in between. So a text may be
    cut behind an added token, if that token is taken from the text as it stands (not normalized), leaves the space
    behind it alone, and no other added token could reach across the cut. What makes a stretch's tokens depend on where
    it stands rules the whole tokenizer out: tokens that must be whole words, a space put before the first stretch
    alone, steps that are not known, random merges.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def common(self, texts: list[str]) -> TextHead | None:
        """The longest head of all `texts` that is certain; None if there is none."""
        shared = _common_start(texts)
        for end in self._ends(shared):
            head = TextHead(shared[:end], self._tokenizer.encode(shared[:end], add_special_tokens=False))
            if self._is_exact(head, texts):
                return head
        return None

    def encode(self, head: TextHead, text: str) -> list[int]:
        """Token ids of a text that starts with `head`, without those that only frame a text."""
        ids = head.token_ids.copy()
        ids += self._tokenizer.encode(text[len(head.text) :], add_special_tokens=False)
        return ids

    def _ends(self, text: str) -> Iterator[int]:
        """Places behind added tokens where `text` may be cut, the last ones."""
        if not self._is_piecewise:
            return
        ends = [match.end() for match in self._pattern.finditer(text)]
        for end in ends[-_MAX_TRIES:][::-1]:
            if not any(text.endswith(beginning, 0, end) for beginning in self._beginnings[text[end - 1]]):
                yield end

    def _is_exact(self, head: TextHead, texts: list[str]) -> bool:
        """Tries what must hold: one of the texts in full, the others around the cut."""
        last = self._cuts.get(head.token_ids[-1])
        if last is None or not head.text.endswith(last):
            return False
        mark = TextHead(last, head.token_ids[-1:])
        trials = [(head, texts[0]), *((mark, last + text[len(head.text) :]) for text in texts[1:])]
        return all(self.encode(h, text) == self._tokenizer.encode(text, add_special_tokens=False) for h, text in trials)

    @cached_property
    def _is_piecewise(self) -> bool:
        backend = self._tokenizer.backend
        if backend.encode_special_tokens or getattr(backend.model, "dropout", None):
            return False
        if any(token.single_word for token in self._tokenizer.added_tokens.values()):
            return False
        try:
            steps = [json.loads(s.__getstate__()) for s in (backend.normalizer, backend.pre_tokenizer) if s is not None]
        except Exception:  # steps written in Python cannot be read
            return False
        return all(self._step_is_piecewise(step) for step in _steps(steps))

    @staticmethod
    def _step_is_piecewise(step: dict[str, Any]) -> bool:
        return step["type"] in _PIECEWISE_STEPS and step.get("prepend_scheme") != "first"

    @cached_property
    def _cuts(self) -> dict[int, str]:
        """Added tokens behind which a text may be cut."""
        return {
            token_id: token.content
            for token_id, token in self._tokenizer.added_tokens.items()
            if token.content and not (token.normalized or token.rstrip or re.search(r"\s", token.content))
        }

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(any_of(self._cuts.values()))

    @cached_property
    def _beginnings(self) -> dict[str, list[str]]:
        """What added tokens begin with, up to letters that end a text at a cut, by that letter."""
        found: dict[str, set[str]] = {content[-1]: set() for content in self._cuts.values()}
        for token in self._tokenizer.added_tokens.values():
            for size, letter in enumerate(token.content[:-1], 1):
                if letter in found:
                    found[letter].add(token.content[:size])
        return {letter: sorted(texts) for letter, texts in found.items()}


def _common_start(texts: list[str]) -> str:
    low, high = 0, min(map(len, texts))
    while low < high:
        middle = (low + high + 1) // 2
        if all(text.startswith(texts[0][:middle]) for text in texts):
            low = middle
        else:
            high = middle - 1
    return texts[0][:low]


def _steps(value: Any) -> Iterator[dict[str, Any]]:
    """All steps in the description of a pipeline, parts of steps included."""
    if isinstance(value, dict):
        if isinstance(value.get("type"), str):
            yield value
        for item in value.values():
            yield from _steps(item)
    elif isinstance(value, list):
        for item in value:
            yield from _steps(item)
