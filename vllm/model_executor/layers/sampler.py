"""Draws the next token of every row of a batch, and looks up log-probabilities. Nothing here waits for a GPU.

What rows ask for lies in tables on the device (`sampling_rows`); the kernels read it there, so that a captured step
draws for any mix of requests. On a CPU the same is computed in plain calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm.model_executor.layers.sampling_rows import SamplingRows
from vllm.ops import sampling
from vllm.ops.cpu import library as cpu_library
from vllm.ops.cpu import sampling as cpu_sampling
from vllm.ops.sampling import LATER, NO_MASK
from vllm.ops.staging import to_device
from vllm.platforms.devices import is_gpu
from vllm.step import PositionLogprobs, SequenceStart

if TYPE_CHECKING:
    from vllm.ops.triton.sampling import DrawKernels

PROMPT_LOGPROB_ROWS = 64
"""Prompt positions whose logits are in memory at a time."""


@dataclass(frozen=True)
class LogprobTensors:
    """Log-probabilities at P positions, still on the device.

    Attributes:
        rows: Which row each position belongs to.
        wants: Number of most likely tokens to report at each, equal for all positions of a row.
        table: float64 [P, 3 + 2 K], K the highest of `wants`: the token, its log-probability and rank, the most likely
            tokens and their log-probabilities, falling. float64 holds any token id.
    """

    rows: list[int]
    wants: list[int]
    table: torch.Tensor

    def by_row(self, table: np.ndarray) -> dict[int, PositionLogprobs]:
        """The positions of each row, in order; `table` has been brought to the host."""
        top = (table.shape[1] - 3) // 2
        tokens = np.concatenate((table[:, :1], table[:, 3 : 3 + top]), axis=1).astype(np.uint32).tobytes()
        values = np.concatenate((table[:, 1:2], table[:, 3 + top :]), axis=1).tobytes()
        ranks = table[:, 2].astype(np.uint32).tobytes()
        places: dict[int, list[int]] = {}
        for place, row in enumerate(self.rows):
            places.setdefault(row, []).append(place)
        found = {}
        # A decode step has a position of each of hundreds of rows: cutting bytes costs less than indexing arrays.
        entry = 1 + top
        for row, own in places.items():
            width = 1 + self.wants[own[0]]
            starts = [place * entry for place in own]
            found[row] = PositionLogprobs(
                width,
                b"".join(tokens[4 * start : 4 * (start + width)] for start in starts),
                b"".join(values[8 * start : 8 * (start + width)] for start in starts),
                b"".join(ranks[4 * place : 4 * place + 4] for place in own),
            )
        return found


@dataclass(frozen=True)
class TokenMasks:
    """Which tokens may be drawn, for some rows of the logits; on the host.

    Attributes:
        rows: Which ones; int64 [M].
        words: Bit i % 32 of word i // 32 allows token i; int32 [M, ceil(vocab_size / 32)].
    """

    rows: np.ndarray
    words: np.ndarray


class Sampler:
    """Sampling state of the running sequences, and the draw.

    Args:
        max_num_seqs: Rows. Any higher row number means padding, whose draw is greedy.
        vocab_size: Columns of the logits.
        device: Of the logits.

    Attributes:
        rows: What each row asks for; the last one is that of padding.
        kernels: What a captured step launches; None where there is no GPU. Its workspace takes 8 bytes a row and token.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.rows = SamplingRows(max_num_seqs + 1, vocab_size, device)
        self.kernels: DrawKernels | None = None
        if is_gpu(device):
            from vllm.ops.triton.sampling import DrawKernels

            self.kernels = DrawKernels(self.rows.tables, max(max_num_seqs, PROMPT_LOGPROB_ROWS))

    def start(self, sequences: list[SequenceStart]) -> None:
        """Writes the parameters of sequences that begin (or begin again) to run into their rows."""
        self.rows.start(sequences)

    def takes_most_likely(self, rows: np.ndarray | list[int]) -> bool:
        """Whether these rows ask for nothing but the most likely token."""
        return bool(self.rows.is_greedy[rows].all())

    def draw(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        num_tokens: np.ndarray,
        token_ids: torch.Tensor,
        masks: TokenMasks | None = None,
        drawn: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Draws a token for each row of `logits`, and writes it behind the row's tokens.

        Args:
            logits: [R, vocab_size]; not changed.
            rows: Row of each sequence, each once; int64 [R].
            num_tokens: Tokens each sequence has so far, prompt and output; int64 [R].
            token_ids: Tokens of all rows; int64 [rows, positions].
            masks: Where the form of the output decides what may be drawn.
            drawn: What was drawn already for the rows without masks, as captured steps do; int64 [R] on the device. The
                others are drawn into it.

        Returns int64 [R] on the device: `drawn`, if it is given.
        """
        others = NO_MASK if drawn is None else LATER
        numbers = np.stack((rows, num_tokens, np.full(len(rows), others)))
        words = None
        if masks is not None:
            numbers[2, masks.rows] = np.arange(len(masks.rows))
            words = to_device(masks.words, self.device)
        index, counts, mask_rows = to_device(numbers, self.device)
        if self.kernels is None:
            # What was drawn before is no case of a CPU.
            return _draw_on_cpu(logits, index, counts, token_ids, self.rows.tables, words, mask_rows)
        logits = logits.contiguous()
        if drawn is None:
            drawn = torch.empty(len(rows), dtype=torch.int64, device=self.device)
        now = rows[numbers[2] != LATER]
        adjust = words is not None or bool(self.rows.flags[now].any())
        self.kernels.draw(logits, index, counts, token_ids, drawn, words, mask_rows, adjust=adjust)
        if self.rows.is_cut[now].any():
            self.kernels.restrict(logits, index, counts, token_ids, drawn)
        return drawn

    def logprobs(self, logits: torch.Tensor, rows: np.ndarray, drawn: torch.Tensor) -> LogprobTensors | None:
        """Log-probabilities for the rows that ask for them, of the model's own distribution, before any parameter
        changed it; `LogprobTensors.rows` are rows of the logits. Arguments as of `draw`."""
        wants = self.rows.num_logprobs[rows]
        picked = np.flatnonzero(wants >= 0)
        if not len(picked):
            return None
        wants = wants[picked]
        return LogprobTensors(picked.tolist(), wants.tolist(), self._table(logits, picked, drawn, int(wants.max())))

    def prompt_logprobs(self, logits: torch.Tensor, tokens: torch.Tensor, top: int) -> LogprobTensors:
        """Log-probabilities of `tokens`, int64 [P], one for each row of the logits, at most `PROMPT_LOGPROB_ROWS`; and
        of the `top` most likely ones."""
        count = len(tokens)
        return LogprobTensors([0] * count, [top] * count, self._table(logits, np.arange(count), tokens, top))

    def _table(self, logits: torch.Tensor, picked: np.ndarray, tokens: torch.Tensor, top: int) -> torch.Tensor:
        index = to_device(picked, self.device)
        if self.kernels is None:
            return _logprobs_on_cpu(logits[index], tokens[index], top)
        return self.kernels.logprobs(logits.contiguous(), index, tokens, top)

    def take_memory(self, logits: torch.Tensor, token_ids: torch.Tensor, top: int) -> None:
        """Launches all that a draw may launch, with log-probabilities of so many most likely tokens; the rows are those
        of sequences that have not started. Needs a GPU."""
        if self.kernels is None:
            raise RuntimeError("there is no workspace on a CPU")
        index = torch.arange(len(logits), device=self.device)
        drawn, counts = torch.empty_like(index), torch.zeros_like(index)
        self.kernels.draw(logits, index.clamp(max=len(token_ids) - 1), counts, token_ids, drawn)
        self.kernels.restrict(logits, index, counts, token_ids, drawn)
        self.kernels.logprobs(logits, index, drawn, top)


def _draw_on_cpu(
    logits: torch.Tensor,
    rows: torch.Tensor,
    num_tokens: torch.Tensor,
    token_ids: torch.Tensor,
    tables: sampling.SamplingTables,
    masks: torch.Tensor | None,
    mask_rows: torch.Tensor,
) -> torch.Tensor:
    if cpu_library.library() is not None:
        logits = logits.float().contiguous()
        return cpu_sampling.sample(logits, rows, num_tokens, token_ids, tables, masks, mask_rows)
    drawn = sampling.draw(logits, rows, num_tokens, token_ids, tables, masks, mask_rows)
    token_ids[rows, num_tokens] = drawn
    return drawn


def _logprobs_on_cpu(logits: torch.Tensor, tokens: torch.Tensor, top: int) -> torch.Tensor:
    """Of `LogprobTensors`."""
    if cpu_library.library() is not None:
        values, ranks, top_values, top_tokens = cpu_sampling.logprobs(logits.float().contiguous(), tokens, top)
        values, ranks, tokens = values.unsqueeze(-1), ranks.unsqueeze(-1), tokens.unsqueeze(-1)
    else:
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        tokens = tokens.unsqueeze(-1)
        values = logprobs.gather(-1, tokens)
        ranks = (logprobs > values).sum(dim=-1, keepdim=True) + 1
        top_values, top_tokens = logprobs.topk(top, dim=-1)
    return torch.cat([part.double() for part in (tokens, values, ranks, top_tokens, top_values)], dim=-1)
