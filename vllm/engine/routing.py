"""Which of several engines serves a request: the one where it will be done first, so mostly one that has its prompt.

An engine that has a system prompt of 8,192 tokens saves a request 200 ms of computing it; one that is idle saves it the
wait behind others. Both are counted in tokens to compute. Balancing by queue length alone, as routers do that do not
know the prompts, has every engine compute and keep every prompt.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from vllm.token_ids import TokenIds

current_engine: ContextVar[int | None] = ContextVar("current_engine", default=None)
"""The engine that a client names for its request (`X-data-parallel-rank`); None leaves it to the router."""

# What lies behind a system prompt is known by pieces of so many tokens.
_PIECE = 256
_MOST_PREFIXES = 1 << 16
# One more running output delays the others by as much as the prefill of so many tokens does: on an H100, 0.03 ms in
# each of some hundred steps, against 40,000 tokens a second.
_TOKENS_OF_AN_OUTPUT = 100


@dataclass(frozen=True)
class Prefix:
    """A beginning of a prompt, as engines share its KV.

    Attributes:
        digest: Equal for equal tokens of those who share.
        num_tokens: Its length.
    """

    digest: bytes
    num_tokens: int


def prefixes(
    token_ids: TokenIds, num_system_tokens: int | None, system_scope: str | None, scope: tuple[str | None, str | None]
) -> list[Prefix]:
    """The beginnings of a prompt by which it is known again, the shortest first.

    Args:
        num_system_tokens: Length of the system prompt at its head.
        system_scope: Who shares system prompts; None for all.
        scope: Who shares what comes behind them.
    """
    found, done = [], num_system_tokens or 0
    chain = hashlib.sha256(repr(system_scope).encode())
    if done:
        chain.update(token_ids[:done].tobytes())
        found.append(Prefix(chain.digest(), done))
    chain.update(repr(scope).encode())
    for end in range(done + _PIECE, len(token_ids) + 1, _PIECE):
        chain.update(token_ids[end - _PIECE : end].tobytes())
        found.append(Prefix(chain.digest(), end))
    return found


class EngineLoad:
    """What an engine has to do, and which beginnings of prompts it has seen.

    Attributes:
        waiting_tokens: Prompt tokens that it has to compute for requests that wait for their first token.
        num_outputs: Outputs that run or wait.
        is_open: It takes requests.
    """

    def __init__(self) -> None:
        self.waiting_tokens = 0
        self.num_outputs = 0
        self.is_open = True
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def num_known(self, wanted: Sequence[Prefix]) -> int:
        """Tokens of a prompt that it has most likely computed already."""
        return next((prefix.num_tokens for prefix in reversed(wanted) if prefix.digest in self._seen), 0)

    def note(self, served: Iterable[Prefix]) -> None:
        """It gets a request with these beginnings, and has them from now on."""
        for prefix in served:
            self._seen[prefix.digest] = None
            self._seen.move_to_end(prefix.digest)
        while len(self._seen) > _MOST_PREFIXES:
            self._seen.popitem(last=False)

    def forget(self) -> None:
        """Another process has taken its place."""
        self._seen.clear()

    def cost(self, num_tokens: int, wanted: Sequence[Prefix]) -> int:
        """Tokens to compute until it has done a prompt of so many tokens, work that is there already counted in."""
        own = max(1, num_tokens - self.num_known(wanted))
        return self.waiting_tokens + own + _TOKENS_OF_AN_OUTPUT * self.num_outputs


class Router:
    """Picks engines.

    Args:
        loads: One for each engine; the owner keeps them up to date.
    """

    def __init__(self, loads: Sequence[EngineLoad]) -> None:
        self._loads = loads
        self._latest = 0

    def pick(self, num_tokens: int, wanted: Sequence[Prefix]) -> int:
        """The engine for a prompt of so many tokens; of equal ones the one that was picked longest ago, and of closed
        ones any, which says why it is closed."""
        picked = min(
            self._in_turn(), key=lambda i: (not self._loads[i].is_open, self._loads[i].cost(num_tokens, wanted))
        )
        self._latest = picked
        return picked

    def _in_turn(self) -> Iterator[int]:
        count = len(self._loads)
        return ((self._latest + 1 + i) % count for i in range(count))
