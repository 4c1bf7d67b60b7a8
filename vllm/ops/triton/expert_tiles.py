"""How products with experts are cut, and what stands between the two of an expert; shared by all forms of weights.

Few tokens are bound by the reading of the matrices, each of which is read once if its expert's tokens are one tile, so
tiles are as high as most experts need. Many tokens are bound by the tensor cores and take tiles of 128.
"""

# Kernels are written in Triton's language, whose values have no Python types.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from vllm.ops.moe import ClampedSwiGLU, Experts
from vllm.ops.triton.activation import activation_function


@dataclass(frozen=True)
class ProductTiles:
    """How one of the two products is cut.

    Attributes:
        block_m, block_n, block_k: Tokens, rows of the matrix, and columns at a time.
        num_warps, num_stages: Of the compiler.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Most tokens that an expert gets, if all get as many → tiles of the first and the second product.
TILES: tuple[tuple[float, ProductTiles, ProductTiles], ...] = (
    (8, ProductTiles(16, 64, 128, 4, 4), ProductTiles(16, 64, 128, 4, 4)),
    (24, ProductTiles(32, 64, 128, 4, 4), ProductTiles(32, 64, 128, 4, 4)),
    (64, ProductTiles(64, 128, 64, 4, 4), ProductTiles(64, 128, 64, 4, 4)),
    (float("inf"), ProductTiles(128, 256, 64, 8, 4), ProductTiles(128, 256, 64, 8, 4)),
)
# Of MXFP4 matrices.
PACKED_TILES: tuple[tuple[float, ProductTiles, ProductTiles], ...] = (
    (8, ProductTiles(16, 64, 128, 4, 4), ProductTiles(16, 64, 128, 4, 4)),
    (24, ProductTiles(32, 64, 128, 4, 4), ProductTiles(32, 64, 128, 4, 4)),
    (64, ProductTiles(64, 64, 128, 4, 3), ProductTiles(64, 64, 128, 4, 3)),
    (float("inf"), ProductTiles(128, 128, 128, 8, 3), ProductTiles(128, 128, 128, 8, 3)),
)


def tiles_for(num_pairs: int, num_experts: int, packed: bool) -> tuple[ProductTiles, ProductTiles]:
    """Tiles of both products; they have the same height. `packed`: of MXFP4 matrices, 128 columns at a time."""
    table = PACKED_TILES if packed else TILES
    return next((first, second) for most, first, second in table if num_pairs <= most * num_experts)


@triton.jit
def gate_times_up(gate, up, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, dtype: tl.constexpr):
    """Tiles of both, in `dtype` → the middle; rounded to `dtype` where the operations one after the other are."""
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    if ACTIVATION == "clamped":
        gate, up = tl.minimum(gate, LIMIT), tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return (up + 1.0) * gate * tl.sigmoid(ALPHA * gate)
    else:
        return activation_function(gate, ACTIVATION).to(dtype).to(tl.float32) * up


def activation_options(experts: Experts) -> dict[str, object]:
    """Constexprs of `gate_times_up`."""
    activation = experts.activation
    if isinstance(activation, ClampedSwiGLU):
        return {"ACTIVATION": "clamped", "ALPHA": activation.alpha, "LIMIT": activation.limit}
    return {"ACTIVATION": activation, "ALPHA": 0.0, "LIMIT": 0.0}
