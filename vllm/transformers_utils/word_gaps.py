"""Places between two letters of a text where tokens end, whatever stands elsewhere in the text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from typing import Any

from vllm.transformers_utils.tokenizer import Tokenizer

_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_ANY_WORDS = rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|%s"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_WORDS = frozenset(
    {
        rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+",  # GPT-2
        _ANY_WORDS % r"\p{N}{1,3}",  # GPT-4, Llama 3
        _ANY_WORDS % r"\p{N}",  # Qwen
        _CASED_WORDS % (f"(?i:{_CONTRACTIONS})?", f"(?i:{_CONTRACTIONS})?", r"\p{N}{1,3}"),  # GPT-4o, gpt-oss
        _CASED_WORDS % ("", "", r"\p{N}"),  # Mistral's Tekken
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""  # DeepSeek V3
        rf"[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
    }
)
"""How well-known tokenizers cut texts into words.

In all of these a match holds a space first or among white space alone; on a letter follow in it letters, their marks
and contractions alone; and a trial reads on only while it matches, and one letter more. So no match reaches across one
of `_WORD_GAPS`, those before it do not depend on what follows it, and the next one starts there.
"""
_RUNS = frozenset({r"\p{N}{1,3}", r"\p{N}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"})
"""Runs of letters that some set apart before: they neither hold such a gap nor look beyond their own letters."""
_WORD_GAPS = re.compile(
    "(?<=[!-~\u00c0-\u058f\u3001-\ud7a3\uff01-\uff5e])(?= )"
    "|(?<=[A-Za-z\u4e00-\u9fa5])(?=[\\n.,:;!?\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])"
)
_ANY_GAPS = re.compile(r"(?<=\S)(?=.)", re.DOTALL)
_MAX_CHARS = 256
"""How far back from the end of a text gaps are looked for."""
_MAX_TRIES = 64


class WordGaps:
    """Finds places where a text of a BPE tokenizer may be cut, inside the stretches between its added tokens.

    There are two reasons for which tokens end at a place for certain, and those on one side do not depend on the other
    side. Either the tokenizer cuts a stretch into words first, by a pattern that is known to end a word there. Or it
    merges the whole stretch, but no token of its vocabulary holds the two letters beside the place next to each other:
    then no merge ever reaches across, and merges on one side leave the other alone. Unigram tokenizers have no such
    places: which of two equally likely splits they take depends on how the sum is rounded, so on all that went before.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = [token.content for token in tokenizer.added_tokens.values() if token.content]
        self._is_never_one: Callable[[str], bool] = lru_cache(maxsize=4096)(self._find_no_token)

    def latest(self, text: str) -> Iterator[int]:
        """Such places in a text that goes on in ways unknown, latest first; not all of them."""
        if not self._is_usable:
            return
        pattern = _WORD_GAPS if self._has_words else _ANY_GAPS
        places = [match.start() for match in pattern.finditer(text, max(len(text) - _MAX_CHARS, 0))]
        for place in places[-_MAX_TRIES:][::-1]:
            is_certain = self._has_words or self._is_never_one(text[place - 1 : place + 1])
            if is_certain and not self._is_near_added(text, place):
                yield place

    def _find_no_token(self, pair: str) -> bool:
        """Whether these two letters stand next to each other in no token but added ones."""
        for letter, replacement in self._replaced:
            pair = pair.replace(letter, replacement)
        # A letter that is no token becomes bytes, or one unknown token with its neighbours.
        if "\0" in pair or any(self._tokenizer.backend.model.token_to_id(letter) is None for letter in pair):
            return False
        return pair not in self._vocabulary

    def _is_near_added(self, text: str, place: int) -> bool:
        """Whether an added token ends at a place, or could reach across it."""
        before, after = text[place - 1], text[place:]

        def may_cross(content: str, size: int) -> bool:
            rest = content[size:]
            return text.endswith(content[:size], 0, place) and (after.startswith(rest) or rest.startswith(after))

        return any(
            content[size - 1] == before and may_cross(content, size)
            for content in self._added
            if before in content
            for size in range(1, len(content) + 1)
        )

    @cached_property
    def _is_usable(self) -> bool:
        """Whether anything at all is certain."""
        backend = self._tokenizer.backend
        model: Any = backend.model
        if type(model).__name__ != "BPE" or model.dropout or backend.encode_special_tokens:
            return False
        if model.continuing_subword_prefix or model.end_of_word_suffix or self._steps is None:
            return False
        first, second = self._steps
        if not all(_is_local(step, self._has_words) for step in first + second):
            return False
        changes_text = any(step["type"] != "Sequence" for step in first)
        added = self._tokenizer.added_tokens.values()
        if any(token.single_word or (token.normalized and changes_text) for token in added):
            return False
        if self._has_words:  # the pattern must see what stands in the text
            return not self._replaced
        return all(step["type"] not in ("ByteLevel", "NFC") for step in first + second)

    @cached_property
    def _steps(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]] | None:
        """Steps of the normalizer and of the pre-tokenizer; None where they cannot be read."""
        backend = self._tokenizer.backend
        try:
            parts = [s and json.loads(s.__getstate__()) for s in (backend.normalizer, backend.pre_tokenizer)]
        except Exception:  # written in Python
            return None
        return list(steps_of(parts[0])), list(steps_of(parts[1]))

    @cached_property
    def _has_words(self) -> bool:
        """Stretches are cut into words first."""
        for step in self._steps[1] if self._steps else []:
            if step["type"] == "ByteLevel":  # spells letters anew: patterns no longer see them
                return bool(step["use_regex"])
            if _pattern(step).get("Regex") in _WORDS:
                return True
        return False

    @cached_property
    def _replaced(self) -> list[tuple[str, str]]:
        """Letters of a text, and what stands for them in the vocabulary."""
        found = []
        for step in [*self._steps[0], *self._steps[1]] if self._steps else []:
            if step["type"] == "Replace":
                found.append((_pattern(step)["String"], step["content"]))
            elif step["type"] == "Metaspace":
                found.append((" ", step["replacement"]))
        return found

    @cached_property
    def _vocabulary(self) -> str:
        return "\0".join(self._tokenizer.backend.get_vocab(with_added_tokens=False))


def steps_of(value: Any) -> Iterator[dict[str, Any]]:
    """All steps in the description of a pipeline, parts of steps included."""
    if isinstance(value, dict):
        if isinstance(value.get("type"), str):
            yield value
        for item in value.values():
            yield from steps_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from steps_of(item)


def _is_local(step: dict[str, Any], has_words: bool) -> bool:
    """Whether what a step does to the letters on one side of a gap does not depend on the other side."""
    pattern = _pattern(step)
    match step["type"]:
        case "Replace":
            return len(pattern.get("String", "")) == len(step["content"]) == 1
        case "Split" if "Regex" in pattern:
            is_known = has_words and pattern["Regex"] in _WORDS | _RUNS
            return is_known and step["behavior"] == "Isolated" and not step["invert"]
        case "Split":
            return len(pattern.get("String", "")) == 1
        case kind:
            return kind in ("ByteLevel", "Metaspace", "NFC", "Prepend", "Sequence")


def _pattern(step: dict[str, Any]) -> dict[str, str]:
    """What a step looks for: `String`, or `Regex` with its line ends spelled."""
    pattern = step.get("pattern")
    if not isinstance(pattern, dict):
        return {}
    return {
        kind: text.replace("\r", r"\r").replace("\n", r"\n") if kind == "Regex" else text
        for kind, text in pattern.items()
    }
