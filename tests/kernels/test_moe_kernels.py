"""Routing, sorting and the products of experts against their torch references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.kernel_inputs import DEVICE, TOLERANCE, assert_near, randn
from vllm.ops import moe, mxfp4
from vllm.ops.moe import ClampedSwiGLU, Experts, Routing
from vllm.ops.triton.expert_tiles import ProductTiles
from vllm.ops.triton.moe import expert_rows, mix_experts, weighted_sum
from vllm.ops.triton.routing import max_tiles, route_and_sort

ROUTINGS = {
    "mixtral": Routing(2, renormalise=True),
    "qwen2": Routing(4),
    "gpt-oss": Routing(4, scoring="chosen"),
    "glm": Routing(3, scoring="sigmoid", renormalise=True, scale=1.5, epsilon=1e-20),
    "groups": Routing(3, scoring="sigmoid", renormalise=True, num_groups=4, top_groups=2),
    "phi": Routing(2, scoring="sparsemixer", jitter=0.2),
    "one": Routing(1, renormalise=True),
}


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize(("tokens", "experts"), [(1, 8), (37, 12)])
def test_routing(name: str, tokens: int, experts: int) -> None:
    routing = ROUTINGS[name]
    logits = 2 * randn(tokens, experts)
    correction = randn(experts, seed=1) if routing.scoring == "sigmoid" else None
    factors = randn(experts, seed=2) if name == "qwen2" else None
    chosen, weights = moe.route(logits, correction, routing)
    if factors is not None:
        weights = weights * factors[chosen]
    routed = route_and_sort(logits, correction, factors, routing, 16)
    assert torch.equal(routed.chosen.long(), chosen)
    torch.testing.assert_close(routed.weights, weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_scores_the_first_experts_are_chosen(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 20, dtype=dtype, device=DEVICE)
    logits[1, 7] = logits[1, 19] = 1.0
    logits[2] = float("nan")
    routed = route_and_sort(logits, None, None, Routing(3), 16)
    assert routed.chosen[:2].tolist() == [[0, 1, 2], [7, 19, 0]]
    # Logits that are no numbers are padding, or a fault of one request: no expert that does not exist is read.
    assert bool(((routed.chosen >= 0) & (routed.chosen < 20)).all())


@pytest.mark.parametrize(
    ("tokens", "experts", "block_m"), [(1, 8, 16), (50, 6, 16), (1500, 20, 32), (4, 40, 16), (13, 5, 16)]
)
def test_pairs_are_sorted_by_expert(tokens: int, experts: int, block_m: int) -> None:
    routing = Routing(3)
    logits = randn(tokens, experts)
    logits[:, 2] += 3  # one expert that most tokens go to
    routed = route_and_sort(logits, None, None, routing, block_m)
    chosen = routed.chosen.flatten().long()
    assert torch.equal(routed.order.long(), chosen.sort(stable=True).indices)
    tiles = routed.tiles.tolist()
    assert len(tiles) == max_tiles(3 * tokens, experts, block_m)
    counts = torch.bincount(chosen, minlength=experts).tolist()
    want, first = [], 0
    for expert, count in enumerate(counts):
        want += [[expert, first + i, first + count] for i in range(0, count, block_m)]
        first += count
    assert [tile for tile in tiles if tile[0] >= 0] == want
    assert {tile[0] for tile in tiles[len(want) :]} <= {-1}


def make_experts(
    experts: int, hidden: int, size: int, dtype: torch.dtype, activation: moe.Activation | ClampedSwiGLU, biases: bool
) -> Experts:
    stacks = randn(experts, 2 * size, hidden, dtype=dtype, seed=3), randn(experts, hidden, size, dtype=dtype, seed=4)
    made = Experts(stacks[0] / hidden**0.5, stacks[1] / size**0.5, activation)
    if biases:
        made = made._replace(
            gate_up_bias=randn(experts, 2 * size, dtype=dtype, seed=5),
            down_bias=randn(experts, hidden, seed=6).to(dtype),
        )
    return made


TILES = ProductTiles(16, 32, 32, 4, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "shape", "activation", "biases", "tiles"),
    [
        (1, (8, 64, 64), "silu", False, TILES),
        (70, (6, 64, 96), "silu", False, TILES),
        (9, (12, 72, 40), "gelu_tanh", False, TILES),
        (20, (5, 80, 48), ClampedSwiGLU(1.702, 1.0), True, replace(TILES, block_m=32)),
    ],
)
def test_products_of_experts(
    dtype: torch.dtype,
    tokens: int,
    shape: tuple[int, int, int],
    activation: moe.Activation | ClampedSwiGLU,
    biases: bool,
    tiles: ProductTiles,
) -> None:
    experts = make_experts(*shape, dtype, activation, biases)
    x, residual = randn(tokens, shape[1], dtype=dtype), randn(tokens, shape[1], dtype=dtype, seed=7)
    routed = route_and_sort(randn(tokens, shape[0], seed=8), None, None, Routing(3, renormalise=True), tiles.block_m)
    want = moe.apply_experts(x, routed.chosen.long(), routed.weights, experts, residual)
    rows = expert_rows(x, routed, experts, tiles, replace(tiles, block_n=64))
    out = weighted_sum(rows, routed.weights, residual)
    assert out is residual
    assert_near(out, want, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("tokens", "shape", "biases", "block_m"),
    [(1, (4, 128, 64), False, 16), (21, (5, 160, 96), True, 16), (40, (3, 288, 64), True, 32)],
)
def test_products_of_mxfp4_experts(tokens: int, shape: tuple[int, int, int], biases: bool, block_m: int) -> None:
    activation = ClampedSwiGLU(1.702, 7.0)
    experts = make_experts(*shape, torch.bfloat16, activation, biases)
    stored = [mxfp4.quantise(8 * stack) for stack in (experts.gate_up, experts.down)]
    plain = experts._replace(
        gate_up=mxfp4.dequantise(*stored[0], torch.bfloat16), down=mxfp4.dequantise(*stored[1], torch.bfloat16)
    )
    (gate_up, gate_up_scales), (down, down_scales) = (mxfp4.arrange(*one) for one in stored)
    packed = experts._replace(gate_up=gate_up, down=down, gate_up_scales=gate_up_scales, down_scales=down_scales)
    tiles = replace(TILES, block_m=block_m, block_n=64)
    x = randn(tokens, shape[1], dtype=torch.bfloat16)
    routed = route_and_sort(randn(tokens, shape[0], seed=8), None, None, Routing(2, renormalise=True), block_m)
    want = moe.apply_experts(x, routed.chosen.long(), routed.weights, plain)
    out = weighted_sum(expert_rows(x, routed, packed, tiles, tiles), routed.weights)
    assert_near(out, want, TOLERANCE[torch.bfloat16])


def test_the_whole_mixture() -> None:
    experts = make_experts(8, 64, 32, torch.float32, "silu", biases=False)
    x, logits = randn(5, 64), randn(5, 8, seed=1)
    for residual in (None, randn(5, 64, seed=2)):
        want = moe.mix_experts(x.cpu(), logits.cpu(), None, None, ROUTINGS["mixtral"], _on_cpu(experts), None)
        want = want if residual is None else want + residual.cpu()
        out = mix_experts(x, logits, None, None, ROUTINGS["mixtral"], experts, residual)
        assert_near(out.cpu(), want, TOLERANCE[torch.float32])
    nothing = mix_experts(x[:0], logits[:0], None, None, ROUTINGS["mixtral"], experts)
    assert nothing.shape == (0, 64)


def _on_cpu(experts: Experts) -> Experts:
    return Experts(*(part.cpu() if isinstance(part, torch.Tensor) else part for part in experts))
