"""Draws the next token of every sequence of a batch at once.

Parameters live in arrays with a row for each running sequence, written when a sequence starts, so that a step gathers
them and loops over nothing. What only few requests use (logit_bias, bad_words, …) is kept per row and touched only when
such a row is in the batch.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from vllm.sampling_params import SamplingParams
from vllm.step import PositionLogprobs, SequenceStart

# So many most likely tokens are looked at first; sorting the whole vocabulary takes several times as long.
_PARTIAL_SORT = 1024


def uniform(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each (seed, counter), whatever else is asked for beside it.

    Two rounds of the SplitMix64 finaliser (Steele, Lea and Flood, 2014) over the seed and the counter.

    Args:
        seeds: uint64 [R].
        counters: Index of the drawn token in its output; [R].

    Returns float64 [R].
    """
    with np.errstate(over="ignore"):
        x = _mix(seeds.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        x = _mix(x + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw_by_inversion(scores: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The first column at which the cumulative distribution of `softmax(scores)` exceeds `noise`.

    Args:
        scores: [R, columns]; -inf is never drawn.
        noise: In [0, 1); float64 [R].

    Returns int64 [R].
    """
    cumulative = torch.softmax(scores, dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = noise.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=scores.shape[-1] - 1).squeeze(-1)


@dataclass(frozen=True)
class LogprobTensors:
    """Log-probabilities at P positions, still on the device.

    Attributes:
        rows: Which row each position belongs to.
        wants: Number of most likely tokens to report at each.
        tokens, values, ranks: Of the chosen token; [P].
        top_tokens, top_values: The most likely ones, falling; [P, max(wants)].
    """

    rows: list[int]
    wants: list[int]
    tokens: torch.Tensor
    values: torch.Tensor
    ranks: torch.Tensor
    top_tokens: torch.Tensor
    top_values: torch.Tensor

    @classmethod
    def at(cls, logprobs: torch.Tensor, tokens: torch.Tensor, wants: list[int], rows: list[int]) -> LogprobTensors:
        """Picks from `logprobs`, [P, vocab_size], by the chosen `tokens`, int64 [P]."""
        values = logprobs.gather(-1, tokens.unsqueeze(-1))
        ranks = (logprobs > values).sum(dim=-1).add_(1)
        top_values, top_tokens = logprobs.topk(max([1, *wants]), dim=-1)
        return cls(rows, wants, tokens, values.squeeze(-1), ranks, top_tokens, top_values)

    def by_row(self) -> dict[int, PositionLogprobs]:
        """Waits for the device; the positions of each row, in order."""
        found: dict[int, PositionLogprobs] = {}
        columns = (self.tokens, self.values, self.ranks, self.top_tokens, self.top_values)
        for row, k, token, value, rank, top_tokens, top_values in zip(
            self.rows, self.wants, *(column.tolist() for column in columns), strict=True
        ):
            entry = found.setdefault(row, PositionLogprobs([], [], []))
            entry.token_ids.append([token, *top_tokens[:k]])
            entry.logprobs.append([value, *top_values[:k]])
            entry.ranks.append(rank)
        return found


@dataclass(frozen=True)
class RareParams:
    """What only few requests ask for.

    Attributes:
        bias: (token ids, values) added to the logits.
        allowed: Tokens that may be drawn, or None for all.
        stop_token_ids / min_tokens: Tokens that may not be drawn before so many.
        bad_words: Token sequences that may not be completed.
    """

    bias: tuple[torch.Tensor, torch.Tensor] | None
    allowed: torch.Tensor | None
    stop_token_ids: torch.Tensor | None
    min_tokens: int
    bad_words: list[list[int]]


@dataclass(frozen=True)
class TokenMasks:
    """Which tokens may be drawn, for some rows of the logits.

    Attributes:
        rows: Which ones; int64 [M].
        bits: Bit i % 8 of byte i // 8 allows token i; uint8 [M, at least vocab_size / 8].
    """

    rows: torch.Tensor
    bits: torch.Tensor


class Sampler:
    """Sampling state of the running sequences, and the draw.

    Args:
        max_num_seqs: Rows.
        vocab_size: Columns of the logits.
        device: Of the logits.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._max_num_seqs = max_num_seqs
        self._temperature = np.zeros(max_num_seqs, np.float32)
        self._top_k = np.zeros(max_num_seqs, np.int64)
        self._top_p = np.ones(max_num_seqs, np.float32)
        self._min_p = np.zeros(max_num_seqs, np.float32)
        self._presence = np.zeros(max_num_seqs, np.float32)
        self._frequency = np.zeros(max_num_seqs, np.float32)
        self._repetition = np.ones(max_num_seqs, np.float32)
        self._seed = np.zeros(max_num_seqs, np.uint64)
        self._num_prompt_tokens = np.zeros(max_num_seqs, np.int64)
        self._num_logprobs = np.full(max_num_seqs, -1, np.int64)
        self._penalised = np.zeros(max_num_seqs, bool)
        self._rare: dict[int, RareParams] = {}
        # Rows that ask for the most likely token and nothing else.
        self._greedy = np.zeros(max_num_seqs, bool)
        # Made when the first request asks for a penalty: [rows, vocabulary] each.
        self._output_counts: torch.Tensor | None = None
        self._in_prompt: torch.Tensor | None = None

    def start(self, seq: SequenceStart) -> None:
        """Writes a sequence's parameters into its row."""
        row, params = seq.row, seq.sampling_params
        self._temperature[row] = params.temperature
        self._top_k[row] = params.top_k if params.top_k < self.vocab_size else 0
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        self._presence[row] = params.presence_penalty
        self._frequency[row] = params.frequency_penalty
        self._repetition[row] = params.repetition_penalty
        self._seed[row] = seq.seed & (2**64 - 1)
        self._num_prompt_tokens[row] = seq.num_prompt_tokens
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._penalised[row] = bool(
            params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
        )
        if self._penalised[row]:
            self._count_tokens(seq)
        rare = self._rare_params(params, seq.stop_token_ids)
        if rare is None:
            self._rare.pop(row, None)
        else:
            self._rare[row] = rare
        wants_logprobs = params.logprobs is not None
        self._greedy[row] = not (params.temperature > 0 or self._penalised[row] or wants_logprobs or rare is not None)

    def _count_tokens(self, seq: SequenceStart) -> None:
        if self._output_counts is None or self._in_prompt is None:
            shape = (self._max_num_seqs, self.vocab_size)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
        boundary = seq.num_prompt_tokens - seq.num_skipped
        prompt, output = seq.token_ids[:boundary], seq.token_ids[boundary:]
        self._in_prompt[seq.row] = False
        self._in_prompt[seq.row, torch.from_numpy(np.array(prompt, np.int64)).to(self.device)] = True
        counts = torch.zeros(self.vocab_size, dtype=torch.int32)
        for token, n in Counter(output).items():
            counts[token] = n
        self._output_counts[seq.row] = counts

    def _rare_params(self, params: SamplingParams, stop_token_ids: tuple[int, ...]) -> RareParams | None:
        def ids(tokens: list[int]) -> torch.Tensor:
            return torch.tensor(tokens, dtype=torch.int64, device=self.device)

        bias = None
        if params.logit_bias:
            values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=self.device)
            bias = (ids(list(params.logit_bias)), values)
        allowed = None if params.allowed_token_ids is None else ids(params.allowed_token_ids)
        stops = ids(list(stop_token_ids)) if params.min_tokens and stop_token_ids else None
        bad_words = params.bad_words_token_ids or []
        if bias is None and allowed is None and stops is None and not bad_words:
            return None
        return RareParams(bias, allowed, stops, params.min_tokens, bad_words)

    def takes_most_likely(self, rows: np.ndarray | list[int]) -> bool:
        """Whether these rows ask for nothing but the most likely token."""
        return bool(self._greedy[rows].all())

    def sample(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        num_tokens: np.ndarray,
        token_ids: torch.Tensor,
        masks: TokenMasks | None = None,
    ) -> tuple[torch.Tensor, LogprobTensors | None]:
        """Draws a token for each row of `logits`.

        Args:
            logits: float32 [R, vocab_size]; overwritten.
            rows: Row of each sequence; int64 [R].
            num_tokens: Tokens each sequence has so far, prompt and output; int64 [R].
            token_ids: Tokens of all rows; int64 [rows, positions].
            masks: Where the form of the output decides what may be drawn.

        Returns the tokens, int64 [R] on the device, and the log-probabilities if any row asked for them (of the model's
        own distribution, before any parameter changed it).
        """
        wants = self._num_logprobs[rows]
        raw = torch.log_softmax(logits, dim=-1) if (wants >= 0).any() else None
        num_outputs = num_tokens - self._num_prompt_tokens[rows]
        if self._rare:
            self._apply_rare(logits, rows, num_tokens, num_outputs, token_ids)
        penalised = np.flatnonzero(self._penalised[rows])
        if len(penalised):
            self._apply_penalties(logits, penalised, rows[penalised])
        if masks is not None:
            self._apply_masks(logits, masks)
        drawn = logits.argmax(dim=-1)
        random = self._temperature[rows] > 0
        if random.any():
            self._draw(logits, drawn, rows, num_outputs, random)
        if len(penalised) and self._output_counts is not None:
            index = torch.from_numpy(rows[penalised]).to(self.device)
            ones = torch.ones(len(penalised), dtype=torch.int32, device=self.device)
            self._output_counts.index_put_((index, drawn[penalised]), ones, accumulate=True)
        if raw is None:
            return drawn, None
        picked = np.flatnonzero(wants >= 0)
        index = torch.from_numpy(picked).to(self.device)
        return drawn, LogprobTensors.at(raw[index], drawn[index], wants[picked].tolist(), picked.tolist())

    def _draw(
        self, logits: torch.Tensor, drawn: torch.Tensor, rows: np.ndarray, num_outputs: np.ndarray, random: np.ndarray
    ) -> None:
        """Overwrites `drawn` where a random draw is asked for, by inversion of the cumulative distribution.

        Rows with a filter are drawn over sorted candidates and rows without over the vocabulary, each by its own
        parameters alone, so that a seeded draw does not depend on its neighbours in the batch.
        """
        filtered = random & ((self._top_k[rows] > 0) | (self._top_p[rows] < 1.0) | (self._min_p[rows] > 0))
        noise = np.minimum(uniform(self._seed[rows], num_outputs), 1.0 - 2.0**-40)
        for subset in (random & ~filtered, filtered):
            picked = np.flatnonzero(subset)
            if not len(picked):
                continue
            index = torch.from_numpy(picked).to(self.device)
            scores = logits[index] / self._column(self._temperature[rows[picked]])
            targets = torch.from_numpy(noise[picked]).to(self.device)
            if subset is filtered:
                drawn[index] = self._draw_filtered(scores, rows[picked], targets)
            else:
                drawn[index] = draw_by_inversion(scores, targets)

    def _draw_filtered(self, scores: torch.Tensor, rows: np.ndarray, noise: torch.Tensor) -> torch.Tensor:
        """Draws among what top_k, top_p and min_p leave; looks at the whole vocabulary only for those rows of which the
        most likely tokens do not decide it."""
        total = torch.logsumexp(scores, dim=-1, keepdim=True)
        drawn = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        pending = np.arange(len(rows))
        for width in (min(_PARTIAL_SORT, self.vocab_size), self.vocab_size):
            index = torch.from_numpy(pending).to(self.device)
            top, candidates = scores[index].topk(width, dim=-1)
            kept, complete = self._filter(top, total[index], rows[pending])
            choice = draw_by_inversion(kept, noise[index])
            drawn[index] = candidates.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
            pending = pending[~complete.cpu().numpy()]
            if width == self.vocab_size or not len(pending):
                break
        return drawn

    def _filter(self, top: torch.Tensor, total: torch.Tensor, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Sets the scores outside top_k, top_p and min_p to -inf, in this order, each over what the one before left.

        Args:
            top: The highest scores of each row, falling; [R, width].
            total: Log-sum-exp of all scores of each row; [R, 1].

        Returns the scores, and whether each row's filter ends within `width`; bool [R].
        """
        width = top.shape[-1]
        top_k = torch.from_numpy(self._top_k[rows]).to(self.device).unsqueeze(-1)
        limit = torch.where(top_k > 0, top_k, self.vocab_size)
        top = top.masked_fill(torch.arange(width, device=self.device) >= limit, float("-inf"))
        total = torch.where(top_k > 0, torch.logsumexp(top, dim=-1, keepdim=True), total)
        probs = torch.exp(top - total)
        before = probs.cumsum(dim=-1) - probs
        outside = before >= self._column(self._top_p[rows])
        outside |= probs < self._column(self._min_p[rows]) * probs[:, :1]
        # The most likely token always stays, however the parameters round.
        outside[:, 0] = False
        complete = (limit.squeeze(-1) <= width) | outside[:, -1]
        return top.masked_fill(outside, float("-inf")), complete

    def _column(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device).unsqueeze(-1)

    def _apply_rare(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        num_tokens: np.ndarray,
        num_outputs: np.ndarray,
        token_ids: torch.Tensor,
    ) -> None:
        for i, row in enumerate(rows.tolist()):
            rare = self._rare.get(row)
            if rare is None:
                continue
            if rare.allowed is not None:
                kept = logits[i, rare.allowed]
                logits[i] = float("-inf")
                logits[i, rare.allowed] = kept
            if rare.bias is not None:
                logits[i].index_add_(0, *rare.bias)
            if rare.stop_token_ids is not None and num_outputs[i] < rare.min_tokens:
                logits[i, rare.stop_token_ids] = float("-inf")
            for word in rare.bad_words:
                head = len(word) - 1
                if head <= num_outputs[i]:
                    end = int(num_tokens[i])
                    if token_ids[row, end - head : end].tolist() == word[:-1]:
                        logits[i, word[-1]] = float("-inf")

    def _apply_masks(self, logits: torch.Tensor, masks: TokenMasks) -> None:
        """Leaves the tokens that a mask allows. Where other parameters leave none of them, they give way."""
        bit = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=self.device)
        allowed = (masks.bits.unsqueeze(-1) & bit).ne(0).flatten(1)[:, : self.vocab_size]
        scores = logits[masks.rows].masked_fill_(~allowed, float("-inf"))
        none_left = scores.amax(dim=-1, keepdim=True) == float("-inf")
        logits[masks.rows] = scores.masked_fill_(allowed & none_left, 0.0)

    def _apply_penalties(self, logits: torch.Tensor, picked: np.ndarray, rows: np.ndarray) -> None:
        """Presence and frequency as OpenAI defines them over the output; repetition over prompt and output
        (Keskar et al., 2019)."""
        if self._output_counts is None or self._in_prompt is None:
            raise RuntimeError("a penalised row was never started")
        index, table = torch.from_numpy(picked).to(self.device), torch.from_numpy(rows).to(self.device)
        scores, counts = logits[index], self._output_counts[table]
        seen = counts > 0
        repetition = self._column(self._repetition[rows])
        divided = torch.where(scores > 0, scores / repetition, scores * repetition)
        scores = torch.where(seen | self._in_prompt[table], divided, scores)
        scores -= counts * self._column(self._frequency[rows]) + seen * self._column(self._presence[rows])
        logits[index] = scores
