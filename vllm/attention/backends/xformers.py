"""Attention by xformers' partial attention: block-diagonal masks, log-sum-exps, a merge.

An option for GPUs where its operators are wanted; the Triton backend is faster (it packs the query rows of a group,
splits long extents and is captured into graphs) and needs nothing installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from xformers import __version__ as xformers_version
from xformers.ops import fmha
from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask, BlockDiagonalGappyKeysMask

from vllm.attention.backends.base import AttentionBackend
from vllm.attention.spec import AttentionSpec
from vllm.ops.attention.metadata import AttentionMetadata, PrefixGroup
from vllm.ops.attention.partial import merge
from vllm.ops.rope import QkNorm, Rope
from vllm.ops.staging import to_device


@dataclass(frozen=True)
class PrefixRead:
    """Groups that have no token in common, read in one call.

    Attributes:
        tokens: Query tokens of the groups, group by group; int64 [M].
        mask: Each group's tokens see its extent, all of it.
        end: Slots from here on are in no extent of these groups.
    """

    tokens: torch.Tensor
    mask: BlockDiagonalGappyKeysMask
    end: int


@dataclass(frozen=True)
class PreparedBatch:
    """What `attend` calls for every layer.

    Attributes:
        own_slots: Slots of the own tokens, sequence by sequence; int64 [N].
        own_mask: Each sequence's query tokens see its own tokens, causally.
        reads: Pinned extents; a chain of them takes as many reads.
    """

    own_slots: torch.Tensor
    own_mask: BlockDiagonalCausalFromBottomRightMask
    reads: list[PrefixRead]


class XFormersAttentionBackend(AttentionBackend):
    """Own blocks are gathered and read causally, extents are read where they lie.

    Args:
        device: Of q, K and V.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def misfit(self, spec: AttentionSpec) -> str | None:
        if spec.beyond_plain() is not None:
            return spec.beyond_plain()
        q = torch.zeros((16, spec.num_heads, spec.head_dim), dtype=spec.dtype, device=self.device)
        k = torch.zeros((16, spec.num_kv_heads, spec.head_dim), dtype=spec.dtype, device=self.device)
        try:
            for mask in (self._causal([16], [16]), self._whole([16], [0, 16], [16])):
                _partial(q, k, k, mask, 1.0)
        except NotImplementedError as error:
            reasons = [line.strip() for line in str(error).splitlines() if line.startswith("    ")]
            return (
                f"xformers {xformers_version} has no operator for {spec.dtype} heads of {spec.head_dim} on this GPU "
                f"({reasons[-1] if reasons else 'it does not say why'}); install a build for torch {torch.__version__}"
            )
        return None

    def _causal(self, query_lens: list[int], context_lens: list[int]) -> BlockDiagonalCausalFromBottomRightMask:
        return BlockDiagonalCausalFromBottomRightMask.from_seqlens(query_lens, context_lens, device=self.device)

    def _whole(self, query_lens: list[int], starts: list[int], lengths: list[int]) -> BlockDiagonalGappyKeysMask:
        return BlockDiagonalGappyKeysMask.from_seqlens(query_lens, starts, lengths, device=self.device)

    def prepare(self, metadata: AttentionMetadata, specs: Sequence[AttentionSpec]) -> list[PreparedBatch]:
        lens = np.array(metadata.context_lens, np.int64)
        sequence = np.repeat(np.arange(len(lens)), lens)
        own = np.arange(len(sequence)) - np.repeat(lens.cumsum() - lens, lens)
        rows, columns = to_device(np.stack((sequence, own // metadata.block_size)), self.device)
        slots = metadata.block_tables[rows, columns] * metadata.block_size
        plan = PreparedBatch(
            own_slots=slots + to_device(own % metadata.block_size, self.device),
            own_mask=self._causal(metadata.query_lens, metadata.context_lens),
            reads=[self._read(groups) for groups in _apart(metadata.groups)],
        )
        return [plan] * len(specs)

    def _read(self, groups: list[PrefixGroup]) -> PrefixRead:
        tokens = np.concatenate([np.arange(g.first_token, g.first_token + g.num_tokens) for g in groups])
        end = max(g.first_slot + g.length for g in groups)
        starts, lengths = [g.first_slot for g in groups], [g.length for g in groups]
        mask = self._whole([g.num_tokens for g in groups], [*starts, end], lengths)
        return PrefixRead(to_device(tokens, self.device), mask, end)

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
        from vllm.ops.triton.rope import rope_and_write

        return rope_and_write(qkv, positions, rope, qk_norm, slot_mapping, k_cache, v_cache, num_heads)

    def attend(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        spec: AttentionSpec,
        prepared: PreparedBatch,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        slots = prepared.own_slots
        out, lse = _partial(q, k_cache[slots], v_cache[slots], prepared.own_mask, spec.scale)
        for read in prepared.reads:
            tokens = read.tokens
            part, part_lse = _partial(q[tokens], k_cache[: read.end], v_cache[: read.end], read.mask, spec.scale)
            out[tokens], lse[tokens] = merge(part, part_lse, out[tokens], lse[tokens])
        return out


def _partial(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [M, H, D], k and v [N, KVH, D] → attention [M, H, D] and its log-sum-exps, float32 [M, H]."""
    (m, heads, d), (n, kv_heads, _) = q.shape, k.shape
    share = heads // kv_heads
    wide = (1, n, kv_heads, share, d)
    keys, values = (x.view(1, n, kv_heads, 1, d).expand(wide) for x in (k, v))
    out, lse = fmha.memory_efficient_attention_partial(
        q.reshape(1, m, kv_heads, share, d), keys, values, attn_bias=mask, scale=scale
    )
    return out.view(m, heads, d), lse.reshape(heads, -1)[:, :m].T.contiguous()


def _apart(groups: list[PrefixGroup]) -> list[list[PrefixGroup]]:
    """The groups dealt into as few lists as can be, so that no token is in two groups of a list."""
    lists: list[list[PrefixGroup]] = []
    for group in sorted(groups, key=lambda g: g.first_token):
        for chosen in lists:
            if chosen[-1].first_token + chosen[-1].num_tokens <= group.first_token:
                chosen.append(group)
                break
        else:
            lists.append([group])
    return lists
