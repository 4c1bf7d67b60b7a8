"""The compiled CPU kernels of `csrc/cpu`, called by ctypes."""

from __future__ import annotations

from ctypes import c_int64

import torch

from vllm.ops.cpu.attention import MAX_HEAD_DIM as MAX_HEAD_DIM
from vllm.ops.cpu.attention import AttentionOptions as AttentionOptions
from vllm.ops.cpu.attention import Norm as Norm
from vllm.ops.cpu.attention import PreparedBatch as PreparedBatch
from vllm.ops.cpu.attention import Rope as Rope
from vllm.ops.cpu.attention import attention as attention
from vllm.ops.cpu.attention import misfit_of_attention as misfit_of_attention
from vllm.ops.cpu.attention import norm as norm
from vllm.ops.cpu.attention import norm_rope_and_write as norm_rope_and_write
from vllm.ops.cpu.attention import prepare as prepare
from vllm.ops.cpu.attention import rms_norm as rms_norm
from vllm.ops.cpu.attention import rope_and_write as rope_and_write
from vllm.ops.cpu.blocks import BLOCK as BLOCK
from vllm.ops.cpu.blocks import BLOCK_TYPES as BLOCK_TYPES
from vllm.ops.cpu.blocks import BlockMatrix as BlockMatrix
from vllm.ops.cpu.blocks import BlockRows as BlockRows
from vllm.ops.cpu.blocks import pack_int4_groups as pack_int4_groups
from vllm.ops.cpu.library import INSTRUCTIONS as INSTRUCTIONS
from vllm.ops.cpu.library import address, kernels
from vllm.ops.cpu.library import library as library
from vllm.ops.cpu.matrix import ACTIVATIONS as ACTIVATIONS
from vllm.ops.cpu.matrix import ARITHMETICS as ARITHMETICS
from vllm.ops.cpu.matrix import DOT as DOT
from vllm.ops.cpu.matrix import TILE as TILE
from vllm.ops.cpu.matrix import TILES as TILES
from vllm.ops.cpu.matrix import WIDEN as WIDEN
from vllm.ops.cpu.matrix import Matrix as Matrix
from vllm.ops.cpu.matrix import PackedHead as PackedHead
from vllm.ops.cpu.matrix import PackedMatrix as PackedMatrix
from vllm.ops.cpu.matrix import activated as activated
from vllm.ops.cpu.matrix import arithmetic as arithmetic
from vllm.ops.cpu.matrix import linear as linear
from vllm.ops.cpu.matrix import most_likely as most_likely
from vllm.ops.cpu.matrix import swiglu as swiglu
from vllm.ops.cpu.program import CompiledSteps as CompiledSteps
from vllm.ops.cpu.program import DecoderLayer as DecoderLayer
from vllm.ops.cpu.program import DecoderProgram as DecoderProgram
from vllm.ops.cpu.program import SequenceRows as SequenceRows
from vllm.ops.cpu.sampling import logprobs as logprobs
from vllm.ops.cpu.sampling import sample as sample


def copy_blocks(cache: torch.Tensor, pairs: torch.Tensor, block_size: int) -> None:
    """Copies blocks of `block_size` rows of `cache`: int64 `pairs` [P, 2] of (from, to); all are read before any is
    written."""
    size = block_size * cache.stride(0) * cache.element_size()
    kernels().vsp_copy_blocks(address(cache), address(pairs), c_int64(len(pairs)), c_int64(size))


class BlockCopier:
    """Copies blocks of several caches [num_slots, ...] at once."""

    def __init__(self, caches: list[torch.Tensor], block_size: int) -> None:
        self._caches = caches
        self._block_size = block_size

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """`pairs` of (source, destination) blocks; all sources are read before any destination is written."""
        moves = torch.tensor(pairs, dtype=torch.int64)
        for cache in self._caches:
            copy_blocks(cache, moves, self._block_size)
