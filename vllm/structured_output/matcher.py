"""One output on its way through a grammar, and the limit of what it may cost the engine."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from vllm.structured_output.grammars import Grammar

# CPU time that the matching of a request may take, in seconds: so much at first, and so much more a token of any of its
# outputs. A JSON schema takes 0.1 ms a token; an ambiguous grammar takes more the longer the output gets, without end.
_FREE_S = 0.05
_PER_TOKEN_S = 0.001

TOO_COSTLY = "takes too long to match: its grammar is too ambiguous or repeats too much; simplify it"


class MatchingCost:
    """What the matching of a request has cost, all its outputs together."""

    def __init__(self) -> None:
        self._spent_s = 0.0
        self._num_tokens = 0

    def charge(self, seconds: float, num_tokens: int = 0) -> None:
        self._spent_s += seconds
        self._num_tokens += num_tokens

    @property
    def is_too_much(self) -> bool:
        return self._spent_s > _FREE_S + _PER_TOKEN_S * self._num_tokens


class TokenMatcher:
    """Follows the tokens of one output.

    Args:
        cost: The request's account; None for one of its own.
        allowed: The only tokens that may come, as a row of a bitmask (see `fill`); None for all that it allows.
        stops: Likewise, tokens that end the output; where the grammar allows one, it may come if no allowed token can.

    Attributes:
        ended: Nothing may follow: a stop token came where the grammar allows it, or matching failed.
        error: Why it failed, or None.
        field: The request field that the error is about.
    """

    def __init__(
        self,
        grammar: Grammar,
        allowed: np.ndarray | None = None,
        stops: np.ndarray | None = None,
        cost: MatchingCost | None = None,
    ) -> None:
        self._path = grammar.start()
        self._allowed = [bits for bits in (allowed, stops) if bits is not None]
        self.field = "structured_outputs"
        self._cost = cost or MatchingCost()
        self._num_tokens = 0
        self.ended = False
        self.error: str | None = None

    def accept(self, token_id: int) -> None:
        """Takes in the token that was drawn."""
        if self.ended or self.error is not None:
            self.ended = True
            return
        self._num_tokens += 1
        started = time.thread_time()
        try:
            if not self._path.accept(token_id):
                self.error = f"could not be followed: token {token_id} was drawn, which its grammar forbids"
        except RuntimeError as error:
            self.error = f"could not be followed: {error}"
        self._charge(started, 1)
        self.ended = self.error is not None or self._path.is_over

    def fill(self, bitmask: np.ndarray, row: int) -> None:
        """Writes which tokens may come next.

        Args:
            bitmask: int32 [rows, ceil(vocab_size / 32)]; bit i % 32 of word i // 32 stands for token i.
        """
        if self.ended or self.error is not None:
            # What is drawn is not looked at any more.
            bitmask[row] = -1
            return
        if self._cost.is_too_much:
            self.error = TOO_COSTLY
            bitmask[row] = -1
            return
        started = time.thread_time()
        try:
            self._path.fill(bitmask, row)
        except RuntimeError as error:
            self.error = f"could not be followed: {error}"
            bitmask[row] = -1
        if self._allowed:
            self._intersect(bitmask[row])
        self._charge(started)

    def _intersect(self, words: np.ndarray) -> None:
        """Leaves the allowed tokens of a row; one that has none is left as it is, with an error."""
        for tokens in self._allowed:
            both = words & tokens
            if both.any():
                words[:] = both
                return
        self.field = "allowed_token_ids"
        self.error = (
            f"names none of the tokens that can follow in the structured outputs after {self._num_tokens} tokens"
        )

    def _charge(self, started: float, num_tokens: int = 0) -> None:
        self._cost.charge(time.thread_time() - started, num_tokens)
        if self._cost.is_too_much:
            self.error = TOO_COSTLY


def token_bits(token_ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """A row of a bitmask with these tokens; int32 [ceil(vocab_size / 32)]."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[np.fromiter(token_ids, np.int64)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
