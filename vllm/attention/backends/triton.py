"""Attention by Triton kernels: dense over the pinned extents, paged over the own blocks, then a merge.

A batch is described by work lists in device memory (see `plan_prefix`, `plan_suffix`). For a batch that is run once
they are made by `TritonAttentionBackend.prepare`; for decode steps that are replayed as graphs `DecodeBuffers` owns
them at fixed addresses and refills them with one copy a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm.attention.backends.base import AttentionBackend
from vllm.attention.metadata import AttentionMetadata, PrefixGroup
from vllm.attention.ops.triton_common import TileConfig
from vllm.attention.ops.triton_merge import merge_partials
from vllm.attention.ops.triton_prefix import PREFIX_FIELDS, group_array, plan_prefix, prefix_attention, prefix_tiles
from vllm.attention.ops.triton_suffix import SUFFIX_FIELDS, plan_suffix, suffix_attention, suffix_tiles
from vllm.model_executor.layers.ops.triton_rope import rope_and_write

# Query rows up to which a sequence is served by the small tiles of decode.
_SMALL_ROWS = 16
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
        counts: Partial results of each token; int32 [T].
        partial, lse: Workspace, float32 [P, T, H, D] and [P, T, H]; None where every token has one part, which is then
            written straight to the result.
        block_tables: int32 or int64 [rows, W].
        block_size: Slots in a block.
    """

    prefix: Launch | None
    suffixes: tuple[Launch, ...]
    counts: torch.Tensor
    partial: torch.Tensor | None
    lse: torch.Tensor | None
    block_tables: torch.Tensor
    block_size: int


class TritonAttentionBackend(AttentionBackend):
    """Attention of one rank's share of heads.

    Args:
        num_heads, num_kv_heads, head_dim: This rank's share.
        dtype, device: Of q, K and V.
        use_tma: Load pinned K and V through tensor descriptors; None does so where it can be done (5 to 8 % faster on
            an H100): 16-bit rows of a power of two, Hopper or newer.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        use_tma: bool | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.group_size = num_heads // num_kv_heads
        self.dtype = dtype
        self.device = device
        # The planner needs a number of multiprocessors also where the interpreter takes the place of a GPU.
        is_cuda = device.type == "cuda"
        self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 8
        if use_tma is None:
            suited = dtype.itemsize == 2 and head_dim & (head_dim - 1) == 0
            use_tma = suited and is_cuda and torch.cuda.get_device_capability(device) >= (9, 0)
        self.use_tma = use_tma

    def prefix_tiles(self, max_tokens: int) -> TileConfig:
        """Tiles for groups of at most `max_tokens` tokens."""
        return prefix_tiles(max_tokens * self.group_size, self.head_dim, self.dtype)

    def suffix_tiles(self, max_tokens: int) -> TileConfig:
        """Tiles for sequences of at most `max_tokens` query tokens."""
        return suffix_tiles(max_tokens * self.group_size, self.head_dim, self.dtype)

    def programs(self, tiles: TileConfig) -> int:
        """Programs that run at once."""
        return self.num_sms * tiles.programs_per_sm

    def workspace(self, num_parts: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised (partial, lse) for so many parts of so many tokens."""
        shape = (num_parts, num_tokens, self.num_heads)
        partial = torch.empty((*shape, self.head_dim), dtype=torch.float32, device=self.device)
        return partial, torch.empty(shape, dtype=torch.float32, device=self.device)

    def plan_groups(
        self, groups: np.ndarray, num_tokens: int, tiles: TileConfig, max_partials: int, max_work: int
    ) -> tuple[np.ndarray, np.ndarray]:
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
        )

    def prepare(self, metadata: AttentionMetadata) -> PreparedBatch:
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
        prefix_work, counts = self.plan_groups(groups, num_tokens, prefix_tiles, prefix_parts, unbounded)
        works: list[np.ndarray] = [prefix_work]
        tiles: list[TileConfig] = [prefix_tiles]
        small = query_lens * self.group_size <= _SMALL_ROWS
        for chosen in (sequences[small], sequences[~small]):
            if len(chosen):
                tiles.append(self.suffix_tiles(int(chosen[:, 1].max())))
                works.append(self.plan_sequences(chosen, counts, tiles[-1], max_partials, unbounded))
        sizes = np.array([len(w) for w in works], np.int32)
        flat = self._to_device(np.concatenate([sizes, counts, *(w.ravel() for w in works)]))
        launches, offset = [], len(works) + num_tokens
        for i, (work, shape) in enumerate(zip(works, tiles, strict=True)):
            view = flat[offset : offset + work.size].view(work.shape)
            offset += work.size
            launches.append(Launch(view, flat[i : i + 1], shape, len(work) * self.num_kv_heads))
        num_parts = int(counts.max(initial=0))
        single = num_parts == 1 and not len(prefix_work) and bool(counts.all())
        partial, lse = (None, None) if single else self.workspace(num_parts, num_tokens)
        return PreparedBatch(
            prefix=launches[0] if len(prefix_work) else None,
            suffixes=tuple(launch for launch in launches[1:] if launch.num_programs),
            counts=flat[len(works) : len(works) + num_tokens],
            partial=partial,
            lse=lse,
            block_tables=metadata.block_tables,
            block_size=metadata.block_size,
        )

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        host = torch.from_numpy(values)
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

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
        # Rows with a negative slot are the padding of a replayed batch; their K and V are dropped.
        return rope_and_write(qkv, positions, cos_sin, slot_mapping, k_cache, v_cache, num_heads)

    def forward(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        scale: float,
        prepared: PreparedBatch,
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        partial, lse = prepared.partial, prepared.lse
        target = out.unsqueeze(0) if partial is None else partial
        if prepared.prefix is not None and partial is not None and lse is not None:
            run = prepared.prefix
            prefix_attention(
                q,
                k_cache,
                v_cache,
                scale,
                run.work,
                run.num_work,
                partial,
                lse,
                run.tiles,
                run.num_programs,
                self.use_tma,
            )
        for run in prepared.suffixes:
            suffix_attention(
                q,
                k_cache,
                v_cache,
                scale,
                prepared.block_tables,
                prepared.block_size,
                run.work,
                run.num_work,
                target,
                lse,
                run.tiles,
                run.num_programs,
            )
        if partial is not None and lse is not None:
            merge_partials(partial, lse, prepared.counts, out)
        return out


def _depth(groups: np.ndarray, num_tokens: int) -> int:
    """The most groups that a token is in."""
    if not len(groups):
        return 0
    steps = np.zeros(num_tokens + 1, np.int64)
    np.add.at(steps, groups[:, 0], 1)
    np.add.at(steps, groups[:, 0] + groups[:, 1], -1)
    return int(steps.cumsum().max())


class DecodeBuffers:
    """Fixed device memory of decode steps: one query token a sequence, batches of up to `max_batch`.

    A graph captured over `prepared(batch)` is replayed after `fill(batch, ...)`, whatever groups and lengths come.
    All batch sizes share the same memory, so only one of them is filled at a time.

    Args:
        backend: Whose `forward` is captured.
        max_batch: Largest batch.
        block_tables: All rows of the KV cache's block tables; int32 or int64 [rows, W].
        block_size: Slots in a block.
    """

    # Extents that a sequence may read one after the other.
    max_chain = 4

    def __init__(
        self, backend: TritonAttentionBackend, max_batch: int, block_tables: torch.Tensor, block_size: int
    ) -> None:
        self.backend = backend
        self.max_batch = max_batch
        self._block_tables = block_tables
        self._block_size = block_size
        # A tile for every link of every chain, and as many more as all programs take in a few rounds.
        extra = 16 * backend.num_sms
        self._max_prefix_work = max_batch * self.max_chain + extra
        self._max_suffix_work = max_batch + extra
        sizes = (2, max_batch, self._max_prefix_work * PREFIX_FIELDS, self._max_suffix_work * SUFFIX_FIELDS)
        self._ends = np.cumsum(sizes).tolist()
        pinned = backend.device.type == "cuda"
        # Two host buffers in turn: the copy of the step before may still be under way.
        self._hosts = [torch.zeros(self._ends[-1], dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)] if pinned else []
        self._turn = 0
        self._flat = torch.zeros(self._ends[-1], dtype=torch.int32, device=backend.device)
        most = max(self.max_partials(b) * b for b in range(1, max_batch + 1))
        self._partial, self._lse = backend.workspace(1, most)

    def max_partials(self, batch: int) -> int:
        """Parts that a token of a batch of this size may have: few sequences need many to fill the device."""
        return min(64, max(12, 1024 // batch))

    def prepared(self, batch: int, *, direct: bool = False) -> PreparedBatch:
        """What `forward` launches for a batch of this size, always the same.

        Args:
            direct: For batches that `fill` reports as direct: no prefix, no merge.
        """
        backend, parts = self.backend, self.max_partials(batch)
        e = self._ends
        prefix_tiles, suffix_tiles = backend.prefix_tiles(batch), backend.suffix_tiles(1)
        prefix_work = self._flat[e[1] : e[2]].view(-1, PREFIX_FIELDS)
        suffix_work = self._flat[e[2] : e[3]].view(-1, SUFFIX_FIELDS)
        shape = (parts, batch, backend.num_heads)
        partial = self._partial.view(-1)[: parts * batch * backend.num_heads * backend.head_dim]
        return PreparedBatch(
            prefix=None
            if direct
            else Launch(prefix_work, self._flat[0:1], prefix_tiles, backend.programs(prefix_tiles)),
            suffixes=(Launch(suffix_work, self._flat[1:2], suffix_tiles, backend.programs(suffix_tiles)),),
            counts=self._flat[e[0] : e[0] + batch],
            partial=None if direct else partial.view(*shape, backend.head_dim),
            lse=None if direct else self._lse.view(-1)[: parts * batch * backend.num_heads].view(shape),
            block_tables=self._block_tables,
            block_size=self._block_size,
        )

    def fill(self, batch: int, rows: np.ndarray, context_lens: np.ndarray, groups: list[PrefixGroup]) -> bool:
        """Plans a step and sends the plan to the device, in one copy on the current stream.

        Args:
            batch: Size that is replayed, at least the number of sequences; what is beyond them is padding, whose
                attention is 0 (undefined in a direct batch).
            rows: Row of the block tables of each sequence; int [n].
            context_lens: Own tokens of each, the current one included; int [n].
            groups: Reads of pinned extents, in tokens = sequences of the batch.

        Returns whether every sequence has exactly one part, so that `prepared(batch, direct=True)` may be replayed.

        Raises:
            ValueError: a chain of extents is longer than `max_chain`.
        """
        backend, e = self.backend, self._ends
        parts = self.max_partials(batch)
        prefix_work, counts = backend.plan_groups(
            group_array(groups), batch, backend.prefix_tiles(batch), parts - parts // 4, self._max_prefix_work
        )
        sequences = np.empty((len(rows), 4), np.int64)
        sequences[:, 0] = np.arange(len(rows))
        sequences[:, 1] = 1
        sequences[:, 2] = context_lens
        sequences[:, 3] = rows
        tiles = backend.suffix_tiles(1)
        # Enough sequences of like length keep all programs busy without being split, and then need no merge.
        direct = not len(prefix_work) and (
            2 * len(rows) * backend.num_kv_heads >= backend.programs(tiles)
            and len(rows) * int(context_lens.max()) <= 2 * int(context_lens.sum())
        )
        suffix_work = backend.plan_sequences(sequences, counts, tiles, 1 if direct else parts, self._max_suffix_work)
        if self._copied:
            self._copied[self._turn].synchronize()
        host = self._hosts[self._turn]
        flat = host.numpy()
        flat[:2] = len(prefix_work), len(suffix_work)
        flat[e[0] : e[0] + batch] = counts
        flat[e[1] : e[1] + prefix_work.size] = prefix_work.ravel()
        flat[e[2] : e[2] + suffix_work.size] = suffix_work.ravel()
        used = e[2] + suffix_work.size
        self._flat[:used].copy_(host[:used], non_blocking=True)
        if self._copied:
            self._copied[self._turn].record()
        self._turn ^= 1
        return direct
