"""Which experts tokens go to, and the pairs of token and expert in the order of the experts; all on the device.

Two launches. In the first, each program routes a run of tokens and counts how many go to each expert; in the second,
each adds up the counts of the programs before it and puts its own pairs where they belong (a counting sort, stable, so
that the order depends on nothing else). The second also makes the work list of the grouped products: tiles of `block_m`
pairs of one expert. The lists are as long as any routing of so many tokens may need, so that graphs can hold them. Up
to 16 tokens are routed and sorted by one program, in one launch.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm.ops.launch import follow, launch
from vllm.ops.moe import Routing

_BLOCK_T = 16
_MAX_PROGRAMS = 64
_BLOCK_PAIRS = 64
_BLOCK_TILES = 16


class Routed(NamedTuple):
    """Tokens on their way to experts.

    Attributes:
        weights: Of each token's experts; float32 [T, K].
        order: Pairs `token · K + place`, those of an expert together and rising; int32 [T K].
        tiles: Expert, first and last (exclusive) place in `order` of each tile; int32 [n, 3], expert -1 for none.
        chosen: Experts of each token; int32 [T, K].
    """

    weights: torch.Tensor
    order: torch.Tensor
    tiles: torch.Tensor
    chosen: torch.Tensor


def max_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Tiles that any routing of so many pairs may need."""
    return min(num_pairs, num_pairs // block_m + num_experts)


@triton.jit
def _in_best_groups(
    ranked,
    e,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Whether an expert belongs to one of the groups whose two best sum to the most."""
    g = tl.arange(0, BLOCK_G)
    scores = tl.full([BLOCK_T, BLOCK_G], float("-inf"), tl.float32)
    for group in tl.static_range(GROUPS):
        mine = tl.where((e // SIZE == group)[None, :], ranked, float("-inf"))
        first = tl.argmax(mine, 1)
        second = tl.max(tl.where(e[None, :] == first[:, None], float("-inf"), mine), 1)
        scores = tl.where(g[None, :] == group, (tl.max(mine, 1) + second)[:, None], scores)
    inside = e[None, :] < 0
    for _ in tl.static_range(TOP_GROUPS):
        best = tl.argmax(scores, 1)
        inside = inside | ((e // SIZE)[None, :] == best[:, None])
        scores = tl.where(g[None, :] == best[:, None], float("-inf"), scores)
    return inside


@triton.jit
def _put(order_ptr, chosen, pairs, valid, e, here):
    """Writes pairs where those of their experts begin, `here`, or go on; returns where the next ones go on."""
    hit = (chosen[:, None] == e[None, :]).to(tl.int32)
    places = tl.sum(hit * (here[None, :] + tl.cumsum(hit, 0) - 1), 1)
    tl.store(order_ptr + places, pairs, mask=valid)
    return here + tl.sum(hit, 0)


@triton.jit
def _cut(
    tiles_ptr,
    program,
    tiles_per_program,
    num_tiles,
    e,
    total,
    starts,
    BLOCK_E: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Writes this program's share of the tiles."""
    tiles_of_each = (total + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(tiles_of_each, 0)
    for first in range(0, tiles_per_program, BLOCK_TILES):
        within = first + tl.arange(0, BLOCK_TILES)
        tiles = program * tiles_per_program + within
        expert = tl.sum((ends[None, :] <= tiles[:, None]).to(tl.int32), 1)
        hit = (expert[:, None] == e[None, :]).to(tl.int32)
        begins = tl.sum(hit * starts[None, :], 1)
        place = tiles - tl.sum(hit * (ends - tiles_of_each)[None, :], 1)
        stops = begins + tl.sum(hit * total[None, :], 1)
        valid = (within < tiles_per_program) & (tiles < num_tiles)
        at = tiles_ptr + tiles * 3
        tl.store(at, tl.where(expert < BLOCK_E, expert, -1), mask=valid)
        tl.store(at + 1, begins + place * BLOCK_M, mask=valid)
        tl.store(at + 2, stops, mask=valid)


@triton.jit(do_not_specialize=["num_tokens", "steps", "num_tiles"])
def _route_kernel(
    logits_ptr,
    correction_ptr,
    factors_ptr,
    chosen_ptr,
    weights_ptr,
    counts_ptr,
    order_ptr,
    tiles_ptr,
    num_tokens,
    steps,
    num_tiles,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_TOP: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    EPSILON: tl.constexpr,
    JITTER: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SORTS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """SORTS: there is one program and one step, and it does what `_sort_kernel` does."""
    follow(PDL)
    e, k = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_TOP)
    exists = (e < EXPERTS)[None, :]
    counts = tl.zeros([BLOCK_E], tl.int32)
    for step in range(steps):
        tokens = (tl.program_id(0) * steps + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        valid = tokens < num_tokens
        at = logits_ptr + tokens.to(tl.int64)[:, None] * EXPERTS + e[None, :]
        logits = tl.load(at, mask=valid[:, None] & exists, other=0.0).to(tl.float32)
        logits = tl.where(exists, logits, float("-inf"))
        if SCORING == "softmax":
            scores = tl.exp(logits - tl.max(logits, 1)[:, None])
            scores = scores / tl.sum(scores, 1)[:, None]
        elif SCORING == "sigmoid":
            scores = 1.0 / (1.0 + tl.exp(-logits))
        else:
            scores = logits
        left = scores
        if HAS_CORRECTION:
            left += tl.load(correction_ptr + e, mask=e < EXPERTS, other=0.0)[None, :]
        if GROUPS > 1:
            inside = _in_best_groups(left, e, EXPERTS // GROUPS, GROUPS, TOP_GROUPS, BLOCK_G, BLOCK_T)
            left = tl.where(inside, left, float("-inf"))
        left = tl.where(exists, left, float("-inf"))
        chosen = tl.zeros([BLOCK_T, BLOCK_TOP], tl.int32)
        weights = tl.zeros([BLOCK_T, BLOCK_TOP], tl.float32)
        if SCORING == "chosen":
            weights = tl.full([BLOCK_T, BLOCK_TOP], float("-inf"), tl.float32)
        for place in tl.static_range(TOP_K):
            # Of logits that are no numbers any expert is as good as another, but it must be one.
            best = tl.minimum(tl.argmax(left, 1), EXPERTS - 1)
            hit = e[None, :] == best[:, None]
            if SCORING == "sparsemixer":
                most = tl.max(left, 1)[:, None]
                near = (most - scores) / tl.maximum(tl.abs(scores), most) <= 2.0 * JITTER
                weight = 1.0 / tl.sum(tl.where(near, tl.exp(left - most), 0.0), 1)
            else:
                weight = tl.sum(tl.where(hit, scores, 0.0), 1)
            here = k[None, :] == place
            chosen = tl.where(here, best[:, None], chosen)
            weights = tl.where(here, weight[:, None], weights)
            left = tl.where(hit, float("-inf"), left)
            counts += tl.sum((hit & valid[:, None]).to(tl.int32), 0)
        if SCORING == "chosen":
            weights = tl.exp(weights - tl.max(weights, 1)[:, None])
            weights = weights / tl.sum(weights, 1)[:, None]
        if RENORMALISE:
            weights = weights / (tl.sum(weights, 1)[:, None] + EPSILON)
        weights = weights * SCALE
        if HAS_FACTORS:
            weights *= tl.load(factors_ptr + chosen).to(tl.float32)
        pairs = tokens.to(tl.int64)[:, None] * TOP_K + k[None, :]
        wanted = valid[:, None] & (k < TOP_K)[None, :]
        tl.store(chosen_ptr + pairs, chosen, mask=wanted)
        tl.store(weights_ptr + pairs, weights, mask=wanted)
        if SORTS:
            SIZE: tl.constexpr = BLOCK_T * BLOCK_TOP
            starts = tl.cumsum(counts, 0) - counts
            ids = tl.reshape(tl.where(wanted, chosen, -1), [SIZE])
            _put(order_ptr, ids, tl.reshape(pairs, [SIZE]).to(tl.int32), ids >= 0, e, starts)
            _cut(tiles_ptr, 0, num_tiles, num_tiles, e, counts, starts, BLOCK_E, BLOCK_TILES, BLOCK_M)
    if not SORTS:
        tl.store(counts_ptr + tl.program_id(0) * BLOCK_E + e, counts)


@triton.jit(do_not_specialize=["num_pairs", "pairs_per_program", "num_tiles", "tiles_per_program"])
def _sort_kernel(
    chosen_ptr,
    counts_ptr,
    order_ptr,
    tiles_ptr,
    num_pairs,
    pairs_per_program,
    num_tiles,
    tiles_per_program,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    follow(PDL)
    program, e, c = tl.program_id(0), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_C)
    counts = tl.load(counts_ptr + c[:, None] * BLOCK_E + e[None, :], mask=(c < tl.num_programs(0))[:, None], other=0)
    total = tl.sum(counts, 0)
    starts = tl.cumsum(total, 0) - total
    here = starts + tl.sum(tl.where((c < program)[:, None], counts, 0), 0)
    for first in range(0, pairs_per_program, BLOCK_PAIRS):
        within = first + tl.arange(0, BLOCK_PAIRS)
        pairs = program * pairs_per_program + within
        valid = (within < pairs_per_program) & (pairs < num_pairs)
        chosen = tl.load(chosen_ptr + pairs, mask=valid, other=-1)
        here = _put(order_ptr, chosen, pairs, valid, e, here)
    _cut(tiles_ptr, program, tiles_per_program, num_tiles, e, total, starts, BLOCK_E, BLOCK_TILES, BLOCK_M)


def route_and_sort(
    logits: torch.Tensor,
    correction: torch.Tensor | None,
    expert_factors: torch.Tensor | None,
    routing: Routing,
    block_m: int,
) -> Routed:
    """logits [T, E], correction float32 [E], expert_factors [E]; see `vllm.ops.moe` for the formulas. Of equal scores
    the first expert is chosen."""
    if not logits.is_contiguous():
        raise ValueError("the logits of a router must be contiguous")
    tokens, experts = logits.shape
    top_k, device = routing.top_k, logits.device
    num_pairs = tokens * top_k
    num_tiles = max_tiles(num_pairs, experts, block_m)
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=device)
    chosen = torch.empty((tokens, top_k), dtype=torch.int32, device=device)
    order = torch.empty(num_pairs, dtype=torch.int32, device=device)
    tiles = torch.empty((num_tiles, 3), dtype=torch.int32, device=device)
    if not tokens:
        return Routed(weights, order, tiles, chosen)
    block_t = min(_BLOCK_T, triton.next_power_of_2(tokens))
    steps = triton.cdiv(triton.cdiv(tokens, block_t), _MAX_PROGRAMS)
    programs = triton.cdiv(tokens, steps * block_t)
    sorts = programs == 1 and steps == 1
    block_e = triton.next_power_of_2(experts)
    counts = torch.empty((programs, block_e), dtype=torch.int32, device=device)
    launch(
        _route_kernel,
        (programs,),
        logits,
        counts if correction is None else correction,
        counts if expert_factors is None else expert_factors,
        chosen,
        weights,
        counts,
        order,
        tiles,
        tokens,
        steps,
        num_tiles,
        EXPERTS=experts,
        BLOCK_E=block_e,
        TOP_K=top_k,
        BLOCK_TOP=triton.next_power_of_2(top_k),
        SCORING=routing.scoring,
        RENORMALISE=routing.renormalise,
        SCALE=routing.scale,
        GROUPS=routing.num_groups,
        TOP_GROUPS=routing.top_groups,
        BLOCK_G=triton.next_power_of_2(routing.num_groups),
        EPSILON=routing.epsilon,
        JITTER=routing.jitter,
        HAS_CORRECTION=correction is not None,
        HAS_FACTORS=expert_factors is not None,
        BLOCK_T=block_t,
        SORTS=sorts,
        BLOCK_TILES=_BLOCK_TILES,
        BLOCK_M=block_m,
        num_warps=8 if block_t * block_e >= 1024 else 4,
    )
    if sorts:
        return Routed(weights, order, tiles, chosen)
    launch(
        _sort_kernel,
        (programs,),
        chosen,
        counts,
        order,
        tiles,
        num_pairs,
        steps * block_t * top_k,
        num_tiles,
        triton.cdiv(num_tiles, programs),
        BLOCK_E=block_e,
        BLOCK_C=16 if programs <= 16 else _MAX_PROGRAMS,
        BLOCK_PAIRS=_BLOCK_PAIRS,
        BLOCK_TILES=_BLOCK_TILES,
        BLOCK_M=block_m,
        num_warps=4,
    )
    return Routed(weights, order, tiles, chosen)
