"""Decode steps as CUDA graphs: the whole pass, from input tokens to drawn tokens, replayed by one call.

A graph fixes kernels, shapes and addresses. What differs between steps of one batch size lies in device memory that is
refilled before a replay: which rows run, their positions, the work lists of attention. So a graph serves any mix of
groups, extents and lengths.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from vllm.attention.backends.triton import DecodeBuffers, TritonAttentionBackend
from vllm.attention.layer import ForwardContext
from vllm.attention.metadata import PrefixGroup
from vllm.logger import init_logger
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.worker.cache_engine import CacheEngine

logger = init_logger(__name__)

_SMALL_BATCHES = (1, 2, 4, 8)
_BATCH_STEP = 16


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Sizes that are captured, rising: a batch runs in the next larger one, so at most 15 rows are padding."""
    small = [b for b in _SMALL_BATCHES if b < max_num_seqs]
    return [*small, *range(_BATCH_STEP, max_num_seqs, _BATCH_STEP), max_num_seqs]


@dataclass(frozen=True)
class CapturedStep:
    """Graphs of one batch size: the general one, and the one for batches without prefixes and without split rows."""

    general: torch.cuda.CUDAGraph
    direct: torch.cuda.CUDAGraph


class GraphRunner:
    """Captures decode steps at construction, and replays them.

    Args:
        token_ids: Tokens of all rows, and one row more that padding reads and writes; int64 [max_num_seqs + 1, n].
        vocab_size: Columns of the logits.
        max_num_seqs: Largest batch.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        cache: CacheEngine,
        backend: TritonAttentionBackend,
        token_ids: torch.Tensor,
        vocab_size: int,
        max_num_seqs: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._backend = backend
        self._token_ids = token_ids
        self._padding_row = max_num_seqs
        self._sizes = batch_sizes(max_num_seqs)
        self._buffers = DecodeBuffers(backend, max_num_seqs, cache.block_tables, cache.block_size)
        device = token_ids.device
        # Rows, positions, and positions among the own tokens (-1: padding).
        self._inputs = torch.zeros((3, max_num_seqs), dtype=torch.int64, device=device)
        # Two host buffers in turn: the copy of the step before may still be under way.
        self._hosts = [torch.zeros((3, max_num_seqs), dtype=torch.int64, pin_memory=True) for _ in range(2)]
        self._copied = [torch.cuda.Event(), torch.cuda.Event()]
        self._turn = 0
        self._logits = torch.empty((max_num_seqs, vocab_size), dtype=backend.dtype, device=device)
        self._drawn = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._steps = self._capture()

    @torch.inference_mode()
    def _capture(self) -> dict[int, CapturedStep]:
        started = time.perf_counter()
        nothing = np.zeros(0, np.int64)
        self._fill(self._sizes[-1], nothing, nothing, nothing, [])
        # Kernels are compiled by their first launch, which must not fall into a capture.
        for direct in (False, True):
            for batch in self._sizes:
                self._step(batch, direct)
        torch.cuda.synchronize()
        pool = torch.cuda.graph_pool_handle()
        steps = {}
        for batch in reversed(self._sizes):
            graphs = []
            for direct in (False, True):
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self._step(batch, direct)
                graphs.append(graph)
            steps[batch] = CapturedStep(*graphs)
        logger.info("Decode captured at %d batch sizes in %.1f s.", len(steps), time.perf_counter() - started)
        return steps

    def _step(self, batch: int, direct: bool) -> None:
        rows, positions, own = self._inputs[:, :batch]
        block_size = self._cache.block_size
        inside = own.clamp(min=0)
        tables = self._cache.block_tables
        blocks = tables[rows.clamp(max=tables.shape[0] - 1), inside // block_size]
        context = ForwardContext(
            backend=self._backend,
            prepared=self._buffers.prepared(batch, direct=direct),
            positions=positions,
            slot_mapping=torch.where(own < 0, -1, blocks * block_size + inside % block_size),
            k_caches=self._cache.k_caches,
            v_caches=self._cache.v_caches,
        )
        hidden = self._model(self._token_ids[rows, positions], context)
        logits = self._model.logits(hidden)
        self._logits[:batch] = logits
        drawn = logits.argmax(dim=-1)
        self._drawn[:batch] = drawn
        self._token_ids[rows, positions + 1] = drawn

    def _fill(
        self, batch: int, rows: np.ndarray, positions: np.ndarray, own: np.ndarray, groups: list[PrefixGroup]
    ) -> bool:
        self._copied[self._turn].synchronize()
        host = self._hosts[self._turn]
        values, count = host.numpy(), len(rows)
        values[0, :count], values[1, :count], values[2, :count] = rows, positions, own
        values[0, count:batch], values[1, count:batch], values[2, count:batch] = self._padding_row, 0, -1
        self._inputs.copy_(host, non_blocking=True)
        self._copied[self._turn].record()
        self._turn ^= 1
        return self._buffers.fill(batch, rows, own + 1, groups) if count else False

    def run(
        self, rows: np.ndarray, positions: np.ndarray, own: np.ndarray, groups: list[PrefixGroup]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One decode step; the most likely tokens are written behind each row's tokens.

        Args:
            rows: Row of each sequence; int64 [n].
            positions: Of its input token; int64 [n].
            own: The same among its own tokens, the pinned prefix left out; int64 [n].
            groups: Reads of pinned extents, in tokens = entries of `rows`.

        Returns logits [n, vocab_size] and the most likely tokens, int64 [n]; overwritten by the next call.
        """
        count = len(rows)
        batch = next(b for b in self._sizes if b >= count)
        direct = self._fill(batch, rows, positions, own, groups)
        step = self._steps[batch]
        (step.direct if direct else step.general).replay()
        return self._logits[:count], self._drawn[:count]
