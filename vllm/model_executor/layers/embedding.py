"""Token embedding and output projection, split by vocabulary over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from vllm.distributed.communication import all_gather_last_dim, all_reduce
from vllm.distributed.parallel_state import TensorParallelGroup
from vllm.model_executor.layers.linear import copy_checked
from vllm.model_executor.layers.quantization.gguf import block_sizes
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.ops.linear import linear


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding table [vocab_size, hidden_size]; each rank holds an equal run of (padded) rows.

    Args:
        block_type: GGUF's name of the blocks that the table stays in, where the compiled CPU kernels read it and there
            is one rank; None: it is whole.

    Attributes:
        blocks: The table, if it is in blocks; `weight` is empty then.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, tp: TensorParallelGroup, block_type: str | None = None
    ) -> None:
        super().__init__()
        self.tp = tp
        self.vocab_size = vocab_size
        self.block_type = block_type
        self.hidden_size = hidden_size
        self.dtype = torch.get_default_dtype()
        self.blocks: cpu_kernels.BlockMatrix | None = None
        self.rows = -(-vocab_size // tp.world_size)
        self.first = tp.rank * self.rows
        size = (self.rows, hidden_size) if block_type is None else (0,)
        self.weight = nn.Parameter(torch.zeros(size), requires_grad=False)

    def load(self, parts: tuple[str, ...], kind: str, tensor: torch.Tensor) -> None:
        """Loads this rank's rows; it has no parts. Blocks come as uint8 [vocab_size, blocks, bytes of a block]."""
        if tensor.shape[0] != self.vocab_size:
            raise ValueError(f"the embedding has {tensor.shape[0]} rows, the vocabulary {self.vocab_size} tokens")
        if self.block_type is not None:
            rows = cpu_kernels.BlockRows(tensor.flatten(1), self.hidden_size, self.block_type)
            self.blocks = cpu_kernels.BlockMatrix([rows], narrow=self.dtype == torch.bfloat16)
            return
        mine = tensor[self.first : self.first + self.rows]
        copy_checked(self.weight[: mine.shape[0]], mine, "embedding")

    def bytes_in_blocks(self) -> int:
        """Of the table, if it is in blocks, once it is loaded."""
        if self.block_type is None:
            return 0
        weights, size = block_sizes(self.block_type)
        return self.vocab_size * self.hidden_size // weights * size

    def holds(self, tensor: torch.Tensor) -> bool:
        """This rank's rows are those of a whole table, rounded to its dtype."""
        if self.blocks is not None:
            return torch.equal(self.blocks.rows(torch.arange(self.vocab_size)), tensor.float())
        mine = tensor[self.first : self.first + self.rows].to(self.weight)
        return torch.equal(self.weight[: len(mine)], mine)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [T] → [T, hidden_size]; of a table in blocks float32."""
        if self.blocks is not None:
            return self.blocks.rows(token_ids)
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
    """Hidden states → scores of the vocabulary: `cap(multiplier · (x Wᵀ + b))`.

    Args:
        table: Holds W; shared with the embedding where the two are tied.
        multiplier: Of the scores.
        softcap: Scores s become `softcap · tanh(s / softcap)`; None: they stay as they are.
        has_bias: There is a b; each rank holds all of it.
    """

    def __init__(
        self, table: VocabParallelEmbedding, multiplier: float, softcap: float | None, has_bias: bool = False
    ) -> None:
        super().__init__()
        self.bias: nn.Parameter | None
        bias = nn.Parameter(torch.zeros(table.vocab_size), requires_grad=False) if has_bias else None
        self.register_parameter("bias", bias)
        self.table = table
        self.multiplier = multiplier
        self.softcap = softcap
        self.packed: cpu_kernels.PackedHead | None = None

    def load(self, parts: tuple[str, ...], kind: str, tensor: torch.Tensor) -> None:
        """Loads the `bias` (`kind`); it has no parts."""
        copy_checked(getattr(self, kind), tensor, kind)

    def pack(self, int8: bool, keep: bool) -> None:
        """Moves the weights into a packed copy for the compiled CPU kernels; the table's own stay if `keep`.
        Blocks are in that form already."""
        matrix: cpu_kernels.Matrix | None = self.table.blocks
        if matrix is None:
            matrix = cpu_kernels.PackedMatrix(self.table.weight[: self.table.vocab_size], self.bias, int8=int8)
        self.packed = cpu_kernels.PackedHead(matrix, self.multiplier, self.softcap)
        if not keep:
            self.table.weight.data = self.table.weight.new_empty(0)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[R, hidden_size] → [R, vocab_size]; into `out`, contiguous, if it is given."""
        if self.packed is not None:
            scores = cpu_kernels.linear(hidden.float().contiguous(), self.packed, cpu_kernels.arithmetic())
            return scores if out is None else out.copy_(scores)
        scores = self.table.logits(hidden, out)
        if self.bias is not None:
            scores.add_(self.bias)
        if self.multiplier != 1.0:
            scores.mul_(self.multiplier)
        if self.softcap is not None:
            scores.div_(self.softcap).tanh_().mul_(self.softcap)
        return scores

    def most_likely(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] → token id of the highest score, the first of equals; int64 [R]."""
        if self.packed is not None and self.bias is None:
            return cpu_kernels.most_likely(hidden.float().contiguous(), self.packed, cpu_kernels.arithmetic())
        return self.logits(hidden).float().argmax(dim=-1)
