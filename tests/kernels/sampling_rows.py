"""Rows of the sampler's tables for the tests of its kernels: what each asks for, and the draw by the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.kernels.kernel_inputs import DEVICE
from vllm.model_executor.layers.sampling_rows import SamplingRows
from vllm.ops import sampling
from vllm.ops.triton.sampling import DrawKernels
from vllm.sampling_params import SamplingParams
from vllm.step import SequenceStart
from vllm.token_ids import token_array

POSITIONS = 64


class Rows:
    """Rows that have begun, and the kernels over them.

    Args:
        search: Sizes of the kernels.
    """

    def __init__(self, num_rows: int, vocab_size: int, **search: int) -> None:
        self.num_rows = num_rows
        self.rows = SamplingRows(num_rows + 1, vocab_size, DEVICE)
        self.token_ids = torch.zeros((num_rows + 2, POSITIONS), dtype=torch.int64, device=DEVICE)
        self.num_tokens = np.ones(num_rows, np.int64)
        self.kernels = DrawKernels(self.rows.tables, num_rows + 4, **search)

    def start(
        self,
        row: int,
        prompt: tuple[int, ...] = (0,),
        output: tuple[int, ...] = (),
        stops: tuple[int, ...] = (),
        seed: int = 7,
        **params: Any,
    ) -> None:
        ids = [*prompt, *output]
        self.token_ids[row, : len(ids)] = torch.tensor(ids)
        self.num_tokens[row] = len(ids)
        asked = SamplingParams(**params)
        self.rows.start([SequenceStart(row, token_array(ids), len(prompt), [], (), asked, seed, stops)])

    def draw(
        self,
        logits: torch.Tensor,
        rows: list[int],
        num_tokens: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        mask_rows: torch.Tensor | None = None,
    ) -> list[int]:
        """One token for each row, written behind its tokens."""
        index = torch.tensor(rows, device=DEVICE)
        if num_tokens is None:
            num_tokens = torch.from_numpy(np.append(self.num_tokens, [1, 1, 1])[rows]).to(DEVICE)
        drawn = torch.full((len(rows),), -7, dtype=torch.int64, device=DEVICE)
        self.kernels.draw(logits, index, num_tokens, self.token_ids, drawn, masks, mask_rows)
        self.kernels.restrict(logits, index, num_tokens, self.token_ids, drawn)
        return drawn.tolist()

    def expected(
        self,
        logits: torch.Tensor,
        rows: list[int],
        masks: torch.Tensor | None = None,
        mask_rows: torch.Tensor | None = None,
    ) -> list[int]:
        """By the reference, whose counts are its own."""
        tables = self.rows.tables
        copy = tables._replace(counts=tables.counts.clone())
        index = torch.tensor(rows, device=DEVICE)
        num_tokens = torch.from_numpy(self.num_tokens[rows]).to(DEVICE)
        return sampling.draw(logits, index, num_tokens, self.token_ids, copy, masks, mask_rows).tolist()

    def advance(self, rows: list[int], tokens: list[int]) -> None:
        """The drawn tokens belong to the rows from now on."""
        for row, token in zip(rows, tokens, strict=True):
            assert int(self.token_ids[row, self.num_tokens[row]]) == token
            self.num_tokens[row] += 1


def mask_of(allowed: list[int], vocab_size: int) -> torch.Tensor:
    """int32 words [ceil(vocab_size / 32)]."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[allowed] = 1
    return torch.from_numpy(np.packbits(bits, bitorder="little").view(np.int32)).to(DEVICE)
