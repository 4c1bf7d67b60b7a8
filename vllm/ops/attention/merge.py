"""Attention of each row from its partial results, by log-sum-exp.

With parts p of a row, m = max lse_p and w_p = exp(lse_p - m):  out = Σ w_p out_p / Σ w_p, all in float32. A part with
lse -inf is empty; a row without parts, or with empty ones only, is 0. A sink is one more part, of value 0, whose lse is
the sink.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.ops.attention.tiles import LOG2E
from vllm.ops.launch import follow, launch

# Elements of a program's tile: parts × columns of the flattened heads.
_TILE = 2048


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["counts_ptr", "tokens_ptr"])
def _merge_kernel(
    partial_ptr,
    lse_ptr,
    counts_ptr,
    tokens_ptr,
    sinks_ptr,
    out_ptr,
    num_tokens,
    log2e,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
    SINKS: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    COLUMNS: tl.constexpr = NUM_HEADS * D
    token = tl.program_id(0).to(tl.int64)
    if LISTED:
        token = tl.load(tokens_ptr + token).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = columns < COLUMNS
    head = columns // D
    count = tl.load(counts_ptr + token)
    if count < 0:
        return
    parts = tl.arange(0, BLOCK_P)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if SINKS:
        peak = tl.load(sinks_ptr + head, mask=valid, other=0.0).to(tl.float32) * log2e
        total += 1.0
    acc = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK_P):
        part = first + parts
        mask = (part < count)[:, None] & valid[None, :]
        row = part.to(tl.int64) * num_tokens + token
        lse = tl.load(lse_ptr + row[:, None] * NUM_HEADS + head[None, :], mask=mask, other=float("-inf")) * log2e
        value = tl.load(partial_ptr + row[:, None] * COLUMNS + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        # As long as all parts are empty: exp2(-inf - 0) is 0, exp2(-inf - -inf) would be NaN.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.math.exp2(lse - base[None, :])
        decay = tl.math.exp2(peak - base)
        total = total * decay + tl.sum(weight, 0)
        acc = acc * decay + tl.sum(weight * value, 0)
        peak = new_peak
    result = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + token * COLUMNS + columns, result.to(out_ptr.dtype.element_ty), mask=valid)


def merge_partials(
    partial: torch.Tensor,
    lse: torch.Tensor,
    counts: torch.Tensor,
    out: torch.Tensor,
    tokens: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Combines the first counts[t] parts of every token.

    Args:
        partial: [P, T, H, D], contiguous; what lies beyond a token's parts is not read.
        lse: float32 [P, T, H], natural logarithm; -inf marks an empty part (whose values must be finite).
        counts: Parts of each token, or -1 for those whose result is in `out` already; int32 [T].
        out: [T, H, D], contiguous; the others are written.
        tokens: Those that are not in `out` already, where they are known: fewer programs; int32 [n].
        sinks: A part more of each head; [H], contiguous.
    """
    num_parts, num_tokens, num_heads, head_dim = partial.shape
    num_merged = num_tokens if tokens is None else len(tokens)
    # Many tokens have few parts each; few tokens have many, which are read side by side, by small programs. On an H100
    # 128 tokens of up to 5 parts take 2 µs less by 2 parts at a time than by 4, 64 tokens of up to 48 take 2 µs more.
    many = num_tokens >= 64
    at_once = 2 if num_tokens >= 128 else 4 if many else 16
    block_p = min(at_once, triton.next_power_of_2(num_parts))
    columns = num_heads * head_dim
    block = min(_TILE // block_p if many else 128, triton.next_power_of_2(columns))
    launch(
        _merge_kernel,
        (num_merged, triton.cdiv(columns, block)),
        partial,
        lse,
        counts,
        counts if tokens is None else tokens,
        lse if sinks is None else sinks,
        out,
        num_tokens,
        LOG2E,
        NUM_HEADS=num_heads,
        D=head_dim,
        BLOCK_P=block_p,
        BLOCK=block,
        LISTED=tokens is not None,
        SINKS=sinks is not None,
        num_warps=4,
    )


def merge_partials_reference(
    partial: torch.Tensor,
    lse: torch.Tensor,
    counts: torch.Tensor,
    out: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> None:
    """`merge_partials` in float64, token by token."""
    for token, count in enumerate(counts.tolist()):
        if count < 0:
            continue
        parts = lse[:count, token].double()
        if sinks is not None:
            parts = torch.cat((parts, sinks.double().unsqueeze(0)))
        weights = parts.softmax(dim=0).nan_to_num(0.0)[:count]
        out[token] = (weights.unsqueeze(-1) * partial[:count, token].double()).sum(dim=0).to(out.dtype)
