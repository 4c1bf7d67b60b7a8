"""Log-probabilities as callers read them: mappings by token, made of what the engine core tells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from vllm.outputs import Logprob, TokenLogprobs
from vllm.step import PositionLogprobs
from vllm.transformers_utils.tokenizer import Tokenizer


def logprobs_at(positions: PositionLogprobs, index: int, tokenizer: Tokenizer) -> TokenLogprobs:
    """The chosen token at one of the positions, then the most likely ones by rank."""
    ids, values, text = positions.token_ids[index], positions.logprobs[index], tokenizer.token_text
    chosen, rank = ids[0], positions.ranks[index]
    entry = {chosen: Logprob(values[0], rank, text(chosen))}
    for i in range(1, len(ids)):
        token_id = ids[i]
        if token_id != chosen:
            entry[token_id] = Logprob(values[i], i, text(token_id))
    return entry


class PromptLogprobs(Sequence[TokenLogprobs | None]):
    """Those of a prompt, None for its first token. Each mapping is made when it is read.

    A long prompt has some hundred thousand entries. To make them all takes a good part of a second, for which an event
    loop has no time: whoever needs them reads them in a thread.
    """

    def __init__(self, positions: PositionLogprobs, tokenizer: Tokenizer) -> None:
        self._positions = positions
        self._tokenizer = tokenizer

    @property
    def num_entries(self) -> int:
        """Log-probabilities in all."""
        rows = self._positions.token_ids
        return len(rows) * len(rows[0]) if rows else 0

    def __len__(self) -> int:
        return len(self._positions.token_ids) + 1

    def __iter__(self) -> Iterator[TokenLogprobs | None]:
        return map(self._at, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> TokenLogprobs | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenLogprobs | None]: ...
    def __getitem__(self, index: int | slice) -> TokenLogprobs | list[TokenLogprobs | None] | None:
        places = range(len(self))[index]
        return self._at(places) if isinstance(places, int) else [self._at(place) for place in places]

    def _at(self, place: int) -> TokenLogprobs | None:
        return None if place == 0 else logprobs_at(self._positions, place - 1, self._tokenizer)
