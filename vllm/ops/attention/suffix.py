"""Causal attention over the sequences' own blocks: paged keys, decode and prefill by one kernel.

For query token i (of m) of a sequence with n own tokens, keys are the own slots 0 … n-m+i, found through its block
table; with a window, the last ones of these. An item is a tile of a sequence's query tokens × a range of its keys;
parts of a row are combined by `merge_partials`. Decode steps use tiles of 16 rows (one token's query heads), prefill
larger ones.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import triton
import triton.language as tl

from vllm.ops.attention.tiles import (
    LOG2E,
    TileConfig,
    attend,
    head_shape,
    load_tile,
    row_offsets,
    score_factors,
    store_partial,
)
from vllm.ops.attention.window import members
from vllm.ops.launch import follow_or_pass, launch, meet

# first_token, num_tokens, table_row, begin, end (own keys), position (own position of the first query token), split
SUFFIX_FIELDS = 7
# Items for each program to aim at: few enough to be long, enough to even out.
_ROUNDS = 4
# Splits are not made shorter than this many keys.
_MIN_SPLIT = 128


def suffix_tiles(max_rows: int, head_dim: int, dtype: torch.dtype) -> TileConfig:
    """Tile shape for sequences of at most `max_rows` rows (query tokens × G) in the batch."""
    if dtype == torch.float32:
        return TileConfig(16, 32 if head_dim <= 128 else 16, 4, 2, 2)
    wide = head_dim > 128
    if max_rows <= 16:
        # Many small programs: most items are a few hundred keys, and each begins and ends with a wait for memory. 256
        # sequences of 140, 192, 384 and 1,152 keys on an H100: 73, 87, 153, 418 µs. Two programs a multiprocessor by
        # steps of 128 keys, which load the last step after the others: 89, 97, 157, 422 µs.
        return TileConfig(16, 32, 4, 3, 2) if wide else TileConfig(16, 64, 2, 2, 4)
    if max_rows <= 64 or wide:
        return TileConfig(64, 64, 4, 2, 1 if wide else 2)
    return TileConfig(128, 64, 8, 3, 1)


def plan_suffix(
    first_token: np.ndarray,
    query_lens: np.ndarray,
    context_lens: np.ndarray,
    table_rows: np.ndarray,
    counts: np.ndarray,
    *,
    group_size: int,
    num_kv_heads: int,
    tiles: TileConfig,
    num_programs: int,
    max_partials: int,
    max_work: int,
    window: int | None = None,
) -> np.ndarray:
    """Cuts sequences into work items: tiles of query tokens × ranges of keys, longest first unless all fit at once.

    Args:
        first_token, query_lens, context_lens, table_rows: Of each sequence: its first query token in the batch, query
            tokens, own tokens (the query tokens included), row of the block tables; int [B]. Sequences without query or
            own tokens are left out.
        counts: Parts that each token of the batch has already, the same for all tokens of a sequence; int32 [T]. The
            new parts are counted in.
        group_size, num_kv_heads, tiles, num_programs: As for `plan_prefix`.
        max_partials: Most parts of a token.
        max_work: Most items.
        window: As of `AttentionSpec`; what no query token of an item sees is left out of it.

    Returns work, int32 [n, SUFFIX_FIELDS].

    Raises:
        ValueError: no part is left for a token, or more than `max_work` items are needed.
    """
    real = (query_lens > 0) & (context_lens > 0)
    if not real.all():
        first_token, query_lens, context_lens, table_rows = (
            x[real] for x in (first_token, query_lens, context_lens, table_rows)
        )
    if not len(query_lens):
        return np.empty((0, SUFFIX_FIELDS), np.int32)
    token, tokens, rows, num_keys = first_token, query_lens, table_rows, context_lens
    position = num_keys - tokens
    per_tile = tiles.tokens(group_size)
    if tokens.max() > per_tile:
        num_tiles = -(-tokens // per_tile)
        seq = np.repeat(np.arange(len(num_tiles)), num_tiles)
        start = (np.arange(len(seq)) - (num_tiles.cumsum() - num_tiles)[seq]) * per_tile
        token, tokens, position = token[seq] + start, np.minimum(tokens[seq] - start, per_tile), position[seq] + start
        rows, num_keys = rows[seq], position + tokens
    first_key = np.zeros_like(position) if window is None else np.maximum(position - (window - 1), 0)
    num_blocks = -(-(num_keys - first_key) // tiles.block_n)
    base = counts[token]
    left = max_partials - base
    if left.min() < 1:
        raise ValueError(f"a token has {base.max()} parts already; at most {max_partials} fit the workspace")
    even = -(-int(num_blocks.sum()) * num_kv_heads // (_ROUNDS * num_programs))
    target = max(even, _MIN_SPLIT // tiles.block_n, 1)
    num_items = len(token)
    if num_items > max_work:
        raise ValueError(f"{len(query_lens)} sequences need {num_items} work items, not {max_work}")
    splits: np.ndarray | None = None
    if num_blocks.max() > target:
        splits = np.minimum(-(-num_blocks // target), left)
        per_split = -(-num_blocks // splits)
        splits = -(-num_blocks // per_split)
        num_items = int(splits.sum())
        if num_items > max_work:
            splits, num_items = None, len(token)
    of_items = token if tokens.max() == 1 else members(token, tokens)
    work = np.empty((num_items, SUFFIX_FIELDS), np.int32)
    if splits is None:
        counts[of_items] += 1
        work[:, 3], work[:, 4], work[:, 6] = first_key, num_keys, base
    else:
        counts[of_items] += np.repeat(splits, tokens).astype(counts.dtype)
        tile = np.repeat(np.arange(len(splits)), splits)
        split = np.arange(num_items) - (splits.cumsum() - splits)[tile]
        length = per_split[tile] * tiles.block_n
        token, tokens, rows, position = token[tile], tokens[tile], rows[tile], position[tile]
        work[:, 3] = first_key[tile] + split * length
        work[:, 4] = np.minimum(work[:, 3] + length, num_keys[tile])
        work[:, 6] = base[tile] + split
    work[:, 0], work[:, 1], work[:, 2], work[:, 5] = token, tokens, rows, position
    if num_items * num_kv_heads <= num_programs:
        # All are done at once, whatever their order.
        return work
    return work[np.argsort(work[:, 3] - work[:, 4], kind="stable")]


def plan_chunk(first_slot: int, start: int, count: int, tokens_of_tile: int) -> np.ndarray:
    """Work of a prefill over consecutive slots instead of blocks: query tokens start … start+count-1 of a sequence
    whose slots begin at `first_slot`. The longest items come first.

    Returns int32 [n, SUFFIX_FIELDS], `first_slot` in the place of the row, one part a token.
    """
    first = np.arange(0, count, tokens_of_tile)[::-1]
    work = np.zeros((len(first), SUFFIX_FIELDS), np.int32)
    work[:, 0] = first
    work[:, 1] = np.minimum(tokens_of_tile, count - first)
    work[:, 2] = first_slot
    work[:, 4] = start + first + work[:, 1]
    work[:, 5] = start + first
    return work


def keep_from_merge(works: Iterable[np.ndarray], counts: np.ndarray) -> None:
    """Marks what has one part as done without a merge: items by split -1, their tokens by count -1.

    Partial results are float32, and are written, read and written again; so it pays for every token that is spared.

    Args:
        works: All lists of a batch from `plan_suffix`; changed.
        counts: Parts of each token, all of them counted; changed. A token with one part has it from these lists.
    """
    alone = counts == 1
    for work in works:
        work[alone[work[:, 0]], -1] = -1
    counts[alone] = -1


@triton.jit
def _masked_step(
    q, k_ptr, v_ptr, table, kv_head, n, end, last_seen, peak, total, acc, scale_log2, cap_log2,
    NUM_KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Own keys n … n+BLOCK_N-1 that lie before `end` and that a row sees: up to `last_seen` [M], within the WINDOW."""
    keys = tl.arange(0, BLOCK_N)
    own = n + keys
    inside = own < end
    block = tl.load(table + own // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
    at = (block * BLOCK_SIZE + own % BLOCK_SIZE) * (NUM_KV_HEADS * D) + kv_head * D
    k = load_tile(k_ptr, at, inside, True, D, BLOCK_D)
    v = load_tile(v_ptr, at, inside, True, D, BLOCK_D)
    keep = inside[None, :] & (own[None, :] <= last_seen[:, None])
    if WINDOW > 0:
        keep &= own[None, :] > (last_seen - WINDOW)[:, None]
    return attend(q, k, v, peak, total, acc, keep, scale_log2, cap_log2, True, CAPPED)


# As for the prefix kernel: nothing that changes from batch to batch may have the kernel compiled again.
@triton.jit(
    do_not_specialize=["table_stride", "split_stride", "beside"],
    do_not_specialize_on_alignment=["tables_ptr", "work_ptr", "num_work_ptr"],
)
def _suffix_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    tables_ptr,
    table_stride,
    work_ptr,
    num_work_ptr,
    out_ptr,
    lse_ptr,
    whole_ptr,
    sinks_ptr,
    split_stride,
    scale_log2,
    cap_log2,
    log2e,
    beside,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FIELDS: tl.constexpr,
    WITH_LSE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    PDL: tl.constexpr,
):
    follow_or_pass(beside, PDL)
    G: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    SLOT: tl.constexpr = NUM_KV_HEADS * D
    keys = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    total_items = tl.load(num_work_ptr) * NUM_KV_HEADS
    for item in range(tl.program_id(0), total_items, tl.num_programs(0)):
        fields = work_ptr + (item // NUM_KV_HEADS) * FIELDS
        kv_head = item % NUM_KV_HEADS
        first_token = tl.load(fields)
        num_rows = tl.load(fields + 1) * G
        table = tables_ptr + tl.load(fields + 2).to(tl.int64) * table_stride
        begin = tl.load(fields + 3)
        end = tl.load(fields + 4)
        position = tl.load(fields + 5)
        split = tl.load(fields + 6)
        rows_at = row_offsets(first_token, kv_head, NUM_HEADS, G, BLOCK_M)
        # Past the first-level cache: a kernel that goes beside another has not waited for what may be old in there.
        q = load_tile(q_ptr, rows_at * D, rows < num_rows, True, D, BLOCK_D, ".cg")
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        last_seen = position + rows // G
        # Keys from the window of the last query token on are seen by every row, up to the first query token's own.
        seen_from = begin
        if WINDOW > 0 and BLOCK_M > 16:
            hidden = tl.maximum(tl.minimum(position + num_rows // G - WINDOW, end) - begin, 0)
            seen_from = begin + tl.cdiv(hidden, BLOCK_N) * BLOCK_N
            for n in range(begin, seen_from, BLOCK_N):
                peak, total, acc = _masked_step(
                    q, k_ptr, v_ptr, table, kv_head, n, end, last_seen, peak, total, acc, scale_log2, cap_log2,
                    NUM_KV_HEADS, D, BLOCK_SIZE, BLOCK_N, BLOCK_D, WINDOW, CAPPED,
                )  # fmt: skip
        seen_by_all = tl.maximum(tl.minimum(end, position + 1) - seen_from, 0)
        full_end = seen_from + seen_by_all // BLOCK_N * BLOCK_N
        if BLOCK_M == 16:
            # Decode is bound by memory: a second loop would begin to load when the first has ended.
            full_end = begin
        for n in range(seen_from, full_end, BLOCK_N):
            own = n + keys
            slot = tl.load(table + own // BLOCK_SIZE).to(tl.int64) * BLOCK_SIZE + own % BLOCK_SIZE
            at = slot * SLOT + kv_head * D
            k = load_tile(k_ptr, at, keys < BLOCK_N, False, D, BLOCK_D)
            v = load_tile(v_ptr, at, keys < BLOCK_N, False, D, BLOCK_D)
            whole = keys[None, :] < BLOCK_N
            peak, total, acc = attend(q, k, v, peak, total, acc, whole, scale_log2, cap_log2, False, CAPPED)
        for n in range(full_end, end, BLOCK_N):
            peak, total, acc = _masked_step(
                q, k_ptr, v_ptr, table, kv_head, n, end, last_seen, peak, total, acc, scale_log2, cap_log2,
                NUM_KV_HEADS, D, BLOCK_SIZE, BLOCK_N, BLOCK_D, WINDOW, CAPPED,
            )  # fmt: skip
        sink_log2 = peak
        if SINKS:
            sink_log2 = tl.load(sinks_ptr + kv_head * G + rows % G).to(tl.float32) * log2e
        store_partial(
            out_ptr,
            lse_ptr,
            whole_ptr,
            split,
            split_stride,
            num_rows,
            rows_at,
            peak,
            total,
            acc,
            sink_log2,
            WITH_LSE,
            SINKS,
            D,
            BLOCK_M,
            BLOCK_D,
        )
    meet(beside, PDL)


def suffix_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    block_tables: torch.Tensor,
    block_size: int,
    work: torch.Tensor,
    num_work: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    tiles: TileConfig,
    num_programs: int,
    whole: torch.Tensor | None = None,
    beside: bool = False,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Does the items of a work list and writes the partial results at their split indexes.

    Args:
        q, k_cache, v_cache, scale, num_work, num_programs: As for `prefix_attention`.
        block_tables: int32 or int64 [rows, W], the last dimension contiguous.
        work: int32 [capacity, SUFFIX_FIELDS] from `plan_suffix` with the same `tiles`.
        out: [P, T, H, D], contiguous; where every token has one part, P = 1 and this may be the final result.
        lse: float32 [P, T, H], or None where there is nothing to merge.
        whole: [T, H, D], contiguous; receives the items that `keep_from_merge` has marked. None where none are.
        beside: The launch before this one is of this batch's attention too; they run at the same time.
        window, softcap: As of `AttentionSpec`, the window the one of the plan.
        sinks: [H], contiguous; they join what is not merged.
    """
    num_heads, num_kv_heads, head_dim = head_shape(q, k_cache, v_cache)
    scale_log2, cap_log2 = score_factors(scale, softcap)
    launch(
        _suffix_kernel,
        (num_programs,),
        q,
        k_cache,
        v_cache,
        block_tables,
        block_tables.stride(0),
        work,
        num_work,
        out,
        out if lse is None else lse,
        out if whole is None else whole,
        q if sinks is None else sinks,
        out.shape[1] * num_heads,
        scale_log2,
        cap_log2,
        LOG2E,
        int(beside),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        D=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_D=triton.next_power_of_2(head_dim),
        FIELDS=SUFFIX_FIELDS,
        WITH_LSE=lse is not None,
        WINDOW=window or 0,
        CAPPED=softcap is not None,
        SINKS=sinks is not None,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def suffix_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    block_tables: torch.Tensor,
    block_size: int,
    work: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """`suffix_attention` in float64, item by item, without sinks; every row of `work` counts."""
    share = q.shape[1] // k_cache.shape[1]
    for first_token, num_tokens, row, begin, end, position, split in work.tolist():
        tokens, own = slice(first_token, first_token + num_tokens), torch.arange(begin, end, device=q.device)
        slots = block_tables[row, own // block_size].long() * block_size + own % block_size
        k, v = (x[slots].double().repeat_interleave(share, dim=1) for x in (k_cache, v_cache))
        scores = torch.einsum("thd,nhd->thn", q[tokens].double(), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        last = position + torch.arange(num_tokens, device=q.device)[:, None]
        hidden = own > last
        if window is not None:
            hidden |= own <= last - window
        scores.masked_fill_(hidden[:, None, :], float("-inf"))
        # A row that sees no key of the range has NaN weights; its part is empty.
        weights = scores.softmax(dim=-1).nan_to_num(0.0)
        out[split, tokens] = torch.einsum("thn,nhd->thd", weights, v).to(out.dtype)
        lse[split, tokens] = scores.logsumexp(dim=-1).float()
