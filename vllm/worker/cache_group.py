"""KV memory of the layers of one cache group: their tensors, and the block tables of the sequences that run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch

from vllm.kv_cache.spec import LayerCache
from vllm.ops.staging import to_device, write
from vllm.platforms.devices import is_gpu
from vllm.step import BlockOrders


class CacheGroup:
    """Layers that share block numbers.

    Args:
        layers: What each layer keeps.
        num_blocks, block_size: Blocks, and slots in each.
        max_num_seqs: Rows of `block_tables`, those for system prompts included.
        max_blocks_per_seq: Columns of `block_tables`.
        device: Of the K/V tensors.

    Attributes:
        k_caches, v_caches: Per layer [num_blocks * block_size, num_kv_heads, head_dim].
        block_tables: int64 [max_num_seqs, max_blocks_per_seq].
    """

    def __init__(
        self,
        layers: Sequence[LayerCache],
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        rows = [*(layer.k for layer in layers), *(layer.v for layer in layers)]
        # Tensors of one shape lie in one piece, so that an extent of all of them is a rectangle of memory: one copy to
        # the host.
        alike = {
            row: iter(
                torch.zeros(
                    (count, num_blocks * block_size, row.num_heads, row.dim), dtype=row.dtype, device=device
                ).unbind()
            )
            for row, count in Counter(rows).items()
        }
        caches = [next(alike[row]) for row in rows]
        self.k_caches, self.v_caches = caches[: len(layers)], caches[len(layers) :]
        self.block_tables = torch.zeros((max_num_seqs, max_blocks_per_seq), dtype=torch.int64, device=device)
        self._num_blocks_of_row = [0] * max_num_seqs
        self._device = device
        self._copy = self._copier()

    @property
    def tensors(self) -> list[torch.Tensor]:
        """K of every layer, then V."""
        return [*self.k_caches, *self.v_caches]

    def _copier(self) -> Callable[[list[tuple[int, int]]], None]:
        """What copies blocks fastest on this device."""
        from vllm.ops.cpu import kernels as cpu_kernels

        caches = self.tensors
        if is_gpu(self._device):
            from vllm.ops.triton.copy import BlockCopier

            sizes = {cache[0].nbytes for cache in caches}
            copiers = [BlockCopier([c for c in caches if c[0].nbytes == n], self.block_size) for n in sizes]

            def copy(pairs: list[tuple[int, int]]) -> None:
                for copier in copiers:
                    copier.copy(pairs)

            return copy
        if cpu_kernels.library() is not None:
            return cpu_kernels.BlockCopier(caches, self.block_size).copy
        return self._copy_by_index

    def extent_slots(self, start_block: int, num_tokens: int) -> slice:
        """Rows of a K/V tensor that hold the first `num_tokens` tokens of an extent."""
        first = start_block * self.block_size
        return slice(first, first + num_tokens)

    def arrange(self, orders: BlockOrders) -> None:
        """Carries out orders, all but those for block tables."""
        self.copy(orders.moves)
        self.copy(orders.copies)
        self.clear(orders.cleared)

    def set_blocks(self, updates: list[tuple[int, int, list[int]]]) -> None:
        """Writes block ids into the block tables, all at once.

        Args:
            updates: (row, first column, block ids); of two that touch the same entry, the later one counts.

        Raises:
            RuntimeError: an update leaves a gap in a row's table; the plan is not one for this rank.
        """
        if not updates:
            return
        for row, first, blocks in updates:
            if first > self._num_blocks_of_row[row]:
                raise RuntimeError(f"row {row} has {self._num_blocks_of_row[row]} blocks, cannot add at {first}")
            self._num_blocks_of_row[row] = max(self._num_blocks_of_row[row], first + len(blocks))
        if len(updates) == 1:
            write(self.block_tables[row, first : first + len(blocks)], np.array(blocks, np.int64))
            return
        lengths = np.array([len(blocks) for _, _, blocks in updates])
        rows = np.repeat([row for row, _, _ in updates], lengths)
        starts = np.array([first for _, first, _ in updates]) - (lengths.cumsum() - lengths)
        columns = np.arange(len(rows)) + np.repeat(starts, lengths)
        values = np.fromiter(chain.from_iterable(blocks for _, _, blocks in updates), np.int64, len(rows))
        # Of two that touch the same entry the later one counts, so entries are looked for from the end.
        _, kept = np.unique((rows * self.block_tables.shape[1] + columns)[::-1], return_index=True)
        rows, columns, values = (x[::-1][kept] for x in (rows, columns, values))
        where_row, where_column, written = to_device(np.stack((rows, columns, values)), self._device)
        self.block_tables[where_row, where_column] = written

    def forget(self, row: int) -> None:
        """Forgets the block table of a row."""
        self._num_blocks_of_row[row] = 0

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """Copies whole blocks, all layers: `pairs` of (source, destination).

        All sources are read before any destination is written, so that a block may be both.
        """
        if pairs:
            self._copy(pairs)

    def _copy_by_index(self, pairs: list[tuple[int, int]]) -> None:
        moves = torch.tensor(pairs, dtype=torch.int64, device=self._device)
        offsets = torch.arange(self.block_size, device=self._device)
        source = (moves[:, :1] * self.block_size + offsets).flatten()
        destination = (moves[:, 1:] * self.block_size + offsets).flatten()
        for cache in self.tensors:
            cache[destination] = cache[source]

    def clear(self, blocks: list[int]) -> None:
        """Fills blocks with zeros, all layers."""
        for block in blocks:
            slots = self.extent_slots(block, self.block_size)
            for cache in self.tensors:
                cache[slots].zero_()
