"""Norm, rotary embedding with K/V write, SiLU·mul and block copy against their torch references."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.kernel_inputs import DEVICE, DTYPES, TOLERANCE, assert_near, poisoned, randn
from vllm.ops import activation
from vllm.ops.norm import Norm
from vllm.ops.rope import QkNorm, Rope
from vllm.ops.triton.activation import activate
from vllm.ops.triton.copy import BlockCopier, copy_blocks_reference
from vllm.ops.triton.linear import row_linear, row_linear_reference
from vllm.ops.triton.norm import row_norm, row_norm_reference
from vllm.ops.triton.rope import rope_and_write, rope_and_write_reference

NORMS = {
    "llama": Norm(1e-5),
    "gemma": Norm(1e-6, offset=1.0, rounds_first=False),
    "layer": Norm(1e-5, kind="layer", rounds_first=False),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 576), (17, 4096), (2, 5000)])
@pytest.mark.parametrize("norm", NORMS)
def test_norm(dtype: torch.dtype, rows: int, size: int, norm: str) -> None:
    x, weight = randn(rows, size, dtype=dtype) + 0.5, randn(size, dtype=dtype, seed=1)
    bias = randn(size, dtype=dtype, seed=2) if norm == "layer" else None
    want = row_norm_reference(x, weight, bias, NORMS[norm])
    assert_near(row_norm(x, weight, bias, NORMS[norm]), want, TOLERANCE[dtype])


def test_norm_in_place_of_part_of_wider_rows() -> None:
    wide, weight = randn(5, 300), randn(64, seed=1)
    want = wide.clone()
    want[:, 20:84] = row_norm_reference(wide[:, 20:84], weight, None, Norm(1e-5))
    part = wide[:, 20:84]
    assert row_norm(part, weight, None, Norm(1e-5), part) is part
    assert_near(wide, want, TOLERANCE[torch.float32])


def test_norm_of_no_rows() -> None:
    assert row_norm(randn(0, 64), randn(64), None, Norm(1e-5)).shape == (0, 64)


def table(turned: int) -> torch.Tensor:
    angles = torch.outer(torch.arange(100.0), 10000.0 ** -(torch.arange(turned // 2) / max(1, turned // 2)))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(DEVICE)


def check_rope(
    dtype: torch.dtype, tokens: int, shape: tuple[int, int, int], rope: Rope | None, qk_norm: QkNorm | None
) -> None:
    heads, kv_heads, dim = shape
    qkv = randn(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    rng = random.Random(tokens)
    slots = torch.tensor(rng.sample(range(4 * tokens), tokens), device=DEVICE)
    slots[tokens // 2] = -1
    positions = torch.tensor([rng.randrange(100) for _ in range(tokens)], device=DEVICE)
    caches = [randn(4 * tokens, kv_heads, dim, dtype=dtype, seed=i) for i in range(2)]
    want_caches = [c.clone() for c in caches]
    want = rope_and_write_reference(qkv, positions, rope, qk_norm, slots, *want_caches, heads)
    q = poisoned(tokens, heads, dim, dtype=dtype)
    assert rope_and_write(qkv, positions, rope, qk_norm, slots, *caches, heads, q) is q
    # Contracted multiply-adds differ from the reference in float32's last bit, and so may the rounded results.
    for out, expected in zip((q, *caches), (want, *want_caches), strict=True):
        assert_near(out, expected, TOLERANCE[dtype])
    assert torch.equal(caches[1], want_caches[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim"),
    [(1, 4, 1, 64), (5, 9, 3, 64), (40, 8, 8, 80), (3, 6, 2, 96), (7, 8, 1, 256)],
)
def test_rope_and_write(dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, dim: int) -> None:
    check_rope(dtype, tokens, (heads, kv_heads, dim), Rope(table(dim)), None)


@pytest.mark.parametrize("turned", [0, 16, 48, 80])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", [None, *NORMS])
@pytest.mark.parametrize("over_all", [False, True])
def test_rope_of_part_of_normalised_heads(turned: int, interleaved: bool, norm: str | None, over_all: bool) -> None:
    heads, kv_heads, dim = 6, 2, 80
    rope = Rope(table(turned), interleaved) if turned else None
    qk_norm = None
    if norm is not None:
        sizes = (heads * dim, kv_heads * dim) if over_all else (dim, dim)
        qk_norm = QkNorm(NORMS[norm], *(randn(size, seed=i) for i, size in enumerate(sizes)))
    check_rope(torch.float32, 3, (heads, kv_heads, dim), rope, qk_norm)


def test_rope_reads_rows_of_a_wider_array() -> None:
    wide = randn(4, 1000)
    qkv = wide[:, 8 : 8 + 6 * 64]
    unturned = torch.cat((torch.ones(8, 32), torch.zeros(8, 32)), dim=-1).to(DEVICE)
    k, v = (poisoned(4, 1, 64) for _ in range(2))
    index = torch.arange(4, device=DEVICE)
    q = rope_and_write(qkv, index, Rope(unturned), None, index, k, v, 4)
    assert torch.equal(q.flatten(1), qkv[:, :256])
    assert torch.equal(k.flatten(1), qkv[:, 256:320]) and torch.equal(v.flatten(1), qkv[:, 320:])


def test_rope_refuses_what_does_not_fit() -> None:
    k = randn(4, 2, 64)
    index = torch.arange(4, device=DEVICE)
    with pytest.raises(ValueError, match="does not fit 4 heads"):
        rope_and_write(randn(4, 9 * 64), index, Rope(randn(8, 64)), None, index, k, k.clone(), 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 1000), (17, 1536), (2, 14336)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", activation.FUNCTIONS)
def test_activation(dtype: torch.dtype, rows: int, size: int, gated: bool, name: activation.Activation) -> None:
    x = 3 * randn(rows, 2 * size if gated else size, dtype=dtype)
    assert_near(activate(x, name, gated), activation.activate(x, name, gated), TOLERANCE[dtype])


@pytest.mark.parametrize("pairs", [[], [(0, 5)], [(3, 4), (0, 6), (3, 7)], [(1, 2), (2, 1), (0, 3), (3, 0), (5, 6)]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_copy(dtype: torch.dtype, pairs: list[tuple[int, int]]) -> None:
    caches = [randn(8 * 16, 3, 80, dtype=dtype, seed=i) for i in range(4)]
    want = [c.clone() for c in caches]
    copy_blocks_reference(want, 16, pairs)
    BlockCopier(caches, 16).copy(pairs)
    for out, expected in zip(caches, want, strict=True):
        assert torch.equal(out, expected)


def test_block_copy_refuses_blocks_of_odd_bytes() -> None:
    with pytest.raises(ValueError, match="blocks of 6 bytes"):
        BlockCopier([randn(4, 1, 3, dtype=torch.bfloat16)], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (17, 576), (40, 1030), (9, 4096)])
def test_linear_of_one_row(dtype: torch.dtype, rows: int, size: int) -> None:
    x, weight = randn(1, size, dtype=dtype), randn(rows, size, dtype=dtype, seed=1)
    want = row_linear_reference(x, weight)
    assert_near(row_linear(x, weight), want, TOLERANCE[dtype])
    residual = randn(1, rows, dtype=dtype, seed=2)
    total = (residual.double() + x.double() @ weight.double().T).to(dtype)
    assert row_linear(x, weight, residual) is residual
    assert_near(residual, total, TOLERANCE[dtype])
    with pytest.raises(ValueError, match="no contiguous row"):
        row_linear(x[:, ::2], weight)
