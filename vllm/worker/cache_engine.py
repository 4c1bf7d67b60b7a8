"""KV memory of one rank: its tensors, and the block tables of the sequences that run on it.

All ranks hold the same block numbering; which blocks are pinned says `PinnedBlockPool`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from vllm.kv_cache.extents import Extent as Extent
from vllm.kv_cache.extents import PinnedBlockPool as PinnedBlockPool
from vllm.kv_cache.spec import LayerCache
from vllm.step import StepPlan
from vllm.worker.cache_group import CacheGroup


class HasRow(Protocol):
    """What `CacheEngine.free` needs to know of a sequence."""

    @property
    def row(self) -> int: ...


class CacheEngine:
    """K and V tensors of a rank, and the block tables of the sequences that run on it.

    Per layer one K and one V tensor `[num_blocks * block_size, num_kv_heads, head_dim]`: a slot is a row, and an extent
    is a plain slice that any dense attention can read without a block table. Layers may differ in heads and their size.

    Layers lie in the full group, or in the window group where there is one; see `kv_cache.windows`. What is said here
    of blocks without a group's name is said of those of the full one.

    Args:
        layers: What each layer keeps.
        num_blocks, block_size: Blocks, and slots in each.
        max_num_seqs: Rows of `block_tables`, those for system prompts included.
        max_blocks_per_seq: Columns of `block_tables`.
        device: Of the K/V tensors.
        num_window_blocks: Blocks of the window group, which has the layers with a window; 0: all layers keep all.

    Attributes:
        k_caches, v_caches: Of every layer, whatever its group.
        full, window: The groups; there may be no window group.
        block_tables: int64 [max_num_seqs, max_blocks_per_seq].
    """

    def __init__(
        self,
        *,
        layers: Sequence[LayerCache],
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        device: torch.device,
        num_window_blocks: int = 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        in_window = [bool(num_window_blocks) and layer.window is not None for layer in layers]

        def group(inside: bool, count: int) -> CacheGroup:
            members = [layer for layer, is_inside in zip(layers, in_window, strict=True) if is_inside == inside]
            return CacheGroup(members, count, block_size, max_num_seqs, max_blocks_per_seq, device)

        self.full = group(False, num_blocks)
        self.window = group(True, num_window_blocks) if num_window_blocks else None
        self.block_tables = self.full.block_tables
        self.copy, self.clear, self.set_blocks = self.full.copy, self.full.clear, self.full.set_blocks
        self.extent_slots = self.full.extent_slots
        next_of = {
            inside: iter(zip(of_group.k_caches, of_group.v_caches, strict=True))
            for inside, of_group in ((False, self.full), (True, self.window))
            if of_group is not None
        }
        caches = [next(next_of[inside]) for inside in in_window]
        self.k_caches, self.v_caches = [k for k, _ in caches], [v for _, v in caches]

    def block_bytes(self) -> tuple[int, ...]:
        """Bytes of one block in K of every layer, then in V of every layer; first of the full group, then of the window
        group."""
        tensors = [*self.full.tensors, *(self.window.tensors if self.window is not None else ())]
        return tuple(self.block_size * tensor[0].nbytes for tensor in tensors)

    @staticmethod
    def bytes_per_block(layers: Sequence[LayerCache], block_size: int) -> int:
        """Bytes of K and V of one block over some layers."""
        return block_size * sum(layer.slot_bytes for layer in layers)

    def apply(self, plan: StepPlan) -> None:
        """Brings blocks and block tables into the state that the batch of a plan speaks of."""
        self.full.arrange(plan)
        if self.window is not None:
            self.window.arrange(plan.window)
        for freed in plan.freed:
            self.free(freed)
        self.full.set_blocks([*plan.new_blocks, *((seq.row, 0, seq.block_table) for seq in plan.started)])
        if self.window is not None:
            started = ((seq.row, 0, seq.window_table) for seq in plan.started)
            self.window.set_blocks([*plan.window.new_blocks, *started])

    def free(self, seq: HasRow) -> None:
        """Forgets the block table of a sequence that no longer runs. Of a system prompt, too, that is all that ends:
        its KV lies in extents, read by others, which only their unpinning ends."""
        self.full.forget(seq.row)
        if self.window is not None:
            self.window.forget(seq.row)
