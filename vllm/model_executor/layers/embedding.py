"""Token embedding and output projection, split by vocabulary over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vllm.distributed.communication import all_gather_last_dim, all_reduce
from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.model_executor.layers.linear import copy_checked
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.ops.linear import linear


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding table [vocab_size, hidden_size]; each rank holds an equal run of (padded) rows."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.tp = tp
        self.vocab_size = vocab_size
        self.rows = -(-vocab_size // tp.world_size)
        self.first = tp.rank * self.rows
        self.weight = nn.Parameter(torch.zeros(self.rows, hidden_size), requires_grad=False)

    def load(self, parts: tuple[str, ...], kind: str, tensor: torch.Tensor) -> None:
        """Loads this rank's rows; it has no parts."""
        if tensor.shape[0] != self.vocab_size:
            raise ValueError(f"the embedding has {tensor.shape[0]} rows, the vocabulary {self.vocab_size} tokens")
        mine = tensor[self.first : self.first + self.rows]
        copy_checked(self.weight[: mine.shape[0]], mine, "embedding")

    def holds(self, tensor: torch.Tensor) -> bool:
        """This rank's rows are those of a whole table, rounded to its dtype."""
        mine = tensor[self.first : self.first + self.rows].to(self.weight)
        return torch.equal(self.weight[: len(mine)], mine)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] → [T, hidden_size]."""
        if self.tp.world_size == 1:
            return functional.embedding(token_ids, self.weight)
        local = token_ids - self.first
        foreign = (local < 0) | (local >= self.rows)
        rows = functional.embedding(local.masked_fill(foreign, 0), self.weight)
        return all_reduce(rows.masked_fill(foreign.unsqueeze(-1), 0), self.tp)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of the whole vocabulary: [T, hidden_size] → [T, vocab_size]; into `out` if it is given."""
        if out is not None and self.tp.world_size == 1:
            return linear(hidden, self.weight[: self.vocab_size], None, out=out)
        return all_gather_last_dim(linear(hidden, self.weight, None), self.tp, self.vocab_size, out)


class OutputProjection(nn.Module):
    """Hidden states → scores of the vocabulary: `cap(multiplier · x Wᵀ)`.

    Args:
        table: Holds W; shared with the embedding where the two are tied.
        multiplier: Of the scores.
        softcap: Scores s become `softcap · tanh(s / softcap)`; None: they stay as they are.
    """

    def __init__(self, table: VocabParallelEmbedding, multiplier: float, softcap: float | None) -> None:
        super().__init__()
        self.table = table
        self.multiplier = multiplier
        self.softcap = softcap
        self.packed: cpu_kernels.PackedHead | None = None

    def pack(self, int8: bool, keep: bool) -> None:
        """Moves the weights into a packed copy for the compiled CPU kernels; the table's own stay if `keep`."""
        matrix = cpu_kernels.PackedMatrix(self.table.weight[: self.table.vocab_size], int8=int8)
        self.packed = cpu_kernels.PackedHead(matrix, self.multiplier, self.softcap)
        if not keep:
            self.table.weight.data = self.table.weight.new_empty(0)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[R, hidden_size] → [R, vocab_size]; into `out`, contiguous, if it is given."""
        if self.packed is not None:
            scores = cpu_kernels.linear(hidden.float().contiguous(), self.packed, cpu_kernels.arithmetic())
            return scores if out is None else out.copy_(scores)
        scores = self.table.logits(hidden, out)
        if self.multiplier != 1.0:
            scores.mul_(self.multiplier)
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        return scores

    def most_likely(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] → token id of the highest score, the first of equals; int64 [R]."""
        if self.packed is not None:
            return cpu_kernels.most_likely(hidden.float().contiguous(), self.packed, cpu_kernels.arithmetic())
        return self.logits(hidden).float().argmax(dim=-1)
