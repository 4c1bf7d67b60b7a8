"""Attention of many query rows for Hopper, written in Gluon (Triton's lower level): prefix, prefill chunk and prefill.

One kernel does the items of `plan_prefix` (dense over an extent), of `plan_chunk` (causal over consecutive slots) and
of `plan_suffix` (causal over own blocks, found through a block table).

Three roles share a program: one warp loads K and V into a ring of tiles in shared memory, two warp groups attend for 64
rows each. A warp group starts the scores of the next tile before it weighs the values of this one, so that the
exponentials of one tile run under the products of another (Shah et al., 2024). Triton's own compiler waits for a
product before it looks at its result, which is why this kernel is not written in it.

The last keys of an item come first: only they are masked, and only behind them values are wiped, which are others'.
"""

# Kernels are written in Gluon's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def, assignment"
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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vllm.ops.attention.tiles import LOG2E, TileConfig, head_shape
from vllm.ops.launch import launch

# Rows and keys of a tile, as the planners take them.
TILES = TileConfig(block_m=128, block_n=128, num_warps=4, num_stages=2, programs_per_sm=1)
# Columns of K and V that one swizzled row of shared memory holds.
_BOX = 64
# What Triton 3.9 calls otherwise than 3.6.
_IS_OLD = gl.constexpr(hasattr(gl, "thread_barrier"))
_barrier = gl.thread_barrier if _IS_OLD.value else gl.barrier
_load_tile = tma.async_copy_global_to_shared if _IS_OLD.value else tma.async_load
_GL_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def takes(dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
    """Whether the kernel is made for such heads, and for own blocks of such a size."""
    page_fits = block_size % 8 == 0 and TILES.block_n % block_size == 0
    return dtype in _GL_TYPES and head_dim in (64, 128) and page_fits


@gluon.jit
def _advance(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _as_boxes(tiles, desc, SHAPE: gl.constexpr):
    if _IS_OLD:
        boxes = tiles._reinterpret(desc.dtype, SHAPE, desc.layout)
    else:
        boxes = tiles.reinterpret(desc.dtype, SHAPE, desc.layout)
    return boxes


@gluon.jit
def _load(
    k_desc,
    v_desc,
    rings,
    results,
    tables,
    KV_HEADS: gl.constexpr,
    FIELDS: gl.constexpr,
    D: gl.constexpr,
    PAGE: gl.constexpr,
):
    """Fills the rings, item by item, last tile of an item first; whole tiles, or block by block where PAGE is set."""
    _, _, k_tiles, v_tiles, bars = rings
    work, num_work = results[0], results[1]
    tables_ptr, table_stride = tables
    total_items = gl.load(num_work) * KV_HEADS
    k_full, k_empty, v_full, v_empty, _ = bars
    STAGES: gl.constexpr = k_tiles.type.shape[0]
    BLOCK: gl.constexpr = k_tiles.type.shape[1]
    TILE_BYTES: gl.constexpr = BLOCK * D * 2
    stage = 0
    phase = 0
    for item in range(gl.program_id(0), total_items, gl.num_programs(0)):
        fields = work + (item // KV_HEADS) * FIELDS
        column = (item % KV_HEADS) * D
        place = gl.load(fields + 2)
        begin = gl.load(fields + 3)
        end = gl.load(fields + 4)
        tiles = (end - begin + BLOCK - 1) // BLOCK
        for i in range(tiles):
            first = begin + (tiles - 1 - i) * BLOCK
            if PAGE == 0:
                mbarrier.wait(k_empty.index(stage), phase ^ 1)
                mbarrier.expect(k_full.index(stage), TILE_BYTES)
                _load_tile(k_desc, [place + first, column], k_full.index(stage), k_tiles.index(stage))
                mbarrier.wait(v_empty.index(stage), phase ^ 1)
                mbarrier.expect(v_full.index(stage), TILE_BYTES)
                _load_tile(v_desc, [place + first, column], v_full.index(stage), v_tiles.index(stage))
            else:
                PAGES: gl.constexpr = BLOCK // PAGE
                COLUMNS: gl.constexpr = k_desc.block_type.shape[1]
                PARTS: gl.constexpr = D // COLUMNS
                boxes: gl.constexpr = [STAGES * PARTS * PAGES, PAGE, COLUMNS]
                k_boxes = _as_boxes(k_tiles, k_desc, boxes)
                v_boxes = _as_boxes(v_tiles, v_desc, boxes)
                table = tables_ptr + place.to(gl.int64) * table_stride
                # Blocks behind the last one are not the sequence's; their keys are masked, so it may stand for them.
                last = (end - 1) // PAGE
                slots = ()
                for j in gl.static_range(PAGES):
                    slots += ((gl.load(table + gl.minimum(first // PAGE + j, last)) * PAGE).to(gl.int32),)
                mbarrier.wait(k_empty.index(stage), phase ^ 1)
                mbarrier.expect(k_full.index(stage), TILE_BYTES)
                for j in gl.static_range(PAGES):
                    for part in gl.static_range(PARTS):
                        _load_tile(
                            k_desc,
                            [slots[j], column + part * COLUMNS],
                            k_full.index(stage),
                            k_boxes.index((stage * PARTS + part) * PAGES + j),
                        )
                mbarrier.wait(v_empty.index(stage), phase ^ 1)
                mbarrier.expect(v_full.index(stage), TILE_BYTES)
                for j in gl.static_range(PAGES):
                    for part in gl.static_range(PARTS):
                        _load_tile(
                            v_desc,
                            [slots[j], column + part * COLUMNS],
                            v_full.index(stage),
                            v_boxes.index((stage * PARTS + part) * PAGES + j),
                        )
            stage, phase = _advance(stage, phase, STAGES)


@gluon.jit
def _next_tile(
    rings, q_tile, zeros, scale_log2, first_key, seen, stage, phase, v_stage, v_phase, peak, total, acc, operand,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of the tile at `stage` and their exponentials, while the values of the one before are weighed."""
    _, _, k_tiles, v_tiles, bars = rings
    k_full, k_empty, v_full, v_empty, _ = bars
    BLOCK: gl.constexpr = k_tiles.type.shape[1]
    mbarrier.wait(k_full.index(stage), phase)
    scores_token = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_stage), v_phase)
    acc_token = warpgroup_mma(operand, v_tiles.index(v_stage), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores_token,))
    mbarrier.arrive(k_empty.index(stage), count=1)
    if MASKED:
        key = first_key + gl.arange(0, BLOCK, gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(key[None, :] < seen[:, None], scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, 1) * scale_log2)
    base = new_peak
    if MASKED:
        # A row may have seen nothing yet: exp2(-inf - 0) is 0, exp2(-inf - -inf) would be NaN.
        base = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    decay = gl.exp2(peak - base)
    weights = gl.exp2(scores * scale_log2 - base[:, None])
    total = total * decay + gl.sum(weights, 1)
    next_operand = gl.convert_layout(weights.to(k_tiles.dtype), operand.type.layout)
    # The new weights pass through the wait, so that they are computed before it and not after.
    acc, _, operand = warpgroup_mma_wait(0, deps=(acc_token, operand, next_operand))
    mbarrier.arrive(v_empty.index(v_stage), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, acc.type.layout))[:, None]
    return new_peak, total, acc, operand


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
    work, num_work, out_ptr, lse_ptr, whole_ptr, split_stride, scale_log2 = results
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
        num_rows = gl.load(fields + 1) * G
        begin = gl.load(fields + 3)
        num_keys = gl.load(fields + 4) - begin
        split = gl.load(fields + FIELDS - 1)
        tiles = (num_keys + BLOCK - 1) // BLOCK
        last = num_keys - (tiles - 1) * BLOCK

        row = WHICH * HALF + load_row
        at = ((first_token + row // G).to(gl.int64) * NUM_HEADS + kv_head * G + row % G) * D
        # Past the first-level cache, as in the suffix kernel.
        q = gl.load(
            q_ptr + at[:, None] + load_column[None, :],
            mask=(row < num_rows)[:, None],
            other=0.0,
            cache_modifier=".cg",
        )
        # The products of the item before have been waited for, so nobody reads the old rows any more.
        q_tile.store(q)
        fence_async_shared()
        _barrier()

        mbarrier.wait(k_full.index(stage), phase)
        zeros = gl.zeros([HALF, BLOCK], gl.float32, scores_layout)
        scores = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False)
        mbarrier.arrive(k_empty.index(stage), count=1)
        # Keys before this one of the item are seen by a row. The causal diagonal lies within the last two tiles.
        token = (WHICH * HALF + gl.arange(0, HALF, score_rows)) // G
        seen = gl.full([HALF], num_keys, gl.int32, score_rows)
        if CAUSAL:
            seen = gl.minimum(seen, gl.load(fields + 5) - begin + 1 + token)
        key = (tiles - 1) * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, scores_layout))
        scores = gl.where(key[None, :] < seen[:, None], scores, float("-inf"))
        if last < BLOCK:
            # Rows behind the last key may hold anything, NaN too: each warp group wipes half of them.
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
            base = gl.where(peak == float("-inf"), 0.0, peak)
        weights = gl.exp2(scores * scale_log2 - base[:, None])
        total = gl.sum(weights, 1)
        operand = gl.convert_layout(weights.to(dtype), weights_layout)
        acc = gl.zeros([HALF, D], gl.float32, out_layout)
        v_stage = stage
        v_phase = phase
        stage, phase = _advance(stage, phase, STAGES)
        start = 1
        if CAUSAL:
            if tiles > 1:
                peak, total, acc, operand = _next_tile(
                    rings, q_tile, zeros, scale_log2, (tiles - 2) * BLOCK, seen, stage, phase, v_stage, v_phase,
                    peak, total, acc, operand, True,
                )  # fmt: skip
                v_stage = stage
                v_phase = phase
                stage, phase = _advance(stage, phase, STAGES)
            start = 2
        for _ in range(start, tiles):
            peak, total, acc, operand = _next_tile(
                rings, q_tile, zeros, scale_log2, 0, seen, stage, phase, v_stage, v_phase,
                peak, total, acc, operand, False,
            )  # fmt: skip
            v_stage = stage
            v_phase = phase
            stage, phase = _advance(stage, phase, STAGES)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        acc = warpgroup_mma(operand, v_tiles.index(v_stage), acc)
        mbarrier.arrive(v_empty.index(v_stage), count=1)

        row = WHICH * HALF + gl.arange(0, HALF, out_rows)
        at = (first_token + row // G).to(gl.int64) * NUM_HEADS + kv_head * G + row % G
        column = gl.arange(0, D, gl.SliceLayout(0, out_layout))
        divisor = total
        if CAUSAL:
            divisor = gl.where(total == 0.0, 1.0, total)
        acc = acc / gl.convert_layout(divisor, out_rows)[:, None]
        mask = (row < num_rows)[:, None]
        # As `store_partial`.
        whole = whole_ptr + at[:, None] * D + column[None, :]
        if WITH_LSE:
            if split < 0:
                gl.store(whole, acc.to(whole_ptr.dtype.element_ty), mask=mask)
            else:
                first = split.to(gl.int64) * split_stride
                target = out_ptr + (first + at)[:, None] * D + column[None, :]
                gl.store(target, acc.to(out_ptr.dtype.element_ty), mask=mask)
                lse_row = WHICH * HALF + gl.arange(0, HALF, score_rows)
                lse_at = (first_token + lse_row // G).to(gl.int64) * NUM_HEADS + kv_head * G + lse_row % G
                gl.store(
                    lse_ptr + first + lse_at, (peak + gl.log2(total)) * 0.6931471805599453, mask=lse_row < num_rows
                )
        else:
            gl.store(whole, acc.to(whole_ptr.dtype.element_ty), mask=mask)


@gluon.jit(
    do_not_specialize=["split_stride", "table_stride", "beside"],
    do_not_specialize_on_alignment=["work_ptr", "num_work_ptr", "tables_ptr"],
)
def _kernel(
    q_ptr,
    k_desc,
    v_desc,
    tables_ptr,
    table_stride,
    work_ptr,
    num_work_ptr,
    out_ptr,
    lse_ptr,
    whole_ptr,
    split_stride,
    scale_log2,
    beside,
    NUM_HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    D: gl.constexpr,
    BLOCK: gl.constexpr,
    FIELDS: gl.constexpr,
    STAGES: gl.constexpr,
    HALF: gl.constexpr,
    CAUSAL: gl.constexpr,
    PAGE: gl.constexpr,
    WITH_LSE: gl.constexpr,
    PDL: gl.constexpr,
):
    dtype: gl.constexpr = k_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, D], dtype)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], layout)
    q_tiles = gl.allocate_shared_memory(dtype, [2, HALF, D], layout)
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
    # As `follow_or_pass` and `meet`.
    if PDL:
        if beside == 0:
            gdc_wait()
        gdc_launch_dependents()
    rings = (q_ptr, q_tiles, k_tiles, v_tiles, (k_full, k_empty, v_full, v_empty, wiped))
    results = (work_ptr, num_work_ptr, out_ptr, lse_ptr, whole_ptr, split_stride, scale_log2)
    gl.warp_specialize(
        [
            (_attend, (rings, results, 0, NUM_HEADS, KV_HEADS, FIELDS, HALF, CAUSAL, WITH_LSE)),
            (_attend, (rings, results, 1, NUM_HEADS, KV_HEADS, FIELDS, HALF, CAUSAL, WITH_LSE)),
            (_load, (k_desc, v_desc, rings, results, (tables_ptr, table_stride), KV_HEADS, FIELDS, D, PAGE)),
        ],
        [4, 1],
        [240, 24],
    )
    if PDL:  # noqa: SIM102 - settled when the kernel is compiled
        if beside != 0 and gl.program_id(0) == 0:
            gdc_wait()


def hopper_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    work: torch.Tensor,
    num_work: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    num_programs: int,
    *,
    whole: torch.Tensor | None = None,
    block_tables: torch.Tensor | None = None,
    block_size: int = 0,
    causal: bool = False,
    beside: bool = False,
) -> None:
    """Does the items of a work list and writes the partial results at their split indexes.

    Args:
        q, k_cache, v_cache, scale, num_work, out, num_programs: As for `prefix_attention`; see `takes`.
        work: From `plan_prefix`, or, if `causal`, from `plan_chunk` or `plan_suffix`; made for `TILES`.
        lse: None where every token has one part, which is then final.
        whole: As for `suffix_attention`.
        block_tables, block_size: Where the work is `plan_suffix`'s; as for `suffix_attention`.
        causal: Items say at which position their query tokens begin, and see keys up to their own.
        beside: As for `suffix_attention`.
    """
    num_heads, num_kv_heads, head_dim = head_shape(q, k_cache, v_cache)
    page = block_size if block_tables is not None else 0
    box = [page, _BOX] if page else [TILES.block_n, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(box, _GL_TYPES[q.dtype])
    tables = work if block_tables is None else block_tables
    launch(
        _kernel,
        (num_programs,),
        q,
        TensorDescriptor.from_tensor(k_cache.flatten(1), box, layout),
        TensorDescriptor.from_tensor(v_cache.flatten(1), box, layout),
        tables,
        tables.stride(0),
        work,
        num_work,
        out,
        out if lse is None else lse,
        out if whole is None else whole,
        out.shape[-3] * num_heads,
        scale * LOG2E,
        int(beside),
        NUM_HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        D=head_dim,
        BLOCK=TILES.block_n,
        FIELDS=work.shape[1],
        STAGES=TILES.num_stages,
        HALF=TILES.block_m // 2,
        CAUSAL=causal,
        PAGE=page,
        WITH_LSE=lse is not None,
        num_warps=TILES.num_warps,
        # 12 warps share 65,536 registers; the loading warp's group gives most of its own to the others.
        maxnreg=168,
    )
