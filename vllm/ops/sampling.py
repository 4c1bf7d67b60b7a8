"""How the next token of a row is drawn: the tables that say what each row asks for, and the draw in plain torch.

The kernels for GPUs and CPUs compute the same; this is what they are compared with. In order, over the logits x of a
row as float32:

1. allowed_token_ids: every other token becomes `NOT_ALLOWED`.
2. logit_bias is added. Tokens that would end an answer before `min_tokens`, or complete a bad word, become `BANNED`.
3. Penalties: repetition (Keskar et al., 2019) divides x > 0 by the penalty and multiplies x <= 0 with it, for tokens of
   prompt and output; frequency and presence are subtracted as OpenAI defines them, over the output.
4. A grammar's mask: every token that it does not allow becomes -inf. `BANNED` and `NOT_ALLOWED` are finite, so where
   other parameters leave none of the tokens that the grammar allows, they give way; the allowed tokens last.
5. Temperature 0 takes the highest score, the first of equals.
6. Otherwise x is divided by the temperature, and the kept tokens are those with x >= cut, where cut is the highest of
   top_k: the k-th highest score; top_p: the highest t with mass(x >= t) >= top_p * mass(kept by top_k);
   min_p: max(x) + log(min_p). Equal scores are kept or dropped together.
7. The draw inverts the cumulative distribution of the kept tokens, in the order of their ids: the first token at which
   the running sum of exp(x - max) exceeds u times the whole sum. u comes from the row's seed and the number of tokens
   drawn so far, so a seeded draw does not depend on what else is in the batch.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import NamedTuple

import torch

from vllm.sampling_params import MAX_BAD_SEQUENCES, MAX_BAD_WORD_TOKENS, MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS

BANNED = -1e30
"""Score of a token that a parameter forbids: never drawn beside others, yet above what a grammar forbids."""

NOT_ALLOWED = -1e34
"""Score of a token that is not among `allowed_token_ids`: below `BANNED`, so that of allowed tokens that are all banned
one is drawn. No bias changes it, and no penalty takes it to -inf."""

NO_MASK = -1
LATER = -2
"""Instead of a row of the masks: the row obeys none; the row is not drawn by this call (of kernels for GPUs)."""

MAX_BIAS = MAX_LOGIT_BIAS
MAX_STOPS = MAX_STOP_TOKEN_IDS + 64
MAX_BAD_TOKENS = MAX_BAD_WORD_TOKENS
"""Columns of the tables, as `MAX_BAD_SEQUENCES`: what a request may ask for; of stops, a model's own as well."""

_MASK_64 = 2**64 - 1


class FloatColumn(IntEnum):
    """Columns of `SamplingTables.floats`."""

    TEMPERATURE = 0
    TOP_P = 1
    MIN_P = 2
    PRESENCE = 3
    FREQUENCY = 4
    REPETITION = 5


class IntColumn(IntEnum):
    """Columns of `SamplingTables.ints`."""

    SEED = 0
    NUM_PROMPT_TOKENS = 1
    TOP_K = 2
    MIN_TOKENS = 3
    NUM_BIAS = 4
    NUM_STOPS = 5
    NUM_BAD_SEQUENCES = 6
    FLAGS = 7


class Flag(IntFlag):
    """What of the tables a row uses, `IntColumn.FLAGS`; a row without any is drawn from its logits as they are."""

    PENALTIES = 1
    ALLOWED = 2
    BIAS = 4
    STOPS = 8
    BAD_WORDS = 16


class SamplingTables(NamedTuple):
    """What the rows ask for, on the device of the logits; R rows.

    Attributes:
        floats: float32 [R, len(FloatColumn)].
        ints: int64 [R, len(IntColumn)]. SEED is the bit pattern of an unsigned number. TOP_K 0 is off.
        bias_ids, bias_values: Token ids and what is added; int32 and float32 [R, MAX_BIAS], NUM_BIAS of them count.
        stop_ids: Tokens that are banned while fewer than MIN_TOKENS are drawn; int32 [R, MAX_STOPS].
        bad_tokens: Tokens of all bad words, one word behind the other; int32 [R, MAX_BAD_TOKENS].
        bad_ends: Where each of them ends in `bad_tokens`; int32 [R, MAX_BAD_SEQUENCES].
        allowed: Bit i % 32 of word i // 32 allows token i; int32 [R, ceil(vocab_size / 32)].
        counts: How often each token is in the output, at most 32,767, plus -32,768 if it is in the prompt; int16
            [R, vocab_size]. Written only for rows with penalties.
    """

    floats: torch.Tensor
    ints: torch.Tensor
    bias_ids: torch.Tensor
    bias_values: torch.Tensor
    stop_ids: torch.Tensor
    bad_tokens: torch.Tensor
    bad_ends: torch.Tensor
    allowed: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def make(cls, num_rows: int, vocab_size: int, device: torch.device) -> SamplingTables:
        """Tables in which every row is greedy."""

        def zeros(columns: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((num_rows, columns), dtype=dtype, device=device)

        return cls(
            floats=zeros(len(FloatColumn), torch.float32),
            ints=zeros(len(IntColumn), torch.int64),
            bias_ids=zeros(MAX_BIAS, torch.int32),
            bias_values=zeros(MAX_BIAS, torch.float32),
            stop_ids=zeros(MAX_STOPS, torch.int32),
            bad_tokens=zeros(MAX_BAD_TOKENS, torch.int32),
            bad_ends=zeros(MAX_BAD_SEQUENCES, torch.int32),
            allowed=zeros(-(-vocab_size // 32), torch.int32),
            counts=zeros(vocab_size, torch.int16),
        )


def uniform(seed: int, counter: int) -> float:
    """A number in [0, 1) for a seed and the index of the drawn token in its output.

    Two rounds of the SplitMix64 finaliser (Steele, Lea and Flood, 2014), in 64-bit arithmetic that wraps around.
    """
    x = _mix((seed + 0x9E3779B97F4A7C15) & _MASK_64)
    x = _mix((x + (counter + 1) * 0x9E3779B97F4A7C15) & _MASK_64)
    return (x >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


def draw(
    logits: torch.Tensor,
    rows: torch.Tensor,
    num_tokens: torch.Tensor,
    token_ids: torch.Tensor,
    tables: SamplingTables,
    masks: torch.Tensor | None = None,
    mask_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draws a token for each row of the logits; counts it where the row has penalties.

    Args:
        logits: [N, vocab_size]; not changed.
        rows: Row of the tables and of `token_ids` for each; int64 [N].
        num_tokens: Tokens of each row so far, prompt and output; int64 [N].
        token_ids: int64 [rows, positions].
        masks: Bit i % 32 of word i // 32 allows token i; int32 [M, at least vocab_size / 32].
        mask_rows: Which row of `masks` each row of the logits obeys, -1 for none; int64 [N].

    Returns int64 [N].
    """
    drawn = []
    for i, (row, count) in enumerate(zip(rows.tolist(), num_tokens.tolist(), strict=True)):
        scores = adjusted(logits[i].float(), row, count, token_ids, tables)
        which = -1 if mask_rows is None else int(mask_rows[i])
        if masks is not None and which >= 0:
            scores = torch.where(_bits(masks[which], len(scores)), scores, float("-inf"))
        token = _choose(scores, row, count, tables)
        if int(tables.ints[row, IntColumn.FLAGS]) & Flag.PENALTIES:
            _count(tables.counts[row], token)
        drawn.append(token)
    return torch.tensor(drawn, dtype=torch.int64, device=logits.device)


def adjusted(
    scores: torch.Tensor, row: int, num_tokens: int, token_ids: torch.Tensor, tables: SamplingTables
) -> torch.Tensor:
    """Steps 1 to 3 for one row: float32 [vocab_size] → a new one."""
    ints = tables.ints[row].tolist()
    flags, num_outputs = ints[IntColumn.FLAGS], num_tokens - ints[IntColumn.NUM_PROMPT_TOKENS]
    scores = scores.clone()
    if flags & Flag.ALLOWED:
        scores = torch.where(_bits(tables.allowed[row], len(scores)), scores, scores.clamp(max=NOT_ALLOWED))
    if flags & Flag.BIAS:
        used = slice(ints[IntColumn.NUM_BIAS])
        scores.index_add_(0, tables.bias_ids[row, used].long(), tables.bias_values[row, used])
    if flags & Flag.STOPS and num_outputs < ints[IntColumn.MIN_TOKENS]:
        _ban(scores, tables.stop_ids[row, : ints[IntColumn.NUM_STOPS]].tolist())
    if flags & Flag.BAD_WORDS:
        start = 0
        for end in tables.bad_ends[row, : ints[IntColumn.NUM_BAD_SEQUENCES]].tolist():
            *head, last = tables.bad_tokens[row, start:end].tolist()
            if len(head) <= num_outputs and token_ids[row, num_tokens - len(head) : num_tokens].tolist() == head:
                _ban(scores, [last])
            start = end
    if flags & Flag.PENALTIES:
        _, _, _, presence, frequency, repetition = tables.floats[row].tolist()
        stored = tables.counts[row].to(torch.int32)
        count = stored & 0x7FFF
        repeated = torch.where(scores > 0, scores / repetition, scores * repetition)
        scores = torch.where((count > 0) | (stored < 0), repeated, scores)
        scores = scores - count * frequency - (count > 0) * presence
    return scores


def cut_of(scores: torch.Tensor, top_k: int, top_p: float, min_p: float) -> float:
    """The lowest score that step 6 keeps; `scores` are divided by the temperature, float32 [vocab_size]."""
    ordered = scores.double().sort(descending=True).values
    cut = float("-inf")
    if 0 < top_k < len(ordered):
        cut = float(ordered[top_k - 1])
        ordered = ordered[ordered >= cut]
    if top_p < 1.0:
        mass = torch.exp(ordered - ordered[0])
        before = mass.cumsum(0) - mass
        # The most likely token always stays, however the parameters round.
        kept = max(1, int((before < top_p * mass.sum()).sum()))
        cut = max(cut, float(ordered[kept - 1]))
    if min_p > 0:
        kept = max(1, int((ordered >= ordered[0] + torch.log(torch.tensor(min_p, dtype=torch.float64))).sum()))
        cut = max(cut, float(ordered[kept - 1]))
    return cut


def _choose(scores: torch.Tensor, row: int, num_tokens: int, tables: SamplingTables) -> int:
    """Steps 5 to 7."""
    temperature, top_p, min_p, *_ = tables.floats[row].tolist()
    if temperature == 0:
        return int(scores.argmax())
    ints = tables.ints[row].tolist()
    scores = scores / temperature
    cut = cut_of(scores, ints[IntColumn.TOP_K], top_p, min_p)
    weights = torch.where(scores >= cut, torch.exp(scores.double() - scores.max()), 0.0)
    sums = weights.cumsum(0)
    u = uniform(ints[IntColumn.SEED] & _MASK_64, num_tokens - ints[IntColumn.NUM_PROMPT_TOKENS])
    token = int(torch.searchsorted(sums, u * sums[-1], right=True))
    # Rounding may leave the target at the whole sum: then it is the last token that has any weight.
    return token if token < len(scores) else int(torch.nonzero(weights)[-1])


def _ban(scores: torch.Tensor, tokens: list[int]) -> None:
    """A token that is -inf already stays so."""
    index = torch.tensor(tokens, dtype=torch.int64, device=scores.device)
    scores[index] = scores[index].clamp(max=BANNED)


def _bits(words: torch.Tensor, size: int) -> torch.Tensor:
    """bool [size] of int32 words."""
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 1).flatten()[:size].bool()


def _count(counts: torch.Tensor, token: int) -> None:
    if int(counts[token]) & 0x7FFF < 0x7FFF:
        counts[token] += 1
