"""Notices system prompts that differ only in a short span, such as a date or a counter.

Each of them is pinned for itself, where one could serve them all if the span came after it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from vllm.core.prefix_tree import common_prefix_len, common_suffix_len
from vllm.outputs import VaryingSpanInfo
from vllm.token_ids import TokenIds

_MIN_TOKENS = 32
_MAX_SPAN = 24
_RECENT = 64
_MAX_TEMPLATES = 64
_MAX_EXAMPLES = 3
_MAX_COUNTED = 4096
_CONTEXT = 12
# A window of a prompt is so many tokens, this far from an end. A short span touches at most one of the two windows, in
# prompts that are not shorter than this.
_WINDOW, _FROM_END, _WINDOWS_FROM = 8, 48, 136


@dataclass
class _Template:
    head: TokenIds
    tail: TokenIds
    span: VaryingSpanInfo
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.stem = _Prompt(self.head + self.tail)


class _Prompt:
    """Token ids, and two windows of them by which most of those that are not alike are told apart."""

    def __init__(self, token_ids: TokenIds) -> None:
        self.token_ids = token_ids
        count, end = len(token_ids), _FROM_END + _WINDOW
        self.head_window = token_ids[_FROM_END:end].tobytes()
        self.tail_window = token_ids[count - end : count - _FROM_END].tobytes() if count >= end else b""

    def may_be_alike(self, other: _Prompt) -> bool:
        """Whether two prompts may differ in a short span alone."""
        if self.head_window == other.head_window or self.tail_window == other.tail_window:
            return True
        return min(len(self.token_ids), len(other.token_ids)) < _WINDOWS_FROM


class VaryingPrompts:
    """Compares each new system prompt with the latest ones; what it keeps and does is bounded."""

    def __init__(self) -> None:
        self._recent: OrderedDict[str, _Prompt] = OrderedDict()
        self._templates: list[_Template] = []

    @property
    def spans(self) -> list[VaryingSpanInfo]:
        return [template.span for template in self._templates]

    def see(self, key: str, token_ids: TokenIds) -> VaryingSpanInfo | None:
        """Takes note of a prompt that is not pinned yet; returns the place where it varies if that is news."""
        if len(token_ids) < _MIN_TOKENS or key in self._recent:
            return None
        prompt = _Prompt(token_ids)
        for template in self._templates:
            if self._belongs(template, key, prompt):
                return None
        found = None
        for other in reversed(self._recent.values()):
            found = _compare(prompt, other)
            if found is not None:
                break
        self._recent[key] = prompt
        if len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        if found is None or len(self._templates) >= _MAX_TEMPLATES:
            return None
        self._templates.append(found)
        return found.span

    @staticmethod
    def _belongs(template: _Template, key: str, prompt: _Prompt) -> bool:
        """Whether a prompt is another case of a known template; its span then covers this one too."""
        found = template if prompt.token_ids == template.stem.token_ids else _compare(prompt, template.stem)
        if found is None:
            return False
        head, tail, token_ids = found.head, found.tail, prompt.token_ids
        span = template.span
        template.head, template.tail, template.stem = head, tail, found.stem
        span.position, span.before = len(head), head[-_CONTEXT:].tolist()
        span.num_shared = len(head) + len(tail)
        if key not in template.seen and len(template.seen) < _MAX_COUNTED:
            template.seen.add(key)
            span.num_prompts += 1
            if len(span.examples) < _MAX_EXAMPLES:
                span.examples.append(token_ids[len(head) : len(token_ids) - len(tail)].tolist())
        return True


def _compare(one: _Prompt, other: _Prompt) -> _Template | None:
    """The template of two prompts; None if they differ in more than a short span, or not at all."""
    if not one.may_be_alike(other):
        return None
    a, b = one.token_ids, other.token_ids
    shorter = min(len(a), len(b))
    if abs(len(a) - len(b)) > _MAX_SPAN:
        return None
    head = common_prefix_len(a, b)
    tail = min(common_suffix_len(a, b), shorter - head)
    longest_span = max(len(a), len(b)) - head - tail
    if not 0 < longest_span <= _MAX_SPAN or head + tail < 3 * shorter // 4:
        return None
    examples = [tokens[head : len(tokens) - tail].tolist() for tokens in (b, a)]
    span = VaryingSpanInfo(head, a[max(0, head - _CONTEXT) : head].tolist(), examples, 2, head + tail)
    return _Template(a[:head], a[len(a) - tail :], span)
