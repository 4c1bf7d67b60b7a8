"""`prefix_attention` for Hopper, by the same work lists, written in Gluon (Triton's lower level).

Three roles share a program: one warp loads K and V into a ring of tiles in shared memory, two warp groups attend for 64
rows each. A warp group starts the scores of the next tile before it weighs the values of this one, so that the
exponentials of one tile run under the products of another (Shah et al., 2024). Triton's own compiler waits for a
product before it looks at its result, which is why this kernel is not written in it.

The last keys of an extent come first: only they are masked, and only behind them values are wiped, which are others'.
"""

# Kernels are written in Gluon's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_wait

from vllm.attention.ops.triton_common import LOG2E, head_shape
from vllm.kernel_launch import launch

# Rows of a program; keys of a tile; tiles of K and of V in flight.
BLOCK_M = 128
BLOCK_N = 128
_STAGES = 2
_GL_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _load(k_desc, v_desc, k_tiles, v_tiles, bars, work, num_work, KV_HEADS: gl.constexpr, FIELDS: gl.constexpr):
    """Fills the ring, item by item, last tile of an item first."""
    total_items = gl.load(num_work) * KV_HEADS
    k_full, k_empty, v_full, v_empty, _ = bars
    BLOCK: gl.constexpr = k_desc.block_type.shape[0]
    D: gl.constexpr = k_desc.block_type.shape[1]
    STAGES: gl.constexpr = k_tiles.type.shape[0]
    stage = 0
    phase = 0
    for item in range(gl.program_id(0), total_items, gl.num_programs(0)):
        fields = work + (item // KV_HEADS) * FIELDS
        column = (item % KV_HEADS) * D
        first = gl.load(fields + 2) + gl.load(fields + 3)
        tiles = (gl.load(fields + 4) - gl.load(fields + 3) + BLOCK - 1) // BLOCK
        for i in range(tiles):
            row = first + (tiles - 1 - i) * BLOCK
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [row, column], k_full.index(stage), k_tiles.index(stage))
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [row, column], v_full.index(stage), v_tiles.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _attend(
    rings,
    results,
    WHICH: gl.constexpr,
    NUM_HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    FIELDS: gl.constexpr,
    HALF: gl.constexpr,
    CAUSAL: gl.constexpr,
    WITH_LSE: gl.constexpr,
):
    """Rows WHICH * HALF … of every item."""
    q_ptr, q_tiles, k_tiles, v_tiles, bars = rings
    work, num_work, out_ptr, lse_ptr, split_stride, scale_log2 = results
    total_items = gl.load(num_work) * KV_HEADS
    k_full, k_empty, v_full, v_empty, wiped = bars
    BLOCK: gl.constexpr = k_tiles.type.shape[1]
    D: gl.constexpr = k_tiles.type.shape[2]
    STAGES: gl.constexpr = k_tiles.type.shape[0]
    G: gl.constexpr = NUM_HEADS // KV_HEADS
    dtype: gl.constexpr = k_tiles.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    score_rows: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)
    q_tile = q_tiles.index(WHICH)
    load_row = gl.arange(0, HALF, gl.SliceLayout(1, load_layout))
    load_column = gl.arange(0, D, gl.SliceLayout(0, load_layout))
    stage = 0
    phase = 0
    wipe_phase = 0
    for item in range(gl.program_id(0), total_items, gl.num_programs(0)):
        fields = work + (item // KV_HEADS) * FIELDS
        kv_head = item % KV_HEADS
        first_token = gl.load(fields)
        num_tokens = gl.load(fields + 1)
        num_rows = num_tokens * G
        num_keys = gl.load(fields + 4) - gl.load(fields + 3)
        split = gl.load(fields + 5)
        tiles = (num_keys + BLOCK - 1) // BLOCK
        last = num_keys - (tiles - 1) * BLOCK

        row = WHICH * HALF + load_row
        at = ((first_token + row // G).to(gl.int64) * NUM_HEADS + kv_head * G + row % G) * D
        q = gl.load(q_ptr + at[:, None] + load_column[None, :], mask=(row < num_rows)[:, None], other=0.0)
        # The products of the item before have been waited for, so nobody reads the old rows any more.
        q_tile.store(q)
        fence_async_shared()
        gl.thread_barrier()

        mbarrier.wait(k_full.index(stage), phase)
        zeros = gl.zeros([HALF, BLOCK], gl.float32, scores_layout)
        scores = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False)
        mbarrier.arrive(k_empty.index(stage), count=1)
        key = gl.arange(0, BLOCK, gl.SliceLayout(0, scores_layout))
        # Keys before this one of the item are seen by a row; the causal diagonal lies within the last two tiles.
        token = (WHICH * HALF + gl.arange(0, HALF, score_rows)) // G
        seen = num_keys + gl.minimum(token - num_tokens + 1, 0)
        if CAUSAL:
            keep = (key + (tiles - 1) * BLOCK)[None, :] < seen[:, None]
            scores = gl.where(keep, scores, float("-inf"))
        else:
            scores = gl.where((key < last)[None, :], scores, float("-inf"))
        if last < BLOCK:
            # Rows behind the extent are others' and may hold anything, NaN too: each warp group wipes half of them.
            mbarrier.wait(v_full.index(stage), phase)
            part = v_tiles.index(stage).slice(WHICH * HALF, HALF)
            values = part.load(load_layout)
            part.store(gl.where((WHICH * HALF + load_row < last)[:, None], values, 0.0))
            fence_async_shared()
            mbarrier.arrive(wiped, count=1)
            mbarrier.wait(wiped, wipe_phase)
            wipe_phase ^= 1
        peak = gl.max(scores, 1) * scale_log2
        base = peak
        if CAUSAL:
            # A row may see nothing of this tile: exp2(-inf - 0) is 0, exp2(-inf - -inf) would be NaN.
            base = gl.where(peak == float("-inf"), 0.0, peak)
        weights = gl.exp2(scores * scale_log2 - base[:, None])
        total = gl.sum(weights, 1)
        operand = gl.convert_layout(weights.to(dtype), weights_layout)
        acc = gl.zeros([HALF, D], gl.float32, out_layout)
        v_stage = stage
        v_phase = phase
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        for i in range(1, tiles):
            mbarrier.wait(k_full.index(stage), phase)
            scores_token = warpgroup_mma(
                q_tile, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
            )
            mbarrier.wait(v_full.index(v_stage), v_phase)
            acc_token = warpgroup_mma(operand, v_tiles.index(v_stage), acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=(scores_token,))
            mbarrier.arrive(k_empty.index(stage), count=1)
            # One condition would make a value of both, and the kernel hold the branch also where it is never taken.
            if CAUSAL:  # noqa: SIM102
                if i == 1:
                    keep = (key + (tiles - 2) * BLOCK)[None, :] < seen[:, None]
                    scores = gl.where(keep, scores, float("-inf"))
            new_peak = gl.maximum(peak, gl.max(scores, 1) * scale_log2)
            decay = gl.exp2(peak - new_peak)
            weights = gl.exp2(scores * scale_log2 - new_peak[:, None])
            total = total * decay + gl.sum(weights, 1)
            peak = new_peak
            next_operand = gl.convert_layout(weights.to(dtype), weights_layout)
            # The new weights pass through the wait, so that they are computed before it and not after.
            acc, _, operand = warpgroup_mma_wait(0, deps=(acc_token, operand, next_operand))
            mbarrier.arrive(v_empty.index(v_stage), count=1)
            acc = acc * gl.convert_layout(decay, out_rows)[:, None]
            v_stage = stage
            v_phase = phase
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        mbarrier.wait(v_full.index(v_stage), v_phase)
        acc = warpgroup_mma(operand, v_tiles.index(v_stage), acc)
        mbarrier.arrive(v_empty.index(v_stage), count=1)

        row = WHICH * HALF + gl.arange(0, HALF, out_rows)
        at = (first_token + row // G).to(gl.int64) * NUM_HEADS + kv_head * G + row % G
        at += split.to(gl.int64) * split_stride
        column = gl.arange(0, D, gl.SliceLayout(0, out_layout))
        acc = acc / gl.convert_layout(total, out_rows)[:, None]
        target = out_ptr + at[:, None] * D + column[None, :]
        gl.store(target, acc.to(out_ptr.dtype.element_ty), mask=(row < num_rows)[:, None])
        if WITH_LSE:
            row = WHICH * HALF + gl.arange(0, HALF, score_rows)
            at = (first_token + row // G).to(gl.int64) * NUM_HEADS + kv_head * G + row % G
            at += split.to(gl.int64) * split_stride
            gl.store(lse_ptr + at, (peak + gl.log2(total)) * 0.6931471805599453, mask=row < num_rows)


@gluon.jit(do_not_specialize=["split_stride"], do_not_specialize_on_alignment=["work_ptr", "num_work_ptr"])
def _kernel(
    q_ptr,
    k_desc,
    v_desc,
    work_ptr,
    num_work_ptr,
    out_ptr,
    lse_ptr,
    split_stride,
    scale_log2,
    NUM_HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    FIELDS: gl.constexpr,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
    CAUSAL: gl.constexpr,
    WITH_LSE: gl.constexpr,
    PDL: gl.constexpr,
):
    shape: gl.constexpr = k_desc.block_type.shape
    dtype: gl.constexpr = k_desc.dtype
    ring: gl.constexpr = [STAGES, shape[0], shape[1]]
    k_tiles = gl.allocate_shared_memory(dtype, ring, k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, ring, v_desc.layout)
    q_tiles = gl.allocate_shared_memory(dtype, [2, HALF, shape[1]], k_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    wiped = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    mbarrier.init(wiped, count=2)
    bars = (k_full, k_empty, v_full, v_empty, wiped)
    if PDL:
        gdc_wait()
    rings = (q_ptr, q_tiles, k_tiles, v_tiles, bars)
    results = (work_ptr, num_work_ptr, out_ptr, lse_ptr, split_stride, scale_log2)
    gl.warp_specialize(
        [
            (_attend, (rings, results, 0, NUM_HEADS, KV_HEADS, FIELDS, HALF, CAUSAL, WITH_LSE)),
            (_attend, (rings, results, 1, NUM_HEADS, KV_HEADS, FIELDS, HALF, CAUSAL, WITH_LSE)),
            (_load, (k_desc, v_desc, k_tiles, v_tiles, bars, work_ptr, num_work_ptr, KV_HEADS, FIELDS)),
        ],
        [4, 1],
        [240, 24],
    )


def hopper_prefix_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    work: torch.Tensor,
    num_work: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    num_programs: int,
    causal: bool = False,
) -> None:
    """The items of a work list made for tiles of `BLOCK_M` × `BLOCK_N`.

    Args:
        q, k_cache, v_cache, scale, work, num_work, out: As for `prefix_attention`; bfloat16 or float16, head_dim 64 or
            128.
        lse: None where every token has one part, which is then final.
        causal: The keys of an item end with those of its own query tokens: token i of n does not see the last n-1-i.
    """
    num_heads, num_kv_heads, head_dim = head_shape(q, k_cache, v_cache)
    block = [BLOCK_N, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(block, _GL_TYPES[q.dtype])
    launch(
        _kernel,
        (num_programs,),
        q,
        TensorDescriptor.from_tensor(k_cache.flatten(1), block, layout),
        TensorDescriptor.from_tensor(v_cache.flatten(1), block, layout),
        work,
        num_work,
        out,
        out if lse is None else lse,
        out.shape[-3] * num_heads,
        scale * LOG2E,
        NUM_HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        FIELDS=work.shape[1],
        STAGES=_STAGES,
        HALF=BLOCK_M // 2,
        CAUSAL=causal,
        WITH_LSE=lse is not None,
        num_warps=4,
        # 12 warps share 65,536 registers; the loading warp's group gives most of its own to the others.
        maxnreg=168,
    )
