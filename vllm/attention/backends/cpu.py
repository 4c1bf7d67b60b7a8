"""Attention by the compiled CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm.attention.backends.base import AttentionBackend
from vllm.attention.spec import AttentionSpec
from vllm.ops.attention.metadata import AttentionMetadata
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.ops.cpu.kernels import PreparedBatch
from vllm.ops.rope import QkNorm, Rope, normalise_and_turn


class CpuAttentionBackend(AttentionBackend):
    """Prefix and suffix attention as products of packed matrices.

    Within each run of 16 slots the K/V tensors hold keys and values in the order in which the kernels multiply them
    (see `csrc/cpu/api.h`), so that nothing is rearranged on the way; blocks are copied as they are.

    Args:
        block_size: Slots in a block.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size

    @property
    def kv_layout(self) -> str:
        return "tiles16"

    def misfit(self, spec: AttentionSpec) -> str | None:
        return spec.beyond_plain() or cpu_kernels.misfit_of_attention(
            spec.num_heads // spec.num_kv_heads, spec.head_dim, self._block_size, spec.dtype
        )

    def prepare(self, metadata: AttentionMetadata, specs: Sequence[AttentionSpec]) -> list[PreparedBatch]:
        return [cpu_kernels.prepare(metadata)] * len(specs)

    def rope_and_write(
        self,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope | None,
        qk_norm: QkNorm | None,
        slot_mapping: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        num_heads: int,
    ) -> torch.Tensor:
        num_kv_heads, head_dim = k_cache.shape[1:]
        if qk_norm is not None or rope is None or rope.interleaved or rope.cos_sin.shape[1] < head_dim:
            q_and_k = (num_heads + num_kv_heads) * head_dim
            turned = normalise_and_turn(qkv[:, :q_and_k], positions, rope, qk_norm, num_heads, head_dim)
            qkv, rope = torch.cat((turned.flatten(1), qkv[:, q_and_k:]), dim=1), self._unturned(head_dim)
            positions = torch.zeros_like(positions)
        q = cpu_kernels.rope_and_write(
            qkv.float().contiguous(), positions, rope.cos_sin, slot_mapping, k_cache, v_cache, num_heads
        )
        return q.to(qkv.dtype)

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        spec: AttentionSpec,
        prepared: PreparedBatch,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        wide = q.float().contiguous()
        out = cpu_kernels.attention(wide, k_cache, v_cache, spec.scale, prepared, cpu_kernels.arithmetic())
        return out.to(q.dtype)

    @staticmethod
    def _unturned(head_dim: int) -> Rope:
        """A table that leaves position 0 as it is, for heads that have been turned already."""
        half = head_dim // 2
        return Rope(torch.cat((torch.ones(1, half), torch.zeros(1, half)), dim=1))
