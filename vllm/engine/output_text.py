"""Text of one output while it grows, cut at the first stop string."""

from __future__ import annotations

from copy import copy

from vllm.sampling_params import SamplingParams
from vllm.transformers_utils.detokenizer import incremental_detokenizer
from vllm.transformers_utils.tokenizer import Tokenizer

# The end of the text that is kept apart from the rest is at least this long, and at most twice as long. Appending to
# it copies it, which the whole text is too long for.
_TAIL_CHARS = 1024


class OutputText:
    """Text of one output.

    Attributes:
        stop_string: The stop string that was found, or None.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.stop_string: str | None = None
        self._params = params
        self._detokenizer = (
            incremental_detokenizer(tokenizer, prompt_token_ids, params.skip_special_tokens)
            if params.detokenize
            else None
        )
        self._stops = tuple(params.stop_strings)
        longest_stop = max(map(len, self._stops), default=0)
        # So many characters at the end may be the beginning of a stop string that is to be cut off.
        self._held_back = 0
        if self._stops and not params.include_stop_str_in_output:
            self._held_back = longest_stop - 1
        self._num_tokens = 0
        self._head: list[str] = []
        self._tail = ""
        self._tail_start = 0
        self._tail_chars = max(_TAIL_CHARS, longest_stop)
        self._searched = 0
        self._sent = 0

    def __len__(self) -> int:
        """Characters so far."""
        return self._tail_start + len(self._tail)

    @property
    def text(self) -> str:
        """All text so far, including what may yet turn out to be part of a stop string."""
        return self._from(0)

    def append(self, token_id: int, is_stop_token: bool, is_last: bool) -> None:
        """Takes in a token.

        Args:
            is_stop_token: The token ended the output; its text shows only with `include_stop_str_in_output`.
            is_last: No token follows.
        """
        if self._detokenizer is None:
            return
        self._num_tokens += 1
        if not is_stop_token or self._params.include_stop_str_in_output:
            self._tail += self._detokenizer.append(token_id)
        if is_last:
            self._tail += self._detokenizer.flush()
        if self._stops and self._num_tokens > self._params.min_tokens and self._ends_in_stop():
            self._find_stop()
        self._searched = len(self)
        if len(self._tail) > 2 * self._tail_chars:
            self._settle()

    def end(self) -> None:
        """No token follows after all."""
        if self._detokenizer is not None:
            self._tail += self._detokenizer.flush()

    def fork(self) -> OutputText:
        """A copy that goes on by itself."""
        twin = copy(self)
        twin._head = list(self._head)
        twin._detokenizer = None if self._detokenizer is None else self._detokenizer.fork()
        return twin

    def take_delta(self, finished: bool) -> str:
        """Text that is certain and has not been taken."""
        end = len(self) if finished else max(self._sent, len(self) - self._held_back)
        delta = self._from(self._sent)[: end - self._sent]
        self._sent = end
        return delta

    def visible(self, finished: bool) -> str:
        """All text that is certain."""
        return self.text if finished else self.text[: max(0, len(self) - self._held_back)]

    def _from(self, start: int) -> str:
        """The text from a position on."""
        if start >= self._tail_start:
            return self._tail[start - self._tail_start :]
        return ("".join(self._head) + self._tail)[start:]

    def _settle(self) -> None:
        """Moves all but the end of the tail to the head, which stop strings no longer reach."""
        settled = len(self._tail) - self._tail_chars
        self._head.append(self._tail[:settled])
        self._tail = self._tail[settled:]
        self._tail_start += settled

    def _ends_in_stop(self) -> bool:
        """Whether a stop string ends in the text that is new. It hardly ever does, and this is the fast way to tell."""
        ends = range(self._searched + 1 - self._tail_start, len(self._tail) + 1)
        return any(self._tail.endswith(self._stops, 0, end) for end in ends)

    def _find_stop(self) -> None:
        found: tuple[int, str] | None = None
        for stop in self._stops:
            at = self._tail.find(stop, max(0, self._searched - self._tail_start - len(stop) + 1))
            if at >= 0 and (found is None or at < found[0]):
                found = (at, stop)
        if found is not None:
            at, self.stop_string = found
            self._tail = self._tail[: at + (len(self.stop_string) if self._params.include_stop_str_in_output else 0)]
