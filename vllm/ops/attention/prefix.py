"""Dense attention of all query rows of every group against its pinned extent, in one launch.

For row tile M of a group with extent X and keys [begin, end) of X:
    out[split, M] = softmax(scale · q_M Kᵀ) V,   lse[split, M] = log Σ exp(scale · q_M Kᵀ)   over the keys [begin, end)
The parts of a row are combined by `merge_partials`. K and V of an extent are read once for each tile of rows; tiles of
one split run side by side, so that the device memory sees them once. With a window a row sees the keys of an item from
a position of its own on, which may be behind all of them; its part is empty then.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from vllm.ops.attention.metadata import PrefixGroup
from vllm.ops.attention.tiles import (
    TileConfig,
    attend,
    head_shape,
    load_tile,
    row_offsets,
    score_factors,
    store_partial,
)
from vllm.ops.launch import follow, launch

# first_token, num_tokens, first_slot, begin, end (keys of the extent), position (of the token in the first slot), split
PREFIX_FIELDS = 7
# Cost of starting and finishing an item, in steps of block_n keys, in the choice of splits.
_ITEM_OVERHEAD = 3
# Splits are not made shorter than this many keys.
_MIN_SPLIT = 256


def prefix_tiles(max_rows: int, head_dim: int, dtype: torch.dtype) -> TileConfig:
    """Tile shape for groups of at most `max_rows` rows (tokens × G).

    Tiles of 16 rows are bound by memory: small, so that several programs of a multiprocessor load at once. From 64 rows
    on the products run as warp-group instructions; 128 rows halve the reads of K and V from the L2 cache.
    """
    if dtype == torch.float32:
        return TileConfig(16, 32 if head_dim <= 128 else 16, 4, 2, 2)
    wide = head_dim > 128
    if max_rows <= 16:
        return TileConfig(16, 32 if wide else 64, 4, 3, 2)
    if max_rows <= 64 or wide:
        return TileConfig(64, 64, 4, 2 if wide else 3, 1 if wide else 2)
    return TileConfig(128, 128, 8, 2, 1)


def group_array(groups: list[PrefixGroup]) -> np.ndarray:
    """int64 [n, 5]: first_token, num_tokens, first_slot, length, position; groups without tokens or keys left out."""
    rows = [
        (g.first_token, g.num_tokens, g.first_slot, g.length, g.position) for g in groups if g.num_tokens and g.length
    ]
    return np.array(rows, np.int64).reshape(-1, 5)


def plan_prefix(
    groups: np.ndarray,
    num_tokens: int,
    *,
    group_size: int,
    num_kv_heads: int,
    tiles: TileConfig,
    num_programs: int,
    max_partials: int,
    max_work: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the groups into work items: row tiles × splits of the extent, about equal and enough for all programs.

    Args:
        groups: See `group_array`; for a layer with a window, what `within_window` leaves. A token may be in several
            groups (a chain of extents): its parts get consecutive split indexes.
        num_tokens: Tokens of the batch.
        group_size: Query heads of a KV head, at most `tiles.block_m`.
        num_programs: Programs that run at once.
        max_partials: Most splits a token may have, over all its groups.
        max_work: Most items.

    Returns work (int32 [n, PREFIX_FIELDS]) and the number of partial results of each token (int32 [num_tokens]).

    Raises:
        ValueError: a token is in more groups than `max_partials`, or the groups need more than `max_work` items.
    """
    if not len(groups):
        return np.empty((0, PREFIX_FIELDS), np.int32), np.zeros(num_tokens, np.int32)
    first_token, tokens, first_slot, length, position = groups.T
    depth = _coverage(first_token, tokens, np.ones_like(tokens), num_tokens).max()
    if depth > max_partials:
        raise ValueError(f"a token reads a chain of {depth} extents; at most {max_partials} fit the workspace")
    num_tiles = -(-tokens // tiles.tokens(group_size))
    num_blocks = -(-length // tiles.block_n)
    splits, per_split = _choose_splits(
        num_blocks, num_tiles, num_kv_heads, tiles.block_n, num_programs, max_partials // depth, max_work
    )
    counts = _coverage(first_token, tokens, splits, num_tokens)
    base = np.zeros_like(splits)
    if depth > 1:
        chosen, base = _cut_into_runs(first_token, tokens, splits, num_tokens)
        owner, first_token, tokens = chosen
        first_slot, length, splits, per_split = first_slot[owner], length[owner], splits[owner], per_split[owner]
        position = position[owner]
        num_tiles = -(-tokens // tiles.tokens(group_size))
    per_tile = -(-tokens // num_tiles)
    items = num_tiles * splits
    ends = items.cumsum()
    if ends[-1] > max_work:
        raise ValueError(f"{len(groups)} groups of {num_tokens} tokens need {ends[-1]} work items, not {max_work}")
    # Every item by the run it belongs to: split by split, the tiles of a split side by side.
    run = np.repeat(np.arange(len(items)), items)
    split, tile = np.divmod(np.arange(ends[-1]) - (ends - items)[run], num_tiles[run])
    start, begin = tile * per_tile[run], split * per_split[run] * tiles.block_n
    work = np.empty((len(run), PREFIX_FIELDS), np.int32)
    work[:, 0] = first_token[run] + start
    work[:, 1] = np.clip(tokens[run] - start, 0, per_tile[run])
    work[:, 2] = first_slot[run]
    work[:, 3] = begin
    work[:, 4] = np.minimum(begin + per_split[run] * tiles.block_n, length[run])
    work[:, 5] = position[run]
    work[:, 6] = base[run] + split
    return work, counts.astype(np.int32)


def _coverage(first: np.ndarray, size: np.ndarray, value: np.ndarray, num_tokens: int) -> np.ndarray:
    """Sum of `value` over the ranges that cover each token."""
    steps = np.zeros(num_tokens + 1, np.int64)
    np.add.at(steps, first, value)
    np.add.at(steps, first + size, -value)
    return steps[:-1].cumsum()


def _choose_splits(
    num_blocks: np.ndarray,
    num_tiles: np.ndarray,
    num_kv_heads: int,
    block_n: int,
    num_programs: int,
    max_splits: int,
    max_work: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Splits of each group and the blocks of one split; tries one split length after the other, all at once."""
    longest = int(num_blocks.max())
    shortest_split = max(1, _MIN_SPLIT // block_n)
    most = max(1, min(max_splits, longest // shortest_split))
    target = -(-longest // np.arange(1, most + 1))
    splits = np.minimum(-(-num_blocks[:, None] // target), max_splits)
    per_split = -(-num_blocks[:, None] // splits)
    splits = -(-num_blocks[:, None] // per_split)
    items = (splits * num_tiles[:, None]).sum(0)
    blocks = int((num_blocks * num_tiles).sum()) * num_kv_heads
    rounds = -(-items * num_kv_heads // num_programs)
    # Rounds of average items, and no less than the longest one; `+ items` on ties prefers fewer parts.
    cost = np.maximum(rounds * (blocks / (items * num_kv_heads)), per_split.max(0)) + _ITEM_OVERHEAD * rounds
    cost += splits.max(0) / 16
    cost[1:][items[1:] > max_work] = np.inf
    best = int(cost.argmin())
    return splits[:, best], per_split[:, best]


def _cut_into_runs(
    first_token: np.ndarray, tokens: np.ndarray, splits: np.ndarray, num_tokens: int
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    """Runs of a group's tokens that have equally many parts from the groups before it.

    Returns (group, first token, tokens) of each run, and the split index of its first part.
    """
    counts = np.zeros(num_tokens, np.int64)
    runs: list[tuple[int, int, int, int]] = []
    for i, (a, n, s) in enumerate(zip(first_token.tolist(), tokens.tolist(), splits.tolist(), strict=True)):
        part = counts[a : a + n]
        cuts = [0, *(np.flatnonzero(part[1:] != part[:-1]) + 1).tolist(), n]
        runs += [(i, a + x, y - x, int(part[x])) for x, y in pairwise(cuts)]
        part += s
    table = np.array(runs, np.int64)
    return (table[:, 0], table[:, 1], table[:, 2]), table[:, 3]


# Lists are slices of a larger array and sizes change from batch to batch: nothing may depend on their alignment, or the
# kernel would be compiled again in the middle of serving.
@triton.jit(
    do_not_specialize=["split_stride"],
    do_not_specialize_on_alignment=["work_ptr", "num_work_ptr", "first_seen_ptr"],
)
def _prefix_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    work_ptr,
    num_work_ptr,
    out_ptr,
    lse_ptr,
    first_seen_ptr,
    split_stride,
    scale_log2,
    cap_log2,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FIELDS: tl.constexpr,
    USE_TMA: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    G: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    SLOT: tl.constexpr = NUM_KV_HEADS * D
    keys = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    key_offset = keys * SLOT
    total_items = tl.load(num_work_ptr) * NUM_KV_HEADS
    for item in range(tl.program_id(0), total_items, tl.num_programs(0)):
        fields = work_ptr + (item // NUM_KV_HEADS) * FIELDS
        kv_head = item % NUM_KV_HEADS
        first_token = tl.load(fields)
        num_rows = tl.load(fields + 1) * G
        first_slot = tl.load(fields + 2)
        begin = tl.load(fields + 3)
        end = tl.load(fields + 4)
        split = tl.load(fields + 6)
        rows_at = row_offsets(first_token, kv_head, NUM_HEADS, G, BLOCK_M)
        q = load_tile(q_ptr, rows_at * D, rows < num_rows, True, D, BLOCK_D)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        full_end = begin + (end - begin) // BLOCK_N * BLOCK_N
        # Keys from here on are seen by every row.
        seen_from = begin
        first_seen = tl.zeros([BLOCK_M], tl.int32)
        if WINDOWED:
            first_seen = tl.load(first_seen_ptr + first_token + rows // G, mask=rows < num_rows, other=0)
            first_seen -= tl.load(fields + 5)
            hidden = tl.maximum(tl.max(tl.where(rows < num_rows, first_seen, begin), 0) - begin, 0)
            seen_from = tl.minimum(begin + tl.cdiv(hidden, BLOCK_N) * BLOCK_N, full_end)
            for n in range(begin, seen_from, BLOCK_N):
                if USE_TMA:
                    k = k_desc.load([first_slot + n, kv_head * D])
                    v = v_desc.load([first_slot + n, kv_head * D])
                else:
                    start = (first_slot + n).to(tl.int64) * SLOT + kv_head * D
                    k = load_tile(k_ptr + start, key_offset, keys < BLOCK_N, False, D, BLOCK_D)
                    v = load_tile(v_ptr + start, key_offset, keys < BLOCK_N, False, D, BLOCK_D)
                keep = (n + keys)[None, :] >= first_seen[:, None]
                peak, total, acc = attend(q, k, v, peak, total, acc, keep, scale_log2, cap_log2, True, CAPPED)
        for n in range(seen_from, full_end, BLOCK_N):
            if USE_TMA:
                k = k_desc.load([first_slot + n, kv_head * D])
                v = v_desc.load([first_slot + n, kv_head * D])
            else:
                start = (first_slot + n).to(tl.int64) * SLOT + kv_head * D
                k = load_tile(k_ptr + start, key_offset, keys < BLOCK_N, False, D, BLOCK_D)
                v = load_tile(v_ptr + start, key_offset, keys < BLOCK_N, False, D, BLOCK_D)
            whole = keys[None, :] < BLOCK_N
            peak, total, acc = attend(q, k, v, peak, total, acc, whole, scale_log2, cap_log2, False, CAPPED)
        if full_end < end:
            # The slots behind the extent belong to others; they are neither read nor weighted.
            inside = keys < end - full_end
            tail = (first_slot + full_end).to(tl.int64) * SLOT + kv_head * D
            k = load_tile(k_ptr + tail, key_offset, inside, True, D, BLOCK_D)
            v = load_tile(v_ptr + tail, key_offset, inside, True, D, BLOCK_D)
            keep = inside[None, :]
            if WINDOWED:
                keep &= (full_end + keys)[None, :] >= first_seen[:, None]
            peak, total, acc = attend(q, k, v, peak, total, acc, keep, scale_log2, cap_log2, True, CAPPED)
        store_partial(
            out_ptr,
            lse_ptr,
            out_ptr,
            split,
            split_stride,
            num_rows,
            rows_at,
            peak,
            total,
            acc,
            peak,
            True,
            False,
            D,
            BLOCK_M,
            BLOCK_D,
        )


def prefix_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    work: torch.Tensor,
    num_work: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    tiles: TileConfig,
    num_programs: int,
    use_tma: bool = False,
    *,
    first_seen: torch.Tensor | None = None,
    softcap: float | None = None,
) -> None:
    """Does the items of a work list and writes the partial results at their split indexes.

    Args:
        q: [T, H, D], contiguous.
        k_cache, v_cache: [num_slots, KVH, D], contiguous; float32, float16 or bfloat16 like q.
        scale: Factor of the scores, positive.
        work: int32 [capacity, PREFIX_FIELDS] from `plan_prefix` with the same `tiles`.
        num_work: Items of it that count; int32, one element.
        out: [P, T, H, D], contiguous, usually float32; receives the partial results.
        lse: float32 [P, T, H]; their natural log-sum-exps.
        num_programs: Size of the grid, free of the number of items.
        use_tma: Load K and V through tensor descriptors (head_dim a power of two, Hopper or newer).
        first_seen: First position that each token sees (see `first_positions`); int32 [T]. None: they see all.
        softcap: As of `AttentionSpec`.
    """
    num_heads, num_kv_heads, head_dim = head_shape(q, k_cache, v_cache)
    scale_log2, cap_log2 = score_factors(scale, softcap)
    k_desc: Any = k_cache
    v_desc: Any = v_cache
    if use_tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        shape = [tiles.block_n, head_dim]
        k_desc = TensorDescriptor.from_tensor(k_cache.flatten(1), shape)
        v_desc = TensorDescriptor.from_tensor(v_cache.flatten(1), shape)
    launch(
        _prefix_kernel,
        (num_programs,),
        q,
        k_cache,
        v_cache,
        k_desc,
        v_desc,
        work,
        num_work,
        out,
        lse,
        work if first_seen is None else first_seen,
        out.shape[1] * num_heads,
        scale_log2,
        cap_log2,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        D=head_dim,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_D=triton.next_power_of_2(head_dim),
        FIELDS=PREFIX_FIELDS,
        USE_TMA=use_tma,
        WINDOWED=first_seen is not None,
        CAPPED=softcap is not None,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def prefix_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    work: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    first_seen: torch.Tensor | None = None,
    softcap: float | None = None,
) -> None:
    """`prefix_attention` in float64, item by item; every row of `work` counts."""
    share = q.shape[1] // k_cache.shape[1]
    for first_token, num_tokens, first_slot, begin, end, position, split in work.tolist():
        tokens, slots = slice(first_token, first_token + num_tokens), slice(first_slot + begin, first_slot + end)
        k, v = (x[slots].double().repeat_interleave(share, dim=1) for x in (k_cache, v_cache))
        scores = torch.einsum("thd,nhd->thn", q[tokens].double(), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if first_seen is not None:
            keys = torch.arange(position + begin, position + end, device=q.device)
            scores.masked_fill_((keys < first_seen[tokens, None])[:, None, :], float("-inf"))
        # A row that sees no key of the item has NaN weights; its part is empty.
        out[split, tokens] = torch.einsum("thn,nhd->thd", scores.softmax(dim=-1).nan_to_num(0.0), v).to(out.dtype)
        lse[split, tokens] = scores.logsumexp(dim=-1).float()
