"""Attention by the compiled CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm.attention.backends.base import AttentionBackend
from vllm.attention.spec import AttentionSpec
from vllm.ops.attention.metadata import AttentionMetadata
from vllm.ops.cpu import kernels as cpu_kernels
from vllm.ops.cpu.kernels import AttentionOptions, Norm, PreparedBatch
from vllm.ops.rope import QkNorm, Rope


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
        if spec.v_dim != spec.head_dim:
            return f"values of {spec.v_dim} beside keys of {spec.head_dim}"
        heads_per_kv = spec.num_heads // spec.num_kv_heads
        return cpu_kernels.misfit_of_attention(heads_per_kv, spec.head_dim, self._block_size, spec.dtype)

    def prepare(self, metadata: AttentionMetadata, specs: Sequence[AttentionSpec]) -> list[PreparedBatch]:
        # The kernels cut a batch by the window of each layer themselves.
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
        norms = (None, None) if qk_norm is None else (Norm.of(qk_norm.norm, w) for w in (qk_norm.q, qk_norm.k))
        q_norm, k_norm = norms
        turned = None if rope is None else cpu_kernels.Rope(rope.cos_sin, rope.interleaved)
        # The scale belongs to the scores, which are not computed here.
        options = AttentionOptions(
            num_heads, num_kv_heads, head_dim, scale=1.0, q_norm=q_norm, k_norm=k_norm, rope=turned
        )
        wide = qkv.float().contiguous()
        q = cpu_kernels.norm_rope_and_write(wide, positions, slot_mapping, k_cache, v_cache, options)
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
        out = cpu_kernels.attention(
            q.float().contiguous(),
            k_cache,
            v_cache,
            spec.scale,
            prepared,
            cpu_kernels.arithmetic(),
            spec.window,
            spec.softcap,
            None if sinks is None else sinks.float(),
        )
        return out.to(q.dtype)
