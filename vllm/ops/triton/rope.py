"""Rotary embedding of q and k, fused with the write of K and V into their slots.

Reads the packed output of the QKV projection once: heads 0 … H-1 are queries, then KVH keys, then KVH values.
Dimension i of queries and keys turns with dimension i + D/2 in float32; q goes to an array of its own, K and V go into
the cache.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.ops.launch import follow, launch


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _rope_kernel(
    qkv_ptr,
    qkv_stride,
    positions_ptr,
    cos_sin_ptr,
    slots_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    half = tl.arange(0, BLOCK_HALF)
    inside = half < HALF
    position = tl.load(positions_ptr + token).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    cos = tl.load(cos_sin_ptr + position * D + half, mask=inside, other=0.0)[None, :]
    sin = tl.load(cos_sin_ptr + position * D + HALF + half, mask=inside, other=0.0)[None, :]
    mask = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & inside[None, :]
    source = qkv_ptr + token * qkv_stride + head[:, None] * D + half[None, :]
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    is_value = (head >= NUM_HEADS + NUM_KV_HEADS)[:, None]
    dtype = q_ptr.dtype.element_ty
    turned_first = tl.where(is_value, first, first * cos - second * sin).to(dtype)
    turned_second = tl.where(is_value, second, second * cos + first * sin).to(dtype)

    is_query = (head < NUM_HEADS)[:, None]
    target = q_ptr + (token * NUM_HEADS + head[:, None]) * D + half[None, :]
    tl.store(target, turned_first, mask=mask & is_query)
    tl.store(target + HALF, turned_second, mask=mask & is_query)
    # Compared as a block: Triton's interpreter does not take a mask from a scalar.
    written = mask & (slot + tl.zeros([BLOCK_HEADS], tl.int64) >= 0)[:, None]
    is_key = ((head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS))[:, None]
    target = k_ptr + (slot * NUM_KV_HEADS + head[:, None] - NUM_HEADS) * D + half[None, :]
    tl.store(target, turned_first, mask=written & is_key)
    tl.store(target + HALF, turned_second, mask=written & is_key)
    target = v_ptr + (slot * NUM_KV_HEADS + head[:, None] - NUM_HEADS - NUM_KV_HEADS) * D + half[None, :]
    tl.store(target, turned_first, mask=written & is_value)
    tl.store(target + HALF, turned_second, mask=written & is_value)


def rope_and_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    q: torch.Tensor | None = None,
) -> torch.Tensor:
    """Turns q and k by their positions, writes K and V, returns q.

    Args:
        qkv: [T, (num_heads + 2 KVH) * D], the last dimension contiguous.
        positions: int [T]; valid also for padded rows.
        cos_sin: float32 [max_positions, D]: D/2 cosines, then D/2 sines.
        slot_mapping: Slot of each token; int [T], negative for padded rows, whose K and V are dropped.
        k_cache, v_cache: [num_slots, KVH, D], contiguous, in the dtype of `qkv`.
        q: [T, num_heads, D], contiguous, written if given.
    """
    num_tokens = qkv.shape[0]
    _, num_kv_heads, head_dim = k_cache.shape
    if qkv.shape[1] != (num_heads + 2 * num_kv_heads) * head_dim or cos_sin.shape[1] != head_dim:
        raise ValueError(f"qkv {tuple(qkv.shape)} does not fit {num_heads} heads and K {tuple(k_cache.shape)}")
    if q is None:
        q = qkv.new_empty(num_tokens, num_heads, head_dim)
    if not num_tokens:
        return q
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
        cos_sin,
        slot_mapping,
        q,
        k_cache,
        v_cache,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        D=head_dim,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        num_warps=4,
    )
    return q


def rope_and_write_reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """`rope_and_write` in plain torch."""
    _, num_kv_heads, head_dim = k_cache.shape
    heads = qkv.view(len(qkv), -1, head_dim)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    first, second = heads[:, : num_heads + num_kv_heads].float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(qkv.dtype)
    real = slot_mapping >= 0
    k_cache[slot_mapping[real]] = turned[real, num_heads:]
    v_cache[slot_mapping[real]] = heads[real, num_heads + num_kv_heads :]
    return turned[:, :num_heads].contiguous()
