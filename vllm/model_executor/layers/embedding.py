"""Token embedding and output projection, split by vocabulary over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vllm.distributed.communication import all_gather_last_dim, all_reduce
from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.model_executor.layers.linear import copy_checked, linear


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding table [vocab_size, hidden_size]; each rank holds an equal run of (padded) rows."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.tp = tp
        self.vocab_size = vocab_size
        self.rows = -(-vocab_size // tp.world_size)
        self.first = tp.rank * self.rows
        self.weight = nn.Parameter(torch.zeros(self.rows, hidden_size), requires_grad=False)

    def load_shard(self, tensor: torch.Tensor) -> None:
        if tensor.shape[0] != self.vocab_size:
            raise ValueError(f"the embedding has {tensor.shape[0]} rows, the vocabulary {self.vocab_size} tokens")
        mine = tensor[self.first : self.first + self.rows]
        copy_checked(self.weight[: mine.shape[0]], mine, "embedding")

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
        scores = all_gather_last_dim(linear(hidden, self.weight, None), self.tp)[..., : self.vocab_size]
        return scores if out is None else out.copy_(scores)
