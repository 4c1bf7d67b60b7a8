"""Log-probabilities as callers read them: mappings by token, made of what the engine core tells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

from vllm.outputs import Logprob, TokenLogprobs
from vllm.step import PositionLogprobs
from vllm.transformers_utils.tokenizer import Tokenizer


class LogprobRows:
    """The numbers of some positions, read one position at a time."""

    def __init__(self, positions: PositionLogprobs, tokenizer: Tokenizer) -> None:
        self._width = positions.width
        self._token_ids = memoryview(positions.token_ids).cast("I")
        self._logprobs = memoryview(positions.logprobs).cast("d")
        self._ranks = memoryview(positions.ranks).cast("I")
        self._text = tokenizer.token_text

    def __len__(self) -> int:
        return len(self._ranks)

    @property
    def num_entries(self) -> int:
        """Log-probabilities in all."""
        return len(self._logprobs)

    def at(self, index: int) -> TokenLogprobs:
        """The chosen token at one of the positions, then the most likely ones by rank."""
        first, text = index * self._width, self._text
        ids = self._token_ids[first : first + self._width].tolist()
        values = self._logprobs[first : first + self._width].tolist()
        chosen = ids[0]
        entry = {chosen: Logprob(values[0], self._ranks[index], text(chosen))}
        for i in range(1, len(ids)):
            token_id = ids[i]
            if token_id != chosen:
                entry[token_id] = Logprob(values[i], i, text(token_id))
        return entry

    def chosen(self) -> list[float]:
        """Log-probability of the chosen token at each position."""
        return [float(value) for value in self._logprobs[:: self._width]]


class PromptLogprobs(Sequence[TokenLogprobs | None]):
    """Those of a prompt, None for its first token. Each mapping is made when it is read.

    A long prompt has some hundred thousand entries. To make them all takes a good part of a second, for which an event
    loop has no time: whoever needs them reads them in a thread.
    """

    def __init__(self, positions: PositionLogprobs, tokenizer: Tokenizer) -> None:
        self._rows = LogprobRows(positions, tokenizer)

    @property
    def num_entries(self) -> int:
        """Log-probabilities in all."""
        return self._rows.num_entries

    def __len__(self) -> int:
        return len(self._rows) + 1

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
        return None if place == 0 else self._rows.at(place - 1)
