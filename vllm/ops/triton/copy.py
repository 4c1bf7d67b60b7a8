"""Copies of whole K/V blocks over all layers, in one launch (two where a block is both source and destination)."""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm.ops.launch import follow, launch

# Blocks are moved as 8-byte words, so many at a time.
_WORDS = 1024


@triton.jit
def _copy_kernel(source_bases, target_bases, pairs_ptr, num_words, BLOCK: tl.constexpr, PDL: tl.constexpr):
    follow(PDL)
    pair = tl.program_id(0)
    tensor = tl.program_id(1)
    source = tl.load(source_bases + tensor).to(tl.pointer_type(tl.int64))
    target = tl.load(target_bases + tensor).to(tl.pointer_type(tl.int64))
    source += tl.load(pairs_ptr + 2 * pair) * num_words
    target += tl.load(pairs_ptr + 2 * pair + 1) * num_words
    words = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = words < num_words
    tl.store(target + words, tl.load(source + words, mask=mask), mask=mask)


class BlockCopier:
    """Copies blocks among the K and V tensors of a rank.

    Attributes:
        bases: Addresses of the tensors; int64 [tensors].

    Args:
        caches: K and V tensors, [num_slots, num_kv_heads, head_dim] each, contiguous, with slots of one size.
        block_size: Slots in a block.
    """

    def __init__(self, caches: Sequence[torch.Tensor], block_size: int) -> None:
        self._device = caches[0].device
        # The kernel knows only addresses, so the tensors must live as long as the copier.
        self._caches = caches
        self._block_bytes = block_size * caches[0][0].nbytes
        if self._block_bytes % 8 or any(c.data_ptr() % 8 or not c.is_contiguous() for c in caches):
            raise ValueError(f"blocks of {self._block_bytes} bytes cannot be copied as 8-byte words")
        self.bases = torch.tensor([c.data_ptr() for c in caches], dtype=torch.int64, device=self._device)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies (source, destination) blocks; all sources are read before any destination is written."""
        if not pairs:
            return
        moves = torch.tensor(pairs, dtype=torch.int64)
        if {source for source, _ in pairs}.isdisjoint(target for _, target in pairs):
            self.launch(self.bases, self.bases, moves.to(self._device))
            return
        num, num_tensors = len(pairs), len(self.bases)
        staging = torch.empty(num_tensors * num * self._block_bytes // 8, dtype=torch.int64, device=self._device)
        offsets = torch.arange(num_tensors, device=self._device) * (num * self._block_bytes)
        bases, between = staging.data_ptr() + offsets, torch.arange(num)
        self.launch(self.bases, bases, torch.stack((moves[:, 0], between), dim=1).to(self._device))
        self.launch(bases, self.bases, torch.stack((between, moves[:, 1]), dim=1).to(self._device))

    def launch(self, source_bases: torch.Tensor, target_bases: torch.Tensor, moves: torch.Tensor) -> None:
        """Copies between two sets of tensors, by their addresses: `moves` of (source, destination), int64 [n, 2]."""
        num_words = self._block_bytes // 8
        grid = (len(moves), len(source_bases), triton.cdiv(num_words, _WORDS))
        launch(_copy_kernel, grid, source_bases, target_bases, moves, num_words, BLOCK=_WORDS, num_warps=4)


def copy_blocks_reference(caches: Sequence[torch.Tensor], block_size: int, pairs: Sequence[tuple[int, int]]) -> None:
    """`BlockCopier.copy` in plain torch."""
    if not pairs:
        return
    source, target = torch.tensor(pairs, device=caches[0].device).T
    for cache in caches:
        blocks = cache.view(-1, block_size, *cache.shape[1:])
        blocks[target] = blocks[source]
