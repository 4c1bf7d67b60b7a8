"""Steps as CUDA graphs: decode steps from input tokens to drawn tokens, small mixed steps to the hidden states, each
replayed by one call; where some rows have top_k, top_p or min_p, the end of their draw is a second one.

A graph fixes kernels, shapes and addresses. What differs between steps of one size lies in device memory that is
refilled before a replay: which tokens of which rows are computed, the work lists of attention. So a graph serves any
mix of groups, extents and lengths.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from vllm.attention.backends.triton import TritonAttentionBackend
from vllm.attention.layer import ForwardContext
from vllm.attention.replay import ReplayPlans
from vllm.logger import init_logger
from vllm.model_executor.layers.sampler import Sampler
from vllm.model_executor.models.base import CausalLM
from vllm.ops.attention.metadata import PrefixGroup
from vllm.ops.sampling import LATER, NO_MASK
from vllm.ops.staging import write
from vllm.worker.cache_engine import CacheEngine

logger = init_logger(__name__)

_SMALL_BATCHES = (1, 2, 4, 8)
_BATCH_STEP = 16
# A mixed step of more tokens keeps the device busy for longer than the host needs to launch its kernels one by one.
_MIXED_SIZES = (32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)

# What other threads ask the driver meanwhile, as those of NCCL do, is no fault of a capture.
_WATCHED = "thread_local"


def batch_sizes(max_num_seqs: int) -> list[int]:
    """Decode sizes that are captured, rising: a batch runs in the next larger one, so at most 15 rows are padding."""
    small = [b for b in _SMALL_BATCHES if b < max_num_seqs]
    return [*small, *range(_BATCH_STEP, max_num_seqs, _BATCH_STEP), max_num_seqs]


@dataclass(frozen=True)
class CapturedDecode:
    """Graphs of one batch size.

    Attributes:
        general: From the input tokens to those drawn.
        plain: The same for batches without prefixes.
        restrict: The rest of the draw, for rows with top_k, top_p or min_p.
    """

    general: torch.cuda.CUDAGraph
    plain: torch.cuda.CUDAGraph
    restrict: torch.cuda.CUDAGraph


@dataclass(frozen=True)
class CapturedMixed:
    """A graph of mixed steps, and the hidden states [tokens, hidden_size] that it leaves until the next replay."""

    graph: torch.cuda.CUDAGraph
    hidden: torch.Tensor


class GraphRunner:
    """Captures steps once, and replays them.

    Args:
        token_ids: Tokens of all rows, and one row more that padding reads and writes; int64 [rows + 1, n].
        sampler: Draws; has kernels.
        max_num_seqs: Largest decode batch.
        max_num_batched_tokens: Most tokens of a step.

    Attributes:
        max_mixed_tokens: Most tokens of a mixed step that can be replayed.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: CacheEngine,
        backend: TritonAttentionBackend,
        token_ids: torch.Tensor,
        sampler: Sampler,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        self._model = model
        self._cache = cache
        self._backend = backend
        self._token_ids = token_ids
        self._sampler = sampler
        if sampler.kernels is None:
            raise ValueError("a sampler without kernels cannot be captured")
        self._kernels = sampler.kernels
        self._padding_row = len(token_ids) - 1
        self._sizes = batch_sizes(max_num_seqs)
        self._mixed_sizes = [n for n in _MIXED_SIZES if n <= max_num_batched_tokens]
        self.max_mixed_tokens = max(self._mixed_sizes, default=0)
        most = max(max_num_seqs, self.max_mixed_tokens)
        window_tables = None if cache.window is None else cache.window.block_tables
        self._plans = ReplayPlans(
            backend, model.attention_specs, most, cache.block_tables, cache.block_size, window_tables
        )
        device = token_ids.device
        self._logits = torch.empty((max_num_seqs, sampler.vocab_size), dtype=model.dtype, device=device)
        self._drawn = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        # Which rows are not drawn by the step itself.
        self._later = torch.full((max_num_seqs,), NO_MASK, dtype=torch.int64, device=device)
        self._any_later = False
        self._decode: dict[int, CapturedDecode] = {}
        self._mixed: dict[int, CapturedMixed] = {}
        nothing = self._inputs(most, *np.zeros((3, 0), np.int64))
        self._plans.fill(nothing, np.zeros((0, 4), np.int64), [], decode=False)

    @torch.inference_mode()
    def capture(self) -> None:
        started = time.perf_counter()
        # Whatever is set up by a first launch must not fall into a capture.
        with self._model.only_layers(self._model.layer_kinds()):
            self.run_all()
        torch.cuda.synchronize()
        pool = torch.cuda.graph_pool_handle()
        for tokens in reversed(self._mixed_sizes):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode=_WATCHED):
                hidden = self._mixed_step(tokens)
            self._mixed[tokens] = CapturedMixed(graph, hidden)
        for batch in reversed(self._sizes):
            parts = (
                partial(self._decode_step, batch, plain=False),
                partial(self._decode_step, batch, plain=True),
                partial(self._restrict, batch),
            )
            graphs = []
            for part in parts:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode=_WATCHED):
                    part()
                graphs.append(graph)
            self._decode[batch] = CapturedDecode(*graphs)
        logger.info(
            "Captured decode steps of %d sizes and mixed steps of %d in %.1f s.",
            len(self._sizes),
            len(self._mixed_sizes),
            time.perf_counter() - started,
        )

    @torch.inference_mode()
    def run_all(self) -> None:
        """Launches every step that is captured, on padding alone."""
        for tokens in self._mixed_sizes:
            self._mixed_step(tokens)
        for batch in self._sizes:
            for plain in (False, True):
                self._decode_step(batch, plain=plain)
            self._restrict(batch)

    def _decode_step(self, batch: int, *, plain: bool) -> None:
        self._model.logits(self._forward(batch, decode=True, plain=plain), out=self._logits[:batch])
        self._kernels.draw(*self._draw_inputs(batch), mask_rows=self._later[:batch], shift=1)

    def _restrict(self, batch: int) -> None:
        self._kernels.restrict(*self._draw_inputs(batch), shift=1)

    def _draw_inputs(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, rows, tokens so far (less the one that the step computes), tokens of all rows, place of the drawn."""
        rows, positions, _ = self._plans.inputs[:, :batch]
        return self._logits[:batch], rows, positions, self._token_ids, self._drawn[:batch]

    def _mixed_step(self, tokens: int) -> torch.Tensor:
        return self._forward(tokens, decode=False, plain=False)

    def _forward(self, tokens: int, *, decode: bool, plain: bool) -> torch.Tensor:
        rows, positions, own = self._plans.inputs[:, :tokens]
        cache = self._cache
        context = ForwardContext(
            backend=self._backend,
            prepared=self._plans.prepared(tokens, decode=decode, plain=plain),
            positions=positions,
            slot_mapping=self._slots(cache.block_tables, rows, own),
            k_caches=cache.k_caches,
            v_caches=cache.v_caches,
            window_slots=None if cache.window is None else self._slots(cache.window.block_tables, rows, own),
        )
        return self._model(self._token_ids[rows, positions], context)

    def _slots(self, tables: torch.Tensor, rows: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Slot of each query token in the group of these block tables, -1 for padding; int64 [T]."""
        block_size = self._cache.block_size
        inside = own.clamp(min=0)
        blocks = tables[rows.clamp(max=tables.shape[0] - 1), inside // block_size]
        return torch.where(own < 0, -1, blocks * block_size + inside % block_size)

    def _inputs(self, tokens: int, rows: np.ndarray, positions: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Of each query token its row, its position, and its position among the own tokens (-1: padding)."""
        values, count = np.empty((3, tokens), np.int64), len(rows)
        values[0, :count], values[1, :count], values[2, :count] = rows, positions, own
        values[0, count:], values[1, count:], values[2, count:] = self._padding_row, 0, -1
        return values

    def decode(
        self,
        rows: np.ndarray,
        positions: np.ndarray,
        own: np.ndarray,
        groups: list[PrefixGroup],
        window_groups: list[PrefixGroup] | None = None,
        later: list[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One decode step; the drawn tokens are written behind each row's tokens.

        Args:
            rows: Row of each sequence; int64 [n].
            positions: Of its input token; int64 [n].
            own: The same among its own tokens, the pinned prefix left out; int64 [n].
            groups, window_groups: Reads of pinned extents, in tokens = entries of `rows`; those of the window group
                where there is one.
            later: Entries of `rows` that are left to `Sampler.draw`, into the tokens that are returned.

        Returns logits [n, vocab_size] and the drawn tokens, int64 [n]; overwritten by the next call.
        """
        count = len(rows)
        batch = next(b for b in self._sizes if b >= count)
        sequences = np.empty((count, 4), np.int64)
        sequences[:, 0] = np.arange(count)
        sequences[:, 1] = 1
        sequences[:, 2] = own + 1
        sequences[:, 3] = rows
        inputs = self._inputs(batch, rows, positions, own)
        plain = self._plans.fill(inputs, sequences, groups, window_groups, decode=True)
        cut = self._sampler.rows.is_cut[rows]
        if later or self._any_later:
            when = np.full(len(self._later), NO_MASK)
            when[later or []] = LATER
            write(self._later, when)
            cut = cut & (when[:count] != LATER)
            self._any_later = bool(later)
        step = self._decode[batch]
        (step.plain if plain else step.general).replay()
        if cut.any():
            step.restrict.replay()
        return self._logits[:count], self._drawn[:count]

    def mixed(
        self,
        rows: np.ndarray,
        positions: np.ndarray,
        own: np.ndarray,
        sequences: np.ndarray,
        groups: list[PrefixGroup],
        window_groups: list[PrefixGroup] | None = None,
    ) -> torch.Tensor:
        """A step of at most `max_mixed_tokens` query tokens.

        Args:
            rows, positions, own: As for `decode`, of each query token; int64 [n].
            groups, window_groups: As for `decode`, in query tokens.
            sequences: (first query token, query tokens, own tokens with the query tokens, row) of each sequence.

        Returns hidden states [n, hidden_size]; overwritten by the next call.
        """
        tokens = next(n for n in self._mixed_sizes if n >= len(rows))
        inputs = self._inputs(tokens, rows, positions, own)
        self._plans.fill(inputs, sequences, groups, window_groups, decode=False)
        step = self._mixed[tokens]
        step.graph.replay()
        return step.hidden[: len(rows)]
