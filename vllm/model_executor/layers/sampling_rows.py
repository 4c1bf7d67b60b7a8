"""What each running sequence asks of the sampler, a row each, written when the sequence starts."""

from __future__ import annotations

import numpy as np
import torch

from vllm.ops.sampling import Flag, FloatColumn, IntColumn, SamplingTables
from vllm.ops.staging import to_device, write
from vllm.sampling_params import SamplingParams
from vllm.step import SequenceStart


class SamplingRows:
    """The rows' tables on the device, and what of them the host must know to choose what it launches.

    Args:
        num_rows: Rows; those that never start stay greedy, as the padding of captured steps needs it.
        vocab_size: Columns of the logits.
        device: Of the logits.

    Attributes:
        tables: On the device.
        is_greedy: Rows that ask for the most likely token and nothing else; bool [num_rows].
        num_logprobs: Most likely tokens whose log-probabilities are reported, -1 for none at all; int64 [num_rows].
        flags: `Flag` of each row; int64 [num_rows].
        is_cut: Rows with top_k, top_p or min_p; bool [num_rows].
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.tables = SamplingTables.make(num_rows, vocab_size, device)
        self.is_greedy = np.ones(num_rows, bool)
        self.is_cut = np.zeros(num_rows, bool)
        self.num_logprobs = np.full(num_rows, -1, np.int64)
        self.flags = np.zeros(num_rows, np.int64)

    def start(self, sequences: list[SequenceStart]) -> None:
        """Writes the parameters of sequences that begin (or begin again) to run into their rows."""
        if not sequences:
            return
        floats = np.zeros((len(sequences), len(FloatColumn)), np.float32)
        ints = np.zeros((len(sequences), len(IntColumn)), np.int64)
        for i, seq in enumerate(sequences):
            row, params = seq.row, seq.sampling_params
            top_k = params.top_k if params.top_k < self.vocab_size else 0
            floats[i] = (
                params.temperature,
                params.top_p,
                params.min_p,
                params.presence_penalty,
                params.frequency_penalty,
                params.repetition_penalty,
            )
            ints[i, IntColumn.SEED] = np.uint64(seq.seed & (2**64 - 1)).astype(np.int64)
            ints[i, IntColumn.NUM_PROMPT_TOKENS] = seq.num_prompt_tokens
            ints[i, IntColumn.TOP_K] = top_k
            ints[i, IntColumn.MIN_TOKENS] = params.min_tokens
            flags = self._write_tables(seq, ints[i])
            ints[i, IntColumn.FLAGS] = flags
            self.flags[row] = flags
            self.num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
            random = params.temperature > 0
            self.is_greedy[row] = not (random or flags or params.logprobs is not None)
            self.is_cut[row] = random and bool(top_k or params.top_p < 1.0 or params.min_p > 0)
        rows = to_device(np.array([seq.row for seq in sequences], np.int64), self.device)
        self.tables.floats[rows] = to_device(floats, self.device)
        self.tables.ints[rows] = to_device(ints, self.device)

    def _write_tables(self, seq: SequenceStart, ints: np.ndarray) -> int:
        """Writes what only few requests ask for, and its lengths into `ints`; returns the row's flags."""
        params, row, tables = seq.sampling_params, seq.row, self.tables
        flags = Flag(0)
        if params.logit_bias:
            flags |= Flag.BIAS
            ids, values = zip(*params.logit_bias.items(), strict=True)
            ints[IntColumn.NUM_BIAS] = len(ids)
            write(tables.bias_ids[row, : len(ids)], np.array(ids, np.int32))
            write(tables.bias_values[row, : len(ids)], np.array(values, np.float32))
        if params.allowed_token_ids is not None:
            flags |= Flag.ALLOWED
            bits = np.zeros(tables.allowed.shape[1] * 32, np.uint8)
            bits[np.array(params.allowed_token_ids, np.int64)] = 1
            write(tables.allowed[row], np.packbits(bits, bitorder="little").view(np.int32))
        if params.min_tokens and seq.stop_token_ids:
            flags |= Flag.STOPS
            ints[IntColumn.NUM_STOPS] = len(seq.stop_token_ids)
            write(tables.stop_ids[row, : len(seq.stop_token_ids)], np.array(seq.stop_token_ids, np.int32))
        if params.bad_words_token_ids:
            flags |= Flag.BAD_WORDS
            words = params.bad_words_token_ids
            tokens = np.array([token for word in words for token in word], np.int32)
            ints[IntColumn.NUM_BAD_SEQUENCES] = len(words)
            write(tables.bad_tokens[row, : len(tokens)], tokens)
            write(tables.bad_ends[row, : len(words)], np.cumsum([len(word) for word in words]).astype(np.int32))
        if _has_penalties(params):
            flags |= Flag.PENALTIES
            self._count_tokens(seq)
        return int(flags)

    def _count_tokens(self, seq: SequenceStart) -> None:
        boundary = seq.num_prompt_tokens - seq.num_skipped
        known = np.frombuffer(seq.token_ids, np.int32) if len(seq.token_ids) else np.empty(0, np.int32)
        counts = np.minimum(np.bincount(known[boundary:], minlength=self.vocab_size), 0x7FFF).astype(np.int16)
        counts[known[:boundary]] |= np.int16(-0x8000)
        write(self.tables.counts[seq.row], counts)


def _has_penalties(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
