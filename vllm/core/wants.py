"""What a request wants to have pinned."""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import NamedTuple

from vllm.config import SystemPromptConfig
from vllm.core.pinned_prompt import Outcome, PinClass, PinnedPrompt
from vllm.core.prompt_index import EVERYBODY
from vllm.inputs import CacheMark
from vllm.sequence import Sequence

_CLASS_OF_MARKERS = {"soft": PinClass.SOFT, "hard": PinClass.HARD}


@dataclass(frozen=True)
class Want:
    """A prefix of a request that is to be pinned: its first `num_tokens` tokens.

    Attributes:
        reused: It is known to be no newcomer: an operator's, or one that several requests have shared.
    """

    num_tokens: int
    pin: PinClass
    ttl: float | None
    source: str
    scope: bytes
    reused: bool = False


class Decision(NamedTuple):
    """What would happen to a request.

    Attributes:
        known: Pinned or coming prefixes that it may read, shortest first; one token is left to compute.
        creates: Prefixes to compute into the pool for it, shortest first.
        refused: Prefixes that cannot be, and why.
    """

    known: list[PinnedPrompt]
    creates: list[Want]
    refused: list[tuple[Want, Outcome]]

    @property
    def num_pinned_tokens(self) -> int:
        """Tokens that it would read from extents of the pool."""
        ends = [p.num_tokens for p in self.known[-1:]] + [w.num_tokens for w in self.creates[-1:]]
        return max(ends, default=0)


def wants_of(
    config: SystemPromptConfig, seq: Sequence, num_system_tokens: int | None, marks: Several[CacheMark]
) -> list[Want]:
    """Prefixes that a request asks to have pinned, shortest first.

    Everything up to the end of the system part is pinned like any system prompt; a mark there can only make it last
    longer. What is marked beyond it is the client's own and is read in its namespace alone.
    """
    wants: dict[int, Want] = {}
    system = num_system_tokens or 0
    private = seq.tenant if config.private else EVERYBODY
    if system:
        wants[system] = Want(system, PinClass.AUTOMATIC, config.ttl, "auto", private)
    marked = _CLASS_OF_MARKERS.get(config.markers, PinClass.SOFT)
    for mark in marks if config.markers != "off" else ():
        if mark.num_tokens <= system:
            pin, ttl = max(marked, PinClass.AUTOMATIC), longer(config.ttl, mark.ttl)
            source = "auto" if mark.num_tokens == system else "marker"
            wants[mark.num_tokens] = Want(mark.num_tokens, pin, ttl, source, private)
        else:
            wants[mark.num_tokens] = Want(mark.num_tokens, marked, mark.ttl, "marker", seq.namespace)
    return [wants[n] for n in sorted(wants) if 0 < n < seq.num_prompt_tokens]


def longer(a: float | None, b: float | None) -> float | None:
    """The longer of two ttls, None being without end."""
    return None if a is None or b is None else max(a, b)
