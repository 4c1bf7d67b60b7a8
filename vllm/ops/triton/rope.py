"""Norms and rotary embedding of q and k, fused with the write of K and V into their slots.

Reads the packed output of the QKV projection once: heads 0 … H-1 are queries, then KVH keys, then KVH values. Pairs of
dimensions of queries and keys turn in float32; q goes to an array of its own, K and V go into the cache.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.ops import rope as ops_rope
from vllm.ops.launch import follow, launch
from vllm.ops.norm import normalise
from vllm.ops.rope import QkNorm, Rope
from vllm.ops.triton.norm import row_norm


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _rope_kernel(
    qkv_ptr,
    qkv_stride,
    positions_ptr,
    cos_sin_ptr,
    slots_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORMS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    pair = tl.arange(0, BLOCK_HALF)
    inside = pair < HALF
    slot = tl.load(slots_ptr + token).to(tl.int64)
    # Where the two dimensions of each pair are. Those behind the first R are paired too, and stay as they are.
    if R == D and not INTERLEAVED:
        at_first = pair
        at_second = pair + HALF
    elif INTERLEAVED:
        at_first = tl.where(pair < R // 2, 2 * pair, pair + R // 2)
        at_second = tl.where(pair < R // 2, 2 * pair + 1, pair + HALF)
    else:
        at_first = tl.where(pair < R // 2, pair, pair + R // 2)
        at_second = tl.where(pair < R // 2, pair + R // 2, pair + HALF)
    is_query = (head < NUM_HEADS)[:, None]
    is_value = (head >= NUM_HEADS + NUM_KV_HEADS)[:, None]
    dtype = q_ptr.dtype.element_ty

    mask = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & inside[None, :]
    source = qkv_ptr + token * qkv_stride + head[:, None] * D
    first = tl.load(source + at_first[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + at_second[None, :], mask=mask, other=0.0).to(tl.float32)
    turned_first = first
    turned_second = second
    if NORMS:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)[:, None]
        q_first = tl.load(q_weight_ptr + at_first, mask=inside, other=0.0).to(tl.float32)[None, :]
        q_second = tl.load(q_weight_ptr + at_second, mask=inside, other=0.0).to(tl.float32)[None, :]
        k_first = tl.load(k_weight_ptr + at_first, mask=inside, other=0.0).to(tl.float32)[None, :]
        k_second = tl.load(k_weight_ptr + at_second, mask=inside, other=0.0).to(tl.float32)[None, :]
        turned_first = first * scale
        turned_second = second * scale
        factor_first = tl.where(is_query, q_first, k_first) + OFFSET
        factor_second = tl.where(is_query, q_second, k_second) + OFFSET
        if ROUNDS_FIRST:
            turned_first = turned_first.to(dtype).to(tl.float32)
            turned_second = turned_second.to(dtype).to(tl.float32)
            factor_first = factor_first.to(dtype).to(tl.float32)
            factor_second = factor_second.to(dtype).to(tl.float32)
        # Rounded, as a norm by itself hands them on.
        turned_first = (turned_first * factor_first).to(dtype).to(tl.float32)
        turned_second = (turned_second * factor_second).to(dtype).to(tl.float32)
    if R > 0:
        position = tl.load(positions_ptr + token).to(tl.int64)
        turns = pair < R // 2
        cos = tl.load(cos_sin_ptr + position * R + pair, mask=turns, other=1.0)[None, :]
        sin = tl.load(cos_sin_ptr + position * R + R // 2 + pair, mask=turns, other=0.0)[None, :]
        straight = turned_first
        turned_first = straight * cos - turned_second * sin
        turned_second = turned_second * cos + straight * sin
    turned_first = tl.where(is_value, first, turned_first).to(dtype)
    turned_second = tl.where(is_value, second, turned_second).to(dtype)

    target = q_ptr + (token * NUM_HEADS + head[:, None]) * D
    tl.store(target + at_first[None, :], turned_first, mask=mask & is_query)
    tl.store(target + at_second[None, :], turned_second, mask=mask & is_query)
    # Compared as a block: Triton's interpreter does not take a mask from a scalar.
    written = mask & (slot + tl.zeros([BLOCK_HEADS], tl.int64) >= 0)[:, None]
    is_key = ((head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS))[:, None]
    target = k_ptr + (slot * NUM_KV_HEADS + head[:, None] - NUM_HEADS) * D
    tl.store(target + at_first[None, :], turned_first, mask=written & is_key)
    tl.store(target + at_second[None, :], turned_second, mask=written & is_key)
    target = v_ptr + (slot * NUM_KV_HEADS + head[:, None] - NUM_HEADS - NUM_KV_HEADS) * D
    tl.store(target + at_first[None, :], turned_first, mask=written & is_value)
    tl.store(target + at_second[None, :], turned_second, mask=written & is_value)


def rope_and_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rope: Rope | None,
    qk_norm: QkNorm | None,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    q: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalises q and k, turns them by their positions, writes K and V, returns q. One launch, and two more where a
    norm is over all heads.

    Args:
        qkv: [T, (num_heads + 2 KVH) * D], the last dimension contiguous; overwritten by norms over all heads.
        positions: int [T]; valid also for padded rows.
        rope, qk_norm: None for none.
        slot_mapping: Slot of each token; int [T], negative for padded rows, whose K and V are dropped.
        k_cache, v_cache: [num_slots, KVH, D], contiguous, in the dtype of `qkv`.
        q: [T, num_heads, D], contiguous, written if given.
    """
    num_tokens = qkv.shape[0]
    _, num_kv_heads, head_dim = k_cache.shape
    turned_dim = 0 if rope is None else rope.cos_sin.shape[1]
    fits = qkv.shape[1] == (num_heads + 2 * num_kv_heads) * head_dim and v_cache.shape == k_cache.shape
    if not fits or turned_dim > head_dim or head_dim % 2:
        raise ValueError(f"qkv {tuple(qkv.shape)} does not fit {num_heads} heads and K {tuple(k_cache.shape)}")
    if q is None:
        q = qkv.new_empty(num_tokens, num_heads, head_dim)
    if not num_tokens:
        return q
    norms = False
    if qk_norm is not None:
        norms = len(qk_norm.q) == head_dim and qk_norm.norm.kind == "rms"
        if not norms:
            _normalise_in_place(qkv, qk_norm, num_heads, num_kv_heads, head_dim)
    all_heads = num_heads + 2 * num_kv_heads
    block_half = triton.next_power_of_2(head_dim // 2)
    # About 1024 pairs a program; few tokens get smaller programs, so that their heads run side by side.
    block_heads = max(1, (256 if num_tokens < 32 else 1024) // block_half)
    block_heads = min(block_heads, triton.next_power_of_2(all_heads))
    launch(
        _rope_kernel,
        (num_tokens, triton.cdiv(all_heads, block_heads)),
        qkv,
        qkv.stride(0),
        positions,
        q if rope is None else rope.cos_sin,
        slot_mapping,
        q if qk_norm is None else qk_norm.q,
        q if qk_norm is None else qk_norm.k,
        q,
        k_cache,
        v_cache,
        0.0 if qk_norm is None else qk_norm.norm.eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        D=head_dim,
        R=turned_dim,
        INTERLEAVED=rope is not None and rope.interleaved,
        NORMS=norms,
        OFFSET=qk_norm.norm.offset if qk_norm is not None and norms else 0.0,
        ROUNDS_FIRST=qk_norm is not None and norms and qk_norm.norm.rounds_first,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        num_warps=4,
    )
    return q


def _normalise_in_place(qkv: torch.Tensor, qk_norm: QkNorm, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    first = 0
    for heads, weight in ((num_heads, qk_norm.q), (num_kv_heads, qk_norm.k)):
        part = qkv[:, first : first + heads * head_dim]
        first += heads * head_dim
        if len(weight) == heads * head_dim:
            row_norm(part, weight, None, qk_norm.norm, part)
        else:
            part.unflatten(1, (heads, head_dim)).copy_(
                normalise(part.unflatten(1, (heads, head_dim)), weight, None, qk_norm.norm)
            )


def rope_and_write_reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    rope: Rope | None,
    qk_norm: QkNorm | None,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """`rope_and_write` in plain torch."""
    real = slot_mapping >= 0
    ops_rope.rope_and_write(qkv[real], positions[real], rope, qk_norm, slot_mapping[real], k_cache, v_cache, num_heads)
    nowhere = torch.zeros_like(slot_mapping)
    unused_k, unused_v = k_cache[:1].clone(), v_cache[:1].clone()
    return ops_rope.rope_and_write(qkv, positions, rope, qk_norm, nowhere, unused_k, unused_v, num_heads).contiguous()
