"""Attention by Triton kernels: dense over the pinned extents, paged over the own blocks, then a merge.

A batch is described by work lists in device memory (see `plan_prefix`, `plan_suffix`). For a batch that is run once
they are made by `TritonAttention.prepare`; for steps that are replayed as graphs `ReplayBuffers` owns them at fixed
addresses, with all else that such a step reads, and refills them with one copy a step.

What reads a pinned extent for more than 64 query rows, measured on an H100 (TFLOP/s; 8 KV heads of 128, 4 query heads
each, bfloat16; cuDNN and flash attention as torch 2.11 calls them):

    sequences × extent              Gluon    Triton    cuDNN    flash
    256 × 32,768                      668       425      348      301
    128 × 32,768                      612       386
    64 × 32,768                       487       333
    256 × 8,192                       563       355
    256 × 2,048                       329       265
    8,192 × 24,576 (long prefill)     617       457      656      347
So the Gluon kernel does it where it runs. Own blocks are read beside it; a prompt of 128 tokens, µs for a layer:

    extent / own tokens before it       0 / 0    0 / 4,096    0 / 16,384    32,768 / 0    32,768 / 1,024
    Gluon, 128 rows of 128 keys          16.7         78.6         160.3         125.3             152.6
    Triton, 64 rows of 64 keys           14.0         76.0         176.0         115.8             143.7
From 256 tokens on Gluon is faster, by up to 30 %. A chunk of a system prompt's own prefill, whose keys lie one after
the other, is one launch of it too, causal at its end, instead of prefix, suffix and merge.

Layers with a window, capped scores or sinks take the Triton kernels throughout. A window changes what is planned, so
layers of one network may have different plans; of a window's layer only what some query sees is planned and read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm.attention.backends.base import AttentionBackend
from vllm.attention.spec import AttentionSpec
from vllm.ops.attention.merge import merge_partials
from vllm.ops.attention.metadata import AttentionMetadata
from vllm.ops.attention.prefix import group_array, plan_prefix, prefix_attention, prefix_tiles
from vllm.ops.attention.suffix import keep_from_merge, plan_chunk, plan_suffix, suffix_attention, suffix_tiles
from vllm.ops.attention.tiles import TileConfig
from vllm.ops.attention.window import cut_where_parts_change, first_positions, within_window
from vllm.ops.rope import QkNorm, Rope
from vllm.ops.staging import to_device
from vllm.ops.triton.rope import rope_and_write
from vllm.platforms.devices import gpu_generation, num_multiprocessors

# Query rows up to which a sequence is served by the small tiles of decode.
SMALL_ROWS = 16
# Query rows up to which the kernel for Hopper does not read own blocks: its programs take 11 µs for their first tile,
# and few fit beside the prefix kernel.
_FEW_ROWS = 512
# Parts × tokens up to which a batch that is run once may be split further than its chain of extents asks for.
_WORKSPACE_TOKENS = 2048


@dataclass(frozen=True)
class Launch:
    """One kernel launch over a work list.

    Attributes:
        work: int32 [capacity, fields].
        num_work: Items that count; int32 [1].
        tiles: What the list was made for.
        num_programs: Grid.
    """

    work: torch.Tensor
    num_work: torch.Tensor
    tiles: TileConfig
    num_programs: int


@dataclass(frozen=True)
class PreparedBatch:
    """What `forward` launches for every layer.

    Attributes:
        prefix, suffixes: Launches of the two kernels.
        counts: Partial results of each token, -1 for those whose only one is the result; int32 [T].
        partial, lse: Workspace, float32 [P, T, H, D] and [P, T, H]; None where every token has one part, which is then
            written straight to the result.
        merged: Tokens whose parts are merged; int32 [n]. None where every token is looked at.
        first_seen: First position that each token sees, for a layer with a window; int32 [T].
        block_tables: int32 or int64 [rows, W].
        block_size: Slots in a block.
        causal: The query tokens are the last ones of the extent that `prefix` reads, and there is nothing else.
    """

    prefix: Launch | None
    suffixes: tuple[Launch, ...]
    counts: torch.Tensor
    partial: torch.Tensor | None
    lse: torch.Tensor | None
    block_tables: torch.Tensor
    block_size: int
    causal: bool = False
    merged: torch.Tensor | None = None
    first_seen: torch.Tensor | None = None


class TritonAttention:
    """Attention of layers that are planned for alike.

    Args:
        num_heads, num_kv_heads, head_dim: This rank's share.
        dtype, device: Of q, K and V.
        block_size: Slots in a block.
        use_tma: Load pinned K and V through tensor descriptors; None does so where it can be done (5 to 8 % faster on
            an H100): 16-bit rows of a power of two, Hopper or newer.
        window: As of `AttentionSpec`.
        capped_or_sinks: The layers cap their scores or have sinks.

    Attributes:
        use_gluon: Tiles of more than 64 rows are done by the kernel written for Hopper.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int = 16,
        use_tma: bool | None = None,
        *,
        window: int | None = None,
        capped_or_sinks: bool = False,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.group_size = num_heads // num_kv_heads
        self.dtype = dtype
        self.device = device
        self.window = window
        generation = gpu_generation(device)
        self.num_sms = num_multiprocessors(device)
        if use_tma is None:
            suited = dtype.itemsize == 2 and head_dim & (head_dim - 1) == 0
            use_tma = suited and generation >= (9, 0)
        self.use_tma = use_tma
        self.use_gluon = False
        if use_tma and generation[0] == 9 and window is None and not capped_or_sinks:
            # Gluon comes with the Triton of torch's builds for such GPUs.
            from vllm.ops.attention import hopper as gluon_attention

            self.use_gluon = gluon_attention.takes(dtype, head_dim, block_size)

    def prefix_tiles(self, max_tokens: int) -> TileConfig:
        """Tiles for groups of at most `max_tokens` tokens."""
        return self._for_device(prefix_tiles(max_tokens * self.group_size, self.head_dim, self.dtype))

    def suffix_tiles(self, max_tokens: int) -> TileConfig:
        """Tiles for sequences of at most `max_tokens` query tokens."""
        max_rows = max_tokens * self.group_size
        if self.use_gluon and max_rows <= _FEW_ROWS:
            max_rows = min(max_rows, 64)
        return self._for_device(suffix_tiles(max_rows, self.head_dim, self.dtype))

    def _for_device(self, tiles: TileConfig) -> TileConfig:
        if self.use_gluon and tiles.block_m > 64:
            from vllm.ops.attention import hopper as gluon_attention

            return gluon_attention.TILES
        return tiles

    def programs(self, tiles: TileConfig) -> int:
        """Programs that run at once."""
        return self.num_sms * tiles.programs_per_sm

    def workspace(self, num_parts: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised (partial, lse) for so many parts of so many tokens."""
        shape = (num_parts, num_tokens, self.num_heads)
        partial = torch.empty((*shape, self.head_dim), dtype=torch.float32, device=self.device)
        return partial, torch.empty(shape, dtype=torch.float32, device=self.device)

    def in_sight(
        self, sequences: np.ndarray, groups: np.ndarray, num_tokens: int, tiles: TileConfig
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The groups as far as the window reaches, and the first position that each token sees; None without a window.

        Args:
            sequences: As for `plan_sequences`.
            groups: See `group_array`.
            tiles: That the groups will be planned for.
        """
        if self.window is None:
            return groups, None
        first_seen = first_positions(sequences, groups, num_tokens, self.window)
        return within_window(groups, first_seen, tiles.tokens(self.group_size), tiles.block_n), first_seen

    def plan_groups(
        self, groups: np.ndarray, num_tokens: int, tiles: TileConfig, max_partials: int, max_work: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """`plan_prefix` of the groups that are `in_sight`."""
        return plan_prefix(
            groups,
            num_tokens,
            group_size=self.group_size,
            num_kv_heads=self.num_kv_heads,
            tiles=tiles,
            num_programs=self.programs(tiles),
            max_partials=max_partials,
            max_work=max_work,
        )

    def plan_sequences(
        self, sequences: np.ndarray, counts: np.ndarray, tiles: TileConfig, max_partials: int, max_work: int
    ) -> np.ndarray:
        """`plan_suffix` of sequences given as rows of (first_token, query_len, context_len, table_row)."""
        if self.window is not None:
            sequences = cut_where_parts_change(sequences, counts)
        return plan_suffix(
            sequences[:, 0],
            sequences[:, 1],
            sequences[:, 2],
            sequences[:, 3],
            counts,
            group_size=self.group_size,
            num_kv_heads=self.num_kv_heads,
            tiles=tiles,
            num_programs=self.programs(tiles),
            max_partials=max_partials,
            max_work=max_work,
            window=self.window,
        )

    def prepare(self, metadata: AttentionMetadata) -> PreparedBatch:
        if metadata.contiguous_from is not None and self.use_gluon:
            chunk = self._prepare_chunk(metadata, metadata.contiguous_from)
            if chunk is not None:
                return chunk
        query_lens, context_lens = np.array(metadata.query_lens), np.array(metadata.context_lens)
        first_token = query_lens.cumsum() - query_lens
        sequences = np.stack((first_token, query_lens, context_lens, np.arange(len(query_lens))), axis=1)
        num_tokens = int(query_lens.sum())
        groups = group_array(metadata.groups)
        depth = _depth(groups, num_tokens)
        max_partials = max(min(64, _WORKSPACE_TOKENS // max(num_tokens, 1)), depth + 1)
        prefix_tiles = self.prefix_tiles(int(groups[:, 1].max()) if len(groups) else 1)
        # Own blocks keep a quarter of the parts, at least one.
        prefix_parts = max(depth, max_partials - max(1, max_partials // 4))
        unbounded = 2**31 - 1
        groups, first_seen = self.in_sight(sequences, groups, num_tokens, prefix_tiles)
        prefix_work, counts = self.plan_groups(groups, num_tokens, prefix_tiles, prefix_parts, unbounded)
        works: list[np.ndarray] = [prefix_work]
        tiles: list[TileConfig] = [prefix_tiles]
        small = query_lens * self.group_size <= SMALL_ROWS
        for chosen in (sequences[small], sequences[~small]):
            if len(chosen):
                tiles.append(self.suffix_tiles(int(chosen[:, 1].max())))
                works.append(self.plan_sequences(chosen, counts, tiles[-1], max_partials, unbounded))
        num_parts = int(counts.max(initial=0))
        single = num_parts == 1 and not len(prefix_work) and bool(counts.all())
        if not single:
            keep_from_merge(works[1:], counts)
        sizes = np.array([len(w) for w in works], np.int32)
        merged = np.flatnonzero(counts >= 0).astype(np.int32)
        lists = [sizes, counts, *(w.ravel() for w in works), merged]
        if first_seen is not None:
            lists.append(first_seen)
        flat = to_device(np.concatenate(lists), self.device)
        launches, offset = [], len(works) + num_tokens
        for i, (work, shape) in enumerate(zip(works, tiles, strict=True)):
            view = flat[offset : offset + work.size].view(work.shape)
            offset += work.size
            items = len(work) * self.num_kv_heads
            # The kernel for Hopper sets up a program for many items; the others are started one for each.
            programs = min(items, self.programs(shape)) if self.use_gluon and shape.block_m > 64 else items
            launches.append(Launch(view, flat[i : i + 1], shape, programs))
        partial, lse = (None, None) if single else self.workspace(num_parts, num_tokens)
        return PreparedBatch(
            prefix=launches[0] if len(prefix_work) else None,
            suffixes=tuple(launch for launch in launches[1:] if launch.num_programs),
            counts=flat[len(works) : len(works) + num_tokens],
            partial=partial,
            lse=lse,
            block_tables=metadata.block_tables,
            block_size=metadata.block_size,
            merged=flat[offset : offset + len(merged)],
            first_seen=None if first_seen is None else flat[offset + len(merged) :],
        )

    def _prepare_chunk(self, metadata: AttentionMetadata, first_slot: int) -> PreparedBatch | None:
        """One causal launch over consecutive slots; None where the chunk is too short to keep the device busy so."""
        (count,) = metadata.query_lens
        tiles = self.prefix_tiles(count)
        start = sum(group.length for group in metadata.groups)
        work = plan_chunk(first_slot, start, count, tiles.tokens(self.group_size))
        items = len(work) * self.num_kv_heads
        if items < 2 * self.programs(tiles):
            return None
        flat = to_device(np.concatenate([np.array([len(work)], np.int32), work.ravel()]), self.device)
        return PreparedBatch(
            prefix=Launch(flat[1:].view(work.shape), flat[:1], tiles, self.programs(tiles)),
            suffixes=(),
            counts=flat[:0],
            partial=None,
            lse=None,
            block_tables=metadata.block_tables,
            block_size=metadata.block_size,
            causal=True,
        )

    def forward(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        prepared: PreparedBatch,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `AttentionBackend.attend`."""
        out = torch.empty_like(q)
        partial, lse = prepared.partial, prepared.lse
        target = out.unsqueeze(0) if partial is None else partial
        if prepared.prefix is not None:
            self._prefix(q, k_cache, v_cache, scale, prepared.prefix, target, lse, prepared, softcap)
        beside = prepared.prefix is not None
        for run in prepared.suffixes:
            self._suffix(q, k_cache, v_cache, scale, run, target, lse, out, prepared, beside, softcap, sinks)
            beside = True
        if partial is not None and lse is not None:
            merge_partials(partial, lse, prepared.counts, out, prepared.merged, sinks)
        return out

    def _prefix(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        run: Launch,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        prepared: PreparedBatch,
        softcap: float | None,
    ) -> None:
        if self.use_gluon and run.tiles.block_m > 64:
            from vllm.ops.attention.hopper import hopper_attention

            programs, causal = run.num_programs, prepared.causal
            hopper_attention(q, k_cache, v_cache, scale, run.work, run.num_work, out, lse, programs, causal=causal)
        elif lse is not None:
            prefix_attention(
                q,
                k_cache,
                v_cache,
                scale,
                run.work,
                run.num_work,
                out,
                lse,
                run.tiles,
                run.num_programs,
                self.use_tma,
                first_seen=prepared.first_seen,
                softcap=softcap,
            )

    def _suffix(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        run: Launch,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        whole: torch.Tensor,
        prepared: PreparedBatch,
        beside: bool,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        tables, block_size = prepared.block_tables, prepared.block_size
        if self.use_gluon and run.tiles.block_m > 64:
            from vllm.ops.attention.hopper import hopper_attention

            hopper_attention(
                q,
                k_cache,
                v_cache,
                scale,
                run.work,
                run.num_work,
                out,
                lse,
                run.num_programs,
                whole=whole,
                block_tables=tables,
                block_size=block_size,
                causal=True,
                beside=beside,
            )
        else:
            suffix_attention(
                q,
                k_cache,
                v_cache,
                scale,
                tables,
                block_size,
                run.work,
                run.num_work,
                out,
                lse,
                run.tiles,
                run.num_programs,
                whole,
                beside,
                window=self.window,
                softcap=softcap,
                sinks=sinks,
            )


class TritonAttentionBackend(AttentionBackend):
    """Attention of a rank's layers.

    Args:
        device: Of q, K and V.
        block_size: Slots in a block.
    """

    def __init__(self, device: torch.device, block_size: int) -> None:
        self._device = device
        self._block_size = block_size
        self._by_plan: dict[tuple, TritonAttention] = {}

    def misfit(self, spec: AttentionSpec) -> str | None:
        if spec.v_dim != spec.head_dim:
            return f"values of {spec.v_dim} beside keys of {spec.head_dim}"
        return f"head_dim {spec.head_dim} is odd" if spec.head_dim % 2 else None

    def of(self, spec: AttentionSpec) -> TritonAttention:
        """What attends for a spec, the same for all specs that are planned for alike."""
        shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.dtype)
        capped_or_sinks = spec.softcap is not None or spec.sinks
        key = (*shape, spec.window, capped_or_sinks)
        if key not in self._by_plan:
            self._by_plan[key] = TritonAttention(
                *shape, self._device, self._block_size, window=spec.window, capped_or_sinks=capped_or_sinks
            )
        return self._by_plan[key]

    def prepare(self, metadata: AttentionMetadata, specs: Sequence[AttentionSpec]) -> list[PreparedBatch]:
        plans: dict[TritonAttention, PreparedBatch] = {}
        for attention in map(self.of, specs):
            if attention not in plans:
                plans[attention] = attention.prepare(metadata)
        return [plans[self.of(spec)] for spec in specs]

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
        # Rows with a negative slot are the padding of a replayed batch; their K and V are dropped.
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
        return self.of(spec).forward(q, k_cache, v_cache, spec.scale, prepared, spec.softcap, sinks)


def _depth(groups: np.ndarray, num_tokens: int) -> int:
    """The most groups that a token is in."""
    if not len(groups):
        return 0
    steps = np.zeros(num_tokens + 1, np.int64)
    np.add.at(steps, groups[:, 0], 1)
    np.add.at(steps, groups[:, 0] + groups[:, 1], -1)
    return int(steps.cumsum().max())
