"""What the prefix and the suffix kernel share: tile shapes, loading of packed query rows, one step of online softmax.

Query heads that share a KV head are rows of one matrix: row r of a tile is token `r // G`, head `kv_head * G + r % G`
(G query heads a KV head). A kernel's work is a list in device memory, one int32 row an item; an item is done for every
KV head. Programs take items in turns, so that the grid depends neither on the number of items nor on their lengths, and
a captured launch can be replayed over another list.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# log2(e) and ln(2): scores are exponentiated in base 2, log-sum-exps handed out in base e.
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class TileConfig:
    """Shape of a kernel's tiles and how it is launched.

    Attributes:
        block_m: Query rows of a tile (tokens × G), a power of two ≥ 16.
        block_n: Keys of a step, a power of two ≥ 16.
        num_warps, num_stages: Of the compiler.
        programs_per_sm: Programs that a persistent grid starts for each multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int

    def tokens(self, group_size: int) -> int:
        """Query tokens that fit into a tile."""
        return self.block_m // group_size


def head_shape(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[int, int, int]:
    """(num_heads, num_kv_heads, head_dim) of contiguous q [T, H, D] and caches [num_slots, KVH, D].

    Raises:
        ValueError: the tensors do not fit together or are not contiguous.
    """
    if q.shape[2] != k_cache.shape[2] or k_cache.shape != v_cache.shape or q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"q {tuple(q.shape)} does not fit K {tuple(k_cache.shape)} and V {tuple(v_cache.shape)}")
    if not (q.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError("q, K and V must be contiguous")
    return q.shape[1], k_cache.shape[1], q.shape[2]


@triton.jit
def row_offsets(first_token, kv_head, NUM_HEADS: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Index of (token, head) of every row of a tile in a [T, NUM_HEADS] array; int64 [BLOCK_M]."""
    rows = tl.arange(0, BLOCK_M)
    token = (first_token + rows // G).to(tl.int64)
    return token * NUM_HEADS + kv_head * G + rows % G


@triton.jit
def load_tile(
    base,
    row_offset,
    row_mask,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CACHE: tl.constexpr = tl.constexpr(""),  # noqa: B008 - what Triton takes for a default
):
    """Rows of D elements at `base + row_offset`, padded with 0 to [rows, BLOCK_D]; `row_mask` counts only if MASKED."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + row_offset[:, None] + columns[None, :]
    if MASKED:
        return tl.load(pointers, mask=row_mask[:, None] & (columns < D)[None, :], other=0.0, cache_modifier=CACHE)
    elif BLOCK_D != D:
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0, cache_modifier=CACHE)
    else:
        return tl.load(pointers, cache_modifier=CACHE)


def score_factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """(scale_log2, cap_log2) for `attend`."""
    if softcap is None:
        return scale * LOG2E, 0.0
    return softcap * LOG2E, 2 * scale / softcap * LOG2E


@triton.jit
def attend(q, k, v, peak, total, acc, keep, scale_log2, cap_log2, MASKED: tl.constexpr, CAPPED: tl.constexpr):
    """One step of online softmax (Milakov and Gimelshein, 2018) in base 2.

    `peak` [M] is the highest score so far times `scale_log2`, `total` [M] the sum of exponentials under it, `acc`
    [M, D] the weighted sum of values, all float32. `keep` [M, N] says which scores count, if MASKED; a row may keep
    none. If CAPPED, scores become tanh(scores · cap_log2 · ln(2) / 2) first.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if CAPPED:
        # tanh(x) = 1 - 2 / (exp(2x) + 1): right at both ends, where the exponential is 0 or infinite.
        scores = 1.0 - 2.0 / (tl.math.exp2(scores * cap_log2) + 1.0)
    if MASKED:
        scores = tl.where(keep, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    base = new_peak
    if MASKED:
        # A row that has seen no key yet: exp2(-inf - 0) is 0, exp2(-inf - -inf) would be NaN.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.math.exp2(scores * scale_log2 - base[:, None])
    decay = tl.math.exp2(peak - base)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_peak, total, acc


@triton.jit
def store_partial(
    out,
    lse,
    whole,
    split,
    split_stride,
    num_rows,
    rows_at,
    peak,
    total,
    acc,
    sink_log2,
    WITH_LSE: tl.constexpr,
    SINKS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes normalised rows into out[split] and, if WITH_LSE, natural log-sum-exps into lse[split].

    `split_stride` is the number of (token, head) pairs of one split; rows that saw no key get 0 and -inf. Rows of split
    -1, which only WITH_LSE has, are nobody's part: they go into `whole`. If SINKS, `sink_log2` [M] joins the softmax of
    rows that are final, which are those of `whole` and all without WITH_LSE.
    """
    valid = tl.arange(0, BLOCK_M) < num_rows
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    if SINKS:
        # Infinite where the sink is higher than all scores by more than float32 holds, or there are none: then 0.
        with_sink = total + tl.math.exp2(sink_log2 - peak)
        divisor = tl.where(split < 0, with_sink, divisor) if WITH_LSE else with_sink
    acc = acc / divisor[:, None]
    columns = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (columns < D)[None, :]
    if WITH_LSE:
        if split < 0:
            tl.store(whole + rows_at[:, None] * D + columns[None, :], acc.to(whole.dtype.element_ty), mask=mask)
        else:
            at = rows_at + split.to(tl.int64) * split_stride
            tl.store(out + at[:, None] * D + columns[None, :], acc.to(out.dtype.element_ty), mask=mask)
            tl.store(lse + at, tl.where(empty, float("-inf"), (peak + tl.math.log2(total)) * LN2), mask=valid)
    else:
        at = rows_at + split.to(tl.int64) * split_stride
        tl.store(out + at[:, None] * D + columns[None, :], acc.to(out.dtype.element_ty), mask=mask)
