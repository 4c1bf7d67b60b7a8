"""Keeps control tokens that a user merely spells from becoming control tokens.

A chat template writes markers such as `<|im_end|>` around what people say, and the tokenizer turns the spelling into
the marker's token wherever it stands. Someone who writes `<|im_end|>` into a message would so end it and speak in
another role. Hence, when an input spells such a token, the spot is wrapped in two characters that occur nowhere in the
inputs, the chat is rendered with them, and the rendered text is cut at those tokens alone that the template wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import tokenizers

from vllm.exceptions import VLLMValidationError
from vllm.transformers_utils.tokenizer import Tokenizer, encode_text

_MARK_CANDIDATES = range(0xF0000, 0xFFFFE)
"""Private-use characters of plane 15: no font, no script, hardly ever in a text; chosen anew for each request."""

_MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)
_PLAIN_TAG = re.compile(r"</?\w+>")
_USUAL_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


_Messages = list[dict[str, Any]]


class Marks(NamedTuple):
    """The two characters that enclose a spot of user text."""

    start: str
    end: str

    def strip(self, text: str) -> str:
        return text.replace(self.start, "").replace(self.end, "")


class ControlTokens:
    """Which tokens of a tokenizer only a given template may write, and how to encode text in which users spell them.

    Guarded are all control tokens, and of the other added tokens the bracketed ones that the template writes (some
    models have role markers that are not declared as control tokens). One exception: plain tags such as `<think>` or
    `<tool_call>` that are not declared as control tokens stay tokens in assistant messages, where the model itself
    wrote them.
    """

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        added = tokenizer.added_tokens
        self._id_of = {token.content: token_id for token_id, token in added.items() if token.content}
        guarded = {
            token.content
            for token in added.values()
            if token.content and (token.special or (_MARKUP.fullmatch(token.content) and token.content in template))
        }
        # The token for unknown characters is what plain text may well yield.
        self._guarded_ids = {self._id_of[content] for content in guarded} - {tokenizer.hf.unk_token_id}
        self._tags = {t.content for t in added.values() if not t.special and _PLAIN_TAG.fullmatch(t.content)}
        self._guarded = re.compile(any_of(guarded))
        self._added = re.compile(any_of(self._id_of))

    def mark(self, messages: _Messages, *others: Any) -> tuple[Marks, _Messages, list[Any]] | None:
        """Returns the inputs of a template with marks around what users spell, or None if there is nothing to mark."""
        if not self._needs_marks(messages, others):
            return None
        marks = _unused_marks([messages, others])
        return marks, [self._mark_message(m, marks) for m in messages], [self._mark_value(v, marks) for v in others]

    def encode_marked(self, marked: str, marks: Marks, add_special_tokens: bool) -> list[int]:
        """Token ids of a rendered chat: what lies between marks is text, whatever it spells.

        Raises:
            VLLMValidationError: this tokenizer has no way of writing such a spelling as text.
        """
        text, spans = _locate(marked, marks)
        ids = self._join(text, spans) if self._joining_is_exact else None
        if ids is None:
            spelled = next((text[a:b] for a, b in spans if self._guarded.search(text[a:b])), "a control token")
            raise VLLMValidationError(
                f"The messages spell {spelled!r}, a control token of this model, which its tokenizer cannot encode as "
                "plain text. Remove or alter it.",
                "messages",
            )
        if not add_special_tokens:
            return ids
        before, after = self._ends
        return before + ids + after

    def _needs_marks(self, messages: list[dict[str, Any]], others: Any) -> bool:
        if any(self._guarded.search(text) for text in _strings([messages, others])):
            return True
        return any(self._is_odd_role(m.get("role")) or self._spells_across_parts(m) for m in messages)

    def _mark_message(self, message: dict[str, Any], marks: Marks) -> dict[str, Any]:
        exempt = self._tags if message.get("role") == "assistant" else frozenset()
        marked = {key: self._mark_value(value, marks, exempt) for key, value in message.items()}
        if self._is_odd_role(message.get("role")):
            marked["role"] = _enclose(message["role"], marks)
        if self._spells_across_parts(message):
            marked["content"] = [{**part, "text": _enclose(part["text"], marks)} for part in message["content"]]
        return marked

    def _mark_value(self, value: Any, marks: Marks, exempt: Iterable[str] = ()) -> Any:
        def replace(match: re.Match[str]) -> str:
            return match[0] if match[0] in exempt else _enclose(match[0], marks)

        return _map_strings(value, lambda text: self._guarded.sub(replace, text))

    def _is_odd_role(self, role: Any) -> bool:
        """A role that neither is usual nor known to the template could complete a marker built from it."""
        if not isinstance(role, str) or role in _USUAL_ROLES:
            return False
        return f"'{role}'" not in self._template and f'"{role}"' not in self._template

    def _spells_across_parts(self, message: dict[str, Any]) -> bool:
        parts = message.get("content")
        if not isinstance(parts, list) or len(parts) < 2:
            return False
        return self._guarded.search("".join(part["text"] for part in parts)) is not None

    def _join(self, text: str, spans: list[tuple[int, int]]) -> list[int] | None:
        """Encodes the pieces between the added tokens that no span touches; None if a piece yields a guarded token."""
        ids: list[int] = []
        done = 0
        ahead = iter(sorted(spans))
        span = next(ahead, None)
        for match in self._added.finditer(text):
            while span is not None and span[1] <= match.start():
                span = next(ahead, None)
            if span is not None and span[0] < match.end():
                continue
            token_id = self._id_of[match[0]]
            token = self._tokenizer.added_tokens[token_id]
            piece = text[done : match.start()]
            if not self._append_piece(ids, piece.rstrip() if token.lstrip else piece):
                return None
            ids.append(token_id)
            done = match.end()
            while token.rstrip and text[done : done + 1].isspace():
                done += 1
        return ids if self._append_piece(ids, text[done:]) else None

    def _append_piece(self, ids: list[int], piece: str) -> bool:
        new = encode_text(self._without_added, piece, add_special_tokens=False) if piece else []
        ids += new
        return self._guarded_ids.isdisjoint(new)

    @cached_property
    def _without_added(self) -> tokenizers.Tokenizer:
        """The same model (shared, not copied) without added tokens."""
        backend = self._tokenizer.backend
        plain = tokenizers.Tokenizer(backend.model)
        if backend.normalizer is not None:
            plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            plain.pre_tokenizer = backend.pre_tokenizer
        return plain

    @cached_property
    def _joining_is_exact(self) -> bool:
        """Whether encoding piece by piece gives what encoding the whole gives, tried on a sample.

        It does where pieces are independent (byte-level BPE); not where the tokenizer treats the start of a text in a
        way of its own.
        """
        if any(token.single_word for token in self._tokenizer.added_tokens.values()):
            return False
        usual = [content for content in self._id_of if content in self._template]
        names = usual or list(self._id_of)[:8]
        fillers = ("user\n", " x", "\n\n y 1 ", "")
        sample = "Hello 12" + "".join(name + filler for name in names for filler in fillers)
        return self._join(sample, []) == self._tokenizer.encode(sample, add_special_tokens=False)

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """What `add_special_tokens` puts before and after a text."""
        bare = self._tokenizer.encode("a", add_special_tokens=False)
        full = self._tokenizer.encode("a", add_special_tokens=True)
        at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        return full[:at], full[at + len(bare) :]


def any_of(words: Iterable[str]) -> str:
    """A regular expression for the longest of many literal words; tries letter by letter, not word by word."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}
    return _branches(root) if root else "(?!)"


def _branches(node: dict[str, Any]) -> str:
    options = [re.escape(letter) + _branches(rest) for letter, rest in node.items() if letter]
    if not options:
        return ""
    return f"(?:{'|'.join(options)})" + ("?" if "" in node else "")


def _enclose(text: str, marks: Marks) -> str:
    return marks.start + text + marks.end


def _unused_marks(inputs: Any) -> Marks:
    used = {letter for text in _strings(inputs) for letter in set(text) if ord(letter) in _MARK_CANDIDATES}
    free = (chr(code) for code in _MARK_CANDIDATES if chr(code) not in used)
    return Marks(next(free), next(free))


def _locate(marked: str, marks: Marks) -> tuple[str, list[tuple[int, int]]]:
    """Removes the marks; returns the text and the spans that they enclosed.

    A template may have cut a pair apart; what stands beside a lone mark counts as enclosed.
    """
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    at, opened = 0, None
    for piece in re.split(f"([{marks.start}{marks.end}])", marked):
        if piece == marks.start:
            if opened is not None:
                spans.append((opened, opened + 1))
            opened = at
        elif piece == marks.end:
            spans.append((max(at - 1, 0), at) if opened is None else (opened, at))
            opened = None
        else:
            pieces.append(piece)
            at += len(piece)
    if opened is not None:
        spans.append((opened, opened + 1))
    return "".join(pieces), spans


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value
