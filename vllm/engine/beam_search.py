"""Beam search: the most likely continuations of a prompt, kept several at a time.

The search itself, apart from what computes the probabilities: its user asks the model for the most likely tokens after
each active sequence and hands them to `BeamSearch.advance`. In the engine, the active sequences of a step fork from
those of the step before, so that a step computes one token a sequence.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import islice

from vllm.config import ModelConfig
from vllm.engine.output_text import OutputText
from vllm.exceptions import VLLMValidationError
from vllm.outputs import TokenLogprobs
from vllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from vllm.transformers_utils.tokenizer import Tokenizer


@dataclass
class BeamSearchSequence:
    """A continuation of a prompt.

    Attributes:
        tokens: The prompt's token ids and the generated ones; the token that ended it is the last.
        logprobs: Most likely tokens at each generated position.
        cum_logprob: Sum of the generated tokens' log-probabilities.
        text: Of all tokens, or of the generated ones, as whoever ran the search says; None until it is over.
        finish_reason: `stop` or `length`; None while it is active.
        stop_reason: Token id or string that ended it.
        output: Text of the generated tokens while stop strings are looked for; without an end token.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    output: OutputText | None = field(default=None, repr=False, compare=False)


@dataclass
class BeamSearchOutput:
    """The best sequences of a prompt, the best one first."""

    sequences: list[BeamSearchSequence]


class BeamSearch:
    """State of the search for one prompt.

    A sequence's score is cum_logprob / length ** length_penalty; its length counts the prompt and not an end token.
    A step takes the `beam_width` most likely continuations of all active sequences. One by an end token is finished and
    takes no place among them.

    Args:
        config: End tokens and limits of the model.
        prompt_token_ids: At least one token less than the model takes.

    Attributes:
        active: Sequences that go on, the most likely first; none when the search is over.
        origins: For each of them, the index of the sequence that it continues among those active before the last step.
        num_prompt_tokens: Tokens that all sequences begin with.

    Raises:
        VLLMValidationError: The beam is wider than the log-probabilities that the server gives out allow.
    """

    def __init__(
        self, config: ModelConfig, tokenizer: Tokenizer, prompt_token_ids: list[int], params: BeamSearchParams
    ) -> None:
        check_beam_width("beam_width", params.beam_width, config.max_logprobs)
        self.params = params
        self.active = [BeamSearchSequence(prompt_token_ids)]
        self.origins = [0]
        self.num_prompt_tokens = len(prompt_token_ids)
        self._tokenizer = tokenizer
        self._max_logprobs = config.max_logprobs
        self._longest = min(config.max_model_len, len(prompt_token_ids) + params.max_tokens)
        ends = () if params.ignore_eos else config.eos_token_ids
        self._end_ids = frozenset(ends) | frozenset(params.stop_token_ids)
        # The best of those that ended, by falling score; equal ones in the order in which they ended.
        self._ended: list[tuple[float, BeamSearchSequence]] = []
        if params.stop_strings:
            self.active[0].output = self._text(prompt_token_ids)

    def sampling_params(self) -> SamplingParams:
        """What to ask of the model for each active sequence: the most likely next tokens.

        The log-probabilities are of the model itself. Where end tokens may not come yet they are among the most likely
        ones all the same, so more of these are asked for; the token that is drawn is none of them.
        """
        wanted = 2 * self.params.beam_width
        if self.params.min_tokens:
            wanted = min(self._max_logprobs, wanted + len(self._end_ids))
        return SamplingParams(
            temperature=0.0,
            max_tokens=self.max_tokens,
            min_tokens=min(self.params.min_tokens, self.max_tokens),
            stop_token_ids=self.params.stop_token_ids,
            ignore_eos=self.params.ignore_eos,
            logprobs=wanted,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def advance(self, rows: Sequence[TokenLogprobs]) -> None:
        """Takes a step.

        Args:
            rows: For each active sequence, the drawn token and the most likely ones, as `sampling_params` asks.
        """
        width, may_end = self.params.beam_width, self._may_end
        candidates: list[tuple[float, int, int, TokenLogprobs]] = []
        for origin, (sequence, row) in enumerate(zip(self.active, rows, strict=True)):
            if not may_end:
                # The drawn token leads, though end tokens that may not come are more likely.
                row = dict(sorted(row.items(), key=lambda entry: -entry[1].logprob))
            for token_id, logprob in islice(row.items(), 2 * width if may_end else None):
                total = sequence.cum_logprob + logprob.logprob
                if token_id not in self._end_ids:
                    candidates.append((total, token_id, origin, row))
                elif may_end:
                    self._end(_continued(sequence, token_id, total, row), "stop", token_id)
        best = nlargest(width, candidates, key=lambda candidate: candidate[0])
        before, self.active, self.origins = self.active, [], []
        following = [
            (origin, _continued(before[origin], token_id, total, row)) for total, token_id, origin, row in best
        ]
        for origin, sequence in following:
            stop = self._found_stop(sequence)
            if stop is not None:
                self._end(sequence, "stop", stop)
            elif len(sequence.tokens) == self._longest:
                self._end(sequence, "length")
            else:
                self.active.append(sequence)
                self.origins.append(origin)
        if self.active and len(self._ended) == width and self._best_to_come() <= self._ended[-1][0]:
            self.active, self.origins = [], []

    def best(self) -> list[BeamSearchSequence]:
        """The sequences with the highest scores, at most `beam_width`, the highest first."""
        return [sequence for _, sequence in self._ended]

    def output_text(self, sequence: BeamSearchSequence) -> str:
        """Text of the generated tokens, without an end token and, unless it is to be included, a stop string."""
        text, ended = sequence.output, sequence.stop_reason in self._end_ids
        if text is None:
            text = self._text(sequence.tokens[: self.num_prompt_tokens])
            for token_id in sequence.tokens[self.num_prompt_tokens : -1 if ended else None]:
                text.append(token_id, False, False)
            text.end()
        elif ended:
            text = text.fork()
            text.end()
        return text.text

    @property
    def max_tokens(self) -> int:
        """Most tokens that a sequence can get."""
        return self._longest - self.num_prompt_tokens

    @property
    def _may_end(self) -> bool:
        """Whether an end token may come next; all active sequences have one length."""
        return not self.active or len(self.active[0].tokens) - self.num_prompt_tokens >= self.params.min_tokens

    def _end(self, sequence: BeamSearchSequence, reason: str, stop: int | str | None = None) -> None:
        sequence.finish_reason, sequence.stop_reason = reason, stop
        length = len(sequence.tokens) - (stop in self._end_ids)
        score = sequence.cum_logprob / length**self.params.length_penalty
        insort(self._ended, (score, sequence), key=lambda entry: -entry[0])
        del self._ended[self.params.beam_width :]

    def _best_to_come(self) -> float:
        """No sequence that ends later has a higher score: log-probabilities only fall, lengths only grow."""
        penalty = self.params.length_penalty
        length = self._longest if penalty > 0 else len(self.active[0].tokens)
        return max(sequence.cum_logprob for sequence in self.active) / length**penalty

    def _found_stop(self, sequence: BeamSearchSequence) -> str | None:
        """The stop string that the newest token completes. Sequences share the text up to there."""
        if sequence.output is None:
            return None
        sequence.output = sequence.output.fork()
        sequence.output.append(sequence.tokens[-1], False, len(sequence.tokens) == self._longest)
        return sequence.output.stop_string

    def _text(self, prompt_token_ids: list[int]) -> OutputText:
        params = SamplingParams(
            max_tokens=None,
            min_tokens=self.params.min_tokens,
            stop=self.params.stop_strings,
            skip_special_tokens=self.params.skip_special_tokens,
            include_stop_str_in_output=self.params.include_stop_str_in_output,
        )
        return OutputText(self._tokenizer, prompt_token_ids, params)


def _continued(
    sequence: BeamSearchSequence, token_id: int, cum_logprob: float, row: TokenLogprobs
) -> BeamSearchSequence:
    tokens, logprobs = [*sequence.tokens, token_id], [*sequence.logprobs, row]
    return BeamSearchSequence(tokens, logprobs, cum_logprob, output=sequence.output)


def check_beam_width(name: str, width: int, max_logprobs: int) -> None:
    """Raises `VLLMValidationError` when a step would need more log-probabilities than a request may ask for."""
    if 2 * width > max_logprobs:
        raise VLLMValidationError(
            f"{name} may be at most {max_logprobs // 2} with beam search, which needs twice as many log-probabilities "
            f"as beams (--max-logprobs is {max_logprobs}), got {width}.",
            name,
        )
