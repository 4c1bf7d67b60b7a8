"""Log-probabilities as callers read them: mappings by token, made of what the engine core tells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import overload

from vllm.outputs import Logprob, TokenLogprobs
from vllm.step import PositionLogprobs
from vllm.transformers_utils.tokenizer import Tokenizer

_ID_BYTES, _VALUE_BYTES = 4, 8
_RANK = Struct("I")


class LogprobRows(Sequence[TokenLogprobs]):
    """Those of some positions, one behind the other. The mapping of a position is made when it is read.

    A step of 256 requests draws more than a thousand log-probabilities, and a long prompt has some hundred thousand. An
    object for each would take longer than the step does on a GPU, and hold up an event loop: whoever needs all of a
    prompt's reads them in a thread.
    """

    __slots__ = ("_ids", "_logprobs", "_ranks", "_token_ids", "_tokenizer", "_values", "_width")

    def __init__(self, tokenizer: Tokenizer, positions: PositionLogprobs | None = None) -> None:
        self._tokenizer = tokenizer
        self._token_ids, self._logprobs, self._ranks = bytearray(), bytearray(), bytearray()
        self._width = 0
        self._ids, self._values = Struct(""), Struct("")
        if positions is not None:
            self.append(positions)

    def append(self, positions: PositionLogprobs) -> None:
        """Takes in the positions behind; all positions have as many tokens."""
        width = positions.width
        if width != self._width:
            self._width, self._ids, self._values = width, Struct(f"{width}I"), Struct(f"{width}d")
        self._token_ids += positions.token_ids
        self._logprobs += positions.logprobs
        self._ranks += positions.ranks

    def copy(self) -> LogprobRows:
        """The same positions, whatever comes behind them later."""
        parts = map(bytes, (self._token_ids, self._logprobs, self._ranks))
        return LogprobRows(self._tokenizer, PositionLogprobs(self._width, *parts))

    @property
    def num_entries(self) -> int:
        """Log-probabilities in all."""
        return len(self._token_ids) // _ID_BYTES

    def __len__(self) -> int:
        return len(self._ranks) // _ID_BYTES

    @overload
    def __getitem__(self, index: int) -> TokenLogprobs: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenLogprobs]: ...
    def __getitem__(self, index: int | slice) -> TokenLogprobs | list[TokenLogprobs]:
        places = range(len(self))[index]
        return self.at(places) if isinstance(places, int) else [self.at(place) for place in places]

    def at(self, index: int) -> TokenLogprobs:
        """The chosen token at one of the positions, then the most likely ones by rank."""
        first, text = index * self._width, self._tokenizer.token_text
        ids = self._ids.unpack_from(self._token_ids, first * _ID_BYTES)
        values = self._values.unpack_from(self._logprobs, first * _VALUE_BYTES)
        chosen = ids[0]
        entry = {chosen: Logprob(values[0], _RANK.unpack_from(self._ranks, index * _ID_BYTES)[0], text(chosen))}
        for i in range(1, len(ids)):
            token_id = ids[i]
            if token_id != chosen:
                entry[token_id] = Logprob(values[i], i, text(token_id))
        return entry


class PromptLogprobs(Sequence[TokenLogprobs | None]):
    """Those of a prompt, None for its first token."""

    def __init__(self, positions: PositionLogprobs, tokenizer: Tokenizer) -> None:
        self._rows = LogprobRows(tokenizer, positions)

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
