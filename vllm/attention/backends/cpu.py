"""Attention by the compiled CPU kernels."""

from __future__ import annotations

import torch

from vllm.attention.backends.base import AttentionBackend
from vllm.ops.attention.metadata import AttentionMetadata
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.ops.cpu.kernels import PreparedBatch


class CpuAttentionBackend(AttentionBackend):
    """Prefix and suffix attention as products of packed matrices.

    Within each run of 16 slots the K/V tensors hold keys and values in the order in which the kernels multiply them
    (see `csrc/cpu/api.h`), so that nothing is rearranged on the way; blocks are copied as they are.
    """

    @property
    def kv_layout(self) -> str:
        return "tiles16"

    def prepare(self, metadata: AttentionMetadata) -> PreparedBatch:
        return cpu_kernels.prepare(metadata)

    def rope_and_write(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        slot_mapping: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        num_heads: int,
    ) -> torch.Tensor:
        q = cpu_kernels.rope_and_write(
            qkv.float().contiguous(), positions, cos_sin, slot_mapping, k_cache, v_cache, num_heads
        )
        return q.to(qkv.dtype)

    def forward(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        prepared: PreparedBatch,
    ) -> torch.Tensor:
        wide = q.float().contiguous()
        return cpu_kernels.attention(wide, k_cache, v_cache, scale, prepared, cpu_kernels.arithmetic()).to(q.dtype)
