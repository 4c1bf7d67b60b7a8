"""Products of tokens with the matrices of their experts: `vllm.ops.moe.mix_experts` on a GPU.

A program multiplies one tile, up to `block_m` tokens of one expert, by `block_n` rows of its matrix:

    1  gate and up of a tile, whose rows alternate, and their activation, to rows in the order of the experts
    2  down of those rows, to rows in the order of tokens and places
    3  residual + Σₖ weightₖ · rowₖ, in float32, places in order: the sum never depends on the batch

Grids are as large as any routing of so many tokens may need; programs without a tile end at once.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm.ops.launch import follow, launch
from vllm.ops.moe import Experts, Routing
from vllm.ops.triton.expert_tiles import ProductTiles, activation_options, gate_times_up, tiles_for
from vllm.ops.triton.mxfp4 import packed_expert_rows
from vllm.ops.triton.routing import Routed, route_and_sort
from vllm.platforms.devices import gpu_generation

_BLOCK_SUM = 1024


@triton.jit
def _weights(desc, at, row, k, mask, N_INSIDE: tl.constexpr, K_INSIDE: tl.constexpr, TMA: tl.constexpr):
    """A tile of a matrix, [block_n, block_k]."""
    if TMA:
        return desc.load([row, k])
    elif N_INSIDE and K_INSIDE:
        return tl.load(at + k)
    else:
        return tl.load(at + k, mask=mask, other=0.0)


@triton.jit
def _gate_up_kernel(
    x_ptr,
    weight_ptr,
    desc,
    bias_ptr,
    order_ptr,
    tiles_ptr,
    out_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    N_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    N_INSIDE: tl.constexpr = N % BLOCK_N == 0
    K_INSIDE: tl.constexpr = K % BLOCK_K == 0
    tile, n = tl.program_id(0) // N_BLOCKS, tl.program_id(0) % N_BLOCKS
    follow(PDL)
    expert = tl.load(tiles_ptr + tile * 3)
    if expert < 0:
        return
    first, last = tl.load(tiles_ptr + tile * 3 + 1), tl.load(tiles_ptr + tile * 3 + 2)
    rows = first + tl.arange(0, BLOCK_M)
    valid = rows < last
    # Rows behind the tile's last repeat a token, and are not stored.
    tokens = tl.load(order_ptr + rows, mask=valid, other=0) // TOP_K
    columns, k = n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside = columns < N
    x_at = x_ptr + tokens.to(tl.int64)[:, None] * K + k[None, :]
    weight_at = weight_ptr + (expert.to(tl.int64) * N + columns)[:, None] * K + k[None, :]
    both = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        within = k < K - start
        x = tl.load(x_at + start) if K_INSIDE else tl.load(x_at + start, mask=within[None, :], other=0.0)
        mask = inside[:, None] & within[None, :]
        matrix = _weights(desc, weight_at, expert * N + n * BLOCK_N, start, mask, N_INSIDE, K_INSIDE, TMA)
        both = tl.dot(x, tl.trans(matrix), both, input_precision="ieee")
    if HAS_BIAS:
        both += tl.load(bias_ptr + expert * N + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    # Gate and up alternate, so each thread holds both.
    gate, up = tl.split(tl.reshape(both.to(dtype), [BLOCK_M, BLOCK_N // 2, 2]))
    out = gate_times_up(gate, up, ACTIVATION, ALPHA, LIMIT, dtype)
    columns = n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    out_at = out_ptr + rows.to(tl.int64)[:, None] * (N // 2) + columns[None, :]
    tl.store(out_at, out.to(dtype), mask=valid[:, None] & (columns < N // 2)[None, :])


@triton.jit
def _down_kernel(
    x_ptr,
    weight_ptr,
    desc,
    bias_ptr,
    order_ptr,
    tiles_ptr,
    out_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    N_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    N_INSIDE: tl.constexpr = N % BLOCK_N == 0
    K_INSIDE: tl.constexpr = K % BLOCK_K == 0
    tile, n = tl.program_id(0) // N_BLOCKS, tl.program_id(0) % N_BLOCKS
    follow(PDL)
    expert = tl.load(tiles_ptr + tile * 3)
    if expert < 0:
        return
    first, last = tl.load(tiles_ptr + tile * 3 + 1), tl.load(tiles_ptr + tile * 3 + 2)
    rows = first + tl.arange(0, BLOCK_M)
    valid = rows < last
    pairs = tl.load(order_ptr + rows, mask=valid, other=0)
    columns, k = n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside = columns < N
    # Rows behind the tile's last repeat the first, and are not stored.
    x_at = x_ptr + tl.where(valid, rows, first).to(tl.int64)[:, None] * K + k[None, :]
    weight_at = weight_ptr + (expert.to(tl.int64) * N + columns)[:, None] * K + k[None, :]
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        within = k < K - start
        x = tl.load(x_at + start) if K_INSIDE else tl.load(x_at + start, mask=within[None, :], other=0.0)
        mask = inside[:, None] & within[None, :]
        matrix = _weights(desc, weight_at, expert * N + n * BLOCK_N, start, mask, N_INSIDE, K_INSIDE, TMA)
        out = tl.dot(x, tl.trans(matrix), out, input_precision="ieee")
    if HAS_BIAS:
        out += tl.load(bias_ptr + expert * N + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + pairs.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=valid[:, None] & inside[None, :])


@triton.jit
def _sum_kernel(
    rows_ptr,
    weights_ptr,
    residual_ptr,
    out_ptr,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        row = tl.load(rows_ptr + (token * TOP_K + k) * SIZE + columns, mask=mask, other=0.0)
        total += tl.load(weights_ptr + token * TOP_K + k) * row.to(tl.float32)
    if ADD:
        total += tl.load(residual_ptr + token * SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * SIZE + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


def mix_experts(
    x: torch.Tensor,
    logits: torch.Tensor,
    correction: torch.Tensor | None,
    expert_factors: torch.Tensor | None,
    routing: Routing,
    experts: Experts,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `vllm.ops.moe.mix_experts`; x and the residual stream are contiguous, and the latter becomes the result."""
    tokens, num_experts = logits.shape
    packed = experts.gate_up_scales is not None
    first, second = tiles_for(tokens * routing.top_k, num_experts, packed)
    routed = route_and_sort(logits, correction, expert_factors, routing, first.block_m)
    rows = expert_rows(x, routed, experts, first, second)
    return weighted_sum(rows, routed.weights, residual)


def expert_rows(
    x: torch.Tensor, routed: Routed, experts: Experts, first: ProductTiles, second: ProductTiles
) -> torch.Tensor:
    """What each expert makes of each of its tokens: x [T, H], contiguous → [T, K, H]."""
    if not x.is_contiguous():
        raise ValueError("the input of experts must be contiguous")
    top_k = routed.weights.shape[1]
    hidden = x.shape[1]
    rows = x.new_empty(len(x), top_k, hidden)
    if not len(x):
        return rows
    if experts.gate_up_scales is not None:
        return packed_expert_rows(x, routed, experts, first, second, rows)
    size = experts.down.shape[2]
    middle = x.new_empty(len(routed.order), size)
    shared = (routed.order, routed.tiles)
    gate_up, down, num_tiles = experts.gate_up, experts.down, len(routed.tiles)
    launch(
        _gate_up_kernel,
        (num_tiles * triton.cdiv(2 * size, first.block_n),),
        x,
        gate_up,
        _descriptor(gate_up, first),
        gate_up if experts.gate_up_bias is None else experts.gate_up_bias,
        *shared,
        middle,
        K=hidden,
        N=2 * size,
        TOP_K=top_k,
        **activation_options(experts),
        HAS_BIAS=experts.gate_up_bias is not None,
        **_options(gate_up, first),
    )
    launch(
        _down_kernel,
        (num_tiles * triton.cdiv(hidden, second.block_n),),
        middle,
        down,
        _descriptor(down, second),
        down if experts.down_bias is None else experts.down_bias,
        *shared,
        rows,
        K=size,
        N=hidden,
        HAS_BIAS=experts.down_bias is not None,
        **_options(down, second),
    )
    return rows


def weighted_sum(rows: torch.Tensor, weights: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """`residual + Σₖ weights[t, k] · rows[t, k]`: rows [T, K, H], weights float32 [T, K] → [T, H], in place of the
    residual stream if there is one."""
    tokens, top_k, size = rows.shape
    out = rows.new_empty(tokens, size) if residual is None else residual
    if not out.is_contiguous():
        raise ValueError("the residual stream must be contiguous")
    if tokens:
        block = min(_BLOCK_SUM, triton.next_power_of_2(size))
        options = {"SIZE": size, "TOP_K": top_k, "ADD": residual is not None, "BLOCK": block, "num_warps": 4}
        launch(_sum_kernel, (tokens, triton.cdiv(size, block)), rows, weights, out, out, **options)
    return out


def _uses_tma(matrices: torch.Tensor) -> bool:
    """Matrices are loaded through tensor descriptors where that can be done: on Hopper and newer, 16-bit rows of whole
    16 bytes."""
    narrow = matrices.dtype.itemsize == 2 and matrices.shape[2] % 8 == 0
    return narrow and gpu_generation(matrices.device) >= (9, 0)


def _descriptor(matrices: torch.Tensor, tiles: ProductTiles) -> object:
    if not _uses_tma(matrices):
        return matrices
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrices.flatten(0, 1), [tiles.block_n, tiles.block_k])


def _options(matrices: torch.Tensor, tiles: ProductTiles) -> dict[str, object]:
    return {
        "TMA": _uses_tma(matrices),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
