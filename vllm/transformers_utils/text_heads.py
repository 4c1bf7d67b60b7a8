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
from vllm.transformers_utils.word_gaps import WordGaps, steps_of

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
    """A beginning of texts, in which a token ends for certain; what follows that place is tokenised for each text.

    Attributes:
        text: The beginning.
        token_ids: Tokens up to the place.
        start: Where in a text begins what is tokenised.
        num_lead_tokens: How many of its first tokens come before the place; they are left out.
    """

    text: str
    token_ids: list[int]
    start: int
    num_lead_tokens: int = 0

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

    Where no added token stands near the end, as in templates that put the system text into the user's turn, a text is
    cut inside a stretch, at a gap between words (see `WordGaps`). There the letter before the cut is tokenised with
    what follows, so that this does not begin a stretch, and the letter's own tokens are left out again. Such a cut is
    certain because of what stands behind it, which therefore belongs to the head.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._gaps = WordGaps(tokenizer)

    def common(self, texts: list[str]) -> TextHead | None:
        """The longest head of all `texts` that is certain; None if there is none."""
        shared = _common_start(texts)
        behind_added = next(self._ends(shared), 0)
        for place in self._gaps.latest(shared):
            if place < behind_added:
                break
            num_lead_tokens = len(self._encode(shared[place - 1]))
            head = TextHead(shared, self._encode(shared[:place]), place - 1, num_lead_tokens)
            if self.encode(head, texts[0]) == self._encode(texts[0]):
                return head
            break  # what should be certain is not
        for end in self._ends(shared):
            head = TextHead(shared[:end], self._encode(shared[:end]), end)
            if self._is_exact(head, texts):
                return head
        return None

    def encode(self, head: TextHead, text: str) -> list[int]:
        """Token ids of a text that starts with `head`, without those that only frame a text."""
        return head.token_ids + self._encode(text[head.start :])[head.num_lead_tokens :]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

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
        mark = TextHead(last, head.token_ids[-1:], len(last))
        trials = [(head, texts[0]), *((mark, last + text[len(head.text) :]) for text in texts[1:])]
        return all(self.encode(h, text) == self._encode(text) for h, text in trials)

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
        return all(self._step_is_piecewise(step) for step in steps_of(steps))

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
