"""Norm, rotary embedding with K/V write, SiLU·mul and block copy against their torch references."""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.kernel_inputs import DEVICE, DTYPES, TOLERANCE, assert_near, poisoned, randn
from vllm.ops.triton.activation import silu_and_mul, silu_and_mul_reference
from vllm.ops.triton.copy import BlockCopier, copy_blocks_reference
from vllm.ops.triton.linear import row_linear, row_linear_reference
from vllm.ops.triton.norm import rms_norm, rms_norm_reference
from vllm.ops.triton.rope import rope_and_write, rope_and_write_reference


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 576), (17, 4096), (2, 5000)])
def test_norm(dtype: torch.dtype, rows: int, size: int) -> None:
    x, weight = randn(rows, size, dtype=dtype), randn(size, dtype=dtype, seed=1)
    assert_near(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), TOLERANCE[dtype])


def test_norm_of_no_rows() -> None:
    assert rms_norm(randn(0, 64), randn(64), 1e-5).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "dim"),
    [(1, 4, 1, 64), (5, 9, 3, 64), (40, 8, 8, 80), (3, 6, 2, 96), (7, 8, 1, 256)],
)
def test_rope_and_write(dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, dim: int) -> None:
    qkv = randn(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    rng = random.Random(tokens)
    slots = torch.tensor(rng.sample(range(4 * tokens), tokens), device=DEVICE)
    slots[tokens // 2] = -1
    positions = torch.tensor([rng.randrange(100) for _ in range(tokens)], device=DEVICE)
    angles = torch.outer(torch.arange(100.0), 10000.0 ** -(torch.arange(dim // 2) / (dim // 2)))
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(DEVICE)
    caches = [randn(4 * tokens, kv_heads, dim, dtype=dtype, seed=i) for i in range(2)]
    want_caches = [c.clone() for c in caches]
    want = rope_and_write_reference(qkv, positions, cos_sin, slots, *want_caches, heads)
    q = poisoned(tokens, heads, dim, dtype=dtype)
    assert rope_and_write(qkv, positions, cos_sin, slots, *caches, heads, q) is q
    # Contracted multiply-adds differ from the reference in float32's last bit, and so may the rounded results.
    for out, expected in zip((q, *caches), (want, *want_caches), strict=True):
        assert_near(out, expected, TOLERANCE[dtype])
    assert torch.equal(caches[1], want_caches[1])


def test_rope_reads_rows_of_a_wider_array() -> None:
    wide = randn(4, 1000)
    qkv = wide[:, 8 : 8 + 6 * 64]
    table = torch.cat((torch.ones(8, 32), torch.zeros(8, 32)), dim=-1).to(DEVICE)
    k, v = (poisoned(4, 1, 64) for _ in range(2))
    index = torch.arange(4, device=DEVICE)
    q = rope_and_write(qkv, index, table, index, k, v, 4)
    assert torch.equal(q.flatten(1), qkv[:, :256])
    assert torch.equal(k.flatten(1), qkv[:, 256:320]) and torch.equal(v.flatten(1), qkv[:, 320:])


def test_rope_refuses_what_does_not_fit() -> None:
    k = randn(4, 2, 64)
    index = torch.arange(4, device=DEVICE)
    with pytest.raises(ValueError, match="does not fit 4 heads"):
        rope_and_write(randn(4, 9 * 64), index, randn(8, 64), index, k, k.clone(), 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 1000), (17, 1536), (2, 14336)])
def test_silu_and_mul(dtype: torch.dtype, rows: int, size: int) -> None:
    gate_up = 3 * randn(rows, 2 * size, dtype=dtype)
    assert_near(silu_and_mul(gate_up), silu_and_mul_reference(gate_up), TOLERANCE[dtype])


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
